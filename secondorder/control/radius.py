"""The radius of a trust region, steered by the ratio of actual to predicted reduction."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from secondorder.checks import check_range, is_number

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
      slope_rate: How fast the radius follows the slope that a step leaves behind on the next
        batch, at least 0; see `follow_slope`.
      slope_target: Share of the slope to be left, in [-1, 1). Zero is the minimum along the step.
    """

    shrink: chex.Numeric = 0.5
    grow: chex.Numeric = 2.0
    shrink_below: chex.Numeric = 0.1
    grow_above: chex.Numeric = 0.75
    reach: chex.Numeric = 0.8
    smallest: chex.Numeric = 1e-10
    largest: chex.Numeric = 1e10
    slope_rate: chex.Numeric = 0.0
    slope_target: chex.Numeric = 0.0

    def __post_init__(self) -> None:
        check_range("shrink", self.shrink, low=0, high=1, open_low=True)
        check_range("grow", self.grow, low=1)
        for name in ("shrink_below", "grow_above"):
            check_range(name, getattr(self, name), low=0, high=1)
        for name in ("reach", "smallest", "largest"):
            check_range(name, getattr(self, name), low=0, open_low=True)
        check_range("slope_rate", self.slope_rate, low=0)
        check_range("slope_target", self.slope_target, low=-1, high=1)


def reduction_ratio(
    value: jax.Array,
    trial_value: jax.Array,
    predicted: jax.Array,
    resolution: float | None = None,
) -> jax.Array:
    r"""The ratio of actual to predicted reduction, close to one where neither can be resolved.

    .. math::
      \rho = \frac{f - f_+ + \epsilon}{\mathrm{predicted} + \epsilon}, \qquad
      \epsilon = 10\, u \max(|f|, |f_+|)

    with the unit roundoff :math:`u` of the values, or their coarser ``resolution``. Near a minimum
    both reductions fall below the rounding of ``f``, and the quotient of two rounding errors would
    stop the method.

    Args:
      value: ``f`` at the present point.
      trial_value: ``f`` at the trial point.
      predicted: Reduction that the model promises.
      resolution: Relative spacing of the numbers that the values were computed in, if it is coarser
        than that of the dtype that they arrive in.

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
    noise = _ROUNDINGS * max(float(np.finfo(dtype).eps), resolution or 0.0) * size
    denominator = predicted + noise
    usable = jnp.isfinite(trial_value) & jnp.isfinite(predicted) & (predicted >= 0)
    usable &= denominator > 0
    ratio = (value - trial_value + noise) / jnp.where(usable, denominator, 1)
    return jnp.where(usable, ratio, -jnp.inf)


def follow_slope(
    rule: RadiusRule, radius: jax.Array, slope_before: jax.Array, slope_after: jax.Array
) -> jax.Array:
    r"""The radius in view of the slope along the last step, at its end and on a new batch.

    .. math:: \Delta \gets \Delta \exp(\eta\,(q - q^*)), \qquad
      q = \frac{g_{k+1}^\top p_k}{g_k^\top p_k} \in [-1, 1]

    with the rate :math:`\eta` and the target :math:`q^*`. A step and its reduction on the batch
    that it was made for share the noise of that batch, and their ratio does not show it. The
    gradient of the next batch knows nothing of that noise: where it points back along the step,
    the step was longer than what the batches have in common.

    Args:
      rule: The rule.
      radius: The radius.
      slope_before: :math:`g_k^\top p_k`, negative; or zero if there is no last step.
      slope_after: :math:`g_{k+1}^\top p_k`.

    Returns:
      The radius, unchanged if there is no slope to compare with.

    Example:
      >>> rule, radius = RadiusRule(slope_rate=0.1), jnp.float32(1.0)
      >>> [round(float(follow_slope(rule, radius, -2.0, after)), 3) for after in (-2.0, 0.0, 9.0)]
      [1.105, 1.0, 0.905]

    Source: the sign of the product of successive directions, as in Almeida et al. (1998), Parameter
    adaptation in stochastic optimization; Baydin et al. (2018), Online learning rate adaptation
    with hypergradient descent, ICLR.
    """
    if is_number(rule.slope_rate) and rule.slope_rate == 0:
        return radius
    known = slope_before < 0
    share = jnp.clip(slope_after / jnp.where(known, slope_before, -1), -1, 1)
    factor = jnp.exp(rule.slope_rate * (share - rule.slope_target))
    followed = jnp.clip(factor * radius, rule.smallest, rule.largest).astype(radius.dtype)
    return jnp.where(known & jnp.isfinite(share), followed, radius)


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
