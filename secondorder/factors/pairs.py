"""Curvature pairs: damping, acceptance, scaling.

Every rule needs inner products only. A pair may therefore be given by its vectors, or by its
coefficients with respect to some vectors whose Gram matrix is known: then ``inner`` is
`gram_product`, and the rules for many pairs of different lengths are a few small operations.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from secondorder.products import inner as dot

PairDamping: TypeAlias = Literal["powell_identity", "powell_lm"]
InnerProduct: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


class Pair(NamedTuple):
    """A curvature pair: ``y`` is the change of the gradient along the change ``s``.

    Attributes:
      s: step (n,).
      y: change of the gradient (n,).
    """

    s: jax.Array
    y: jax.Array


def gram_product(gram: jax.Array) -> InnerProduct:
    """Returns the inner product of vectors that are given by coefficients.

    Args:
      gram: Gram matrix (k, k) of the vectors that the coefficients refer to.

    Returns:
      ``(a, b) ↦ aᵀ M b`` on coefficients (k,).

    Example:
      >>> product = gram_product(jnp.diag(jnp.array([1.0, 4.0])))
      >>> float(product(jnp.array([1.0, 1.0]), jnp.array([1.0, 2.0])))
      9.0
    """
    return lambda a, b: jnp.sum(a[:, None] * gram * b)


def powell_damping(
    pair: Pair, hy: jax.Array, mu: ArrayLike = 0.2, inner: InnerProduct = dot
) -> Pair:
    """Moves ``s`` towards ``H y`` until ``sᵀy ≥ μ yᵀHy`` (Powell damping of the inverse).

    If ``sᵀy < μ yᵀHy``::

        θ = (1 - μ) yᵀHy / (yᵀHy - sᵀy),    s ← θ s + (1 - θ) H y,

    which attains ``sᵀy = μ yᵀHy``; otherwise the pair is returned as it is. A pair with ``y = 0``
    (a dead layer) is returned as it is too.

    Args:
      pair: curvature pair, vectors (n,).
      hy: ``H y`` (n,) for the inverse before the update, positive definite.
      mu: fraction in (0, 1).
      inner: inner product of the vectors.

    Returns:
      Pair of the same ``y`` and the damped ``s``.

    Example:
      >>> pair = Pair(s=jnp.array([-1.0, 0.0]), y=jnp.array([1.0, 1.0]))
      >>> damped = powell_damping(pair, hy=pair.y, mu=0.25)  # H = I: yᵀHy = 2
      >>> damped.s.tolist()
      [0.0, 0.5]

    Source: Goldfarb, Ren, Bahamou (2020), arXiv 2006.08877, first half of the double damping.
    """
    s, y = pair
    # Rounding may leave yᵀHy just below zero; from zero on the denominator is positive.
    theta = _powell_weight(inner(s, y), jnp.maximum(inner(y, hy), 0), mu)
    return Pair(theta * s + (1 - theta) * hy, y)


def identity_damping(pair: Pair, mu: ArrayLike, inner: InnerProduct = dot) -> Pair:
    """Moves ``y`` towards ``s`` until ``sᵀy ≥ μ sᵀs`` (Powell damping against the identity).

    If ``sᵀy < μ sᵀs``::

        θ = (1 - μ) sᵀs / (sᵀs - sᵀy),    y ← θ y + (1 - θ) s,

    which attains ``sᵀy = μ sᵀs``; otherwise the pair is returned as it is. For ``μ ≥ 1`` the weight
    has a pole at ``sᵀy = sᵀs`` and the result can be very large: use
    `levenberg_marquardt_damping` for large damping.

    Args:
      pair: curvature pair, vectors (n,).
      mu: smallest curvature wanted, in (0, 1).
      inner: inner product of the vectors.

    Returns:
      Pair of the same ``s`` and the damped ``y``.

    Example:
      >>> pair = Pair(s=jnp.array([1.0, 0.0]), y=jnp.array([0.0, 1.0]))
      >>> identity_damping(pair, mu=0.5).y.tolist()
      [0.5, 0.5]

    Source: Goldfarb, Ren, Bahamou (2020), arXiv 2006.08877, second half of the double damping.
    """
    s, y = pair
    theta = _powell_weight(inner(s, y), inner(s, s), mu)
    return Pair(s, theta * y + (1 - theta) * s)


def levenberg_marquardt_damping(pair: Pair, mu: ArrayLike) -> Pair:
    """Adds curvature ``μ`` in every direction: ``y ← y + μ s``.

    Args:
      pair: curvature pair, vectors (n,).
      mu: curvature to add, positive.

    Returns:
      Pair of the same ``s`` and the damped ``y``.

    Example:
      >>> pair = Pair(s=jnp.array([1.0, 0.0]), y=jnp.array([0.0, 1.0]))
      >>> levenberg_marquardt_damping(pair, mu=0.5).y.tolist()
      [0.5, 1.0]

    Source: Ren, Bahamou, Goldfarb (2021), arXiv 2102.06737, second half of the damping.
    """
    return Pair(pair.s, pair.y + mu * pair.s)


def damp_pair(
    pair: Pair,
    hy: jax.Array,
    *,
    damping: ArrayLike,
    mu: ArrayLike = 0.2,
    rule: PairDamping = "powell_lm",
    inner: InnerProduct = dot,
) -> Pair:
    """Damps a pair twice: against the inverse ``H``, then against the identity.

    Both rules start with `powell_damping` and give ``sᵀs / sᵀy ≤ 1/λ``. With ``λ = damping``:

    * ``"powell_identity"`` goes on with `identity_damping`, needs ``λ < 1``, and gives
      ``yᵀHy / sᵀy ≤ (1/√μ + √(λ‖H‖))²``;
    * ``"powell_lm"`` goes on with `levenberg_marquardt_damping` and gives
      ``yᵀHy / sᵀy ≤ 2/μ + 2λ‖H‖``.

    Args:
      pair: curvature pair, vectors (n,).
      hy: ``H y`` (n,) for the inverse before the update.
      damping: the factor's share ``λ`` of the damping, positive.
      mu: fraction of `powell_damping`, in (0, 1).
      rule: the second step, static.
      inner: inner product of the vectors.

    Returns:
      The damped pair.

    Raises:
      ValueError: if ``rule`` is not one of the two names.

    Example:
      >>> pair = Pair(s=jnp.array([1.0, 0.0]), y=jnp.array([-1.0, 1.0]))
      >>> s, y = damp_pair(pair, hy=pair.y, damping=0.1)  # H = I
      >>> bool(s @ y > 0.1 * s @ s)
      True

    Source: Goldfarb, Ren, Bahamou (2020), arXiv 2006.08877 (``"powell_identity"``); Ren, Bahamou,
    Goldfarb (2021), arXiv 2102.06737 (``"powell_lm"``).
    """
    if rule not in get_args(PairDamping):
        raise ValueError(f"rule must be one of {get_args(PairDamping)}, got {rule!r}")
    pair = powell_damping(pair, hy, mu, inner)
    if rule == "powell_identity":
        return identity_damping(pair, damping, inner)
    return levenberg_marquardt_damping(pair, damping)


def accept_pair(
    pair: Pair,
    reference_norm: ArrayLike = 0.0,
    threshold: ArrayLike = 0.0,
    inner: InnerProduct = dot,
) -> jax.Array:
    """Tells whether a pair may enter the inverse.

    A pair is accepted if all its entries are finite, if ``sᵀy > τ ‖s‖² r``, and if ``sᵀy`` is
    positive beyond rounding: ``sᵀy > ε ‖s‖ ‖y‖`` with ``ε`` the resolution of the dtype. Below that
    the sign of ``sᵀy`` is noise.

    Args:
      pair: curvature pair, vectors (n,).
      reference_norm: ``r``, the norm of the vector the pair was made of (the mean output gradient
        or the mean input), nonnegative.
      threshold: ``τ``, nonnegative; 1e-4 in the paper of 2020, 0 in that of 2021.
      inner: inner product of the vectors.

    Returns:
      Boolean scalar.

    Example:
      >>> s = jnp.array([1.0, 2.0])
      >>> bool(accept_pair(Pair(s, 3 * s))), bool(accept_pair(Pair(s, -s)))
      (True, False)
      >>> bool(accept_pair(Pair(0 * s, 0 * s)))
      False

    Source: Goldfarb, Ren, Bahamou (2020), arXiv 2006.08877, as in the authors' code.
    """
    s, y = pair
    curvature, length = inner(s, y), inner(s, s)
    noise = float(np.finfo(s.dtype).eps) * jnp.sqrt(length) * jnp.sqrt(inner(y, y))
    # A NaN or infinite entry makes a product non-finite, and every comparison false.
    strong = curvature > jnp.maximum(noise, threshold * length * reference_norm)
    return jnp.isfinite(curvature) & strong


def normalize_pair(pair: Pair, accept: ArrayLike = True, inner: InnerProduct = dot) -> Pair:
    """Divides a pair by ``√(sᵀy)``, so that ``sᵀy = 1``; makes it zero if that is impossible.

    The zero pair changes no inverse, so one `where` on two vectors is all that a rejected update
    needs. A pair with a non-finite entry or with ``sᵀy ≤ 0`` is made zero whatever ``accept`` says.

    Args:
      pair: curvature pair, vectors (n,).
      accept: boolean scalar, see `accept_pair`.
      inner: inner product of the vectors.

    Returns:
      Pair with ``sᵀy = 1``, or the zero pair.

    Example:
      >>> pair = Pair(s=jnp.array([2.0, 0.0]), y=jnp.array([8.0, 1.0]))
      >>> [v.tolist() for v in normalize_pair(pair)]
      [[0.5, 0.0], [2.0, 0.25]]
      >>> [v.tolist() for v in normalize_pair(pair, accept=False)]
      [[0.0, 0.0], [0.0, 0.0]]
    """
    s, y = pair
    curvature = inner(s, y)
    keep = jnp.asarray(accept) & (curvature > 0) & jnp.isfinite(curvature)
    factor = 1 / jnp.sqrt(jnp.where(keep, curvature, 1))
    return Pair(jnp.where(keep, factor * s, 0), jnp.where(keep, factor * y, 0))


def _powell_weight(curvature: jax.Array, target: jax.Array, mu: ArrayLike) -> jax.Array:
    """Returns θ with ``θ·curvature + (1-θ)·target = mu·target``, or 1 where none is needed."""
    gap = target - curvature
    # For mu < 1 the gap is positive wherever damping is needed; this guards mu ≥ 1.
    needed = (curvature < mu * target) & (gap != 0)
    return jnp.where(needed, (1 - mu) * target / jnp.where(needed, gap, 1), 1)
