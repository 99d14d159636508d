r"""Levenberg-Marquardt: damped Gauss-Newton steps, each tried before it is taken.

The damping of the Gauss-Newton matrix follows the ratio of what the objective does to what its
quadratic model promised, between a Gauss-Newton step and a short one down the gradient. The step
has been tried when it is returned, and is zero if it failed: the method is *terminal*, as optax's
line searches are.

References:
  Levenberg (1944); Marquardt (1963).
  Nielsen (1999), Damping parameter in Marquardt's method, IMM-REP-1999-05 ("the report").
  Madsen, Nielsen, Tingleff (2004), Methods for non-linear least squares problems, section 3.2.
  Chan, Szeto (1999), Training recurrent network with block-diagonal approximated
  Levenberg-Marquardt algorithm, IJCNN.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from secondorder import tree as vectors
from secondorder.checks import check_choice, check_flag, check_range, check_static_count, is_number
from secondorder.control import NielsenState, nielsen_damping, reduction_ratio
from secondorder.methods.levenberg_marquardt_model import (
    Measures,
    Scaling,
    SolverKind,
    StepKind,
    SystemSettings,
    TrialStep,
    propose,
)
from secondorder.methods.terminal import (
    Point,
    choose_like,
    curvature_objective,
    decay_term,
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
    check_has_arrays,
    check_params,
    value_and_aux,
    value_and_grad,
)
from secondorder.tree import Blocks, BlockSetting, label_blocks, one_block

Schedule: TypeAlias = Literal["synchronous", "asynchronous"]

_NAME = "levenberg_marquardt"


class _Settings(NamedTuple):
    """The hyperparameters, but for those of the systems and the first damping."""

    blocks: BlockSetting | Literal["layers"]
    schedule: Schedule
    acceptance: chex.Numeric
    uphill: chex.Numeric | None
    full_batch: bool
    weight_decay: chex.Numeric


class _Trial(NamedTuple):
    """The trial point: without weight decay, as the caller's objective has it, and with.

    Attributes:
      step: What leads there, in the dtypes of the parameters.
      value: The objective with weight decay.
      raw_value: Without, or None if it is not kept.
      grad: Its gradient without, or None likewise.
      usable: Whether all that is used of it is finite.
    """

    step: chex.ArrayTree
    value: jax.Array
    raw_value: Any
    grad: chex.ArrayTree | None
    usable: jax.Array


class Uphill(NamedTuple):
    """What uphill steps are judged by.

    Attributes:
      lowest: The lowest objective so far.
      step: The last step that was taken, a pytree like the parameters, float32 or wider.
    """

    lowest: jax.Array
    step: chex.ArrayTree


class LevenbergMarquardtMetrics(NamedTuple):
    """What `levenberg_marquardt` reports, all scalars.

    Attributes:
      ratio: Actual over predicted reduction of the last trial step.
      damping: Of its system, in the unit of the argument ``damping``.
      step_norm: Length of that trial step.
      accepted: Whether it was taken, 0 or 1, int32.
      rejections: Trial steps rejected since `init`, int32.
      iterations: Of conjugate gradients at the last step, the most of any block, int32.
      nonfinite_steps: Batches whose value or gradient was not finite; they changed nothing.
    """

    ratio: jax.Array
    damping: jax.Array
    step_norm: jax.Array
    accepted: jax.Array
    rejections: jax.Array
    iterations: jax.Array
    nonfinite_steps: jax.Array


class LevenbergMarquardtState(NamedTuple):
    """State of `levenberg_marquardt`.

    Attributes:
      count: Updates so far, int32.
      damping: The dampings, and the factors of the next failures (K,): one, or with an asynchronous
        schedule one for each block.
      measures: The units of the dampings, and the largest diagonal of the curvature.
      uphill: What uphill steps are judged by, or None.
      value: With ``full_batch`` the value at the parameters after the step, else None.
      grad: With ``full_batch`` the gradient there, else None.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    damping: NielsenState
    measures: Measures
    uphill: Uphill | None
    value: jax.Array | None
    grad: chex.ArrayTree | None
    metrics: LevenbergMarquardtMetrics


