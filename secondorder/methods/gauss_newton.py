r"""Stochastic Gauss-Newton: a few conjugate gradient iterations, or an exact solve, per batch.

References:
  Gargiani, Zanelli, Diehl, Hutter (2020), On the promise of the stochastic generalized Gauss-Newton
  method for training DNNs, arXiv 2006.02409 ("the paper").
  Ren, Goldfarb (2019), Efficient subsampled Gauss-Newton and natural gradient methods for training
  neural networks, arXiv 1906.02353.
  Korbit, Adeoye, Bemporad, Zanon (2024), Exact Gauss-Newton optimization for training deep neural
  networks, arXiv 2405.14402.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import operators
from secondorder import tree as vectors
from secondorder.checks import check_choice, check_range, check_static_count, is_zero
from secondorder.control import DampingRule, SearchResult, backtrack
from secondorder.methods.hessian_free_model import (
    HessianFreeMetrics,
    Parabola,
    no_metrics,
    parabola_of,
    steer,
)
from secondorder.methods.terminal import (
    Point,
    at,
    curvature_objective,
    judge,
    keep_unless,
    look,
    scaled_step,
    trial_value,
)
from secondorder.methods.transform import make_transform
from secondorder.objective import all_finite, check_params
from secondorder.solvers import conjugate_gradient

SolverKind: TypeAlias = Literal["conjugate_gradient", "dual"]

_RULE = DampingRule(smallest=1e-6)


class GaussNewtonState(NamedTuple):
    """State of `gauss_newton`.

    Attributes:
      count: Updates so far, int32.
      damping: ``λ``.
      momentum: Average of gradients, or None.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    damping: jax.Array
    momentum: chex.ArrayTree | None
    metrics: HessianFreeMetrics


class _Solution(NamedTuple):
    """A direction, its damped parabola, and how it was found."""

    direction: chex.ArrayTree
    parabola: Parabola
    iterations: jax.Array
    finite: jax.Array


