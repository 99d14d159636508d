"""A limit on the steps of a direction, by what they change in the outputs of a model."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import tree as vectors
from secondorder.methods.terminal import at


class _LimitState(NamedTuple):
    """State of a limit on steps: the steps taken, and the state of the direction."""

    count: jax.Array  # type: ignore[assignment]
    direction: optax.OptState


def limit_divergence(
    direction: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    limit: chex.Numeric,
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens directions so that :math:`\tfrac12 \eta^2 g^\top d` is at most a limit.

    For a direction that solves with the Fisher matrix that is about the Kullback-Leibler divergence
    between the model's distributions before and after the step.

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
    Kronecker-factored
    approximations, section 5.
    """

    def init(params: chex.ArrayTree) -> _LimitState:
        return _LimitState(jnp.zeros((), jnp.int32), direction.init(params))

    def update(
        updates: chex.ArrayTree,
        state: _LimitState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, _LimitState]:
        vector, inner = direction.update(updates, state.direction, params, **extra_args)
        size = at(learning_rate, state.count) ** 2 * vectors.inner(updates, vector) / 2
        factor = jnp.sqrt(limit / jnp.maximum(size, limit))
        limited = jax.tree.map(lambda d: (factor * d).astype(d.dtype), vector)
        return limited, _LimitState(optax.safe_increment(state.count), inner)

    return optax.GradientTransformationExtraArgs(init, update)
