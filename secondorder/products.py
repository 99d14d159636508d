"""Products at full precision, shared by all small dense algebra.

Accelerators round the operands of a float32 product by default (bfloat16 on TPU, TF32 on GPU).
Curvature pairs are differences of nearly equal vectors, for which that is too coarse.
"""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the inner product ``aᵀ b`` of two vectors at full precision.

    Args:
      a: vector (n,).
      b: vector (n,).

    Returns:
      Scalar.

    Example:
      >>> float(inner(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])))
      11.0
    """
    return jnp.vdot(a, b, precision=HIGHEST)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the product ``a b`` at full precision.

    Args:
      a: matrix (m, n).
      b: vector (n,) or matrix (n, k).

    Returns:
      Vector (m,) or matrix (m, k).

    Example:
      >>> matmul(jnp.array([[1.0, 2.0]]), jnp.array([3.0, 4.0])).tolist()
      [11.0]
    """
    return jnp.matmul(a, b, precision=HIGHEST)
