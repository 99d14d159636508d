"""The networks on sequences: stacked LSTM layers and a character transformer, in bare JAX."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Module = dict[str, jax.Array]


def init_lstm_stack(
    key: jax.Array, inputs: int, hidden: Sequence[int], classes: int
) -> list[Module]:
    """Initializes LSTM layers and a dense layer as PyTorch does: uniform on ``+-1/sqrt(width)``.

    Args:
        key: PRNG key.
        inputs: Numbers per step of the sequence.
        hidden: Units of each layer.
        classes: Outputs of the dense layer.

    Returns:
        One ``{"input", "recurrent", "bias"}`` per LSTM layer, with the gates side by side, and
        ``{"kernel", "bias"}`` of the dense layer.
    """
    keys = jax.random.split(key, len(hidden) + 1)
    widths = zip(keys[:-1], (inputs, *hidden), hidden, strict=False)
    layers = [_init_lstm(layer_key, *shape) for layer_key, *shape in widths]
    shapes = {"kernel": (hidden[-1], classes), "bias": (classes,)}
    return [*layers, _init_uniform(keys[-1], shapes, hidden[-1])]


def apply_lstm_stack(params: list[Module], sequences: jax.Array) -> jax.Array:
    """Logits from the last hidden state of the last layer.

    Args:
        params: LSTM layers and a dense layer.
        sequences: ``(batch, steps, inputs)``.

    Returns:
        ``(batch, classes)``.
    """
    *layers, readout = params
    hidden = jnp.swapaxes(sequences, 0, 1)
    for layer in layers:
        hidden = _run_lstm(layer, hidden)
    return hidden[-1] @ readout["kernel"] + readout["bias"]


def _run_lstm(layer: Module, inputs: jax.Array) -> jax.Array:
    """One layer over all steps, ``(steps, batch, width)``; what comes from below is one product."""
    driven = inputs @ layer["input"] + layer["bias"]

    def step(
        carry: tuple[jax.Array, jax.Array], drive: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        hidden, cell = carry
        gates = drive + hidden @ layer["recurrent"]
        enter, keep, new, leave = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
        hidden = jax.nn.sigmoid(leave) * jnp.tanh(cell)
        return (hidden, cell), hidden

    zeros = jnp.zeros((inputs.shape[1], layer["recurrent"].shape[0]), driven.dtype)
    return jax.lax.scan(step, (zeros, zeros), driven)[1]


def init_transformer(
    key: jax.Array, characters: int, context: int, width: int, depth: int
) -> list[Module]:
    """Initializes a decoder: embedding, blocks, and what reads the logits out.

    Kernels are normal with variance ``1 / inputs``; those that add to the residual stream are
    scaled down by ``sqrt(2 depth)``, embeddings and readout have deviation 0.02.

    Args:
        key: PRNG key.
        characters: Size of the vocabulary.
        context: Longest sequence.
        width: Of the residual stream; the hidden layers between are four times as wide.
        depth: Number of blocks.

    Returns:
        ``{"embedding", "position_embedding"}``, one dictionary per block, and
        ``{"scale", "head"}``.
    """
    first, last, *keys = jax.random.split(key, depth + 2)
    tokens, positions = jax.random.split(first)
    embedding = {
        "embedding": 0.02 * jax.random.normal(tokens, (characters, width)),
        "position_embedding": 0.02 * jax.random.normal(positions, (context, width)),
    }
    blocks = [_init_block(block_key, width, depth) for block_key in keys]
    head = 0.02 * jax.random.normal(last, (width, characters))
    return [embedding, *blocks, {"scale": jnp.ones(width), "head": head}]


def apply_transformer(params: list[Module], characters: jax.Array, heads: int) -> jax.Array:
    """Logits of the next character at every position.

    Blocks normalize before they transform (root mean square, with a scale). Nothing but the
    readout is tied to the vocabulary, and no layer has a bias.

    Args:
        params: As `init_transformer` makes them.
        characters: ``(batch, length)`` numbers of characters.
        heads: Number of attention heads.

    Returns:
        ``(batch, length, characters)``.
    """
    embedding, *blocks, readout = params
    positions = embedding["position_embedding"][: characters.shape[1]]
    stream = embedding["embedding"][characters] + positions
    for block in blocks:
        stream = stream + _attend(block, _normalize(stream, block["attention_scale"]), heads)
        hidden = jax.nn.gelu(_normalize(stream, block["hidden_scale"]) @ block["enter"])
        stream = stream + hidden @ block["leave"]
    return _normalize(stream, readout["scale"]) @ readout["head"]


def block_shapes(width: int) -> dict[str, tuple[int, int]]:
    """Shapes of the kernels of a transformer's block: attention, then two dense layers.

    Args:
        width: Of the residual stream; the hidden layer is four times as wide.

    Returns:
        Inputs and outputs of each kernel.
    """
    return {
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "mix": (width, width),
        "enter": (width, 4 * width),
        "leave": (4 * width, width),
    }


def _init_block(key: jax.Array, width: int, depth: int) -> Module:
    shapes = block_shapes(width)
    keys = jax.random.split(key, len(shapes))
    block = {
        name: jax.random.normal(kernel_key, shape) / shape[0] ** 0.5
        for kernel_key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    for name in ("mix", "leave"):
        block[name] = block[name] / (2 * depth) ** 0.5
    return {**block, "attention_scale": jnp.ones(width), "hidden_scale": jnp.ones(width)}


def _attend(block: Module, stream: jax.Array, heads: int) -> jax.Array:
    """Causal self-attention."""
    batch, length, width = stream.shape
    query, key, value = (
        (stream @ block[name]).reshape(batch, length, heads, width // heads)
        for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return mixed.reshape(batch, length, width) @ block["mix"]


def _normalize(stream: jax.Array, scale: jax.Array) -> jax.Array:
    mean_square = jnp.mean(stream**2, axis=-1, keepdims=True)
    return scale * stream * jax.lax.rsqrt(mean_square + 1e-6)


def _init_lstm(key: jax.Array, inputs: int, hidden: int) -> Module:
    shapes = {
        "input": (inputs, 4 * hidden),
        "recurrent": (hidden, 4 * hidden),
        "bias": (4 * hidden,),
    }
    return _init_uniform(key, shapes, hidden)


def _init_uniform(key: jax.Array, shapes: dict[str, tuple[int, ...]], width: int) -> Module:
    draw = functools.partial(jax.random.uniform, minval=-(width**-0.5), maxval=width**-0.5)
    keys = jax.random.split(key, len(shapes))
    return {
        name: draw(leaf_key, shape)
        for leaf_key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
