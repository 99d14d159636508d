r"""Inexact Newton with conjugate gradients, which leaves saddle points along negative curvature.

Conjugate gradients on the true Hessian either solve Newton's equation, as accurately as it is worth
where the parameters are, or meet a direction along which the objective curves down. Gauss-Newton
methods never do: where the gradient vanishes they stay. The step has been tried when it is
returned: the method is *terminal*, as optax's line searches are.

References:
  Dembo, Eisenstat, Steihaug (1982), Inexact Newton methods, SIAM J. Numer. Anal. 19.
  Royer, O'Neill, Wright (2020), A Newton-CG algorithm with complexity guarantees for smooth
  unconstrained optimization, Mathematical Programming 180, arXiv 1803.02924.
  O'Leary-Roseberry, Alger, Ghattas (2019), Inexact Newton methods for stochastic non-convex
  optimization with applications to neural network training, arXiv 1905.06738.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import tree as vectors
from secondorder.checks import check_choice, check_flag, check_range, check_static_count
from secondorder.control import DampingRule, reduction_ratio
from secondorder.methods.hessian_free_model import steer
from secondorder.methods.newton_cg_step import (
    Direction,
    Equation,
    LineSearch,
    NegativeCurvature,
    choose_direction,
    pose,
    search_along,
)
from secondorder.methods.terminal import (
    Point,
    at,
    choose_like,
    curvature_objective,
    keep_unless,
    look,
    scaled_step,
    trial_value,
    value_dtype,
    zero_metrics,
)
from secondorder.methods.transform import make_transform
from secondorder.objective import (
    all_finite,
    check_params,
    value_and_aux,
    value_and_grad,
)
from secondorder.operators import LinearOperator, hessian
from secondorder.operators.hessian import HessianMode
from secondorder.solvers import CGResult, conjugate_gradient


class _Settings(NamedTuple):
    """The hyperparameters, but for the first damping; see `newton_cg`."""

    learning_rate: optax.ScalarOrSchedule
    mode: HessianMode
    damping_rule: DampingRule | None
    max_iterations: int
    forcing: chex.Numeric
    forcing_power: chex.Numeric
    negative_curvature: NegativeCurvature
    probe_length: chex.Numeric
    sufficient: chex.Numeric
    shrink: chex.Numeric
    max_trials: int
    full_batch: bool
    weight_decay: chex.Numeric
    seed: int


class NewtonCGMetrics(NamedTuple):
    """What `newton_cg` reports, all scalars.

    Attributes:
      damping: Of the last model.
      ratio: Actual over predicted reduction of the last step.
      rate: The step as a multiple of the direction that was taken; 0 if it was rejected.
      predicted: Change of the objective that the model without damping promised.
      curvature: The second derivative along the last direction of unit length.
      residual: The relative residual asked for at the last step.
      iterations: Of conjugate gradients at the last step, int32.
      evaluations: Values that its line search evaluated, int32.
      rejections: Steps rejected since `init`, int32.
      negative_curvature: Steps that met a direction of negative curvature since `init`, int32.
      probes: Steps at stationary points since `init`, which started from a random vector, int32.
      nonfinite_products: Steps that a product with a non-finite element cut short, int32.
      nonfinite_steps: Batches whose value or gradient was not finite; they changed nothing.
    """

    damping: jax.Array
    ratio: jax.Array
    rate: jax.Array
    predicted: jax.Array
    curvature: jax.Array
    residual: jax.Array
    iterations: jax.Array
    evaluations: jax.Array
    rejections: jax.Array
    negative_curvature: jax.Array
    probes: jax.Array
    nonfinite_products: jax.Array
    nonfinite_steps: jax.Array


class NewtonCGState(NamedTuple):
    r"""State of `newton_cg`.

    Attributes:
      count: Updates so far, int32.
      damping: :math:`\lambda`.
      largest_gradient: The largest gradient norm so far.
      value: With ``full_batch`` the value at the parameters after the step, else None.
      grad: With ``full_batch`` the gradient there, else None.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    damping: jax.Array
    largest_gradient: jax.Array
    value: jax.Array | None
    grad: chex.ArrayTree | None
    metrics: NewtonCGMetrics


