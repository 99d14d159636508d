"""Search along a curve that leaves in a direction of negative curvature and turns to descent.

``w(α) = w + α² d + α u`` with a direction of descent ``d`` and one of negative curvature ``u``. For
small ``α`` the second dominates, which is what leads away from saddle points. Where there is
none, ``α²`` is the length of a usual line search.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from secondorder.solvers.quadratic import (
    ModelStep,
    QuadraticModel,
    as_step,
    as_vector,
    largest_curvature,
    positive_or_one,
    smallest,
    spectrum,
)


class CurvilinearResult(NamedTuple):
    """Where a curvilinear search ended.

    Attributes:
      alpha: ``α`` accepted, 0 if none was.
      value: value of the objective there.
      evaluations: how often the objective was evaluated, int32.
    """

    alpha: jax.Array
    value: jax.Array
    evaluations: jax.Array


def curvilinear_steps(model: QuadraticModel, floor: ArrayLike) -> tuple[ModelStep, ModelStep]:
    """Returns a direction of descent and one of negative curvature.

    With ``φ = floor · max|λ|``::

        d = -Σ_j a_j / max(|λ_j|, φ) along p_j,
        u = -sign(a_min) √(-λ_min) along p_min    if λ_min < -φ, otherwise 0,

    with ``sign(0) = 1``, so that ``gᵀd ≤ 0``, ``gᵀu ≤ 0`` and ``uᵀBu = -λ_min² ≤ 0``. The
    complement is a coordinate like the others if ``g⊥`` is not zero, and otherwise none.

    Args:
      model: quadratic model of k coordinates.
      floor: smallest curvature to divide by or to follow, as a fraction of ``max|λ|``, in (0, 1].

    Returns:
      The two steps ``(d, u)``. For ``B = 0`` they are ``-g`` and 0.

    Example:
      >>> arrays = map(jnp.asarray, ([2.0, -4.0], [2.0, -4.0], 1.0, 3.0, [True, True]))
      >>> descent, curvature = curvilinear_steps(QuadraticModel(*arrays), 1e-3)
      >>> descent.coordinates.tolist(), float(descent.complement)
      ([-1.0, 1.0], -3.0)
      >>> curvature.coordinates.tolist(), float(curvature.complement)
      ([0.0, 2.0], 0.0)

    Source: Moré, Sorensen (1979), Mathematical Programming 16; Öztoprak, Birbil (2011),
    Optimization Methods and Software 26(3), for SR1.
    """
    problem = spectrum(model)
    threshold = jnp.asarray(floor, problem.values.dtype) * largest_curvature(problem)
    descent = -problem.gradient / positive_or_one(jnp.maximum(jnp.abs(problem.values), threshold))
    leftmost, place = smallest(problem)
    length = jnp.sqrt(jnp.where(leftmost < -threshold, -leftmost, 0))
    sign = jnp.where(problem.gradient < 0, -1, 1)
    return as_step(descent), as_step(jnp.where(place, -sign * length, 0))


def curvilinear_decrease(
    model: QuadraticModel,
    descent: ModelStep,
    curvature: ModelStep,
    alpha: ArrayLike,
    fraction: ArrayLike = 1e-4,
) -> jax.Array:
    """Returns the decrease ``-fraction α² (gᵀd + uᵀBu/2)`` that is sufficient at ``α``.

    Args:
      model: quadratic model of k coordinates.
      descent: ``d`` of `curvilinear_steps`.
      curvature: ``u`` of `curvilinear_steps`.
      alpha: place on the curve, nonnegative.
      fraction: fraction of the decrease that the model promises, in (0, 1).

    Returns:
      Nonnegative scalar.

    Example:
      >>> arrays = map(jnp.asarray, ([2.0, -4.0], [2.0, 0.0], 1.0, 3.0, [True, True]))
      >>> model = QuadraticModel(*arrays)
      >>> steps = curvilinear_steps(model, 1e-3)
      >>> float(curvilinear_decrease(model, *steps, alpha=0.5, fraction=0.5))  # 11 + 8, times 1/8
      2.375

    Source: Moré, Sorensen (1979), Mathematical Programming 16.
    """
    problem = spectrum(model)
    alpha, fraction = (jnp.asarray(x, problem.values.dtype) for x in (alpha, fraction))
    slope = jnp.sum(problem.gradient * as_vector(descent))
    bend = jnp.sum(problem.values * as_vector(curvature) ** 2)
    return -fraction * alpha**2 * (slope + bend / 2)


def curvilinear_search(
    evaluate: Callable[[jax.Array], jax.Array],
    value: ArrayLike,
    model: QuadraticModel,
    descent: ModelStep,
    curvature: ModelStep,
    *,
    fraction: ArrayLike = 1e-4,
    max_halvings: int = 20,
) -> CurvilinearResult:
    """Halves ``α``, from 1 on, until the decrease is that of `curvilinear_decrease`.

    A value that is not finite is a failure. If no ``α`` is accepted the result is ``α = 0``.

    Args:
      evaluate: from ``α`` to the value of the objective at ``w + α² d + α u``.
      value: value of the objective at ``w``.
      model: quadratic model of k coordinates.
      descent: ``d`` of `curvilinear_steps`.
      curvature: ``u`` of `curvilinear_steps`.
      fraction: fraction of the decrease that the model promises, in (0, 1).
      max_halvings: how often ``α`` is halved at most, static; the objective is evaluated once more
        than that at most.

    Returns:
      The place, the value there, and the number of evaluations.

    Example:
      >>> arrays = map(jnp.asarray, ([-1.0], [0.0], 1.0, 0.0, [True]))  # w²(w² - 2)/4 at w = 0
      >>> model = QuadraticModel(*arrays)
      >>> d, u = curvilinear_steps(model, 1e-3)
      >>> def evaluate(alpha):
      ...     w = alpha**2 * d.coordinates[0] + alpha * u.coordinates[0]
      ...     return w**2 * (w**2 - 2) / 4
      >>> result = curvilinear_search(evaluate, 0.0, model, d, u)
      >>> float(result.alpha), float(result.value)
      (1.0, -0.25)

    Source: Moré, Sorensen (1979), Mathematical Programming 16.
    """
    one = jnp.ones_like(spectrum(model).values[0])
    # Weakly typed numbers would change their type in the loop.
    value = jnp.asarray(value, jax.eval_shape(evaluate, one).dtype)

    def proceed(search: tuple[CurvilinearResult, jax.Array]) -> jax.Array:
        result, _ = search
        return (result.alpha == 0) & (result.evaluations <= max_halvings)

    def attempt(
        search: tuple[CurvilinearResult, jax.Array],
    ) -> tuple[CurvilinearResult, jax.Array]:
        result, alpha = search
        found = jnp.asarray(evaluate(alpha), value.dtype)
        decrease = curvilinear_decrease(model, descent, curvature, alpha, fraction)
        # Every comparison with NaN is false.
        taken = jnp.isfinite(found) & (found <= value - decrease)
        new = CurvilinearResult(
            jnp.where(taken, alpha, 0), jnp.where(taken, found, value), result.evaluations + 1
        )
        return new, alpha / 2

    start = CurvilinearResult(jnp.zeros_like(one), value, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(proceed, attempt, (start, one))[0]
