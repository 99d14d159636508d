"""Quadratic models with a cubic penalty on the length of the step.

The weight of the penalty takes the place of a radius: the model is bounded below whatever the
eigenvalues are, and its minimizer needs no constraint.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from secondorder.solvers.quadratic import (
    ModelStep,
    QuadraticModel,
    Spectrum,
    as_step,
    as_vector,
    curves_down,
    largest_curvature,
    model_decrease,
    positive_or_one,
    safe_norm,
    spectrum,
    step_norm,
)
from secondorder.solvers.secular import (
    ShiftedSpectrum,
    change_units,
    secular_step,
    shift_spectrum,
)


def cubic_step(model: QuadraticModel, weight: ArrayLike) -> ModelStep:
    """Minimizes ``gᵀp + pᵀBp/2 + weight ‖p‖³/3``.

    The minimizer satisfies ``(B + σI)p = -g`` with ``σ = weight ‖p‖ ≥ max(0, -λ_min)``, which is
    a secular equation in k + 1 scalars. In the hard case, where ``g`` has no part along the
    leftmost eigenvector and the step is too short for ``σ = -λ_min``, that vector is added to
    reach the length. Without ``g⊥`` the minimum is over the k-dimensional subspace.

    Args:
      model: quadratic model of k coordinates.
      weight: weight of the penalty, positive. One so small that the penalty drowns in rounding is
        as good as another.

    Returns:
      The step; zero where gradient and negative curvature are.

    Example:
      >>> model = QuadraticModel(*map(jnp.asarray, ([1.0], [6.0], 1.0, 0.0, [True])))
      >>> cubic_step(model, 1.0).coordinates.tolist()  # 6 + p - p² = 0
      [-2.0]

    Source: Cartis, Gould, Toint (2011), Mathematical Programming 127; Forristal,
    Griffin, Zhou, Yektamaram (2022), arXiv 2204.09116, for L-SR1.
    """
    unit, length = _unit_cubic(spectrum(model), jnp.asarray(weight, model.eigenvalues.dtype))
    return as_step(length * secular_step(unit, penalized=True))


def cubic_decrease(model: QuadraticModel, step: ModelStep, weight: ArrayLike) -> jax.Array:
    """Returns the decrease that the model with an isotropic penalty promises.

    Args:
      model: quadratic model of k coordinates.
      step: step in the same basis.
      weight: weight of the penalty.

    Returns:
      ``-(gᵀp + pᵀBp/2 + weight ‖p‖³/3)``, a scalar.

    Example:
      >>> model = QuadraticModel(*map(jnp.asarray, ([1.0], [6.0], 1.0, 0.0, [True])))
      >>> step = ModelStep(jnp.array([-2.0]), jnp.array(0.0))
      >>> float(cubic_decrease(model, step, 0.75))  # 12 - 2 - 2
      8.0
    """
    weight = jnp.asarray(weight, model.eigenvalues.dtype)
    return model_decrease(model, step) - weight / 3 * step_norm(step) ** 3


def separable_cubic_step(model: QuadraticModel, weight: ArrayLike) -> ModelStep:
    """Minimizes ``gᵀp + pᵀBp/2 + weight (Σ_j |p_j|³ + ‖p⊥‖³)/3`` in closed form.

    The penalty follows the eigenbasis, so that the coordinates are independent. Each is the root of
    ``a_j + λ_j p_j + weight |p_j| p_j = 0`` on the side opposite to ``a_j``::

        |p_j| = 2 |a_j| / (λ_j + √(λ_j² + 4 weight |a_j|))             if λ_j ≥ 0,
        |p_j| = (-λ_j + √(λ_j² + 4 weight |a_j|)) / (2 weight)         if λ_j < 0.

    Where ``a_j = 0``, a coordinate is moved if its eigenvalue is negative beyond rounding. The
    complement is such a coordinate; where ``g⊥`` is zero no direction in it is known.

    Args:
      model: quadratic model of k coordinates.
      weight: weight of the penalty, positive.

    Returns:
      The step.

    Example:
      >>> arrays = map(jnp.asarray, ([1.0, -2.0], [6.0, 0.0], 2.0, 3.0, [True, True]))
      >>> step = separable_cubic_step(QuadraticModel(*arrays), 1.0)
      >>> step.coordinates.tolist(), float(step.complement)
      ([-2.0, -2.0], -1.0)

    Source: Ranganath, Singhal, Marcia (2025), arXiv 2502.12298.
    """
    problem = spectrum(model)
    values, gradient, _ = problem
    weight = jnp.maximum(jnp.asarray(weight, values.dtype), _tiny(values))
    force, size = jnp.abs(gradient), jnp.abs(values)
    # The square root of λ² + 4 weight |a|, without squares that overflow.
    total = size + jnp.hypot(size, 2 * jnp.sqrt(weight) * jnp.sqrt(force))
    length = jnp.where(values < 0, total / (2 * weight), 2 * force / positive_or_one(total))
    moved = (force > 0) | curves_down(problem)
    return as_step(-jnp.where(gradient < 0, -1, 1) * jnp.where(moved, length, 0))


def separable_cubic_decrease(
    model: QuadraticModel, step: ModelStep, weight: ArrayLike
) -> jax.Array:
    """Returns the decrease that the model with a separable penalty promises.

    Args:
      model: quadratic model of k coordinates.
      step: step in the same basis.
      weight: weight of the penalty.

    Returns:
      ``-(gᵀp + pᵀBp/2 + weight (Σ_j |p_j|³ + ‖p⊥‖³)/3)``, a scalar.

    Example:
      >>> model = QuadraticModel(*map(jnp.asarray, ([1.0], [6.0], 1.0, 1.0, [True])))
      >>> step = ModelStep(jnp.array([-2.0]), jnp.array(-1.0))
      >>> float(separable_cubic_decrease(model, step, 1.0))  # 12 + 1 - 2.5 - 3
      7.5
    """
    weight = jnp.asarray(weight, model.eigenvalues.dtype)
    penalty = jnp.sum(jnp.abs(as_vector(step)) ** 3) / 3
    return model_decrease(model, step) - weight * penalty


def _unit_cubic(problem: Spectrum, weight: jax.Array) -> tuple[ShiftedSpectrum, jax.Array]:
    """Returns the problem for ``p/length`` with weight 1, and ``length``.

    No minimizer is longer than the ``r`` for which ``weight r² = max|λ| r + ‖a‖``. With that length
    as the unit, eigenvalues, gradient and step are at most 1, and the size of the gradient is
    ``share = weight ‖a‖ / κ²`` with ``κ = weight r``. A share that vanishes would take the
    gradient with it; it is that of a penalty without influence, and any small number does.
    """
    tiny, limits = _tiny(weight), np.finfo(weight.dtype)
    force, curvature = safe_norm(problem.gradient), largest_curvature(problem)
    root = jnp.sqrt(weight) * jnp.sqrt(force)
    kappa = positive_or_one((curvature + jnp.hypot(curvature, 2 * root)) / 2)
    share = jnp.maximum((root / kappa) ** 2, tiny / float(limits.eps))
    forced = force / kappa / share
    length = jnp.where(force >= tiny, forced, kappa / jnp.maximum(weight, tiny))
    unit = change_units(shift_spectrum(problem), 1 / kappa, 1 / positive_or_one(force))
    unit = unit._replace(gradient=unit.gradient * share)
    return unit, jnp.minimum(length, float(limits.max))


def _tiny(x: jax.Array) -> float:
    """Returns the smallest number of a dtype by which one can divide."""
    return float(np.finfo(x.dtype).tiny)
