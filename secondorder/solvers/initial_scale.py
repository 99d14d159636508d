r"""Rules for the matrix ``B₀ = γ I`` that limited-memory SR1 starts from.

SR1 takes the curvature of the directions that it has seen from the pairs, and ``γ`` for all others.
If ``γ`` lies inside the spectrum that the pairs show, the middle matrix ``M = Sᵀ(H - γ I)S`` is
indefinite and may be nearly singular, and then ``B`` has huge eigenvalues that the Hessian has not.
The extreme eigenvalues of the pencil ``(D + L + Lᵀ, SᵀS)`` bound that spectrum.
"""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from secondorder.products import matmul
from secondorder.solvers.compact_sr1 import (
    PairGram,
    middle_matrix,
    orthonormal_combinations,
)

ScaleRule: TypeAlias = Literal["least_rayleigh", "bb", "pencil_below", "pencil_above"]

_FLOOR = 1e-6  # the least |γ|, as a fraction of the largest curvature seen


def initial_scale(pairs: PairGram, rule: ScaleRule) -> jax.Array:
    """Returns ``γ`` by a rule; 0 without pairs.

    Args:
      pairs: inner products of m pairs.
      rule: ``"least_rayleigh"``: `least_rayleigh`; ``"bb"``: `barzilai_borwein`;
        ``"pencil_below"``: half of the smallest curvature of the pairs, or 1.5 times it where that
        is negative; ``"pencil_above"``: 1.5 times the largest. Static.

    Returns:
      Scalar.

    Raises:
      ValueError: if the rule is none of these.

    Example:
      >>> from secondorder.solvers.compact_sr1 import pair_gram
      >>> pairs = pair_gram(jnp.array([[1.0, 2.0], [2.0, 5.0]]), jnp.array([0]))
      >>> [float(initial_scale(pairs, rule)) for rule in ("bb", "pencil_below", "pencil_above")]
      [2.5, 1.0, 3.0]

    Source: Erway, Griffin, Marcia, Omheni (2020), Trust-region algorithms for training responses,
    for the smallest eigenvalue of the pencil.
    """
    if rule not in get_args(ScaleRule):
        raise ValueError(f"rule must be one of {get_args(ScaleRule)}, got {rule!r}")
    if rule == "least_rayleigh":
        return least_rayleigh(pairs)
    if rule == "bb":
        return barzilai_borwein(pairs)
    smallest, largest = curvature_range(pairs)
    floor = _FLOOR * jnp.maximum(jnp.abs(smallest), jnp.abs(largest))
    if rule == "pencil_above":
        return jnp.maximum(1.5 * largest, floor)
    return jnp.where(
        smallest > 0, jnp.maximum(0.5 * smallest, floor), jnp.minimum(1.5 * smallest, -floor)
    )


def barzilai_borwein(pairs: PairGram) -> jax.Array:
    """Returns ``yᵀy / sᵀy`` of the newest pair, or ``‖y‖ / ‖s‖`` if its curvature is not positive.

    Args:
      pairs: inner products of m pairs.

    Returns:
      Positive scalar; 0 without pairs.

    Example:
      >>> from secondorder.solvers.compact_sr1 import pair_gram
      >>> pairs = pair_gram(jnp.array([[1.0, -2.0], [-2.0, 4.0]]), jnp.array([0]))
      >>> float(barzilai_borwein(pairs))
      2.0

    Source: Barzilai, Borwein (1988), Two-point step size gradient methods.
    """
    newest = jnp.argmax(pairs.numbers)
    ss, sy, yy = (jnp.diagonal(block)[newest] for block in (pairs.ss, pairs.sy, pairs.yy))
    smallest = _FLOOR * jnp.sqrt(ss * yy)
    is_positive = sy > smallest
    by_lengths = jnp.sqrt(yy / jnp.where(ss > 0, ss, 1))
    return jnp.where(is_positive, yy / jnp.where(is_positive, sy, 1), by_lengths)


def least_rayleigh(pairs: PairGram) -> jax.Array:
    """Returns the smallest positive ``sᵀy / sᵀs`` of all pairs, or `barzilai_borwein` without any.

    It is rarely above the curvature that is still unseen, so that steps there are long enough, and
    a trust region keeps them from being too long.

    Args:
      pairs: inner products of m pairs.

    Returns:
      Positive scalar; 0 without pairs.

    Example:
      >>> from secondorder.solvers.compact_sr1 import pair_gram
      >>> pairs = pair_gram(jnp.array([[2.0, 2.0], [2.0, 4.0]]), jnp.array([0]))
      >>> float(least_rayleigh(pairs))
      1.0
    """
    ss, sy, yy = (jnp.diagonal(block) for block in (pairs.ss, pairs.sy, pairs.yy))
    is_positive = sy > _FLOOR * jnp.sqrt(ss * yy)
    quotients = jnp.where(is_positive, sy / jnp.where(ss > 0, ss, 1), jnp.inf)
    return jnp.where(is_positive.any(), jnp.min(quotients), barzilai_borwein(pairs))


def curvature_range(pairs: PairGram) -> tuple[jax.Array, jax.Array]:
    """Returns the extreme eigenvalues of ``(D + L + Lᵀ) z = λ SᵀS z``.

    Args:
      pairs: inner products of m pairs.

    Returns:
      The smallest and the largest; zeros without pairs.

    Example:
      >>> from secondorder.solvers.compact_sr1 import pair_gram
      >>> pairs = pair_gram(jnp.array([[1.0, 2.0], [2.0, 5.0]]), jnp.array([0]))
      >>> [float(value) for value in curvature_range(pairs)]
      [2.0, 2.0]
    """
    tolerance = 1e-4 if pairs.ss.dtype == jnp.float32 else 1e-8
    basis, resolved = orthonormal_combinations(pairs.ss, pairs.numbers >= 0, tolerance)
    small = matmul(basis.T, matmul(middle_matrix(pairs), basis))
    small = jnp.where(resolved[:, None] & resolved, (small + small.T) / 2, 0)
    # What is not resolved is moved out of the way: up for the smallest, down for the largest.
    apart = jnp.where(resolved, 0, 1 + 2 * jnp.sum(jnp.abs(small)))
    low = jnp.linalg.eigvalsh(small + jnp.diag(apart))[0]
    high = jnp.linalg.eigvalsh(small - jnp.diag(apart))[-1]
    known = jnp.any(resolved)
    return jnp.where(known, low, 0), jnp.where(known, high, 0)
