"""Averages of few squares, drawn toward their mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.factors import effective_samples, ema, shrink_to_mean, warm_decay


def test_effective_samples_of_a_warm_average(x64):
    """One over the sum of the squared weights, which sum to one."""
    weights = jnp.zeros(6)
    for k in range(6):
        weights = ema(weights, jnp.eye(6)[k], warm_decay(0.8, jnp.int32(k)))
        found = effective_samples(0.8, jnp.int32(k + 1))
        np.testing.assert_allclose(found, 1 / np.sum(np.asarray(weights) ** 2), rtol=1e-5)
    assert effective_samples(0.0, jnp.int32(9)) == 1


@pytest.mark.parametrize("samples", [1, 4, 40])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_the_weight_is_the_best_linear_one(x64, samples, spread):
    """Against the slope of a regression of the true means on the averages."""
    rng = np.random.default_rng(0)
    means = 3 * (rng.gamma(1 / spread, spread, 400_000) if spread else np.ones(400_000))
    averages = means * rng.chisquare(samples, means.shape) / samples
    found = np.asarray(shrink_to_mean(jnp.asarray(averages), samples))
    slope = np.cov(means, averages)[0, 1] / np.var(averages)
    kept = (found[0] - np.mean(averages)) / (averages[0] - np.mean(averages))
    np.testing.assert_allclose(kept, slope, atol=0.02)
    assert np.mean((found - means) ** 2) < 0.9 * np.mean((averages - means) ** 2)


def test_the_mean_and_the_bound_of_the_weight(x64):
    averages = jnp.zeros(100).at[3].set(5.0)
    found = shrink_to_mean(averages, 2.0)
    np.testing.assert_allclose(jnp.mean(found), 0.05, rtol=1e-12)
    assert found[0] > 0.05 * 2 / (2.0 + 2)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_any_scale_and_one_entry(scale):
    found = shrink_to_mean(jnp.float32(scale) * jnp.array([1.0, 2.0, 3.0]), 1)
    np.testing.assert_allclose(found, np.float32(2 * scale), rtol=1e-6)
    assert shrink_to_mean(jnp.full((1,), scale), 7) == jnp.float32(scale)
    assert shrink_to_mean(jnp.float32(scale), 7) == jnp.float32(scale)


def test_an_empty_leaf():
    assert jax.jit(shrink_to_mean)(jnp.zeros((0, 3)), 2.0).shape == (0, 3)
