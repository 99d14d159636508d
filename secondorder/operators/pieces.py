"""Operators of an objective as a whole, or of `Microbatches`, piece by piece.

The only file of the room that knows what is different about the two kinds of objectives.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax

from secondorder.objective import Microbatches
from secondorder.operators.linear_operator import LinearOperator, vectors_like
from secondorder.sharding import replicate, replicated_zeros
from secondorder.tree import accumulation_dtype, gram, stack_size, zeros_vector


def over_pieces(
    make: Callable[[Any, chex.Numeric], LinearOperator], objective: Any, params: chex.ArrayTree
) -> LinearOperator:
    """The operator of an objective, or the mean of those of its pieces.

    That of a piece is made anew in every product, so that one piece's linearization is held at a
    time.

    Args:
      make: Maps an objective, and the index of its piece, to the operator at the parameters.
      objective: An objective of any kind.
      params: The point, a pytree of arrays.

    Returns:
      The operator.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> like = jax.ShapeDtypeStruct((1,), jnp.float32)
      >>> operator = over_pieces(
      ...     lambda scale, _: LinearOperator(lambda v: scale * v, like), 3.0, jnp.ones(1))
      >>> operator(jnp.ones(1)).tolist()
      [3.0]
    """
    if not isinstance(objective, Microbatches):
        return make(objective, 0)
    zeros = zeros_vector(params)

    def product(vector: chex.ArrayTree) -> chex.ArrayTree:
        return objective.mean(lambda piece, index: make(piece, index)(vector), zeros)

    return LinearOperator(product, vectors_like(params))


def columns_with_samples(
    make: Callable[[Any, chex.Numeric], LinearOperator],
    objective: Microbatches[Any],
    params: chex.ArrayTree,
    stack: chex.ArrayTree,
    chunk_size: int | None = None,
) -> tuple[chex.ArrayTree, jax.Array]:
    """Products with several vectors, and what each piece says about the matrix between them.

    Args:
      make: Maps an objective, and the index of its piece, to the operator at the parameters.
      objective: The pieces, ``s`` of them.
      params: The point, a pytree of arrays.
      stack: The vectors as rows of ``Q``, a pytree of arrays ``(k, *shape)``.
      chunk_size: See `LinearOperator.columns`.

    Returns:
      The products, a stack; and ``Q A Q^T`` of each piece, array ``(s, k, k)``.
    """
    size, dtype = stack_size(stack), accumulation_dtype(stack)
    samples = replicated_zeros((objective.pieces, size, size), dtype)

    def measure(piece: Any, index: jax.Array) -> tuple[chex.ArrayTree, jax.Array]:
        images = make(piece, index).columns(stack, chunk_size)
        # The mean over the pieces divides by their number.
        own = objective.pieces * replicate(gram(stack, images))
        return images, jax.lax.dynamic_update_index_in_dim(samples, own, index, 0)

    return objective.mean(measure, (stack, samples))


def mean_over_pieces(
    measure: Callable[[Any, chex.Numeric], chex.ArrayTree], objective: Any, params: chex.ArrayTree
) -> chex.ArrayTree:
    """A vector that is measured of an objective, or its mean over the pieces.

    Args:
      measure: Maps an objective, and the index of its piece, to a pytree like the vectors.
      objective: An objective of any kind.
      params: The point, a pytree of arrays.

    Returns:
      A pytree like the vectors.

    Example:
      >>> import jax.numpy as jnp
      >>> mean_over_pieces(lambda scale, _: scale * jnp.ones(1), 3.0, jnp.ones(1)).tolist()
      [3.0]
    """
    if not isinstance(objective, Microbatches):
        return measure(objective, 0)
    return objective.mean(measure, zeros_vector(params))
