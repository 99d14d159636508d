r"""Sums over a batch of a layer's inputs and output cotangents, in matrix form.

With ``m`` examples and ``T`` positions per example (pixels, time steps, uses of a shared weight),
inputs are *summed* over positions and cotangents *averaged*:

.. math::
  A = \frac1m \sum_{n,t} a_{nt} a_{nt}^\top, \qquad
  \bar a = \frac{1}{mT} \sum_{n,t} a_{nt}, \qquad
  \bar g = \frac1T \sum_{n,t} \frac{\partial f}{\partial h_{nt}},

so that ``A (x) G`` approximates the layer's block of the Hessian of the objective as it was
given, mean or sum, and a dense layer is a convolution with one position. The factor ``1/m`` of a
mean objective is already inside the cotangents.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from secondorder.layers import uses as use_forms
from secondorder.layers.layer import TracedLayer
from secondorder.layers.probes import Tape
from secondorder.sharding import replicated_zeros

_HIGHEST = jax.lax.Precision.HIGHEST


Rows: TypeAlias = Sequence[jax.Array]


def dense_rows(traced: TracedLayer, tape: Tape) -> Rows:
    """The homogeneous inputs of a dense layer, to be computed once and used many times.

    Args:
      traced: The layer and its uses.
      tape: A probed pass.

    Returns:
      For each use ``(stack, positions, inputs)``; nothing for other kinds of layers, whose inputs
      are not formed.
    """
    if traced.layer.kind != use_forms.DENSE:
        return ()
    return [homogeneous_inputs(traced, use, tape.operands) for use in traced.uses]


def homogeneous_inputs(
    traced: TracedLayer, use: use_forms.Use, operands: Mapping[int, jax.Array]
) -> jax.Array:
    """The inputs of one use as rows, with a one at the end if there is a bias.

    Args:
      traced: The layer and its uses.
      use: One of its uses.
      operands: For every site its operand.

    Returns:
      ``(stack, positions, inputs)``.
    """
    inputs = use_forms.input_matrix(use, operands[use.site])
    if traced.layer.bias is None:
        return inputs
    return jnp.concatenate([inputs, jnp.ones_like(inputs[..., :1])], axis=-1)


def _project(
    traced: TracedLayer, tape: Tape, inputs: Rows | None, rows: jax.Array
) -> list[jax.Array]:
    """Inner products of all homogeneous inputs with ``(stack, k, inputs)``, use by use."""
    width = traced.layer.weight_view.shape[1]
    if traced.layer.kind == use_forms.DENSE:
        # Written out: in this order neither the product nor its adjoint transposes anything.
        contract = (((2,), (2,)), ((0,), (0,)))
        return [
            jax.lax.dot_general(rows, array, contract, precision=_HIGHEST)
            for array in inputs or dense_rows(traced, tape)
        ]
    products = []
    for use in traced.uses:
        product = use_forms.project(use, tape.operands[use.site], rows[..., :width])
        products.append(product if traced.layer.bias is None else product + rows[..., width:])
    return products


def _dtype(traced: TracedLayer, tape: Tape) -> jnp.dtype:
    dtypes = [tape.cotangents[use.site].dtype for use in traced.uses]
    return jnp.dtype(use_forms.curvature_dtype(jnp.result_type(*dtypes)))


def mean_input(
    traced: TracedLayer, tape: Tape, copies: int = 1, inputs: Rows | None = None
) -> jax.Array:
    """The mean input over examples and positions.

    Args:
      traced: The layer and its uses.
      tape: A probed pass.
      copies: How many equal rows to return. With two or more the products that follow are of
        matrices, which compile to library calls.
      inputs: `dense_rows`, if known.

    Returns:
      ``(stack, copies, inputs)``; the homogeneous coordinate of a bias is one.
    """
    layer = traced.layer
    rows = replicated_zeros((layer.stack, copies, layer.inputs), _dtype(traced, tape))
    products, pull_back = jax.vjp(lambda rows: _project(traced, tape, inputs, rows), rows)
    weights = [jnp.full_like(product, 1 / traced.positions) for product in products]
    return pull_back(weights)[0]


def input_counts(traced: TracedLayer, tape: Tape) -> jax.Array:
    """The diagonal of the Gram matrix of an embedding's one-hot inputs.

    Args:
      traced: An embedding and its uses.
      tape: A probed pass.

    Returns:
      How often each row was looked up: ``(stack, inputs)``.
    """
    return mean_input(traced, tape)[:, 0] * traced.positions


def gram_product(
    traced: TracedLayer, tape: Tape, rows: jax.Array, inputs: Rows | None = None
) -> jax.Array:
    r"""The second moment of the inputs times vectors, times ``m``, without forming the moment.

    .. math:: m A v = \sum_{n,t} a_{nt} (a_{nt}^\top v)

    Args:
      traced: The layer and its uses.
      tape: A probed pass.
      rows: The vectors, ``(stack, k, inputs)``.
      inputs: `dense_rows`, if known.

    Returns:
      ``(stack, k, inputs)``.
    """
    products, pull_back = jax.vjp(lambda v: _project(traced, tape, inputs, v), rows)
    return pull_back(products)[0]


def input_gram(traced: TracedLayer, tape: Tape, inputs: Rows | None = None) -> jax.Array:
    r"""The second moment of the inputs, times ``m``: :math:`\sum_{n,t} a_{nt} a_{nt}^\top`.

    Args:
      traced: The layer and its uses, not an embedding.
      tape: A probed pass.
      inputs: `dense_rows`, if known.

    Returns:
      ``(stack, inputs, inputs)``.
    """
    rows = inputs or [homogeneous_inputs(traced, use, tape.operands) for use in traced.uses]
    return _total([row_gram(array) for array in rows])


def row_gram(rows: jax.Array) -> jax.Array:
    """The sum of the outer products of rows.

    Args:
      rows: ``(stack, positions, inputs)``; on an Explicit mesh positions may be sharded.

    Returns:
      ``(stack, inputs, inputs)``.

    Example:
      >>> row_gram(jnp.array([[[1.0, 2.0], [1.0, 0.0]]])).tolist()
      [[[2.0, 2.0], [2.0, 4.0]]]
    """

    def combine(coefficients: jax.Array) -> jax.Array:
        return jnp.matmul(rows, coefficients, precision=_HIGHEST)

    # As an adjoint, so that the sharding of the sum over examples is autodiff's to choose.
    stack, _, inputs = rows.shape
    template = replicated_zeros((stack, inputs, inputs), rows.dtype)
    (gram,) = jax.linear_transpose(combine, template)(rows)
    return gram


def output_sums(traced: TracedLayer, tape: Tape) -> jax.Array:
    """The outputs, without the bias, and their cotangents, summed over examples and positions.

    Args:
      traced: The layer and its uses.
      tape: A probed pass.

    Returns:
      Two rows for each block, ``(stack, 2, outputs)``, replicated on an Explicit mesh.
    """
    outputs = _total([use_forms.sum_outputs(u, tape.outputs[u.site]) for u in traced.uses])
    cotangents = _total([use_forms.sum_outputs(u, tape.cotangents[u.site]) for u in traced.uses])
    return jnp.stack([outputs, cotangents.astype(outputs.dtype)], axis=1)


def output_weights(traced: TracedLayer, batch_size: int) -> np.ndarray:
    r"""The factors that take `output_sums` to :math:`\bar h` and :math:`\bar g`.

    Args:
      traced: The layer and its uses.
      batch_size: Number of examples ``m``.

    Returns:
      ``1 / mT`` for the outputs, ``1 / T`` for the cotangents.
    """
    return np.array([1 / traced.positions, batch_size / traced.positions])


def _total(arrays: Sequence[jax.Array]) -> jax.Array:
    return sum(arrays[1:], start=arrays[0])


def mean_eigenvalues(
    traced: TracedLayer, tape: Tape, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    r"""Mean eigenvalues of the second moments of inputs and of per-example cotangents.

    .. math::
      \frac{1}{i\,m} \sum_{n,t} |a_{nt}|^2, \qquad
      \frac{1}{o\,mT} \sum_{n,t} |m\, \partial f / \partial h_{nt}|^2

    Args:
      traced: The layer and its uses.
      tape: A probed pass of an objective that is a mean over examples.
      batch_size: Number of examples ``m``.

    Returns:
      Two arrays of shape ``(stack,)``.
    """
    layer = traced.layer
    squares = [
        jnp.sum(use_forms.input_matrix(use, tape.operands[use.site]) ** 2, axis=(1, 2))
        for use in traced.uses
    ]
    inputs = _total(squares)
    if layer.bias is not None:
        inputs = inputs + traced.positions
    cotangents = [
        use_forms.sum_squared_outputs(use, tape.cotangents[use.site]) for use in traced.uses
    ]
    outputs = _total(cotangents) * batch_size**2
    return (
        inputs / (batch_size * layer.inputs),
        outputs / (traced.positions * layer.outputs),
    )
