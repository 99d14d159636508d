r"""Hessian-free optimization: truncated Newton with the Gauss-Newton matrix, by products alone.

Each step minimizes a damped quadratic model of the objective by conjugate gradients, which need
nothing of the curvature matrix but its products with vectors. What the model promises and what the
objective then does decide the damping. The step has been tried when it is returned: the methods
here are *terminal*, as optax's line searches are.

References:
  Martens (2010), Deep learning via Hessian-free optimization, ICML ("the paper").
  Martens, Sutskever (2011), Learning recurrent neural networks with Hessian-free optimization.
  Kiros (2013), Training neural networks with stochastic Hessian-free optimization,
  arXiv 1301.3641.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import tree as vectors
from secondorder.checks import check_range, is_number, is_zero
from secondorder.control import (
    DampingRule,
    SearchResult,
    backtrack,
    best_stored,
)
from secondorder.methods.hessian_free_model import (
    CurvatureKind,
    Distance,
    HessianFreeMetrics,
    PreconditionerKind,
    Preconditioning,
    QuadraticModel,
    build_model,
    make_preconditioner,
    no_metrics,
    parabola_along,
    steer,
)
from secondorder.methods.hessian_free_settings import Settings, check_settings
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
from secondorder.objective import check_params
from secondorder.solvers import CGResult, conjugate_gradient

_RULE = DampingRule()
_STOCHASTIC_RULE = DampingRule(raise_by=1 / 0.99, lower_by=0.99)


class _Iterate(NamedTuple):
    """An iterate of conjugate gradients: itself, its damped model, its number, values tried."""

    solution: chex.ArrayTree
    model: jax.Array
    number: jax.Array
    value: jax.Array | None
    evaluations: jax.Array


class HessianFreeState(NamedTuple):
    """State of `hessian_free`.

    Attributes:
      count: Updates so far, int32.
      solution: The last solution of conjugate gradients, from which the next starts.
      damping: ``λ``.
      diagonal: Average of the diagonal behind the preconditioner, or None.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    solution: chex.ArrayTree
    damping: jax.Array
    diagonal: chex.ArrayTree | None
    metrics: HessianFreeMetrics


