"""The quadratic model of Hessian-free methods: its matrix, its preconditioner, its values."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from secondorder import operators
from secondorder import tree as vectors
from secondorder.control import DampingRule, next_damping
from secondorder.methods.terminal import Point, zero_metrics
from secondorder.objective import Microbatches, Objective

Distance: TypeAlias = Callable[[Any, Any], jax.Array]
CurvatureKind: TypeAlias = Literal["gauss_newton", "hessian", "empirical_fisher"]
PreconditionerKind: TypeAlias = Literal["empirical_fisher", "gauss_newton"]

_OPERATORS: dict[str, Callable[[Any, Any], operators.LinearOperator]] = {
    "gauss_newton": operators.gauss_newton,
    "hessian": operators.hessian,
    "empirical_fisher": operators.empirical_fisher,
}
_DIAGONALS: dict[str, Callable[[Any, Any, Any, int], chex.ArrayTree]] = {
    "gauss_newton": operators.gauss_newton_diagonal,
    "empirical_fisher": operators.empirical_fisher_diagonal,
}


class HessianFreeMetrics(NamedTuple):
    """What Hessian-free methods report, all scalars.

    Attributes:
      damping: Of the last model.
      ratio: Actual over predicted reduction of the last step.
      rate: The step as a multiple of the solution that was taken; 0 if it was rejected.
      predicted: Change of the objective that the model without damping promised.
      iterations: Of conjugate gradients at the last step, int32.
      products: Curvature products at the last step, that of the start included, int32.
      taken: The iteration whose iterate became the step, int32.
      evaluations: Values that the last step evaluated, int32.
      rejections: Steps rejected since `init`, int32.
      negative_curvature: Steps that met a direction of negative curvature since `init`, int32.
      nonfinite_products: Steps that a product with a non-finite element cut short, int32.
      nonfinite_steps: Batches whose value or gradient was not finite; they changed nothing.
    """

    damping: jax.Array
    ratio: jax.Array
    rate: jax.Array
    predicted: jax.Array
    iterations: jax.Array
    products: jax.Array
    taken: jax.Array
    evaluations: jax.Array
    rejections: jax.Array
    negative_curvature: jax.Array
    nonfinite_products: jax.Array
    nonfinite_steps: jax.Array


def no_metrics(dtype: Any) -> HessianFreeMetrics:
    """Metrics before the first update.

    Args:
      dtype: Of the real ones.

    Returns:
      Zeros.
    """
    return zero_metrics(HessianFreeMetrics, dtype, ("damping", "ratio", "rate", "predicted"))


class Parabola(NamedTuple):
    r"""A quadratic model along a direction ``d``.

    Attributes:
      slope: :math:`g^\top d`.
      curvature: :math:`d^\top B d`.
    """

    slope: jax.Array
    curvature: jax.Array

    def change(self, rate: chex.Numeric) -> jax.Array:
        """The change of the model after the step ``rate * d``."""
        return rate * self.slope + rate**2 * self.curvature / 2


def parabola_of(
    gradient: chex.ArrayTree, solution: chex.ArrayTree, model: jax.Array, damping: chex.Numeric
) -> Parabola:
    r"""The model without damping along an iterate of conjugate gradients, without a product.

    From :math:`\phi = \tfrac12 d^\top (B + \lambda I) d + g^\top d`.

    Args:
      gradient: ``g``.
      solution: The iterate ``d``.
      model: Its :math:`\phi`.
      damping: :math:`\lambda`, the multiple of the identity that is not part of the model.

    Returns:
      The parabola.

    Example:
      >>> g, d = jnp.array([-2.0]), jnp.array([0.5])
      >>> parabola_of(g, d, 0.5 * (3 + 1) * 0.25 - 1.0, 1.0).curvature  # B = 3
      Array(0.75, dtype=float32)
    """
    slope = vectors.inner(gradient, solution)
    return Parabola(slope, 2 * (model - slope) - damping * vectors.inner(solution, solution))


def steer(rule: DampingRule | None, damping: jax.Array, ratio: jax.Array) -> jax.Array:
    """The next damping; the same, if there is no rule.

    Args:
      rule: How it follows the ratio, or None.
      damping: The damping, any shape.
      ratio: Actual over predicted reduction.

    Returns:
      An array like ``damping``.
    """
    return damping if rule is None else next_damping(rule, damping, ratio)


def curvature_operator(
    kind: CurvatureKind, objective: Any, params: chex.ArrayTree
) -> operators.LinearOperator:
    """The matrix of the model, linearized once at the parameters.

    Args:
      kind: Which.
      objective: The objective of the curvature batch; split, but for the Hessian.
      params: The parameters.

    Returns:
      The operator.
    """
    return _OPERATORS[kind](objective, params)


def structural_operator(
    objective: Objective[Any] | Microbatches[Any], params: chex.ArrayTree, distance: Distance
) -> operators.LinearOperator:
    """The Gauss-Newton matrix of how far the outputs move from where they are.

    It shares the linearization of the objective's own Gauss-Newton matrix, as the compiler merges
    what is equal.

    Args:
      objective: The split objective.
      params: The parameters.
      distance: Maps outputs and reference outputs to a scalar, stationary where they are equal.

    Returns:
      The operator.

    Source: Martens, Sutskever (2011), section 3.
    """
    moved = objective.with_loss(lambda z: distance(z, jax.lax.stop_gradient(z)))
    return operators.gauss_newton(moved, params)


def estimate_diagonal(
    kind: PreconditionerKind,
    objective: Objective[Any],
    params: chex.ArrayTree,
    key: jax.Array,
    probes: int,
) -> chex.ArrayTree:
    """An unbiased estimate of the diagonal of the curvature.

    Args:
      kind: Of which matrix.
      objective: The split objective of the curvature batch.
      params: The parameters.
      key: PRNG key of the random signs.
      probes: Number of backward passes.

    Returns:
      A pytree like the vectors, not negative.
    """
    return _DIAGONALS[kind](objective, params, key, probes)


class QuadraticModel(NamedTuple):
    """The damped quadratic model of one step.

    Attributes:
      matrix: ``B`` with the damping.
      damping: The multiple of the identity in it that is not part of the model.
      structural: The structural damping in it, likewise, or None.
    """

    matrix: operators.LinearOperator
    damping: jax.Array
    structural: operators.LinearOperator | None


class Preconditioning(NamedTuple):
    """How the preconditioner is made; the fields are those of `hessian_free`."""

    kind: PreconditionerKind | None
    power: chex.Numeric
    probes: int
    decay: chex.Numeric


def build_model(
    curvature: CurvatureKind,
    structural: tuple[Distance, chex.Numeric] | None,
    objective: Any,
    point: Point,
    damping: jax.Array,
    weight_decay: chex.Numeric,
) -> QuadraticModel:
    """The damped model at a point, not preconditioned yet.

    Args:
      curvature: Which matrix.
      structural: The distance of outputs, and the weight of its curvature relative to the damping.
      objective: The objective of the curvature batch.
      point: The point.
      damping: ``λ``.
      weight_decay: The multiple of the identity that is part of the model.

    Returns:
      The model.
    """
    with jax.named_scope("curvature"):
        matrix = curvature_operator(curvature, objective, point.params)
        matrix = matrix.damped(weight_decay + damping)
        if structural is None:
            return QuadraticModel(matrix, damping, None)
        distance, weight = structural
        extra = structural_operator(objective, point.params, distance).scaled(damping * weight)
        return QuadraticModel(matrix + extra, damping, extra)


def make_preconditioner(
    how: Preconditioning,
    objective: Any,
    params: chex.ArrayTree,
    key: jax.Array,
    average: chex.ArrayTree | None,
    count: jax.Array,
    shift: jax.Array,
) -> tuple[chex.ArrayTree | None, chex.ArrayTree | None]:
    """The new average of the diagonal, and the preconditioner made of it.

    Args:
      how: The hyperparameters.
      objective: The split objective of the curvature batch.
      params: The parameters.
      key: PRNG key of the probes.
      average: Average of the diagonal so far, or None.
      count: Steps before this one.
      shift: What is added to the diagonal.

    Returns:
      Two pytrees like the vectors; None and None without a preconditioner.
    """
    if how.kind is None:
        return None, None
    with jax.named_scope("preconditioner"):
        estimate = estimate_diagonal(how.kind, objective, params, key, how.probes)
        new, corrected = vectors.moving_average(average, estimate, count, how.decay)
        tiny = float(np.finfo(shift.dtype).tiny)
        return new, jax.tree.map(lambda d: jnp.maximum(d + shift, tiny) ** how.power, corrected)


def parabola_along(
    model: QuadraticModel, gradient: chex.ArrayTree, solution: chex.ArrayTree, value: jax.Array
) -> Parabola:
    """The model without any damping along an iterate of conjugate gradients.

    Args:
      model: The model.
      gradient: ``g``.
      solution: The iterate.
      value: Its damped model.

    Returns:
      The parabola; it costs a product if there is structural damping, and none otherwise.
    """
    parabola = parabola_of(gradient, solution, value, model.damping)
    if model.structural is None:
        return parabola
    extra = vectors.inner(solution, model.structural(solution))
    return parabola._replace(curvature=parabola.curvature - extra)
