r"""Steps that minimize a quadratic model with exact curvature, for any direction.

A direction says where to go, not how far. Here it is given its length, and the last step its share
in the next one, by minimizing the model of the objective on the plane of both; the damping of that
model follows from how well it predicts. This is what makes K-FAC run without a learning rate, and
nothing in it is of K-FAC.

References:
  Martens, Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature,
  arXiv 1503.05671, sections 6.4 to 7 ("the paper").
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import tree as vectors
from secondorder.checks import check_flag, check_range, check_static_count, is_zero
from secondorder.control import (
    DampingRule,
    confirm,
    confirmed_length,
    init_confirmation,
    next_damping,
    raised_damping,
    reduction_ratio,
)
from secondorder.layers.blocks import parameter_blocks
from secondorder.layers.layer import Layers
from secondorder.methods.quadratic_model_state import (
    ScaleByQuadraticModelState,
    has_step,
    init_metrics,
    report,
    stay,
)
from secondorder.methods.quadratic_model_step import (
    choose,
    clip,
    combine,
    minimize,
    plane_of,
    rates_of_parts,
)
from secondorder.methods.quadratic_model_trial import is_acceptable, review_last_step, try_step
from secondorder.methods.terminal import curvature_objective, look, select_state
from secondorder.methods.transform import GuardedTransformation, make_transform, spoiled_unless
from secondorder.objective import all_finite, check_params
from secondorder.operators import gauss_newton_forms
from secondorder.sharding import replicated_zeros, shard_like
from secondorder.tree import Blocks, BlockSetting

_NAME = "scale_by_quadratic_model"
_EARLY = 20  # Steps that are all judged, as a first damping that is too small shows at once.
_DECAY = 0.9  # of the average of the objective


def scale_by_quadratic_model(
    direction: optax.GradientTransformation | None = None,
    *,
    damping: chex.Numeric = 1.0,
    damping_rule: DampingRule | None = None,
    adapt_every: int = 5,
    weight_decay: chex.Numeric = 0.0,
    momentum: bool = True,
    plane_every: int = 1,
    parts: Layers | BlockSetting = None,
    rates_every: int = 10,
    confirmation: chex.Numeric | None = 2.0,
    max_norm: chex.Numeric | None = None,
    max_divergence: chex.Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives a direction its length, and the last step its share, by a quadratic model.

    With the direction :math:`d` and the last step :math:`v`, the step
    :math:`\delta = a d + b v` minimizes

    .. math::
      m(\delta) = \delta^\top \nabla f
        + \tfrac12 \delta^\top (G + (\tau + \lambda) I)\, \delta ,

    where :math:`G` is the exact Gauss-Newton matrix of the batch and :math:`f` has the weight decay
    :math:`\tau |\theta|^2 / 2` in it. Only products with ``J`` are needed, which two passes forward
    through one linearization give. In every ``adapt_every``-th step the objective is evaluated
    after it, and the damping :math:`\lambda` follows the ratio of the change to that which the
    model without damping promised. In each of the first twenty steps it is evaluated, and a bad
    ratio raises the damping: one that is too small shows at once, and in five steps leads anywhere.

    A step that is evaluated, and behind which the objective is not finite or has risen, is not
    taken, and the damping is raised by a factor of four; the next step is tried as well, as the
    first one is. An untried step that the next batch has risen over by more than its size is undone
    by it: the update is minus that step, and the damping is raised. A batch is evaluated where the
    last step began if its objective is far above the average, so that a hard one is not taken for a
    bad step. Of batches that are not finite, which can be bad data, the first changes a counter
    only, and the second in a row undoes the step.

    The coefficients have signs, so that ``d`` may be a preconditioned gradient or a step. The
    result is the step itself: no learning rate follows. Whatever stands behind in a chain may
    change it, as the last step is just a direction to look along.

    As a link of a chain it takes what arrives as the direction::

        optax.chain(so.scale_by_kbfgs(layers), so.scale_by_quadratic_model())

    With the direction as an argument, that also sees the damping: its ``update`` is called with the
    extra argument ``damping``, :math:`\lambda + \tau`, which `scale_by_kfac`, `scale_by_kbfgs` and
    `scale_by_low_rank_saddle_free_newton` take in place of their own; others ignore it. It gets the
    gradient with the weight decay::

        so.scale_by_quadratic_model(so.scale_by_kfac(layers), damping=10.0)

    What arrives is then the gradient, unless ``grad`` is given; else that is evaluated, if it is
    not given.

    Args:
      direction: Transform that makes the direction from the gradient; default: what arrives.
      damping: :math:`\lambda > 0` of the first model, in the scale of the curvature: a loss times
        ten needs one ten times larger.
      damping_rule: How the damping follows the ratio. Default: `DampingRule` with factors of
        :math:`(19/20)^T` for ``adapt_every`` :math:`T`, and its inverse, down to a hundredth of
        the first damping: along a line the model predicts well whatever the direction is, so that
        a good ratio does not say that the direction could do with less. A first damping that is
        too large by more than that is never left; the metric ``bound`` tells.
      adapt_every: Judge every so many steps, and each of the first twenty. Static.
      weight_decay: :math:`\tau \ge 0`.
      momentum: Whether the last step has a share; it is kept in any case. Static.
      plane_every: Minimize on the plane in every so many steps only, and on the line of the last
        step's proportions between, which takes one pass forward instead of two. Static.
      parts: Parts of the parameters in which the direction has rates of its own: a result of
        `find_layers`; a function from the path of a leaf to the label of its part; or a pytree of
        labels. The rates minimize the model on the parts, with Marquardt's damping and none below
        zero, and :math:`d` is then the direction with them. It pays where layers want steps of
        different lengths, as blocks that neglect what is between them give. None for one rate.
        Static.
      rates_every: Choose these rates in every so many steps, for as many more passes forward as
        there are parts, each from its part to the outputs. Static.
      confirmation: Multiple :math:`c > 0`. What is best for a small batch is too long for all
        others: steps are multiplied by :math:`\min(1, c\, \bar\sigma)`, with the average share
        :math:`\bar\sigma` of the slope :math:`\delta^\top g` that the next batch confirms where
        the model is minimized on the plane. Costs nothing. One is best for a single step; over
        many a part of the noise averages, and longer ones, up to about 4, can be faster. None,
        which must be static, for steps as they are: with large batches faster still.
      max_norm: Longest step; None for any.
      max_divergence: Largest :math:`\tfrac12 \delta^\top G \delta`, which for the negative
        logarithm of a likelihood is about the Kullback-Leibler divergence between the model's
        distributions before and after the step; None for any.

    Returns:
      A transform whose ``update`` needs ``params`` and a ``value_fn`` that is an `Objective`;
      ``curvature_fn``, an `Objective` on another batch, replaces it in the curvature. A batch that
      is not finite gives a zero update and changes only a counter; the second in a row undoes the
      last step.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x = jnp.array([[1.0, 2.0], [3.0, 1.0]])
      >>> objective = so.Objective(lambda w: x @ w, lambda z: jnp.sum((z - 1) ** 2))
      >>> tx = so.scale_by_quadratic_model(damping=1e-3)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     value, grads = jax.value_and_grad(objective)(params)
      ...     updates, state = tx.update(
      ...         grads, state, params, value=value, grad=grads, value_fn=objective)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(objective(params) < 1e-5)  # with exact curvature: conjugate gradients
      True

    References:
      Martens, Grosse (2015), arXiv 1503.05671.
    """
    limits = {
        "confirmation": confirmation,
        "max_norm": max_norm,
        "max_divergence": max_divergence,
    }
    periods = {"adapt_every": adapt_every, "plane_every": plane_every, "rates_every": rates_every}
    _check_hyperparameters(damping, weight_decay, momentum, periods, limits)
    rule = _rule(damping, adapt_every) if damping_rule is None else damping_rule
    inner = optax.with_extra_args_support(optax.identity() if direction is None else direction)
    guards = isinstance(inner, GuardedTransformation)

    def init(params: chex.ArrayTree) -> ScaleByQuadraticModelState:
        check_params(params, _NAME)
        dtype = vectors.accumulation_dtype(params)
        return ScaleByQuadraticModelState(
            count=jnp.zeros((), jnp.int32),
            damping=jnp.full((), damping, dtype),
            coefficients=replicated_zeros((2,), dtype),
            last_step=jax.tree.map(jnp.zeros_like, params),
            suspect=jnp.zeros((), bool),
            average=jnp.zeros((), dtype),
            confirmation=init_confirmation(dtype),
            rates=() if parts is None else _equal_rates(parameter_blocks(parts, params), dtype),
            direction=inner.init(params),
            metrics=init_metrics(dtype),
        )

    def update(
        updates: chex.ArrayTree,
        state: ScaleByQuadraticModelState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        grad: chex.ArrayTree | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        curvature_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByQuadraticModelState]:
        # 1. Value and gradient of the objective, with weight decay.
        known = updates if grad is None and direction is not None else grad
        point = look(_NAME, value_fn, params, value, known, weight_decay, zeroed=False)
        objective: Any = curvature_objective(_NAME, value_fn, curvature_fn)  # one that splits
        forms = gauss_newton_forms(objective, params)

        # 2. Whether the batch regrets the last step; then it is undone, and no other is made.
        average = jnp.where(state.count == 0, point.value, state.average)
        review = review_last_step(
            value_fn, point, state.last_step, average, weight_decay, has_step(state)
        )

        # 3. The direction, which is told the damping, and of a batch that is not finite as well, if
        # it guards its state itself.
        usable = point.usable & all_finite(updates) & ~review.regrets
        gradient = _typed(updates, params, 0.0 if direction is None else weight_decay)
        vector, direction_state = inner.update(
            spoiled_unless(usable, gradient) if guards else gradient,
            state.direction,
            params,
            **extra_args,
            value=value,
            grad=grad,
            value_fn=value_fn,
            curvature_fn=curvature_fn,
            damping=state.damping + weight_decay,
        )

        # 4. The rates of its parts, if it has some.
        shift, rates = state.damping + weight_decay, state.rates
        if parts is not None:
            blocks = parameter_blocks(parts, params)
            rates = jax.lax.cond(
                state.count % rates_every == 0,
                lambda _: rates_of_parts(blocks, objective, params, point.gradient, vector, shift),
                lambda rates: rates,
                state.rates,
            )
            vector = vectors.block_scale(blocks, rates, vector)

        # 5. Its length and the share of the last step, from the model; then the limits.
        with jax.named_scope("quadratic_model"):
            plane = plane_of(vector, state.last_step if momentum else None)
            is_due = None if plane_every == 1 else state.count % plane_every == 0
            last = state.coefficients / plane.scales
            free, behind = minimize(forms, point.gradient, plane, shift, last, is_due)
            known = confirm(
                state.confirmation,
                vectors.inner(point.gradient, state.last_step),
                _decayed(behind, state.last_step, weight_decay) if momentum else None,
            )
            if confirmation is not None:
                free = free.times(confirmed_length(known.share, confirmation))
            step, clipped = clip(free, max_norm, max_divergence)
            curvature = step.curvature + weight_decay * step.square
            predicted = step.slope + curvature / 2

            def propose() -> chex.ArrayTree:
                return combine(step.coefficients, plane, params)

        # 6. Every so often the ratio of actual to predicted reduction, and the damping.
        usable &= all_finite((plane.scales, step))
        is_due = (state.count + 1) % adapt_every == 0
        is_judged = is_due | (state.count < _EARLY)
        is_tried = is_judged | ~has_step(state)
        trial = try_step(value_fn, point, propose, weight_decay, is_tried)
        ratio = reduction_ratio(point.value, trial, -predicted, point.resolution)
        accepted = is_acceptable(trial, point.value, ratio)
        ratio = jnp.where(is_judged | ~accepted, ratio, state.metrics.ratio)
        steered = next_damping(rule, state.damping, ratio)
        raised = jnp.where(is_judged, jnp.maximum(state.damping, steered), state.damping)
        steered = jnp.where(is_due, steered, raised)

        # 7. A step, none, or the last one back.
        undoes = review.regrets | (~usable & state.suspect & has_step(state))
        taken = choose(usable & accepted, propose(), undoes, state.last_step)
        new = ScaleByQuadraticModelState(
            count=optax.safe_increment(state.count),
            damping=jnp.where(accepted, steered, raised_damping(rule, state.damping)),
            coefficients=jnp.where(accepted, step.coefficients * plane.scales, 0),
            last_step=taken,
            suspect=jnp.zeros_like(state.suspect),
            average=_DECAY * average + (1 - _DECAY) * point.value,
            confirmation=known._replace(
                slope=jnp.where(accepted, step.slope, 0),
                curvature=jnp.where(accepted, curvature, 0),
            ),
            rates=rates,
            direction=() if guards else direction_state,
            metrics=report(
                state,
                rule,
                step,
                plane.scales,
                ratio,
                predicted,
                known,
                clipped,
                review.is_made.astype(jnp.int32) + is_tried,
                accepted,
            ),
        )
        stayed = stay(state, undoes, review, rule)
        if not guards:
            return taken, select_state(usable, new, stayed)
        # To select a state that can be many times larger than the parameters would copy all of it.
        kept = select_state(usable, new, stayed._replace(direction=()))
        return taken, kept._replace(direction=direction_state)

    return make_transform(_NAME, init, update)


