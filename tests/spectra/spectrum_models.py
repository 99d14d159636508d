"""A small classifier, and its curvature as dense matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import secondorder as so

CASES, INPUTS, HIDDEN, CLASSES = 12, 4, 6, 3
MATRICES = ("hessian", "gauss_newton")
KEY = jax.random.key(3)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng([1, *shape]).normal(size=shape)


def make_params(dtype: Any) -> Any:
    params = {
        "in": {"b": random(HIDDEN), "w": random(INPUTS, HIDDEN)},
        "out": {"w": random(HIDDEN, CLASSES)},
    }
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), params)


def make_batch(dtype: Any) -> tuple[jax.Array, jax.Array]:
    x = 2 * random(CASES, INPUTS)
    return jnp.asarray(x, dtype), jnp.asarray(np.arange(CASES) % CLASSES)


def objective_on(batch: tuple[jax.Array, jax.Array]) -> so.Objective:
    x, y = batch

    def model(p: Any) -> jax.Array:
        hidden = jnp.tanh(x @ p["in"]["w"] + p["in"]["b"])
        return hidden @ p["out"]["w"]

    def loss(z: jax.Array) -> jax.Array:
        chosen = jax.nn.one_hot(y, CLASSES, dtype=z.dtype)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(z) * chosen, axis=-1))

    return so.Objective(model, loss)


def dense(objective: so.Objective, params: Any, matrix: str) -> np.ndarray:
    """The whole matrix, by the plainest differentiation."""
    flat, unravel = ravel_pytree(params)
    if matrix == "hessian":
        return np.asarray(jax.hessian(lambda v: objective(unravel(v)))(flat))
    outputs = objective.model(params)
    jacobian = jax.jacobian(lambda v: jnp.ravel(objective.model(unravel(v))))(flat)
    inner = jax.hessian(lambda z: objective.loss(z.reshape(outputs.shape)))(jnp.ravel(outputs))
    return np.asarray(jacobian.T @ inner @ jacobian)


def parts_of(params: Any, blocks: Any) -> list[np.ndarray]:
    """The indices of the parameters of each block, in the raveled vector."""
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(params)])
    ranges = [
        np.arange(end - leaf.size, end)
        for leaf, end in zip(jax.tree.leaves(params), ends, strict=True)
    ]
    return [
        np.concatenate([ranges[i] for i, label in enumerate(blocks.labels) if label == block])
        for block in range(len(blocks.names))
    ]
