"""K-FAC as an optimizer: its direction at a learning rate, or with the quadratic model's steps."""

from typing import Any

import chex
import optax

from secondorder.checks import check_flag, check_range, is_number, is_zero
from secondorder.control import DampingRule
from secondorder.layers.layer import Layers
from secondorder.methods.kfac import scale_by_kfac
from secondorder.methods.layerwise import with_settings_of
from secondorder.methods.limits import limit_divergence
from secondorder.methods.quadratic_model import scale_by_quadratic_model
from secondorder.methods.weight_decay import WeightDecayForm, check_weight_decay, with_weight_decay

_ADAPTIVE_DAMPING = 1.0  # where the quadratic model starts; it finds its own
# What stands for settings that are not given.
_MOMENTUM, _ADAPT_EVERY, _PLANE_EVERY, _RATES_EVERY, _CONFIRMATION = 0.9, 5, 1, 10, 2.0


@with_settings_of(scale_by_kfac)
def kfac(
    learning_rate: optax.ScalarOrSchedule | None,
    layers: Layers,
    *,
    momentum: chex.Numeric = _MOMENTUM,
    weight_decay: chex.Numeric = 0.0,
    weight_decay_form: WeightDecayForm = "l2",
    max_divergence: chex.Numeric | None = None,
    max_norm: chex.Numeric | None = None,
    damping_rule: DampingRule | None = None,
    adapt_every: int = _ADAPT_EVERY,
    plane_every: int = _PLANE_EVERY,
    layer_rates: bool = False,
    rates_every: int = _RATES_EVERY,
    confirmation: chex.Numeric | None = _CONFIRMATION,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""K-FAC, at a learning rate, or with steps and damping from a quadratic model.

    .. math:: v_{k+1} = \mu v_k - \eta P_k, \qquad \theta_{k+1} = \theta_k + v_{k+1}

    See `scale_by_kfac` for the direction :math:`P` and for all hyperparameters that are not listed
    here. With ``learning_rate=None`` both coefficients are chosen anew in every step, to minimize
    a quadratic model with the exact curvature of the batch, and the damping follows how well it
    predicts; that is::

        so.scale_by_quadratic_model(so.scale_by_kfac(layers, ...), damping=..., ...)

    Args:
      learning_rate: Step size :math:`\eta`, or a schedule of it; or None. Static if it is None.
      layers: The layers of the model, from `find_layers`.
      momentum: :math:`\mu` in [0, 1). Without a learning rate the share of the last step is
        chosen, and 0, which must be static then, leaves it out.
      weight_decay: Coefficient :math:`\tau \ge 0` of the decay, on all parameters.
      weight_decay_form: ``"l2"`` adds :math:`\tau\theta` to the gradient before it is
        preconditioned, and without a learning rate :math:`\tau` to the curvature;
        ``"decoupled"``, with a learning rate only, adds it to the direction.
      max_divergence: With a learning rate, shortens directions with
        :math:`\tfrac12 \eta^2 g^\top P` above it; without, steps whose exact
        :math:`\tfrac12 \delta^\top G \delta` is. None for no limit.
      max_norm: Without a learning rate: longest step. None for any.
      damping_rule: Without a learning rate: how the damping follows the ratio of actual to
        predicted reduction.
      adapt_every: Without a learning rate: judge a step every so many. Static.
      plane_every: Without a learning rate: choose both coefficients in every so many steps, and
        their common factor between. Static.
      layer_rates: Without a learning rate: whether each layer, and each leaf in none, has a rate of
        its own, chosen with the curvature between layers that the blocks neglect. Static.
      rates_every: Choose these in every so many steps. Static.
      confirmation: Without a learning rate: multiple of the share of a step's slope that the next
        batch confirms, which is the longest part of it to be taken; None for all of it.
      **settings: Hyperparameters of `scale_by_kfac`.

    Returns:
      The optimizer. Its ``update`` needs ``params`` and ``value_fn``, an `Objective`.

    Raises:
      ValueError: For hyperparameters out of range, or without effect on the chosen form.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x, y = jnp.ones((8, 3)), jnp.zeros((8, 2))
      >>> objective = so.Objective(lambda w: x @ w, lambda z: jnp.mean((z - y) ** 2))
      >>> params = jnp.ones((3, 2))
      >>> tx = so.kfac(None, so.find_layers(objective, params), damping=0.1)
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     value, grads = jax.value_and_grad(objective)(params)
      ...     updates, state = tx.update(
      ...         grads, state, params, value=value, grad=grads, value_fn=objective)
      ...     params = optax.apply_updates(params, updates)
      >>> float(objective(params)) < 0.01 * 9
      True

    References:
      Martens, Grosse (2015), arXiv 1503.05671.
    """
    check_weight_decay(weight_decay, weight_decay_form)
    check_range("momentum", momentum, low=0, high=1)
    check_range("max_divergence", max_divergence, low=0, open_low=True)
    check_flag("layer_rates", layer_rates)
    direction = scale_by_kfac(layers, **settings)
    if learning_rate is None:
        _check_settings_of_the_model(momentum, weight_decay_form)
        return scale_by_quadratic_model(
            direction,
            damping=settings.get("damping", _ADAPTIVE_DAMPING),
            damping_rule=damping_rule,
            adapt_every=adapt_every,
            plane_every=plane_every,
            parts=layers if layer_rates else None,
            rates_every=rates_every,
            confirmation=confirmation,
            weight_decay=weight_decay,
            momentum=not is_zero(momentum),
            max_norm=max_norm,
            max_divergence=max_divergence,
        )
    without_effect = {
        "max_norm": max_norm is not None,
        "damping_rule": damping_rule is not None,
        "adapt_every": _differs(adapt_every, _ADAPT_EVERY),
        "plane_every": _differs(plane_every, _PLANE_EVERY),
        "layer_rates": layer_rates,
        "rates_every": _differs(rates_every, _RATES_EVERY),
        "confirmation": confirmation is None or _differs(confirmation, _CONFIRMATION),
    }
    _check_no_settings_of_the_model(without_effect)
    if max_divergence is not None:
        direction = limit_divergence(direction, learning_rate, max_divergence)
    links = with_weight_decay((direction,), weight_decay, weight_decay_form)
    step = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(*links, optax.trace(momentum), step)


def _check_settings_of_the_model(
    momentum: chex.Numeric, weight_decay_form: WeightDecayForm
) -> None:
    """Raises `ValueError` for what would have no effect without a learning rate."""
    if weight_decay_form != "l2":
        raise ValueError(
            "kfac: without a learning rate weight decay is part of the objective that is "
            f"modeled; weight_decay_form={weight_decay_form!r} needs a learning rate."
        )
    if is_number(momentum) and momentum not in (0, _MOMENTUM):
        raise ValueError(
            "kfac: without a learning rate the quadratic model chooses the share of the last "
            f"step; give momentum=0 to leave it out, or nothing, but not momentum={momentum}."
        )


def _differs(given: chex.Numeric, default: float) -> bool:
    """Whether a setting is known to be another than its default."""
    return is_number(given) and given != default


def _check_no_settings_of_the_model(is_given: dict[str, bool]) -> None:
    """Raises `ValueError` for what would have no effect at a learning rate."""
    for name, given in is_given.items():
        if given:
            raise ValueError(
                f"kfac: `{name}` is a setting of the quadratic model, which chooses the steps with "
                "learning_rate=None; at a learning rate it has no effect."
            )
