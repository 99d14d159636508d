"""A limit on the steps of a direction, by what they change in the outputs of a model."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import tree as vectors
from secondorder.methods.terminal import at


class DivergenceLimitMetrics(NamedTuple):
    """What the limit reports; int32, counted since `init`.

    Attributes:
      nonfinite_steps: Directions whose product with the gradient was not finite; zero took their
        place.
    """

    nonfinite_steps: jax.Array


class DivergenceLimitState(NamedTuple):
    """State of a limit on steps.

    Attributes:
      count: Steps taken, int32.
      direction: State of the transform that makes the direction.
      metrics: Counters.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    direction: optax.OptState
    metrics: DivergenceLimitMetrics


def limit_divergence(
    direction: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    limit: chex.Numeric,
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens directions so that :math:`\tfrac12 \eta^2 g^\top d` is at most a limit.

    For a direction that solves with the Fisher matrix that is about the Kullback-Leibler divergence
    between the model's distributions before and after the step. Where the product is not finite the
    direction is zero: what follows, such as momentum, stays whole.

    Args:
      direction: The transform that makes the direction.
      learning_rate: Step size :math:`\eta`, or a schedule of it.
      limit: Positive.

    Returns:
      The transform with the limit.

    Example:
      >>> tx = limit_divergence(optax.with_extra_args_support(optax.identity()), 1.0, 2.0)
      >>> updates, _ = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
      >>> updates.tolist()
      [2.0]

    Source: Ba, Grosse, Martens (2017), Distributed second-order optimization using
    Kronecker-factored approximations, section 5.
    """

    def init(params: chex.ArrayTree) -> DivergenceLimitState:
        return DivergenceLimitState(
            count=jnp.zeros((), jnp.int32),
            direction=direction.init(params),
            metrics=DivergenceLimitMetrics(jnp.zeros((), jnp.int32)),
        )

    def update(
        updates: chex.ArrayTree,
        state: DivergenceLimitState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, DivergenceLimitState]:
        vector, inner = direction.update(updates, state.direction, params, **extra_args)
        size = at(learning_rate, state.count) ** 2 * vectors.inner(updates, vector) / 2
        # One number tells of all: no element that is not finite has a finite product.
        finite = jnp.isfinite(size)
        factor = jnp.sqrt(limit / jnp.maximum(size, limit))
        limited = jax.tree.map(lambda d: jnp.where(finite, factor * d, 0).astype(d.dtype), vector)
        failures = state.metrics.nonfinite_steps + ~finite
        return limited, DivergenceLimitState(
            optax.safe_increment(state.count), inner, DivergenceLimitMetrics(failures)
        )

    return optax.GradientTransformationExtraArgs(init, update)
