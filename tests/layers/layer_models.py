"""Models whose layers are known: objectives, parameters, and what must be found in them.

`measure` evaluates, in one compiled function per model, everything that the tests compare: the
gradient, the recorded inputs and cotangents as explicit matrices, and every statistic.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import secondorder as so
from secondorder.layers import probes, statistics, uses
from secondorder.layers.layer import TracedLayer, trace_layers


class Expected(NamedTuple):
    """One layer: paths, kind, shape of the matrices, and counts."""

    weight: str
    kind: str
    bias: str | None
    shape: tuple[int, int, int]  # blocks, inputs, outputs
    positions: int  # of the whole batch, over all uses
    uses: int = 1
    tied: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, the layers it has, and the parameters that are in none."""

    name: str
    build: Callable[[], tuple[Callable[[Any], Any], Any]]
    layers: tuple[Expected, ...]
    rest: tuple[str, ...] = ()
    batch_size: int = 4
    tolerance: float = 1e-5


CASES: dict[str, Case] = {}


def case(*layers: Expected, rest: tuple[str, ...] = (), **options: Any) -> Callable[..., Any]:
    """Registers a function that builds an objective and its parameters."""

    def register(build: Any) -> Any:
        name = build.__name__
        CASES[name] = Case(name, build, layers, rest, **options)
        return build

    return register


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Fixed random numbers, without compiling anything."""
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape).astype(np.float32) * 0.7)


def fill(shapes: Any) -> Any:
    """Fixed random numbers for a pytree of abstract arrays."""
    leaves, structure = jax.tree.flatten(shapes)
    arrays = [normal(*leaf.shape, seed=i).astype(leaf.dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, arrays)


def linen(module: nn.Module, *inputs: Any) -> tuple[Callable[[Any], Any], Any]:
    """The mean square of a Linen module's outputs."""
    params = fill(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    return lambda p: jnp.mean(jnp.square(module.apply(p, *inputs))), params


def tokens(*shape: int, size: int = 7) -> jax.Array:
    """Fixed indices, with repetitions."""
    return jnp.asarray(np.random.default_rng(0).integers(0, size, shape))


# Dense layers.


@case(
    Expected("w", "dense", "b", (1, 3, 5), 4),
    Expected("v", "dense", None, (1, 5, 2), 4),
)
def dense():
    x = normal(4, 3)
    params = {"w": normal(3, 5), "b": normal(5), "v": normal(5, 2)}
    return lambda p: jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]) ** 2), params


@case(Expected("w", "dense", "b", (1, 3, 5), 4), Expected("v", "dense", None, (1, 5, 2), 4))
def dense_per_example():
    x = normal(4, 3)
    params = {"w": normal(5, 3), "b": normal(5), "v": normal(2, 5)}

    def loss(p, x):
        return jnp.mean((p["v"] @ jnp.tanh(p["w"] @ x + p["b"])) ** 2)

    return lambda p: jnp.mean(jax.vmap(loss, (None, 0))(p, x)), params


@case(Expected("w", "dense", "b", (1, 3, 1), 4))
def vector_weight():
    x = normal(4, 3)
    return lambda p: jnp.mean(jnp.tanh(x @ p["w"] + p["b"])), {"w": normal(3), "b": normal()}


@case(Expected("w", "dense", "b", (1, 6, 4), 4), batch_size=4)
def rearranged_weight():
    x = normal(4, 6)

    def objective(p):
        w = jnp.transpose(jnp.reshape(p["w"], (2, 2, 2, 3)), (2, 3, 0, 1)).reshape(6, 4)
        return jnp.mean(jnp.tanh(x @ w + p["b"].reshape(1, 2, 2).reshape(4)) ** 2)

    return objective, {"w": normal(4, 6), "b": normal(4)}


@case(
    Expected("q", "dense", "qb", (1, 6, 4), 12),
    Expected("o", "dense", "ob", (1, 4, 6), 12),
)
def einsum_projections():
    x = normal(4, 3, 6)

    def objective(p):
        q = jnp.einsum("btd,dhk->bhtk", x, p["q"]) + p["qb"][:, None]
        return jnp.mean((jnp.einsum("bhtk,hkd->btd", jnp.tanh(q), p["o"]) + p["ob"]) ** 2)

    return objective, {
        "q": normal(6, 2, 2),
        "qb": normal(2, 2),
        "o": normal(2, 2, 6),
        "ob": normal(6),
    }


