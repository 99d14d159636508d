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

import jax
import jax.numpy as jnp

from secondorder.layers import uses as use_forms
from secondorder.layers.layer import TracedLayer
from secondorder.layers.probes import Tape


def _project(traced: TracedLayer, tape: Tape, vectors: jax.Array) -> list[jax.Array]:
    """Inner products of all homogeneous inputs with ``(stack, inputs)``: one array per use."""
    width = traced.layer.weight_view.shape[2]
    rows, constant = vectors[:, :width, None], vectors[:, width:, None]
    return [
        use_forms.project(use, tape.operands[use.site], rows)
        + (0.0 if traced.layer.bias is None else constant)
        for use in traced.uses
    ]


def _any_vectors(traced: TracedLayer, tape: Tape) -> jax.Array:
    """Vectors to linearize at: the projection is linear, so that any will do."""
    dtypes = [tape.cotangents[use.site].dtype for use in traced.uses]
    dtype = use_forms.curvature_dtype(jnp.result_type(*dtypes))
    return jnp.zeros((traced.layer.stack, traced.layer.inputs), dtype)


def sum_inputs(traced: TracedLayer, tape: Tape) -> jax.Array:
    r"""The sum of the inputs over examples and positions, :math:`\sum_{n,t} a_{nt}`.

    Args:
      traced: The layer and its uses.
      tape: A probed pass.

    Returns:
      ``(stack, inputs)``; with a bias the last coordinate counts the positions.
    """
    products, pull_back = jax.vjp(
        lambda vectors: _project(traced, tape, vectors), _any_vectors(traced, tape)
    )
    return pull_back([jnp.ones_like(product) for product in products])[0]


def mean_input(traced: TracedLayer, tape: Tape) -> jax.Array:
    """The mean input over examples and positions.

    Args:
      traced: The layer and its uses.
      tape: A probed pass.

    Returns:
      ``(stack, inputs)``; the homogeneous coordinate of a bias is one.
    """
    return sum_inputs(traced, tape) / traced.positions


def input_frequencies(traced: TracedLayer, tape: Tape, batch_size: int) -> jax.Array:
    """The diagonal of the second moment of an embedding's one-hot inputs.

    Args:
      traced: An embedding and its uses.
      tape: A probed pass.
      batch_size: Number of examples ``m``.

    Returns:
      How often each row was looked up, per example: ``(stack, inputs)``.
    """
    return sum_inputs(traced, tape) / batch_size


def moment_product(
    traced: TracedLayer, tape: Tape, vectors: jax.Array, batch_size: int
) -> jax.Array:
    r"""The second moment of the inputs times a vector, without forming the moment.

    .. math:: A v = \frac1m \sum_{n,t} a_{nt} (a_{nt}^\top v)

    Args:
      traced: The layer and its uses.
      tape: A probed pass.
      vectors: ``(stack, inputs)``.
      batch_size: Number of examples ``m``.

    Returns:
      ``(stack, inputs)``.
    """
    products, pull_back = jax.vjp(lambda v: _project(traced, tape, v), vectors)
    return pull_back(products)[0] / batch_size


def second_moment(traced: TracedLayer, tape: Tape, batch_size: int) -> jax.Array:
    r"""The second moment of the inputs, :math:`A = \frac1m \sum_{n,t} a_{nt} a_{nt}^\top`.

    Args:
      traced: The layer and its uses, not an embedding.
      tape: A probed pass.
      batch_size: Number of examples ``m``.

    Returns:
      ``(stack, inputs, inputs)``.
    """
    grams = []
    for use in traced.uses:
        inputs = use_forms.input_matrix(use, tape.operands[use.site])
        if traced.layer.bias is not None:
            inputs = jnp.concatenate([inputs, jnp.ones_like(inputs[..., :1])], axis=-1)
        grams.append(_gram(inputs))
    return sum(grams[1:], start=grams[0]) / batch_size


def _gram(rows: jax.Array) -> jax.Array:
    """Sum of the outer products of the rows of ``(stack, positions, inputs)``."""

    def combine(coefficients: jax.Array) -> jax.Array:
        return jnp.matmul(rows, coefficients, precision=jax.lax.Precision.HIGHEST)

    # As an adjoint, so that the sharding of the sum over examples is autodiff's to choose.
    stack, _, inputs = rows.shape
    template = jax.ShapeDtypeStruct((stack, inputs, inputs), rows.dtype)
    (gram,) = jax.linear_transpose(combine, template)(rows)
    return gram


def mean_cotangent(traced: TracedLayer, tape: Tape, batch_size: int) -> jax.Array:
    """The cotangent of the outputs, summed over examples and averaged over positions.

    Args:
      traced: The layer and its uses.
      tape: A probed pass.
      batch_size: Number of examples ``m``.

    Returns:
      ``(stack, outputs)``.
    """
    sums = [use_forms.sum_outputs(use, tape.cotangents[use.site]) for use in traced.uses]
    return sum(sums[1:], start=sums[0]) * (batch_size / traced.positions)


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
    inputs = sum(squares[1:], start=squares[0])
    if layer.bias is not None:
        inputs = inputs + traced.positions
    cotangents = [
        use_forms.sum_squared_outputs(use, tape.cotangents[use.site]) for use in traced.uses
    ]
    outputs = sum(cotangents[1:], start=cotangents[0]) * batch_size**2
    return (
        inputs / (batch_size * layer.inputs),
        outputs / (traced.positions * layer.outputs),
    )
