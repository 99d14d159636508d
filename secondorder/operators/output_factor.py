r"""Square roots of the Hessian of a loss in the outputs of a model, case by case.

.. math:: H_n = S_n S_n^\top, \qquad H = \nabla^2 \ell(z) = \mathrm{diag}(H_1, \ldots, H_N)

A *case* is everything but the last axis of an array of outputs ``(N..., C)``: an example, or one
position of one. The loss must couple the outputs within a case only, as a mean over cases of any
function of ``C`` numbers does. This is assumed and not checked.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from secondorder.checks import check_choice
from secondorder.operators.gauss_newton import output_hessian
from secondorder.sharding import gather_axes

OutputStructure: TypeAlias = Literal["dense", "diagonal"]


def output_factor(
    loss: Callable[[Any], jax.Array], outputs: jax.Array, structure: OutputStructure = "dense"
) -> jax.Array:
    r"""The factors :math:`S_n` of a loss that is convex in the outputs.

    Negative curvature is cut off: of a loss that is not convex they are the factors of the nearest
    positive semidefinite matrix.

    Args:
      loss: Maps outputs to a scalar.
      outputs: The outputs ``z``, array ``(N..., C)``.
      structure: ``"dense"``: any coupling within a case, such as softmax cross entropy, at the cost
        of ``C`` products with ``H`` and one eigendecomposition ``(C, C)`` per case.
        ``"diagonal"``: no coupling at all, such as squared error or a cross entropy for each pixel,
        at the cost of one product.

    Returns:
      ``S``, array ``(N..., C, C)``, or ``(N..., C)`` for ``"diagonal"``; float32 or wider.

    Raises:
      TypeError: If the outputs are not one floating-point array with at least one axis.
      ValueError: If ``structure`` is none of the two.

    Example:
      >>> factor = output_factor(lambda z: 2 * jnp.sum(z**2), jnp.ones((3, 2)), "diagonal")
      >>> factor.tolist()
      [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    check_choice("structure", structure, ("dense", "diagonal"))
    check_outputs(outputs)
    # The outputs of a case are decomposed together, on one device.
    wide = gather_axes(widen_outputs(outputs), [outputs.ndim - 1])
    product = output_hessian(loss, wide)
    if structure == "diagonal":
        return jnp.sqrt(jnp.maximum(product(jnp.ones_like(wide)), 0))

    def column(unit: jax.Array) -> jax.Array:
        return product(jnp.zeros_like(wide) + unit)

    columns = jax.vmap(column)(jnp.eye(wide.shape[-1], dtype=wide.dtype))
    return _square_root(jnp.moveaxis(columns, 0, -1))


def apply_factor(factor: jax.Array, vector: jax.Array) -> jax.Array:
    """The products ``S e`` of all cases.

    Args:
      factor: ``S``, array ``(N..., C, C)``, or ``(N..., C)`` if it is diagonal.
      vector: ``e``, array ``(N..., C)``.

    Returns:
      Array like the vector.

    Example:
      >>> apply_factor(2 * jnp.ones((3, 2)), jnp.ones((3, 2)))[0].tolist()
      [2.0, 2.0]
    """
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


def _square_root(matrices: jax.Array) -> jax.Array:
    """Square roots ``S`` of positive semidefinite matrices ``(..., C, C)``."""
    values, eigenvectors = jnp.linalg.eigh(matrices)
    # What is smaller than the rounding errors of the largest eigenvalue is none of the loss.
    floor = values[..., -1:] * (values.shape[-1] * float(np.finfo(values.dtype).eps))
    kept = jnp.where(values > jnp.maximum(floor, 0), values, 0)
    return eigenvectors * jnp.sqrt(kept)[..., None, :]
