r"""Random numbers for directions and probes, which compile to a handful of integer operations.

`jax.random` compiles a loop of its own for every shape, about a second each on CPUs: more than all
else in the step of many a method. What is drawn here only has to be in general position, with the
right mean and variance. So each element hashes its own indices and the key: the numbers depend
neither on the sharding nor on the device.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from secondorder.checks import check_choice

Distribution: TypeAlias = Literal["normal", "uniform", "rademacher"]

_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio
# Chris Wellons's "lowbias32": a change of one bit of the input turns each of the output in half of
# all cases, but for 0.17 % at most.
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


def draw(
    distribution: Distribution,
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    stream: int = 0,
) -> jax.Array:
    """Independent numbers of mean 0.

    Args:
      distribution: ``"normal"``, of variance 1; ``"rademacher"``, 1 or -1; or ``"uniform"`` in
        (-1, 1). Static.
      key: A PRNG key.
      shape: Of the array.
      dtype: Of the array, real.
      stream: Other numbers for the same key. Static.

    Returns:
      The array.

    Raises:
      ValueError: If there is no such distribution.

    Example:
      >>> draw("rademacher", jax.random.key(0), (2, 3), jnp.float32).shape
      (2, 3)
    """
    check_choice("distribution", distribution, get_args(Distribution))
    return _DISTRIBUTIONS[distribution](key, shape, stream).astype(dtype)


def random_bits(key: jax.Array, shape: tuple[int, ...], stream: int = 0) -> jax.Array:
    """Random 32-bit integers: a hash of the indices of each element, axis by axis.

    Args:
      key: A PRNG key.
      shape: Of the array.
      stream: Other numbers for the same key. Static.

    Returns:
      An array of uint32.

    Example:
      >>> random_bits(jax.random.key(0), (2,)).dtype.name
      'uint32'
    """
    words = jax.random.key_data(key).ravel().astype(jnp.uint32)
    state = _mixed(words[0] + jnp.uint32(_GOLDEN * (stream + 1) % 2**32))
    for word in words[1:]:
        state = _mixed(state ^ word)
    bits = jnp.full(shape, state)
    for axis in range(len(shape)):
        bits = _mixed(bits + jnp.uint32(_GOLDEN) * (jnp.uint32(1) + _indices(shape, axis)))
    return _mixed(bits ^ state)


def _mixed(bits: jax.Array) -> jax.Array:
    """Hashes 32-bit integers one to one."""
    for shift, factor in zip((16, 15), _MULTIPLIERS, strict=True):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def _indices(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.uint32, shape, axis)


def _uniform(key: jax.Array, shape: tuple[int, ...], stream: int) -> jax.Array:
    """In the open interval (-1, 1): with 23 bits every step of this is exact in float32."""
    high = (random_bits(key, shape, stream) >> 9).astype(jnp.float32)
    return (high + 0.5) * 2.0**-22 - 1


def _normal(key: jax.Array, shape: tuple[int, ...], stream: int) -> jax.Array:
    """Box and Muller's transformation of two uniform numbers."""
    radius = jnp.sqrt(-2 * jnp.log((_uniform(key, shape, 2 * stream) + 1) / 2))
    return radius * jnp.cos(math.pi * _uniform(key, shape, 2 * stream + 1))


def _rademacher(key: jax.Array, shape: tuple[int, ...], stream: int) -> jax.Array:
    return jnp.where(random_bits(key, shape, stream) >> 31, 1.0, -1.0)


_DISTRIBUTIONS: dict[str, Callable[[jax.Array, tuple[int, ...], int], jax.Array]] = {
    "normal": _normal,
    "uniform": _uniform,
    "rademacher": _rademacher,
}
