"""Small split objectives of four kinds, and their curvature as dense matrices.

Cross entropy and squared error over the outputs of an MLP, a convolution, an LSTM in a `lax.scan`
and single-head attention. The oracles differentiate the raveled functions in the plainest way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import secondorder as so

CLASSES = 3
LOSSES = ("softmax", "squared")


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Fixed random numbers of the default dtype."""
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(0.6 * rng.normal(size=shape), dtype=float)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["in"]["w"] + params["in"]["b"]) @ params["out"]


def mlp_arrays(batch: int) -> tuple[Any, jax.Array]:
    params = {"in": {"w": normal(5, 4), "b": normal(4)}, "out": normal(4, CLASSES)}
    return params, normal(batch, 5)


def conv(params: Any, x: jax.Array) -> jax.Array:
    maps = jax.lax.conv_general_dilated(
        x, params["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    maps = jnp.tanh(maps + params["bias"])
    return maps.reshape(len(x), -1) @ params["out"]


def conv_arrays(batch: int) -> tuple[Any, jax.Array]:
    params = {"kernel": normal(3, 3, 2, 3), "bias": normal(3), "out": normal(12, CLASSES)}
    return params, normal(batch, 4, 4, 2)


def lstm(params: Any, x: jax.Array) -> jax.Array:
    """The outputs at every time step ``(batch, time, classes)``."""

    def step(carry: tuple[jax.Array, jax.Array], x: jax.Array) -> Any:
        h, c = carry
        gates = x @ params["input"] + h @ params["hidden"] + params["bias"]
        i, f, o, g = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h @ params["out"]

    start = jnp.zeros((len(x), len(params["out"])), x.dtype)
    return jnp.moveaxis(jax.lax.scan(step, (start, start), jnp.moveaxis(x, 1, 0))[1], 0, 1)


def lstm_arrays(batch: int) -> tuple[Any, jax.Array]:
    sizes = {"input": (2, 12), "hidden": (3, 12), "bias": (12,), "out": (3, CLASSES)}
    return {name: normal(*shape) for name, shape in sizes.items()}, normal(batch, 4, 2)


def attention(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = (x @ params[name] for name in "qkv")
    weights = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]), axis=-1)
    return (weights @ v) @ params["out"]


def attention_arrays(batch: int) -> tuple[Any, jax.Array]:
    params = {name: normal(3, 4, seed=seed) for seed, name in enumerate("qkv")}
    return params | {"out": normal(4, CLASSES)}, normal(batch, 4, 3)


MODELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "mlp": (mlp, mlp_arrays),
    "conv": (conv, conv_arrays),
    "lstm": (lstm, lstm_arrays),
    "attention": (attention, attention_arrays),
}


def targets_of(loss: str, outputs: Any) -> jax.Array:
    """Fixed classes, or fixed real targets."""
    if loss == "squared":
        return normal(*outputs.shape, seed=1)
    return jnp.asarray(np.random.default_rng(1).integers(0, CLASSES, outputs.shape[:-1]))


def mean_loss(loss: str, targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """The mean over all cases."""
    if loss == "squared":
        return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1)) / 2
    scores = jax.nn.log_softmax(outputs)
    return -jnp.mean(jnp.take_along_axis(scores, targets[..., None], axis=-1))


def objective_on(model: str, loss: str, batch: tuple[jax.Array, jax.Array]) -> so.Objective:
    """The objective of a batch of inputs and targets."""
    x, y = batch
    return so.Objective(lambda p: MODELS[model][0](p, x), lambda z: mean_loss(loss, y, z))


def make_batch(model: str, loss: str, size: int = 4) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """Parameters, and a batch."""
    function, arrays = MODELS[model]
    params, x = arrays(size)
    return params, (x, targets_of(loss, jax.eval_shape(function, params, x)))


def build(model: str, loss: str, size: int = 4) -> tuple[so.Objective, Any]:
    """An objective, and its parameters."""
    params, batch = make_batch(model, loss, size)
    return objective_on(model, loss, batch), params


def matrix_of(operator: Callable[..., Any], objective: Any, params: Any, *settings: Any) -> Any:
    """The dense matrix of an operator, compiled."""
    return jax.jit(lambda p: operator(objective, p, *settings).as_matrix())(params)


def compiled(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Compiles a function of an objective and its parameters: eager oracles take seconds."""
    return lambda objective, params: jax.jit(lambda p: function(objective, p))(params)


@compiled
def dense_jacobian(objective: so.Objective, params: Any) -> jax.Array:
    """``J``, all outputs raveled by all parameters raveled."""
    flat, unravel = ravel_pytree(params)
    return jax.jacrev(lambda p: ravel_pytree(objective.model(unravel(p)))[0])(flat)


@compiled
def dense_output_hessian(objective: so.Objective, params: Any) -> jax.Array:
    """``H``, all outputs raveled."""
    flat, unravel = ravel_pytree(objective.model(params))
    return jax.hessian(lambda z: objective.loss(unravel(z)))(flat)


@compiled
def dense_gauss_newton(objective: so.Objective, params: Any) -> jax.Array:
    """``Jᵀ H J``."""
    jacobian = dense_jacobian(objective, params)
    return jacobian.T @ dense_output_hessian(objective, params) @ jacobian


@compiled
def dense_hessian(value_fn: Callable[[Any], jax.Array], params: Any) -> jax.Array:
    """The Hessian in the raveled parameters."""
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda p: value_fn(unravel(p)))(flat)


@compiled
def case_gradients(objective: so.Objective, params: Any) -> jax.Array:
    """The gradients of single cases, whose mean is that of the objective, as rows."""
    jacobian = dense_jacobian(objective, params)
    outputs = objective.model(params)
    cotangents = jax.grad(objective.loss)(outputs)
    count = outputs.size // outputs.shape[-1]
    parts = jacobian.reshape(count, outputs.shape[-1], -1)
    return count * jnp.einsum("ncp,nc->np", parts, cotangents.reshape(count, -1))


@jax.custom_vjp
def reverse_only_tanh(x: jax.Array) -> jax.Array:
    """A function that forward mode cannot differentiate, nor its gradient."""
    return jnp.tanh(x)


@jax.custom_vjp
def _tanh_slope(x: jax.Array) -> jax.Array:
    return 1 - jnp.tanh(x) ** 2


reverse_only_tanh.defvjp(
    lambda x: (jnp.tanh(x), x), lambda x, cotangent: (cotangent * _tanh_slope(x),)
)
_tanh_slope.defvjp(
    lambda x: (_tanh_slope(x), x),
    lambda x, cotangent: (-2 * cotangent * jnp.tanh(x) * (1 - jnp.tanh(x) ** 2),),
)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Compares relative to the largest element."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    scale = np.max(np.abs(expected), initial=1e-30)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)
