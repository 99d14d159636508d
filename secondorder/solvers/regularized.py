"""Newton steps with a shift of the whole spectrum: no radius, no root finding.

A shift is what a trust region turns into on its boundary. Choosing it instead of the radius leaves
one division per coordinate.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from secondorder.solvers.quadratic import (
    ModelStep,
    QuadraticModel,
    Spectrum,
    as_step,
    largest_curvature,
    positive_or_one,
    smallest,
    spectrum,
)

_MARGIN = 1e-4


def regularized_step(
    model: QuadraticModel, shift: ArrayLike, margin: ArrayLike = _MARGIN
) -> ModelStep:
    """Returns ``p = -(B + μI)⁻¹ g`` with ``μ`` of `raised_shift`.

    It minimizes ``gᵀp + pᵀBp/2 + μ‖p‖²/2`` and is always a direction of descent.

    Args:
      model: quadratic model of k coordinates.
      shift: shift ``μ`` wanted, nonnegative.
      margin: smallest eigenvalue of ``B + μI`` allowed, as a fraction of ``max|λ|``, positive.

    Returns:
      The step. Where ``B + μI`` is zero, for ``B = 0`` without a shift, it is zero.

    Example:
      >>> model = QuadraticModel(*map(jnp.asarray, ([1.0], [4.0], 3.0, 10.0, [True])))
      >>> step = regularized_step(model, 1.0)
      >>> step.coordinates.tolist(), float(step.complement)
      ([-2.0], -2.5)

    Source: Kanzow, Steck (2023), Mathematical Programming Computation 15, for limited memory.
    """
    problem = spectrum(model)
    leftmost, _ = smallest(problem)
    # The differences are nonnegative, and so are the sums: no cancellation near the pole.
    denominator = problem.values - leftmost + _raised_leftmost(problem, shift, margin)
    return as_step(-problem.gradient / positive_or_one(denominator))


def raised_shift(model: QuadraticModel, shift: ArrayLike, margin: ArrayLike = _MARGIN) -> jax.Array:
    """Returns the smallest ``μ ≥ shift`` with ``B + μI`` safely positive definite.

    That is ``λ_min + μ ≥ margin · max|λ|``, with the eigenvalues of the directions in which one can
    go: ``γ`` only counts if ``g⊥`` is not zero.

    Args:
      model: quadratic model of k coordinates.
      shift: shift wanted, nonnegative.
      margin: smallest eigenvalue of ``B + μI`` allowed, as a fraction of ``max|λ|``, positive.

    Returns:
      Scalar ``μ``.

    Example:
      >>> model = QuadraticModel(*map(jnp.asarray, ([-2.0], [4.0], 4.0, 1.0, [True])))
      >>> float(raised_shift(model, 3.0)), float(raised_shift(model, 1.0, margin=0.25))
      (3.0, 3.0)
    """
    problem = spectrum(model)
    # Not from the raised eigenvalue, which would round a shift that is large enough.
    shift, margin = (jnp.asarray(x, problem.values.dtype) for x in (shift, margin))
    return jnp.maximum(shift, margin * largest_curvature(problem) - smallest(problem)[0])


def _raised_leftmost(problem: Spectrum, shift: ArrayLike, margin: ArrayLike) -> jax.Array:
    """Returns the smallest eigenvalue of ``B + μI``."""
    shift, margin = (jnp.asarray(x, problem.values.dtype) for x in (shift, margin))
    return jnp.maximum(shift + smallest(problem)[0], margin * largest_curvature(problem))
