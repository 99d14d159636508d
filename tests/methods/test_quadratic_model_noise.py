"""Steps of the quadratic model on small batches: what the next batch confirms limits them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from tests.steps import training_step

SIZE, STEPS = 20, 200
DAMPING = 1e-6
CURVATURES = jnp.linspace(0.1, 3, SIZE)


def run(tx, noise, start, steps=STEPS):
    """Places and states of steps on ``c (p - e)^2 / 2`` with another ``e`` in every batch."""

    def objective_on(key):
        center = noise * jax.random.normal(key, (SIZE,), start.dtype)
        return so.Objective(lambda p: p - center, lambda z: jnp.sum(CURVATURES * z**2) / 2)

    step = jax.jit(training_step(tx, objective_on))
    params, state = start, tx.init(start)
    places, states = [], []
    for key in jax.random.split(jax.random.key(0), steps):
        params, state = step(params, state, key)
        places.append(params)
        states.append(state)
    return np.stack(places), states


def newton():
    """The Newton direction: on one batch the model's minimizer leads to that batch's center."""
    return optax.stateless(lambda updates, _: updates / CURVATURES)


@pytest.mark.parametrize("momentum", [True, False])
def test_without_noise_all_is_confirmed(x64, momentum):
    tx, unlimited = (
        so.scale_by_quadratic_model(damping=DAMPING, momentum=momentum, confirmation=confirmation)
        for confirmation in (1.0, None)
    )
    places, states = run(tx, 0.0, jnp.ones(SIZE), 8)
    plain, _ = run(unlimited, 0.0, jnp.ones(SIZE), 8)
    np.testing.assert_allclose(states[-1].metrics.confirmed, 1, rtol=1e-6)
    np.testing.assert_allclose(places, plain, rtol=1e-6, atol=1e-9)


def test_the_share_is_the_signal_in_the_gradient(x64):
    """Far from the minimum all is confirmed, and at it nothing."""
    tx = so.scale_by_quadratic_model(newton(), damping=DAMPING)
    _, states = run(tx, 1.0, 1e3 * jnp.ones(SIZE), 2)
    np.testing.assert_allclose(states[-1].metrics.confirmed, 1, atol=1e-3)
    _, states = run(tx, 1.0, jnp.zeros(SIZE))
    shares = [float(state.metrics.confirmed) for state in states]
    assert np.mean(shares[-100:]) < 0.25


def test_steps_get_shorter_in_noise():
    """Without the limit every step leads all the way to the minimum of its own batch."""
    start = 10 * jnp.ones(SIZE)
    errors = {}
    for confirmation in (None, 1.0):
        tx = so.scale_by_quadratic_model(newton(), damping=DAMPING, confirmation=confirmation)
        places, _ = run(tx, 1.0, start)
        errors[confirmation] = np.mean(np.sum(CURVATURES * places[-100:] ** 2, axis=1))
    assert errors[1.0] < errors[None] / 3


def test_the_multiple_multiplies(x64):
    """Before anything is known of the noise, the share is one."""
    tx, half = (
        so.scale_by_quadratic_model(newton(), damping=DAMPING, confirmation=confirmation)
        for confirmation in (None, 0.5)
    )
    (place,), _ = run(tx, 1.0, jnp.ones(SIZE), 1)
    (halfway,), _ = run(half, 1.0, jnp.ones(SIZE), 1)
    np.testing.assert_allclose(halfway - 1, (place - 1) / 2, rtol=1e-9)


def test_a_step_that_was_not_taken_is_not_judged():
    """Behind a rejected step is no other batch's slope of it."""
    tx = so.scale_by_quadratic_model(damping=1e-3)
    objective = so.Objective(lambda p: p, lambda z: jnp.sum(z - jnp.log(z)))
    params = jnp.full(1, 5.0)
    state = tx.init(params)
    value, grads = jax.value_and_grad(objective)(params)
    _, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=objective)
    assert int(state.metrics.rejections) == 1
    assert float(state.confirmation.slope) == 0
    _, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=objective)
    assert float(state.confirmation.share) == 1


def test_the_multiple_is_checked():
    with pytest.raises(ValueError, match="confirmation"):
        so.scale_by_quadratic_model(confirmation=0.0)


def test_at_a_learning_rate_the_multiple_is_refused():
    objective = so.Objective(lambda w: jnp.ones((2, 2)) @ w, lambda z: jnp.mean(z**2))
    layers = so.find_layers(objective, jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="confirmation"):
        so.kfac(0.1, layers, confirmation=None)


@pytest.mark.parametrize(("momentum", "low", "high"), [(True, -0.1, 0.1), (False, 0.3, 1.0)])
def test_noise_is_not_confirmed_however_long_the_step(x64, momentum, low, high):
    """The curvature of a step's own batch is too large along it; that of the next batch is not.

    Which without momentum is not computed.
    """
    size, cases = 20, 10
    tx = so.scale_by_quadratic_model(damping=1e-3, confirmation=None, momentum=momentum)

    def objective_on(key):
        inputs, targets = jnp.split(jax.random.normal(key, (cases, size + 1)), [size], axis=1)
        return so.Objective(lambda p: inputs @ p, lambda z: jnp.mean((z - targets[:, 0]) ** 2) / 2)

    def share(key):
        params, step = jnp.zeros(size), training_step(tx, objective_on)  # at the minimum
        state = tx.init(params)
        for part in jax.random.split(key):
            params, state = step(params, state, part)
        average = state.metrics.confirmed
        return (average - 0.8) / 0.2  # the average begins at one

    shares = jax.jit(jax.vmap(share))(jax.random.split(jax.random.key(1), 400))
    assert low < np.mean(shares) < high
