"""Weight decay, as a link before a direction or behind it."""

from typing import Literal, TypeAlias, get_args

import chex
import optax

from secondorder.checks import check_choice, check_range, is_zero

WeightDecayForm: TypeAlias = Literal["l2", "decoupled"]


def check_weight_decay(weight_decay: chex.Numeric, weight_decay_form: WeightDecayForm) -> None:
    """Raises `ValueError` for a negative coefficient, or a form that there is not.

    Args:
      weight_decay: Coefficient of the decay.
      weight_decay_form: ``"l2"`` or ``"decoupled"``.
    """
    check_range("weight_decay", weight_decay, low=0)
    check_choice("weight_decay_form", weight_decay_form, get_args(WeightDecayForm))


def with_weight_decay(
    links: tuple[optax.GradientTransformation, ...],
    weight_decay: chex.Numeric,
    weight_decay_form: WeightDecayForm,
) -> tuple[optax.GradientTransformation, ...]:
    r"""Puts weight decay before the links of a chain, or behind them.

    Args:
      links: The direction, and what else comes before the decay if that is decoupled.
      weight_decay: Coefficient :math:`\tau \ge 0` of the decay.
      weight_decay_form: ``"l2"`` adds :math:`\tau\theta` to the gradient, ``"decoupled"`` to what
        the links make of it.

    Returns:
      The links for `optax.chain`; as they were if ``weight_decay`` is known to be zero.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> links = (optax.scale(10.0),)
      >>> for form in ("l2", "decoupled"):
      ...     tx = optax.chain(*with_weight_decay(links, 0.5, form))
      ...     updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), 2 * jnp.ones(1))
      ...     print(updates)
      [20.]
      [11.]
    """
    check_weight_decay(weight_decay, weight_decay_form)
    if is_zero(weight_decay):
        return links
    decay = optax.add_decayed_weights(weight_decay)
    return (decay, *links) if weight_decay_form == "l2" else (*links, decay)
