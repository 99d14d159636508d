r"""The compact form of limited-memory SR1, in algebra of the size of the memory.

With pairs ``(s, y)`` as columns of ``S`` and ``Y``, oldest first, and ``B₀ = γ I``::

    B = γ I + Ψ W Ψᵀ,   Ψ = Y - γ S,   W = M⁻¹,   M = D + L + Lᵀ - γ SᵀS,

where ``D + L`` is the lower triangle of ``SᵀY``. Everything here follows from the Gram matrix of
the pairs. ``M`` is never inverted as a whole: ``γ`` changes at every step, and a pair that was safe
for one may be singular for another, so all pairs are tested anew, in the order in which they came,
and ``W`` grows by rank one with each that passes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from secondorder.products import matmul


class PairGram(NamedTuple):
    """Inner products of ``m`` pairs.

    Attributes:
      ss: ``SᵀS`` (m, m); zero for empty slots, as are the others.
      sy: ``SᵀY`` (m, m), with ``sy[i, j] = sᵢᵀyⱼ``.
      yy: ``YᵀY`` (m, m).
      numbers: the order of the pairs (m,), larger is newer; negative for an empty slot.
    """

    ss: jax.Array
    sy: jax.Array
    yy: jax.Array
    numbers: jax.Array


class CompactSR1(NamedTuple):
    """A limited-memory SR1 matrix ``B = γ I + Ψ W Ψᵀ``.

    Attributes:
      scale: ``γ``.
      weights: ``W`` (m, m), symmetric; zero in the rows of pairs that are not used.
      used: which pairs passed the tests (m,).
      residual_gram: ``ΨᵀΨ`` (m, m).
    """

    scale: jax.Array
    weights: jax.Array
    used: jax.Array
    residual_gram: jax.Array


class SR1Eigenbasis(NamedTuple):
    """``B = P diag(λ) Pᵀ + γ (I - P Pᵀ)`` with ``P = Ψ E``.

    Attributes:
      eigenvalues: ``λ`` (m,); ``γ`` where not ``kept``.
      directions: ``E`` (m, m), its columns zero where not ``kept``.
      kept: which columns of ``P`` are real directions (m,).
    """

    eigenvalues: jax.Array
    directions: jax.Array
    kept: jax.Array


def pair_gram(gram: jax.Array, numbers: jax.Array) -> PairGram:
    """Cuts the Gram matrix of the rows ``s₁ .. s_m, y₁ .. y_m`` into its blocks.

    Args:
      gram: Gram matrix (2 m, 2 m).
      numbers: the order of the pairs (m,); negative for an empty slot, whose rows are cleared.

    Returns:
      The blocks.

    Example:
      >>> pairs = pair_gram(jnp.array([[1.0, 2.0], [2.0, 5.0]]), jnp.array([0]))
      >>> float(pairs.ss[0, 0]), float(pairs.sy[0, 0]), float(pairs.yy[0, 0])
      (1.0, 2.0, 5.0)
    """
    m, valid = len(numbers), numbers >= 0
    both = valid[:, None] & valid
    ss, sy, yy = (jnp.where(both, block, 0) for block in (gram[:m, :m], gram[:m, m:], gram[m:, m:]))
    return PairGram(ss, sy, yy, numbers)


def middle_matrix(pairs: PairGram, scale: ArrayLike = 0.0) -> jax.Array:
    """Returns ``M = D + L + Lᵀ - γ SᵀS`` in the order of the slots.

    For pairs of one constant Hessian ``H`` this is ``Sᵀ(H - γ I)S``.

    Args:
      pairs: inner products of m pairs.
      scale: ``γ``.

    Returns:
      Symmetric matrix (m, m).

    Example:
      >>> pairs = pair_gram(jnp.array([[1.0, 2.0], [2.0, 5.0]]), jnp.array([0]))
      >>> middle_matrix(pairs, 0.5).tolist()
      [[1.5]]

    Source: Byrd, Nocedal, Schnabel (1994), Representations of quasi-Newton matrices, theorem 5.1.
    """
    newer = pairs.numbers[:, None] >= pairs.numbers
    return jnp.where(newer, pairs.sy, pairs.sy.T) - scale * pairs.ss


def compact_sr1(
    pairs: PairGram,
    scale: ArrayLike,
    skip: ArrayLike = 1e-8,
    redundant: ArrayLike | None = None,
) -> CompactSR1:
    """Builds an SR1 matrix from the pairs that are safe to use.

    With ``Bᵢ`` the matrix of the pairs used before the i-th and ``rᵢ = yᵢ - Bᵢ sᵢ``, the pair is
    used if

        ``|sᵢᵀrᵢ| ≥ skip ‖sᵢ‖ ‖rᵢ‖``   and   ``‖rᵢ‖ ≥ redundant (‖yᵢ‖ + |γ| ‖sᵢ‖)``.

    The second test leaves out pairs that the matrix explains already: both sides of the first are
    rounding errors then, and their ratio says nothing.

    Args:
      pairs: inner products of m pairs.
      scale: ``γ``.
      skip: threshold of the first test, in [0, 1).
      redundant: threshold of the second, in [0, 1); by default 1e-3 in float32 and 1e-6 in
        float64, since norms from a Gram matrix resolve half of the digits.

    Returns:
      The matrix.

    Example:
      >>> pairs = pair_gram(jnp.array([[1.0, 2.0], [2.0, 4.0]]), jnp.array([0]))  # y = 2 s
      >>> matrix = compact_sr1(pairs, scale=0.5)
      >>> float(matrix.scale + matrix.residual_gram[0, 0] * matrix.weights[0, 0])
      2.0

    Source: Nocedal, Wright (2006), Numerical Optimization, equations 6.24 to 6.26, for the first
    test; Byrd, Nocedal, Schnabel (1994) for the form.
    """
    dtype = pairs.ss.dtype
    scale, skip = jnp.asarray(scale, dtype), jnp.asarray(skip, dtype)
    if redundant is None:
        redundant = 1e-3 if dtype == jnp.float32 else 1e-6
    middle, gram = middle_matrix(pairs, scale), _residual_gram(pairs, scale)
    s_norms, y_norms = (_root(jnp.diagonal(block)) for block in (pairs.ss, pairs.yy))
    units = jnp.eye(len(gram), dtype=dtype)

    def add_pair(
        position: jax.Array, state: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        weights, used = state
        i = order[position]
        known = middle[i] * used  # Ψᵀs of the pairs before
        residual = units[i] - matmul(weights, known)  # r = Ψ residual
        pivot = middle[i, i] - jnp.sum(known * matmul(weights, known))  # sᵀr
        norm = _root(jnp.sum(residual * matmul(gram, residual)))
        is_safe = jnp.abs(pivot) >= skip * s_norms[i] * norm
        is_new = norm > redundant * (y_norms[i] + jnp.abs(scale) * s_norms[i])
        use = (pairs.numbers[i] >= 0) & is_safe & is_new & (pivot != 0)
        grown = weights + jnp.outer(residual, residual / jnp.where(use, pivot, 1))
        use = use & jnp.isfinite(jnp.sum(jnp.abs(grown)))
        return jnp.where(use, grown, weights), used | (use & (units[i] == 1))

    order = jnp.argsort(pairs.numbers)
    start = jnp.zeros_like(gram), jnp.zeros(len(gram), bool)
    weights, used = jax.lax.fori_loop(0, len(gram), add_pair, start)
    return CompactSR1(scale, (weights + weights.T) / 2, used, gram)


def sr1_eigenbasis(matrix: CompactSR1, rank_tolerance: ArrayLike | None = None) -> SR1Eigenbasis:
    """Diagonalizes an SR1 matrix without touching a long vector.

    An orthonormal basis ``Q = Ψ C`` of the range of ``Ψ`` comes from the eigenvectors of its Gram
    matrix, scaled to a unit diagonal; the directions that this cannot resolve are left out. In
    that basis ``Ψ W Ψᵀ`` is a small matrix with the eigenvectors ``U``, and ``E = C U``.

    Args:
      matrix: the matrix, of m pairs.
      rank_tolerance: eigenvalues of the scaled Gram matrix below this fraction of the largest are
        left out; by default 1e-6 in float32 and 1e-12 in float64.

    Returns:
      The eigenbasis.

    Example:
      >>> pairs = pair_gram(jnp.array([[1.0, 2.0], [2.0, 4.0]]), jnp.array([0]))  # y = 2 s
      >>> sr1_eigenbasis(compact_sr1(pairs, scale=0.5)).eigenvalues.tolist()
      [2.0]
    """
    gram, dtype = matrix.residual_gram, matrix.residual_gram.dtype
    if rank_tolerance is None:
        rank_tolerance = 1e-6 if dtype == jnp.float32 else 1e-12
    # Unused pairs have no weight, and would only blur the basis of the others.
    basis, resolved = orthonormal_combinations(gram, matrix.used, rank_tolerance)
    coordinates = matmul(basis.T, gram)  # Qᵀ Ψ
    small = matmul(matmul(coordinates, matrix.weights), coordinates.T)
    # Unresolved rows are zero; a large number there keeps them apart from real eigenvalues.
    apart = 1 + 2 * jnp.sum(jnp.abs(small))
    small = jnp.where(resolved[:, None] & resolved, (small + small.T) / 2, 0)
    values, vectors = jnp.linalg.eigh(small + jnp.diag(jnp.where(resolved, 0, apart)))
    kept = jnp.sum(jnp.where(resolved[:, None], vectors**2, 0), axis=0) > 0.5
    return SR1Eigenbasis(
        eigenvalues=jnp.where(kept, values, 0) + matrix.scale,
        directions=jnp.where(kept, matmul(basis, vectors), 0),
        kept=kept,
    )


def orthonormal_combinations(
    gram: jax.Array, valid: jax.Array, tolerance: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns coefficients ``C`` that make vectors orthonormal, ``Cᵀ G C = I`` where resolved.

    Args:
      gram: Gram matrix ``G`` of m vectors (m, m).
      valid: which of them to use (m,).
      tolerance: smallest eigenvalue of the scaled Gram matrix, as a fraction of the largest.

    Returns:
      ``C`` (m, m), and which of its columns are resolved (m,); the others are zero.

    Example:
      >>> c, resolved = orthonormal_combinations(
      ...     jnp.array([[4.0, 0.0], [0.0, 0.0]]), jnp.array([True, False]), 1e-6)
      >>> jnp.abs(c[:, resolved]).tolist()
      [[0.5], [0.0]]
    """
    squares = jnp.diagonal(gram)
    valid = valid & (squares > float(np.finfo(gram.dtype).tiny))
    inverse_norms = jnp.where(valid, jax.lax.rsqrt(jnp.where(valid, squares, 1)), 0)
    scaled = gram * inverse_norms[:, None] * inverse_norms
    values, vectors = jnp.linalg.eigh((scaled + scaled.T) / 2)
    resolved = values > tolerance * jnp.maximum(values[-1], float(np.finfo(gram.dtype).tiny))
    roots = jnp.where(resolved, jax.lax.rsqrt(jnp.where(resolved, values, 1)), 0)
    return inverse_norms[:, None] * vectors * roots, resolved


def _residual_gram(pairs: PairGram, scale: jax.Array) -> jax.Array:
    """``ΨᵀΨ`` for ``Ψ = Y - γ S``."""
    return pairs.yy - scale * (pairs.sy + pairs.sy.T) + scale**2 * pairs.ss


def _root(squares: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.maximum(squares, 0))
