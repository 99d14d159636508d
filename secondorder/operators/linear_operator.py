"""Linear operators on pytrees that are known by their products alone."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from secondorder.tree import accumulation_dtype


def vectors_like(params: chex.ArrayTree) -> chex.ArrayTree:
    """The shape of the vectors that operators at a point act on.

    Args:
      params: The point.

    Returns:
      A pytree of `jax.ShapeDtypeStruct`, float32 or wider.

    Example:
      >>> vectors_like(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    dtype = accumulation_dtype(params)
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)


def narrow(vector: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
    """A vector as a tangent of the parameters.

    Args:
      vector: A pytree of arrays like the parameters.
      params: The point.

    Returns:
      The vector, each leaf in the dtype of its parameter.

    Example:
      >>> narrow(jnp.ones(2), jnp.ones(2, jnp.bfloat16)).dtype
      dtype(bfloat16)
    """
    return jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params)


def widen(tangent: chex.ArrayTree) -> chex.ArrayTree:
    """A tangent of the parameters as a vector that operators return.

    Args:
      tangent: A pytree of arrays like the parameters, in their dtypes.

    Returns:
      The vector, float32 or wider.

    Example:
      >>> widen(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    dtype = accumulation_dtype(tangent)
    return jax.tree.map(lambda t: t.astype(dtype), tangent)


@dataclasses.dataclass(frozen=True)
class LinearOperator:
    r"""A symmetric matrix :math:`A` that acts on pytrees like the parameters.

    Operators are made inside the function that is compiled, at a point, and closed over by what
    uses them; they are not arguments of compiled functions.

    Attributes:
      product: Maps ``v`` to ``A v``; both are pytrees like ``like``.
      like: A pytree of `jax.ShapeDtypeStruct` like the vectors.

    Example:
      >>> double = LinearOperator(lambda v: 2 * v, jax.ShapeDtypeStruct((2,), jnp.float32))
      >>> (double + double.damped(1.0)).as_matrix().tolist()
      [[5.0, 0.0], [0.0, 5.0]]
    """

    product: Callable[[chex.ArrayTree], chex.ArrayTree]
    like: chex.ArrayTree

    def __call__(self, vector: chex.ArrayTree) -> chex.ArrayTree:
        """The product with a vector.

        Args:
          vector: A pytree of arrays like ``like``.

        Returns:
          A pytree like it.
        """
        return self.product(vector)

    def columns(self, stack: chex.ArrayTree, chunk_size: int | None = None) -> chex.ArrayTree:
        """The products with several vectors.

        Args:
          stack: The vectors, a pytree of arrays ``(k, *shape)``.
          chunk_size: How many are multiplied at a time, at least 1: less memory, more time. None:
            all. Static.

        Returns:
          A stack like it.
        """
        if chunk_size is None or chunk_size >= len(jax.tree.leaves(stack)[0]):
            return jax.vmap(self.product)(stack)
        return jax.lax.map(self.product, stack, batch_size=chunk_size)

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        """The sum of two operators on the same vectors."""
        return LinearOperator(
            lambda v: jax.tree.map(jnp.add, self.product(v), other.product(v)), self.like
        )

    def scaled(self, factor: chex.Numeric) -> "LinearOperator":
        r"""The operator times a number, :math:`c A`.

        Args:
          factor: The number :math:`c`, a scalar.

        Returns:
          The product.
        """

        # The number may be wider than the vectors, whose dtype a loop must not change.
        def product(vector: chex.ArrayTree) -> chex.ArrayTree:
            return jax.tree.map(lambda a: (factor * a).astype(a.dtype), self.product(vector))

        return LinearOperator(product, self.like)

    def damped(self, damping: chex.Numeric) -> "LinearOperator":
        r"""The operator plus a multiple of the identity, :math:`A + \lambda I`.

        Args:
          damping: The number :math:`\lambda`.

        Returns:
          The sum.
        """

        def product(vector: chex.ArrayTree) -> chex.ArrayTree:
            return jax.tree.map(
                lambda a, v: a + (damping * v).astype(a.dtype), self.product(vector), vector
            )

        return LinearOperator(product, self.like)

    def plus_diagonal(self, diagonal: chex.ArrayTree) -> "LinearOperator":
        """The operator plus a diagonal matrix.

        Args:
          diagonal: Its elements, a pytree of arrays like the vectors.

        Returns:
          The sum.
        """

        def product(vector: chex.ArrayTree) -> chex.ArrayTree:
            return jax.tree.map(
                lambda a, d, v: a + (d * v).astype(a.dtype), self.product(vector), diagonal, vector
            )

        return LinearOperator(product, self.like)

    def masked(self, mask: chex.ArrayTree) -> "LinearOperator":
        """The operator on some of the leaves or elements, zero on the others.

        Args:
          mask: A tree prefix of the vectors, of booleans or of arrays of ones and zeros.

        Returns:
          The operator :math:`M A M`.
        """

        def restrict(vector: chex.ArrayTree) -> chex.ArrayTree:
            return jax.tree.map(
                lambda m, part: jax.tree.map(lambda v: jnp.where(m, v, 0), part), mask, vector
            )

        return LinearOperator(lambda v: restrict(self.product(restrict(v))), self.like)

    def as_matrix(self) -> jax.Array:
        """The dense matrix, for tests and small problems.

        Returns:
          Array ``(n, n)``, in the order of `jax.flatten_util.ravel_pytree`.
        """
        leaves, structure = jax.tree.flatten(self.like)
        sizes = [leaf.size for leaf in leaves]
        identity = jnp.eye(sum(sizes), dtype=accumulation_dtype(self.like))
        parts = jnp.split(identity, [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)], axis=1)
        stack = [
            part.reshape(len(identity), *leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        products = jax.tree.leaves(self.columns(jax.tree.unflatten(structure, stack)))
        rows = jnp.concatenate(
            [p.reshape(len(identity), math.prod(p.shape[1:])) for p in products], axis=1
        )
        return rows.T

    def as_lineax(self) -> Any:
        """The operator as a symmetric `lineax.FunctionLinearOperator`.

        Returns:
          The operator.

        Raises:
          ImportError: If lineax is not installed.
        """
        try:
            import lineax
        except ImportError as error:
            message = "as_lineax needs lineax; install it with `pip install lineax`."
            raise ImportError(message) from error
        return lineax.FunctionLinearOperator(self.product, self.like, lineax.symmetric_tag)
