"""Shardings of what a method computes, under any mesh.

Under Auto axes the compiler chooses, and these functions do nothing. Under Explicit axes every
array's type carries its sharding, and an operation that would have to guess raises: there the
small dense algebra is replicated, and updates get the sharding of their parameter back.
"""

from collections.abc import Sequence
from typing import Any

import jax

try:
    from jax.sharding import reshard as reshard
except ImportError:  # JAX < 0.7
    from jax.experimental.shard import reshard as reshard  # type: ignore[no-redef]


def _explicit(array: jax.Array) -> Any:
    """The sharding in an array's type, or None outside an Explicit mesh."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty:
        return None
    explicit = jax.sharding.AxisType.Explicit
    return sharding if any(kind == explicit for kind in mesh.axis_types) else None


def replicate(array: jax.Array) -> jax.Array:
    """Gathers an array on every device of an Explicit mesh.

    Args:
      array: Any array.

    Returns:
      The same array, unsharded.

    Example:
      >>> import jax.numpy as jnp
      >>> replicate(jnp.ones(2)).tolist()
      [1.0, 1.0]
    """
    sharding = _explicit(array)
    if sharding is None or all(axis is None for axis in sharding.spec):
        return array
    replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return reshard(array, replicated)


def gather_axes(array: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Gathers some axes of an array on an Explicit mesh, before what cannot be done across them.

    Args:
      array: Any array.
      axes: The axes that must not be sharded.

    Returns:
      The same array, still sharded along the other axes.

    Example:
      >>> import jax.numpy as jnp
      >>> gather_axes(jnp.ones(2), [0]).tolist()
      [1.0, 1.0]
    """
    sharding = _explicit(array)
    if sharding is None:
        return array
    given = tuple(sharding.spec) + (None,) * (array.ndim - len(sharding.spec))
    spec = tuple(None if axis in axes else name for axis, name in enumerate(given))
    if spec == given:
        return array
    kept = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
    return reshard(array, kept)


def shard_like(array: jax.Array, reference: jax.Array) -> jax.Array:
    """Gives an array the sharding that another has on an Explicit mesh.

    Args:
      array: Any array.
      reference: An array of the same shape.

    Returns:
      The array, sharded like the reference.

    Example:
      >>> import jax.numpy as jnp
      >>> shard_like(jnp.ones(2), jnp.zeros(2)).tolist()
      [1.0, 1.0]
    """
    sharding = _explicit(reference)
    return array if sharding is None else reshard(array, sharding)
