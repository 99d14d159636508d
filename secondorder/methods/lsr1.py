r"""L-SR1: limited-memory symmetric rank-one quasi-Newton, with a trust region.

SR1 approximates the Hessian without forcing it to be positive definite: near a saddle point its
model has the negative curvature that leads away. A model that may be unbounded needs a region in
which it is trusted, or a penalty; each trial step is judged by the objective itself, on the same
batch that the model is made of, before it is taken. That makes `lsr1` *terminal*, as optax's line
searches are: what it returns is the step.

References:
  Ramamurthy, Duffy. L-SR1: A Second Order Optimization Method for Deep Learning. ICLR 2017
  submission ("the paper").
  Byrd, Nocedal, Schnabel (1994), Representations of quasi-Newton matrices and their use in limited
  memory methods. Mathematical Programming 63.
  Brust, Erway, Marcia (2017), On solving L-SR1 trust-region subproblems. arXiv 1506.07222.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from secondorder import tree as vectors
from secondorder.checks import check_choice, check_flag, check_range, check_static_count
from secondorder.control import RadiusRule, follow_slope, next_radius, reduction_ratio
from secondorder.methods.lsr1_model import (
    ModelKind,
    Products,
    ScaleSetting,
    SR1Model,
    build_model,
    check_scale,
    clear_empty,
    products_of_newest,
)
from secondorder.methods.lsr1_pairs import (
    can_be_stored,
    curvature_gradients,
    make_pair,
    times,
    update_metric,
)
from secondorder.methods.lsr1_proposal import LastStep, Proposal, propose
from secondorder.methods.lsr1_state import LSR1State, no_metrics, report
from secondorder.methods.terminal import (
    add_decay,
    choose_like,
    coarsest_resolution,
    keep_unless,
    value_dtype,
)
from secondorder.methods.transform import make_transform
from secondorder.objective import (
    all_finite,
    check_has_arrays,
    check_params,
    check_value_fn,
    value_and_aux,
    value_and_grad,
)
from secondorder.tree import PairMemory


class _Defaults(NamedTuple):
    """Settings that were measured to be best on minibatches, and on one batch throughout."""

    memory_size: int
    scale: ScaleSetting
    radius: float
    radius_rule: RadiusRule
    momentum: float
    diagonal: bool


_MINIBATCHES = _Defaults(5, "pencil_below", 1.0, RadiusRule(), 0.5, diagonal=True)
_FULL_BATCH = _Defaults(
    20, "least_rayleigh", 3.0, RadiusRule(shrink_below=0.25, grow_above=0.3), 0.0, diagonal=False
)


def lsr1(
    *,
    memory_size: int | None = None,
    model: ModelKind = "trust_region",
    scale: ScaleSetting | None = None,
    radius: chex.Numeric | None = None,
    radius_rule: RadiusRule | None = None,
    acceptance: chex.Numeric = 1e-4,
    skip: chex.Numeric = 1e-8,
    momentum: chex.Numeric | None = None,
    diagonal: bool | None = None,
    diagonal_decay: chex.Numeric = 0.99,
    restart_after: chex.Numeric = 5,
    update_every: int = 1,
    storage_dtype: DTypeLike | None = None,
    full_batch: bool = False,
    weight_decay: chex.Numeric = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""L-SR1 with a trust region: Newton-like steps that saddle points do not stop.

    With the pairs :math:`(s, y)` of the last trial steps, SR1 makes a matrix
    :math:`B = \gamma I + \Psi W \Psi^\top`, and the trial step is

    .. math:: p = \arg\min_p\; g^\top p + \tfrac12 p^\top B p, \qquad \|p\| \le \Delta.

    The objective is evaluated at :math:`\theta + p`, on the same batch; the step is returned if the
    reduction is at least ``acceptance`` times the predicted one, and zeros are if not. Either way
    :math:`s = p` and :math:`y = \nabla f(\theta + p) - \nabla f(\theta)` become a pair: a step that
    failed carries the curvature that the model lacked. One update costs one value and gradient
    more than the caller's own.

    The paper's settings are::

        so.lsr1(memory_size=5, model="trust_region", scale="bb", radius=1.0, momentum=0.0,
                diagonal=False, radius_rule=so.RadiusRule(shrink=0.5, grow=2.0), skip=1e-8)

    (it does not state ``scale`` and ``radius``). Arguments that are None take the values that were
    measured to be best:

    ==============  ==================  ====================================================
    argument        minibatches         ``full_batch=True``
    ==============  ==================  ====================================================
    `memory_size`   5                   20
    `scale`         ``"pencil_below"``  ``"least_rayleigh"``
    `radius`        1                   3
    `radius_rule`   ``RadiusRule()``    ``RadiusRule(shrink_below=0.25, grow_above=0.3)``
    `momentum`      0.5                 0
    `diagonal`      True                False
    ==============  ==================  ====================================================

    Args:
      memory_size: Number of pairs ``m``. Static.
      model: ``"trust_region"``: a Euclidean ball, solved exactly; ``"shape_changing"``: a box in
        the eigenbasis of ``B``; ``"cubic"``: a cubic penalty; ``"regularized"`` (or
        ``"regularised"``): a multiple of the identity added to ``B``. Static.
      scale: :math:`\gamma`: ``"least_rayleigh"`` (the smallest positive curvature of a pair),
        ``"bb"`` (Barzilai-Borwein of the newest), ``"pencil_below"`` or ``"pencil_above"`` (outside
        the curvature of all pairs), or a number.
      radius: First :math:`\Delta > 0`; for the last two models the inverse of the penalty's weight.
      radius_rule: How it follows the ratio of actual to predicted reduction; with a ``slope_rate``,
        such as 0.03, also what the next batch says of a step: against noise.
      acceptance: Least ratio of a step that is taken, in [0, 1).
      skip: Pairs with :math:`|s^\top r| <` this times :math:`\|s\| \|r\|` are left out, where
        :math:`r = y - B s`.
      momentum: Share of the previous step that is mixed into a step, in [0, 1).
      diagonal: Whether the roots of the second moments of the gradient are a metric ``D``, as in
        Adam: :math:`B_0 = \gamma D`, and regions are ellipsoids. Static.
      diagonal_decay: Decay of these moments, in [0, 1).
      restart_after: Empty the memory after so many rejections in a row.
      update_every: Make a pair at every so many steps only, once the memory is full. Other steps
        evaluate the objective at the trial point without its gradient, which saves about two
        thirds of that evaluation. Static.
      storage_dtype: Of the stored vectors, such as ``jnp.bfloat16``; default float32 or wider.
      full_batch: Keep value and gradient at the accepted point in the state, for
        `optax.value_and_grad_from_state`; then an update costs one gradient in all. Static.
      weight_decay: Coefficient :math:`\tau \ge 0` of :math:`\tau|\theta|^2/2`, which is added to
        the objective.
      seed: Of the random steps that are tried where the gradient vanishes.

    Returns:
      A transform whose ``update`` needs ``params`` and ``value_fn``; ``value`` and ``grad`` at the
      parameters are computed if they are not given. ``curvature_fn``, an objective on another
      batch, gives the pairs if it is there, at two of its gradients. Nothing should follow it in
      a chain. Batches that are not finite give a zero update and change only a counter.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> saddle = lambda p: p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4
      >>> params, tx = jnp.zeros(2), so.lsr1(full_batch=True)
      >>> state = tx.init(params)
      >>> value_and_grad = optax.value_and_grad_from_state(saddle)
      >>> for _ in range(40):
      ...     value, grad = value_and_grad(params, state=state)
      ...     updates, state = tx.update(
      ...         grad, state, params, value=value, grad=grad, value_fn=saddle)
      ...     params = optax.apply_updates(params, updates)
      >>> round(float(saddle(params)), 4)
      -1.0

    References:
      Ramamurthy, Duffy (2017), L-SR1: A Second Order Optimization Method for Deep Learning;
      Nocedal, Wright (2006), Numerical Optimization, algorithm 6.2.
    """
    check_flag("full_batch", full_batch)
    defaults = _FULL_BATCH if full_batch else _MINIBATCHES
    memory_size = defaults.memory_size if memory_size is None else memory_size
    scale = defaults.scale if scale is None else scale
    radius = defaults.radius if radius is None else radius
    radius_rule = defaults.radius_rule if radius_rule is None else radius_rule
    momentum = defaults.momentum if momentum is None else momentum
    diagonal = defaults.diagonal if diagonal is None else diagonal
    check_flag("diagonal", diagonal)
    check_static_count("memory_size", memory_size)
    check_choice("model", model, get_args(ModelKind))
    check_scale(scale)
    check_range("radius", radius, low=0, open_low=True)
    check_range("acceptance", acceptance, low=0, high=1)
    check_range("skip", skip, low=0, high=1)
    check_range("momentum", momentum, low=0, high=1)
    check_range("diagonal_decay", diagonal_decay, low=0, high=1)
    check_range("restart_after", restart_after, low=1)
    check_static_count("update_every", update_every)
    if full_batch and update_every > 1:
        raise ValueError("`update_every` must be 1 with `full_batch`, which needs every gradient.")
    check_range("weight_decay", weight_decay, low=0)
    _check_kinds(radius_rule, storage_dtype, seed)

    def init(params: chex.ArrayTree) -> LSR1State:
        check_params(params, "lsr1")
        dtype = vectors.accumulation_dtype(params)
        moments = vectors.zeros_vector(params)
        return LSR1State(
            count=jnp.zeros((), jnp.int32),
            memory=vectors.init_pairs(params, memory_size, storage_dtype),
            radius=jnp.array(radius, dtype),  # a copy, as states may be donated
            last_step=jnp.zeros((), dtype),
            last_slope=jnp.zeros((), dtype),
            last_direction=jax.tree.map(jnp.copy, moments) if update_every > 1 else None,
            rejected_in_a_row=jnp.zeros((), jnp.int32),
            largest_gradient=jnp.zeros((), dtype),
            diagonal=moments if diagonal else None,
            value=jnp.asarray(jnp.inf, value_dtype(params)) if full_batch else None,
            grad=jax.tree.map(lambda p: jnp.zeros_like(p, p.dtype), params) if full_batch else None,
            metrics=no_metrics(dtype),
        )

    def update(
        updates: chex.ArrayTree,
        state: LSR1State,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        grad: chex.ArrayTree | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        curvature_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, LSR1State]:
        del extra_args
        check_has_arrays(params, "lsr1")
        check_value_fn(value_fn, "lsr1")
        objective: Any = value_fn
        grad = updates if grad is None else grad
        value = value_and_aux(objective)(params)[0] if value is None else value
        decayed_value, gradient = add_decay(value, grad, params, weight_decay)
        # A gradient whose square overflows has no model.
        usable = all_finite((decayed_value, vectors.inner(gradient, gradient)))
        is_due = update_every == 1 or _is_due(state, update_every)

        # 1. The model: diagonal metric, inner products with the memory, SR1.
        second_moments, metric = update_metric(
            state.diagonal, gradient, usable, diagonal_decay, state.count
        )
        scaled = times(metric, gradient)
        memory, sr1, last = _model(state, scaled, scale, skip)

        # 2. The trial step, within a radius that the last one confirmed on this batch.
        near = follow_slope(radius_rule, state.radius, state.last_slope, last.products.gradient)
        largest_gradient = jnp.maximum(state.largest_gradient, jnp.sqrt(sr1.gradient_square))
        proposal = propose(
            model,
            sr1,
            memory,
            scaled,
            near,
            last,
            momentum,
            decayed_value,
            largest_gradient,
            jax.random.fold_in(jax.random.key(seed), state.count),
        )
        step = jax.tree.map(lambda p, s: s.astype(p.dtype), params, times(metric, proposal.step))
        trial = _rounded(optax.apply_updates(params, step))

        # 3. The objective there, on the same batch.
        trial_value, trial_grad = _evaluate(objective, trial, is_due)
        decayed_trial, trial_gradient = add_decay(trial_value, trial_grad, trial, weight_decay)
        moved = usable & (proposal.norm > 0)
        resolved = moved & all_finite((decayed_trial, trial_gradient))
        ratio = reduction_ratio(
            decayed_value,
            decayed_trial,
            proposal.measures.decrease,
            coarsest_resolution(value, trial_value),
        )
        ratio = jnp.where(resolved, ratio, -jnp.inf)  # also if the gradient alone is not finite
        # A random step is no prediction: it must bring something.
        bar = jnp.where(proposal.is_probe, 1 + acceptance, acceptance)
        accepted = resolved & (ratio > bar)

        # 4. The pair, of rejected steps too.
        before, after = gradient, trial_gradient
        if curvature_fn is not None:
            before, after = _at_pairs(
                is_due,
                lambda: curvature_gradients(curvature_fn, params, trial, weight_decay),
                (before, after),
            )
        pair = make_pair(params, trial, before, after, metric, proposal.norm)
        stored = resolved & is_due & can_be_stored(pair, memory)
        memory = vectors.push_pair(memory, *pair, stored)

        # 5. Radius and restart. A random step that failed says nothing of the region.
        in_a_row = jnp.where(accepted, 0, state.rejected_in_a_row + 1)
        restarts = in_a_row >= restart_after
        steered = next_radius(radius_rule, near, ratio, proposal.measures.length)
        known = stored if update_every == 1 else True
        failed_probe = proposal.is_probe & ~accepted
        control = LSR1State(
            count=optax.safe_increment(state.count),
            memory=vectors.drop_pairs(memory, restarts & usable),
            radius=jnp.where(failed_probe | ~moved, state.radius, steered),
            last_step=jnp.where(accepted & known, proposal.norm, 0),
            last_slope=jnp.where(accepted & known, proposal.slope, 0),
            last_direction=_direction(proposal, state.last_direction),
            rejected_in_a_row=jnp.where(restarts, 0, in_a_row),
            largest_gradient=largest_gradient,
            diagonal=second_moments,
            value=jnp.where(accepted, trial_value, value) if full_batch else None,
            grad=choose_like(accepted, trial_grad, grad, params) if full_batch else None,
            metrics=report(
                state.metrics, sr1, proposal, near, params, is_due, ratio, accepted, restarts
            ),
        )
        step = jax.tree.map(lambda p: jnp.where(accepted, p, jnp.zeros_like(p)), step)
        # The memory takes care of itself: nothing that is not finite was written to it.
        return step, keep_unless(usable, control, state._replace(memory=control.memory))

    return make_transform("lsr1", init, update)


