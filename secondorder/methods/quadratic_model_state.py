"""The state of `scale_by_quadratic_model`, and what it reports."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder.control import Confirmation, DampingRule, damping_bound, raised_damping
from secondorder.methods.quadratic_model_step import Step
from secondorder.methods.quadratic_model_trial import Review
from secondorder.methods.terminal import zero_metrics

_REALS = ("damping", "ratio", "predicted", "confirmed", "rate", "momentum", "step_norm")


class QuadraticModelMetrics(NamedTuple):
    """What `scale_by_quadratic_model` reports, all scalars.

    Attributes:
      damping: Of the last model.
      bound: Which bound of the rule that damping is at: -1 the lower, 1 the upper, 0 none, int32.
        At the lower one from the start on, a smaller first damping may be better.
      ratio: Actual over predicted reduction of the last step that was judged.
      predicted: Change of the objective that the last model without damping promised.
      confirmed: Share of the promised slopes that the batches after them had, on average. A
        larger batch has more of them confirmed.
      rate: Coefficient of the direction in the last step.
      momentum: Coefficient of the step before.
      step_norm: Length of the last step.
      evaluations: Values of the objective that the last step took, int32.
      clipped: Steps that were shortened since `init`, int32.
      rejections: Steps since `init` that were tried and not taken, as the objective behind them
        was not finite or had risen, int32.
      undone: Steps since `init` that were taken back, as the objective of the next batch had risen
        over them by more than its size and the average, or two batches in a row were not finite,
        int32.
      nonfinite_steps: Batches whose value, gradient, direction or curvature was not finite, int32.
    """

    damping: jax.Array
    bound: jax.Array
    ratio: jax.Array
    predicted: jax.Array
    confirmed: jax.Array
    rate: jax.Array
    momentum: jax.Array
    step_norm: jax.Array
    evaluations: jax.Array
    clipped: jax.Array
    rejections: jax.Array
    undone: jax.Array
    nonfinite_steps: jax.Array


class ScaleByQuadraticModelState(NamedTuple):
    """State of `scale_by_quadratic_model`.

    Attributes:
      count: Steps so far, with those that were rejected, int32.
      damping: That of the next model, float32 or wider.
      coefficients: Those of the direction and of the step before in the last step, ``(2,)``; zero
        where no step is behind: at first, and if it was rejected or undone.
      last_step: The last step, like the parameters, to look along and to be undone.
      suspect: Whether the last batch was not finite; a second one undoes the last step.
      average: Running average of the objective, float32 or wider.
      confirmation: How much of the last steps' slopes the batches after them have confirmed.
      rates: Those of the parts of the direction ``(L,)``, up to a common factor; empty without
        parts.
      direction: State of the transform that gives the direction.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    damping: jax.Array
    coefficients: jax.Array
    last_step: chex.ArrayTree
    suspect: jax.Array
    average: jax.Array
    confirmation: Confirmation
    rates: jax.Array | tuple[()]
    direction: optax.OptState
    metrics: QuadraticModelMetrics


def init_metrics(dtype: Any) -> QuadraticModelMetrics:
    """The metrics before the first step, real ones of a type."""
    return zero_metrics(QuadraticModelMetrics, dtype, _REALS)


def has_step(state: ScaleByQuadraticModelState) -> jax.Array:
    """Whether the parameters are where the last step led."""
    return jnp.any(state.coefficients != 0)


def stay(
    state: ScaleByQuadraticModelState, undoes: jax.Array, review: Review, rule: DampingRule
) -> ScaleByQuadraticModelState:
    """The state after a batch without a step, which may undo the last one."""

    def cleared(leaf: jax.Array) -> jax.Array:
        return jnp.where(undoes, jnp.zeros_like(leaf), leaf)

    metrics = state.metrics
    return state._replace(
        damping=jnp.where(undoes, raised_damping(rule, state.damping), state.damping),
        coefficients=cleared(state.coefficients),
        last_step=jax.tree.map(cleared, state.last_step),
        confirmation=state.confirmation._replace(slope=cleared(state.confirmation.slope)),
        suspect=jnp.ones_like(state.suspect),
        metrics=metrics._replace(
            evaluations=review.is_made.astype(jnp.int32),
            undone=metrics.undone + undoes,
            nonfinite_steps=metrics.nonfinite_steps + ~review.regrets,
        ),
    )


def report(
    state: ScaleByQuadraticModelState,
    rule: DampingRule,
    step: Step,
    scales: jax.Array,
    ratio: jax.Array,
    predicted: jax.Array,
    known: Confirmation,
    clipped: jax.Array,
    evaluations: jax.Array,
    accepted: jax.Array,
) -> QuadraticModelMetrics:
    """The metrics after a step."""
    last, (rate, share) = state.metrics, step.coefficients * scales
    return last._replace(
        damping=state.damping,
        bound=damping_bound(rule, state.damping),
        ratio=ratio,
        predicted=predicted,
        confirmed=known.share,
        rate=rate,
        momentum=share,
        step_norm=jnp.sqrt(jnp.maximum(step.square, 0)),
        evaluations=evaluations,
        clipped=last.clipped + clipped,
        rejections=last.rejections + ~accepted,
    )