def hessian_free(
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    curvature: CurvatureKind = "gauss_newton",
    damping: chex.Numeric = 1.0,
    damping_rule: DampingRule | None = _RULE,
    max_iterations: int = 50,
    progress: chex.Numeric = 5e-4,
    warm_start: optax.ScalarOrSchedule = 0.95,
    backtracking: bool = True,
    preconditioner: PreconditionerKind | None = None,
    preconditioner_power: chex.Numeric = 0.75,
    preconditioner_probes: int = 1,
    preconditioner_decay: chex.Numeric = 0.95,
    structural_damping: chex.Numeric = 0.0,
    distance: Distance | None = None,
    sufficient: chex.Numeric = 1e-2,
    shrink: chex.Numeric = 0.8,
    max_trials: int = 60,
    weight_decay: chex.Numeric = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-free optimization.

    The step is an approximate minimizer of the damped model

    .. math:: q(d) = g^\top d + \tfrac12 d^\top (B + \lambda I) d

    by preconditioned conjugate gradients that stop when their progress becomes small. Of the
    iterates on an exponential grid the one with the least objective is taken, counted back from
    the last; a line search shortens it until the decrease is sufficient. If none is, the step is
    zero. The damping :math:`\lambda` follows the ratio of the actual to the predicted reduction.

    The paper's settings are::

        so.hessian_free(damping=45.0, max_iterations=250, progress=5e-4, warm_start=0.95,
                        preconditioner="empirical_fisher", preconditioner_power=0.75,
                        preconditioner_probes=10, preconditioner_decay=0.0, weight_decay=2e-5)

    with the gradient of all data and a ``curvature_fn`` on a part of it; for recurrent nets::

        so.hessian_free(damping=0.1, max_iterations=250, structural_damping=0.03,
                        distance=distance_of_hidden_states)

    Args:
      learning_rate: First rate that the line search tries, in (0, 1], or a schedule of it.
      curvature: ``"gauss_newton"``; ``"hessian"``, whose directions of negative curvature end the
        iterations; or ``"empirical_fisher"``. Static.
      damping: First :math:`\lambda \ge 0`.
      damping_rule: How it follows the ratio; None keeps it.
      max_iterations: Most iterations of conjugate gradients. Static.
      progress: They stop when the model's relative progress per iteration is below this.
      warm_start: Factor in [0, 1] of the last solution where they start, or a schedule of it. A
        start that is worse than zero is scaled down at no cost.
      backtracking: Whether iterates are stored and compared. Otherwise the last one is taken,
        and no memory is spent on them. Static.
      preconditioner: Diagonal that preconditions: ``"empirical_fisher"``, of squared gradients of
        single cases, or ``"gauss_newton"``; both estimated by random probes. Static.
      preconditioner_power: The preconditioner is :math:`(\mathrm{diag} + \lambda)^p`.
      preconditioner_probes: Probes per step, each a backward pass. Static.
      preconditioner_decay: Decay of the average of the diagonal over steps, in [0, 1).
      structural_damping: :math:`\mu`: adds :math:`\lambda \mu` times the Gauss-Newton matrix of
        ``distance`` to the curvature.
      distance: Maps two outputs of the model, the second constant, to a scalar that is least, and
        zero, where they are equal; such as the squared difference of hidden states, which the
        model then has to return among its outputs.
      sufficient: Share of the slope's promise that a step must keep, in [0, 1).
      shrink: Factor in (0, 1) of the line search.
      max_trials: Most rates that it tries. Static.
      weight_decay: Coefficient :math:`\tau \ge 0` of :math:`\tau|\theta|^2/2`, which is added to
        the objective and its curvature.
      seed: Of the probes.

    Returns:
      A terminal transform whose ``update`` needs ``params`` and a ``value_fn`` that is an
      `Objective` (or, if there is a ``curvature_fn``, any callable); value and gradient at the
      parameters are computed if they are not given. ``curvature_fn``, an `Objective` on another
      batch, gives the curvature. A batch that is not finite gives a zero update and changes only
      a counter.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x = jax.random.normal(jax.random.key(0), (64, 3))
      >>> objective = so.Objective(
      ...     lambda w: jnp.tanh(x @ w), lambda z: jnp.mean((z - jnp.tanh(x[:, 0])) ** 2))
      >>> params, tx = jnp.zeros(3), so.hessian_free()
      >>> state = tx.init(params)
      >>> for _ in range(15):
      ...     value, grad = jax.value_and_grad(objective)(params)
      ...     updates, state = tx.update(
      ...         grad, state, params, value=value, grad=grad, value_fn=objective)
      ...     params = optax.apply_updates(params, updates)
      >>> float(objective(params)) < 1e-4
      True

    References:
      Martens (2010), Deep learning via Hessian-free optimization; Martens, Sutskever (2012),
      Training deep and recurrent networks with Hessian-free optimization.
    """
    settings = Settings(
        learning_rate, curvature, damping_rule, max_iterations, progress, warm_start, backtracking,
        preconditioner, preconditioner_power, preconditioner_probes, preconditioner_decay,
        structural_damping, distance, sufficient, shrink, max_trials, weight_decay, seed,
    )  # fmt: skip
    check_range("damping", damping, low=0)
    check_settings(settings)
    splits = curvature != "hessian" or preconditioner is not None or distance is not None
    preconditioning = Preconditioning(
        preconditioner, preconditioner_power, preconditioner_probes, preconditioner_decay
    )

    def init(params: chex.ArrayTree) -> HessianFreeState:
        check_params(params, "hessian_free")
        dtype = vectors.accumulation_dtype(params)
        zeros = vectors.zeros_vector(params)
        return HessianFreeState(
            count=jnp.zeros((), jnp.int32),
            solution=zeros,
            damping=jnp.array(damping, dtype),
            diagonal=None if preconditioner is None else jax.tree.map(jnp.copy, zeros),
            metrics=no_metrics(dtype),
        )

    def update(
        updates: chex.ArrayTree,
        state: HessianFreeState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        grad: chex.ArrayTree | None = None,
        value_fn: Any = None,
        curvature_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, HessianFreeState]:
        del extra_args
        grad = updates if grad is None else grad
        point = look("hessian_free", value_fn, params, value, grad, weight_decay)
        objective = curvature_objective("hessian_free", value_fn, curvature_fn, splits)

        # 1. The damped model, linearized once for all products; conjugate gradients on it.
        structural = None if distance is None else (distance, structural_damping)
        model = build_model(curvature, structural, objective, point, state.damping, weight_decay)
        diagonal, weights = make_preconditioner(
            preconditioning,
            objective,
            point.params,
            jax.random.fold_in(jax.random.key(seed), state.count),
            state.diagonal,
            state.count,
            state.damping + weight_decay,
        )
        result = _solve(settings, model, weights, point, state)

        # 2. The stored iterate with the least objective, counted back from the last.
        value_along = partial(trial_value, value_fn, point.params, weight_decay=weight_decay)
        chosen = _choose_iterate(result, value_along)
        parabola = parabola_along(model, point.gradient, chosen.solution, chosen.model)

        # 3. A step along it that decreases the objective sufficiently; or none.
        first = at(learning_rate, state.count)
        search = backtrack(
            partial(value_along, chosen.solution),
            point.value,
            parabola.slope,
            first=first,
            shrink=shrink,
            sufficient=sufficient,
            max_trials=max_trials,
            resolution=point.resolution,
            first_value=chosen.value if is_number(first) and first == 1 else None,
        )

        # 4. What the model promised, what the objective did, and the next damping.
        predicted = parabola.change(search.rate)
        ratio = judge(point, search, predicted)
        new = HessianFreeState(
            count=optax.safe_increment(state.count),
            solution=result.solution,
            damping=steer(damping_rule, state.damping, ratio),
            diagonal=diagonal,
            metrics=_report(state, model, result, chosen, search, ratio, predicted),
        )
        step = scaled_step(point.params, chosen.solution, search.rate * point.usable)
        return step, keep_unless(point.usable, new, state)

    return make_transform("hessian_free", init, update)


def stochastic_hessian_free(
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    damping: chex.Numeric = 0.1,
    damping_rule: DampingRule | None = _STOCHASTIC_RULE,
    max_iterations: int = 5,
    warm_start: optax.ScalarOrSchedule = 0.5,
    backtracking: bool = False,
    preconditioner: PreconditionerKind | None = "empirical_fisher",
    weight_decay: chex.Numeric = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-free optimization on minibatches, with few products and a slow damping.

    `hessian_free` with the settings of Kiros (2013): at most five iterations of conjugate
    gradients, which start from a part of their last solution and so carry momentum, and a damping
    that changes by one percent. The gradient wants a batch of about 1000, the curvature a tenth of
    it. Kiros lets the start's factor grow and the rate fall from epoch to epoch::

        so.stochastic_hessian_free(
            learning_rate=optax.exponential_decay(1.0, steps_per_epoch, 0.998, staircase=True),
            warm_start=lambda count: jnp.minimum(0.5 * 1.01 ** (count // steps_per_epoch), 0.99),
            weight_decay=2e-7)

    and draws one dropout mask per update: close over one key in the objectives of a step. What
    else can be set, `hessian_free` sets.

    Args:
      learning_rate: First rate that the line search tries, positive, or a schedule of it.
      damping: First damping.
      damping_rule: How it follows the ratio of actual to predicted reduction.
      max_iterations: Most iterations of conjugate gradients. Static.
      warm_start: Factor of the last solution where they start, or a schedule of it.
      backtracking: Whether iterates are stored and compared; of five, one would be. Static.
      preconditioner: Diagonal that preconditions. Static.
      weight_decay: Coefficient :math:`\tau \ge 0` of :math:`\tau|\theta|^2/2`.
      seed: Of the probes behind the preconditioner.

    Returns:
      A terminal transform, as `hessian_free` returns.

    Example:
      >>> import secondorder as so
      >>> tx = so.stochastic_hessian_free(weight_decay=2e-7)

    References:
      Kiros (2013), Training neural networks with stochastic Hessian-free optimization,
      arXiv 1301.3641.
    """
    return hessian_free(
        learning_rate=learning_rate,
        damping=damping,
        damping_rule=damping_rule,
        max_iterations=max_iterations,
        warm_start=warm_start,
        backtracking=backtracking,
        preconditioner=preconditioner,
        weight_decay=weight_decay,
        seed=seed,
    )


def _solve(
    settings: Settings,
    model: QuadraticModel,
    preconditioner: chex.ArrayTree | None,
    point: Point,
    state: HessianFreeState,
) -> CGResult:
    """Conjugate gradients from a part of the last solution."""
    decay = at(settings.warm_start, state.count)
    start = None  # which saves the product with it
    if not is_zero(decay):
        start = jax.tree.map(lambda x: (decay * x).astype(x.dtype), state.solution)
    with jax.named_scope("conjugate_gradients"):
        return conjugate_gradient(
            model.matrix,
            jax.tree.map(jnp.negative, point.gradient),
            vectors.one_block(point.params),
            start=start,
            preconditioner=preconditioner,
            max_iterations=settings.max_iterations,
            progress=settings.progress,
            store=settings.backtracking,
        )


def _choose_iterate(
    result: CGResult, value_along: Callable[[chex.ArrayTree, chex.Numeric], jax.Array]
) -> _Iterate:
    """The last iterate; or that of the stored ones which `best_stored` finds."""
    if result.stored_at is None or result.stored_model is None:
        none = jnp.zeros((), jnp.int32)
        return _Iterate(result.solution, result.model[0], result.iterations[0], None, none)
    last = jnp.sum(result.stored_at >= 0) - 1
    best = best_stored(lambda index: value_along(vectors.read(result.stored, index), 1.0), last)
    slot = jnp.maximum(best.place, 0)
    found = best.place >= 0
    return _Iterate(
        jax.tree.map(lambda x: jnp.where(found, x, 0), vectors.read(result.stored, slot)),
        jnp.where(found, result.stored_model[slot, 0], 0),
        jnp.where(found, result.stored_at[slot], 0),
        best.value,
        best.evaluations,
    )


def _report(
    state: HessianFreeState,
    model: QuadraticModel,
    result: CGResult,
    chosen: _Iterate,
    search: SearchResult,
    ratio: jax.Array,
    predicted: jax.Array,
) -> HessianFreeMetrics:
    old = state.metrics
    return HessianFreeMetrics(
        damping=model.damping,
        ratio=ratio,
        rate=search.rate,
        predicted=predicted,
        iterations=result.iterations[0],
        products=result.products,
        taken=chosen.number,
        evaluations=chosen.evaluations + search.trials,
        rejections=old.rejections + ~search.accepted,
        negative_curvature=old.negative_curvature + result.negative_curvature[0],
        nonfinite_products=old.nonfinite_products + ~result.finite[0],
        nonfinite_steps=old.nonfinite_steps,
    )
