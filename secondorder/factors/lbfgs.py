"""Limited-memory BFGS on an inverse factor, started from the identity.

The inverse is not stored; it is what ``p`` pairs make of ``H₀ = I``. With the kept pairs as rows of
``S`` and ``Y`` (p, n), oldest first and scaled to ``sᵢᵀyᵢ = 1``, and ``R = triu(S Yᵀ)``::

    U = R⁻¹ S,    H = (I - Yᵀ U)ᵀ (I - Yᵀ U) + Uᵀ U.

This is the two loops of L-BFGS with matrix products in place of the loops: ``I - YᵀU`` is the first
loop for all pairs at once. It equals the usual compact form, which multiplies it out. The product
form needs no Gram matrix of ``Y``, is a sum of squares, and is more accurate in float32: it does
not square the condition of ``S`` and ``Y``.

Nothing is shifted or sorted. Pair number ``c`` is written to row ``c mod p``, and ``R⁻¹`` is kept
in the order of the rows: a new pair adds one column to it, and forgetting the oldest pair deletes
that pair's row and column, which is exact because the oldest pair comes first in ``R``. Every
column is computed once and lives for ``p`` pairs, so rounding does not build up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from secondorder.factors.pairs import Pair, normalize_pair
from secondorder.factors.products import inner, matmul


class InverseMemory(NamedTuple):
    """The last ``p`` pairs of an inverse factor, as a ring.

    Attributes:
      s: scaled steps (p, n); the row of an empty slot is zero.
      y: scaled changes of the gradient (p, n), with ``sᵢᵀyᵢ = 1``.
      triangle_inverse: ``R⁻¹`` (p, p), its rows and columns in the order of the slots; those of an
        empty slot are of the identity.
      accepted: number of pairs accepted so far, int32 scalar; the next slot is ``accepted % p``.
    """

    s: jax.Array
    y: jax.Array
    triangle_inverse: jax.Array
    accepted: jax.Array


def init_memory(memory_size: int, n: int, dtype: DTypeLike = jnp.float32) -> InverseMemory:
    """Returns the empty memory, whose inverse is the identity.

    Args:
      memory_size: number of pairs ``p`` to keep, at least 1, static.
      n: size of the factor, static.
      dtype: float32 or wider.

    Returns:
      Empty memory.

    Raises:
      ValueError: if ``memory_size`` is less than 1.

    Example:
      >>> memory = init_memory(memory_size=4, n=2)
      >>> inverse_product(memory, jnp.array([1.0, 2.0])).tolist()
      [1.0, 2.0]
    """
    if memory_size < 1:
        raise ValueError(f"memory_size must be at least 1, got {memory_size}")
    return InverseMemory(
        s=jnp.zeros((memory_size, n), dtype),
        y=jnp.zeros((memory_size, n), dtype),
        triangle_inverse=jnp.eye(memory_size, dtype=dtype),
        accepted=jnp.zeros((), jnp.int32),
    )


def push_pair(memory: InverseMemory, pair: Pair, accept: ArrayLike = True) -> InverseMemory:
    """Appends a pair, in place of the oldest one if the memory is full; or changes nothing.

    With ``rᵢ = sᵢᵀ y`` for the pairs kept, the new column of the inverse triangle is

        ``[R r; 0 1]⁻¹ = [R⁻¹ -R⁻¹r; 0 1]``.

    O(p n + p²) operations. The memory is returned unchanged, bit for bit, if the pair is rejected
    or if anything is non-finite.

    Args:
      memory: memory of ``p`` pairs.
      pair: damped curvature pair, vectors (n,).
      accept: boolean scalar, see `accept_pair`; ``sᵀy > 0`` is required in any case.

    Returns:
      The new memory.

    Example:
      >>> pair = Pair(s=jnp.array([1.0, 0.0]), y=jnp.array([4.0, 2.0]))
      >>> memory = push_pair(init_memory(memory_size=4, n=2), pair)
      >>> inverse_product(memory, pair.y).tolist()
      [1.0, 0.0]

    Source: Goldfarb, Ren, Bahamou (2020), arXiv 2006.08877, K-BFGS(L).
    """
    pair = Pair(pair.s.astype(memory.s.dtype), pair.y.astype(memory.y.dtype))
    pair = normalize_pair(pair, accept)
    usable = jnp.isfinite(inner(pair.s, pair.s) + inner(pair.y, pair.y)) & jnp.any(pair.s != 0)
    bookkeeping = Bookkeeping(memory.triangle_inverse, memory.accepted)
    bookkeeping, slot = extend_triangle(bookkeeping, matmul(memory.s, pair.y), usable)
    return InverseMemory(*write_pair(memory, pair, slot), *bookkeeping)


class Bookkeeping(NamedTuple):
    """The part of a memory whose size does not depend on that of the factor.

    Attributes:
      triangle_inverse: ``R⁻¹`` (p, p).
      accepted: number of pairs accepted so far.
    """

    triangle_inverse: jax.Array
    accepted: jax.Array


def extend_triangle(
    bookkeeping: Bookkeeping, projections: jax.Array, accept: ArrayLike
) -> tuple[Bookkeeping, jax.Array]:
    """Appends a pair to the triangle of a memory, without touching the stored vectors.

    Args:
      bookkeeping: the bookkeeping of a memory of ``p`` pairs.
      projections: ``S y`` (p,) for a pair with ``sᵀy = 1``.
      accept: boolean scalar; if false nothing changes.

    Returns:
      The new bookkeeping, and the slot (p,) for the pair as a mask, empty if it is not used.

    Example:
      >>> memory = init_memory(memory_size=2, n=1)
      >>> before = Bookkeeping(memory.triangle_inverse, memory.accepted)
      >>> after, slot = extend_triangle(before, memory.s @ jnp.array([0.5]), True)
      >>> int(after.accepted), slot.tolist()
      (1, [True, False])
    """
    slots = jnp.arange(len(projections))
    oldest = slots == bookkeeping.accepted % len(projections)
    kept = jnp.where(oldest[:, None] | oldest, 0, bookkeeping.triangle_inverse)
    column = oldest.astype(kept.dtype) - matmul(kept, jnp.where(oldest, 0, projections))
    use = jnp.asarray(accept) & jnp.isfinite(jnp.sum(jnp.abs(column)))
    extended = jnp.where(oldest, column[:, None], kept)
    return (
        Bookkeeping(
            jnp.where(use, extended, bookkeeping.triangle_inverse),
            bookkeeping.accepted + use.astype(bookkeeping.accepted.dtype),
        ),
        oldest & use,
    )


def write_pair(memory: InverseMemory, pair: Pair, slot: jax.Array) -> Pair:
    """Returns the stored vectors of a memory with a pair in a slot.

    Args:
      memory: memory of ``p`` pairs.
      pair: pair with ``sᵀy = 1``, vectors (n,).
      slot: mask (p,) from `extend_triangle`.

    Returns:
      ``S`` and ``Y`` (p, n).

    Example:
      >>> memory = init_memory(memory_size=2, n=1)
      >>> pair = Pair(jnp.array([2.0]), jnp.array([0.5]))
      >>> write_pair(memory, pair, jnp.array([False, True])).s.tolist()
      [[0.0], [2.0]]
    """
    row = slot[:, None]
    return Pair(jnp.where(row, pair.s, memory.s), jnp.where(row, pair.y, memory.y))


def inverse_product(memory: InverseMemory, v: jax.Array) -> jax.Array:
    """Returns ``v H`` for the inverse ``H``, symmetric, that the memory stands for.

    ``U = R⁻¹ S`` is not formed; with ``u = v Sᵀ R⁻ᵀ`` and ``z = v - u Y``,

        ``v H = z + (u - z Yᵀ) R⁻¹ S``.

    8 p n k + 4 p² k operations, all in matrix products.

    Args:
      memory: memory of ``p`` pairs, possibly none.
      v: vector (n,) or rows (k, n).

    Returns:
      Array of the shape of ``v``.

    Example:
      >>> memory = push_pair(init_memory(2, 2), Pair(jnp.array([1.0, 0.0]), jnp.array([4.0, 0.0])))
      >>> inverse_product(memory, jnp.array([[4.0, 1.0]])).tolist()
      [[1.0, 1.0]]

    Source: the compact form of Byrd, Nocedal, Schnabel (1994), which Goldfarb, Ren, Bahamou (2020),
    arXiv 2006.08877, use for K-BFGS(L), here in product form.
    """
    u = matmul(matmul(v, memory.s.T), memory.triangle_inverse.T)
    z = v - matmul(u, memory.y)
    return z + matmul(matmul(u - matmul(z, memory.y.T), memory.triangle_inverse), memory.s)


def inverse_matrix(memory: InverseMemory) -> jax.Array:
    """Returns the dense inverse ``H = (I - YᵀU)ᵀ (I - YᵀU) + UᵀU`` with ``U = R⁻¹ S``.

    For ``n < 2 p`` it is cheaper to multiply by this matrix than to call `inverse_product` on many
    columns. 4 p n² + 2 n³ + 2 p² n operations.

    Args:
      memory: memory of ``p`` pairs, possibly none.

    Returns:
      Matrix (n, n), symmetric up to rounding.

    Example:
      >>> memory = push_pair(init_memory(2, 2), Pair(jnp.array([1.0, 0.0]), jnp.array([4.0, 0.0])))
      >>> inverse_matrix(memory).tolist()
      [[0.25, 0.0], [0.0, 1.0]]
    """
    u = matmul(memory.triangle_inverse, memory.s)
    first_loop = jnp.eye(memory.s.shape[1], dtype=memory.s.dtype) - matmul(memory.y.T, u)
    return matmul(first_loop.T, first_loop) + matmul(u.T, u)
