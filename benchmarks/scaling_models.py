"""The models, methods and layouts of ``scaling``: small, as nothing of it is run."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import secondorder as so
from benchmarks.sequences import block_shapes

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with a batch, as shapes.

    Attributes:
        params: `jax.ShapeDtypeStruct` of its parameters.
        batch: Inputs and targets, examples first.
        objective: Maps a batch to the objective on it.
    """

    params: Params
    batch: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
    objective: Callable[[Any], so.Objective[Any]]


def mlp(depth: int = 8, width: int = 256, batch: int = 1024, scanned: bool = False) -> Model:
    """Dense layers of equal width between an input and an output layer.

    Args:
        depth: Number of equal layers.
        width: Their width.
        batch: Number of examples.
        scanned: Whether the layers are one array under `jax.lax.scan`.

    Returns:
        The model.
    """
    square = _array(width, width)
    hidden: Any = _array(depth, width, width) if scanned else [square] * depth
    params = {"first": _array(64, width), "hidden": hidden, "last": _array(width, 16)}

    def apply(p: Params, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ p["first"])
        if scanned:
            h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["hidden"])[0]
        else:
            for w in p["hidden"]:
                h = jnp.tanh(h @ w)
        return h @ p["last"]

    return Model(params, (_array(batch, 64), _array(batch, 16)), _objective(apply, _squared_error))


def transformer(depth: int = 8, width: int = 64, batch: int = 64, length: int = 16) -> Model:
    """A causal transformer whose blocks are one array under `jax.lax.scan`.

    Args:
        depth: Number of blocks.
        width: Of the residual stream.
        batch: Number of sequences.
        length: Of a sequence.

    Returns:
        The model.
    """
    characters, heads = 32, 4
    blocks = {name: _array(depth, *shape) for name, shape in block_shapes(width).items()}
    params = {
        "embedding": _array(characters, width),
        "blocks": blocks,
        "head": _array(width, characters),
    }

    def attend(block: Params, stream: jax.Array) -> jax.Array:
        parts = [
            (stream @ block[name]).reshape(*stream.shape[:2], heads, -1)
            for name in ("query", "key", "value")
        ]
        mixed = jax.nn.dot_product_attention(*parts, is_causal=True)
        return mixed.reshape(stream.shape) @ block["mix"]

    def run_block(stream: jax.Array, block: Params) -> tuple[jax.Array, None]:
        stream = stream + attend(block, stream)
        return stream + jax.nn.gelu(stream @ block["enter"]) @ block["leave"], None

    def apply(p: Params, x: jax.Array) -> jax.Array:
        stream = jnp.take(p["embedding"], x, axis=0)
        return jax.lax.scan(run_block, stream, p["blocks"])[0] @ p["head"]

    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return Model(params, (tokens, tokens), _objective(apply, _cross_entropy))


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _objective(
    apply: Callable[[Params, jax.Array], jax.Array],
    loss: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[[Any], so.Objective[Any]]:
    def on(batch: Any) -> so.Objective[Any]:
        inputs, targets = batch
        return so.Objective(lambda p: apply(p, inputs), lambda z: loss(z, targets))

    return on


def _squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1))


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * chosen, axis=-1))


# Loops as short as they may be: the count of operations does not know how long they run.
_OPTIMIZERS: Mapping[str, Callable[[Callable[[], so.Layers]], Any]] = {
    "adam": lambda layers: optax.with_extra_args_support(optax.adam(1e-3)),
    "kbfgs": lambda layers: so.kbfgs(0.1, layers()),
    "kbfgs-l": lambda layers: so.kbfgs(0.1, layers(), memory_size=16),
    "lsr1": lambda layers: so.lsr1(memory_size=8),
    "hf": lambda layers: so.hessian_free(max_iterations=4),
    "bhf": lambda layers: so.block_hessian_free(max_iterations=4, engine="linearized"),
    "sgn": lambda layers: so.gauss_newton(max_iterations=4),
    "lm-cg": lambda layers: so.levenberg_marquardt(
        solver="conjugate_gradient", max_iterations=4, full_batch=True
    ),
    "pch": lambda layers: so.positive_curvature_hessian(0.1, layers(), input_moment="full"),
    "ksd": lambda layers: so.krylov_subspace_descent(subspace_size=4),
    "newton-cg": lambda layers: so.newton_cg(max_iterations=4),
    "sfn": lambda layers: so.saddle_free_newton(subspace_size=4),
    "lrsfn": lambda layers: so.low_rank_saddle_free_newton(0.1, rank=8),
}
OPTIMIZERS = tuple(_OPTIMIZERS)
MODELS: Mapping[str, Callable[[], Model]] = {
    "mlp": mlp,
    "scanned-mlp": functools.partial(mlp, scanned=True),
    "transformer": transformer,
}


def make_optimizer(name: str, model: Model) -> Any:
    """An optimizer for a model.

    Args:
        name: One of `OPTIMIZERS`.
        model: The model.

    Returns:
        The transform.
    """
    return _OPTIMIZERS[name](
        lambda: so.find_layers(lambda p, b: model.objective(b)(p), model.params, model.batch)
    )


def shard(model: Model, mesh: Mesh, layout: str) -> tuple[Any, Any]:
    """Parameters and batch on a mesh of one axis.

    Args:
        model: The model.
        mesh: The mesh.
        layout: ``"fsdp"`` splits the batch, and each parameter along its longest axis; ``"data"``
            splits the batch alone.

    Returns:
        Both as `jax.ShapeDtypeStruct` with shardings.
    """
    (axis,) = mesh.axis_names

    def place(leaf: Any, position: int | None) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec() if position is None else PartitionSpec(*[None] * position, axis)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def longest(leaf: Any) -> int | None:
        return None if layout == "data" else max(range(leaf.ndim), key=lambda i: (leaf.shape[i], i))

    params = jax.tree.map(lambda leaf: place(leaf, longest(leaf)), model.params)
    return params, jax.tree.map(lambda leaf: place(leaf, 0), model.batch)


def compile_step(model: Model, optimizer: Any, params: Any, batch: Any) -> tuple[Any, Any]:
    """Compiles a training step for the devices of the parameters.

    Args:
        model: The model.
        optimizer: The optimizer.
        params: What `shard` returns.
        batch: Likewise.

    Returns:
        The compiled step, and the shapes of the optimizer's state with their shardings.
    """
    shardings = so.state_shardings(optimizer, params)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(optimizer.init, params),
        shardings,
    )

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        objective = model.objective(batch)
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, value

    places = jax.tree.map(lambda leaf: leaf.sharding, params), shardings, None
    jitted = jax.jit(step, out_shardings=places, donate_argnums=(0, 1))
    return jitted.lower(params, state, batch).compile(), state
