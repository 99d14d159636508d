r"""A memory of curvature pairs: vectors as pytrees, and their Gram matrix.

The last ``m`` pairs ``(s, y)`` are the rows of two stacks ``S`` and ``Y``, a ring in which nothing
is shifted. (In one stack of both, the compiler would copy it to write two rows.) With them is kept
the Gram matrix

.. math:: \begin{pmatrix} S S^\top & S Y^\top \\ Y S^\top & Y Y^\top \end{pmatrix},

of which a new pair changes two rows and columns. These are not computed when the pair is written
but at the next look at the memory, together with the products with the gradient: so each step
reads the memory once for all its inner products, and once more to combine a step.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from secondorder.tree.vectors import (
    accumulation_dtype,
    combine,
    project,
    read,
    write,
    zeros_stack,
)


class PairMemory(NamedTuple):
    """The last ``m`` pairs.

    Attributes:
      vectors: The stacks ``S`` and ``Y``, two pytrees of arrays ``(m, *shape)``.
      gram: Their inner products ``(2 m, 2 m)``, but for those with the newest pair.
      numbers: Which pair each slot holds ``(m,)``, int32, counted from 0; -1 for an empty slot.
      written: Number of pairs written so far, int32 scalar.
    """

    vectors: tuple[chex.ArrayTree, chex.ArrayTree]
    gram: jax.Array
    numbers: jax.Array
    written: jax.Array


def init_pairs(params: chex.ArrayTree, size: int, dtype: DTypeLike | None = None) -> PairMemory:
    """An empty memory.

    Args:
      params: One vector, a pytree of arrays.
      size: Number of pairs ``m``, at least 1, static.
      dtype: Of the stored vectors; by default that of inner products, at least float32.

    Returns:
      The memory.

    Example:
      >>> memory = init_pairs({"a": jnp.ones(3)}, 2)
      >>> memory.vectors[0]["a"].shape, memory.numbers.tolist()
      ((2, 3), [-1, -1])
    """
    wide = accumulation_dtype(params)
    stored = wide if dtype is None else dtype
    return PairMemory(
        vectors=(zeros_stack(params, size, stored), zeros_stack(params, size, stored)),
        gram=jnp.zeros((2 * size, 2 * size), wide),
        numbers=jnp.full(size, -1, jnp.int32),
        written=jnp.zeros((), jnp.int32),
    )


def newest_slot(memory: PairMemory) -> jax.Array:
    """The slot of the pair that was written last; any, if none was.

    Args:
      memory: A memory of ``m`` pairs.

    Returns:
      Index in ``[0, m)``, a scalar.

    Example:
      >>> int(newest_slot(init_pairs(jnp.ones(3), 2)))
      1
    """
    return (memory.written - 1) % len(memory.numbers)


def project_on_pairs(memory: PairMemory, *columns: chex.ArrayTree) -> tuple[PairMemory, jax.Array]:
    """Multiplies all stored vectors with some others, and completes the Gram matrix, in one pass.

    Args:
      memory: A memory of ``m`` pairs.
      *columns: ``j`` vectors, pytrees of arrays, sharded as the parameters.

    Returns:
      The memory with its whole Gram matrix, and the products ``(2 m, j)``.

    Example:
      >>> memory = push_pair(init_pairs(jnp.ones(2), 1), jnp.array([2.0, 0.0]), jnp.ones(2), True)
      >>> memory, products = project_on_pairs(memory, jnp.array([1.0, 10.0]))
      >>> products[:, 0].tolist(), memory.gram.tolist()
      ([2.0, 11.0], [[4.0, 2.0], [2.0, 2.0]])
    """
    slot, size = newest_slot(memory), len(memory.numbers)
    newest = [read(stack, slot) for stack in memory.vectors]
    products = jnp.concatenate([project(stack, [*newest, *columns]) for stack in memory.vectors])
    gram = memory.gram
    for column, place in enumerate((slot, size + slot)):
        at = jnp.arange(2 * size) == place
        row = products[:, column].astype(gram.dtype)
        gram = jnp.where(at[:, None], row, jnp.where(at, row[:, None], gram))
    return memory._replace(gram=gram), products[:, 2:]


def combine_pairs(coefficients: jax.Array, memory: PairMemory) -> chex.ArrayTree:
    """A linear combination of all stored vectors, in one pass over them.

    Args:
      coefficients: Of the steps and then of the changes ``(2 m,)``.
      memory: A memory of ``m`` pairs.

    Returns:
      One vector, float32 or wider.

    Example:
      >>> memory = push_pair(init_pairs(jnp.ones(1), 1), jnp.array([2.0]), jnp.array([3.0]), True)
      >>> combine_pairs(jnp.array([10.0, 1.0]), memory).tolist()
      [23.0]
    """
    size = len(memory.numbers)
    first, second = memory.vectors
    parts = combine(coefficients[:size], first), combine(coefficients[size:], second)
    return jax.tree.map(jnp.add, *parts)


def push_pair(
    memory: PairMemory, s: chex.ArrayTree, y: chex.ArrayTree, accept: ArrayLike
) -> PairMemory:
    """Writes a pair in place of the oldest one; or changes nothing.

    Args:
      memory: A memory of ``m`` pairs.
      s: A step, a pytree of arrays.
      y: The change of the gradient along it.
      accept: Boolean scalar. The vectors need not be finite if it is false.

    Returns:
      The new memory, whose Gram matrix lacks the products with the new pair.

    Example:
      >>> memory = push_pair(init_pairs(jnp.ones(1), 2), jnp.ones(1), jnp.ones(1), True)
      >>> memory.numbers.tolist()
      [0, -1]
    """
    size = len(memory.numbers)
    slot = memory.written % size

    def keep_or_replace(stack: chex.ArrayTree, vector: chex.ArrayTree) -> chex.ArrayTree:
        old = read(stack, slot)
        row = jax.tree.map(lambda n, o: jnp.where(accept, n.astype(o.dtype), o), vector, old)
        return write(stack, slot, row)

    first, second = memory.vectors
    here = (jnp.arange(size) == slot) & accept
    return PairMemory(
        vectors=(keep_or_replace(first, s), keep_or_replace(second, y)),
        gram=memory.gram,
        numbers=jnp.where(here, memory.written, memory.numbers),
        written=memory.written + jnp.asarray(accept, jnp.int32),
    )


def drop_pairs(memory: PairMemory, drop: ArrayLike) -> PairMemory:
    """Empties a memory, without touching the stored vectors.

    Args:
      memory: A memory.
      drop: Boolean scalar; if false nothing changes.

    Returns:
      The memory, every slot of which is empty if ``drop``.

    Example:
      >>> memory = push_pair(init_pairs(jnp.ones(1), 2), jnp.ones(1), jnp.ones(1), True)
      >>> drop_pairs(memory, True).numbers.tolist()
      [-1, -1]
    """
    return memory._replace(numbers=jnp.where(drop, -1, memory.numbers))
