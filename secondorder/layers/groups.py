"""Layers of equal shape side by side, so that their factors are updated in one batched operation.

Compile time then depends on the number of different shapes, not on the depth of the model.
"""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from secondorder.layers.layer import Layer


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers whose blocks have one shape.

    Attributes:
      members: Indices of the layers.
      sizes: Number of blocks of each member.
      inputs: Columns of a block, the homogeneous one included.
      outputs: Rows of a block.
      diagonal_input: Whether the members are embeddings.
    """

    members: tuple[int, ...]
    sizes: tuple[int, ...]
    inputs: int
    outputs: int
    diagonal_input: bool

    @property
    def stack(self) -> int:
        """Number of blocks of all members."""
        return sum(self.sizes)

    def join(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """Stacks the members' arrays, one for *every* layer given, along the leading axis."""
        chosen = [arrays[member] for member in self.members]
        return chosen[0] if len(chosen) == 1 else jnp.concatenate(chosen)

    def split(self, stacked: jax.Array) -> dict[int, jax.Array]:
        """Cuts a stack into one array for each member; the inverse of `join`."""
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        return {
            member: jax.lax.slice_in_dim(stacked, start, start + size)
            for member, start, size in zip(self.members, starts, self.sizes, strict=True)
        }

    def spread(self, values: Sequence[float]) -> jax.Array:
        """One value for each layer given, repeated for the blocks of the members."""
        return jnp.concatenate(
            [jnp.full(size, values[m]) for m, size in zip(self.members, self.sizes, strict=True)]
        )


def group_layers(layers: Sequence[Layer]) -> tuple[Group, ...]:
    """Groups layers by the shape of their blocks.

    Args:
      layers: The layers.

    Returns:
      The groups, in the order of their first members.
    """
    members: dict[tuple[int, int, bool], list[int]] = collections.defaultdict(list)
    for index, layer in enumerate(layers):
        members[layer.inputs, layer.outputs, layer.diagonal_input].append(index)
    return tuple(
        Group(tuple(found), tuple(layers[i].stack for i in found), *shape)
        for shape, found in members.items()
    )


def join_groups(groups: Sequence[Group], stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """Takes one stack for each group back to one array for each layer.

    Args:
      groups: The groups.
      stacks: An array for each group, with the blocks as leading axis.

    Returns:
      An array for each layer, in the order of the layers.
    """
    parts = {
        member: part
        for group, stacked in zip(groups, stacks, strict=True)
        for member, part in group.split(stacked).items()
    }
    return [parts[index] for index in range(len(parts))]
