"""What L-SR1 does to gradients at a step: weight decay, the metric, pairs, unusable batches."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from secondorder import tree as vectors
from secondorder.methods.terminal import add_decay
from secondorder.objective import all_finite, check_value_fn, value_and_grad
from secondorder.tree import PairMemory


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
    squares = jax.tree.map(lambda g: jnp.where(usable, g**2, jnp.nan), gradient)
    moments, corrected = vectors.moving_average(moments, squares, count, decay)
    tiny = 1e-8  # as in Adam
    return moments, jax.tree.map(lambda v: jax.lax.rsqrt(jnp.sqrt(v) + tiny), corrected)


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