def _rule(damping: chex.Numeric, adapt_every: int) -> DampingRule:
    """The paper's, section 6.5: each of the steps between judgments counts for one twentieth."""
    return DampingRule(
        raise_by=(20 / 19) ** adapt_every,
        lower_by=(19 / 20) ** adapt_every,
        smallest=damping / 100,
    )


def _equal_rates(blocks: Blocks, dtype: Any) -> jax.Array:
    return 1 + replicated_zeros((len(blocks),), dtype)


def _decayed(curvature: jax.Array, vector: chex.ArrayTree, weight_decay: chex.Numeric) -> jax.Array:
    """The curvature along a vector, with that of the weight decay."""
    if is_zero(weight_decay):
        return curvature
    return curvature + weight_decay * vectors.inner(vector, vector)


def _typed(
    tree: chex.ArrayTree, params: chex.ArrayTree, weight_decay: chex.Numeric
) -> chex.ArrayTree:
    """Updates with weight decay, float32 or wider, sharded as parameters."""
    dtype = vectors.accumulation_dtype(params)

    def leaf(update: jax.Array, param: jax.Array) -> jax.Array:
        update = shard_like(update, param)
        if not is_zero(weight_decay):
            update = update.astype(dtype) + weight_decay * param.astype(dtype)
        return update

    return jax.tree.map(leaf, tree, params)


def _check_hyperparameters(
    damping: Any,
    weight_decay: Any,
    momentum: Any,
    periods: dict[str, Any],
    limits: dict[str, Any],
) -> None:
    """Raises `ValueError` for whatever can be judged before tracing."""
    check_range("damping", damping, low=0, open_low=True)
    check_range("weight_decay", weight_decay, low=0)
    check_flag("momentum", momentum)
    for name, period in periods.items():
        check_static_count(name, period)
    for name, limit in limits.items():
        check_range(name, limit, low=0, open_low=True)
