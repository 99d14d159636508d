"""The problem of the protocol suite: a model, a training step, and the bare optimizer on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import secondorder as so
from tests.protocol.registry import LAYERS, REGISTRY

RATE = 0.1
STEPS = 3


# The problem: a layer with a bias, and a parameter in no layer.


def params_of(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.standard_normal((3, 2)), dtype),
        "b": jnp.asarray(rng.standard_normal(2), dtype),
        "scale": jnp.asarray(1.25, dtype),
    }


def batch_of(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6, 3))
    return jnp.asarray(x, dtype), jnp.asarray(np.sin(x[:, :2]), dtype)


def objective_on(batch):
    x, y = batch
    return so.Objective(
        lambda p: p["scale"] * jnp.tanh(x @ p["w"] + p["b"]),
        lambda z: jnp.mean(jnp.sum((z - y) ** 2, axis=-1)),
    )


def arguments(entry, dtype=jnp.float32):
    """What the factory is called with, apart from a learning rate."""
    needed = {}
    if LAYERS in entry.needs:
        needed["layers"] = so.find_layers(objective_on(batch_of(0, dtype)), params_of(dtype))
    return {**entry.settings, **needed}


def make(entry, dtype=jnp.float32, learning_rate=RATE, **given):
    """The optimizer; one that only gives a direction is followed by the learning rate.

    One that is terminal gives the step itself, and has no learning rate. What is given replaces
    arguments of the factory.
    """
    given = arguments(entry, dtype) | given
    if entry.learning_rate:
        return entry.factory(learning_rate=learning_rate, **given)
    direction = entry.factory(**given)
    if entry.terminal:
        return direction
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


def make_step(tx, **extra):
    """The training step of the README, which works with `optax.lbfgs` as well."""

    def step(params, state, batch):
        objective = objective_on(batch)
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective, **extra
        )
        return optax.apply_updates(params, updates), state, updates

    return step


def train(tx, step=None, steps=STEPS):
    """The updates of a few steps and the last state."""
    step = step or jax.jit(make_step(tx))
    params, state, history = params_of(), tx.init(params_of()), []
    for seed in range(steps):
        params, state, updates = step(params, state, batch_of(seed))
        history.append(jax.tree.map(np.asarray, updates))
    return history, params, state


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


class Reference:
    """The bare optimizer, compiled once with both its arguments donated."""

    def __init__(self, entry):
        self.entry = entry
        self.tx = make(entry)
        self.donating = jax.jit(make_step(self.tx), donate_argnums=(0, 1))
        self.history, self.params, self.state = train(self.tx, self.donating)

    def step(self, params, state, batch):
        return self.donating(copy(params), copy(state), batch)


@functools.cache
def reference_of(name):
    return Reference(next(entry for entry in REGISTRY if entry.name == name))


def assert_same(found, expected, rtol=1e-4):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), found, expected
    )


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def describe(tree):
    """Shape, dtype, weak type and sharding of every leaf."""
    return jax.tree.map(jax.typeof, tree)