def levenberg_marquardt(
    *,
    damping: chex.Numeric = 1e-3,
    relative: bool = True,
    scaling: Scaling = "identity",
    solver: SolverKind = "dense",
    tolerance: chex.Numeric = 0.01,
    max_iterations: int = 100,
    blocks: BlockSetting | Literal["layers"] = None,
    schedule: Schedule = "synchronous",
    step: StepKind = "optimal",
    acceptance: chex.Numeric = 0.0,
    uphill: chex.Numeric | None = None,
    full_batch: bool = False,
    diagonal_probes: int = 4,
    weight_decay: chex.Numeric = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Levenberg-Marquardt with Nielsen's damping, for nonlinear least squares and beyond.

    With the Gauss-Newton matrix :math:`G = J^\top H J` of the objective, for squared residuals
    :math:`J^\top J`, the trial step solves

    .. math:: (G + \mu D) h = -g.

    It is returned if the gain ratio of actual to predicted reduction,

    .. math:: \varrho = \frac{f(\theta) - f(\theta + h)}{\tfrac12 h^\top (\mu D h - g)},

    is positive, and zeros are if not. A step that is taken multiplies :math:`\mu` by
    :math:`\max(\tfrac13, 1 - (2\varrho - 1)^3)`, failures in a row by 2, 4, 8, ... Any loss that
    is convex in the outputs of the model will do.

    One update costs a value, or with ``full_batch`` a value and gradient, more than the caller's
    own, and the system: ``P`` products with ``G`` for ``P`` parameters at once with
    ``solver="dense"``, one per iteration with ``"conjugate_gradient"``. Ratios are meant for one
    batch, or large ones.

    The report's settings for good starting points are::

        so.levenberg_marquardt(damping=1e-6, full_batch=True)

    and Marquardt's scaling, as MINPACK has it::

        so.levenberg_marquardt(scaling="running_diagonal", full_batch=True)

    Args:
      damping: First :math:`\mu > 0`, in a unit that is given by the next two arguments: the
        smaller, the better the starting point.
      relative: Whether with ``scaling="identity"`` the unit is measured at the first step of a
        block: with dense systems it is the largest diagonal element of ``G``, with conjugate
        gradients the curvature :math:`g^\top G g / g^\top g` along the gradient. Static.
      scaling: ``D``: ``"identity"``; ``"diagonal"``, that of ``G``, so that steps do not depend
        on the units of the parameters; or ``"running_diagonal"``, its elementwise maximum so far.
        With conjugate gradients the diagonal is estimated by random probes, for losses of one
        array of outputs ``(N..., C)`` that do not couple cases, and preconditions. Static.
      solver: ``"dense"``: the matrix and its Cholesky factors, for up to about 2000 parameters in a
        block; or ``"conjugate_gradient"``. Static.
      tolerance: Relative residual at which conjugate gradients stop, in [0, 1).
      max_iterations: Most of their iterations. Static.
      blocks: None: the whole matrix. ``"layers"``: only its diagonal blocks of leaves that have
        the same parent. Or a callable from the path of a leaf, such as ``"encoder/0/kernel"``, to
        the label of its block; or a pytree of labels, a tree prefix of the parameters. Static.
      schedule: ``"synchronous"``: all blocks at every update; ``"asynchronous"``: the blocks in
        turn, one per update, each with its own damping and the residuals that the last one has
        left. Static.
      step: With several blocks at once: ``"optimal"``, their joint step times the
        :math:`\alpha \le 1` that minimizes the model with the whole matrix, at one product; or
        ``"full"``, which overshoots where blocks work on the same residuals. Static.
      acceptance: Ratio above which a step is taken, in [0, 1).
      uphill: Exponent :math:`b \ge 0` with which a step that fails is taken all the same if
        :math:`(1 - \cos\beta)^b f(\theta + h)` is no higher than the lowest objective so far, with
        :math:`\beta` the angle to the last step, for positive objectives: along a narrow valley
        steps may rise a little. It doubles :math:`\mu`. Usually 1 or 2; None: no such steps.
      full_batch: Keep value and gradient at the accepted point in the state, for
        `optax.value_and_grad_from_state`; then an update costs one gradient in all. Static.
      diagonal_probes: Probes of the diagonal, each a backward pass. Static.
      weight_decay: Coefficient :math:`\tau \ge 0` of :math:`\tau|\theta|^2/2`, which is added to
        the objective and its curvature.
      seed: Of the probes.

    Returns:
      A terminal transform whose ``update`` needs ``params`` and a ``value_fn`` that is an
      `Objective` (or, if there is a ``curvature_fn``, any callable); ``value`` and ``grad`` at the
      parameters are computed if they are not given. ``curvature_fn``, an `Objective` on another
      batch, gives the curvature. A batch that is not finite gives a zero update and changes only
      a counter.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> t = jnp.linspace(0.0, 1.0, 20)
      >>> y = 2.0 * jnp.exp(-3.0 * t)
      >>> objective = so.Objective(
      ...     lambda p: p["scale"] * jnp.exp(-p["rate"] * t), lambda z: jnp.sum((z - y) ** 2) / 2)
      >>> params = {"scale": jnp.array(1.0), "rate": jnp.array(0.0)}
      >>> tx = so.levenberg_marquardt(full_batch=True)
      >>> state = tx.init(params)
      >>> value_and_grad = optax.value_and_grad_from_state(objective)
      >>> for _ in range(12):
      ...     value, grad = value_and_grad(params, state=state)
      ...     updates, state = tx.update(
      ...         grad, state, params, value=value, grad=grad, value_fn=objective)
      ...     params = optax.apply_updates(params, updates)
      >>> round(float(params["scale"]), 3), round(float(params["rate"]), 3)
      (2.0, 3.0)

    References:
      Nielsen (1999), Damping parameter in Marquardt's method; Moré (1978), The
      Levenberg-Marquardt algorithm: implementation and theory (scaling); Chan, Szeto (1999)
      (blocks); Transtrum, Sethna (2012), Improvements to the Levenberg-Marquardt algorithm for
      nonlinear least-squares minimization, section 4, and Pooladzandi, Zhou (2022), Improving
      Levenberg-Marquardt algorithm for neural networks, arXiv 2212.08769 (uphill steps).
    """
    systems = SystemSettings(
        relative, scaling, solver, tolerance, max_iterations, step, diagonal_probes, weight_decay,
        seed,
    )  # fmt: skip
    settings = _Settings(blocks, schedule, acceptance, uphill, full_batch, weight_decay)
    check_range("damping", damping, low=0, open_low=True)
    _check_systems(systems)
    _check(settings)

    def init(params: chex.ArrayTree) -> LevenbergMarquardtState:
        check_params(params, _NAME)
        partition = _partition(settings, params)
        dtype = vectors.accumulation_dtype(params)
        shape = (len(_turns(settings, partition)),)
        first = jnp.broadcast_to(jnp.asarray(damping, dtype), shape)
        measured = systems.relative and systems.scaling == "identity"
        return LevenbergMarquardtState(
            count=jnp.zeros((), jnp.int32),
            damping=NielsenState(jnp.array(first), jnp.full(shape, 2, dtype)),
            measures=Measures(
                jnp.full((len(partition),), 0 if measured else 1, dtype),
                vectors.zeros_vector(params) if systems.scaling == "running_diagonal" else None,
            ),
            uphill=None
            if uphill is None
            else Uphill(jnp.array(jnp.inf, dtype), vectors.zeros_vector(params)),
            value=jnp.array(jnp.inf, value_dtype(params)) if full_batch else None,
            grad=jax.tree.map(lambda p: jnp.zeros_like(p, p.dtype), params) if full_batch else None,
            metrics=zero_metrics(
                LevenbergMarquardtMetrics, dtype, ("ratio", "damping", "step_norm")
            ),
        )

    def update(
        updates: chex.ArrayTree,
        state: LevenbergMarquardtState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        grad: chex.ArrayTree | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        curvature_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, LevenbergMarquardtState]:
        del extra_args
        check_has_arrays(params, _NAME)
        curvature = curvature_objective(_NAME, value_fn, curvature_fn)
        objective: Any = value_fn
        grad = updates if grad is None else grad
        value = value_and_aux(objective)(params)[0] if value is None else value
        point = look(_NAME, objective, params, value, grad, weight_decay)
        partition = _partition(settings, params)

        # 1. The damped systems of the blocks whose turn it is, and their joint step.
        turns = _turns(settings, partition)
        turn = state.count % len(turns)
        propose_turns = [
            partial(
                propose, systems, curvature, point, partition, blocks_of_turn,
                state.damping.damping[index], state.measures, state.count,
            )
            for index, blocks_of_turn in enumerate(turns)
        ]  # fmt: skip
        proposal: TrialStep = jax.lax.switch(turn, propose_turns)

        # 2. The objective there, and whether the step is taken.
        trial = _try(settings, objective, point, proposal)
        ratio = reduction_ratio(point.value, trial.value, proposal.predicted, point.resolution)
        ratio = jnp.where(trial.usable, ratio, -jnp.inf)
        accepted = ratio > acceptance
        rises, remembered = _judge_uphill(settings, state.uphill, point, proposal, trial, accepted)
        accepted |= rises

        # 3. The next damping, of these blocks. Nielsen's rule goes by the sign of the ratio.
        tiny = float(np.finfo(ratio.dtype).tiny)
        judged = jnp.where(accepted, jnp.maximum(ratio, tiny), -jnp.inf)
        norm = proposal.rate * jnp.sqrt(vectors.inner(*[proposal.direction] * 2))
        tried = ~proposal.solved | (norm > 0)  # where the gradient vanishes nothing is
        new = LevenbergMarquardtState(
            count=optax.safe_increment(state.count),
            damping=_next_damping(state.damping, judged, tried & _is_at(state, turn)),
            measures=proposal.measures,
            uphill=remembered,
            value=jnp.where(accepted, trial.raw_value, value) if full_batch else None,
            grad=choose_like(accepted, trial.grad, grad, params) if full_batch else None,
            metrics=_report(state, turn, proposal, norm, ratio, tried, accepted),
        )
        taken = accepted & point.usable
        step = jax.tree.map(lambda s: jnp.where(taken, s, jnp.zeros_like(s)), trial.step)
        return step, keep_unless(point.usable, new, state)

    return make_transform("levenberg_marquardt", init, update)


def _check_systems(settings: SystemSettings) -> None:
    check_choice("scaling", settings.scaling, get_args(Scaling))
    check_choice("solver", settings.solver, get_args(SolverKind))
    check_choice("step", settings.step, get_args(StepKind))
    check_flag("relative", settings.relative)
    check_range("tolerance", settings.tolerance, low=0, high=1)
    check_static_count("max_iterations", settings.max_iterations)
    check_static_count("diagonal_probes", settings.diagonal_probes)
    check_range("weight_decay", settings.weight_decay, low=0)
    if is_number(settings.seed) and not isinstance(settings.seed, int):
        raise ValueError(f"`seed` must be an integer, got {settings.seed}.")


def _check(settings: _Settings) -> None:
    check_choice("schedule", settings.schedule, get_args(Schedule))
    check_range("acceptance", settings.acceptance, low=0, high=1)
    check_range("uphill", settings.uphill, low=0)
    check_flag("full_batch", settings.full_batch)
    if settings.blocks is None and settings.schedule == "asynchronous":
        raise ValueError('`schedule` must be "synchronous" where `blocks` is None, the whole.')


def _partition(settings: _Settings, params: chex.ArrayTree) -> Blocks:
    if settings.blocks is None:
        return one_block(params)
    named = isinstance(settings.blocks, str) and settings.blocks == "layers"
    return label_blocks(None if named else settings.blocks, params)


def _turns(settings: _Settings, partition: Blocks) -> list[tuple[int, ...]]:
    """Which blocks move at the same update, one tuple for each damping."""
    everything = tuple(range(len(partition)))
    return [everything] if settings.schedule == "synchronous" else [(b,) for b in everything]


def _try(settings: _Settings, objective: Any, point: Point, proposal: TrialStep) -> _Trial:
    step = scaled_step(point.params, proposal.direction, proposal.rate)
    if not settings.full_batch:
        value = trial_value(
            objective, point.params, proposal.direction, proposal.rate, settings.weight_decay
        )
        return _Trial(step, value, None, None, proposal.solved & all_finite(value))
    there = optax.apply_updates(point.params, step)
    raw_value, grad = value_and_grad(objective, there)
    value = raw_value.astype(point.value.dtype) + decay_term(there, settings.weight_decay)
    return _Trial(step, value, raw_value, grad, proposal.solved & all_finite((value, grad)))


def _judge_uphill(
    settings: _Settings,
    memory: Uphill | None,
    point: Point,
    proposal: TrialStep,
    trial: _Trial,
    accepted: jax.Array,
) -> tuple[jax.Array, Uphill | None]:
    """Whether a step is taken although the objective rises, and what to judge the next by."""
    if memory is None or settings.uphill is None:
        return jnp.zeros((), bool), memory
    lowest = jnp.minimum(memory.lowest, point.value)
    lengths = vectors.inner(memory.step, memory.step) * vectors.inner(*[proposal.direction] * 2)
    cosine = vectors.inner(memory.step, proposal.direction) / jnp.sqrt(lengths)
    bound = (1 - jnp.minimum(cosine, 1)) ** settings.uphill * trial.value
    # Without a last step the cosine is not a number, and nothing is taken uphill.
    rises = trial.usable & (bound <= lowest)
    step = jax.tree.map(
        lambda h, s: jnp.where(accepted | rises, proposal.rate * h, s).astype(s.dtype),
        proposal.direction,
        memory.step,
    )
    return rises, Uphill(lowest, step)


def _is_at(state: LevenbergMarquardtState, turn: jax.Array) -> jax.Array:
    return jnp.arange(len(state.damping.damping)) == turn


def _next_damping(state: NielsenState, ratio: jax.Array, moved: jax.Array) -> NielsenState:
    """That of the blocks that moved (K,), within what makes a difference to rounding."""
    eps = float(np.finfo(state.damping.dtype).eps)
    new = nielsen_damping(state, ratio, smallest=eps**2, largest=1 / eps**2)
    return jax.tree.map(lambda n, o: jnp.where(moved, n, o), new, state)


def _report(
    state: LevenbergMarquardtState,
    turn: jax.Array,
    proposal: TrialStep,
    norm: jax.Array,
    ratio: jax.Array,
    tried: jax.Array,
    accepted: jax.Array,
) -> LevenbergMarquardtMetrics:
    return LevenbergMarquardtMetrics(
        ratio=ratio,
        damping=state.damping.damping[turn],
        step_norm=norm,
        accepted=accepted.astype(jnp.int32),
        rejections=state.metrics.rejections + (tried & ~accepted),
        iterations=proposal.iterations,
        nonfinite_steps=state.metrics.nonfinite_steps,
    )
