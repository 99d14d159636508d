"""Models whose outputs are one row per case, built of every way in which layers are used.

Each function returns the model and its parameters; the first axis of the outputs counts ``N = 4``
cases. Blocks of their leaves are cut by hand, across layers and within them.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import secondorder as so
from secondorder.tree.blocks import Blocks, label_blocks
from tests.operators.operator_models import normal

CASES = 4
MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {}
# Models in which every case meets every weight once.
SINGLE = ("mlp", "ensemble")


def register(build: Any) -> Any:
    MODELS[build.__name__] = build
    return build


@register
def mlp():
    x = normal(CASES, 3)
    params = {"in": {"w": normal(3, 4), "b": normal(4)}, "out": {"w": normal(4, 3), "b": normal(3)}}
    return lambda p: _dense(jnp.tanh(_dense(x, p["in"])), p["out"]), params


def _dense(x, layer):
    return x @ layer["w"] + layer["b"]


@register
def per_example():
    """A model of one case, under `vmap`, with activations that have derivatives of their own."""
    x = normal(CASES, 3)
    params = {"in": {"w": normal(3, 4), "b": normal(4)}, "out": {"w": normal(4, 3), "b": normal(3)}}
    return lambda p: jax.vmap(lambda x: _dense(jax.nn.silu(_dense(x, p["in"])), p["out"]))(
        x
    ), params


@register
def conv():
    x = normal(CASES, 5, 5, 2)
    params = {
        "k": normal(3, 3, 2, 4),
        "kb": normal(4),
        "g": normal(2, 2, 2, 2),
        "out": {"w": normal(2, 3), "b": normal(3)},
    }

    def model(p):
        numbers = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(x, p["k"], (2, 2), "SAME", dimension_numbers=numbers)
        h = jax.nn.relu(h + p["kb"])
        h = jax.lax.conv_general_dilated(
            h, p["g"], (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=2
        )
        pooled = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")
        return _dense(jnp.mean(jnp.tanh(pooled), axis=(1, 2)), p["out"])

    return model, params


@register
def lstm():
    """Time is scanned over, as many steps as cases; the last state is read."""
    x = normal(CASES, CASES, 2)
    params = {"i": normal(2, 12), "h": normal(3, 12), "b": normal(12), "out": normal(3, 3)}

    def model(p):
        def step(carry, x):
            h, c = carry
            i, f, o, g = jnp.split(x @ p["i"] + h @ p["h"] + p["b"], 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        start = jnp.zeros((CASES, 3), x.dtype)
        (h, _), _ = jax.lax.scan(step, (start, start), jnp.moveaxis(x, 1, 0))
        return h @ p["out"]

    return model, params


@register
def time_first():
    """Positions lead, as many as there are cases; then they are merged with them."""
    x = normal(CASES, CASES, 3)  # time, cases, features
    params = {"w": normal(3, 4), "b": normal(4), "v": normal(4, 5), "out": normal(5, 3)}

    def model(p):
        h = jnp.tanh(x @ p["w"] + p["b"]).reshape(-1, 4)
        h = jnp.tanh(h @ p["v"]).reshape(CASES, CASES, 5)
        return h[-1] @ p["out"] + jnp.sum(h, axis=0) @ p["out"]

    return model, params


@register
def tied():
    """A weight used twice, and transposed, with a bias in one of the uses."""
    x = normal(CASES, 3)
    params = {"w": normal(3, 3), "b": normal(3)}
    return lambda p: jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"]) @ p["w"].T, params


@register
def layers_in_a_scan():
    x = normal(CASES, 3)
    params = {"k": normal(5, 3, 3), "b": normal(5, 3), "out": normal(3, 3)}

    def model(p):
        @jax.checkpoint
        def block(h, layer):
            return jnp.tanh(h @ layer["k"] + layer["b"])

        stack = {"k": p["k"], "b": p["b"]}
        return jax.lax.scan(lambda h, layer: (block(h, layer), None), x, stack)[0] @ p["out"]

    return model, params


@register
def ensemble():
    """Blocks side by side."""
    x = normal(CASES, 2, 3)
    params = {"w": normal(2, 3, 4), "b": normal(2, 4), "out": normal(8, 3)}

    def model(p):
        h = jnp.tanh(jnp.einsum("bgi,gio->bgo", x, p["w"]) + p["b"])
        return h.reshape(CASES, 8) @ p["out"]

    return model, params


@register
def attention():
    words = jnp.asarray(np.random.default_rng(0).integers(0, 5, (CASES, 3)))
    params = {"table": normal(5, 4), "out": {"w": normal(4, 3), "b": normal(3)}}
    params |= {name: normal(4, 2, 2, seed=seed) for seed, name in enumerate("qkv")}

    def model(p):
        x = p["table"][words]
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k), axis=-1)
        return _dense(jnp.einsum("bhts,bshk->bthk", weights, v)[:, -1].reshape(CASES, 4), p["out"])

    return model, params


@register
def tokens():
    """Outputs of every position, which attention mixes, and a layer for each position."""
    x = normal(2, 3, 4)
    params = {"out": {"w": normal(4, 3), "b": normal(3)}}
    params |= {name: normal(4, 2, 2, seed=seed) for seed, name in enumerate("qkv")}

    def model(p):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k), axis=-1)
        return _dense(jnp.einsum("bhts,bshk->bthk", weights, v).reshape(2, 3, 4), p["out"])

    return model, params


def loss(z: jax.Array) -> jax.Array:
    """A cross entropy against fixed distributions."""
    targets = jax.nn.softmax(normal(*z.shape, seed=1).astype(z.dtype))
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(z), axis=-1))


def build(name: str) -> tuple[so.Objective, Any]:
    model, params = MODELS[name]()
    return so.Objective(model, loss), params


def cut(params: Any) -> Blocks:
    """Two blocks that divide the weight and the bias of some layers."""
    count = iter(range(100))
    return label_blocks(lambda _: next(count) % 2, params)


def each_leaf(params: Any) -> Blocks:
    """A block for each leaf."""
    return label_blocks(lambda path: path, params)


def block_mask(params: Any, blocks: Blocks) -> np.ndarray:
    """Ones where two parameters are in the same block."""
    leaves = jax.tree.leaves(params)
    labels = np.repeat(blocks.labels, [leaf.size for leaf in leaves])
    return labels[:, None] == labels[None, :]


def deep_mlp(
    depth: int, width: int, cases: int, outputs: int, inputs: int | None = None
) -> tuple[so.Objective, Any]:
    """An MLP of equal widths, without values."""
    sizes = [inputs or width, *[width] * (depth - 1), outputs]
    x = jnp.zeros((cases, sizes[0]))
    params = [{"w": jnp.zeros((a, b)), "b": jnp.zeros(b)} for a, b in itertools.pairwise(sizes)]

    def model(p):
        h = x
        for layer in p[:-1]:
            h = jnp.tanh(_dense(h, layer))
        return _dense(h, p[-1])

    return so.Objective(model, lambda z: jnp.mean(jax.nn.logsumexp(z, axis=-1) - z[:, 0])), params


def flops(function: Any, *args: Any) -> float:
    """What XLA counts."""
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def product_cost(make: Any, objective: so.Objective, params: Any) -> tuple[float, float]:
    """One more product, and what comes before the first, in forward passes of the model."""

    def twice(p, v, w):
        operator = make(p)
        return operator(v), operator(w)

    other = jax.tree.map(jnp.ones_like, params)
    forward = flops(objective.model, params)
    one, two = flops(lambda p, v: make(p)(v), params, other), flops(twice, params, params, other)
    return (two - one) / forward, (2 * one - two) / forward
