"""How far to go along a direction, and how far back along the iterates that led to it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from secondorder.control.radius import reduction_ratio


class SearchResult(NamedTuple):
    """Where a line search ended.

    Attributes:
      rate: The rate accepted, exactly 0 if none was.
      value: Value of the objective there; the original one if no rate was accepted.
      trials: How often the objective was evaluated, int32.
      accepted: Whether a rate was accepted.
    """

    rate: jax.Array
    value: jax.Array
    trials: jax.Array
    accepted: jax.Array


class StoredResult(NamedTuple):
    """Which of the stored iterates is the best.

    Attributes:
      place: Its index, int32; -1 if there is none with a finite value.
      value: Its value; infinity if there is none.
      evaluations: How often the objective was evaluated, int32.
    """

    place: jax.Array
    value: jax.Array
    evaluations: jax.Array


def backtrack(
    value_fn: Callable[[jax.Array], jax.Array],
    value: ArrayLike,
    slope: ArrayLike,
    *,
    first: ArrayLike = 1.0,
    shrink: ArrayLike = 0.8,
    sufficient: ArrayLike = 1e-2,
    max_trials: int = 60,
    first_value: ArrayLike | None = None,
    resolution: float | None = None,
) -> SearchResult:
    r"""Shrinks a rate until the value falls by a fraction of what the slope promises.

    .. math::
      f(\alpha) \le f(0) + c\, \alpha\, f'(0) + (1 - c)\, \epsilon,
      \qquad \alpha \in \{\alpha_1, \alpha_1 s, \alpha_1 s^2, \dots\}

    which is `reduction_ratio` of at least :math:`c`, with its :math:`\epsilon` of a few roundings:
    near a minimum no rate would reduce the value by more than they are. A value that is not finite
    is a failure. Without descent, or with a slope or original value that is not finite, nothing is
    evaluated.

    Args:
      value_fn: From the rate to the value of the objective there.
      value: ``f(0)``.
      slope: ``f'(0)``.
      first: First rate, positive.
      shrink: Factor between two rates, in (0, 1).
      sufficient: ``c``, in (0, 1).
      max_trials: How many rates are tried at most, static.
      first_value: ``f(first)`` where it is known; it is not evaluated again, nor counted.
      resolution: As in `reduction_ratio`.

    Returns:
      The rate, the value there, the number of evaluations, and whether any rate was accepted. Rate
      and value have the dtype of ``value``, but float32 at least.

    Example:
      >>> result = backtrack(lambda rate: (1 - 4 * rate) ** 2, 1.0, -8.0, shrink=0.5)
      >>> float(result.rate), float(result.value), int(result.trials)
      (0.25, 0.0, 3)
      >>> result = backtrack(lambda rate: 1 + rate, 1.0, -8.0, max_trials=10)
      >>> float(result.rate), float(result.value), int(result.trials)
      (0.0, 1.0, 10)

    Source: Armijo (1966), Pacific Journal of Mathematics 16(1); the numbers are those of Martens'
    program for Hessian-free optimization (2010).
    """
    # One dtype, and none that is weak: either would change in the loop.
    dtype = jnp.result_type(value, jnp.float32)
    value, slope, first, shrink = (jnp.asarray(x, dtype) for x in (value, slope, first, shrink))
    descends = (slope < 0) & jnp.isfinite(slope) & jnp.isfinite(value)

    def judge(result: SearchResult, rate: jax.Array, trial: ArrayLike) -> SearchResult:
        trial = jnp.asarray(trial, dtype)
        ratio = reduction_ratio(value, trial, -rate * slope, resolution)
        taken = descends & (ratio >= sufficient)
        return result._replace(
            rate=jnp.where(taken, rate, 0), value=jnp.where(taken, trial, value), accepted=taken
        )

    count, rate, evaluations = jnp.zeros((), jnp.int32), first, max_trials
    start = SearchResult(jnp.zeros((), dtype), value, count, jnp.zeros((), bool))
    if first_value is not None:
        start, rate, evaluations = judge(start, first, first_value), shrink * first, max_trials - 1

    def proceed(search: tuple[SearchResult, jax.Array]) -> jax.Array:
        result, _ = search
        return descends & ~result.accepted & (result.trials < evaluations)

    def attempt(search: tuple[SearchResult, jax.Array]) -> tuple[SearchResult, jax.Array]:
        result, rate = search
        counted = result._replace(trials=result.trials + 1)
        return judge(counted, rate, value_fn(rate)), shrink * rate

    return jax.lax.while_loop(proceed, attempt, (start, rate))[0]


def best_stored(
    value_of_index: Callable[[jax.Array], jax.Array], last_index: ArrayLike
) -> StoredResult:
    """Goes back from the last stored iterate while the value does not rise.

    An iterative solver reduces a model, and with every iteration its iterates are longer: the
    objective falls along the first of them and rises again where the model is no longer good.
    Few are evaluated, as the first worse predecessor ends the search. A value that is not finite
    is worse than any that is; as long as only such are found, the search goes on.

    Args:
      value_of_index: From an index, in ``[0, last_index]``, to the value of the objective at that
        iterate.
      last_index: Index of the last iterate; -1 if none is stored.

    Returns:
      The index, its value in the dtype of ``value_of_index``, and the number of evaluations. The
      value serves `backtrack` as ``first_value``.

    Example:
      >>> values = jnp.array([1.0, 7.0, 3.0, 2.0, 2.0, 5.0])
      >>> result = best_stored(lambda index: values[index], 5)
      >>> int(result.place), float(result.value), int(result.evaluations)
      (3, 2.0, 4)

    Source: Martens (2010), Deep learning via Hessian-free optimization.
    """
    last = jnp.asarray(last_index, jnp.int32)
    dtype = jax.eval_shape(value_of_index, last).dtype

    def proceed(search: tuple[StoredResult, jax.Array]) -> jax.Array:
        result, risen = search
        return ~risen & (result.evaluations <= last)

    def attempt(search: tuple[StoredResult, jax.Array]) -> tuple[StoredResult, jax.Array]:
        result, _ = search
        # Mapped over, the body also runs where a search has ended.
        index = jnp.maximum(last - result.evaluations, 0)
        found = jnp.asarray(value_of_index(index), dtype)
        found = jnp.where(jnp.isfinite(found), found, jnp.inf)
        better = jnp.isfinite(found) & (found <= result.value)
        new = StoredResult(
            jnp.where(better, index, result.place),
            jnp.where(better, found, result.value),
            result.evaluations + 1,
        )
        return new, found > result.value

    count = jnp.zeros((), jnp.int32)
    start = StoredResult(jnp.full_like(count, -1), jnp.full((), jnp.inf, dtype), count)
    return jax.lax.while_loop(proceed, attempt, (start, jnp.zeros((), bool)))[0]


def optimal_rate(slope: ArrayLike, curvature: ArrayLike, largest: ArrayLike = 1.0) -> jax.Array:
    r"""The rate that minimizes a quadratic model along a direction.

    .. math::
      \alpha^* = \min\left(\frac{-g^\top d}{d^\top (G + \lambda I)\, d},\;
                 \alpha_{\max}\right), \qquad g^\top d < 0

    and 0 without descent. A model that does not curve upwards is bounded by
    :math:`\alpha_{\max}` only. Numbers that are not finite say nothing, and give 0. There are no
    absolute thresholds, so that an objective times a constant has the same rate.

    Args:
      slope: ``gᵀd``.
      curvature: ``dᵀ(G + λI)d``, of any sign.
      largest: Upper bound, positive and finite.

    Returns:
      The rate, in ``[0, largest]``, elementwise, in the dtype of the model, but float32 at least.

    Example:
      >>> pairs = ((-2.0, 8.0), (-2.0, 1.0), (2.0, 8.0), (-2.0, -1.0), (-2.0, jnp.nan))
      >>> [float(optimal_rate(slope, curvature)) for slope, curvature in pairs]
      [0.25, 1.0, 0.0, 1.0, 0.0]

    Source: Nocedal, Wright (2006), Numerical Optimization, section 3.5.
    """
    dtype = jnp.result_type(slope, curvature, jnp.float32)
    slope, curvature, largest = (jnp.asarray(x, dtype) for x in (slope, curvature, largest))
    usable = jnp.isfinite(slope) & jnp.isfinite(curvature) & (slope < 0)
    curves = curvature > 0
    minimizer = -slope / jnp.where(curves, curvature, 1)
    rate = jnp.where(curves, jnp.minimum(minimizer, largest), largest)
    return jnp.where(usable, rate, 0)
