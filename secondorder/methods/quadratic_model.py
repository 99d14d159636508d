r"""Steps that minimize a quadratic model with exact curvature, for any direction.

A direction says where to go, not how far. Here it is given its length, and the last step its share
in the next one, by minimizing the model of the objective on the plane of both; the damping of that
model follows from how well it predicts. This is what makes K-FAC run without a learning rate, and
nothing in it is of K-FAC.

References:
  Martens, Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature,
  arXiv 1503.05671, sections 6.4 to 7 ("the paper").
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import tree as vectors
from secondorder.checks import check_flag, check_range, check_static_count, is_zero
from secondorder.control import (
    DampingRule,
    minimize_on_plane,
    next_damping,
    reduction_ratio,
)
from secondorder.methods.terminal import (
    Point,
    curvature_objective,
    decayed_value,
    keep_unless,
    look,
    zero_metrics,
)
from secondorder.methods.transform import GuardedTransformation, make_transform
from secondorder.objective import all_finite, check_params
from secondorder.operators import gauss_newton_forms
from secondorder.sharding import shard_like

_NAME = "scale_by_quadratic_model"
_REALS = ("damping", "ratio", "predicted", "rate", "momentum", "step_norm")


class QuadraticModelMetrics(NamedTuple):
    """What `scale_by_quadratic_model` reports, all scalars.

    Attributes:
      damping: Of the last model.
      ratio: Actual over predicted reduction of the last step that was judged.
      predicted: Change of the objective that the last model without damping promised.
      rate: Coefficient of the direction in the last step.
      momentum: Coefficient of the step before.
      step_norm: Length of the last step.
      clipped: Steps that were shortened since `init`, int32.
      rejections: Steps since `init` that were not taken, as the objective behind them was not
        finite, int32.
      nonfinite_steps: Batches whose value, gradient, direction or curvature was not finite, int32.
    """

    damping: jax.Array
    ratio: jax.Array
    predicted: jax.Array
    rate: jax.Array
    momentum: jax.Array
    step_norm: jax.Array
    clipped: jax.Array
    rejections: jax.Array
    nonfinite_steps: jax.Array


class ScaleByQuadraticModelState(NamedTuple):
    """State of `scale_by_quadratic_model`.

    Attributes:
      count: Steps taken, int32.
      damping: That of the next model, float32 or wider.
      coefficients: Those of the direction and of the step before in the last step, ``(2,)``.
      last_step: The last step, like the parameters; or None.
      direction: State of the transform that gives the direction.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    damping: jax.Array
    coefficients: jax.Array
    last_step: chex.ArrayTree | None
    direction: optax.OptState
    metrics: QuadraticModelMetrics


class _Step(NamedTuple):
    """A step on the plane, by numbers alone.

    Attributes:
      coefficients: Of the direction and the last step ``(2,)``.
      slope: Its product with the gradient.
      curvature: Its value of the Gauss-Newton matrix.
      square: Its squared length.
    """

    coefficients: jax.Array
    slope: jax.Array
    curvature: jax.Array
    square: jax.Array

    def scaled(self, factor: jax.Array) -> "_Step":
        """The step times a number."""
        linear, quadratic = factor, factor**2
        return _Step(
            linear * self.coefficients,
            linear * self.slope,
            quadratic * self.curvature,
            quadratic * self.square,
        )


