"""What L-SR1 does to gradients at a step: weight decay, the metric, pairs, unusable batches."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from secondorder import tree as vectors
from secondorder.checks import is_number
from secondorder.objective import all_finite, check_value_fn, value_and_grad
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


def coarsest_resolution(*values: Any) -> float:
    """Relative spacing of numbers in the narrowest of some dtypes.

    Args:
      *values: Values of the objective as they were computed, before anything widens them.

    Returns:
      A plain number.
    """
    dtypes = [jnp.result_type(value) for value in values]
    return max(
        float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]
        for dtype in dtypes
        if jnp.issubdtype(dtype, jnp.floating)
    )


def update_metric(
    moments: chex.ArrayTree | None,
    gradient: chex.ArrayTree,
    usable: jax.Array,
    decay: chex.Numeric,
    count: jax.Array,
) -> tuple[chex.ArrayTree | None, chex.ArrayTree | None]:
    """The second moments of the gradient, and ``D^{-1/2}`` with ``D`` their roots.

    Args:
      moments: The moments before this step, or None for the metric of the identity.
      gradient: The gradient.
      usable: Whether it is finite; the moments stay if not.
      decay: Of the moments.
      count: Steps before this one, which correct the bias.

    Returns:
      The new moments and ``D^{-1/2}``, or None twice.
    """
    if moments is None:
        return None, None
    moments = jax.tree.map(
        lambda v, g: jnp.where(usable, decay * v + (1 - decay) * g**2, v), moments, gradient
    )
    correction = 1 - jnp.asarray(decay, vectors.accumulation_dtype(gradient)) ** (count + 1)
    tiny = 1e-8  # as in Adam
    return moments, jax.tree.map(lambda v: jax.lax.rsqrt(jnp.sqrt(v / correction) + tiny), moments)


def times(metric: chex.ArrayTree | None, vector: chex.ArrayTree) -> chex.ArrayTree:
    """Multiplies by a diagonal.

    Args:
      metric: The diagonal, a pytree of arrays, or None for the identity.
      vector: A pytree like it.

    Returns:
      The product.
    """
    return vector if metric is None else jax.tree.map(jnp.multiply, metric, vector)


def curvature_gradients(
    curvature_fn: Callable[[Any], Any],
    params: chex.ArrayTree,
    trial: chex.ArrayTree,
    weight_decay: chex.Numeric,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """The gradients of another objective at both points.

    Args:
      curvature_fn: The objective.
      params: The first point.
      trial: The second point.
      weight_decay: Coefficient of the term that is added to it.

    Returns:
      Both gradients, float32 or wider.

    Raises:
      TypeError: If ``curvature_fn`` is no callable.
    """
    check_value_fn(curvature_fn, "lsr1", "curvature_fn")
    before, after = (
        add_decay(*value_and_grad(curvature_fn, point), point, weight_decay)[1]
        for point in (params, trial)
    )
    return before, after


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
    """Whether the dtypes of the parameters and of the memory leave a step, and finite products.

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
    squares = vectors.inner(s, s), vectors.inner(y, y)
    return all_finite(squares) & (squares[0] > 0)


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
