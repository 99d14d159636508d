r"""Inputs and output cotangents of a layer, row by row, for its Kronecker factors.

A weight that a model applies at ``T`` positions of a case has the gradient
:math:`\sum_t a_{nt} c_{nt}^\top`. There are two ways to make single rows of that. *Expand* takes
each position for a case of its own; it is exact if the loss is a sum over positions that the model
keeps apart, as that of tokens behind dense layers. *Reduce* takes the mean input and the sum of the
cotangents of the case; it is exact if the outputs are a sum or mean over positions.

Source: Eschenhagen, Immer, Turner, Schneider, Hennig (2023), Kronecker-factored approximate
curvature for modern neural network architectures, NeurIPS, arXiv 2311.00636.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from secondorder.layers import uses as use_forms
from secondorder.layers.cases import CaseUse
from secondorder.layers.columns import rows_by_case
from secondorder.layers.layer import TracedLayer
from secondorder.layers.statistics import homogeneous_inputs, row_gram
from secondorder.products import matmul
from secondorder.sharding import replicate, replicated_zeros

WeightSharing: TypeAlias = Literal["expand", "reduce"]
Arrays: TypeAlias = Mapping[int, jax.Array]


class LayerRows(NamedTuple):
    """The rows of a layer, ``R`` of them, and ``M`` cotangents for each.

    Attributes:
      inputs: ``(stack, R, inputs)``, homogeneous; or of an embedding the indices, ``(stack, R)``.
      cotangents: ``(M, stack, R, outputs)``.
      share: One over the number of rows of a case.
      weight: What the outer products of the cotangents are multiplied with.
    """

    inputs: jax.Array
    cotangents: jax.Array
    share: float
    weight: float = 1.0


def position_rows(
    traced: TracedLayer, operands: Arrays, cotangents: Arrays, batch_size: int
) -> LayerRows:
    """A row for every position of every case, as *expand* wants them.

    Args:
      traced: The layer and its uses.
      operands: For every site its operand.
      cotangents: For every site ``M`` cotangents of its result, on a new first axis.
      batch_size: Number of cases.

    Returns:
      The rows of all uses.
    """
    inputs = [_input_rows(traced, use, operands) for use in traced.uses]
    backs = [_cotangent_rows(use, cotangents[use.site]) for use in traced.uses]
    return LayerRows(_joined(inputs, 1), _joined(backs, 2), batch_size / traced.positions)


def case_rows(
    traced: TracedLayer,
    uses: Sequence[CaseUse],
    operands: Arrays,
    cotangents: Arrays,
    cases: int,
) -> LayerRows:
    """A row for every case, as *reduce* wants them; embeddings keep one for every position.

    Args:
      traced: The layer and its uses.
      uses: All uses of the model, their positions divided by case.
      operands: For every site its operand.
      cotangents: For every site ``M`` cotangents of its result, on a new first axis.
      cases: Number of cases ``N``.

    Returns:
      The rows: mean inputs and sums of cotangents over all positions of all uses.
    """
    if traced.layer.diagonal_input:
        return position_rows(traced, operands, cotangents, cases)
    divided = {use.found.use.site: use for use in uses}
    inputs, backs = [], []
    for use in traced.uses:
        rows = replicate(_input_rows(traced, use, operands))
        inputs.append(jnp.sum(rows_by_case(divided[use.site], rows, cases), axis=2))
        back = _cotangent_rows(use, cotangents[use.site])
        backs.append(jax.vmap(lambda r, use=use: _sum_by_case(divided[use.site], r, cases))(back))
    positions = traced.positions / cases
    mean = jnp.moveaxis(sum(inputs[1:], start=inputs[0]), 0, 1) / positions
    return LayerRows(mean, sum(backs[1:], start=backs[0]), 1.0)


def _joined(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def _sum_by_case(use: CaseUse, rows: jax.Array, cases: int) -> jax.Array:
    """Sums over the positions of each case: ``(stack, N, features)``."""
    return jnp.moveaxis(jnp.sum(rows_by_case(use, rows, cases), axis=2), 0, 1)


def _input_rows(traced: TracedLayer, use: use_forms.Use, operands: Arrays) -> jax.Array:
    if traced.layer.diagonal_input:
        return use_forms.lookup_indices(use, operands[use.site])
    return homogeneous_inputs(traced, use, operands)


def _cotangent_rows(use: use_forms.Use, cotangents: jax.Array) -> jax.Array:
    """``(M, stack, positions, outputs)``, on every device of an Explicit mesh."""
    return jax.vmap(lambda array: use_forms.output_matrix(use, array))(cotangents)


def input_moment(rows: LayerRows, width: int) -> jax.Array:
    """The sum of the outer products of the inputs, or of an embedding's its diagonal.

    Args:
      rows: The rows of a layer.
      width: Number of inputs.

    Returns:
      ``(stack, inputs, inputs)``, or ``(stack, inputs)``.
    """
    if rows.inputs.ndim == 3:
        return replicate(row_gram(rows.inputs))
    ones = jnp.ones(rows.inputs.shape, rows.cotangents.dtype)
    return _scatter(rows.inputs, ones[..., None], width)[..., 0]


def output_moment(rows: LayerRows) -> jax.Array:
    """The weighted sum of the outer products of the cotangents, times the share of a row.

    Args:
      rows: The rows of a layer.

    Returns:
      ``(stack, outputs, outputs)``.
    """
    columns, stack, count, width = rows.cotangents.shape
    joined = jnp.moveaxis(rows.cotangents, 0, 1).reshape(stack, columns * count, width)
    return rows.weight * rows.share * row_gram(joined)


def rotated_moment(rows: LayerRows, input_basis: jax.Array, output_basis: jax.Array) -> jax.Array:
    r"""The weighted sum of the squared entries of all :math:`U_A^\top a c^\top U_G`.

    Args:
      rows: The rows of a layer.
      input_basis: Orthogonal ``(stack, inputs, inputs)``; of an embedding any array of that width.
      output_basis: Orthogonal ``(stack, outputs, outputs)``.

    Returns:
      ``(stack, inputs, outputs)``.

    Source: George, Laurent, Bouthillier, Ballas, Vincent (2018), Fast approximate natural gradient
    descent in a Kronecker-factored eigenbasis, NeurIPS, arXiv 1806.03884.
    """
    squares = rows.weight * jnp.sum(matmul(rows.cotangents, output_basis) ** 2, axis=0)
    if rows.inputs.ndim == 2:
        return _scatter(rows.inputs, squares, input_basis.shape[-1])
    turned = matmul(replicate(rows.inputs), input_basis) ** 2
    return matmul(jnp.swapaxes(turned, 1, 2), squares)


def _scatter(indices: jax.Array, rows: jax.Array, width: int) -> jax.Array:
    """Sums rows by index: ``(stack, width, features)``."""
    zeros = replicated_zeros((width, rows.shape[-1]), rows.dtype)

    def add(indices: jax.Array, rows: jax.Array) -> jax.Array:
        return zeros.at[indices].add(rows, mode="drop")

    return jax.vmap(add)(indices, replicate(rows))
