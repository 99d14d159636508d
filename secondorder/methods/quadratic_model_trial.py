"""What `scale_by_quadratic_model` evaluates elsewhere: behind the next step, before the last."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder.methods.terminal import Point, decayed_value


class Review(NamedTuple):
    """What a batch says of the step that led to where it is evaluated.

    Attributes:
      is_made: Whether the objective was evaluated where that step began.
      regrets: Whether the step is to be undone.
    """

    is_made: jax.Array
    regrets: jax.Array


def try_step(
    value_fn: Any,
    point: Point,
    propose: Callable[[], chex.ArrayTree],
    weight_decay: chex.Numeric,
    is_tried: jax.Array,
) -> jax.Array:
    """The objective after a step that is tried, and else before it.

    The step is made in the branch: one from outside would have to be in memory in every step.

    Args:
      value_fn: The objective.
      point: Where the step starts.
      propose: Makes the step.
      weight_decay: Coefficient of ``|params|^2 / 2``.
      is_tried: Whether it is tried.

    Returns:
      A scalar, float32 or wider.
    """

    def evaluate(_: jax.Array) -> jax.Array:
        return decayed_value(value_fn, optax.apply_updates(point.params, propose()), weight_decay)

    return jax.lax.cond(is_tried, evaluate, lambda value: value, point.value)


def is_acceptable(trial: jax.Array, value: jax.Array, ratio: jax.Array) -> jax.Array:
    """Whether a batch's objective behind its own step is finite and has not risen.

    No noise of batches speaks for a step that raises the objective that it was made from.

    Args:
      trial: The objective there.
      value: That before the step.
      ratio: Of actual to predicted reduction, positive where a rise is in the rounding.

    Returns:
      A boolean.

    Example:
      >>> trial, ratio = jnp.array([1.0, 2.1, 2.1, jnp.nan]), jnp.array([1.0, 0.5, -0.1, -jnp.inf])
      >>> is_acceptable(trial, jnp.float32(2), ratio).tolist()
      [True, True, False, False]
    """
    return jnp.isfinite(trial) & ((trial <= value) | (ratio > 0))


def review_last_step(
    value_fn: Any,
    point: Point,
    last_step: chex.ArrayTree,
    average: jax.Array,
    weight_decay: chex.Numeric,
    has_step: jax.Array,
) -> Review:
    """Judges the last step by the next batch, where that is far above the batches before.

    That alone does not tell a bad step from a hard batch. So the batch is evaluated where the step
    began as well, and regrets the step if it was much better there. A value that is not finite is
    not judged: it can come from anything before the objective, as a scale of the loss.

    Args:
      value_fn: The objective.
      point: Where the step led.
      last_step: The step.
      average: Running average of the objective.
      weight_decay: Coefficient of ``|params|^2 / 2``.
      has_step: Whether there is a step to be judged.

    Returns:
      Whether the batch was evaluated there, and whether it regrets the step.
    """
    is_far_above = point.value - average > jnp.abs(average)
    is_made = has_step & jnp.isfinite(point.value) & is_far_above

    def evaluate(_: jax.Array) -> jax.Array:
        start = jax.tree.map(jnp.subtract, point.params, last_step)
        return decayed_value(value_fn, start, weight_decay)

    before = jax.lax.cond(is_made, evaluate, lambda value: value, point.value)
    # By the size of the average too: a batch that was fitted nearly is small, and its rise nothing.
    regrets = point.value - before > jnp.maximum(jnp.abs(before), jnp.abs(average))
    return Review(is_made, regrets)
