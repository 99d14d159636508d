"""The secular equation: one scalar equation for the multiplier of a constraint on the norm.

A minimizer of ``Σ_j a_j p_j + λ_j p_j²/2`` under ``‖p‖ ≤ 1``, or with ``‖p‖³/3`` added, satisfies
``p_j = -a_j / (λ_j + σ)`` with ``σ ≥ max(0, -λ_min)``. The multiplier is where ``‖p(σ)‖`` equals 1,
or ``σ`` itself. Near ``-λ_min`` the sum ``λ_j + σ`` cancels. All that follows is therefore in
``u = σ - max(0, -λ_min) ≥ 0``, in which the denominators are sums of two nonnegative numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from secondorder.solvers.quadratic import (
    Spectrum,
    curves_down,
    positive_or_one,
    safe_norm,
    smallest,
)

_ITERATIONS = 30


class ShiftedSpectrum(NamedTuple):
    """A model whose eigenvalues are shifted until none is negative.

    Attributes:
      base: ``λ_j + excess`` (m,), nonnegative.
      excess: ``max(0, -λ_min)``.
      gradient: coordinates (m,) of the gradient, zero where not known.
      escape: the leftmost direction if it curves down beyond rounding, booleans (m,).
    """

    base: jax.Array
    excess: jax.Array
    gradient: jax.Array
    escape: jax.Array


class SecularEquation(NamedTuple):
    """``‖b / (base + u)‖ = start + slope·u`` for ``u ≥ 0``.

    Attributes:
      base: smallest admissible denominators (m,), nonnegative.
      gradient: ``b`` (m,).
      start: norm allowed at ``u = 0``, nonnegative.
      slope: 0 where the norm is bounded, 1 where it is penalized; static.
    """

    base: jax.Array
    gradient: jax.Array
    start: jax.Array
    slope: int


def shift_spectrum(problem: Spectrum) -> ShiftedSpectrum:
    """Shifts the eigenvalues of a model by ``max(0, -λ_min)``.

    To be done before any change of units: a compiler may fuse a product and a sum, and then the
    smallest of the shifted eigenvalues is not zero but the rounding of the product.

    Args:
      problem: spectrum of m coordinates.

    Returns:
      The shifted model. Directions that are not known count neither for ``λ_min`` nor otherwise.

    Example:
      >>> problem = Spectrum(jnp.array([1.0, -1.0]), jnp.array([1.0, 2.0]), jnp.ones(2, bool))
      >>> shift_spectrum(problem).base.tolist(), shift_spectrum(problem).escape.tolist()
      ([2.0, 0.0], [False, True])
    """
    leftmost, place = smallest(problem)
    excess = jnp.maximum(-leftmost, 0)
    base = jnp.where(problem.known, problem.values + excess, 0)
    return ShiftedSpectrum(base, excess, problem.gradient, place & curves_down(problem))


def change_units(
    shifted: ShiftedSpectrum, curvature: jax.Array, force: jax.Array
) -> ShiftedSpectrum:
    """Multiplies eigenvalues and gradient by a number each.

    Args:
      shifted: shifted model of m coordinates.
      curvature: factor of the eigenvalues, nonnegative.
      force: factor of the gradient, nonnegative.

    Returns:
      The model in other units.

    Example:
      >>> problem = Spectrum(jnp.array([1.0, -1.0]), jnp.array([1.0, 2.0]), jnp.ones(2, bool))
      >>> unit = change_units(shift_spectrum(problem), jnp.float32(0.5), jnp.float32(2.0))
      >>> unit.base.tolist(), float(unit.excess), unit.gradient.tolist()
      ([1.0, 0.0], 0.5, [2.0, 4.0])
    """
    return shifted._replace(
        base=shifted.base * curvature,
        excess=shifted.excess * curvature,
        gradient=shifted.gradient * force,
    )


def secular_step(shifted: ShiftedSpectrum, *, penalized: bool) -> jax.Array:
    """Minimizes a model in units in which all its numbers are at most about 1.

    With ``penalized=False`` the minimum is over ``‖p‖ ≤ 1``, otherwise ``‖p‖³/3`` is added to the
    model. There are three cases:

    * the step at ``u = 0`` is short enough, and ``B`` is not indefinite: it is the minimizer;
    * it is short enough, and ``B`` is indefinite (the *hard case*, in which ``b`` has no part
      along the leftmost eigenvector): that vector is added until the length is the one allowed;
    * it is longer, or infinite: ``u`` solves the secular equation.

    Directions that are not known are left alone, whatever their eigenvalue.

    Args:
      shifted: shifted model of m coordinates; eigenvalues and gradient at most about 1.
      penalized: whether the norm is penalized instead of bounded, static.

    Returns:
      Vector (m,), zero where not known.

    Example:
      >>> problem = Spectrum(jnp.array([1.0, -1.0]), jnp.array([1.0, 0.0]), jnp.ones(2, bool))
      >>> step = secular_step(shift_spectrum(problem), penalized=False)  # the hard case: σ = 1
      >>> [round(x, 4) for x in step.tolist()]
      [-0.5, -0.866]

    Source: Moré, Sorensen (1983), Computing a trust region step; Cartis, Gould, Toint (2011),
    Mathematical Programming 127, for the penalized norm.
    """
    equation = _secular_equation(shifted, penalized=penalized)
    step, fits = _unshifted_step(equation)
    missing = (equation.start - safe_norm(step)) * (equation.start + safe_norm(step))
    completed = step - jnp.where(shifted.escape, jnp.sqrt(jnp.maximum(missing, 0)), 0)
    return jnp.where(fits, completed, _shifted_step(equation, secular_root(equation)))


def secular_root(equation: SecularEquation) -> jax.Array:
    """Solves a secular equation by Newton's method on ``1/‖p(u)‖ - 1/(start + slope·u)``.

    That function is increasing and concave, and Newton's method is started on the left of its zero,
    from where it converges monotonically. The bracket is against rounding only. At
    the start no component is longer than allowed, so nothing overflows.

    Args:
      equation: equation whose left side is not smaller than its right side at ``u = 0``.

    Returns:
      The root ``u``; finite, but without meaning, if there is none.

    Example:
      >>> ones = jnp.ones(1)
      >>> float(secular_root(SecularEquation(ones, 3 * ones, ones[0], 0)))
      2.0
    """
    low = _lower_bound(equation)
    # ‖p(u)‖ ≤ ‖b‖/u, so that 1 and u are not reached beyond ‖b‖ and √‖b‖.
    norm = safe_norm(equation.gradient)
    high = jnp.maximum(low, jnp.sqrt(norm) if equation.slope else norm)

    def improve(
        _: jax.Array, bracket: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        u, low, high = bracket
        change = _newton_change(equation, u)
        low, high = jnp.where(change >= 0, u, low), jnp.where(change >= 0, high, u)
        trial = u + change
        # An end of the bracket is fine: that is where Newton's method stops.
        return jnp.where((trial >= low) & (trial <= high), trial, (low + high) / 2), low, high

    root: jax.Array = jax.lax.fori_loop(0, _ITERATIONS, improve, (low, low, high))[0]
    return root


def _secular_equation(shifted: ShiftedSpectrum, *, penalized: bool) -> SecularEquation:
    """Writes the conditions for a minimizer as an equation in ``u``."""
    # Below the normal numbers quotients would overflow. Of a part so much smaller than the rest
    # the root is small too, and Newton's changes of it would be no normal numbers.
    limits = np.finfo(shifted.gradient.dtype)
    relative = float(limits.tiny) / float(limits.eps) * safe_norm(shifted.gradient)
    large = jnp.abs(shifted.gradient) >= jnp.maximum(relative, float(limits.tiny))
    gradient = jnp.where(large, shifted.gradient, 0)
    start = shifted.excess if penalized else jnp.ones_like(shifted.excess)
    return SecularEquation(shifted.base, gradient, start, int(penalized))


def _lower_bound(equation: SecularEquation) -> jax.Array:
    """Returns the largest of the roots ``|b_j| = (base_j + u)(start + slope·u)``, at least 0."""
    base, gradient, start, slope = equation
    constant = jnp.maximum(jnp.abs(gradient) - base * start, 0)
    linear = start + slope * base
    # Of the two forms of the root of a quadratic equation, the one without cancellation.
    denominator = linear + jnp.sqrt(linear**2 + 4 * slope * constant)
    return jnp.max(2 * constant / positive_or_one(denominator))


def _newton_change(equation: SecularEquation, u: jax.Array) -> jax.Array:
    """Returns the change of ``u`` by one step of Newton's method.

    With ``n = ‖p(u)‖``, ``r = start + slope·u`` and ``s = Σ_j (p_j/n)²/(base_j + u)``::

        (1/r - 1/n) / (s/n + slope/r²) = r (n/r - 1) / (r s + slope·n/r).
    """
    step = _shifted_step(equation, u)
    norm = positive_or_one(safe_norm(step))
    allowed = positive_or_one(equation.start + equation.slope * u)
    weights = (step / norm) ** 2 / positive_or_one(equation.base + u)
    ratio = norm / allowed
    denominator = allowed * jnp.sum(weights) + equation.slope * ratio
    return allowed * (ratio - 1) / positive_or_one(denominator)


def _shifted_step(equation: SecularEquation, u: jax.Array) -> jax.Array:
    """Returns ``-b / (base + u)``, zero where the gradient is."""
    return -equation.gradient / positive_or_one(equation.base + u)


def _unshifted_step(equation: SecularEquation) -> tuple[jax.Array, jax.Array]:
    """Returns the step at ``u = 0``, and whether it is as short as allowed there."""
    base, gradient, start, _ = equation
    # One coordinate that is too long is enough; this keeps poles out of the quotients.
    long = jnp.abs(gradient) > base * start
    step = -jnp.where(long, 0, gradient) / positive_or_one(base)
    return step, ~long.any() & (safe_norm(step) <= start)
