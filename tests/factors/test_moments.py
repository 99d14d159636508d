"""Second moments, averages and damped inverses."""

import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.factors import append_one, damped_inverse, ema, second_moment


def test_second_moment_sums_positions_and_averages_examples():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((4, 3, 5))  # examples, positions, features
    expected = sum(np.outer(a, a) for a in inputs.reshape(-1, 5)) / 4
    moment = second_moment(jnp.float32(inputs.reshape(-1, 5)), 4)
    np.testing.assert_allclose(moment, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_second_moment_is_float32_or_wider(dtype):
    inputs = jnp.full((1000, 2), 0.1, dtype)
    moment = second_moment(inputs, 1000)
    assert moment.dtype == jnp.float32
    np.testing.assert_allclose(moment, float(inputs[0, 0]) ** 2, rtol=1e-4)


def test_second_moment_keeps_double(x64):
    assert second_moment(jnp.ones((2, 2), jnp.float64), 2).dtype == jnp.float64


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3)])
def test_append_one(shape):
    inputs = jnp.full(shape, 2.0, jnp.bfloat16)
    extended = append_one(inputs)
    assert extended.dtype == inputs.dtype
    np.testing.assert_array_equal(extended[..., :-1], inputs)
    np.testing.assert_array_equal(extended[..., -1], np.ones(shape[:-1]))


def test_damped_inverse():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3, 6))  # rank 3 of 6: invertible only because it is damped
    inverse = damped_inverse(jnp.float32(rows.T @ rows), 0.5)
    expected = np.linalg.inv(rows.T @ rows + 0.5 * np.eye(6))
    np.testing.assert_allclose(inverse, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(inverse, inverse.T)


def test_ema_maps_trees_and_keeps_dtypes(x64):
    old = {"a": jnp.float32([1.0, 2.0]), "b": jnp.float64(4.0)}
    new = {"a": jnp.float64([3.0, 0.0]), "b": jnp.float64(0.0)}
    result = ema(old, new, 0.75)
    np.testing.assert_allclose(result["a"], [1.5, 1.5])
    np.testing.assert_allclose(result["b"], 3.0)
    assert result["a"].dtype == jnp.float32
