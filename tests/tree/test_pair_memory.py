"""The memory of pairs against a list of raveled pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder import tree

M = 3


def vector(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.standard_normal((4, 3)), dtype),
        "b": jnp.asarray(rng.standard_normal(3), dtype),
    }


def ravel(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


@jax.jit
def advance(memory, vector, s, y, accept):
    memory, products = tree.project_on_pairs(memory, vector, s)
    return tree.push_pair(memory, s, y, accept), memory, products


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_gram_and_products_follow_the_ring(dtype):
    memory = tree.init_pairs(vector(0), M, dtype)
    stored = np.zeros((2 * M, 15))
    for step in range(3 * M):
        accept = step not in (2, 5)  # that pair is not written
        s, y, g = vector(10 + step), vector(30 + step), vector(50 + step)
        pushed, complete, products = advance(memory, g, s, y, accept)
        tolerance = {"rtol": 1e-5, "atol": 1e-4}
        np.testing.assert_allclose(complete.gram, stored @ stored.T, **tolerance)
        columns = np.stack([ravel(g), ravel(s)], axis=-1)
        np.testing.assert_allclose(products, stored @ columns, **tolerance)
        combined = tree.combine_pairs(jnp.arange(2.0 * M), complete)
        np.testing.assert_allclose(ravel(combined), np.arange(2.0 * M) @ stored, **tolerance)
        if accept:
            slot = int(memory.written) % M
            cast = jax.tree.map(lambda x: x.astype(dtype or x.dtype), (s, y))
            stored[slot], stored[M + slot] = ravel(cast[0]), ravel(cast[1])
            assert pushed.numbers[slot] == memory.written
            assert tree.newest_slot(pushed) == slot
        memory = pushed
    assert memory.written == 3 * M - 2
    assert sorted(memory.numbers.tolist()) == [4, 5, 6]


@pytest.mark.parametrize("spoil", [jnp.nan, jnp.inf])
def test_a_pair_that_is_not_accepted_leaves_no_trace(spoil):
    memory = tree.push_pair(tree.init_pairs(vector(0), M), vector(1), vector(2), True)
    bad = jax.tree.map(lambda x: x * spoil, vector(3))
    after = tree.push_pair(memory, bad, bad, False)
    for one, other in zip(jax.tree.leaves(memory), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)


def test_dropped_pairs_are_gone_but_the_ring_goes_on():
    memory = tree.init_pairs(vector(0), M)
    for step in range(2):
        memory = tree.push_pair(memory, vector(step), vector(9), True)
    assert tree.drop_pairs(memory, False).numbers.tolist() == [0, 1, -1]
    dropped = tree.drop_pairs(memory, True)
    assert dropped.numbers.tolist() == [-1, -1, -1]
    assert tree.push_pair(dropped, vector(5), vector(6), True).numbers.tolist() == [-1, -1, 2]


def test_dtypes_are_a_fixed_point():
    memory = tree.init_pairs(vector(0), M, jnp.bfloat16)
    after, complete, _ = advance(memory, vector(1), vector(2), vector(3), jnp.asarray(True))
    for found in (after, complete):
        for one, other in zip(jax.tree.leaves(memory), jax.tree.leaves(found), strict=True):
            assert (one.shape, one.dtype, one.weak_type) == (
                other.shape,
                other.dtype,
                other.weak_type,
            )
