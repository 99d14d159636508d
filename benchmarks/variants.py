"""Methods that are put together from the package's parts, to measure what a part does."""

from typing import Any

import chex
import jax
import optax

import secondorder as so


def modeled_kbfgs(
    layers: so.Layers,
    memory_size: int | None = None,
    update_every: int = 1,
    momentum: float = 0.0,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """K-BFGS with steps and damping from the quadratic model.

    Args:
        layers: The layers.
        memory_size: Pairs of K-BFGS(L); None for K-BFGS.
        update_every: Steps from one refresh to the next.
        momentum: Of the direction.
        **settings: Those of the quadratic model.

    Returns:
        The optimizer.
    """
    direction = so.scale_by_kbfgs(
        layers, memory_size=memory_size, update_every=update_every, momentum=momentum
    )
    return so.scale_by_quadratic_model(direction, **settings)


def averaged_kfac(
    layers: so.Layers,
    average: float = 0.8,
    update_every: int = 1,
    inverse_every: int = 10,
    moment_decay: float = 0.95,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adaptive K-FAC with an average of directions in place of each batch's own.

    Args:
        layers: The layers.
        average: Decay of the average of directions.
        update_every: Steps from one refresh of the factors to the next.
        inverse_every: Of their inverses.
        moment_decay: Decay of the averages of factors.
        **settings: Those of the quadratic model.

    Returns:
        The optimizer.
    """
    kfac = so.scale_by_kfac(
        layers, update_every=update_every, inverse_every=inverse_every, moment_decay=moment_decay
    )
    return so.scale_by_quadratic_model(optax.chain(kfac, optax.ema(average)), **settings)


def warm_kbfgs(
    learning_rate: optax.ScalarOrSchedule,
    layers: so.Layers,
    *,
    damping: chex.Numeric = 0.3,
    weight_decay: chex.Numeric = 0.0,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """K-BFGS whose output factors start as K-FAC's inverses of the first batch, not as identities.

    Args:
        learning_rate: Step size.
        layers: The layers.
        damping: Of both.
        weight_decay: In the gradient.
        **settings: Those of K-BFGS.

    Returns:
        The optimizer.
    """
    kbfgs = so.scale_by_kbfgs(layers, damping=damping, **settings)
    kfac = so.scale_by_kfac(layers, damping=damping)

    def update(
        updates: chex.ArrayTree, state: Any, params: chex.ArrayTree, **extra_args: Any
    ) -> tuple[chex.ArrayTree, Any]:
        def start(state: Any) -> Any:
            _, found = kfac.update(updates, kfac.init(params), params, **extra_args)
            factors = state.factors._replace(output_inverses=found.inverses.outputs)
            return state._replace(factors=factors)

        started = jax.lax.cond(state.count == 0, start, lambda state: state, state)
        result: tuple[chex.ArrayTree, Any] = kbfgs.update(updates, started, params, **extra_args)
        return result

    direction = optax.GradientTransformationExtraArgs(kbfgs.init, update)
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, direction, optax.scale_by_learning_rate(learning_rate))
