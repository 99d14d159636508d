"""Limited-memory BFGS on an inverse factor, started from the identity.

The inverse is not stored; it is what ``p`` pairs make of ``H₀ = I``. With the kept pairs as rows of
``S`` and ``Y`` (p, n), oldest first and scaled to ``sᵢᵀyᵢ = 1``, and ``R = triu(S Yᵀ)``::

    U = R⁻¹ S,    H = (I - Yᵀ U)ᵀ (I - Yᵀ U) + Uᵀ U.

This is the two loops of L-BFGS with matrix products in place of the loops: ``I - YᵀU`` is the first
loop for all pairs at once. It equals the usual compact form, which multiplies it out. The product
form needs no Gram matrix of ``Y``, is a sum of squares, and is more accurate in float32: it does
not square the condition of ``S`` and ``Y``.

Nothing is shifted or sorted. A new pair takes the row of the one that is forgotten, and ``R⁻¹`` is
kept in the order of the rows: a new pair adds one column to it, and forgetting a pair is a change
of rank one. Which pair a full memory forgets is a choice. The oldest is the usual one; but a
direction that only it knew then falls back to ``H₀``, and if the curvature there is large the next
steps are too long. The pairs of K-BFGS are running averages, so most of them nearly repeat a
neighbor: forgetting the one whose step a newer step repeats best loses next to nothing.
"""

from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from secondorder.factors.pairs import Pair, normalize_pair
from secondorder.products import inner, matmul

Forget: TypeAlias = Literal["redundant", "oldest"]


class InverseMemory(NamedTuple):
    """Up to ``p`` pairs of an inverse factor.

    Attributes:
      s: scaled steps (p, n); the row of an empty slot is zero.
      y: scaled changes of the gradient (p, n), with ``sᵢᵀyᵢ = 1``.
      triangle_inverse: ``R⁻¹`` (p, p), its rows and columns in the order of the slots; those of an
        empty slot are of the identity.
      accepted: number of pairs accepted so far, int32 scalar.
      numbers: which of them each slot holds (p,), int32, counted from 0; -1 for an empty slot.
    """

    s: jax.Array
    y: jax.Array
    triangle_inverse: jax.Array
    accepted: jax.Array
    numbers: jax.Array


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
        numbers=jnp.full(memory_size, -1, jnp.int32),
    )


