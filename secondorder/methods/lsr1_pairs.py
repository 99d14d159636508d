"""What both forms of L-SR1 do at a step: gradients with weight decay, pairs, unusable batches."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from secondorder import tree as vectors
from secondorder.checks import is_number
from secondorder.objective import all_finite
from secondorder.sharding import shard_like
from secondorder.tree import PairMemory


def add_decay(
    value: jax.Array, grad: chex.ArrayTree, params: chex.ArrayTree, weight_decay: chex.Numeric
) -> tuple[jax.Array, chex.ArrayTree]:
    """Adds the value and gradient of ``weight_decay |params|^2 / 2``.

    Args:
      value: Value of the objective.
      grad: Its gradient, a pytree of arrays.
      params: The parameters.
      weight_decay: Coefficient.

    Returns:
      Both, float32 or wider, the gradient sharded as the parameters.
    """
    dtype = vectors.accumulation_dtype(params)
    value = jnp.asarray(value, dtype)
    grad = jax.tree.map(lambda g, p: shard_like(g.astype(dtype), p), grad, params)
    if is_number(weight_decay) and weight_decay == 0:
        return value, grad
    value += 0.5 * weight_decay * vectors.inner(params, params)
    return value, jax.tree.map(lambda g, p: g + weight_decay * p.astype(dtype), grad, params)


def times(metric: chex.ArrayTree | None, vector: chex.ArrayTree) -> chex.ArrayTree:
    """Multiplies by a diagonal.

    Args:
      metric: The diagonal, a pytree of arrays, or None for the identity.
      vector: A pytree like it.

    Returns:
      The product.
    """
    return vector if metric is None else jax.tree.map(jnp.multiply, metric, vector)


def make_pair(
    params: chex.ArrayTree,
    trial: chex.ArrayTree,
    before: chex.ArrayTree,
    after: chex.ArrayTree,
    metric: chex.ArrayTree | None,
    norm: jax.Array,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """The pair of a trial step, scaled to ``|s| = 1``, in the coordinates of the metric.

    The step is taken from the two points, so that it is what the parameters' dtype made of it.

    Args:
      params: The first point.
      trial: The second point.
      before: Gradient at the first.
      after: Gradient of the same objective at the second.
      metric: ``D^{-1/2}`` or None.
      norm: Length of the step in these coordinates.

    Returns:
      ``s`` and ``y``.
    """
    factor = 1 / jnp.where(norm > 0, norm, 1)
    s = jax.tree.map(
        lambda p, q, g: factor * (q.astype(g.dtype) - p.astype(g.dtype)), params, trial, before
    )
    y = jax.tree.map(lambda a, b: factor * (b - a), before, after)
    inverse = None if metric is None else jax.tree.map(jnp.reciprocal, metric)
    return times(inverse, s), times(metric, y)


def can_be_stored(pair: tuple[chex.ArrayTree, chex.ArrayTree], memory: PairMemory) -> jax.Array:
    """Whether the dtypes of the parameters and of the memory leave a step, and finite vectors.

    Args:
      pair: ``s`` and ``y``.
      memory: The memory that they are for.

    Returns:
      Boolean scalar.
    """
    s, y = (
        jax.tree.map(lambda v, rows: v.astype(rows.dtype), vector, stack)
        for vector, stack in zip(pair, memory.vectors, strict=True)
    )
    return all_finite((s, y)) & (vectors.inner(s, s) > 0)


def unless_unusable(usable: jax.Array, new: Any, old: Any) -> Any:
    """The new state; or the old one with one more batch counted, if the batch was not finite.

    The memory takes care of itself: nothing that is not finite was written to it.

    Args:
      usable: Whether the batch was finite, a boolean scalar.
      new: The state after the step, with ``memory`` and ``metrics``.
      old: The state before it.

    Returns:
      One of the two, in the dtypes of the old one.
    """
    count = old.metrics.nonfinite_steps + 1
    unchanged = old._replace(memory=new.memory, metrics=old.metrics._replace(nonfinite_steps=count))
    # Hyperparameters and values may be wider than the state, which keeps its dtypes.
    return jax.tree.map(lambda n, o: jnp.where(usable, n.astype(o.dtype), o), new, unchanged)
