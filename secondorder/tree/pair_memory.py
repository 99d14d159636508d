r"""A memory of curvature pairs: vectors as pytrees, and their Gram matrix.

The last ``m`` pairs ``(s, y)`` are the rows ``S`` and ``Y`` of one stack of ``2 m`` vectors, a
ring in which nothing is shifted. With them is kept the Gram matrix

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

from secondorder.tree.vectors import accumulation_dtype, project, read, write, zeros_stack


class PairMemory(NamedTuple):
    """The last ``m`` pairs.

    Attributes:
      vectors: The rows of ``S`` and then those of ``Y``, a pytree of arrays ``(2 m, *shape)``.
      gram: Their inner products ``(2 m, 2 m)``, but for those with the newest pair.
      numbers: Which pair each slot holds ``(m,)``, int32, counted from 0; -1 for an empty slot.
      written: Number of pairs written so far, int32 scalar.
    """

    vectors: chex.ArrayTree
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
      >>> memory.vectors["a"].shape, memory.numbers.tolist()
      ((4, 3), [-1, -1])
    """
    wide = accumulation_dtype(params)
    return PairMemory(
        vectors=zeros_stack(params, 2 * size, wide if dtype is None else dtype),
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


def project_on_pairs(memory: PairMemory, vector: chex.ArrayTree) -> tuple[PairMemory, jax.Array]:
    """Multiplies all stored vectors with one, and completes the Gram matrix, in one pass.

    Args:
      memory: A memory of ``m`` pairs.
      vector: A pytree of arrays, sharded as the parameters.

    Returns:
      The memory with its whole Gram matrix, and the products ``(2 m,)``.

    Example:
      >>> memory = push_pair(init_pairs(jnp.ones(2), 1), jnp.array([2.0, 0.0]), jnp.ones(2), True)
      >>> memory, products = project_on_pairs(memory, jnp.array([1.0, 10.0]))
      >>> products.tolist(), memory.gram.tolist()
      ([2.0, 11.0], [[4.0, 2.0], [2.0, 2.0]])
    """
    slot, size = newest_slot(memory), len(memory.numbers)
    places = slot, size + slot
    newest = [read(memory.vectors, place) for place in places]
    products = project(memory.vectors, [*newest, vector])
    gram = memory.gram
    for column, place in enumerate(places):
        at = jnp.arange(2 * size) == place
        row = products[:, column].astype(gram.dtype)
        gram = jnp.where(at[:, None], row, jnp.where(at, row[:, None], gram))
    return memory._replace(gram=gram), products[:, 2]


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
    vectors = memory.vectors
    for place, vector in ((slot, s), (size + slot, y)):
        old = read(vectors, place)
        kept = jax.tree.map(lambda n, o: jnp.where(accept, n.astype(o.dtype), o), vector, old)
        vectors = write(vectors, place, kept)
    here = (jnp.arange(size) == slot) & accept
    return PairMemory(
        vectors=vectors,
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
