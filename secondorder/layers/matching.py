"""Recognizing one equation as a linear layer, and one addition as its bias."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from secondorder.layers.provenance import OutputValue, ParamValue, Piece, Provenance
from secondorder.layers.uses import CONV, DENSE, EMBEDDING, Axes, ConvGeometry, Use, Window
from secondorder.layers.views import AxisGroup, Digit, View, joined, origin_groups


@dataclasses.dataclass(frozen=True)
class Application:
    """One equation that applies weights: its uses, and the roles of the axes of its result.

    Attributes:
      operand: Which operand of the equation the weights are applied to.
      shape: Shape of the result, without the axes of scans around it.
      axes: Roles of the axes of that shape.
      scanned: Which of the scans around the equation scan over the weights.
      leaves: The weights.
      uses: One use per weight.
    """

    operand: int
    shape: tuple[int, ...]
    axes: Axes
    scanned: tuple[bool, ...]
    leaves: tuple[int, ...]
    uses: tuple[Use, ...]


def _rest(ndim: int, *taken: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if not any(axis in axes for axes in taken))


def _with_scans(axes: Axes, scanned: tuple[bool, ...]) -> Axes:
    """Adds the leading axes that scans give to everything recorded inside them."""
    depth = len(scanned)

    def shift(part: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axis + depth for axis in part)

    return Axes(
        tuple(i for i, s in enumerate(scanned) if s) + shift(axes.stack),
        tuple(i for i, s in enumerate(scanned) if not s) + shift(axes.positions),
        shift(axes.features),
    )


def _matrix_view(view: View, depth: int, stack: Sequence[int], rows: Any, columns: Any) -> View:
    """The view from a leaf to ``(stack, inputs, outputs)``; axes count behind the scanned ones."""
    shape = view.shape
    parts = [tuple(depth + axis for axis in part) for part in (stack, rows, columns)]
    view = view.transpose((*range(depth), *parts[0], *parts[1], *parts[2]))
    sizes = [math.prod(shape[axis] for axis in part) for part in parts]
    return view.reshape((math.prod(shape[:depth]) * sizes[0], sizes[1], sizes[2]))


def _window(
    piece: Piece, value: ParamValue, places: dict[int, int], scans: int
) -> tuple[bool, Window | None]:
    """The window of a concatenated piece, given where weight axes lie in the other array."""
    if value.axis is None:
        return True, None
    if value.axis not in places:
        return False, None
    size = piece.view.shape[value.depth + value.axis]
    return True, Window(places[value.axis] + scans, piece.start, size)


def match_dense(
    equation: Any, weight: int, value: ParamValue, lengths: Sequence[int], site: int
) -> Application | None:
    """Recognizes a ``dot_general`` with a parameter as one operand.

    Args:
      equation: The equation.
      weight: Which operand is the parameter.
      value: The parameter's provenance.
      lengths: Lengths of the scans around the equation.
      site: Index for the new probed equation.

    Returns:
      The application, or None if the product is not a linear layer.
    """
    contract, batch = equation.params["dimension_numbers"]
    other = 1 - weight
    w_in, w_stack = tuple(contract[weight]), tuple(batch[weight])
    a_in, a_stack = tuple(contract[other]), tuple(batch[other])
    weight_ndim, operand = len(value.shape), equation.invars[other].aval
    w_out = _rest(weight_ndim, w_in, w_stack)
    a_free = _rest(operand.ndim, a_in, a_stack)
    if not w_in:
        return None
    stack = tuple(range(len(w_stack)))
    first, second = (len(w_out), len(a_free)) if weight == 0 else (len(a_free), len(w_out))
    leading = tuple(range(len(stack), len(stack) + first))
    trailing = tuple(range(len(stack) + first, len(stack) + first + second))
    rows, positions = (leading, trailing) if weight == 0 else (trailing, leading)
    output_axes = Axes(stack, positions, rows)
    uses = []
    for piece in value.pieces:
        scans = len(value.scanned)
        in_known, input_window = _window(piece, value, dict(zip(w_in, a_in, strict=True)), scans)
        out_known, output_window = _window(piece, value, dict(zip(w_out, rows, strict=True)), scans)
        if not in_known and not out_known:
            return None
        free = [operand.shape[axis] for axis in a_free]
        uses.append(
            Use(
                kind=DENSE,
                site=site,
                scanned=value.scanned,
                weight_view=_matrix_view(piece.view, value.depth, w_stack, w_in, w_out),
                input_axes=_with_scans(Axes(a_stack, a_free, a_in), value.scanned),
                output_axes=_with_scans(output_axes, value.scanned),
                positions=math.prod(free) * _repeats(value.scanned, lengths),
                batch_size=free[0] if free else 1,
                input_window=input_window,
                output_window=output_window,
            )
        )
    return _application(equation, other, value, output_axes, uses)


def _repeats(scanned: Sequence[bool], lengths: Sequence[int]) -> int:
    """How often the scans around a use repeat it with the same weights."""
    return math.prod(n for n, over in zip(lengths, scanned, strict=True) if not over)


def _application(
    equation: Any, operand: int, value: ParamValue, axes: Axes, uses: Sequence[Use]
) -> Application:
    return Application(
        operand=operand,
        shape=tuple(equation.outvars[0].aval.shape),
        axes=axes,
        scanned=value.scanned,
        leaves=tuple(piece.leaf for piece in value.pieces),
        uses=tuple(uses),
    )


def match_conv(
    equation: Any, value: ParamValue, lengths: Sequence[int], site: int
) -> Application | None:
    """Recognizes a ``conv_general_dilated`` whose kernel is a parameter.

    Args:
      equation: The equation.
      value: The kernel's provenance.
      lengths: Lengths of the scans around the equation.
      site: Index for the new probed equation.

    Returns:
      The application, or None if the convolution is not a linear layer of its kernel.
    """
    params = equation.params
    if params["batch_group_count"] != 1 or value.axis is not None:
        return None
    numbers = params["dimension_numbers"]
    lhs, rhs, out = (tuple(s) for s in (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec))
    groups = params["feature_group_count"]
    piece = value.pieces[0]
    view = _matrix_view(piece.view, value.depth, (), rhs[1:], rhs[:1])
    stack, inputs, outputs = view.shape
    view = view.reshape((stack, inputs, groups, outputs // groups)).transpose((0, 2, 1, 3))
    shape = tuple(equation.outvars[0].aval.shape)
    output_axes = Axes((), (out[0], *out[2:]), (out[1],))
    use = Use(
        kind=CONV,
        site=site,
        scanned=value.scanned,
        weight_view=view.reshape((stack * groups, inputs, outputs // groups)),
        input_axes=_with_scans(Axes((), (lhs[0], *lhs[2:]), (lhs[1],)), value.scanned),
        output_axes=_with_scans(output_axes, value.scanned),
        positions=math.prod(shape[a] for a in output_axes.positions)
        * _repeats(value.scanned, lengths),
        batch_size=shape[out[0]],
        conv=ConvGeometry(
            kernel_shape=tuple(value.shape[axis] for axis in rhs[2:]),
            strides=tuple(params["window_strides"]),
            padding=tuple((int(low), int(high)) for low, high in params["padding"]),
            lhs_dilation=tuple(params["lhs_dilation"]),
            rhs_dilation=tuple(params["rhs_dilation"]),
            groups=groups,
        ),
    )
    return _application(equation, 0, value, output_axes, [use])


def match_embedding(
    equation: Any, value: ParamValue, lengths: Sequence[int], site: int
) -> Application | None:
    """Recognizes a ``gather`` that looks up whole rows of a parameter.

    Args:
      equation: The equation.
      value: The table's provenance.
      lengths: Lengths of the scans around the equation.
      site: Index for the new probed equation.

    Returns:
      The application, or None if the gather is not a row lookup.
    """
    row = _looked_up_axis(equation, value.shape)
    if row is None or value.axis is not None:
        return None
    numbers = equation.params["dimension_numbers"]
    sliced = _rest(len(value.shape), numbers.collapsed_slice_dims)
    indices = equation.invars[1].aval
    shape = tuple(equation.outvars[0].aval.shape)
    features = tuple(
        place for place, axis in zip(numbers.offset_dims, sliced, strict=True) if axis != row
    )
    output_axes = Axes((), _rest(len(shape), features), features)
    columns = _rest(len(value.shape), (row,))
    window = Window(
        len(value.scanned) + indices.ndim - 1, tuple(numbers.start_index_map).index(row), 1
    )
    use = Use(
        kind=EMBEDDING,
        site=site,
        scanned=value.scanned,
        weight_view=_matrix_view(value.pieces[0].view, value.depth, (), (row,), columns),
        input_axes=_with_scans(Axes((), tuple(range(indices.ndim)), ()), value.scanned),
        output_axes=_with_scans(output_axes, value.scanned),
        positions=math.prod(indices.shape[:-1]) * _repeats(value.scanned, lengths),
        batch_size=indices.shape[0] if indices.ndim > 1 else 1,
        input_window=window if indices.shape[-1] > 1 else None,
    )
    return _application(equation, 1, value, output_axes, [use])


def _looked_up_axis(equation: Any, table: tuple[int, ...]) -> int | None:
    """The axis of a table along which a ``gather`` looks up whole rows; None if there is none."""
    numbers = equation.params["dimension_numbers"]
    collapsed, indexed = tuple(numbers.collapsed_slice_dims), tuple(numbers.start_index_map)
    sizes = tuple(equation.params["slice_sizes"])
    rows = collapsed or tuple(axis for axis, size in enumerate(sizes) if size != table[axis])
    if len(rows) != 1 or rows[0] not in indexed or numbers.operand_batching_dims:
        return None
    whole = all(
        size == (1 if axis in rows else full)
        for axis, (size, full) in enumerate(zip(sizes, table, strict=True))
    )
    # An index along a whole axis can only be zero, or is clipped to it; with "fill" it could miss.
    fills = "FILL" in str(equation.params["mode"])
    return rows[0] if whole and not (fills and len(indexed) > 1) else None


def match_application(
    equation: Any, values: Sequence[Provenance], lengths: Sequence[int], site: int
) -> Application | None:
    """Recognizes an equation as the application of a weight, of whatever kind.

    Args:
      equation: The equation.
      values: The provenance of its operands.
      lengths: Lengths of the scans around it, outermost first.
      site: Index for the new probed equation.

    Returns:
      The application, or None.
    """
    name = equation.primitive.name
    weights = [i for i, v in enumerate(values) if isinstance(v, ParamValue) and v.placed is None]
    if len(weights) != 1:
        return None
    index, value = weights[0], values[weights[0]]
    assert isinstance(value, ParamValue)
    if name == "dot_general":
        return match_dense(equation, index, value, lengths, site)
    if name == "conv_general_dilated" and index == 1:
        return match_conv(equation, value, lengths, site)
    if name == "gather" and index == 0:
        return match_embedding(equation, value, lengths, site)
    return None


def output_value(application: Application, site: int) -> OutputValue:
    """The provenance of the result of an application."""
    return OutputValue((site,), origin_groups(application.shape))


def _place(group: AxisGroup, order: Sequence[int]) -> tuple[int, int]:
    """Where a bias axis belongs in the order (stack axes, feature axes)."""
    return order.index(group[0].axis), -group[0].stride


def bias_views(
    application: Application, output: OutputValue, bias: ParamValue
) -> tuple[View, ...] | None:
    """Recognizes a parameter added to a layer's output as its bias.

    Args:
      application: The application whose output it is added to.
      output: Where the axes of that output lie in the sum.
      bias: The provenance of the added parameter.

    Returns:
      For every use of the application the view from its bias to ``(stack, outputs)``, or None if
      the parameter does not vary along just the feature (and stack) axes.
    """
    starts = [w.start if (w := use.output_window) else 0 for use in application.uses]
    if bias.scanned != application.scanned or [p.start for p in bias.pieces] != starts:
        return None
    order = (*application.axes.stack, *application.axes.features)
    target = [Digit(axis, 1, application.shape[axis]) for axis in order]
    groups = {axis: output.groups[place] for axis, place in enumerate(bias.axes)}
    depth = bias.depth
    sizes = bias.pieces[0].view.shape[depth:]
    axes = [a for a, group in groups.items() if group and (sizes[a] > 1 or a == bias.axis)]
    if any(digit.axis not in order for a in axes for digit in groups[a]):
        return None
    axes.sort(key=lambda a: _place(groups[a], order))
    covered = [digit for a in axes for digit in groups[a]]
    if joined(covered) != joined([digit for digit in target if digit.size > 1]):
        return None
    perm = (*range(depth), *(depth + a for a in (*axes, *_rest(len(sizes), axes))))
    return tuple(
        piece.view.transpose(perm).reshape((use.stack, use.outputs))
        for piece, use in zip(bias.pieces, application.uses, strict=True)
    )