def _check_kinds(radius_rule: Any, storage_dtype: Any, seed: Any) -> None:
    if not isinstance(radius_rule, RadiusRule):
        raise ValueError(f"`radius_rule` must be a RadiusRule, got {radius_rule!r}.")
    if storage_dtype is not None and not jnp.issubdtype(storage_dtype, jnp.floating):
        raise ValueError(f"`storage_dtype` must be a real floating dtype, got {storage_dtype!r}.")
    if isinstance(seed, float):
        raise ValueError(f"`seed` must be an integer, got {seed}.")


def _is_due(state: LSR1State, update_every: int) -> jax.Array:
    """Whether a step makes a pair: in its turn, or as long as the memory is not full."""
    return (state.count % update_every == 0) | jnp.any(state.memory.numbers < 0)


def _model(
    state: LSR1State, gradient: chex.ArrayTree, scale: ScaleSetting, skip: chex.Numeric
) -> tuple[PairMemory, SR1Model, LastStep]:
    """The model, and what it has to know of the last step, in one pass over the memory."""
    direction = state.last_direction
    columns = [gradient] if direction is None else [gradient, direction]
    memory, products = vectors.project_on_pairs(state.memory, *columns)
    square = vectors.inner(gradient, gradient)
    model = build_model(memory, products[:, 0], square, scale, skip)
    if direction is None:
        known = products_of_newest(model, vectors.newest_slot(memory))
    else:
        known = Products(
            clear_empty(memory, products[:, 1]),
            vectors.inner(gradient, direction),
            vectors.inner(direction, direction),
        )
    return memory, model, LastStep(direction, known, state.last_step)