@case(Expected("w", "dense", "b", (3, 5, 2), 4))
def block_diagonal():
    x = normal(4, 3, 5)

    def objective(p):
        h = jnp.einsum("bgi,gio->bgo", x, p["w"]) + p["b"]
        return jnp.mean(jnp.tanh(h) ** 2)

    return objective, {"w": normal(3, 5, 2), "b": normal(3, 2)}


@case(
    Expected("k", "dense", "kb", (1, 5, 2), 4),
    Expected("v", "dense", "vb", (1, 5, 3), 4),
)
def concatenated_layers():
    x = normal(4, 5)

    def objective(p):
        kernel = jnp.concatenate([p["k"], p["v"]], axis=1)
        bias = jnp.concatenate([p["kb"], p["vb"]])
        return jnp.mean(jnp.tanh(x @ kernel + bias) ** 2)

    return objective, {"k": normal(5, 2), "v": normal(5, 3), "kb": normal(2), "vb": normal(3)}


@case(
    Expected("wx", "dense", None, (1, 3, 5), 4),
    Expected("wh", "dense", None, (1, 2, 5), 4),
    rest=("b",),
)
def concatenated_inputs():
    """One product with the rows of two weights; the bias would belong to both."""
    xh = normal(4, 5)

    def objective(p):
        kernel = jnp.concatenate([p["wx"], p["wh"]], axis=0)
        return jnp.mean(jnp.tanh(xh @ kernel + p["b"]) ** 2)

    return objective, {"wx": normal(3, 5), "wh": normal(2, 5), "b": normal(5)}


@case(
    Expected("params/DenseGeneral_0/kernel", "dense", "params/DenseGeneral_0/bias", (1, 6, 4), 8),
    Expected("params/DenseGeneral_1/kernel", "dense", "params/DenseGeneral_1/bias", (1, 4, 3), 8),
    Expected("params/DenseGeneral_2/kernel", "dense", "params/DenseGeneral_2/bias", (2, 3, 5), 4),
)
def linen_dense_general():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.DenseGeneral((2, 2))(x))
            x = jnp.tanh(nn.DenseGeneral(3, axis=(-2, -1))(x))
            x = jnp.moveaxis(x, 1, 0)  # a weight for each of the two positions
            return nn.DenseGeneral(5, batch_dims=(0,))(x)

    return linen(Model(), normal(4, 2, 6))


@case(
    *(
        Expected(f"params/{name}/kernel", "dense", f"params/{name}/bias", (1, 6, 6), 12)
        for name in ("query", "key", "value", "out")
    )
)
def linen_attention():
    return linen(nn.MultiHeadDotProductAttention(num_heads=2), normal(4, 3, 6))


# Convolutions; the grid over their geometry has its own test.


@case(
    Expected("params/Conv_0/kernel", "conv", "params/Conv_0/bias", (1, 27, 4), 36),
    Expected("params/Conv_1/kernel", "conv", "params/Conv_1/bias", (2, 8, 3), 16),
    Expected("params/Dense_0/kernel", "dense", "params/Dense_0/bias", (1, 24, 2), 4),
)
def linen_conv():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
            x = nn.relu(nn.Conv(6, (2, 2), padding="VALID", feature_group_count=2)(x))
            return nn.Dense(2)(x.reshape(x.shape[0], -1))

    return linen(Model(), normal(4, 5, 5, 3))


@case(
    Expected("params/kernel", "conv", "params/bias", (1, 12, 2), 4 * 36),
)
def linen_conv_transpose():
    return linen(nn.ConvTranspose(2, (2, 2), strides=(2, 2)), normal(4, 3, 3, 3))


