"""Averages and damped inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.factors import damped_inverse, damped_inverses, ema


def moment(rng, n):
    rows = rng.standard_normal((n // 2 + 1, n))  # singular: invertible only because it is damped
    return rows.T @ rows


def test_damped_inverse():
    matrix = moment(np.random.default_rng(0), 6)
    inverse = damped_inverse(jnp.float32(matrix), 0.5)
    expected = np.linalg.inv(matrix + 0.5 * np.eye(6))
    np.testing.assert_allclose(inverse, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(inverse, inverse.T)


def stacks(seed=0):
    """Matrices of three sizes in stacks of one to three, and a damping for each."""
    rng = np.random.default_rng(seed)
    shapes = [(2, 3), (1, 7), (3, 1)]
    matrices = [np.stack([moment(rng, n) for _ in range(count)]) for count, n in shapes]
    return matrices, [rng.uniform(0.1, 2, count) for count, _ in shapes]


def test_damped_inverses_of_mixed_sizes(x64):
    matrices, dampings = stacks()
    found = jax.jit(damped_inverses)(
        [jnp.asarray(m) for m in matrices], [jnp.asarray(d) for d in dampings]
    )
    for inverse, matrix, damping in zip(found, matrices, dampings, strict=True):
        assert inverse.shape == matrix.shape
        expected = np.linalg.inv(matrix + damping[:, None, None] * np.eye(matrix.shape[-1]))
        np.testing.assert_allclose(inverse, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -100.0])
def test_only_the_inverse_that_is_not_finite_becomes_the_identity(bad):
    """Also where the matrix is finite but, damped, not positive definite."""
    matrices, dampings = stacks()
    invert = jax.jit(damped_inverses)
    dampings = [jnp.float32(d) for d in dampings]
    expected = invert([jnp.float32(m) for m in matrices], dampings)
    matrices[0][1, 2, 0] = matrices[0][1, 0, 2] = bad
    found = invert([jnp.float32(m) for m in matrices], dampings)
    np.testing.assert_array_equal(found[0][1], np.eye(3))
    np.testing.assert_array_equal(found[0][0], expected[0][0])
    for inverse, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(inverse, other)


def test_damped_inverses_keep_the_matrices_dtype(x64):
    (inverse,) = damped_inverses([jnp.ones((2, 3, 3), jnp.float32)], [jnp.ones(2, jnp.float64)])
    assert inverse.dtype == jnp.float32


def test_ema_maps_trees_and_keeps_dtypes(x64):
    old = {"a": jnp.float32([1.0, 2.0]), "b": jnp.float64(4.0)}
    new = {"a": jnp.float64([3.0, 0.0]), "b": jnp.float64(0.0)}
    result = ema(old, new, 0.75)
    np.testing.assert_allclose(result["a"], [1.5, 1.5])
    np.testing.assert_allclose(result["b"], 3.0)
    assert result["a"].dtype == jnp.float32
