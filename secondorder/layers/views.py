"""Views: the invertible rearrangements between a parameter and the matrix a layer applies.

Two kinds of bookkeeping are needed to read a jaxpr. A `View` records how a parameter's elements
were rearranged, so that a gradient can be taken to matrix form and an update back. Axis groups
follow where the axes of a layer's output went, so that a bias added later is recognized.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """A chain of reshapes and transposes, each of which can be undone.

    Neighbors are joined, and transposes that only move axes of size one are reshapes, so that a
    parameter seen alike with other batch sizes compares equal.

    Attributes:
      shapes: The shape before every step, and the final shape: one more than there are steps.
      perms: For every step the permutation of a transpose, or None for a reshape.
    """

    shapes: tuple[Shape, ...]
    perms: tuple[tuple[int, ...] | None, ...] = ()

    @property
    def shape(self) -> Shape:
        """The shape of the viewed array."""
        return self.shapes[-1]

    def reshape(self, shape: Sequence[int]) -> "View":
        """The view followed by a reshape."""
        shapes, perms = self.shapes, self.perms
        if perms and perms[-1] is None:
            shapes, perms = shapes[:-1], perms[:-1]
        if tuple(shape) == shapes[-1]:
            return View(shapes, perms)
        return View((*shapes, tuple(shape)), (*perms, None))

    def transpose(self, perm: Sequence[int]) -> "View":
        """The view followed by a transpose."""
        shape = tuple(self.shape[axis] for axis in perm)
        moved = [axis for axis in perm if self.shape[axis] != 1]
        if moved == sorted(moved):
            return self.reshape(shape)
        if self.perms and self.perms[-1] is not None:
            joined = [self.perms[-1][axis] for axis in perm]
            return View(self.shapes[:-1], self.perms[:-1]).transpose(joined)
        return View((*self.shapes, shape), (*self.perms, tuple(perm)))

    def apply(self, array: jax.Array) -> jax.Array:
        """Takes an array shaped like the parameter to the viewed shape."""
        for perm, shape in zip(self.perms, self.shapes[1:], strict=True):
            array = jnp.reshape(array, shape) if perm is None else jnp.transpose(array, perm)
        return array

    def invert(self, array: jax.Array) -> jax.Array:
        """Takes an array of the viewed shape back to the parameter's shape."""
        for perm, shape in zip(reversed(self.perms), reversed(self.shapes[:-1]), strict=True):
            if perm is None:
                array = jnp.reshape(array, shape)
            else:
                array = jnp.transpose(array, sorted(range(len(perm)), key=perm.__getitem__))
        return array


def identity_view(shape: Sequence[int]) -> View:
    """The view that changes nothing."""
    return View((tuple(shape),))


@dataclasses.dataclass(frozen=True)
class Digit:
    """A part of an axis: the factor of its index with the given stride and size."""

    axis: int
    stride: int
    size: int


# An axis of a value, as the parts of the origin's axes that it was merged from, major first.
AxisGroup = tuple[Digit, ...]


def origin_groups(shape: Sequence[int]) -> tuple[AxisGroup, ...]:
    """The axes of an array as groups of themselves; axes of size one carry nothing."""
    return tuple(() if size == 1 else (Digit(axis, 1, size),) for axis, size in enumerate(shape))


def joined(digits: Sequence[Digit]) -> AxisGroup:
    """Joins neighboring parts of one axis, so that equal merges compare equal."""
    result: list[Digit] = []
    for digit in digits:
        last = result[-1] if result else None
        if last and last.axis == digit.axis and last.stride == digit.stride * digit.size:
            result[-1] = Digit(digit.axis, digit.stride, last.size * digit.size)
        else:
            result.append(digit)
    return tuple(result)


def regroup(groups: Sequence[AxisGroup], shape: Sequence[int]) -> tuple[AxisGroup, ...] | None:
    """Follows axis groups through a reshape.

    Args:
      groups: The axes before the reshape.
      shape: The shape after it.

    Returns:
      The axes after it, or None if the reshape does not respect the axes of the origin.
    """
    left = [digit for group in groups for digit in group]
    result: list[AxisGroup] = []
    for size in shape:
        taken: list[Digit] = []
        while size > 1:
            if not left:
                return None
            digit = left.pop(0)
            if size % digit.size == 0:
                taken.append(digit)
                size //= digit.size
            elif digit.size % size == 0:
                rest = digit.size // size
                taken.append(Digit(digit.axis, digit.stride * rest, size))
                left.insert(0, Digit(digit.axis, digit.stride, rest))
                size = 1
            else:
                return None
        result.append(joined(taken))
    return None if left else tuple(result)
