"""The damping of a quadratic model, steered by the ratio of actual to predicted reduction."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from secondorder.checks import check_range

_BACK_OFF = 4.0


@dataclasses.dataclass(frozen=True)
class DampingRule:
    """How a damping follows the ratio of actual to predicted reduction.

    A damping has the scale of the curvature: that of a mean over ``N`` cases is ``1/N`` times that
    of a sum, and a loss times ``s`` needs a damping times ``s``. The default bounds exclude next
    to nothing. With minibatches the ratio is noisy, and biased upwards if its reductions are those
    of the batch that built the model; then 1e-6 and 1e2 keep a damping for a mean in range, and
    factors close to one, such as 1/0.99 and 0.99, average over steps.

    Attributes:
      raise_by: Factor of at least 1 where the ratio is below ``raise_below``, or not a number.
      lower_by: Factor in (0, 1) where it is above ``lower_above``.
      raise_below: Ratio, in [0, 1).
      lower_above: Ratio, in [0, 1).
      smallest: Lower bound of the damping, above 0, from which no factor would raise it.
      largest: Upper bound of the damping.
    """

    raise_by: chex.Numeric = 3 / 2
    lower_by: chex.Numeric = 2 / 3
    raise_below: chex.Numeric = 1 / 4
    lower_above: chex.Numeric = 3 / 4
    smallest: chex.Numeric = 1e-10
    largest: chex.Numeric = 1e10

    def __post_init__(self) -> None:
        check_range("raise_by", self.raise_by, low=1)
        check_range("lower_by", self.lower_by, low=0, high=1, open_low=True)
        for name in ("raise_below", "lower_above"):
            check_range(name, getattr(self, name), low=0, high=1)
        for name in ("smallest", "largest"):
            check_range(name, getattr(self, name), low=0, open_low=True)


class NielsenState(NamedTuple):
    """A damping that is raised the faster, the more steps in a row have failed.

    Attributes:
      damping: The damping, positive.
      factor: What the next failure multiplies it by, of the same shape; starts at 2.
    """

    damping: jax.Array
    factor: jax.Array


def next_damping(rule: DampingRule, damping: jax.Array, ratio: jax.Array) -> jax.Array:
    r"""The damping after a step.

    .. math::
      \lambda_+ = \begin{cases}
        \tfrac32 \lambda & \rho < \tfrac14 \text{ or not a number}, \\
        \tfrac23 \lambda & \rho > \tfrac34, \\
        \lambda & \text{otherwise,}
      \end{cases}

    with the numbers of the rule, and within its bounds.

    Args:
      rule: The rule.
      damping: The damping of the step, positive: a scalar, or one for each block.
      ratio: Its ratio of actual to predicted reduction, of a shape that broadcasts to that of
        ``damping``; minus infinity for a step without a reduction to speak of.

    Returns:
      The next damping, in the shape and dtype of ``damping``.

    Example:
      >>> rule, damping = DampingRule(), jnp.float32(6.0)
      >>> [float(next_damping(rule, damping, ratio)) for ratio in (jnp.nan, 0.2, 0.5, 0.9)]
      [9.0, 9.0, 6.0, 4.0]

    Source: Martens (2010), Deep learning via Hessian-free optimization.
    """
    # Every comparison with NaN is false, and what passes neither is raised.
    kept_or_raised = jnp.where(ratio >= rule.raise_below, damping, rule.raise_by * damping)
    changed = jnp.where(ratio > rule.lower_above, rule.lower_by * damping, kept_or_raised)
    return jnp.clip(changed, rule.smallest, rule.largest).astype(damping.dtype)


def raised_damping(rule: DampingRule, damping: jax.Array) -> jax.Array:
    """The damping after a step that cannot be taken, as the objective behind it is not finite.

    There is no ratio to follow, and nothing is gained until a step is taken. So the factor is at
    least four, however slowly the rule follows its ratios: a damping that is too small by six
    orders of magnitude takes ten steps.

    Args:
      rule: The rule, with the upper bound.
      damping: The damping of the step, positive.

    Returns:
      The next damping, in the shape and dtype of ``damping``.

    Example:
      >>> float(raised_damping(DampingRule(), jnp.float32(6.0)))
      24.0
    """
    raised = jnp.maximum(rule.raise_by, _BACK_OFF) * damping
    return jnp.clip(raised, rule.smallest, rule.largest).astype(damping.dtype)


def damping_bound(rule: DampingRule, damping: jax.Array) -> jax.Array:
    """Which bound of its rule a damping is at.

    Args:
      rule: The rule.
      damping: The damping.

    Returns:
      -1 at the lower bound, 1 at the upper, 0 between, int32.

    Example:
      >>> [int(damping_bound(DampingRule(), jnp.float32(d))) for d in (1e-10, 1.0, 1e10)]
      [-1, 0, 1]
    """
    lower, upper = (jnp.asarray(b).astype(damping.dtype) for b in (rule.smallest, rule.largest))
    return (damping >= upper).astype(jnp.int32) - (damping <= lower).astype(jnp.int32)


def nielsen_damping(
    state: NielsenState,
    ratio: jax.Array,
    *,
    smallest: chex.Numeric = 1e-10,
    largest: chex.Numeric = 1e10,
) -> NielsenState:
    r"""The damping after a step that is taken if it reduces the objective, and rejected otherwise.

    .. math::
      (\lambda_+, \nu_+) = \begin{cases}
        \left(\lambda \max\left(\tfrac13,\, 1 - (2\rho - 1)^3\right),\; 2\right) & \rho > 0, \\
        (\lambda \nu,\; 2 \nu) & \text{otherwise.}
      \end{cases}

    The first case has no jumps, as there are where the factor of `next_damping` changes. A ratio
    that is not finite is that of a rejected step.

    Args:
      state: The damping of the step, and the factor of a failure.
      ratio: The ratio of actual to predicted reduction of the step, of a shape that broadcasts to
        that of the damping.
      smallest: Lower bound of the damping, positive.
      largest: Upper bound of the damping. Sixteen failures in a row would overflow float32.

    Returns:
      The next state, in the shapes and dtypes of ``state``.

    Example:
      >>> state = NielsenState(jnp.float32(3.0), jnp.float32(2.0))
      >>> for ratio in (-jnp.inf, jnp.nan, 0.5, 1.0):
      ...     state = nielsen_damping(state, ratio)
      ...     print(f"{state.damping:.1f} {state.factor:.1f}")
      6.0 4.0
      24.0 8.0
      24.0 2.0
      8.0 2.0

    Source: Nielsen (1999), Damping parameter in Marquardt's method, IMM-REP-1999-05.
    """
    damping, factor = state
    taken = jnp.isfinite(ratio) & (ratio > 0)
    softened = jnp.maximum(1 / 3, 1 - (2 * jnp.where(taken, ratio, 1) - 1) ** 3)
    changed = damping * jnp.where(taken, softened, factor)
    # A larger factor than from one bound to the other makes no difference, but overflows.
    raised = jnp.minimum(2 * factor, largest / smallest)
    return NielsenState(
        jnp.clip(changed, smallest, largest).astype(damping.dtype),
        jnp.where(taken, 2, raised).astype(factor.dtype),
    )
