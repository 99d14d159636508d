"""Averages of few random squares, drawn toward their common mean."""

import chex
import jax
import jax.numpy as jnp


def effective_samples(decay: chex.Numeric, count: jax.Array) -> jax.Array:
    r"""How many samples of equal weight vary as much as an exponential average.

    .. math:: n = \frac{(\sum_i \beta^i)^2}{\sum_i \beta^{2i}}
      = \frac{1 + \beta}{1 - \beta} \cdot \frac{1 - \beta^k}{1 + \beta^k}

    Args:
      decay: :math:`\beta` in [0, 1).
      count: Samples in the average, ``k``, whose weights are those of `warm_decay`.

    Returns:
      :math:`n`, at least 1.

    Example:
      >>> [round(float(effective_samples(0.5, jnp.int32(k))), 3) for k in (1, 2, 100)]
      [1.0, 1.8, 3.0]
    """
    power = jnp.asarray(decay, jnp.float32) ** count
    return jnp.maximum((1 + decay) / (1 - decay) * (1 - power) / (1 + power), 1)


def shrink_to_mean(averages: jax.Array, samples: chex.Numeric) -> jax.Array:
    r"""Draws averages of squares of normal numbers toward their mean, as far as they are noise.

    An average :math:`d_j` of ``n`` squares of mean :math:`s_j` has the variance
    :math:`2 s_j^2 / n`. If the means themselves have the relative variance :math:`\tau^2`, the best
    linear estimate of :math:`s_j` is

    .. math:: (1 - w)\, d_j + w\, \bar d, \qquad
      w = \frac{\frac2n (1 + \tau^2)}{\frac2n (1 + \tau^2) + \tau^2},

    and :math:`\tau^2` is read off the averages, as the mean of :math:`d_j^2 / \bar d^2` is
    :math:`q = (1 + \frac2n)(1 + \tau^2)`. Of one sample each, with means that hardly differ, little
    but :math:`\bar d` is left; in any case :math:`w \ge 2 / (n + 2)`; and with many samples nothing
    is changed.

    Args:
      averages: :math:`d_j \ge 0`, of any shape.
      samples: ``n``, at least 1; see `effective_samples`.

    Returns:
      The estimates, of the same mean.

    Example:
      >>> noisy = jnp.array([0.0, 0.25, 4.0, 0.5])
      >>> shrink_to_mean(noisy, 1).tolist(), shrink_to_mean(noisy, 1e9).tolist()
      ([1.1875, 1.1875, 1.1875, 1.1875], [0.0, 0.25, 4.0, 0.5])
    """
    mean = jnp.mean(averages)
    ratios = averages / jnp.where(mean > 0, mean, 1)
    spread = jnp.mean(ratios**2)  # q
    excess = jnp.maximum(spread / (1 + 2 / samples) - 1, 0)  # tau^2
    kept = jnp.where(excess > 0, excess / jnp.where(excess > 0, spread - 1, 1), 0)
    return mean + kept.astype(averages.dtype) * (averages - mean)
