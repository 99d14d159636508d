"""BFGS on a dense inverse factor.

The inverse ``H`` of one Kronecker factor is a symmetric positive definite matrix that is never
inverted: each curvature pair ``(s, y)`` changes it by a matrix of rank two so that ``H y = s``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from secondorder.factors.pairs import Pair, normalize_pair
from secondorder.factors.products import inner, matmul


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
    s, y = normalize_pair(pair, accept)
    hy = matmul(h, y)
    grow, drop = _difference_of_squares(s, (1 + inner(y, hy)) / 2 * s - hy)
    # The entries of a positive semidefinite matrix are bounded by its largest diagonal entry.
    bound = jnp.max(jnp.diagonal(h)) + jnp.max(jnp.square(grow)) + jnp.max(jnp.square(drop))
    in_range = bound < np.finfo(h.dtype).max / 4  # false for NaN
    grow, drop = jnp.where(in_range, grow, 0), jnp.where(in_range, drop, 0)
    # In this order a zero change keeps even the sign of a zero in h.
    return h - (drop[:, None] * drop - grow[:, None] * grow)


def hessian_action_pair(
    h: jax.Array, mean_input: jax.Array, moment_product: Callable[[jax.Array], jax.Array]
) -> Pair:
    """Makes the pair of a factor whose curvature ``A`` is known: a step and ``A`` applied to it.

    ``s = H ā`` and ``y = (A + λI) s``. Then ``sᵀy ≥ λ‖s‖² > 0``, so the pair needs no damping; if
    ``H`` is already ``(A + λI)⁻¹``, the update with it changes nothing.

    Args:
      h: inverse factor (n, n).
      mean_input: mean input ``ā`` (n,) of the layer.
      moment_product: ``v ↦ (A + λI) v`` on vectors (n,). ``A`` itself is not needed: with the
        inputs as rows of ``a`` it can be ``aᵀ(a v) / m + λ v``.

    Returns:
      The pair.

    Example:
      >>> h, mean_input = jnp.eye(2) / 4, jnp.array([1.0, 2.0])
      >>> s, y = hessian_action_pair(h, mean_input, lambda v: 4.0 * v)
      >>> s.tolist(), y.tolist()
      ([0.25, 0.5], [1.0, 2.0])

    Source: Goldfarb, Ren, Bahamou (2020), arXiv 2006.08877, "Hessian-action BFGS"; with the moment
    of one minibatch, Ren, Bahamou, Goldfarb (2021), arXiv 2102.06737.
    """
    s = matmul(h, mean_input)
    return Pair(s, moment_product(s))


def symmetrize(matrix: jax.Array) -> jax.Array:
    """Returns the symmetric part ``(M + Mᵀ) / 2``, exactly symmetric.

    Args:
      matrix: square matrix (n, n).

    Returns:
      Matrix (n, n).

    Example:
      >>> symmetrize(jnp.array([[1.0, 2.0], [4.0, 3.0]])).tolist()
      [[1.0, 3.0], [3.0, 3.0]]
    """
    return matrix / 2 + matrix.T / 2


def _difference_of_squares(u: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ``g, d`` with ``u wᵀ + w uᵀ = g gᵀ - d dᵀ``, balanced so that neither is too large.

    With ``t² = ‖w‖ / ‖u‖``: ``g = (t u + w / t) / √2`` and ``d = (t u - w / t) / √2``.
    """
    size_u, size_w = jnp.max(jnp.abs(u)), jnp.max(jnp.abs(w))
    usable = (size_u > 0) & (size_w > 0)
    t = jnp.sqrt(jnp.where(usable, size_w, 1)) / jnp.sqrt(jnp.where(usable, size_u, 1))
    first, second = t * u * jnp.sqrt(0.5), w / t * jnp.sqrt(0.5)
    # Where one of the two is zero so is the sum; first or second alone would then cancel exactly.
    return first + second, first - second
