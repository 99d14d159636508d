r"""Linear algebra on stacks of vectors that are pytrees.

A *stack* of ``k`` vectors is a pytree whose every leaf has a leading axis of that length and is
otherwise shaped, and sharded, as the parameter that it belongs to. Nothing is ever raveled into one
long vector: that would gather what is sharded. All inner products of one pass come out as one
small matrix, the sum over the leaves of one contraction each.

Products are accumulated in float32 or wider, at full precision: the small dense algebra behind a
quasi-Newton method resolves only the square root of what its Gram matrix does. A stack may be
*stored* in a narrower dtype, such as bfloat16. Then the other factor is split into a sum of numbers
of that dtype instead of widening the stack, which would copy it.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import chex
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from secondorder.sharding import contract, shard_like
from secondorder.tree.random import Distribution, draw

_PARTS = 3  # of 8 bits each: a bfloat16 sum that is as accurate as a float32


def accumulation_dtype(tree: chex.ArrayTree) -> jnp.dtype:
    """The dtype of inner products: the widest of the leaves, at least float32.

    Args:
      tree: A pytree of arrays.

    Returns:
      The dtype.

    Example:
      >>> accumulation_dtype({"a": jnp.ones(2, jnp.bfloat16)})
      dtype('float32')
    """
    return jnp.result_type(jnp.float32, *jax.tree.leaves(tree))


def is_function(argument: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether an argument is a function, and not a pytree that can be called, such as a module.

    Args:
      argument: A function, or a pytree.

    Returns:
      Whether it is to be called.

    Example:
      >>> is_function(jnp.sin), is_function({"a": jnp.ones(2)})
      (True, False)
    """
    if isinstance(argument, jax.tree_util.Partial):
        return True
    return callable(argument) and jax.tree_util.treedef_is_leaf(jax.tree.structure(argument))


