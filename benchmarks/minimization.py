"""Minimization of a deterministic function by an optax transform, with counted evaluations."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.evaluations import stores_gradient
from benchmarks.functions import Instance, Params
from benchmarks.solvers import Solver


class Iterate(NamedTuple):
    """Where a minimization has arrived, and at what cost.

    Attributes:
        value: The function there.
        gradient_norm: Euclidean norm of its gradient there.
        gradients: Evaluations of the gradient so far. The value comes with each of them.
        values: Evaluations of the value alone so far.
        products: Products with the Hessian so far.
        updates: Points that were gone to so far, those that the method did not accept excluded
            where it stays.
        seconds: Time so far, without compilation.
    """

    value: float
    gradient_norm: float
    gradients: int
    values: int = 0
    products: int = 0
    updates: int = 0
    seconds: float = 0.0


class Limits(NamedTuple):
    """When to stop.

    Attributes:
        max_gradients: Evaluations that a run may use: of gradients, and as many of values alone.
        tolerance: Euclidean norm of the gradient that is small enough.
    """

    max_gradients: int
    tolerance: float = 0.0

    def is_reached(self, point: Iterate) -> bool:
        """Whether the gradient is small enough, within the budget."""
        return point.gradient_norm <= self.tolerance and self.allows(point)

    def allows(self, point: Iterate) -> bool:
        """Whether a point was found within the budget."""
        return max(point.gradients, point.values) <= self.max_gradients


class _Point(NamedTuple):
    params: Params
    opt_state: optax.OptState
    value: jax.Array
    grads: Params
    gradients: jax.Array


def minimize(
    instance: Instance, solver: Solver, settings: Mapping[str, Any], limits: Limits
) -> Iterate:
    """Minimizes until the gradient is small, the budget is used up or the value is not finite.

    Returns:
        The last point within the budget.
    """
    for point in within(limits, iterates(instance, solver, settings)):
        last = point
        if limits.is_reached(point) or not math.isfinite(point.value):
            break
    return last


def within(limits: Limits, points: Iterator[Iterate]) -> Iterator[Iterate]:
    """The points within the budget. The start is always one of them.

    A method may stay at a point without evaluating anything: the number of points is bounded too.
    """
    yield next(points)
    allowed = itertools.takewhile(limits.allows, points)
    yield from itertools.islice(allowed, limits.max_gradients)


def iterates(instance: Instance, solver: Solver, settings: Mapping[str, Any]) -> Iterator[Iterate]:
    """Runs a solver as the documentation of `optax.value_and_grad_from_state` does.

    Args:
        instance: The function, its start and its data.
        solver: The solver.
        settings: Its settings.

    Yields:
        The start, and the point after each update, without end.
    """
    optimizer = solver.build(settings)
    point = jax.jit(lambda start, data: _start(instance, optimizer, start, data))(
        instance.start, instance.data
    )

    def advance(point: _Point, data: Any) -> tuple[_Point, tuple[jax.Array, ...]]:
        following = _advance(instance, solver, optimizer, point, data)
        return following, _summary(following)

    step = jax.jit(advance).lower(point, instance.data).compile()
    yield _iterate(_summary(point), updates=0, seconds=0.0)
    seconds = 0.0
    for updates in itertools.count(1):
        start = time.perf_counter()
        point, summary = step(point, instance.data)
        iterate = _iterate(summary, updates, seconds)
        seconds += time.perf_counter() - start
        yield iterate._replace(seconds=seconds)


def _start(
    instance: Instance, optimizer: optax.GradientTransformationExtraArgs, start: Params, data: Any
) -> _Point:
    value, grads = jax.value_and_grad(instance.function)(start, data)
    return _Point(start, optimizer.init(start), value, grads, jnp.ones((), jnp.int32))


def _advance(
    instance: Instance,
    solver: Solver,
    optimizer: optax.GradientTransformationExtraArgs,
    point: _Point,
    data: Any,
) -> _Point:
    """One update, and the value and gradient where it leads."""

    def value_fn(params: Params) -> jax.Array:
        return instance.function(params, data)

    updates, opt_state = optimizer.update(
        point.grads,
        point.opt_state,
        point.params,
        value=point.value,
        grad=point.grads,
        value_fn=value_fn,
    )
    params = optax.apply_updates(point.params, updates)
    value, grads, evaluated = value_and_grad_at(value_fn, params, opt_state)
    gradients = point.gradients + solver.extra_gradients(opt_state) + evaluated
    return _Point(params, opt_state, value, grads, gradients.astype(jnp.int32))


def value_and_grad_at(
    value_fn: Callable[[Params], jax.Array], params: Params, opt_state: optax.OptState
) -> tuple[jax.Array, Params, jax.Array | int]:
    """Value and gradient, from the state where it has them, and how many gradients that took."""
    if not stores_gradient(opt_state):
        return *jax.value_and_grad(value_fn)(params), 1
    value, grads = optax.value_and_grad_from_state(value_fn)(params, state=opt_state)
    # optax evaluates anew where the value in the state is not finite.
    stored = optax.tree_utils.tree_get(opt_state, "value")
    return value, grads, jnp.where(jnp.isfinite(stored), 0, 1)


def _summary(point: _Point) -> tuple[jax.Array, ...]:
    squares = [jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(point.grads)]
    return point.value, jnp.sqrt(jnp.sum(jnp.stack(squares))), point.gradients


def _iterate(summary: tuple[jax.Array, ...], updates: int, seconds: float) -> Iterate:
    value, gradient_norm, gradients = jax.device_get(summary)
    return Iterate(
        float(value), float(gradient_norm), int(gradients), updates=updates, seconds=seconds
    )