@case(Expected("weight", "conv", "bias", (1, 12, 2), 4 * 6))
def equinox_conv():
    conv = eqx.filter_eval_shape(eqx.nn.Conv2d, 3, 2, 2, key=jax.random.key(0))
    params, static = eqx.partition(conv, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    x = normal(4, 3, 4, 3)
    return lambda p: jnp.mean(jnp.tanh(jax.vmap(eqx.combine(p, static))(x)) ** 2), fill(params)


@case(Expected("w", "conv", None, (3, 4, 2), 4 * 4))
def scanned_conv():
    """A convolution scanned over a stack of kernels."""
    x = normal(4, 5, 2)

    def objective(p):
        def body(total, kernel):
            h = jax.lax.conv_general_dilated(
                x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
            )
            return total + jnp.mean(jnp.tanh(h) ** 2), None

        return jax.lax.scan(body, 0.0, p["w"])[0]

    return objective, {"w": normal(3, 2, 2, 2)}


# Embeddings.


@case(
    Expected("table", "embedding", None, (1, 7, 3), 12), Expected("w", "dense", None, (1, 3, 2), 12)
)
def embedding():
    words = tokens(4, 3)
    params = {"table": normal(7, 3), "w": normal(3, 2)}
    return lambda p: jnp.mean(jnp.tanh(p["table"][words] @ p["w"]) ** 2), params


@case(Expected("table", "embedding", None, (1, 7, 3), 4))
def embedding_of_columns():
    """Indexed along the second axis of the parameter."""
    words = tokens(4)
    return lambda p: jnp.mean(jnp.tanh(p["table"][:, words])), {"table": normal(3, 7)}


@case(Expected("table", "embedding", None, (1, 7, 3), 4))
def embedding_per_example():
    words = tokens(4)

    def objective(p):
        return jnp.mean(jax.vmap(lambda i: jnp.sum(jnp.tanh(p["table"][i])))(words))

    return objective, {"table": normal(7, 3)}


@case(Expected("params/embedding", "embedding", None, (1, 7, 3), 12, tied=1))
def tied_embedding():
    class Model(nn.Embed):
        def __call__(self, words):
            return self.attend(jnp.tanh(super().__call__(words)))

    return linen(Model(7, 3), tokens(4, 3))


# Weights and biases used more than once.


@case(Expected("w", "dense", "b", (1, 3, 3), 8, uses=2))
def dense_twice():
    x = normal(4, 3)

    def objective(p):
        layer = jax.jit(lambda h: jnp.tanh(h @ p["w"] + p["b"]))
        return jnp.mean(layer(layer(x)) ** 2)

    return objective, {"w": normal(3, 3), "b": normal(3)}


@case(Expected("w", "dense", None, (1, 3, 3), 8, uses=2), rest=("b",))
def bias_in_one_use_only():
    x = normal(4, 3)

    def objective(p):
        return jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) @ p["w"]) ** 2)

    return objective, {"w": normal(3, 3), "b": normal(3)}


@case(
    Expected("w", "dense", None, (1, 3, 3), 4),
    Expected("v", "dense", None, (1, 3, 3), 4),
    rest=("b",),
)
def bias_of_two_layers():
    x = normal(4, 3)

    def objective(p):
        return jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["b"]) ** 2)

    return objective, {"w": normal(3, 3), "v": normal(3, 3), "b": normal(3)}


@case(Expected("w", "dense", None, (1, 3, 3), 4, tied=1))
def weight_and_transpose():
    x = normal(4, 3)
    return lambda p: jnp.mean((jnp.tanh(x @ p["w"]) @ p["w"].T) ** 2), {"w": normal(3, 3)}


@case(Expected("w", "dense", "b", (1, 3, 5), 4))
def residual_before_bias():
    x, skip = normal(4, 3), normal(4, 5)
    params = {"w": normal(3, 5), "b": normal(5)}
    return lambda p: jnp.mean(jnp.tanh(x @ p["w"] + skip + p["b"])), params


@case(Expected("w", "dense", None, (1, 3, 5), 4), rest=("b",))
def output_used_before_bias():
    """The cotangent of the output is not that of the sum, so the parameter is not its bias."""
    x = normal(4, 3)

    def objective(p):
        h = x @ p["w"]
        return jnp.mean(jnp.tanh(h + p["b"]) * h)

    return objective, {"w": normal(3, 5), "b": normal(5)}


# Rematerialization and scans.


@case(Expected("w", "dense", "b", (1, 3, 3), 4), Expected("v", "dense", None, (1, 3, 2), 4))
def remat():
    x = normal(4, 3)

    def objective(p):
        hidden = jax.checkpoint(lambda w, b: jnp.tanh(x @ w + b))(p["w"], p["b"])
        return jnp.mean((hidden @ p["v"]) ** 2)

    return objective, {"w": normal(3, 3), "b": normal(3), "v": normal(3, 2)}


@case(
    Expected("in", "dense", None, (1, 3, 5), 4),
    Expected("stack/k", "dense", "stack/b", (6, 5, 5), 4),
)
def scan_over_layers():
    x = normal(4, 3)

    def objective(p):
        @jax.checkpoint
        def block(hidden, layer):
            return jnp.tanh(hidden @ layer["k"] + layer["b"])

        def body(hidden, layer):
            return block(hidden, layer), None

        return jnp.mean(jax.lax.scan(body, x @ p["in"], p["stack"])[0] ** 2)

    return objective, {"in": normal(3, 5), "stack": {"k": normal(6, 5, 5), "b": normal(6, 5)}}


