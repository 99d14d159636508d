"""How much of what a batch promises the next one confirms, and steps as long as that allows."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from secondorder.sharding import replicated_zeros

_DECAY = 0.8  # of the average of shares
_BOUNDS = (-1.0, 3.0)  # of a single share, which is noisy
_HEAVIEST = 3.0  # weight of a share, as a multiple of their average
_SHORTEST = 1 / 10


class Confirmation(NamedTuple):
    """What is known of the last step, and of all steps on average.

    Attributes:
      share: Average of the confirmed shares; one as long as there is none.
      promise: Average of what their steps promised, which are their weights; zero before the first.
      slope: Product of the last step with the gradient that it was chosen by; zero if there is no
        step to be confirmed.
      curvature: Value of the model's matrix, without damping, of the last step.
    """

    share: jax.Array
    promise: jax.Array
    slope: jax.Array
    curvature: jax.Array


def init_confirmation(dtype: chex.ArrayDType) -> Confirmation:
    """Nothing is known.

    Args:
      dtype: Of the numbers.

    Returns:
      A share of one.

    Example:
      >>> float(init_confirmation(jnp.float32).share)
      1.0
    """
    # An array each, so that a training step can be given all of them to overwrite.
    share, *others = (replicated_zeros((), dtype) for _ in Confirmation._fields)
    return Confirmation(share + 1, *others)


def confirm(
    known: Confirmation, slope: jax.Array, curvature: jax.Array | None = None
) -> Confirmation:
    r"""Averages in what the batch after a step says of it.

    The step :math:`\delta` was made from a gradient :math:`g` with the noise of its batch, which
    makes :math:`\delta^\top g` too negative. The gradient :math:`g_+` and the curvature
    :math:`B_+` of the next batch, behind the step, know nothing of that noise:

    .. math::
      \sigma = \frac{\delta^\top g_+ - \delta^\top B_+ \delta}{\delta^\top g} .

    The curvature of the step's own batch is too large along the step, which makes long steps
    confirm themselves.

    Shares are averaged with the weights :math:`-\delta^\top g`: the multiple of all steps that
    changes the objective most is their average in that sense, and the share of a step that promises
    little is nearly all noise. No weight is above three times their average, so that one step does
    not decide on the next ones.

    Args:
      known: What is known, with :math:`\delta^\top g` and :math:`\delta^\top B \delta`.
      slope: :math:`\delta^\top g_+`.
      curvature: :math:`\delta^\top B_+ \delta`; NaN where it was not computed, which leaves the
        average as it is; None where it never is, for that of the step's own batch.

    Returns:
      The same with a new average, if there was a step, and without one to be confirmed.

    Example:
      >>> known = Confirmation(*map(jnp.float32, (1, 4, -4, 3)))
      >>> share = confirm(known, jnp.float32(0), jnp.float32(2)).share
      >>> round(float(share), 3)  # a fifth of 1/2, the rest of 1
      0.9
      >>> known = Confirmation(*map(jnp.float32, (1, 4, -0.4, 0.3)))  # one that promised little
      >>> round(float(confirm(known, jnp.float32(0), jnp.float32(0.2)).share), 3)
      0.988
    """
    behind = known.curvature if curvature is None else curvature
    has_step = (known.slope < 0) & jnp.isfinite(slope) & jnp.isfinite(behind)
    promised = jnp.where(has_step, -known.slope, 1)
    share = jnp.clip((behind - slope) / promised, *_BOUNDS)
    usual = jnp.where(known.promise > 0, known.promise, promised)
    weight = (1 - _DECAY) * jnp.minimum(promised, _HEAVIEST * usual)
    promise = _DECAY * usual + weight
    average = known.share + weight / promise * (share - known.share)
    return Confirmation(
        jnp.where(has_step, average, known.share).astype(known.share.dtype),
        jnp.where(has_step, promise, known.promise).astype(known.promise.dtype),
        jnp.zeros_like(known.slope),
        known.curvature,
    )


def confirmed_length(share: jax.Array, multiple: chex.Numeric) -> jax.Array:
    r"""The part of a step that is to be taken, :math:`\min(1, c\, \bar\sigma)`.

    If a step is the minimizer of its batch's model, the objective is expected to change by
    :math:`(\alpha\sigma - \alpha^2 / 2)\, \delta^\top g` at :math:`\alpha` times its length: most
    at :math:`\sigma`, and not at all at :math:`2 \sigma`. Where batches are large enough for the
    noise to average over steps, longer ones may lead further in the end.

    Args:
      share: :math:`\bar\sigma`.
      multiple: :math:`c > 0`.

    Returns:
      A factor in [1/10, 1].

    Example:
      >>> [round(float(confirmed_length(jnp.float32(share), 1)), 2) for share in (-0.2, 0.4, 1.2)]
      [0.1, 0.4, 1.0]

    Source: Schaul, Zhang, LeCun (2013), No more pesky learning rates, arXiv 1206.1106, for the best
    length of one step; Wu et al. (2018), Understanding short-horizon bias in stochastic
    meta-optimization, arXiv 1803.02021, for why it may not be the best of many.
    """
    return jnp.clip(multiple * share, _SHORTEST, 1)
