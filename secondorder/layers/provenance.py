"""Where the values of a jaxpr come from: a parameter through views, or a layer's output.

`ParamValue` and `OutputValue` are what discovery knows about a variable. The functions here say
how that knowledge passes through the few primitives that only rearrange; everything else ends it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from secondorder.jaxprs import IDENTITY
from secondorder.layers.views import AxisGroup, View, identity_view, regroup


@dataclasses.dataclass(frozen=True)
class Piece:
    """One parameter leaf inside a value, with its rearrangement and its place in it."""

    leaf: int
    view: View
    start: int = 0


@dataclasses.dataclass(frozen=True)
class ParamValue:
    """A value that holds the elements of one leaf, or of several concatenated.

    Attributes:
      pieces: The leaves, in the order of the concatenation.
      scanned: For every scan entered so far whether it scans over the value; each True stands for
        one leading axis of the pieces' views that the value inside the scan does not show.
      axis: The concatenated axis of the views behind the scanned ones; None for a single leaf.
      placed: The axis of the value on which each axis of the views lies, once it was broadcast.
      shape: The shape of the value.
    """

    pieces: tuple[Piece, ...]
    scanned: tuple[bool, ...]
    shape: tuple[int, ...]
    axis: int | None = None
    placed: tuple[int, ...] | None = None

    @property
    def depth(self) -> int:
        """Number of leading axes of the views that scans have taken off."""
        return sum(self.scanned)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axis of the value on which each axis of the views lies."""
        return tuple(range(len(self.shape))) if self.placed is None else self.placed


@dataclasses.dataclass(frozen=True)
class OutputValue:
    """A value that is the sum of layers' outputs and of anything else.

    Attributes:
      sites: The probed equations whose output is a term of the sum.
      groups: For every axis of the value the axes of the first site's output it was merged from.
    """

    sites: tuple[int, ...]
    groups: tuple[AxisGroup, ...]


Provenance = ParamValue | OutputValue | None


def leaf_value(leaf: int, shape: Sequence[int]) -> ParamValue:
    """The provenance of a parameter leaf itself."""
    return ParamValue((Piece(leaf, identity_view(shape)),), (), tuple(shape))


def enter_scan(value: ParamValue, scanned: bool) -> ParamValue | None:
    """The provenance inside a scan of a value that enters it."""
    if not scanned:
        return dataclasses.replace(value, scanned=(*value.scanned, False))
    if value.placed is not None or value.axis == 0:
        return None
    axis = None if value.axis is None else value.axis - 1
    return ParamValue(value.pieces, (*value.scanned, True), value.shape[1:], axis)


def _map_views(value: ParamValue, change: Callable[[View], View]) -> tuple[Piece, ...]:
    return tuple(dataclasses.replace(p, view=change(p.view)) for p in value.pieces)


def _transpose_param(value: ParamValue, perm: Sequence[int]) -> ParamValue | None:
    shape = tuple(value.shape[axis] for axis in perm)
    if value.placed is not None:
        placed = tuple(perm.index(axis) for axis in value.placed)
        return dataclasses.replace(value, placed=placed, shape=shape)
    depth = value.depth
    full = (*range(depth), *(depth + axis for axis in perm))
    pieces = _map_views(value, lambda view: view.transpose(full))
    axis = None if value.axis is None else list(perm).index(value.axis)
    return dataclasses.replace(value, pieces=pieces, shape=shape, axis=axis)


def _reshape_concatenated(value: ParamValue, shape: tuple[int, ...]) -> ParamValue | None:
    """Only axes of size one may come and go beside a concatenated axis."""
    assert value.axis is not None
    old = [axis for axis, size in enumerate(value.shape) if size != 1]
    new = [axis for axis, size in enumerate(shape) if size != 1]
    if [value.shape[a] for a in old] != [shape[a] for a in new] or value.axis not in old:
        return None
    axis = new[old.index(value.axis)]

    def change(view: View) -> View:
        part = view.shape[value.depth + value.axis]  # type: ignore[operator]
        return view.reshape((*view.shape[: value.depth], *shape[:axis], part, *shape[axis + 1 :]))

    return dataclasses.replace(value, pieces=_map_views(value, change), shape=shape, axis=axis)


def _reshape_param(value: ParamValue, shape: tuple[int, ...]) -> ParamValue | None:
    if value.placed is not None:
        return value if shape == value.shape else None
    if value.axis is not None:
        return _reshape_concatenated(value, shape)
    pieces = _map_views(value, lambda view: view.reshape((*view.shape[: value.depth], *shape)))
    return dataclasses.replace(value, pieces=pieces, shape=shape)


def _broadcast_param(
    value: ParamValue, shape: tuple[int, ...], dims: Sequence[int]
) -> ParamValue | None:
    kept = [a for a, size in enumerate(value.shape) if size != 1]
    repeats = any(
        size != 1 and axis not in [dims[a] for a in kept] for axis, size in enumerate(shape)
    )
    if not repeats:  # only axes of size one are new
        return _reshape_param(value, shape)
    placed = tuple(dims[axis] for axis in value.axes)
    return dataclasses.replace(value, placed=placed, shape=shape)


def _concatenate(values: Sequence[ParamValue], axis: int) -> ParamValue | None:
    first = values[0]
    pieces: list[Piece] = []
    start = 0
    for value in values:
        if value.placed is not None or value.axis is not None or value.scanned != first.scanned:
            return None
        pieces.append(dataclasses.replace(value.pieces[0], start=start))
        start += value.shape[axis]
    shape = (*first.shape[:axis], start, *first.shape[axis + 1 :])
    return ParamValue(tuple(pieces), first.scanned, shape, axis)


def is_reshape(equation: Any) -> bool:
    """Whether an equation keeps the order of the elements and changes only the shape."""
    name = equation.primitive.name
    if name == "reshape":  # with `dimensions` it transposes first
        return equation.params.get("dimensions") is None
    return name in {"squeeze", "expand_dims"}


def rearranged_param(equation: Any, values: Sequence[Provenance]) -> ParamValue | None:
    """The provenance of an equation's result whose operands hold parameters.

    Args:
      equation: The equation.
      values: The provenance of each operand.

    Returns:
      The provenance of the result, or None if the equation does more than rearrange.
    """
    name = equation.primitive.name
    shape = tuple(equation.outvars[0].aval.shape)
    if name == "concatenate":
        params = [value for value in values if isinstance(value, ParamValue)]
        if len(params) < len(values):
            return None
        return _concatenate(params, equation.params["dimension"])
    value = values[0] if values else None
    if not isinstance(value, ParamValue):
        return None
    if name in IDENTITY:
        return value
    if name == "transpose":
        return _transpose_param(value, tuple(equation.params["permutation"]))
    if is_reshape(equation):
        return _reshape_param(value, shape)
    if name == "broadcast_in_dim":
        return _broadcast_param(value, shape, equation.params["broadcast_dimensions"])
    return None


def rearranged_output(equation: Any, value: OutputValue) -> OutputValue | None:
    """The provenance of an equation's result whose first operand holds layers' outputs.

    Args:
      equation: The equation.
      value: The provenance of its first operand.

    Returns:
      The provenance of the result, or None if the equation does more than rearrange.
    """
    name = equation.primitive.name
    if name in IDENTITY:
        return value
    if name == "transpose":
        groups = tuple(value.groups[axis] for axis in equation.params["permutation"])
        return dataclasses.replace(value, groups=groups)
    if is_reshape(equation):
        regrouped = regroup(value.groups, equation.outvars[0].aval.shape)
        return None if regrouped is None else dataclasses.replace(value, groups=regrouped)
    return None
