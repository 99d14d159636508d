"""Meshes of virtual devices, shared by the tests of sharding."""

from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def use_mesh(mesh: Mesh) -> AbstractContextManager[Any]:
    """Makes a mesh the current one; the name of it changed after JAX 0.6."""
    return (getattr(jax, "set_mesh", None) or jax.sharding.use_mesh)(mesh)


def make_mesh(
    *shape: int, names: tuple[str, ...] = ("data", "model"), kind: AxisType = AxisType.Explicit
) -> Mesh:
    """A mesh whose axes are all of one kind."""
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def place(mesh: Mesh, array: jax.Array, *axes: str | None) -> jax.Array:
    """An array on the devices of a mesh, its axes split along the named ones."""
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