def newton_cg(
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    mode: HessianMode = "forward_over_reverse",
    damping: chex.Numeric = 0.0,
    damping_rule: DampingRule | None = None,
    max_iterations: int = 50,
    forcing: chex.Numeric = 0.5,
    forcing_power: chex.Numeric = 0.5,
    negative_curvature: NegativeCurvature = "follow",
    probe_length: chex.Numeric = 1.0,
    sufficient: chex.Numeric = 1e-4,
    shrink: chex.Numeric = 0.5,
    max_trials: int = 30,
    full_batch: bool = False,
    weight_decay: chex.Numeric = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Inexact Newton by conjugate gradients, with an exit along negative curvature.

    Conjugate gradients on :math:`(H + \lambda I)\, d = -g` end where

    .. math::
      \|r\| \le \min\Big(\eta, \big(\|g\| / \textstyle\max_{i \le k} \|g_i\|\big)^p\Big)\, \|g\|,

    which makes the method superlinear near a minimum and cheap elsewhere, or at a direction with
    :math:`p^\top (H + \lambda I)\, p \le 0`. Of that one the step is

    .. math::
      d = -\operatorname{sgn}(g^\top p)\, \max\Big(\frac{|p^\top H p|}{\|p\|^2},
          \frac{|g^\top p|}{\|p\|}\Big)\, \frac{p}{\|p\|},

    the length of Royer, O'Neill and Wright, but not below that of a gradient step, as the curvature
    may be zero. A rate is accepted where

    .. math::
      f(\theta + \alpha d) \le f(\theta)
        + c\,\big(\alpha\, g^\top d + \tfrac12 \alpha^2 \min(d^\top H d, 0)\big),

    Armijo's condition if the curvature is positive. It shrinks until it is; along negative
    curvature, of which no model knows the end, it also grows while the objective falls. If none
    is accepted the step is zero. Where the gradient vanishes conjugate gradients start from a
    random vector: they find the way out of a saddle point, or that there is none.

    The settings of O'Leary-Roseberry, Alger and Ghattas are::

        so.newton_cg(max_iterations=10, damping=1e-3, forcing=1e-9, forcing_power=0.0,
                     negative_curvature="truncate", max_trials=10)

    Args:
      learning_rate: First rate that the line search tries, above 0, or a schedule of it.
      mode: How the Hessian is multiplied with: ``"forward_over_reverse"``,
        ``"reverse_over_reverse"`` or ``"central_difference"``; see `operators.hessian`. Static.
      damping: First :math:`\lambda \ge 0`.
      damping_rule: How it follows the ratio of actual to predicted reduction; None keeps it.
      max_iterations: Most iterations of conjugate gradients, each a product. Static.
      forcing: Largest relative residual :math:`\eta`, in [0, 1). With 0 all iterations are made.
      forcing_power: :math:`p \ge 0`; with 0 the residual is always :math:`\eta`.
      negative_curvature: What to do at a direction of negative curvature: ``"follow"`` it; or
        ``"truncate"``, go to the iterate that was reached before it, if there is one. Static.
      probe_length: Length of the first trial where gradient and curvature vanish, above 0.
      sufficient: Share ``c`` of what is promised that a step must keep, in (0, 1).
      shrink: Factor in (0, 1) of the line search; its inverse where the rate grows.
      max_trials: Most rates that it tries. Static.
      full_batch: Keep value and gradient at the accepted point in the state, for
        `optax.value_and_grad_from_state`; then an update costs one gradient in all. Static.
      weight_decay: Coefficient :math:`\tau \ge 0` of :math:`\tau|\theta|^2/2`, which is added to
        the objective and its Hessian.
      seed: Of the random vectors.

    Returns:
      A terminal transform whose ``update`` needs ``params`` and ``value_fn``, any callable;
      ``value`` is computed if it is not given, and the first argument is the gradient if ``grad``
      is not. ``curvature_fn``, an objective on another batch, gives the Hessian. Nothing should
      follow it in a chain. A batch that is not finite gives a zero update and changes only a
      counter.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> saddle = lambda p: p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4
      >>> params, tx = jnp.zeros(2), so.newton_cg()
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     value, grad = jax.value_and_grad(saddle)(params)
      ...     updates, state = tx.update(
      ...         grad, state, params, value=value, grad=grad, value_fn=saddle)
      ...     params = optax.apply_updates(params, updates)
      >>> round(float(saddle(params)), 4)
      -1.0

    References:
      Royer, O'Neill, Wright (2020), arXiv 1803.02924, algorithm 3; Nocedal, Wright (2006),
      Numerical Optimization, algorithm 7.1; O'Leary-Roseberry, Alger, Ghattas (2019),
      arXiv 1905.06738.
    """
    settings = _Settings(
        learning_rate, mode, damping_rule, max_iterations, forcing, forcing_power,
        negative_curvature, probe_length, sufficient, shrink, max_trials, full_batch, weight_decay,
        seed,
    )  # fmt: skip
    check_range("damping", damping, low=0)
    _check(settings)

    def init(params: chex.ArrayTree) -> NewtonCGState:
        check_params(params, "newton_cg")
        dtype = vectors.accumulation_dtype(params)
        return NewtonCGState(
            count=jnp.zeros((), jnp.int32),
            damping=jnp.array(damping, dtype),  # a copy, as states may be donated
            largest_gradient=jnp.zeros((), dtype),
            value=jnp.asarray(jnp.inf, value_dtype(params)) if full_batch else None,
            grad=jax.tree.map(lambda p: jnp.zeros_like(p, p.dtype), params) if full_batch else None,
            metrics=zero_metrics(
                NewtonCGMetrics,
                dtype,
                ("damping", "ratio", "rate", "predicted", "curvature", "residual"),
            ),
        )

    def update(
        updates: chex.ArrayTree,
        state: NewtonCGState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        grad: chex.ArrayTree | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        curvature_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, NewtonCGState]:
        del extra_args
        grad = updates if grad is None else grad
        point = look("newton_cg", value_fn, params, value, grad, weight_decay)
        objective: Any = value_fn

        # 1. Newton's equation; where the gradient vanishes, another to find negative curvature.
        matrix = _build_matrix(settings, value_fn, curvature_fn, point)
        equation = pose(
            point.gradient,
            state.largest_gradient,
            forcing,
            forcing_power,
            jax.random.fold_in(jax.random.key(seed), state.count),
        )

        # 2. Conjugate gradients, until the residual is small or the curvature negative.
        with jax.named_scope("conjugate_gradients"):
            result = conjugate_gradient(
                matrix.damped(state.damping),
                equation.right,
                vectors.one_block(equation.right),
                max_iterations=max_iterations,
                progress=None,
                residual=equation.residual,
            )
        direction = choose_direction(
            negative_curvature,
            matrix,
            state.damping,
            result,
            equation,
            point.gradient,
            probe_length,
        )

        # 3. A step that decreases the objective sufficiently; or none.
        search = search_along(
            partial(
                trial_value, objective, point.params, direction.vector, weight_decay=weight_decay
            ),
            point,
            direction,
            first=at(learning_rate, state.count),
            sufficient=sufficient,
            shrink=shrink,
            max_trials=max_trials,
        )
        rate = search.rate * point.usable
        step = scaled_step(point.params, direction.vector, rate)
        kept = None
        if full_batch:
            rate, step, kept = _look_ahead(objective, point.params, step, rate, value, grad)

        # 4. What the model promised, what the objective did, and the next damping.
        predicted = direction.parabola.change(rate)
        ratio = reduction_ratio(point.value, search.value, -predicted, point.resolution)
        ratio = jnp.where(rate > 0, ratio, -jnp.inf)
        steered = steer(damping_rule, state.damping, ratio)
        new = NewtonCGState(
            count=optax.safe_increment(state.count),
            damping=jnp.where(equation.is_probe, state.damping, steered),
            largest_gradient=equation.largest_gradient,
            value=None if kept is None else kept[0],
            grad=None if kept is None else kept[1],
            metrics=_report(state, equation, result, direction, search, rate, ratio, predicted),
        )
        return step, keep_unless(point.usable, new, state)

    return make_transform("newton_cg", init, update)


def _check(settings: _Settings) -> None:
    check_choice("mode", settings.mode, get_args(HessianMode))
    check_choice("negative_curvature", settings.negative_curvature, get_args(NegativeCurvature))
    check_static_count("max_iterations", settings.max_iterations)
    check_static_count("max_trials", settings.max_trials)
    check_flag("full_batch", settings.full_batch)
    if not callable(settings.learning_rate):
        check_range("learning_rate", settings.learning_rate, low=0, open_low=True)
    check_range("forcing", settings.forcing, low=0, high=1)
    check_range("probe_length", settings.probe_length, low=0, open_low=True)
    for name in ("forcing_power", "weight_decay"):
        check_range(name, getattr(settings, name), low=0)
    for name in ("sufficient", "shrink"):
        check_range(name, getattr(settings, name), low=0, high=1, open_low=True)


def _build_matrix(
    settings: _Settings, value_fn: Any, curvature_fn: Any, point: Point
) -> LinearOperator:
    """The Hessian without damping."""
    objective = curvature_objective("newton_cg", value_fn, curvature_fn, splits=False)
    with jax.named_scope("curvature"):
        return hessian(objective, point.params, settings.mode).damped(settings.weight_decay)


def _look_ahead(
    value_fn: Any,
    params: chex.ArrayTree,
    step: chex.ArrayTree,
    rate: jax.Array,
    value: jax.Array | None,
    grad: chex.ArrayTree,
) -> tuple[jax.Array, chex.ArrayTree, tuple[jax.Array, chex.ArrayTree]]:
    """Value and gradient after the step; without it, if they are not finite there."""
    value = value_and_aux(value_fn)(params)[0] if value is None else value
    there = value_and_grad(value_fn, optax.apply_updates(params, step))
    finite = all_finite(there)
    kept_value = jnp.where(finite, there[0], value)
    kept_grad = choose_like(finite, there[1], grad, params)
    step = jax.tree.map(lambda s: jnp.where(finite, s, jnp.zeros_like(s)), step)
    return jnp.where(finite, rate, 0), step, (kept_value, kept_grad)


def _report(
    state: NewtonCGState,
    equation: Equation,
    result: CGResult,
    direction: Direction,
    search: LineSearch,
    rate: jax.Array,
    ratio: jax.Array,
    predicted: jax.Array,
) -> NewtonCGMetrics:
    old = state.metrics
    square = vectors.inner(direction.vector, direction.vector)
    return NewtonCGMetrics(
        damping=state.damping,
        ratio=ratio,
        rate=rate,
        predicted=predicted,
        curvature=direction.parabola.curvature / jnp.where(square > 0, square, 1),
        residual=equation.residual,
        iterations=result.iterations[0],
        evaluations=search.trials,
        rejections=old.rejections + (rate == 0),
        negative_curvature=old.negative_curvature + result.negative_curvature[0],
        probes=old.probes + equation.is_probe,
        nonfinite_products=old.nonfinite_products + ~result.finite[0],
        nonfinite_steps=old.nonfinite_steps,
    )
