"""Blocks of leaves: how they are named, and their inner products."""

import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.tree import block_inner, block_scale, label_blocks, one_block

PARAMS = {
    "decoder": [{"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}],
    "encoder": [
        {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))},
        {"bias": jnp.ones(1), "kernel": jnp.ones((3, 1))},
    ],
    "scale": jnp.ones(()),
}


def test_leaves_with_one_parent_are_a_block():
    blocks = label_blocks(None, PARAMS)
    assert blocks.names == ("decoder/0", "encoder/0", "encoder/1", "scale")
    assert blocks.labels == (0, 0, 1, 1, 2, 2, 3)
    assert blocks.leaves_of(1) == (2, 3)


def test_labels_by_path():
    blocks = label_blocks(lambda path: path.split("/")[0], PARAMS)
    assert blocks.names == ("decoder", "encoder", "scale")
    assert blocks.labels == (0, 0, 1, 1, 1, 1, 2)


def test_labels_as_a_tree_prefix():
    blocks = label_blocks({"decoder": "net", "encoder": ["net", "top"], "scale": 7}, PARAMS)
    assert blocks.names == ("net", "top", "7")
    assert blocks.labels == (0, 0, 0, 0, 1, 1, 2)


def test_a_single_array_is_one_block():
    assert label_blocks(None, jnp.ones(3)).names == ("(params)",)
    assert one_block(PARAMS).labels == (0,) * 7


@pytest.mark.parametrize("labels", [{"decoder": "a"}, ["a", "b"]])
def test_labels_that_do_not_fit_are_an_error(labels):
    with pytest.raises(ValueError, match="prefix"):
        label_blocks(labels, PARAMS)


def test_products_of_blocks_accumulate_in_float32():
    blocks = label_blocks(lambda path: path, {"a": 0, "b": 0})
    x = {"a": jnp.full(1000, 1.01, jnp.bfloat16), "b": jnp.arange(3, dtype=jnp.bfloat16)}
    products = block_inner(blocks, x, x)
    assert products.dtype == jnp.float32
    exact = [np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in (x["a"], x["b"])]
    np.testing.assert_allclose(products, exact, rtol=1e-6)


def test_each_block_is_scaled_by_its_own_number():
    blocks = label_blocks({"a": 0, "b": 1, "c": 0}, {"a": 0, "b": 0, "c": 0})
    x = {name: jnp.ones(2) for name in "abc"}
    scaled = block_scale(blocks, jnp.array([2.0, 3.0]), x)
    assert {name: leaf.tolist() for name, leaf in scaled.items()} == {
        "a": [2.0, 2.0], "b": [3.0, 3.0], "c": [2.0, 2.0]
    }  # fmt: skip
