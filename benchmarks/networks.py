"""The networks of the benchmark problems, and their losses.

The autoencoders are bare JAX with the papers' initialization; the classifiers are Flax Linen, so
that both ways of writing a model are measured.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

DenseStack = list[dict[str, jax.Array]]


def init_dense_stack(key: jax.Array, sizes: Sequence[int]) -> DenseStack:
    """Initializes dense layers as PyTorch's ``nn.Linear`` does, which the papers used.

    Kernel and bias are both uniform on ``+-1/sqrt(inputs)``.

    Args:
        key: PRNG key.
        sizes: Width of each layer from the input to the output.

    Returns:
        One ``{"kernel": (inputs, outputs), "bias": (outputs,)}`` per layer, float32.
    """
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, pairwise(sizes), strict=True)
    return [_init_dense(layer_key, *shape) for layer_key, shape in shapes]


def init_glorot_stack(key: jax.Array, sizes: Sequence[int]) -> DenseStack:
    """Initializes dense layers as Glorot and Bengio (2010) do for tanh; biases are zero.

    Args:
        key: PRNG key.
        sizes: Width of each layer from the input to the output.

    Returns:
        As `init_dense_stack`.
    """
    draw = jax.nn.initializers.glorot_uniform()
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"kernel": draw(layer_key, shape), "bias": jnp.zeros(shape[1])}
        for layer_key, shape in zip(keys, pairwise(sizes), strict=True)
    ]


def apply_autoencoder(
    params: DenseStack,
    inputs: jax.Array,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
) -> jax.Array:
    """A symmetric autoencoder whose code layer in the middle and whose output are linear.

    Args:
        params: An even number of dense layers; the first half is the encoder.
        inputs: ``(batch, pixels)``.
        activation: Of the other layers.

    Returns:
        ``(batch, pixels)`` reconstructions: logits or intensities, as the loss takes them.
    """
    linear_layers = {len(params) // 2 - 1, len(params) - 1}
    hidden = inputs
    for number, layer in enumerate(params):
        hidden = hidden @ layer["kernel"] + layer["bias"]
        if number not in linear_layers:
            hidden = activation(hidden)
    return hidden


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with today's ReLU and max-pooling: 61706 parameters.

    Attributes:
        classes: Number of classes.
        normalize: Puts batch normalization, with statistics of the batch, before each ReLU, in
            place of the biases: 61932 parameters.
    """

    classes: int = 10
    normalize: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, 28, 28, 1)`` images to ``(batch, classes)`` logits."""
        bias = not self.normalize
        hidden = self._activate(nn.Conv(6, (5, 5), padding="SAME", use_bias=bias)(images))
        hidden = _halve(hidden)
        hidden = self._activate(nn.Conv(16, (5, 5), padding="VALID", use_bias=bias)(hidden))
        hidden = _halve(hidden)
        hidden = hidden.reshape(hidden.shape[0], -1)
        hidden = self._activate(nn.Dense(120, use_bias=bias)(hidden))
        hidden = self._activate(nn.Dense(84, use_bias=bias)(hidden))
        return nn.Dense(self.classes)(hidden)

    def _activate(self, hidden: jax.Array) -> jax.Array:
        if self.normalize:
            hidden = nn.BatchNorm(use_running_average=False)(hidden)
        return nn.relu(hidden)


class DigitsCNN(nn.Module):
    """A small convolutional network for 8x8 images: 13706 parameters."""

    classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, 8, 8, 1)`` images to ``(batch, classes)`` logits."""
        hidden = nn.relu(nn.Conv(16, (3, 3))(images))
        hidden = _halve(hidden)
        hidden = nn.relu(nn.Conv(32, (3, 3))(hidden))
        hidden = _halve(hidden)
        hidden = hidden.reshape(hidden.shape[0], -1)
        hidden = nn.relu(nn.Dense(64)(hidden))
        return nn.Dense(self.classes)(hidden)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where shapes change."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, height, width, ...)`` to ``(batch, height / stride, ..., channels)``."""
        strides = (self.stride, self.stride)
        hidden = nn.relu(nn.Conv(self.channels, (3, 3), strides)(images))
        hidden = nn.Conv(self.channels, (3, 3))(hidden)
        if images.shape != hidden.shape:
            images = nn.Conv(self.channels, (1, 1), strides, use_bias=False)(images)
        return nn.relu(images + hidden)


class ResNet(nn.Module):
    """A convolution of 16 channels, three residual blocks and a dense layer, not normalized.

    All but the first block halve the image, the first convolution too.
    """

    classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps ``(batch, height, width, channels)`` images to ``(batch, classes)`` logits."""
        hidden = nn.relu(nn.Conv(16, (3, 3), (2, 2))(images))
        for channels, stride in ((16, 1), (32, 2), (64, 2)):
            hidden = ResidualBlock(channels, stride)(hidden)
        return nn.Dense(self.classes)(jnp.mean(hidden, axis=(1, 2)))


def binary_cross_entropy(logits: jax.Array, pixels: jax.Array) -> jax.Array:
    """Cross entropy of pixel intensities in [0, 1], summed over pixels, mean over the batch."""
    return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, pixels), axis=-1))


def half_squared_error(outputs: jax.Array, pixels: jax.Array) -> jax.Array:
    """Half the squared error, summed over pixels, mean over the batch."""
    return 0.5 * jnp.mean(jnp.sum((outputs - pixels) ** 2, axis=-1))


def squared_error(outputs: jax.Array, pixels: jax.Array) -> jax.Array:
    """The squared error, summed over pixels, mean over the batch."""
    return jnp.mean(jnp.sum((outputs - pixels) ** 2, axis=-1))


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy of integer classes, mean over the batch, and over positions of sequences."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _halve(images: jax.Array) -> jax.Array:
    """Max-pooling over 2x2 pixels; an odd last row or column is left out.

    The gradient of a maximum of slices takes half the time of that of `nn.max_pool`, which the
    CPU scatters pixel by pixel.
    """
    height, width = (size // 2 * 2 for size in images.shape[1:3])
    rows = jnp.maximum(images[:, 0:height:2], images[:, 1:height:2])
    return jnp.maximum(rows[:, :, 0:width:2], rows[:, :, 1:width:2])


def _init_dense(key: jax.Array, fan_in: int, fan_out: int) -> dict[str, jax.Array]:
    kernel_key, bias_key = jax.random.split(key)
    bound = 1 / float(fan_in) ** 0.5
    draw = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
    return {"kernel": draw(kernel_key, (fan_in, fan_out)), "bias": draw(bias_key, (fan_out,))}
