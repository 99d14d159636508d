"""Work on stacks of equal matrices, spread over the devices of a mesh.

Inverses and products of Kronecker factors know nothing of the batch: left alone, every device would
do all of them. The matrices of equal shape stand in one stack, and each of ``d`` devices takes
``ceil(k / d)`` of ``k``. This goes by `jax.shard_map`, not by hints to the compiler, because it
gathers what a factorization works on whatever its sharding.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from secondorder.products import map_matrices
from secondorder.sharding import constrain, mesh_of, replicate


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices that share the work on stacks.

    Attributes:
      mesh: Their abstract mesh, or None where there is nothing to share.
      axes: Names of its axes over which a stack is split.
    """

    mesh: Any = None
    axes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of devices that share the work."""
        return self._size(self.axes)

    def share(self, size: int) -> int:
        """How many of a stack each device takes: all of them, if that is at most one more.

        Args:
          size: Number ``k`` of matrices.

        Returns:
          ``ceil(k / d)``, or ``k``.

        Example:
          >>> ALONE.share(5)
          5
        """
        share = -(-size // self.count)
        return size if share >= size - 1 else share

    def spread(
        self,
        function: Callable[..., Any],
        *arrays: chex.ArrayTree,
        in_axes: int | Sequence[int | None] = 0,
        out_axes: int = 0,
    ) -> Any:
        """Applies a function to stacks, a part of them on each device.

        Args:
          function: Maps stacks to stacks, and does to each matrix the same, whatever the others
            are. It may see more matrices than there are: the last is repeated until the stack is
            divided by the devices.
          *arrays: Its arguments, pytrees of arrays.
          in_axes: For each argument, or for all, which axis of its arrays is the stack; None for
            what every device needs as a whole.
          out_axes: Which axis of the results is the stack.

        Returns:
          What ``function(*arrays)`` returns. On an Explicit mesh the stack is sharded, or
          replicated if the devices do not divide it.

        Example:
          >>> ALONE.spread(jnp.linalg.inv, 2 * jnp.eye(2)[None]).tolist()
          [[[0.5, 0.0], [0.0, 0.5]]]
        """
        axes = [in_axes] * len(arrays) if in_axes is None or isinstance(in_axes, int) else in_axes
        size = _stack_size(arrays, axes)
        share = self.share(size)
        if share == size:
            return function(*jax.tree.map(replicate, arrays))
        margin = share * self.count - size
        placed = [
            jax.tree.map(lambda a, axis=axis: self._place(_pad(a, axis, margin), axis), array)
            for array, axis in zip(arrays, axes, strict=True)
        ]
        # What runs on a device exchanges nothing, so that there is nothing to check.
        result = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(self._spec(axis) for axis in axes),
            out_specs=self._spec(out_axes),
            check_vma=False,
        )(*placed)
        return result if margin == 0 else jax.tree.map(lambda a: _cut(a, out_axes, size), result)

    def keep(self, stack: jax.Array) -> jax.Array:
        """Splits a stack as it is kept between steps: over the devices that divide it.

        Args:
          stack: Array ``(k, ...)``.

        Returns:
          The same array.

        Example:
          >>> ALONE.keep(jnp.ones(2)).tolist()
          [1.0, 1.0]
        """
        if self.count == 1:
            return stack
        kept: tuple[str, ...] = ()
        for axis in self.axes:
            if len(stack) % self._size((*kept, axis)) == 0:
                kept = (*kept, axis)
        return self._constrain(stack, PartitionSpec(kept) if kept else PartitionSpec())

    def gather(self, array: jax.Array) -> jax.Array:
        """Brings an array to every device, and stops the compiler from choosing otherwise.

        Args:
          array: What small algebra is done with.

        Returns:
          The same array.

        Example:
          >>> ALONE.gather(jnp.ones(2)).tolist()
          [1.0, 1.0]
        """
        return array if self.count == 1 else self._constrain(array, PartitionSpec())

    def _size(self, axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _spec(self, axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, self.axes)

    def _place(self, array: jax.Array, axis: int | None) -> jax.Array:
        """On an Explicit mesh what is mapped must be sharded as the map says."""
        return self._constrain(array, self._spec(axis)) if self._is_explicit else array

    def _constrain(self, array: jax.Array, spec: PartitionSpec) -> jax.Array:
        return constrain(array, NamedSharding(self.mesh, spec))

    @property
    def _is_explicit(self) -> bool:
        return AxisType.Explicit in self.mesh.axis_types


ALONE = Devices()  # one device, which does everything


def devices_of(params: chex.ArrayTree, axes: Sequence[str] | None = None) -> Devices:
    """The devices that the parameters are on.

    Args:
      params: The parameters, or their tracers.
      axes: Names of the axes of their mesh over which work is to be spread; None for all, and none
        for no spreading.

    Returns:
      The devices. There is only one inside of `jax.shard_map`, where the caller has spread all work
      already, and on meshes with both Auto and Explicit axes.

    Raises:
      ValueError: If the mesh has no such axis.

    Example:
      >>> devices_of(jnp.ones(2)).count
      1
    """
    mesh = mesh_of(params)
    if mesh is None or len(set(mesh.axis_types)) != 1 or AxisType.Manual in mesh.axis_types:
        return ALONE
    chosen = tuple(mesh.axis_names) if axes is None else tuple(axes)
    if unknown := set(chosen) - set(mesh.axis_names):
        raise ValueError(
            f"spread_over names {sorted(unknown)}, but the mesh of the parameters has the axes "
            f"{mesh.axis_names}."
        )
    return Devices(mesh, chosen)


def map_by_shape(
    function: Callable[..., Any], cases: Sequence[tuple[jax.Array, ...]], devices: Devices
) -> list[Any]:
    """Applies a function to several arguments, batched where shapes agree, spread over devices.

    Args:
      function: Maps one case to an array or a pytree of arrays.
      cases: Its arguments.
      devices: What shares the work.

    Returns:
      ``[function(*case) for case in cases]``.

    Example:
      >>> cases = [(jnp.eye(1),), (2 * jnp.eye(2),), (4 * jnp.eye(1),)]
      >>> [inverse[0, 0].item() for inverse in map_by_shape(jnp.linalg.inv, cases, ALONE)]
      [1.0, 0.5, 0.25]
    """
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for index, case in enumerate(cases):
        groups[tuple((array.shape, array.dtype) for array in case)].append(index)
    results: list[Any] = [None] * len(cases)
    mapped = functools.partial(map_matrices, function)
    for members in groups.values():
        stacks = [jnp.stack(arrays) for arrays in zip(*(cases[i] for i in members), strict=True)]
        stacked = jax.tree.map(devices.gather, devices.spread(mapped, *stacks))
        for row, index in enumerate(members):
            results[index] = jax.tree.map(lambda array, row=row: array[row], stacked)
    return results


def _stack_size(arrays: Sequence[chex.ArrayTree], axes: Sequence[int | None]) -> int:
    sizes = {
        leaf.shape[axis]
        for array, axis in zip(arrays, axes, strict=True)
        for leaf in jax.tree.leaves(array)
        if axis is not None
    }
    if len(sizes) != 1:
        raise ValueError(f"All stacks must have one length, got {sorted(sizes)}.")
    return sizes.pop()


def _pad(array: jax.Array, axis: int | None, margin: int) -> jax.Array:
    """Repeats the last matrix: zeros might be singular, and checks for NaN would find that."""
    if axis is None or margin == 0:
        return array
    array = replicate(array)
    size = array.shape[axis]
    last = jax.lax.slice_in_dim(array, size - 1, size, axis=axis)
    shape = (*array.shape[:axis], margin, *array.shape[axis + 1 :])
    return jnp.concatenate([array, jnp.broadcast_to(last, shape)], axis)


def _cut(array: jax.Array, axis: int, size: int) -> jax.Array:
    return jax.lax.slice_in_dim(replicate(array), 0, size, axis=axis)
