"""The minimizer of a quadratic model on the plane of two vectors, in terms of inner products."""

import jax
import jax.numpy as jnp
import numpy as np

# Squared sines of the angle between two vectors below this many roundings are none.
_ROUNDINGS = 64


def minimize_on_plane(slopes: jax.Array, matrix: jax.Array) -> jax.Array:
    r"""Minimizes :math:`s^\top c + \tfrac12 c^\top M c` over two coefficients.

    The system is solved in units in which the diagonal of ``M`` is one, so that the step
    :math:`c_1 u_1 + c_2 u_2` does not depend on the lengths of the vectors. A vector without
    curvature gets no part in the step, such as a last step of zero; of two vectors that are the
    same line but for rounding, the first gets all.

    Args:
      slopes: ``s``, the products of the gradient with both vectors (2,).
      matrix: ``M``, symmetric positive semidefinite (2, 2), float32 or wider.

    Returns:
      The coefficients ``c`` (2,).

    Example:
      >>> minimize_on_plane(jnp.array([-2.0, -8.0]), jnp.diag(jnp.array([1.0, 4.0]))).tolist()
      [2.0, 2.0]
      >>> minimize_on_plane(jnp.array([-2.0, 0.0]), jnp.diag(jnp.array([1.0, 0.0]))).tolist()
      [2.0, 0.0]

    Source: Martens, Grosse (2015), arXiv 1503.05671, section 7.
    """
    diagonal = jnp.diag(matrix)
    known = (diagonal > 0) & jnp.isfinite(diagonal)
    scale = jnp.where(known, jax.lax.rsqrt(jnp.where(known, diagonal, 1)), 0)
    first, second = slopes * scale
    cosine = matrix[0, 1] * scale[0] * scale[1]
    rest = 1 - cosine**2
    independent = rest > _ROUNDINGS * float(np.finfo(matrix.dtype).eps)
    beside = jnp.where(independent, (cosine * first - second) / jnp.where(independent, rest, 1), 0)
    beside = jnp.where(known[1], jnp.where(known[0], beside, -second), 0)
    return scale * jnp.stack([-first - cosine * beside, beside])
