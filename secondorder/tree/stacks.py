r"""Algebra of whole stacks: products of two of them, and new stacks from the vectors of one.

A stack of ``k`` vectors is the matrix ``V`` that has them as its rows; see `vectors`.
"""

import chex
import jax
import jax.numpy as jnp

from secondorder.sharding import contract
from secondorder.tree.vectors import accumulation_dtype, random_vector, zeros_stack


def stack_size(stack: chex.ArrayTree) -> int:
    """How many vectors a stack has.

    Args:
      stack: A pytree of arrays ``(k, *shape)``.

    Returns:
      ``k``.

    Example:
      >>> stack_size({"a": jnp.ones((3, 2))})
      3
    """
    return len(jax.tree.leaves(stack)[0])


def gram(left: chex.ArrayTree, right: chex.ArrayTree) -> jax.Array:
    r"""The inner products :math:`V W^\top` of the vectors of two stacks.

    Args:
      left: The vectors as rows of ``V``, a pytree of arrays ``(j, *shape)``, float32 or wider.
      right: Those of ``W``, a pytree of arrays ``(k, *shape)``, likewise.

    Returns:
      Array ``(j, k)``, at full precision.

    Example:
      >>> stack = {"a": jnp.eye(2), "b": jnp.array([1.0, 2.0])}
      >>> gram(stack, stack).tolist()
      [[2.0, 2.0], [2.0, 5.0]]
    """
    dtype = accumulation_dtype((left, right))

    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        axes = tuple(range(1, a.ndim))
        return contract(a.astype(dtype), b.astype(dtype), (axes, axes), dtype)

    return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(products, left, right))), axis=0)


def mix(matrix: jax.Array, stack: chex.ArrayTree) -> chex.ArrayTree:
    r"""The linear combinations :math:`M V` of the vectors of a stack.

    Args:
      matrix: ``M``, array ``(j, k)``, a row for each combination.
      stack: The vectors as rows of ``V``, a pytree of arrays ``(k, *shape)``, float32 or wider.

    Returns:
      A stack of ``j`` vectors.

    Example:
      >>> mix(jnp.array([[1.0, -1.0]]), {"a": jnp.array([[3.0, 4.0], [1.0, 1.0]])})["a"].tolist()
      [[2.0, 3.0]]
    """

    def combinations(rows: jax.Array) -> jax.Array:
        return contract(matrix.astype(rows.dtype), rows, ((1,), (0,)), rows.dtype)

    return jax.tree.map(combinations, stack)


def random_stack(key: jax.Array, tree: chex.ArrayTree, size: int) -> chex.ArrayTree:
    """A stack of vectors with independent standard normal elements.

    Args:
      key: A PRNG key.
      tree: One vector, a pytree of arrays.
      size: Number of vectors ``k``.

    Returns:
      A pytree of arrays ``(k, *shape)``, float32 or wider, sharded as the vector.

    Example:
      >>> random_stack(jax.random.key(0), {"a": jnp.ones(3)}, 2)["a"].shape
      (2, 3)
    """
    zeros = zeros_stack(tree, size, accumulation_dtype(tree))
    return random_vector("normal", key, zeros)
