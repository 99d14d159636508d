"""A small regression that the tests of Hessian-free methods share, and how they train on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import secondorder as so


def make_problem(dtype=jnp.float32, cases=24, seed=0):
    """A small tanh net: objective and parameters."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(cases, 3)), dtype)
    y = jnp.asarray(np.sin(2 * np.asarray(x) @ rng.normal(size=(3, 2))), dtype)
    params = {
        "a": {"w": jnp.asarray(rng.normal(size=(3, 4)), dtype), "b": jnp.zeros(4, dtype)},
        "b": {"w": jnp.asarray(rng.normal(size=(4, 2)), dtype), "b": jnp.zeros(2, dtype)},
    }

    def model(p):
        return jnp.tanh(x @ p["a"]["w"] + p["a"]["b"]) @ p["b"]["w"] + p["b"]["b"]

    return so.Objective(model, lambda z: jnp.mean(jnp.sum((z - y) ** 2, -1))), params


def dense(objective, params):
    """The point, and value, gradient and Gauss-Newton matrix as NumPy functions of a vector."""
    vector, unravel = ravel_pytree(params)
    value = jax.jit(lambda v: objective(unravel(v)))
    gradient = jax.jit(jax.grad(value))

    @jax.jit
    def matrix(v):
        z = objective.model(unravel(v))
        J = jax.jacrev(lambda v: objective.model(unravel(v)).ravel())(v)
        H = jax.hessian(lambda z: objective.loss(z.reshape(-1, 2)))(z.ravel())
        return J.T @ H @ J

    return np.asarray(vector), *(
        lambda v, f=f: np.asarray(f(jnp.asarray(v))) for f in (value, gradient, matrix)
    )


def train(tx, objective, params, steps, **extra):
    """Parameters and state after some steps on one batch."""

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=objective, **extra
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state
