"""L-SR1 that makes a pair at every so many steps only."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so

X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).standard_normal(6), jnp.float32)
PARAMS = {"w": jnp.array([0.3, -0.2, 0.1]), "b": jnp.float32(0.5)}
MEMORY = 2
STEPS = 8


def loss(params):
    return jnp.mean((jnp.tanh(X @ params["w"] + params["b"]) - Y) ** 2)


def counted(name, counts):
    """The same loss, which counts its values and its gradients, as they are run."""

    def add(kind):
        jax.debug.callback(lambda: counts.update([f"{name} {kind}"]))

    @jax.custom_vjp
    def marked(value):
        return value

    def forward(value):
        return value, None

    def backward(_, cotangent):
        add("gradient")
        return (cotangent,)

    marked.defvjp(forward, backward)

    def objective(params):
        add("value")
        return marked(loss(params))

    return objective


def train(steps, with_curvature=False, **settings):
    """The states after each step, and what was evaluated beside the caller's own gradient."""
    tx, counts = so.lsr1(**settings), collections.Counter()
    extra = {"curvature_fn": counted("curvature", counts)} if with_curvature else {}

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(
            grads, state, params, value=value, value_fn=counted("objective", counts), **extra
        )
        return optax.apply_updates(params, updates), state

    params, state, states = PARAMS, tx.init(PARAMS), []
    for _ in range(steps):
        params, state = jax.block_until_ready(step(params, state))
        states.append((params, state))
    jax.effects_barrier()
    return states, counts


@functools.cache
def every(period, with_curvature=False):
    settings = {"memory_size": MEMORY, "momentum": 0.3, "radius": 0.1}
    return train(STEPS, with_curvature, update_every=period, **settings)


@pytest.mark.parametrize(("period", "due"), [(1, range(STEPS)), (3, (0, 1, 3, 6))])
def test_gradients_are_evaluated_where_pairs_are_made(period, due):
    """At the first steps, which fill the memory, and then at every so many."""
    states, counts = every(period)
    assert counts == {"objective value": STEPS, "objective gradient": len(due)}
    written = [0, *(int(state.memory.written) for _, state in states)]
    assert tuple(np.flatnonzero(np.diff(written))) == tuple(due)


def test_curvature_is_evaluated_where_pairs_are_made():
    _, counts = every(3, with_curvature=True)
    assert counts["objective gradient"] == 4
    assert counts["curvature gradient"] == counts["curvature value"] == 2 * 4


def test_the_step_after_a_pair_knows_it():
    """As long as the memory is filled nothing differs from a pair at every step."""
    rare, often = every(3)[0], every(1)[0]
    for (one, _), (other, _) in zip(rare[: MEMORY + 1], often[: MEMORY + 1], strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), one, other)
    assert np.abs(rare[-1][0]["w"] - often[-1][0]["w"]).max() > 1e-3


def test_values_alone_reject_steps():
    """A radius that is far too long, at steps that make no pair."""
    settings = {"memory_size": 1, "update_every": 9, "momentum": 0.0, "scale": 0.01}
    params, state = train(1, radius=0.1, **settings)[0][-1]
    tx = so.lsr1(**settings, acceptance=0.2)
    state = state._replace(radius=jnp.float32(100.0))
    updates, after = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
    assert after.metrics.rejections == state.metrics.rejections + 1
    assert after.radius < 100
    assert not np.any(updates["w"])
    assert after.memory.written == state.memory.written


@pytest.mark.parametrize("period", [2, 3])
def test_full_batches_need_every_gradient(period):
    with pytest.raises(ValueError, match="`update_every` must be 1 with `full_batch`"):
        so.lsr1(full_batch=True, update_every=period)
    so.lsr1(full_batch=True, update_every=1)


@pytest.mark.parametrize("bad", [0, 2.0, True])
def test_bad_periods_are_named(bad):
    with pytest.raises(ValueError, match="`update_every` must be"):
        so.lsr1(update_every=bad)