def zeros_vector(params: chex.ArrayTree) -> chex.ArrayTree:
    """The zero vector at a point, float32 or wider, sharded as the parameters.

    Args:
      params: The point, a pytree of arrays.

    Returns:
      A pytree of zeros.

    Example:
      >>> zeros_vector(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    dtype = accumulation_dtype(params)
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params)


def zeros_stack(tree: chex.ArrayTree, size: int, dtype: DTypeLike) -> chex.ArrayTree:
    """A stack of zero vectors, each leaf sharded as the one that it belongs to.

    Args:
      tree: One vector, a pytree of arrays.
      size: Number of vectors ``k``.
      dtype: Of the stack.

    Returns:
      A pytree of zeros ``(k, *shape)``.

    Example:
      >>> zeros_stack({"a": jnp.ones(3)}, 2, jnp.float32)["a"].shape
      (2, 3)
    """

    # Broadcasting a product with zero keeps the sharding in the type on an Explicit mesh.
    def zeros(leaf: jax.Array) -> jax.Array:
        return jax.lax.broadcast(jnp.zeros_like(leaf, dtype), (size,))

    return jax.tree.map(zeros, tree)


def moving_average(
    average: chex.ArrayTree, new: chex.ArrayTree, count: jax.Array, decay: chex.Numeric
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    r"""An exponential average over steps, and the same without its bias towards zero.

    .. math:: a_{t+1} = \beta a_t + (1 - \beta) x_t, \qquad
      \hat a_{t+1} = a_{t+1} / (1 - \beta^{t+1})

    Args:
      average: The biased average :math:`a_t`, zero at first.
      new: What is averaged, :math:`x_t`; entries that are not finite leave the average as it is.
      count: Steps before this one, :math:`t`.
      decay: :math:`\beta` in [0, 1).

    Returns:
      The new average, and the corrected one.

    Example:
      >>> average, corrected = moving_average(jnp.zeros(1), jnp.ones(1), jnp.int32(0), 0.5)
      >>> average.tolist(), corrected.tolist()
      ([0.5], [1.0])

    Source: Kingma, Ba (2015), Adam, section 3.
    """
    dtype = accumulation_dtype(average)
    decay = jnp.asarray(decay, dtype)
    moved = jax.tree.map(
        lambda a, x: jnp.where(jnp.isfinite(x), decay * a + (1 - decay) * x, a).astype(a.dtype),
        average,
        new,
    )
    correction = 1 - decay ** (count + 1)
    return moved, jax.tree.map(lambda a: a / correction, moved)


def random_vector(
    distribution: Distribution, key: chex.PRNGKey, tree: chex.ArrayTree
) -> chex.ArrayTree:
    """A vector of independent random numbers, each leaf sharded as the one that it belongs to.

    Args:
      distribution: ``"normal"``, ``"uniform"`` in (-1, 1) or ``"rademacher"``. Static.
      key: PRNG key. The numbers do not depend on the sharding.
      tree: One vector, a pytree of arrays.

    Returns:
      A pytree like it, float32 or wider.

    Example:
      >>> signs = random_vector("rademacher", jax.random.key(0), {"a": jnp.zeros(3)})
      >>> jnp.abs(signs["a"]).tolist()
      [1.0, 1.0, 1.0]
    """
    dtype = accumulation_dtype(tree)
    leaves, structure = jax.tree.flatten(tree)
    drawn = [
        shard_like(draw(distribution, key, leaf.shape, dtype, stream), leaf)
        for stream, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


def inner(x: chex.ArrayTree, y: chex.ArrayTree) -> jax.Array:
    r"""The inner product :math:`x^\top y` of two vectors.

    Args:
      x: A pytree of arrays.
      y: A pytree like it.

    Returns:
      A scalar, float32 or wider.

    Example:
      >>> float(inner({"a": jnp.ones(2)}, {"a": jnp.array([1.0, 2.0])}))
      3.0
    """
    dtype = accumulation_dtype((x, y))
    products = jax.tree.map(lambda a, b: jnp.sum(a.astype(dtype) * b.astype(dtype)), x, y)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))


def unit_scale(vector: chex.ArrayTree) -> jax.Array:
    r"""The power of two that brings the largest entry of a vector to :math:`[1/2, 1)`.

    Squares of numbers below 1e-19 or above 1e19 leave the range of float32. Times this they do not,
    and nothing is rounded.

    Args:
      vector: A pytree of arrays.

    Returns:
      A scalar, float32 or wider: 1 for a vector of zeros, NaN if an entry is not finite.

    Example:
      >>> [float(unit_scale(jnp.array([0.0, x]))) for x in (0.0, -3.0, 0.125, jnp.inf)]
      [1.0, 0.25, 4.0, nan]
    """
    dtype = accumulation_dtype(vector)
    leaves = [jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in jax.tree.leaves(vector)]
    largest = jnp.max(jnp.stack(leaves))
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 0))
    # The scale itself, and what it multiplies, stay in range.
    scale = jnp.ldexp(jnp.ones((), dtype), jnp.clip(-exponent, -120, 120))
    return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


def project(stack: chex.ArrayTree, columns: Sequence[chex.ArrayTree]) -> jax.Array:
    r"""The products :math:`V C` of all vectors of a stack with some others, in one pass over it.

    Args:
      stack: The vectors as rows of ``V``, a pytree of arrays ``(k, *shape)``.
      columns: ``j`` vectors as columns of ``C``, pytrees of arrays ``(*shape)``.

    Returns:
      Array ``(k, j)``, float32 or wider.

    Example:
      >>> stack = {"a": jnp.eye(2), "b": jnp.array([1.0, 2.0])}
      >>> vector = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(5.0)}
      >>> project(stack, [vector, vector]).tolist()
      [[8.0, 8.0], [14.0, 14.0]]
    """
    dtype = accumulation_dtype((stack, columns))
    leaves = jax.tree.leaves(stack)
    others = zip(*(jax.tree.leaves(column) for column in columns), strict=True)
    # The columns' axis comes last: with it first the compiler would transpose a copy.
    products = [
        _contract_all(rows, jnp.stack(other, axis=-1), dtype)
        for rows, other in zip(leaves, others, strict=True)
    ]
    return jnp.sum(jnp.stack(products), axis=0)


def combine(coefficients: jax.Array, stack: chex.ArrayTree) -> chex.ArrayTree:
    r"""The linear combination :math:`c^\top V` of the vectors of a stack.

    Args:
      coefficients: ``c``, array ``(k,)``.
      stack: The vectors as rows of ``V``, a pytree of arrays ``(k, *shape)``.

    Returns:
      One vector, a pytree of arrays ``(*shape)``, float32 or wider.

    Example:
      >>> combine(jnp.array([1.0, -1.0]), {"a": jnp.array([[3.0, 4.0], [1.0, 1.0]])})["a"].tolist()
      [2.0, 3.0]
    """
    dtype = accumulation_dtype(stack)
    return jax.tree.map(lambda rows: _weighted_sum(coefficients, rows, dtype), stack)


def read(stack: chex.ArrayTree, index: jax.Array) -> chex.ArrayTree:
    """One vector of a stack.

    Args:
      stack: A pytree of arrays ``(k, *shape)``.
      index: Which, a scalar.

    Returns:
      A pytree of arrays ``(*shape)``, in the dtype of the stack.

    Example:
      >>> read({"a": jnp.array([[1.0], [2.0]])}, 1)["a"].tolist()
      [2.0]
    """
    return jax.tree.map(
        lambda rows: jax.lax.dynamic_index_in_dim(rows, index, keepdims=False), stack
    )


def write(stack: chex.ArrayTree, index: jax.Array, vector: chex.ArrayTree) -> chex.ArrayTree:
    """Replaces one vector of a stack; in place where the stack is donated.

    Args:
      stack: A pytree of arrays ``(k, *shape)``.
      index: Which, a scalar.
      vector: A pytree of arrays ``(*shape)``; cast to the dtype of the stack.

    Returns:
      The new stack.

    Example:
      >>> write({"a": jnp.zeros((2, 1))}, 1, {"a": jnp.ones(1)})["a"].tolist()
      [[0.0], [1.0]]
    """
    return jax.tree.map(
        lambda rows, row: jax.lax.dynamic_update_index_in_dim(
            rows, row.astype(rows.dtype), index, 0
        ),
        stack,
        vector,
    )


def _contract_all(rows: jax.Array, columns: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``rows (k, *shape)`` times ``columns (*shape, j)``, over all of ``shape``."""
    count = columns.shape[-1]
    if rows.dtype.itemsize < 4:
        columns = jnp.concatenate(_split(columns, rows.dtype), axis=-1)
    axes = (tuple(range(1, rows.ndim)), tuple(range(columns.ndim - 1)))
    products = contract(rows, columns.astype(rows.dtype), axes, dtype)
    return jnp.sum(products.reshape(len(rows), -1, count), axis=1)


def _weighted_sum(coefficients: jax.Array, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``coefficients (k,)`` times ``rows (k, *shape)``."""
    if rows.dtype.itemsize >= 4:
        return contract(coefficients.astype(rows.dtype), rows, ((0,), (0,)), dtype)
    parts = jnp.stack(_split(coefficients, rows.dtype))
    return jnp.sum(contract(parts, rows, ((1,), (0,)), dtype), axis=0)


def _split(array: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """An array as a sum of arrays of a narrower dtype, largest first."""
    parts = []
    for _ in range(_PARTS):
        parts.append(array.astype(dtype))
        array = array - parts[-1].astype(array.dtype)
    return parts
