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


def _project(traced: TracedLayer, tape: Tape, rows: jax.Array) -> list[jax.Array]:
    """Inner products of all homogeneous inputs with rows ``(stack, inputs, k)``, use by use."""
    width = traced.layer.weight_view.shape[2]
    products = []
    for use in traced.uses:
        product = use_forms.project(use, tape.operands[use.site], rows[:, :width])
        products.append(product)
    return products


def _sum_inputs(traced: TracedLayer, tape: Tape, width: int) -> jax.Array:
    """Sum of the inputs over all positions, ``(stack, inputs without the homogeneous one)``."""

    def total(rows: jax.Array) -> jax.Array:
        return sum(
            (jnp.sum(product) for product in _project(traced, tape, rows)), start=jnp.zeros(())
        )

    rows = jnp.zeros((traced.layer.stack, width, 1), input_dtype(traced, tape))
    return jax.grad(total)(rows)[..., 0]


def input_dtype(traced: TracedLayer, tape: Tape) -> jnp.dtype:
    """The dtype of a layer's input statistics: float32, or float64 for float64 inputs."""
    dtypes = [tape.cotangents[use.site].dtype for use in traced.uses]
    return jnp.dtype(use_forms.curvature_dtype(jnp.result_type(*dtypes)))


def mean_input(traced: TracedLayer, tape: Tape) -> jax.Array:
    """The mean input over examples and positions.

    Args:
      traced: The layer and its uses.
      tape: A probed pass.

    Returns:
      ``(stack, inputs)``; the homogeneous coordinate of a bias is exactly one.
    """
    width = traced.layer.weight_view.shape[2]
    mean = _sum_inputs(traced, tape, width) / traced.positions
    if traced.layer.bias is None:
        return mean
    return jnp.concatenate([mean, jnp.ones_like(mean[:, :1])], axis=1)


def input_frequencies(traced: TracedLayer, tape: Tape, batch_size: int) -> jax.Array:
    """The diagonal of the second moment of an embedding's one-hot inputs.

    Args:
      traced: An embedding and its uses.
      tape: A probed pass.
      batch_size: Number of examples ``m``.

    Returns:
      How often each row was looked up, per example: ``(stack, inputs)``.
    """
    return mean_input(traced, tape) * (traced.positions / batch_size)


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
    has_bias = traced.layer.bias is not None
    width = traced.layer.weight_view.shape[2]
    rows, constant = vectors[:, :width, None], vectors[:, width:]
    sum_of_inputs = None

    def products(rows: jax.Array) -> list[jax.Array]:
        return _project(traced, tape, rows)

    projected, pull_back = jax.vjp(products, rows)
    weights = pull_back(projected)[0][..., 0]
    if not has_bias:
        return weights / batch_size
    sum_of_inputs = _sum_inputs(traced, tape, width)
    bias = jnp.sum(sum_of_inputs * rows[..., 0], axis=1, keepdims=True)
    weights = weights + constant * sum_of_inputs
    return jnp.concatenate([weights, bias + constant * traced.positions], axis=1) / batch_size


def second_moment(traced: TracedLayer, tape: Tape, batch_size: int) -> jax.Array:
    r"""The second moment of the inputs, :math:`A = \frac1m \sum_{n,t} a_{nt} a_{nt}^\top`.

    Args:
      traced: The layer and its uses, not an embedding.
      tape: A probed pass.
      batch_size: Number of examples ``m``.

    Returns:
      ``(stack, inputs, inputs)``.
    """
    moment = sum(
        (_gram(use, tape.operands[use.site]) for use in traced.uses), start=jnp.zeros(())
    )
    if traced.layer.bias is not None:
        width = moment.shape[-1]
        column = _sum_inputs(traced, tape, width)[..., None].astype(moment.dtype)
        corner = jnp.full_like(column[:, :1], traced.positions)
        right = jnp.concatenate([column, corner], axis=1)
        moment = jnp.concatenate([moment, jnp.swapaxes(column, 1, 2)], axis=1)
        moment = jnp.concatenate([moment, right], axis=2)
    return moment / batch_size


def _gram(use: use_forms.Use, operand: jax.Array) -> jax.Array:
    """Sum over positions of the outer products of one use's inputs."""
    if use.kind == use_forms.CONV:
        inputs = use_forms.patches(use, operand)
        return jax.lax.dot_general(
            inputs, inputs, (((1,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
        )
    # The adjoint of the projection on the identity; autodiff chooses the sharding of the result.
    eye = jnp.broadcast_to(
        jnp.eye(use.inputs, dtype=use_forms.curvature_dtype(operand.dtype)),
        (use.stack, use.inputs, use.inputs),
    )
    del eye
    inputs = use_forms.input_matrix(use, operand)
    return jax.lax.dot_general(
        inputs, inputs, (((1,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
    )
