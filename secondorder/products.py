"""Products at full precision and maps over stacks of matrices, shared by all small dense algebra.

Accelerators round the operands of a float32 product by default (bfloat16 on TPU, TF32 on GPU).
Curvature pairs are differences of nearly equal vectors, for which that is too coarse.
"""

from collections.abc import Callable
from typing import Any

import chex
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


def map_matrices(function: Callable[..., Any], *stacks: jax.Array) -> Any:
    """Applies a function that factorizes matrices to each of a stack, as `jax.vmap` does.

    On CPUs they follow one another. There a batched call of LAPACK waits for other threads of the
    pool that it runs on (jaxlib 0.10): as many such calls at a time as there are cores, which
    stacks of two sizes are on two cores, wait for each other forever.

    Args:
      function: Maps one matrix of each stack to an array or a pytree of arrays.
      *stacks: Arrays ``(S, ...)``.

    Returns:
      What ``function`` returns, stacked ``(S, ...)``.

    Example:
      >>> map_matrices(jnp.linalg.cholesky, jnp.array([[[4.0]], [[9.0]]])).tolist()
      [[[2.0]], [[3.0]]]
    """

    def in_turn(*stacks: jax.Array) -> chex.ArrayTree:
        return jax.lax.map(lambda matrices: function(*matrices), stacks)

    return jax.lax.platform_dependent(*stacks, cpu=in_turn, default=jax.vmap(function))
