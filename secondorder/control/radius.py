"""The radius of a trust region, steered by the ratio of actual to predicted reduction."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from secondorder.checks import check_range

_ROUNDINGS = 10  # of the value, within which two values are taken for equal


@dataclasses.dataclass(frozen=True)
class RadiusRule:
    """How a radius follows the ratio of actual to predicted reduction.

    Attributes:
      shrink: Factor in (0, 1) where the ratio is below ``shrink_below``.
      grow: Factor of at least 1 where it is above ``grow_above`` and the step reaches the boundary.
      shrink_below: Ratio, in (0, 1).
      grow_above: Ratio, in (0, 1).
      reach: A step longer than this fraction of the radius reaches the boundary.
      smallest: Lower bound of the radius.
      largest: Upper bound of the radius.
    """

    shrink: chex.Numeric = 0.5
    grow: chex.Numeric = 2.0
    shrink_below: chex.Numeric = 0.1
    grow_above: chex.Numeric = 0.75
    reach: chex.Numeric = 0.8
    smallest: chex.Numeric = 1e-10
    largest: chex.Numeric = 1e10

    def __post_init__(self) -> None:
        check_range("shrink", self.shrink, low=0, high=1, open_low=True)
        check_range("grow", self.grow, low=1)
        for name in ("shrink_below", "grow_above"):
            check_range(name, getattr(self, name), low=0, high=1)
        for name in ("reach", "smallest", "largest"):
            check_range(name, getattr(self, name), low=0, open_low=True)


def reduction_ratio(value: jax.Array, trial_value: jax.Array, predicted: jax.Array) -> jax.Array:
    r"""The ratio of actual to predicted reduction, close to one where neither can be resolved.

    .. math::
      \rho = \frac{f - f_+ + \epsilon}{\mathrm{predicted} + \epsilon}, \qquad
      \epsilon = 10\, u \max(|f|, |f_+|)

    with the unit roundoff :math:`u` of the values. Near a minimum both reductions fall below the
    rounding of ``f``, and the quotient of two rounding errors would stop the method.

    Args:
      value: ``f`` at the present point.
      trial_value: ``f`` at the trial point.
      predicted: Reduction that the model promises.

    Returns:
      The ratio; minus infinity if the trial value is not finite, or the promise not positive.

    Example:
      >>> round(float(reduction_ratio(jnp.float32(2.0), jnp.float32(1.0), jnp.float32(2.0))), 3)
      0.5

    Source: Conn, Gould, Toint (2000), Trust-Region Methods, section 17.4.2.
    """
    dtype = jnp.result_type(value, jnp.float32)
    value, trial_value, predicted = (x.astype(dtype) for x in (value, trial_value, predicted))
    size = jnp.maximum(jnp.abs(value), jnp.abs(trial_value))
    noise = _ROUNDINGS * float(np.finfo(dtype).eps) * size
    denominator = predicted + noise
    usable = jnp.isfinite(trial_value) & jnp.isfinite(predicted) & (predicted >= 0)
    usable &= denominator > 0
    ratio = (value - trial_value + noise) / jnp.where(usable, denominator, 1)
    return jnp.where(usable, ratio, -jnp.inf)


def next_radius(
    rule: RadiusRule, radius: jax.Array, ratio: jax.Array, length: ArrayLike
) -> jax.Array:
    """The radius after a step.

    A step that failed shrinks the radius from its own length: were it well inside, a smaller
    region around it would give the same step again.

    Args:
      rule: The rule.
      radius: The radius of the step.
      ratio: Its ratio of actual to predicted reduction.
      length: Its length in the norm of the region.

    Returns:
      The next radius, in the dtype of ``radius``.

    Example:
      >>> rule, radius = RadiusRule(), jnp.float32(1.0)
      >>> [float(next_radius(rule, radius, ratio, 1.0)) for ratio in (-1.0, 0.5, 0.9)]
      [0.5, 1.0, 2.0]

    Source: Nocedal, Wright (2006), Numerical Optimization, algorithm 6.2.
    """
    length = jnp.asarray(length, radius.dtype)
    shrunk = rule.shrink * jnp.minimum(radius, length)
    grows = (ratio > rule.grow_above) & (length >= rule.reach * radius)
    changed = jnp.where(
        ratio < rule.shrink_below, shrunk, jnp.where(grows, rule.grow * radius, radius)
    )
    return jnp.clip(changed, rule.smallest, rule.largest).astype(radius.dtype)