def _direction(proposal: Proposal, like: chex.ArrayTree | None) -> chex.ArrayTree | None:
    """The direction of a step, where the state keeps it."""
    if like is None:
        return None
    factor = 1 / jnp.where(proposal.norm > 0, proposal.norm, 1)
    return jax.tree.map(lambda s: factor * s, proposal.step)


def _at_pairs(
    is_due: bool | jax.Array, function: Callable[[], chex.ArrayTree], otherwise: chex.ArrayTree
) -> chex.ArrayTree:
    """What a function returns, at steps that write a pair; it is not evaluated at others."""
    return function() if is_due is True else jax.lax.cond(is_due, function, lambda: otherwise)


def _evaluate(
    objective: Callable[[Any], Any], point: chex.ArrayTree, with_gradient: bool | jax.Array
) -> tuple[jax.Array, chex.ArrayTree]:
    """The value at a point, and the gradient where it is wanted, else zeros."""
    if with_gradient is True:
        return value_and_grad(objective, point)
    return jax.lax.cond(
        with_gradient,
        lambda p: value_and_grad(objective, p),
        lambda p: (value_and_aux(objective)(p)[0], jax.tree.map(jnp.zeros_like, p)),
        point,
    )


def _rounded(params: chex.ArrayTree) -> chex.ArrayTree:
    """Keeps the compiler from evaluating half precision, which it may widen, somewhere else."""
    if any(leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(params)):
        return jax.lax.optimization_barrier(params)
    return params
