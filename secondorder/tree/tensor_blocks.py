"""Tensors of any shape as stacks of equal blocks.

Axes of a tensor are merged as long as they stay short; what is too long is cut into nearly equal
parts. Blocks of one shape stand in one stack, whichever tensors they are of: what is done with them
is written, and compiled, once.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def merge_shape(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Joins neighboring axes from the left, until two are left or the next would be too long.

    Args:
      shape: The shape of a tensor, without empty axes.
      limit: Longest axis that may be made.

    Returns:
      A shape of as many elements, without axes of length 1; ``(1,)`` for a scalar.

    Example:
      >>> merge_shape((3, 3, 16, 32), 1024), merge_shape((2, 1, 3, 1), 1024), merge_shape((), 8)
      ((144, 32), (2, 3), (1,))
    """
    merged: list[int] = []
    left = [length for length in shape if length != 1] or [1]
    for index, length in enumerate(left):
        joined = len(merged) + len(left) - index > 2
        if merged and joined and merged[-1] * length <= limit:
            merged[-1] *= length
        else:
            merged.append(length)
    return tuple(merged)


def split_length(length: int, limit: int) -> list[tuple[int, int]]:
    """Cuts a length into as few parts as the limit allows, which differ by one at most.

    Args:
      length: At least 1.
      limit: Longest part, at least 1.

    Returns:
      How many parts of which length, longer ones first.

    Example:
      >>> split_length(8, 4), split_length(11, 4), split_length(3, 4)
      ([(2, 4)], [(2, 4), (1, 3)], [(1, 3)])
    """
    parts = -(-length // limit)
    short, longer = divmod(length, parts)
    cut = [(longer, short + 1), (parts - longer, short)]
    return [(count, size) for count, size in cut if count]


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a tensor that is a grid of equal blocks.

    Attributes:
      leaf: Which tensor.
      corner: Where it starts, by axis of the merged tensor.
      grid: How many blocks stand along each of these axes.
    """

    leaf: int
    corner: tuple[int, ...]
    grid: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class BlockGroup:
    """Blocks of one shape that are treated alike.

    Attributes:
      shape: Of each block.
      axes: Which of its axes a method treats.
      regions: Where the blocks are, in the order of the stack.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    regions: tuple[Region, ...]

    @property
    def stack(self) -> int:
        """Number of blocks."""
        return sum(math.prod(region.grid) for region in self.regions)


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """How tensors are cut; static and hashable.

    Attributes:
      shapes: Of the tensors.
      merged: The same with merged axes.
      axes: For each tensor the axes of its blocks that a method treats.
      groups: The blocks; none of tensors without elements.
    """

    shapes: tuple[tuple[int, ...], ...]
    merged: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[int, ...], ...]
    groups: tuple[BlockGroup, ...]

    def cut(self, tensors: Sequence[jax.Array]) -> list[jax.Array]:
        """Cuts tensors into stacks of blocks.

        Args:
          tensors: In the shapes of the layout, all of one dtype.

        Returns:
          For each group ``(stack, *shape)``.

        Example:
          >>> layout = arrange_blocks([(2, 4), (2,)], 2, lambda shape: (0,))
          >>> [stack.shape for stack in layout.cut([jnp.ones((2, 4)), jnp.ones(2)])]
          [(2, 2, 2), (1, 2)]
        """
        merged = [jnp.reshape(t, shape) for t, shape in zip(tensors, self.merged, strict=True)]
        return [
            jnp.concatenate(
                [_cut_region(merged[region.leaf], region, group.shape) for region in group.regions]
            )
            for group in self.groups
        ]

    def join(self, stacks: Sequence[jax.Array]) -> list[jax.Array | None]:
        """Puts blocks together again; the inverse of `cut`.

        Args:
          stacks: For each group ``(stack, *shape)``.

        Returns:
          The tensors, and None in place of one without elements.

        Example:
          >>> layout = arrange_blocks([(2, 4)], 2, lambda shape: (0,))
          >>> layout.join(layout.cut([jnp.arange(8).reshape(2, 4)]))[0].tolist()
          [[0, 1, 2, 3], [4, 5, 6, 7]]
        """
        parts: dict[int, dict[tuple[int, ...], jax.Array]] = collections.defaultdict(dict)
        for group, stack in zip(self.groups, stacks, strict=True):
            start = 0
            for region in group.regions:
                stop = start + math.prod(region.grid)
                blocks = stack[start:stop]
                parts[region.leaf][region.corner] = _join_region(blocks, region, group.shape)
                start = stop
        return [
            jnp.reshape(_concatenate_grid(parts[leaf]), shape) if leaf in parts else None
            for leaf, shape in enumerate(self.shapes)
        ]


