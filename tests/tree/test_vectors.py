"""Stacks of pytree vectors against the same vectors raveled, and against themselves sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from secondorder import tree
from tests.meshes import make_mesh, use_mesh

SHAPES = {"matrix": (8, 6), "bias": (6,), "scalar": (), "image": (2, 3, 4, 5)}
K, J = 5, 3


def vector(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(s), dtype) for name, s in SHAPES.items()}


def stack(dtype=jnp.float32, count=K):
    vectors = [vector(seed, dtype) for seed in range(count)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *vectors)


def ravel(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def rows(stacked):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(stacked)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


@functools.cache
def jitted(name):
    return jax.jit(getattr(tree, name))


def test_project_is_the_product_of_the_raveled(x64):
    stacked, columns = stack(jnp.float64), [vector(10 + j, jnp.float64) for j in range(J)]
    expected = rows(stacked) @ np.stack([ravel(c) for c in columns], axis=1)
    np.testing.assert_allclose(jitted("project")(stacked, columns), expected, rtol=1e-13)


def test_combine_is_the_combination_of_the_raveled(x64):
    coefficients = jnp.arange(1.0, K + 1) * jnp.array([1, -1, 1, -1, 1])
    found = jitted("combine")(coefficients, stack(jnp.float64))
    assert {name: leaf.shape for name, leaf in found.items()} == SHAPES
    expected = np.asarray(coefficients) @ rows(stack(jnp.float64))
    np.testing.assert_allclose(ravel(found), expected, rtol=1e-13)


def test_inner(x64):
    x, y = vector(0, jnp.float64), vector(1, jnp.float64)
    np.testing.assert_allclose(jitted("inner")(x, y), ravel(x) @ ravel(y), rtol=1e-13)


def test_read_and_write():
    stacked, new = stack(), vector(9)
    written = jitted("write")(stacked, jnp.int32(2), new)
    np.testing.assert_array_equal(ravel(jitted("read")(written, jnp.int32(2))), ravel(new))
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(rows(written)[others], rows(stacked)[others])


def test_zeros_stack():
    zeros = tree.zeros_stack(vector(0), 2, jnp.bfloat16)
    assert all(leaf.shape == (2, *SHAPES[name]) for name, leaf in zeros.items())
    assert all(leaf.dtype == jnp.bfloat16 and not leaf.any() for leaf in zeros.values())


@pytest.mark.parametrize("parameters", [jnp.float32, jnp.bfloat16])
def test_a_narrow_stack_loses_nothing_but_its_own_rounding(parameters):
    """Products with a bfloat16 stack are as accurate as those with its widened copy."""
    stacked = stack(jnp.bfloat16)
    columns = [vector(10 + j, parameters) for j in range(J)]
    found = jitted("project")(stacked, columns)
    assert found.dtype == jnp.float32
    expected = rows(stacked) @ np.stack([ravel(c) for c in columns], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    coefficients = jnp.linspace(-1.0, 1.1, K)
    combined = jitted("combine")(coefficients, stacked)
    assert all(leaf.dtype == jnp.float32 for leaf in combined.values())
    expected = np.asarray(coefficients, np.float64) @ rows(stacked)
    np.testing.assert_allclose(ravel(combined), expected, rtol=1e-5, atol=1e-5)


def test_accumulation_is_at_full_precision():
    """bfloat16 vectors are multiplied and added as float32."""
    ones = {"a": jnp.ones(4096, jnp.bfloat16)}
    assert tree.inner(ones, ones) == 4096
    assert tree.accumulation_dtype(ones) == jnp.float32


def specs(name):
    return {"matrix": PartitionSpec("x", "y"), "bias": PartitionSpec("y")}.get(
        name, PartitionSpec()
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sharding_changes_neither_products_nor_combinations(kind, dtype):
    mesh = make_mesh(4, 2, names=("x", "y"), kind=kind)

    def place(tree, lead=()):
        return {
            name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*lead, *specs(name))))
            for name, leaf in tree.items()
        }

    stacked, columns = stack(dtype), [vector(10 + j) for j in range(J)]
    coefficients = jnp.linspace(-1.0, 1.0, K)
    products = tree.project(stacked, columns)
    combined = tree.combine(coefficients, stacked)
    written = tree.write(stacked, jnp.int32(1), columns[0])
    with use_mesh(mesh):
        sharded, sharded_columns = place(stacked, (None,)), [place(c) for c in columns]
        found = jax.jit(tree.project)(sharded, sharded_columns)
        np.testing.assert_allclose(found, products, rtol=1e-5, atol=1e-5)
        moved = jax.jit(tree.combine)(coefficients, sharded)
        np.testing.assert_allclose(ravel(moved), ravel(combined), rtol=1e-5, atol=1e-5)
        assert moved["matrix"].sharding.spec == specs("matrix")
        rewritten = jax.jit(tree.write)(sharded, jnp.int32(1), sharded_columns[0])
        np.testing.assert_array_equal(rows(rewritten), rows(written))
        zeros = jax.jit(lambda v: tree.zeros_stack(v, 2, dtype))(sharded_columns[0])
        if kind == AxisType.Explicit:
            assert zeros["matrix"].sharding.spec == PartitionSpec(None, "x", "y")
            assert rewritten["matrix"].sharding.spec == PartitionSpec(None, "x", "y")


def test_no_stack_is_copied_to_be_multiplied():
    """A pass over a bfloat16 stack must not widen it: that would double the traffic."""
    stacked = {"a": jnp.zeros((16, 64, 64), jnp.bfloat16)}
    column = {"a": jnp.zeros((64, 64))}
    text = jax.jit(tree.project).lower(stacked, [column]).as_text()
    assert "tensor<16x64x64xf32>" not in text
    text = jax.jit(tree.combine).lower(jnp.zeros(16), stacked).as_text()
    assert "tensor<16x64x64xf32>" not in text


def test_moving_average_against_its_sum(x64):
    """The average is the sum of all terms with its weights; corrected, the weights add up to 1."""
    terms = np.random.default_rng(0).normal(size=(4, 3))
    average = jnp.zeros(3)
    for count, term in enumerate(terms):
        average, corrected = tree.moving_average(average, jnp.asarray(term), jnp.int32(count), 0.8)
    weights = 0.2 * 0.8 ** np.arange(4)[::-1]
    np.testing.assert_allclose(average, weights @ terms, rtol=1e-12)
    np.testing.assert_allclose(corrected, weights @ terms / weights.sum(), rtol=1e-12)


def test_moving_average_leaves_out_what_is_not_finite():
    average, _ = tree.moving_average(
        jnp.array([1.0, 2.0]), jnp.array([jnp.nan, 4.0]), jnp.int32(1), 0.5
    )
    assert average.tolist() == [1.0, 3.0]


@pytest.mark.parametrize("size", [3e-38, 1e-18, 0.7, 5.0, 1e18, 3e38])
def test_the_unit_scale_is_a_power_of_two(size):
    tree_of = {"a": jnp.zeros((0, 2)), "b": jnp.array([0.0, -size]), "c": jnp.float32(size / 2)}
    scale = float(jax.jit(tree.unit_scale)(tree_of))
    assert np.frexp(scale)[0] == 0.5
    assert 2**-9 <= abs(scale * np.float32(size)) < 1 if 1e-37 < size < 1e36 else scale > 0


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
def test_the_unit_scale_of_what_is_not_finite_is_not_a_number(bad):
    assert jnp.isnan(tree.unit_scale({"a": jnp.ones(2), "b": jnp.array([1.0, bad])}))
