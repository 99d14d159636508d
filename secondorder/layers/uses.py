"""One use of a weight by one equation, in matrix form.

Every linear layer computes, for each block of its stack and each position, ``h = a W`` with
``W`` of shape ``(inputs, outputs)``, the convention of JAX's libraries. A `Use` knows how the
recorded operand and the cotangent of the result, in whatever shape the model had them, map to
``a`` and ``g`` in that form:

* *stack* axes count independent blocks: layers of a scan, groups of a convolution, batch
  dimensions of a ``dot_general`` that the weight shares;
* *position* axes count the vectors one block is applied to: examples, time steps, pixels;
* *feature* axes are the rows or columns of the matrix.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder.layers.views import View
from secondorder.sharding import gather_axes, merge_axes, replicate

DENSE, CONV, EMBEDDING = "dense", "conv", "embedding"


class Axes(NamedTuple):
    """The axes of a recorded array by their role."""

    stack: tuple[int, ...]
    positions: tuple[int, ...]
    features: tuple[int, ...]


class Window(NamedTuple):
    """The part of one axis that belongs to this weight, where several were concatenated."""

    axis: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """What a convolution does besides its kernel; the fields are those of the equation."""

    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int


@dataclasses.dataclass(frozen=True)
class Use:
    """How one equation applies one weight.

    Attributes:
      kind: ``"dense"``, ``"conv"`` or ``"embedding"``.
      site: Index of the probed equation in the traced objective.
      scanned: For every scan around the equation whether it also scans over the weight, whose
        leading axes then count blocks.
      weight_view: From the parameter to ``(stack, inputs, outputs)``.
      input_axes: Roles of the axes of the recorded operand. An embedding's has no feature axis;
        a convolution's positions are the batch axes followed by the spatial ones.
      output_axes: Roles of the axes of the equation's result.
      input_window: The part of the operand that meets this weight, or None for all.
      output_window: The part of the result that this weight makes, or None for all.
      conv: Geometry of a convolution.
      positions: Vectors per block.
      batch_size: Length of the leading position axis outside every scan.
    """

    kind: str
    site: int
    scanned: tuple[bool, ...]
    weight_view: View
    input_axes: Axes
    output_axes: Axes
    positions: int
    batch_size: int
    input_window: Window | None = None
    output_window: Window | None = None
    conv: ConvGeometry | None = None

    @property
    def stack(self) -> int:
        """Number of independent blocks."""
        return self.weight_view.shape[0]

    @property
    def outputs(self) -> int:
        """Columns of the weight matrix."""
        return self.weight_view.shape[2]

    @property
    def inputs(self) -> int:
        """Rows of the weight matrix."""
        return self.weight_view.shape[1]

    def same_weight_map(self, other: "Use") -> bool:
        """Whether both uses see the parameter as the same matrix."""
        return self.weight_view == other.weight_view and (
            (self.kind == EMBEDDING) == (other.kind == EMBEDDING)
        )


def curvature_dtype(dtype: Any) -> Any:
    """The dtype of curvature for parameters of a given dtype: float32 or wider.

    Args:
      dtype: A real floating-point dtype.

    Returns:
      The wider of it and float32.
    """
    return jnp.promote_types(dtype, jnp.float32)


def _arrange(array: jax.Array, axes: Axes, window: Window | None) -> jax.Array:
    """Brings an array to the axis order (stack, positions, features)."""
    if window is not None:
        array = gather_axes(array, [window.axis])
        array = jax.lax.slice_in_dim(
            array, window.start, window.start + window.size, axis=window.axis
        )
    if not jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(curvature_dtype(array.dtype))
    return jnp.transpose(array, (*axes.stack, *axes.positions, *axes.features))


def _arrange_inputs(use: Use, operand: jax.Array) -> jax.Array:
    """Arranges an operand; on an Explicit mesh sharded along its leading position axis alone."""
    array = _arrange(operand, use.input_axes, use.input_window)
    leading = len(use.input_axes.stack)
    return gather_axes(array, [axis for axis in range(array.ndim) if axis != leading])


def _channels_first(use: Use, array: jax.Array) -> jax.Array:
    """Brings the operand of a convolution to (stack..., batch, channels, spatial...)."""
    assert use.conv is not None
    array = _arrange_inputs(use, array)
    spatial = len(use.conv.kernel_shape)
    stack = len(use.input_axes.stack)
    array = jnp.moveaxis(array, -1, -1 - spatial)
    return merge_axes(array, (*array.shape[:stack], -1, *array.shape[-1 - spatial :]), stack)


def _vmap(function: Any, times: int) -> Any:
    for _ in range(times):
        function = jax.vmap(function)
    return function


def _conv_numbers(conv: ConvGeometry) -> tuple[str, str, str]:
    spatial = "HWD"[: len(conv.kernel_shape)]
    return "NC" + spatial, "OI" + spatial, "NC" + spatial


def _project_conv(use: Use, operand: jax.Array, rows: jax.Array) -> jax.Array:
    """Convolves with one output channel per row: no patch is ever formed."""
    conv = use.conv
    assert conv is not None
    lhs = _channels_first(use, operand)
    stack = lhs.shape[: len(use.input_axes.stack)]
    channels = lhs.shape[len(stack) + 1] // conv.groups
    kernel = jnp.reshape(rows, (*stack, conv.groups * rows.shape[1], channels, *conv.kernel_shape))

    def convolve(lhs: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            lhs,
            kernel,
            conv.strides,
            conv.padding,
            lhs_dilation=conv.lhs_dilation,
            rhs_dilation=conv.rhs_dilation,
            dimension_numbers=_conv_numbers(conv),
            feature_group_count=conv.groups,
            precision=jax.lax.Precision.HIGHEST,
        )

    product = _vmap(convolve, len(stack))(lhs, kernel)  # (stack..., batch, groups * k, spatial...)
    return jnp.moveaxis(product, len(stack), len(stack) + 1)


def _project_embedding(use: Use, operand: jax.Array, rows: jax.Array) -> jax.Array:
    """Looks the rows up: the input of an embedding is a one-hot vector."""
    indices = _arrange(replicate(operand), use.input_axes, use.input_window)
    stack = indices.shape[: len(use.input_axes.stack)]
    rows = jnp.reshape(rows, (*stack, *rows.shape[1:]))

    def look_up(indices: jax.Array, rows: jax.Array) -> jax.Array:
        return rows.at[:, indices].get(mode="fill", fill_value=0)

    return _vmap(look_up, len(stack))(indices, rows)


def _project_dense(use: Use, operand: jax.Array, rows: jax.Array) -> jax.Array:
    array = _arrange_inputs(use, operand)
    stack, features = len(use.input_axes.stack), len(use.input_axes.features)
    first = array.ndim - features
    rows = jnp.reshape(rows, (*array.shape[:stack], rows.shape[1], *array.shape[first:]))
    contract = (tuple(range(stack + 1, rows.ndim)), tuple(range(first, array.ndim)))
    batch = tuple(range(stack))
    return jax.lax.dot_general(
        rows, array, (contract, (batch, batch)), precision=jax.lax.Precision.HIGHEST
    )


_PROJECT = {DENSE: _project_dense, CONV: _project_conv, EMBEDDING: _project_embedding}


def project(use: Use, operand: jax.Array, rows: jax.Array) -> jax.Array:
    r"""The inner products of every input vector with the given vectors.

    .. math:: u_{k t} = v_k^\top a_t

    Its adjoint in ``rows`` sums inputs over positions, which is all that means and products with
    second moments need; no kind of layer has to say these again.

    Args:
      use: The use.
      operand: The recorded operand.
      rows: The vectors, ``(stack, k, inputs)``.

    Returns:
      ``(stack, k, positions)``.
    """
    if use.kind != EMBEDDING:
        dtype = jnp.promote_types(curvature_dtype(operand.dtype), rows.dtype)
        operand, rows = operand.astype(dtype), rows.astype(dtype)
    product = _PROJECT[use.kind](use, operand, rows)
    return merge_axes(product, (use.stack, rows.shape[1], use.positions), 2)


def patches(use: Use, operand: jax.Array) -> jax.Array:
    """The inputs of a convolution as explicit vectors.

    Args:
      use: A use of kind ``"conv"``.
      operand: The recorded operand.

    Returns:
      ``(stack, positions, inputs)``, with inputs in the order (channel, kernel offsets).
    """
    conv = use.conv
    assert conv is not None
    lhs = _channels_first(use, operand)

    def extract(lhs: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated_patches(
            lhs,
            conv.kernel_shape,
            conv.strides,
            conv.padding,
            lhs_dilation=conv.lhs_dilation,
            rhs_dilation=conv.rhs_dilation,
            dimension_numbers=_conv_numbers(conv),
            precision=jax.lax.Precision.HIGHEST,
        )

    stack = len(use.input_axes.stack)
    extracted = _vmap(extract, stack)(lhs)  # (stack..., batch, inputs of all groups, spatial...)
    extracted = jnp.moveaxis(extracted, stack + 1, -1)
    extracted = merge_axes(
        extracted, (use.stack // conv.groups, use.positions, conv.groups, use.inputs), 1
    )
    return merge_axes(jnp.moveaxis(extracted, 2, 1), (use.stack, use.positions, use.inputs), 1)


def lookup_indices(use: Use, operand: jax.Array) -> jax.Array:
    """Which rows an embedding looks up, on every device of an Explicit mesh.

    Args:
      use: A use of kind ``"embedding"``.
      operand: The recorded operand.

    Returns:
      Integers ``(stack, positions)``.
    """
    indices = _arrange(replicate(operand), use.input_axes, use.input_window)
    return jnp.reshape(indices, (use.stack, use.positions))


def input_matrix(use: Use, operand: jax.Array) -> jax.Array:
    """The input vectors ``a`` of a use, one row per position.

    Args:
      use: The use.
      operand: The recorded operand.

    Returns:
      ``(stack, positions, inputs)``; an embedding's rows are one-hot.
    """
    if use.kind == CONV:
        return patches(use, operand)
    array = _arrange_inputs(use, operand)
    if use.kind == EMBEDDING:
        return jax.nn.one_hot(jnp.reshape(array, (use.stack, -1)), use.inputs)
    return merge_axes(array, (use.stack, use.positions, use.inputs), 1)


def output_matrix(use: Use, cotangent: jax.Array) -> jax.Array:
    """The cotangents ``g`` of a use, one row per position, in the order of `input_matrix`.

    Args:
      use: The use.
      cotangent: The cotangent of the equation's result.

    Returns:
      ``(stack, positions, outputs)``.
    """
    array = _arrange(replicate(cotangent), use.output_axes, use.output_window)
    groups = use.conv.groups if use.conv is not None else 1
    array = jnp.reshape(array, (use.stack // groups, use.positions, groups, use.outputs))
    return jnp.reshape(jnp.moveaxis(array, 2, 1), (use.stack, use.positions, use.outputs))


def _sum_positions(array: jax.Array, axes: Axes) -> jax.Array:
    stack, positions = len(axes.stack), len(axes.positions)
    return jnp.sum(array, axis=tuple(range(stack, stack + positions)))


def sum_outputs(use: Use, array: jax.Array) -> jax.Array:
    """The outputs of a use, or their cotangents, summed over positions.

    Args:
      use: The use.
      array: The equation's result, or its cotangent.

    Returns:
      ``(stack, outputs)``.
    """
    array = _arrange(array, use.output_axes, use.output_window)
    sums = replicate(_sum_positions(array, use.output_axes))
    return jnp.reshape(sums, (use.stack, use.outputs))


def sum_squared_outputs(use: Use, cotangent: jax.Array) -> jax.Array:
    """The squared norms of a use's cotangents, summed over positions.

    Args:
      use: The use.
      cotangent: The cotangent of the equation's result.

    Returns:
      ``(stack,)``.
    """
    array = _arrange(cotangent, use.output_axes, use.output_window)
    squares = replicate(_sum_positions(array**2, use.output_axes))
    return jnp.sum(jnp.reshape(squares, (use.stack, use.outputs)), axis=1)
