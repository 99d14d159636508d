"""What methods share that try their step themselves: the point, the trial, the end of an update."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import tree as vectors
from secondorder.checks import is_zero
from secondorder.control import SearchResult, reduction_ratio
from secondorder.objective import (
    all_finite,
    check_has_arrays,
    check_split,
    check_value_fn,
    value_and_aux,
    value_and_grad,
)
from secondorder.sharding import shard_like

State = TypeVar("State")
Metrics = TypeVar("Metrics")


class Point(NamedTuple):
    """Where an update starts.

    Attributes:
      params: The parameters.
      value: The objective there, with weight decay, float32 or wider.
      gradient: Its gradient, likewise.
      usable: Whether value and gradient are finite.
      resolution: Relative spacing of the numbers that the value was computed in; static.
    """

    params: chex.ArrayTree
    value: jax.Array
    gradient: chex.ArrayTree
    usable: jax.Array
    resolution: float


def look(
    method: str,
    value_fn: Any,
    params: chex.ArrayTree | None,
    value: jax.Array | None,
    grad: chex.ArrayTree | None,
    weight_decay: chex.Numeric,
    zeroed: bool = True,
) -> Point:
    """Checks the arguments of an update, and completes what the caller did not give.

    Args:
      method: Name of the method, for messages.
      value_fn: The objective, as ``update`` received it.
      params: The parameters, likewise.
      value: The value there, or None to compute it.
      grad: The gradient there, or None to compute it.
      weight_decay: Coefficient of ``|params|^2 / 2`` in the objective.
      zeroed: Whether a gradient that is not finite becomes zero, for methods that iterate on it.

    Returns:
      The point.

    Raises:
      ValueError: If ``params`` or ``value_fn`` is missing.
      TypeError: If ``value_fn`` is not callable, or its value not a real scalar.
    """
    check_has_arrays(params, method)
    check_value_fn(value_fn, method)
    if grad is None:
        value, grad = value_and_grad(value_fn, params)
    elif value is None:
        value = value_and_aux(value_fn)(params)[0]
    assert value is not None
    resolution = coarsest_resolution(value)
    value, gradient = add_decay(value, grad, params, weight_decay)
    usable = all_finite((value, gradient))
    if zeroed:
        gradient = jax.tree.map(lambda g: jnp.where(usable, g, jnp.zeros_like(g)), gradient)
    return Point(params, value, gradient, usable, resolution)


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


def add_decay(
    value: chex.Numeric, grad: chex.ArrayTree, params: chex.ArrayTree, weight_decay: chex.Numeric
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
    gradient = jax.tree.map(lambda g, p: shard_like(g.astype(dtype), p), grad, params)
    if not is_zero(weight_decay):
        gradient = jax.tree.map(lambda g, p: g + weight_decay * p.astype(dtype), gradient, params)
    return jnp.asarray(value, dtype) + decay_term(params, weight_decay), gradient


def decay_term(params: chex.ArrayTree, weight_decay: chex.Numeric) -> jax.Array:
    r"""The term :math:`\tau |\theta|^2 / 2` of an objective.

    Args:
      params: The parameters.
      weight_decay: :math:`\tau \ge 0`.

    Returns:
      A scalar, float32 or wider.
    """
    if is_zero(weight_decay):
        return jnp.zeros((), vectors.accumulation_dtype(params))
    return 0.5 * weight_decay * vectors.inner(params, params)


def decayed_value(
    value_fn: Callable[[Any], Any], params: chex.ArrayTree, weight_decay: chex.Numeric
) -> jax.Array:
    """The objective with weight decay; aux is dropped.

    Args:
      value_fn: Maps parameters to ``value`` or ``(value, aux)``.
      params: The parameters.
      weight_decay: Coefficient of ``|params|^2 / 2``.

    Returns:
      A scalar, float32 or wider.
    """
    value = value_and_aux(value_fn)(params)[0].astype(vectors.accumulation_dtype(params))
    return value + decay_term(params, weight_decay)


def scaled_step(
    params: chex.ArrayTree, direction: chex.ArrayTree, rate: chex.Numeric
) -> chex.ArrayTree:
    """A step of the dtype of the parameters; exactly zero where the rate is.

    Args:
      params: The parameters.
      direction: A pytree like them.
      rate: A scalar.

    Returns:
      ``rate * direction``.
    """
    return jax.tree.map(
        lambda p, d: jnp.where(rate == 0, 0, rate * d).astype(p.dtype), params, direction
    )


def trial_value(
    value_fn: Callable[[Any], Any],
    params: chex.ArrayTree,
    direction: chex.ArrayTree,
    rate: chex.Numeric,
    weight_decay: chex.Numeric,
) -> jax.Array:
    """The objective after a step, rounded as the parameters are.

    Args:
      value_fn: The objective.
      params: The parameters.
      direction: A pytree like them.
      rate: A scalar.
      weight_decay: Coefficient of ``|params|^2 / 2``.

    Returns:
      A scalar, float32 or wider.
    """
    trial = optax.apply_updates(params, scaled_step(params, direction, rate))
    return decayed_value(value_fn, trial, weight_decay)


def curvature_objective(
    method: str, value_fn: Any, curvature_fn: Any, splits: bool = True
) -> Callable[[Any], Any]:
    """The objective of the curvature batch.

    Args:
      method: Name of the method, for messages.
      value_fn: The objective, as ``update`` received it.
      curvature_fn: That of the curvature, or None for the same.
      splits: Whether the curvature needs the split into model and loss. Static.

    Returns:
      One of the two.

    Raises:
      TypeError: If it is not callable, or does not split.
    """
    check = check_split if splits else check_value_fn
    check_value_fn(value_fn, method)
    if curvature_fn is None:
        check(value_fn, method)
        return value_fn
    check(curvature_fn, method, "curvature_fn")
    return curvature_fn


def at(schedule: optax.ScalarOrSchedule, count: jax.Array) -> chex.Numeric:
    """The value of a schedule, or the number that stands for a constant one.

    Args:
      schedule: Maps the updates so far to a number; or the number.
      count: Updates so far.

    Returns:
      A scalar.
    """
    return schedule(count) if callable(schedule) else schedule


def value_dtype(params: chex.ArrayTree) -> jnp.dtype:
    """What an objective returns that casts nothing; `optax.value_and_grad_from_state` compares.

    Args:
      params: The parameters.

    Returns:
      The dtype.
    """
    return jnp.result_type(*(jax.tree.leaves(params) or [jnp.float32]))


def choose_like(
    condition: jax.Array, one: chex.ArrayTree, other: chex.ArrayTree, like: chex.ArrayTree
) -> chex.ArrayTree:
    """One of two trees, sharded like a third.

    Args:
      condition: Whether it is the first, a boolean scalar.
      one: A pytree of arrays.
      other: Another like it.
      like: A pytree of arrays of the same shapes.

    Returns:
      One of the two.
    """
    return jax.tree.map(
        lambda a, b, p: jnp.where(condition, shard_like(a, p), shard_like(b, p)), one, other, like
    )


def judge(point: Point, search: SearchResult, predicted: jax.Array) -> jax.Array:
    """The ratio of the actual to the predicted reduction of a search.

    Args:
      point: Where it started.
      search: Its result.
      predicted: The change that the model promised, negative for a reduction.

    Returns:
      A scalar; minus infinity if the step was rejected.
    """
    ratio = reduction_ratio(point.value, search.value, -predicted, point.resolution)
    return jnp.where(search.accepted, ratio, -jnp.inf)


def zero_metrics(kind: type[Metrics], dtype: Any, reals: Collection[str]) -> Metrics:
    """The metrics before the first update.

    Args:
      kind: A `NamedTuple` of scalars.
      dtype: Of those that are real numbers; the others are int32.
      reals: The names of those.

    Returns:
      Zeros.
    """
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    return kind(*(jnp.zeros((), dtype if name in reals else jnp.int32) for name in fields))


def keep_unless(usable: jax.Array, new: State, old: State) -> State:
    """The new state; or the old one with one more batch counted, if the batch was not finite.

    Args:
      usable: Whether the batch was finite, a boolean scalar.
      new: The state after the step, with ``metrics``.
      old: The state before it.

    Returns:
      One of the two, in the dtypes of the old one.
    """
    metrics: Any = old.metrics  # type: ignore[attr-defined]
    counted = metrics._replace(nonfinite_steps=metrics.nonfinite_steps + 1)
    return select_state(usable, new, old._replace(metrics=counted))  # type: ignore[attr-defined]


def select_state(usable: jax.Array, new: State, old: State) -> State:
    """The new state or the old one, as it is.

    Args:
      usable: Whether it is the new one, a boolean scalar.
      new: The state after the step.
      old: The state without it.

    Returns:
      One of the two, in the dtypes of the old one.
    """
    # Hyperparameters and values may be wider than the state, which keeps its dtypes.
    return jax.tree.map(lambda n, o: jnp.where(usable, n.astype(o.dtype), o), new, old)
