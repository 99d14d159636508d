"""BFGS on a dense inverse factor.

The inverse ``H`` of one Kronecker factor is a symmetric positive definite matrix that is never
inverted: each curvature pair ``(s, y)`` changes it by a matrix of rank two so that ``H y = s``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from secondorder.factors.pairs import InnerProduct, Pair, normalize_pair
from secondorder.products import inner as dot
from secondorder.products import matmul


def inverse_bfgs_update(h: jax.Array, pair: Pair, accept: ArrayLike = True) -> jax.Array:
    """Updates the inverse with one pair: the BFGS formula for ``H``, or exactly ``H``.

    With ``ρ = 1 / sᵀy``::

        H ← (I - ρ s yᵀ) H (I - ρ y sᵀ) + ρ s sᵀ
          = H + (ρ² yᵀHy + ρ) s sᵀ - ρ (s (Hy)ᵀ + Hy sᵀ).

    The pair is first divided by ``√(sᵀy)``, so ``ρ = 1`` and no ``ρ²`` can overflow. The change of
    rank two is then written as a difference of two squares, ``H + g gᵀ - d dᵀ``. Each product is
    then of two entries of one vector, so the result is exactly symmetric if ``h`` is, even where
    the compiler fuses a multiplication with an addition. One elementwise pass over ``h``.

    ``h`` is returned unchanged, bit for bit, if the pair is rejected, if anything is non-finite, or
    if an entry of the result could overflow.

    Args:
      h: inverse factor (n, n), finite, symmetric, positive semidefinite, float32 or wider.
      pair: curvature pair, vectors (n,).
      accept: boolean scalar, see `accept_pair`; ``sᵀy > 0`` is required in any case.

    Returns:
      The new inverse (n, n), with ``H y = s`` if the pair was used.

    Example:
      >>> pair = Pair(s=jnp.array([1.0, 0.0]), y=jnp.array([4.0, 2.0]))
      >>> h = inverse_bfgs_update(jnp.eye(2), pair)
      >>> bool(jnp.allclose(h @ pair.y, pair.s, atol=1e-6))
      True

    Source: Goldfarb, Ren, Bahamou (2020), arXiv 2006.08877, the BFGS update of the algorithm; the
    scaling follows the authors' later code.
    """
    pair = Pair(pair.s.astype(h.dtype), pair.y.astype(h.dtype))
    pair = normalize_pair(pair, accept)
    return apply_change(h, bfgs_change(pair, matmul(h, pair.y)))


class Change(NamedTuple):
    """A change of rank two, ``grow growᵀ - drop dropᵀ``, with vectors (n,)."""

    grow: jax.Array
    drop: jax.Array


def bfgs_change(pair: Pair, hy: jax.Array, inner: InnerProduct = dot) -> Change:
    """Returns the change of ``H`` by a pair, without touching ``H``.

    Args:
      pair: pair with ``sᵀy = 1`` from `normalize_pair`, vectors (n,); zero changes nothing.
      hy: ``H y`` (n,).
      inner: inner product of the vectors.

    Returns:
      The change; zero where anything is non-finite or the result could overflow.

    Example:
      >>> change = bfgs_change(Pair(jnp.array([2.0]), jnp.array([0.5])), jnp.array([0.5]))
      >>> float(apply_change(jnp.eye(1), change)[0, 0])  # now H y = s
      4.0
    """
    s = pair.s
    w = (1 + inner(pair.y, hy)) / 2 * s - hy
    sizes = inner(s, s), inner(w, w)
    # The change, 2 ‖u‖ ‖w‖ at most, stays below the square root of the largest number, so that no
    # sum of accepted changes overflows.
    in_range = sizes[0] * sizes[1] < np.finfo(s.dtype).max / 4
    grow, drop = _difference_of_squares(s, w, *sizes)
    return Change(jnp.where(in_range, grow, 0), jnp.where(in_range, drop, 0))


def apply_change(h: jax.Array, change: Change) -> jax.Array:
    """Returns ``h + grow growᵀ - drop dropᵀ`` in one elementwise pass.

    Args:
      h: inverse factor (n, n).
      change: the change.

    Returns:
      Matrix (n, n), exactly symmetric if ``h`` is, and ``h`` bit for bit if the change is zero.

    Example:
      >>> apply_change(jnp.eye(1), Change(jnp.array([2.0]), jnp.array([1.0]))).tolist()
      [[4.0]]
    """
    grow, drop = change
    # In this order a zero change keeps even the sign of a zero in h.
    return h - (drop[:, None] * drop - grow[:, None] * grow)


def _difference_of_squares(
    u: jax.Array, w: jax.Array, size_u: jax.Array, size_w: jax.Array
) -> Change:
    """Returns ``g, d`` with ``u wᵀ + w uᵀ = g gᵀ - d dᵀ``, balanced so that neither is too large.

    With ``t² = ‖w‖ / ‖u‖``: ``g = (t u + w / t) / √2`` and ``d = (t u - w / t) / √2``, so that
    ``‖g‖² + ‖d‖² = 2 ‖u‖ ‖w‖``; the sizes are squared norms.
    """
    usable = (size_u > 0) & (size_w > 0)
    ratio = jnp.where(usable, size_w, 1) / jnp.where(usable, size_u, 1)
    t = jnp.sqrt(jnp.sqrt(ratio))
    first, second = t * u * jnp.sqrt(0.5), w / t * jnp.sqrt(0.5)
    # Where one of the two is zero so is the sum; first or second alone would then cancel exactly.
    return Change(first + second, first - second)
