"""The parts of a step of `newton_cg`: what is solved for, where to go, and how far."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from secondorder import tree as vectors
from secondorder.control import reduction_ratio
from secondorder.methods.hessian_free_model import Parabola, parabola_of
from secondorder.methods.terminal import Point
from secondorder.operators import LinearOperator
from secondorder.solvers import CGResult

NegativeCurvature: TypeAlias = Literal["follow", "truncate"]


class Equation(NamedTuple):
    """What conjugate gradients are to solve.

    Attributes:
      right: The right-hand side: the negative gradient, or a random vector.
      is_probe: Whether it is random, as the gradient vanishes.
      residual: The relative residual that is small enough.
      largest_gradient: The largest norm of a gradient so far.
    """

    right: chex.ArrayTree
    is_probe: jax.Array
    residual: jax.Array
    largest_gradient: jax.Array


class Direction(NamedTuple):
    """Where to go.

    Attributes:
      vector: The direction ``d``.
      parabola: The quadratic model without damping along it.
      curves_down: Whether it is one of negative curvature.
    """

    vector: chex.ArrayTree
    parabola: Parabola
    curves_down: jax.Array


class LineSearch(NamedTuple):
    """Where a line search is.

    Attributes:
      rate: The best rate so far; 0 if none was accepted.
      value: The objective there.
      next_rate: What to try next.
      trials: Values so far, int32.
      ended: Whether there is nothing more to gain.
    """

    rate: jax.Array
    value: jax.Array
    next_rate: jax.Array
    trials: jax.Array
    ended: jax.Array


def pose(
    gradient: chex.ArrayTree,
    largest_gradient: jax.Array,
    forcing: chex.Numeric,
    power: chex.Numeric,
    key: jax.Array,
) -> Equation:
    """The right-hand side, and how accurately to solve for it.

    Args:
      gradient: The gradient.
      largest_gradient: The largest of its norms before this one.
      forcing: Largest relative residual.
      power: Exponent of the gradient's norm, as a share of the largest, that bounds it too.
      key: Of the random vector.

    Returns:
      The equation.
    """
    norm = jnp.sqrt(vectors.inner(gradient, gradient))
    largest = jnp.maximum(largest_gradient, norm)
    # What vanishes is judged by the largest gradient so far, not by an absolute number.
    is_probe = norm <= float(np.finfo(norm.dtype).eps) * largest
    share = norm / jnp.where(largest > 0, largest, 1)
    # At a stationary point nothing is to be solved, only something to be found.
    residual = jnp.where(is_probe, 0, jnp.minimum(forcing, share**power)).astype(norm.dtype)
    drawn = vectors.random_vector("normal", key, gradient)
    right = jax.tree.map(lambda r, g: jnp.where(is_probe, r, -g), drawn, gradient)
    return Equation(right, is_probe, residual, largest)


def choose_direction(
    kind: NegativeCurvature,
    matrix: LinearOperator,
    damping: jax.Array,
    result: CGResult,
    equation: Equation,
    gradient: chex.ArrayTree,
    probe_length: chex.Numeric,
) -> Direction:
    """The solution, or the direction of negative curvature; zero if a probe found none.

    Args:
      kind: What to do at negative curvature.
      matrix: The Hessian without damping.
      damping: What conjugate gradients had added to it.
      result: What they found.
      equation: What they were to solve.
      gradient: The gradient.
      probe_length: Least length of a direction that a probe found.

    Returns:
      The direction.
    """
    curves_down = result.negative_curvature[0]
    if kind == "truncate":
        curves_down &= equation.is_probe | (result.iterations[0] == 0)
    factor, down = _scale_down(
        matrix, result.direction, gradient, equation.is_probe, probe_length, curves_down
    )
    ahead = parabola_of(gradient, result.solution, result.model[0], damping)
    # The solution for a random vector is of no use.
    share = jnp.where(equation.is_probe, 0, 1).astype(factor.dtype)
    vector = jax.tree.map(
        lambda p, x: jnp.where(curves_down, factor * p, share * x).astype(x.dtype),
        result.direction,
        result.solution,
    )
    parabola = jax.tree.map(lambda a, b: jnp.where(curves_down, a, share * b), down, ahead)
    return Direction(vector, parabola, curves_down)


def search_along(
    evaluate: Callable[[jax.Array], jax.Array],
    point: Point,
    direction: Direction,
    first: chex.Numeric,
    sufficient: chex.Numeric,
    shrink: chex.Numeric,
    max_trials: chex.Numeric,
) -> LineSearch:
    """Backtracks; along negative curvature goes on instead, while the value falls.

    Args:
      evaluate: From a rate to the value of the objective there.
      point: Where the search starts.
      direction: The direction.
      first: First rate.
      sufficient: Share of the promise to keep; curvature counts in it where it is negative.
      shrink: Factor of a rate that is too long, and inverse of that of one that may be too short.
      max_trials: Most values.

    Returns:
      The end of the search, at rate 0 if the objective does not fall.
    """
    parabola, curves_down = direction.parabola, direction.curves_down
    promise = parabola._replace(curvature=jnp.minimum(parabola.curvature, 0))
    descends = (promise.slope < 0) | curves_down
    descends &= jnp.isfinite(promise.slope) & jnp.isfinite(promise.curvature) & point.usable

    def attempt(search: LineSearch) -> LineSearch:
        rate = search.next_rate
        found = evaluate(rate).astype(search.value.dtype)
        ratio = reduction_ratio(point.value, found, -promise.change(rate), point.resolution)
        # What falls by rounding alone would be followed along negative curvature for long.
        taken = (ratio >= sufficient) & (~curves_down | (found < search.value))
        grows = curves_down & ((search.trials == 0) | (search.rate > 0))
        return LineSearch(
            rate=jnp.where(taken, rate, search.rate),
            value=jnp.where(taken, found, search.value),
            next_rate=jnp.where(taken, rate / shrink, rate * shrink).astype(rate.dtype),
            trials=search.trials + 1,
            ended=jnp.where(taken, ~grows, search.rate > 0),
        )

    dtype = point.value.dtype
    start = LineSearch(
        rate=jnp.zeros((), dtype),
        value=point.value,
        next_rate=jnp.asarray(first, dtype),
        trials=jnp.zeros((), jnp.int32),
        ended=~descends,
    )
    return jax.lax.while_loop(
        lambda search: ~search.ended & (search.trials < max_trials), attempt, start
    )


def _scale_down(
    matrix: LinearOperator,
    direction: chex.ArrayTree,
    gradient: chex.ArrayTree,
    is_probe: jax.Array,
    probe_length: chex.Numeric,
    curves_down: jax.Array,
) -> tuple[jax.Array, Parabola]:
    """The factor of a direction of negative curvature, and the model along what it makes of it."""
    square = vectors.inner(direction, direction)
    square = jnp.where(square > 0, square, 1)
    # One more product, where there is such a direction only.
    curvature = jax.lax.cond(
        curves_down,
        lambda p: jnp.minimum(vectors.inner(p, matrix(p)), 0),
        lambda p: jnp.zeros_like(square),
        direction,
    )
    slope, curvature = vectors.inner(gradient, direction) / jnp.sqrt(square), curvature / square
    # What is left of a gradient that vanishes has no say: either sign may be the right one.
    slope = jnp.where(is_probe, 0, slope)
    least = jnp.where(is_probe, probe_length, jnp.abs(slope))
    length = jnp.maximum(-curvature, least).astype(slope.dtype)
    factor = jnp.where(slope > 0, -length, length) / jnp.sqrt(square)
    return factor, Parabola(-length * jnp.abs(slope), length**2 * curvature)
