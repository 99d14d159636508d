"""Layers of equal shape side by side, so that each operation on their factors is a batched one.

Compile time then depends on the number of different shapes, not on the depth of the model.
"""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from secondorder.layers.layer import Layer
from secondorder.spread import ALONE, Devices


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers whose blocks have one shape.

    Attributes:
      members: Indices of the layers.
      sizes: Number of blocks of each member.
      inputs: Rows of a block, the homogeneous one included.
      outputs: Columns of a block.
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


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the blocks of all layers are arranged: by group, and by layer within each group.

    Attributes:
      groups: The groups.
      devices: What shares the work on the stacks of a group.
    """

    groups: tuple[Group, ...]
    devices: Devices = ALONE

    def on(self, devices: Devices) -> "Layout":
        """The same arrangement on some devices."""
        return dataclasses.replace(self, devices=devices)

    def join(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Stacks one array per layer into one per group.

        Args:
          arrays: For each layer ``(blocks, ...)``.

        Returns:
          For each group ``(stack, ...)``.
        """
        return [concatenate([arrays[m] for m in group.members]) for group in self.groups]

    def split(self, stacks: Sequence[jax.Array]) -> list[jax.Array]:
        """Cuts one array per group into one per layer; the inverse of `join`.

        Args:
          stacks: For each group ``(stack, ...)``.

        Returns:
          For each layer ``(blocks, ...)``.
        """
        parts: dict[int, jax.Array] = {}
        for group, stacked in zip(self.groups, stacks, strict=True):
            start = 0
            for member, size in zip(group.members, group.sizes, strict=True):
                whole = size == group.stack
                parts[member] = stacked if whole else stacked[start : start + size]
                start += size
        return [parts[index] for index in range(len(parts))]

    def cut(self, rows: jax.Array) -> list[jax.Array]:
        """Cuts what is stacked for all blocks into one array per group.

        Args:
          rows: ``(blocks of all groups, ...)``.

        Returns:
          For each group ``(stack, ...)``.
        """
        result, start = [], 0
        for group in self.groups:
            result.append(rows[start : start + group.stack])
            start += group.stack
        return result

    @property
    def blocks(self) -> int:
        """Number of blocks of all groups."""
        return sum(group.stack for group in self.groups)


def concatenate(arrays: Sequence[jax.Array]) -> jax.Array:
    """Concatenates along the leading axis, if there is more than one array."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def arrange_layers(layers: Sequence[Layer]) -> Layout:
    """Groups layers by the shape of their blocks.

    Args:
      layers: The layers.

    Returns:
      The layout, with groups in the order of their first members.
    """
    members: dict[tuple[int, int, bool], list[int]] = collections.defaultdict(list)
    for index, layer in enumerate(layers):
        members[layer.inputs, layer.outputs, layer.diagonal_input].append(index)
    return Layout(
        tuple(
            Group(tuple(found), tuple(layers[i].stack for i in found), *shape)
            for shape, found in members.items()
        )
    )
