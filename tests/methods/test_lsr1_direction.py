"""`scale_by_lsr1`: pairs along the steps really made, and the regularized direction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from tests.methods.lsr1_oracle import initial_scale
from tests.solvers.sr1_oracles import sequential_sr1

HESSIAN = np.diag([1.0, 4.0, 9.0, -0.5, 2.0])
STEPS = 8


def objective(params):
    x = jnp.concatenate([params["a"], params["b"]])
    return 0.5 * x @ jnp.asarray(HESSIAN, x.dtype) @ x + jnp.sum(x**4) / 4


def gradient(x):
    return HESSIAN @ x + x**3


def value(x):
    return 0.5 * x @ HESSIAN @ x + np.sum(x**4) / 4


def flat(tree):
    return np.concatenate([np.asarray(tree["a"]), np.asarray(tree["b"])])


def start(dtype=jnp.float64):
    return {"a": jnp.array([1.0, -0.5], dtype), "b": jnp.array([0.3, 0.2, -1.0], dtype)}


def make_step(tx):
    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=objective)
        return optax.apply_updates(params, updates), state

    return step


def test_directions_are_those_of_the_dense_matrix(x64):
    """With a clip and a learning rate behind it, so that the steps are not its own directions."""
    memory_size, rule = 3, so.RadiusRule()
    tx = optax.chain(
        so.scale_by_lsr1(memory_size=memory_size, scale="bb", radius=0.5, radius_rule=rule),
        optax.clip_by_global_norm(0.4),
        optax.scale(-0.7),
    )
    step, params = make_step(tx), start()
    state = tx.init(params)
    x, before, pairs, radius, b_old = flat(params), None, [], 0.5, None
    for _ in range(STEPS):
        g = gradient(x)
        if before is not None:
            s, y = x - before, g - gradient(before)
            predicted = -(gradient(before) @ s + s @ b_old @ s / 2)
            ratio = (value(before) - value(x)) / predicted if predicted >= 0 else -np.inf
            if ratio < rule.shrink_below:
                radius *= rule.shrink
            elif ratio > rule.grow_above:
                radius *= rule.grow
            # The model of the next comparison lacks the pair that the newest one displaces.
            pairs = [*pairs, (s, y)][-memory_size:]
        gamma = initial_scale(pairs, "bb")
        b = sequential_sr1(pairs, gamma)[0] if pairs else np.zeros((5, 5))
        lowest = np.linalg.eigvalsh(b)[0]
        largest = np.abs(np.linalg.eigvalsh(b)).max()
        shift = max(1 / radius, -2 * lowest, 1e-4 * largest - lowest)
        radius = 1 / shift
        direction = np.linalg.solve(b + shift * np.eye(5), g)
        before = x
        x = x - 0.7 * direction * min(1, 0.4 / np.linalg.norm(direction))
        params, state = step(params, state)
        np.testing.assert_allclose(flat(params), x, rtol=1e-6, atol=1e-9)
        older = pairs[1:] if len(pairs) == memory_size else pairs
        gamma = initial_scale(older, "bb")
        b_old = sequential_sr1(older, gamma)[0] if older else np.zeros((5, 5))
    assert len(pairs) == memory_size


def test_a_batch_that_is_not_finite_changes_only_a_counter():
    tx = so.scale_by_lsr1(memory_size=2)
    step, params = make_step(optax.chain(tx, optax.scale(-0.1))), start(jnp.float32)
    state = optax.chain(tx, optax.scale(-0.1)).init(params)
    for _ in range(2):
        params, state = step(params, state)
    bad = {"a": params["a"] * jnp.nan, "b": params["b"]}
    updates, after = jax.jit(
        lambda p, s: tx.update(jax.grad(objective)(p), s, p, value_fn=objective)
    )(bad, state[0])
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    assert after.metrics == state[0].metrics._replace(nonfinite_steps=1)
    assert (after.count, after.radius) == (state[0].count, state[0].radius)
    np.testing.assert_array_equal(after.memory.numbers, state[0].memory.numbers)
    params, state = step(params, (after, *state[1:]))
    assert np.isfinite(flat(params)).all()


def test_without_steps_there_are_no_pairs():
    """Updates scaled to zero, as at the start of a warm-up, must not count as curvature."""
    tx = optax.chain(so.scale_by_lsr1(memory_size=2), optax.scale(0.0))
    step, params = make_step(tx), start(jnp.float32)
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert state[0].memory.written == 0
    assert state[0].radius == 1


@pytest.mark.parametrize(
    ("name", "bad"),
    [("memory_size", 0), ("radius", 0.0), ("skip", 1.0), ("scale", "zero"), ("scale", np.inf)],
)
def test_bad_hyperparameters_are_named(name, bad):
    with pytest.raises(ValueError, match=f"`{name}`"):
        so.scale_by_lsr1(**{name: bad})


def test_missing_arguments_are_named():
    tx, params = so.scale_by_lsr1(), start(jnp.float32)
    state = tx.init(params)
    with pytest.raises(ValueError, match="params"):
        tx.update(params, state, value_fn=objective)
    with pytest.raises(ValueError, match="value_fn"):
        tx.update(params, state, params)
    with pytest.raises(TypeError, match="curvature_fn"):
        tx.update(params, state, params, value_fn=objective, curvature_fn=3)