def scale_by_quadratic_model(
    direction: optax.GradientTransformation | None = None,
    *,
    damping: chex.Numeric = 1.0,
    damping_rule: DampingRule | None = None,
    adapt_every: int = 5,
    weight_decay: chex.Numeric = 0.0,
    momentum: bool = True,
    plane_every: int = 1,
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
    model without damping promised.

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

    Args:
      direction: Transform that makes the direction from the gradient; default: what arrives.
      damping: :math:`\lambda > 0` of the first model, in the scale of the curvature: a loss times
        ten needs one ten times larger.
      damping_rule: How the damping follows the ratio. Default: `DampingRule` with factors of
        :math:`(19/20)^T` for ``adapt_every`` :math:`T`, and its inverse, down to a hundredth of
        the first damping: along a line the model predicts well whatever the direction is, so that
        a good ratio does not say that the direction could do with less.
      adapt_every: Judge every so many steps. Static.
      weight_decay: :math:`\tau \ge 0`.
      momentum: Whether the last step has a share. Static.
      plane_every: Minimize on the plane in every so many steps only, and on the line of the last
        step's proportions between, which takes one pass forward instead of two. Static.
      max_norm: Longest step; None for any.
      max_divergence: Largest :math:`\tfrac12 \delta^\top G \delta`, which for the negative
        logarithm of a likelihood is about the Kullback-Leibler divergence between the model's
        distributions before and after the step; None for any.

    Returns:
      A transform whose ``update`` needs ``params`` and a ``value_fn`` that is an `Objective`;
      ``curvature_fn``, an `Objective` on another batch, replaces it in the curvature. Batches that
      are not finite give a zero update and change only a counter.

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
    clips = {"max_norm": max_norm, "max_divergence": max_divergence}
    _check_hyperparameters(damping, adapt_every, weight_decay, momentum, plane_every, clips)
    rule = _rule(damping, adapt_every) if damping_rule is None else damping_rule
    inner = optax.with_extra_args_support(optax.identity() if direction is None else direction)
    guards = isinstance(inner, GuardedTransformation)

    def init(params: chex.ArrayTree) -> ScaleByQuadraticModelState:
        check_params(params, _NAME)
        dtype = vectors.accumulation_dtype(params)
        return ScaleByQuadraticModelState(
            count=jnp.zeros((), jnp.int32),
            damping=jnp.full((), damping, dtype),
            coefficients=jnp.zeros((2,), dtype),
            last_step=jax.tree.map(jnp.zeros_like, params) if momentum else None,
            direction=inner.init(params),
            metrics=zero_metrics(QuadraticModelMetrics, dtype, _REALS),
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
        point = look(_NAME, value_fn, params, value, grad, weight_decay)
        objective: Any = curvature_objective(_NAME, value_fn, curvature_fn)  # one that splits
        forms = gauss_newton_forms(objective, params)

        # 2. The direction, which is told the damping. Of a batch that is not finite it sees NaN, if
        # it guards its state itself, and else zeros.
        usable = point.usable & all_finite(updates)
        decay = 0.0 if direction is None else weight_decay
        gradient = _typed(updates, params, usable, jnp.nan if guards else 0.0, decay)
        vector, direction_state = inner.update(
            gradient,
            state.direction,
            params,
            **extra_args,
            value=value,
            grad=grad,
            value_fn=value_fn,
            curvature_fn=curvature_fn,
            damping=state.damping + weight_decay,
        )

        # 3. Its length and the share of the last step, from the model; then the clips.
        with jax.named_scope("quadratic_model"):
            basis = (vector,) if state.last_step is None else (vector, state.last_step)
            free = _minimize(forms, point.gradient, basis, state, weight_decay, plane_every)
            step, clipped = _clip(free, max_norm, max_divergence)
            predicted = step.slope + (step.curvature + weight_decay * step.square) / 2
            taken = _combine(step.coefficients, basis, params)

        # 4. Every so often the ratio of actual to predicted reduction, and the damping.
        usable &= all_finite((vector, step))
        judged, ratio, accepted = _judge(
            value_fn, point, taken, predicted, weight_decay, state, adapt_every
        )
        following = jnp.where(judged, next_damping(rule, state.damping, ratio), state.damping)

        # 5. Nothing but a counter, if a number was not finite.
        moves = usable & accepted
        taken = jax.tree.map(lambda leaf: jnp.where(moves, leaf, jnp.zeros_like(leaf)), taken)
        new = ScaleByQuadraticModelState(
            count=optax.safe_increment(state.count),
            damping=following,
            coefficients=jnp.where(accepted, step.coefficients, 0),
            last_step=taken if momentum else None,
            direction=() if guards else direction_state,
            metrics=_report(
                state.metrics, step, ratio, predicted, clipped, ~accepted, state.damping
            ),
        )
        if not guards:
            return taken, keep_unless(usable, new, state)
        # To select a state that can be many times larger than the parameters would copy all of it.
        kept = keep_unless(usable, new, state._replace(direction=()))
        return taken, kept._replace(direction=direction_state)

    return make_transform(_NAME, init, update)


def _rule(damping: chex.Numeric, adapt_every: int) -> DampingRule:
    """The paper's, section 6.5: each of the steps between judgments counts for one twentieth."""
    return DampingRule(
        raise_by=(20 / 19) ** adapt_every,
        lower_by=(19 / 20) ** adapt_every,
        smallest=damping / 100,
    )


def _minimize(
    forms: Callable[[Sequence[chex.ArrayTree]], jax.Array],
    gradient: chex.ArrayTree,
    basis: tuple[chex.ArrayTree, ...],
    state: ScaleByQuadraticModelState,
    weight_decay: chex.Numeric,
    plane_every: int,
) -> _Step:
    """The minimizer of the damped model on the plane, or on the line of the last proportions."""
    shift = state.damping + weight_decay
    slopes = jnp.stack([vectors.inner(gradient, v) for v in basis])
    gram = _symmetric([[vectors.inner(v, w) for w in basis[: i + 1]] for i, v in enumerate(basis)])
    # Without a last step its row and column are zero, as they are before the first step.
    missing = 2 - len(basis)
    slopes, gram = jnp.pad(slopes, (0, missing)), jnp.pad(gram, (0, missing))

    def on_plane(_: jax.Array) -> _Step:
        curvature = jnp.pad(forms(basis), (0, missing))
        found = minimize_on_plane(slopes, curvature + shift * gram)
        return _Step(found, _dot(slopes, found), _form(curvature, found), _form(gram, found))

    def on_line(last: jax.Array) -> _Step:
        known = last[0] != 0
        share = jnp.where(known, last[1] / jnp.where(known, last[0], 1), 0)
        line = jnp.stack([jnp.ones_like(share), share])
        curvature = forms([_combine(line, basis, basis[0])])[0, 0]
        unit = _Step(line, _dot(slopes, line), curvature, _form(gram, line))
        damped = unit.curvature + shift * unit.square
        rate, _ = minimize_on_plane(jnp.pad(unit.slope[None], (0, 1)), _corner(damped))
        return unit.scaled(rate)

    if plane_every == 1 or missing:
        return on_plane(state.coefficients)
    is_due = state.count % plane_every == 0
    return jax.lax.cond(is_due, on_plane, on_line, state.coefficients)


def _symmetric(triangle: list[list[jax.Array]]) -> jax.Array:
    """A matrix from the rows of its lower triangle."""
    size = range(len(triangle))
    return jnp.stack([jnp.stack([triangle[max(i, j)][min(i, j)] for j in size]) for i in size])


def _corner(entry: jax.Array) -> jax.Array:
    """The matrix (2, 2) with one entry at its start, and zeros."""
    return jnp.pad(entry[None, None], (0, 1))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b)


def _form(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """``v^T M v``; sums of products, which no accelerator rounds."""
    return jnp.sum(matrix * vector[:, None] * vector[None, :])


def _combine(
    coefficients: jax.Array, basis: Sequence[chex.ArrayTree], like: chex.ArrayTree
) -> chex.ArrayTree:
    """A combination of the first vectors, typed and sharded like a pytree."""

    def leaf(like: jax.Array, *leaves: jax.Array) -> jax.Array:
        total = sum(c * v for c, v in zip(coefficients, leaves, strict=False))
        return shard_like(jnp.asarray(total).astype(like.dtype), like)

    return jax.tree.map(leaf, like, *basis)


def _clip(
    step: _Step, max_norm: chex.Numeric | None, max_divergence: chex.Numeric | None
) -> tuple[_Step, jax.Array]:
    """Shortens a step to the limits; whether it was."""
    limits = []
    if max_norm is not None:
        limits.append((step.square, max_norm**2))
    if max_divergence is not None:
        limits.append((step.curvature, 2 * max_divergence))
    factor = jnp.ones_like(step.slope)
    for size, limit in limits:
        factor = jnp.minimum(factor, jnp.sqrt(limit / jnp.maximum(size, limit)))
    return step.scaled(factor), factor < 1


def _judge(
    value_fn: Any,
    point: Point,
    step: chex.ArrayTree,
    predicted: jax.Array,
    weight_decay: chex.Numeric,
    state: ScaleByQuadraticModelState,
    adapt_every: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether the step is judged; the ratio, or the last one; whether the step can be taken."""

    def judge(_: jax.Array) -> tuple[jax.Array, jax.Array]:
        trial = decayed_value(value_fn, optax.apply_updates(point.params, step), weight_decay)
        ratio = reduction_ratio(point.value, trial, -predicted, point.resolution)
        return ratio.astype(state.metrics.ratio.dtype), jnp.isfinite(trial)

    def skip(last: jax.Array) -> tuple[jax.Array, jax.Array]:
        return last, jnp.isfinite(jnp.zeros_like(last))

    is_due = (state.count + 1) % adapt_every == 0
    return is_due, *jax.lax.cond(is_due, judge, skip, state.metrics.ratio)


def _typed(
    tree: chex.ArrayTree,
    params: chex.ArrayTree,
    usable: jax.Array,
    otherwise: float,
    weight_decay: chex.Numeric,
) -> chex.ArrayTree:
    """Updates with weight decay, float32 or wider, sharded as parameters, where they are usable."""
    dtype = vectors.accumulation_dtype(params)

    def leaf(update: jax.Array, param: jax.Array) -> jax.Array:
        update = shard_like(update, param)
        if not is_zero(weight_decay):
            update = update.astype(dtype) + weight_decay * param.astype(dtype)
        return jnp.where(usable, update, jnp.full_like(update, otherwise))

    return jax.tree.map(leaf, tree, params)


def _report(
    last: QuadraticModelMetrics,
    step: _Step,
    ratio: jax.Array,
    predicted: jax.Array,
    clipped: jax.Array,
    rejected: jax.Array,
    damping: jax.Array,
) -> QuadraticModelMetrics:
    """The metrics after a step."""
    return QuadraticModelMetrics(
        damping=damping,
        ratio=ratio,
        predicted=predicted,
        rate=step.coefficients[0],
        momentum=step.coefficients[1],
        step_norm=jnp.sqrt(jnp.maximum(step.square, 0)),
        clipped=last.clipped + clipped,
        rejections=last.rejections + rejected,
        nonfinite_steps=last.nonfinite_steps,
    )


def _check_hyperparameters(
    damping: Any, adapt_every: Any, weight_decay: Any, momentum: Any, plane_every: Any, clips: Any
) -> None:
    """Raises `ValueError` for whatever can be judged before tracing."""
    check_range("damping", damping, low=0, open_low=True)
    check_range("weight_decay", weight_decay, low=0)
    check_static_count("adapt_every", adapt_every)
    check_static_count("plane_every", plane_every)
    check_flag("momentum", momentum)
    for name, limit in clips.items():
        check_range(name, limit, low=0, open_low=True)