@case(
    Expected(
        "params/ScanBlock_0/Dense_0/kernel",
        "dense",
        "params/ScanBlock_0/Dense_0/bias",
        (3, 5, 5),
        4,
    ),
)
def linen_remat_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(5)(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.remat(Block, prevent_cse=False)
            stack = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return stack(name="ScanBlock_0")(x, None)[0]

    return linen(Model(), normal(4, 5))


@case(
    Expected("x", "dense", None, (1, 3, 2), 20),
    Expected("h", "dense", "b", (1, 2, 2), 20),
)
def scan_over_time():
    xs = normal(5, 4, 3)

    def objective(p):
        def body(hidden, x):
            hidden = jnp.tanh(x @ p["x"] + (hidden @ p["h"] + p["b"]))
            return hidden, jnp.mean(hidden**2)

        return jnp.mean(jax.lax.scan(body, jnp.zeros((4, 2)), xs, reverse=True, unroll=2)[1])

    return objective, {"x": normal(3, 2), "h": normal(2, 2), "b": normal(2)}


@case(Expected("w", "dense", "b", (3, 2, 2), 20))
def scan_over_time_over_layers():
    """Time outside, a stack of layers inside."""
    xs = normal(5, 4, 2)

    def objective(p):
        def step(hidden, x):
            def layer(below, layer):
                w, b, old = layer
                new = jnp.tanh(below @ w + b + old)
                return new, new

            return jax.lax.scan(layer, x, (p["w"], p["b"], hidden))[1], None

        return jnp.mean(jax.lax.scan(step, jnp.zeros((3, 4, 2)), xs)[0] ** 2)

    return objective, {"w": normal(3, 2, 2), "b": normal(3, 2)}


@case(Expected("w", "dense", "b", (3, 2, 2), 20))
def scan_over_layers_over_time():
    """A stack of recurrent layers outside, time inside."""
    xs = normal(5, 4, 2)

    def objective(p):
        def layer(xs, layer):
            w, b = layer

            def step(hidden, x):
                hidden = jnp.tanh(hidden @ w + b + x)
                return hidden, hidden

            return jax.lax.scan(step, jnp.zeros((4, 2)), xs)[1], None

        return jnp.mean(jax.lax.scan(layer, xs, (p["w"], p["b"]))[0] ** 2)

    return objective, {"w": normal(3, 2, 2), "b": normal(3, 2)}


def _cell(prefix: str, inputs: str, hidden: str, bias: str, sizes: tuple[int, int]) -> tuple:
    features, units = sizes
    x = (
        Expected(f"{prefix}/i{gate}/kernel", "dense", None, (1, features, units), 12)
        for gate in inputs
    )
    h = (
        Expected(
            f"{prefix}/h{gate}/kernel",
            "dense",
            f"{prefix}/h{gate}/bias" if gate in bias else None,
            (1, units, units),
            12,
        )
        for gate in hidden
    )
    return (*x, *h)


@case(*_cell("params/cell", "ifgo", "ifgo", "ifgo", (2, 3)))
def linen_lstm():
    return linen(nn.RNN(nn.LSTMCell(3)), normal(4, 3, 2))


@case(*_cell("params/cell", "ifgo", "ifgo", "ifgo", (2, 3)))
def linen_optimized_lstm():
    return linen(nn.RNN(nn.OptimizedLSTMCell(3)), normal(4, 3, 2))


@case(
    *(
        Expected(f"params/cell/i{g}/kernel", "dense", f"params/cell/i{g}/bias", (1, 2, 3), 12)
        for g in "rzn"
    ),
    Expected("params/cell/hr/kernel", "dense", None, (1, 3, 3), 12),
    Expected("params/cell/hz/kernel", "dense", None, (1, 3, 3), 12),
    Expected("params/cell/hn/kernel", "dense", "params/cell/hn/bias", (1, 3, 3), 12),
)
def linen_gru():
    return linen(nn.RNN(nn.GRUCell(3)), normal(4, 3, 2))


# Libraries.


@case(
    Expected("hidden/kernel", "dense", "hidden/bias", (1, 3, 5), 4),
    Expected("out/kernel", "dense", "out/bias", (1, 5, 2), 4),
    rest=("norm/bias", "norm/scale"),
)
def nnx_modules():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(3, 5, rngs=rngs)
            self.norm = nnx.LayerNorm(5, rngs=rngs)
            self.out = nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.norm(self.hidden(x))))

    graph, state = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    x = normal(4, 3)
    params = fill(nnx.to_pure_dict(state))

    def objective(p):
        full = nnx.merge(graph, _with_values(state, p))
        return jnp.mean(full(x) ** 2)

    return objective, params


