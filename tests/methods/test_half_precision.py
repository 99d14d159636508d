"""Losses in half precision: what their roundings hide is no evidence against a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from secondorder.control import backtrack

METHODS = {
    "hessian_free": lambda: so.hessian_free(damping=1.0),
    "block_hessian_free": lambda: so.block_hessian_free(damping=1.0),
    "block_hessian_free, armijo": lambda: so.block_hessian_free(damping=1.0, step="armijo"),
    "gauss_newton": lambda: so.gauss_newton(damping=1.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_ratio_near_the_minimum_of_a_bfloat16_loss(name):
    """Three digits of the loss are soon spent; without them the ratio is that of two roundings."""
    x = jax.random.normal(jax.random.key(0), (64, 4))
    y = jnp.tanh(x @ jnp.array([1.0, -2.0, 0.5, 0.0])) + 0.3 * jnp.sin(3 * x[:, 0])
    objective = so.Objective(
        lambda w: jnp.tanh(x @ w), lambda z: jnp.mean((z - y) ** 2).astype(jnp.bfloat16)
    )
    optimizer = METHODS[name]()

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    params, ratios = jnp.zeros(4), []
    state = optimizer.init(params)
    for _ in range(20):
        params, state = step(params, state)
        ratios.append(float(state.metrics.ratio))
    assert np.all(np.abs(np.array(ratios[-10:]) - 1) < 0.25)
    assert jnp.max(state.damping) < 0.5


def test_search_accepts_what_cannot_be_resolved():
    """The value rises by a rounding of bfloat16, and the promise is a hundredth of it."""
    coarse = float(jnp.finfo(jnp.bfloat16).eps)
    options = {"value": 1.0, "slope": -coarse / 100, "max_trials": 1}
    result = backtrack(lambda rate: 1 + coarse * rate, resolution=coarse, **options)
    assert result.accepted
    assert not backtrack(lambda rate: 1 + coarse * rate, **options).accepted
