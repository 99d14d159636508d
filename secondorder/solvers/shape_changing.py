"""The trust-region subproblem in norms that follow the eigenbasis.

If the parallel and the orthogonal part of the step are bounded separately, the complement has a
closed form, and with a bound on each coordinate everything has: no iteration and no hard case.
"""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from secondorder.solvers.quadratic import (
    ModelStep,
    QuadraticModel,
    Spectrum,
    as_step,
    as_vector,
    curves_down,
    positive_or_one,
    safe_norm,
    spectrum,
)
from secondorder.solvers.trust_region import ball_step

ShapeNorm: TypeAlias = Literal["p_inf", "p_2"]


def shape_changing_step(
    model: QuadraticModel, radius: ArrayLike, norm: ShapeNorm = "p_inf"
) -> ModelStep:
    """Minimizes ``gᵀp + pᵀBp/2`` over ``‖p‖_norm ≤ radius``, see `shape_norm`.

    With ``"p_inf"`` the coordinates are independent::

        p_j = -a_j/λ_j           if λ_j > 0 and |a_j| ≤ λ_j radius,
        p_j = -sign(a_j) radius  otherwise,

    where ``sign(0) = 1`` if ``λ_j`` is negative beyond rounding, and 0 if nothing would be gained.
    With ``"p_2"`` the k coordinates are those of `trust_region_step`, of a model without a
    complement. The complement is in both a coordinate of the first kind; where ``g⊥`` is zero no
    direction in it is known, and the step has none.

    Args:
      model: quadratic model of k coordinates.
      radius: radius of the trust region, nonnegative.
      norm: ``"p_inf"`` or ``"p_2"``, static.

    Returns:
      The step. Its Euclidean norm may reach ``√(k+1) radius`` or ``√2 radius``.

    Raises:
      ValueError: if ``norm`` is not one of the two names.

    Example:
      >>> arrays = map(jnp.asarray, ([2.0, -1.0], [3.0, 0.1], 1.0, 8.0, [True, True]))
      >>> step = shape_changing_step(QuadraticModel(*arrays), 4.0)
      >>> step.coordinates.tolist(), float(step.complement)
      ([-1.5, -4.0], -4.0)

    Source: Burdakov, Gong, Zikrin, Yuan (2017), Mathematical Programming Computation 9;
    Brust, Burdakov, Erway, Marcia (2022), ACM Transactions on Mathematical Software 48(4).
    """
    _check_norm(norm)
    problem = spectrum(model)
    boxed = _box_step(problem, jnp.asarray(radius, problem.values.dtype))
    if norm == "p_inf":
        return as_step(boxed)
    parallel = problem._replace(
        gradient=problem.gradient.at[-1].set(0), known=problem.known.at[-1].set(False)
    )
    return as_step(ball_step(parallel, radius))._replace(complement=boxed[-1])


def shape_norm(step: ModelStep, norm: ShapeNorm = "p_inf") -> jax.Array:
    """Returns the norm of a step in which its radius is measured.

    ``"p_inf"`` is ``max(max_j |p_j|, ‖p⊥‖)`` and ``"p_2"`` is ``max(‖p∥‖, ‖p⊥‖)``.

    Args:
      step: step of k + 1 coordinates.
      norm: ``"p_inf"`` or ``"p_2"``, static.

    Returns:
      Scalar.

    Raises:
      ValueError: if ``norm`` is not one of the two names.

    Example:
      >>> step = ModelStep(jnp.array([3.0, 4.0]), jnp.array(-2.0))
      >>> float(shape_norm(step, "p_inf")), float(shape_norm(step, "p_2"))
      (4.0, 5.0)

    Source: Burdakov, Gong, Zikrin, Yuan (2017), Mathematical Programming Computation 9.
    """
    _check_norm(norm)
    if norm == "p_inf":
        return jnp.max(jnp.abs(as_vector(step)))
    return jnp.maximum(safe_norm(step.coordinates), jnp.abs(step.complement))


def _box_step(problem: Spectrum, radius: jax.Array) -> jax.Array:
    """Minimizes every coordinate by itself over ``|p_j| ≤ radius``."""
    values, gradient, _ = problem
    inside = (values > 0) & (jnp.abs(gradient) <= values * radius)
    sign = jnp.where((gradient == 0) & curves_down(problem), 1, jnp.sign(gradient))
    # What is not inside may have any eigenvalue, also zero.
    return -jnp.where(inside, gradient / positive_or_one(jnp.abs(values)), sign * radius)


def _check_norm(norm: str) -> None:
    if norm not in get_args(ShapeNorm):
        raise ValueError(f"norm must be one of {get_args(ShapeNorm)}, got {norm!r}")