def _with_values(state: Any, values: Any) -> Any:
    """An abstract NNX state with arrays put in."""
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, values)
    return state


@case(
    Expected("layers/0/weight", "dense", "layers/0/bias", (1, 3, 5), 4),
    Expected("layers/1/weight", "dense", "layers/1/bias", (1, 5, 2), 4),
)
def equinox_mlp():
    mlp = eqx.filter_eval_shape(eqx.nn.MLP, 3, 2, 5, 1, key=jax.random.key(0))
    params, static = eqx.partition(mlp, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    x = normal(4, 3)
    return lambda p: jnp.mean(jax.vmap(eqx.combine(p, static))(x) ** 2), fill(params)


@case(
    Expected("layers/0/weight", "dense", "layers/0/bias", (1, 3, 30), 4),
    Expected("layers/1/weight", "dense", "layers/1/bias", (6, 5, 2), 4),
)
def equinox_ensemble():
    """The members share the inputs of the first layer, not those of the second."""
    keys = jax.ShapeDtypeStruct((6,), jax.random.key(0).dtype)
    make = eqx.filter_vmap(lambda key: eqx.nn.MLP(3, 2, 5, 1, key=key))
    mlps = eqx.filter_eval_shape(make, keys)
    params, static = eqx.partition(mlps, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    x = normal(4, 3)

    def objective(p):
        members = eqx.filter_vmap(
            lambda member, x: jax.vmap(member)(x), in_axes=(eqx.if_array(0), None)
        )
        return jnp.mean(jnp.tanh(members(eqx.combine(p, static), x)) ** 2)

    return objective, fill(params)


@case(
    Expected("0/weight", "embedding", None, (1, 7, 3), 12),
    Expected("1/weight", "dense", "1/bias", (1, 3, 2), 12),
)
def equinox_embedding():
    shapes = eqx.filter_eval_shape(
        lambda key: [eqx.nn.Embedding(7, 3, key=key), eqx.nn.Linear(3, 2, key=key)],
        jax.random.key(0),
    )
    params, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    words = tokens(4, 3)

    def objective(p):
        table, linear = eqx.combine(p, static)
        return jnp.mean(jax.vmap(jax.vmap(lambda i: linear(jnp.tanh(table(i)))))(words) ** 2)

    return objective, fill(params)


# Precision, auxiliary outputs, randomness.


@case(Expected("w", "dense", "b", (1, 3, 5), 4), tolerance=0.02)
def bfloat16():
    x = normal(4, 3).astype(jnp.bfloat16)
    params = {"w": normal(3, 5).astype(jnp.bfloat16), "b": normal(5).astype(jnp.bfloat16)}

    def objective(p):
        return jnp.mean(jnp.tanh(x @ p["w"] + p["b"]).astype(jnp.float32))

    return objective, params


@case(
    Expected("params/Dense_0/kernel", "dense", "params/Dense_0/bias", (1, 3, 5), 4),
    Expected("params/Dense_1/kernel", "dense", "params/Dense_1/bias", (1, 5, 2), 4),
    tolerance=0.02,
)
def mixed_precision():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Dense(5, dtype=jnp.bfloat16)(x))
            return nn.Dense(2, dtype=jnp.bfloat16)(x).astype(jnp.float32)

    return linen(Model(), normal(4, 3))


@case(
    Expected("Dense_0/kernel", "dense", "Dense_0/bias", (1, 3, 5), 4),
    Expected("Dense_1/kernel", "dense", "Dense_1/bias", (1, 5, 2), 4),
    rest=("BatchNorm_0/bias", "BatchNorm_0/scale"),
)
def batch_statistics():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(5)(x))
            return nn.Dense(2)(nn.relu(x))

    x, model = normal(4, 3), Model()
    variables = fill(jax.eval_shape(model.init, jax.random.key(0), x))
    objective = so.Objective(
        lambda p: model.apply(
            {"params": p, "batch_stats": variables["batch_stats"]}, x, mutable=["batch_stats"]
        ),
        lambda z: jnp.mean(z**2),
        has_aux=True,
    )
    return objective, variables["params"]


