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

_HIGHEST = jax.lax.Precision.HIGHEST


def _homogeneous_inputs(traced: TracedLayer, use: use_forms.Use, tape: Tape) -> jax.Array:
    """The inputs of one use as rows, with a one at the end if there is a bias."""
    inputs = use_forms.input_matrix(use, tape.operands[use.site])
    if traced.layer.bias is None:
        return inputs
    return jnp.concatenate([inputs, jnp.ones_like(inputs[..., :1])], axis=-1)


def _project(traced: TracedLayer, tape: Tape, rows: jax.Array) -> list[jax.Array]:
    """Inner products of all homogeneous inputs with ``(stack, k, inputs)``, use by use."""
    width = traced.layer.weight_view.shape[1]
    products = []
    for use in traced.uses:
        if use.kind == use_forms.DENSE:
            inputs = _homogeneous_inputs(traced, use, tape)
            # Written out: in this order neither the product nor its adjoint transposes anything.
            contract = (((2,), (2,)), ((0,), (0,)))
            products.append(jax.lax.dot_general(rows, inputs, contract, precision=_HIGHEST))
            continue
        product = use_forms.project(use, tape.operands[use.site], rows[..., :width])
        products.append(product if traced.layer.bias is None else product + rows[..., width:])
    return products


def _dtype(traced: TracedLayer, tape: Tape) -> jnp.dtype:
    dtypes = [tape.cotangents[use.site].dtype for use in traced.uses]
    return jnp.dtype(use_forms.curvature_dtype(jnp.result_type(*dtypes)))


def mean_input(traced: TracedLayer, tape: Tape, copies: int = 1) -> jax.Array:
    """The mean input over examples and positions.

    Args:
      traced: The layer and its uses.
      tape: A probed pass.
      copies: How many equal rows to return. With two or more the products that follow are of
        matrices, which compile to library calls.

    Returns:
      ``(stack, copies, inputs)``; the homogeneous coordinate of a bias is one.
    """
    layer = traced.layer
    rows = jnp.zeros((layer.stack, copies, layer.inputs), _dtype(traced, tape))
    products, pull_back = jax.vjp(lambda rows: _project(traced, tape, rows), rows)
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


def gram_product(traced: TracedLayer, tape: Tape, rows: jax.Array) -> jax.Array:
    r"""The second moment of the inputs times vectors, times ``m``, without forming the moment.

    .. math:: m A v = \sum_{n,t} a_{nt} (a_{nt}^\top v)

    Args:
      traced: The layer and its uses.
      tape: A probed pass.
      rows: The vectors, ``(stack, k, inputs)``.

    Returns:
      ``(stack, k, inputs)``.
    """
    products, pull_back = jax.vjp(lambda v: _project(traced, tape, v), rows)
    return pull_back(products)[0]


def input_gram(traced: TracedLayer, tape: Tape) -> jax.Array:
    r"""The second moment of the inputs, times ``m``: :math:`\sum_{n,t} a_{nt} a_{nt}^\top`.

    Args:
      traced: The layer and its uses, not an embedding.
      tape: A probed pass.

    Returns:
      ``(stack, inputs, inputs)``.
    """
    grams = [_gram(_homogeneous_inputs(traced, use, tape)) for use in traced.uses]
    return sum(grams[1:], start=grams[0])


def _gram(rows: jax.Array) -> jax.Array:
    """Sum of the outer products of the rows of ``(stack, positions, inputs)``."""

    def combine(coefficients: jax.Array) -> jax.Array:
        return jnp.matmul(rows, coefficients, precision=_HIGHEST)

    # As an adjoint, so that the sharding of the sum over examples is autodiff's to choose.
    stack, _, inputs = rows.shape
    template = jax.ShapeDtypeStruct((stack, inputs, inputs), rows.dtype)
    (gram,) = jax.linear_transpose(combine, template)(rows)
    return gram


def mean_output(traced: TracedLayer, tape: Tape) -> jax.Array:
    """The output over examples and positions, without the bias.

    Args:
      traced: The layer and its uses.
      tape: A probed pass.

    Returns:
      ``(stack, outputs)``.
    """
    sums = [use_forms.sum_outputs(use, tape.outputs[use.site]) for use in traced.uses]
    return sum(sums[1:], start=sums[0]) / traced.positions


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