def arrange_blocks(
    shapes: Sequence[tuple[int, ...]],
    block_size: int,
    axes_of: Callable[[tuple[int, ...]], tuple[int, ...]],
    *,
    merge: bool = True,
) -> BlockLayout:
    """Says how tensors are cut into blocks, and which blocks stand together.

    Args:
      shapes: Of the tensors.
      block_size: Longest axis of a block; axes are merged up to it.
      axes_of: Maps the shape of a tensor with merged axes to those that a method treats.
      merge: Whether axes are merged at all; those of length 1 are dropped in any case.

    Returns:
      The layout, with groups in the order of their first blocks.

    Example:
      >>> arrange_blocks([(3, 2), (3, 2)], 4, lambda shape: (0, 1)).groups[0].stack
      2
    """
    limit = block_size if merge else 0
    merged = tuple(merge_shape(shape, limit) if 0 not in shape else shape for shape in shapes)
    axes = tuple(axes_of(shape) for shape in merged)
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Region]]
    found = collections.defaultdict(list)
    for leaf, shape in enumerate(merged):
        if 0 in shape:
            continue
        for corner, grid, block in _regions(shape, block_size):
            found[block, axes[leaf]].append(Region(leaf, corner, grid))
    groups = tuple(BlockGroup(*key, tuple(regions)) for key, regions in found.items())
    return BlockLayout(tuple(map(tuple, shapes)), merged, axes, groups)


def _regions(
    shape: tuple[int, ...], limit: int
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Corner, grid and block shape of all regions of a tensor: two at most along each axis."""
    by_axis = []
    for length in shape:
        start, parts = 0, []
        for count, size in split_length(length, limit):
            parts.append((start, count, size))
            start += count * size
        by_axis.append(parts)
    regions = []
    for chosen in itertools.product(*by_axis):
        corner, grid, block = zip(*chosen, strict=True)
        regions.append((corner, grid, block))
    return regions


def _extent(region: Region, block: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(count * size for count, size in zip(region.grid, block, strict=True))


def _cut_region(tensor: jax.Array, region: Region, block: tuple[int, ...]) -> jax.Array:
    extent = _extent(region, block)
    stop = [start + length for start, length in zip(region.corner, extent, strict=True)]
    part = jax.lax.slice(tensor, region.corner, stop)
    interleaved = [n for pair in zip(region.grid, block, strict=True) for n in pair]
    rank = len(block)
    grid_first = (*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))
    return jnp.reshape(part, interleaved).transpose(grid_first).reshape(-1, *block)


def _join_region(blocks: jax.Array, region: Region, block: tuple[int, ...]) -> jax.Array:
    rank = len(block)
    interleaved = [axis for i in range(rank) for axis in (i, rank + i)]
    grid = jnp.reshape(blocks, (*region.grid, *block)).transpose(interleaved)
    return jnp.reshape(grid, _extent(region, block))


def _concatenate_grid(parts: dict[tuple[int, ...], jax.Array]) -> jax.Array:
    """Concatenates parts of a tensor, given by their corners, axis by axis from the last."""
    while len(next(iter(parts))):
        rows: dict[tuple[int, ...], list[tuple[int, jax.Array]]] = collections.defaultdict(list)
        for corner, part in parts.items():
            rows[corner[:-1]].append((corner[-1], part))
        axis = len(next(iter(parts))) - 1
        parts = {
            corner: row[0][1] if len(row) == 1 else jnp.concatenate([p for _, p in row], axis)
            for corner, row in ((c, sorted(r, key=lambda e: e[0])) for c, r in rows.items())
        }
    return parts[()]