@case(
    Expected("params/Dense_0/kernel", "dense", "params/Dense_0/bias", (1, 3, 5), 4),
    Expected("params/Dense_1/kernel", "dense", "params/Dense_1/bias", (1, 5, 2), 4),
)
def dropout():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(jnp.tanh(nn.Dense(5)(x)))
            return nn.Dense(2)(x)

    x, model = normal(4, 3), Model()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = fill(jax.eval_shape(model.init, keys, x))

    def objective(p):
        return jnp.mean(model.apply(p, x, rngs={"dropout": jax.random.key(2)}) ** 2)

    return objective, params


# What the tests compare.


class LayerMeasurement(NamedTuple):
    """One layer: explicit matrices, and the statistics to be compared with them."""

    inputs: Any  # (stack, positions, inputs without the homogeneous one), over all uses
    cotangents: Any
    outputs: Any
    tied_gradient: Any  # of the uses that see the weight as another matrix
    probe_rows: Any
    mean_input: Any
    output_means: (
        Any  # rows: mean output, cotangent summed over examples and averaged over the rest
    )
    gram: Any
    gram_product: Any
    eigenvalues: Any


class Measurement(NamedTuple):
    """A case, evaluated."""

    layers: so.Layers
    traced: tuple[TracedLayer, ...]
    batch_size: int
    value: Any
    tape_value: Any
    gradient: list[Any]
    measured: list[LayerMeasurement]


def value_of(output: Any) -> Any:
    """The value of an objective, without its auxiliary output."""
    return output[0] if isinstance(output, tuple) else output


def _matrices(found: list[uses.Use], arrays: Any, form: Any) -> Any:
    return jnp.concatenate([form(use, arrays[use.site]) for use in found], axis=1)


def _measure_layer(traced: TracedLayer, tape: probes.Tape, batch_size: int) -> LayerMeasurement:
    layer, found = traced.layer, list(traced.uses)
    tied = jnp.zeros(layer.weight_view.shape)
    for other in traced.tied:
        use = other.use
        a = uses.input_matrix(use, tape.operands[use.site])
        g = uses.output_matrix(use, tape.cotangents[use.site])
        product = jnp.einsum("sti,sto->sio", a, g)
        tied += layer.weight_view.apply(use.weight_view.invert(product))
    rows = normal(layer.stack, 2, layer.inputs)
    weights = statistics.output_weights(traced, batch_size)
    means = statistics.output_sums(traced, tape) * weights[:, None]
    gram = statistics.input_counts if layer.diagonal_input else statistics.input_gram
    return LayerMeasurement(
        inputs=_matrices(found, tape.operands, uses.input_matrix),
        cotangents=_matrices(found, tape.cotangents, uses.output_matrix),
        outputs=_matrices(found, tape.outputs, uses.output_matrix),
        tied_gradient=tied,
        probe_rows=rows,
        mean_input=statistics.mean_input(traced, tape),
        output_means=means,
        gram=gram(traced, tape),
        gram_product=statistics.gram_product(traced, tape, rows),
        eigenvalues=statistics.mean_eigenvalues(traced, tape, batch_size),
    )


@functools.cache
def measure(name: str) -> Measurement:
    """Evaluates a case once for all tests."""
    objective, params = CASES[name].build()
    return measure_objective(objective, params)


def measure_objective(objective: Any, params: Any) -> Measurement:
    """Finds the layers of an objective and evaluates everything about them, in one `jit`."""
    layers = so.find_layers(objective, params)
    static: list[Any] = []

    def everything(params: Any) -> Any:
        value, gradient = jax.value_and_grad(lambda p: value_of(objective(p)))(params)
        discovery, traced, batch_size = trace_layers(layers, objective, params)
        static[:] = [traced, batch_size]
        tape = probes.record(discovery, params)
        measured = [_measure_layer(layer, tape, batch_size) for layer in traced]
        return value, tape.value, jax.tree.leaves(gradient), measured

    results = jax.tree.map(np.asarray, jax.jit(everything)(params))
    return Measurement(layers, *static, *results)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Compares relative to the largest element."""
    expected = np.asarray(expected, np.float64)
    scale = np.max(np.abs(expected), initial=1e-6)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance * scale
    )
