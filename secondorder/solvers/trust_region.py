"""The trust-region subproblem in the Euclidean norm.

In the eigenbasis it is a secular equation in k + 1 scalars. It is solved in units in which
the radius and the largest number of the model are 1, so that it is as accurate in float32 as the
eigenvalues are, whatever the scale of the objective.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from secondorder.solvers.quadratic import (
    ModelStep,
    QuadraticModel,
    Spectrum,
    as_step,
    clip_norm,
    largest_curvature,
    positive_or_one,
    spectrum,
)
from secondorder.solvers.secular import (
    ShiftedSpectrum,
    change_units,
    secular_step,
    shift_spectrum,
)


def trust_region_step(model: QuadraticModel, radius: ArrayLike) -> ModelStep:
    """Minimizes ``gᵀp + pᵀBp/2`` over ``‖p‖ ≤ radius``.

    The minimizer satisfies ``(B + σI)p = -g`` with ``B + σI`` positive semidefinite, ``σ ≥ 0``, and
    ``σ = 0`` unless ``‖p‖ = radius``. All cases are treated: inside, on the boundary, singular
    ``B``, ``γ ≤ 0``, and the *hard case*, where ``g`` has no part along the leftmost eigenvector
    and that vector is added until the step reaches the boundary. Negative curvature of
    the size of rounding is no reason to add it.

    In the complement only the direction of ``g⊥`` is known. Without it (``g⊥ = 0``) the
    minimum is over the k-dimensional subspace, even where ``γ`` is the smallest eigenvalue.

    Args:
      model: quadratic model of k coordinates.
      radius: radius of the trust region, nonnegative.

    Returns:
      The step; zero where gradient and negative curvature are.

    Example:
      >>> model = QuadraticModel(*map(jnp.asarray, ([2.0], [3.0], 1.0, 4.0, [True])))
      >>> step = trust_region_step(model, 10.0)
      >>> step.coordinates.tolist(), float(step.complement)  # p = -B⁻¹g
      ([-1.5], -4.0)
      >>> step = trust_region_step(model, 0.001)  # p ≈ -radius g/‖g‖
      >>> [round(1000 * float(x), 3) for x in (step.coordinates[0], step.complement)]
      [-0.6, -0.8]

    Source: Brust, Erway, Marcia (2017), arXiv 1506.07222; Moré, Sorensen (1983),
    Computing a trust region step.
    """
    return as_step(ball_step(spectrum(model), radius))


def ball_step(problem: Spectrum, radius: ArrayLike) -> jax.Array:
    """Minimizes a model of independent coordinates over a ball.

    Args:
      problem: spectrum of m coordinates.
      radius: radius of the ball, nonnegative.

    Returns:
      Vector (m,), zero where not known.

    Example:
      >>> problem = Spectrum(jnp.array([1.0, 2.0]), jnp.array([-2.0, 4.0]), jnp.ones(2, bool))
      >>> ball_step(problem, 3.0).tolist()
      [2.0, -2.0]
    """
    radius = jnp.asarray(radius, problem.values.dtype)
    # Newton's method may stop just outside.
    return radius * clip_norm(secular_step(_unit_ball(problem, radius), penalized=False), 1)


def _unit_ball(problem: Spectrum, radius: jax.Array) -> ShiftedSpectrum:
    """Returns the problem for ``p/radius``, divided by the largest of its numbers.

    These are ``a_j`` and ``λ_j·radius``; only the ratio of their sizes matters, and it may be
    infinite.
    """
    force, curvature = jnp.max(jnp.abs(problem.gradient)), largest_curvature(problem)
    ratio = curvature * radius / positive_or_one(force)
    ratio = jnp.where(positive_or_one(force) == force, ratio, jnp.inf)
    # Each number is divided by the largest of its kind first, so that no factor overflows.
    unit = change_units(
        shift_spectrum(problem), 1 / positive_or_one(curvature), 1 / positive_or_one(force)
    )
    return change_units(unit, jnp.minimum(ratio, 1), 1 / jnp.maximum(ratio, 1))