def push_pair(
    memory: InverseMemory, pair: Pair, accept: ArrayLike = True, forget: Forget = "redundant"
) -> InverseMemory:
    """Appends a pair, in place of another if the memory is full; or changes nothing.

    O(p² n) operations, or O(p n + p²) if the oldest is forgotten. The memory is returned unchanged,
    bit for bit, if the pair is rejected or if anything is non-finite.

    Args:
      memory: memory of ``p`` pairs.
      pair: damped curvature pair, vectors (n,).
      accept: boolean scalar, see `accept_pair`; ``sᵀy > 0`` is required in any case.
      forget: which pair a full memory forgets, see `forget_scores`; static.

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
    gram = matmul(memory.s, memory.s.T) if forget == "redundant" else None
    direction = pair.s / jnp.where(usable, jnp.sqrt(inner(pair.s, pair.s)), 1)
    scores = forget_scores(memory.numbers, gram, matmul(memory.s, direction), forget)
    bookkeeping = Bookkeeping(memory.triangle_inverse, memory.accepted, memory.numbers)
    bookkeeping, slot = extend_triangle(bookkeeping, matmul(memory.s, pair.y), usable, scores)
    return InverseMemory(*write_pair(memory, pair, slot), *bookkeeping)


class Bookkeeping(NamedTuple):
    """The part of a memory whose size does not depend on that of the factor.

    Attributes:
      triangle_inverse: ``R⁻¹`` (p, p).
      accepted: number of pairs accepted so far.
      numbers: which of them each slot holds (p,).
    """

    triangle_inverse: jax.Array
    accepted: jax.Array
    numbers: jax.Array


def forget_scores(
    numbers: jax.Array,
    gram: jax.Array | None,
    products: jax.Array,
    forget: Forget = "redundant",
) -> jax.Array:
    """Tells how dispensable each pair is; a full memory forgets the one with the largest score.

    ``"redundant"`` takes the largest cosine between a step and a newer one, the one to come
    included, ``"oldest"`` the age. An empty slot has an infinite score.

    Args:
      numbers: number of the pair in each slot (p,), -1 if it is empty.
      gram: ``S Sᵀ`` (p, p); not needed for ``"oldest"``.
      products: ``S s/|s|`` (p,) for the step to come.
      forget: the rule, static.

    Returns:
      Scores (p,).

    Raises:
      ValueError: if ``forget`` is not one of the two names.

    Example:
      >>> s = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> forget_scores(jnp.array([0, 1]), s @ s.T, s @ jnp.array([0.0, 1.0])).tolist()
      [0.0, 1.0]
    """
    if forget not in get_args(Forget):
        raise ValueError(f"forget must be one of {get_args(Forget)}, got {forget!r}")
    if forget == "oldest":
        scores = -numbers.astype(products.dtype)
    else:
        assert gram is not None
        squares = jnp.diagonal(gram)
        inverse_norms = jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
        cosines = jnp.abs(gram) * inverse_norms
        newer = numbers[None, :] > numbers[:, None]
        repeated = jnp.max(jnp.where(newer, cosines, 0), axis=1)
        scores = inverse_norms * jnp.maximum(repeated, jnp.abs(products))
    return jnp.where(numbers < 0, jnp.inf, scores)


def extend_triangle(
    bookkeeping: Bookkeeping, projections: jax.Array, accept: ArrayLike, scores: jax.Array
) -> tuple[Bookkeeping, jax.Array]:
    """Appends a pair to the triangle of a memory, without touching the stored vectors.

    Forgetting pair ``i`` deletes its row and column from ``R``, and leaves of ``T = R⁻¹``, whose
    diagonal is one,

        ``T - T eᵢ eᵢᵀ T``,

    a row of which is nothing but itself for the oldest pair. With ``rⱼ = sⱼᵀ y`` for the pairs
    kept, the new column is then

        ``[R r; 0 1]⁻¹ = [T -T r; 0 1]``.

    Args:
      bookkeeping: the bookkeeping of a memory of ``p`` pairs.
      projections: ``S y`` (p,) for a pair with ``sᵀy = 1``.
      accept: boolean scalar; if false nothing changes.
      scores: how dispensable the pair in each slot is (p,), see `forget_scores`.

    Returns:
      The new bookkeeping, and the slot (p,) for the pair as a mask, empty if it is not used.

    Example:
      >>> memory = init_memory(memory_size=2, n=1)
      >>> before = Bookkeeping(memory.triangle_inverse, memory.accepted, memory.numbers)
      >>> after, slot = extend_triangle(before, memory.s @ jnp.array([0.5]), True, jnp.ones(2))
      >>> int(after.accepted), slot.tolist()
      (1, [True, False])
    """
    triangle, accepted, numbers = bookkeeping
    slot = jnp.arange(len(projections)) == jnp.argmax(scores)
    unit = slot.astype(triangle.dtype)
    without = triangle - matmul(triangle, unit)[:, None] * matmul(unit, triangle)
    kept = jnp.where(slot[:, None] | slot, 0, without)
    column = unit - matmul(kept, jnp.where(slot, 0, projections))
    use = jnp.asarray(accept) & jnp.isfinite(jnp.sum(jnp.abs(column)))
    return (
        Bookkeeping(
            jnp.where(use, jnp.where(slot, column[:, None], kept), triangle),
            accepted + use.astype(accepted.dtype),
            jnp.where(slot & use, accepted, numbers),
        ),
        slot & use,
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
