"""Algebra of whole stacks against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from secondorder.tree import gram, mix, random_stack, stack_size

SHAPES = {"a": (3, 2), "b": (4,), "c": ()}


def stack_of(size, seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((size, *shape)) for name, shape in SHAPES.items()}


def rows_of(stack):
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in stack.values()], 1)


def test_products_and_combinations(x64):
    left, right = stack_of(3, 0), stack_of(5, 1)
    np.testing.assert_allclose(gram(left, right), rows_of(left) @ rows_of(right).T, rtol=1e-13)
    matrix = np.random.default_rng(2).standard_normal((2, 5))
    mixed = mix(jnp.asarray(matrix), jax.tree.map(jnp.asarray, right))
    np.testing.assert_allclose(rows_of(mixed), matrix @ rows_of(right), rtol=1e-12, atol=1e-14)
    assert stack_size(mixed) == 2


def test_random_stacks_are_normal_and_wide():
    vector = {"a": jnp.ones((30, 20), jnp.bfloat16), "b": jnp.ones((), jnp.bfloat16)}
    stack = random_stack(jax.random.key(0), vector, 50)
    assert {leaf.dtype for leaf in stack.values()} == {jnp.dtype("float32")}
    assert stack["a"].shape == (50, 30, 20)
    assert abs(float(jnp.mean(stack["a"]))) < 0.03
    assert abs(float(jnp.std(stack["a"])) - 1) < 0.02
    assert len(np.unique(stack["b"])) == 50
