r"""Square roots of the Hessian of a loss in the outputs of a model, case by case.

.. math:: H_n = S_n S_n^\top, \qquad H = \nabla^2 \ell(z) = \mathrm{diag}(H_1, \ldots, H_N)

A *case* is everything but the last axis of an array of outputs ``(N..., C)``: an example, or one
position of one. The loss must couple the outputs within a case only, as a mean over cases of any
function of ``C`` numbers does. This is assumed and not checked.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from secondorder.checks import check_choice
from secondorder.jaxprs import is_log_partition_loss
from secondorder.layers.cases import keeps_classes_apart
from secondorder.operators.gauss_newton import output_hessian
from secondorder.sharding import gather_axes, shard_like

OutputStructure: TypeAlias = Literal["auto", "dense", "diagonal", "softmax"]


class SoftmaxFactor(NamedTuple):
    r"""Square roots :math:`\sqrt{w} (\mathrm{diag}(\sqrt p) - p \sqrt p^\top)`, in ``2 C`` numbers.

    Attributes:
      roots: Square roots of the probabilities ``p`` of the classes, array ``(N..., C)``.
      scale: Square root of the weight of each case, array ``(N..., 1)``.
    """

    roots: jax.Array
    scale: jax.Array

    @property
    def dtype(self) -> Any:
        """That of the numbers."""
        return self.roots.dtype


OutputFactor: TypeAlias = jax.Array | SoftmaxFactor


def output_factor(
    loss: Callable[[Any], jax.Array], outputs: jax.Array, structure: OutputStructure = "auto"
) -> OutputFactor:
    r"""The factors :math:`S_n` of a loss that is convex in the outputs.

    Negative curvature is cut off: of a loss that is not convex they are the factors of the nearest
    positive semidefinite matrix.

    Args:
      loss: Maps outputs to a scalar.
      outputs: The outputs ``z``, array ``(N..., C)``.
      structure: Of :math:`H_n`.

        * ``"dense"``: any coupling within a case, at the cost of ``C`` products with ``H`` and one
          eigendecomposition ``(C, C)`` per case.
        * ``"diagonal"``: no coupling at all, such as squared error or a cross entropy for each
          pixel, at the cost of one product.
        * ``"softmax"``: :math:`w_n (\mathrm{diag}(p_n) - p_n p_n^\top)` with probabilities
          :math:`p_n` and a weight, as softmax cross entropies have, at the cost of one product.
        * ``"auto"``: one of the last two where the loss is seen to be of that kind, else dense.

    Returns:
      ``S``, array ``(N..., C, C)``, or ``(N..., C)`` for ``"diagonal"``, or a `SoftmaxFactor`;
      float32 or wider.

    Raises:
      TypeError: If the outputs are not one floating-point array with at least one axis.
      ValueError: If ``structure`` is none of these.

    Example:
      >>> factor = output_factor(lambda z: 2 * jnp.sum(z**2), jnp.ones((3, 2)), "diagonal")
      >>> factor.tolist()
      [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    check_choice("structure", structure, get_args(OutputStructure))
    check_outputs(outputs)
    if structure == "auto":
        structure = _structure_of(loss, outputs)
    if structure == "softmax":
        return _softmax_factor(loss, widen_outputs(outputs))
    # The outputs of a case are decomposed together, on one device.
    wide = gather_axes(widen_outputs(outputs), [outputs.ndim - 1])
    product = output_hessian(loss, wide)
    if structure == "diagonal":
        return jnp.sqrt(jnp.maximum(product(jnp.ones_like(wide)), 0))

    def column(unit: jax.Array) -> jax.Array:
        return product(jnp.zeros_like(wide) + unit)

    columns = jax.vmap(column)(jnp.eye(wide.shape[-1], dtype=wide.dtype))
    return _square_root(jnp.moveaxis(columns, 0, -1))


def apply_factor(factor: OutputFactor, vector: jax.Array) -> jax.Array:
    """The products ``S e`` of all cases.

    Args:
      factor: ``S``, as `output_factor` makes it.
      vector: ``e``, array ``(N..., C)``.

    Returns:
      Array like the vector.

    Example:
      >>> apply_factor(2 * jnp.ones((3, 2)), jnp.ones((3, 2)))[0].tolist()
      [2.0, 2.0]
    """
    if isinstance(factor, SoftmaxFactor):
        rooted = factor.roots * vector
        total = jnp.sum(rooted, axis=-1, keepdims=True)
        return factor.scale * (rooted - factor.roots**2 * total)
    if factor.ndim == vector.ndim:
        return factor * vector
    return jnp.einsum("...ij,...j->...i", factor, vector, precision=jax.lax.Precision.HIGHEST)


def check_outputs(outputs: Any) -> None:
    """Raises unless the outputs of a model are cases along all axes but the last.

    Args:
      outputs: The outputs.

    Raises:
      TypeError: If they are not one floating-point array with at least one axis.
    """
    ndim, dtype = getattr(outputs, "ndim", 0), getattr(outputs, "dtype", None)
    if ndim < 1 or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        shapes = jax.tree.map(lambda leaf: getattr(leaf, "shape", type(leaf)), outputs)
        raise TypeError(
            "Curvature case by case needs a model whose outputs are one floating-point array "
            f"(cases..., classes), got {shapes}; give the scalar output of a case an axis of 1."
        )


def widen_outputs(outputs: jax.Array) -> jax.Array:
    """Outputs in the dtype in which the curvature of the loss is computed.

    Args:
      outputs: Array of any floating-point dtype.

    Returns:
      The same, float32 or wider.

    Example:
      >>> widen_outputs(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def _structure_of(loss: Callable[[Any], jax.Array], outputs: jax.Array) -> OutputStructure:
    """What can be read off the loss."""
    like = jax.ShapeDtypeStruct(outputs.shape, outputs.dtype)
    if keeps_classes_apart(loss, like):
        return "diagonal"
    return "softmax" if is_log_partition_loss(loss, like) else "dense"


def _softmax_factor(loss: Callable[[Any], jax.Array], outputs: jax.Array) -> SoftmaxFactor:
    r"""The factor of :math:`w (\mathrm{diag}(p) - p p^\top)`.

    The weights do not depend on the outputs. Where these are zero all classes are as likely, and
    the first entry of the product with the first unit vector is :math:`w (C - 1) / C^2`.
    """
    classes = outputs.shape[-1]
    first = jnp.arange(classes) == 0
    unit = shard_like(jnp.broadcast_to(first.astype(outputs.dtype), outputs.shape), outputs)
    product = output_hessian(loss, jnp.zeros_like(outputs))(unit)
    weight = jnp.sum(product * unit, axis=-1, keepdims=True) * (classes**2 / max(classes - 1, 1))
    return SoftmaxFactor(
        jnp.sqrt(jax.nn.softmax(outputs, axis=-1)), jnp.sqrt(jnp.maximum(weight, 0))
    )


def _square_root(matrices: jax.Array) -> jax.Array:
    """Square roots ``S`` of positive semidefinite matrices ``(..., C, C)``."""
    values, eigenvectors = jnp.linalg.eigh(matrices)
    # What is smaller than the rounding errors of the largest eigenvalue is none of the loss.
    floor = values[..., -1:] * (values.shape[-1] * float(np.finfo(values.dtype).eps))
    kept = jnp.where(values > jnp.maximum(floor, 0), values, 0)
    return eigenvectors * jnp.sqrt(kept)[..., None, :]