def gauss_newton(
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    damping: chex.Numeric = 1e-3,
    damping_rule: DampingRule | None = _RULE,
    solver: SolverKind = "conjugate_gradient",
    max_iterations: int = 10,
    residual: chex.Numeric = 1e-6,
    momentum: chex.Numeric = 0.0,
    sufficient: chex.Numeric = 1e-4,
    shrink: chex.Numeric = 0.5,
    max_trials: int = 10,
    weight_decay: chex.Numeric = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Damped Gauss-Newton steps on minibatches.

    .. math:: d = -(G + \lambda I)^{-1} m

    with the Gauss-Newton matrix of the same batch as the gradient, whose average over steps is
    :math:`m`. The system is solved by a few iterations of conjugate gradients, or exactly in the
    space of the outputs of the batch, which is small where few cases have few outputs. A
    line search shortens the step; the ratio of the actual to the predicted reduction steers
    :math:`\lambda`.

    The paper's settings are::

        so.gauss_newton(max_iterations=10, damping=1e-4, momentum=0.0, sufficient=1e-4,
                        shrink=0.5, max_trials=10)

    with 2, 3, 5 or 10 iterations and batches of 1000; those of exact Gauss-Newton (Korbit et al.)::

        so.gauss_newton(solver="dual", damping=1.0, momentum=0.9)

    with batches of 32 to 128.

    Args:
      learning_rate: First rate that the line search tries, positive, or a schedule of it.
      damping: First :math:`\lambda`, positive for the dual solver.
      damping_rule: How it follows the ratio; None keeps it.
      solver: ``"conjugate_gradient"``, or ``"dual"``: an exact solve with a matrix of the size of
        the batch times the outputs; every parameter must then be in a linear layer. Static.
      max_iterations: Most iterations of conjugate gradients. Static.
      residual: They stop at this residual relative to the gradient.
      momentum: Decay of the average of gradients, in [0, 1).
      sufficient: Share of the slope's promise that a step must keep, in [0, 1).
      shrink: Factor in (0, 1) of the line search.
      max_trials: Most rates that it tries. Static.
      weight_decay: Coefficient :math:`\tau \ge 0` of :math:`\tau|\theta|^2/2`, which is added to
        the objective and its curvature.

    Returns:
      A terminal transform whose ``update`` needs ``params`` and a ``value_fn`` that is an
      `Objective`; value and gradient at the parameters are computed if they are not given.
      ``curvature_fn``, an `Objective` on another batch, gives the matrix if it is there. A batch
      that is not finite gives a zero update and changes only a counter.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x = jax.random.normal(jax.random.key(0), (32, 3))
      >>> objective = so.Objective(
      ...     lambda p: jnp.tanh(x @ p["w"]), lambda z: jnp.mean((z - jnp.tanh(x[:, :1])) ** 2))
      >>> params, tx = {"w": jnp.zeros((3, 1))}, so.gauss_newton(solver="dual")
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     grads = jax.grad(objective)(params)
      ...     updates, state = tx.update(grads, state, params, value_fn=objective)
      ...     params = optax.apply_updates(params, updates)
      >>> float(objective(params)) < 1e-4
      True

    References:
      Gargiani et al. (2020), algorithm 1; Ren, Goldfarb (2019), section 4.
    """
    check_choice("solver", solver, get_args(SolverKind))
    check_range("damping", damping, low=0, open_low=solver == "dual")
    check_static_count("max_iterations", max_iterations)
    check_static_count("max_trials", max_trials)
    for name, number in (("residual", residual), ("weight_decay", weight_decay)):
        check_range(name, number, low=0)
    for name, number in (("momentum", momentum), ("sufficient", sufficient), ("shrink", shrink)):
        check_range(name, number, low=0, high=1)
    if not callable(learning_rate):
        check_range("learning_rate", learning_rate, low=0, open_low=True)
    averages = not is_zero(momentum)

    def init(params: chex.ArrayTree) -> GaussNewtonState:
        check_params(params, "gauss_newton")
        dtype = vectors.accumulation_dtype(params)
        return GaussNewtonState(
            count=jnp.zeros((), jnp.int32),
            damping=jnp.array(damping, dtype),
            momentum=vectors.zeros_vector(params) if averages else None,
            metrics=no_metrics(dtype),
        )

    def update(
        updates: chex.ArrayTree,
        state: GaussNewtonState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        grad: chex.ArrayTree | None = None,
        value_fn: Any = None,
        curvature_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, GaussNewtonState]:
        del extra_args
        grad = updates if grad is None else grad
        point = look("gauss_newton", value_fn, params, value, grad, weight_decay)
        objective = curvature_objective("gauss_newton", value_fn, curvature_fn)

        # 1. The average of gradients.
        average, target = _average(state, point, momentum)

        # 2. The direction.
        shift = state.damping + weight_decay
        if solver == "dual":
            solution = _solve_dual(objective, point, target, shift)
        else:
            solution = _solve_by_products(objective, point, target, shift, max_iterations, residual)

        # 3. A step along it that decreases the objective sufficiently; or none.
        search = backtrack(
            partial(
                trial_value, value_fn, point.params, solution.direction, weight_decay=weight_decay
            ),
            point.value,
            solution.parabola.slope,
            first=at(learning_rate, state.count),
            shrink=shrink,
            sufficient=sufficient,
            max_trials=max_trials,
            resolution=point.resolution,
        )

        # 4. What the damped model promised, what the objective did, and the next damping.
        predicted = solution.parabola.change(search.rate)
        ratio = judge(point, search, predicted)
        new = GaussNewtonState(
            count=optax.safe_increment(state.count),
            damping=steer(damping_rule, state.damping, ratio),
            momentum=average,
            metrics=_report(state, solution, search, ratio, predicted),
        )
        step = scaled_step(point.params, solution.direction, search.rate)
        return step, keep_unless(point.usable, new, state)

    return make_transform("gauss_newton", init, update)


def _average(
    state: GaussNewtonState, point: Point, decay: chex.Numeric
) -> tuple[chex.ArrayTree | None, chex.ArrayTree]:
    """The new average of gradients, and the same without its bias towards zero."""
    if state.momentum is None:
        return None, point.gradient
    return vectors.moving_average(state.momentum, point.gradient, state.count, decay)


def _solve_by_products(
    objective: Any,
    point: Point,
    target: chex.ArrayTree,
    shift: chex.Numeric,
    max_iterations: int,
    residual: chex.Numeric,
) -> _Solution:
    """A few iterations of conjugate gradients from zero."""
    result = conjugate_gradient(
        operators.gauss_newton(objective, point.params).damped(shift),
        jax.tree.map(jnp.negative, target),
        vectors.one_block(point.params),
        max_iterations=max_iterations,
        progress=None,
        residual=residual,
    )
    parabola = parabola_of(target, result.solution, result.model[0], 0)
    slope = vectors.inner(point.gradient, result.solution)
    return _Solution(
        result.solution, parabola._replace(slope=slope), result.iterations[0], result.finite[0]
    )


def _solve_dual(
    objective: Any, point: Point, target: chex.ArrayTree, shift: chex.Numeric
) -> _Solution:
    """The exact solution, in the space of the outputs."""
    factors = operators.factor_gauss_newton(objective, point.params)
    blocks = vectors.one_block(point.params)
    descent = jax.tree.map(jnp.negative, target)
    direction = operators.dual_solve(factors, descent, shift, blocks)
    finite = all_finite(direction)
    direction = jax.tree.map(lambda d: jnp.where(finite, d, 0), direction)
    parabola = Parabola(vectors.inner(point.gradient, direction), vectors.inner(descent, direction))
    return _Solution(direction, parabola, jnp.zeros((), jnp.int32), finite)


def _report(
    state: GaussNewtonState,
    solution: _Solution,
    search: SearchResult,
    ratio: jax.Array,
    predicted: jax.Array,
) -> HessianFreeMetrics:
    old = state.metrics
    return old._replace(
        damping=state.damping,
        ratio=ratio,
        rate=search.rate,
        predicted=predicted,
        iterations=solution.iterations,
        products=solution.iterations,
        taken=solution.iterations,
        evaluations=search.trials,
        rejections=old.rejections + ~search.accepted,
        nonfinite_products=old.nonfinite_products + ~solution.finite,
    )
