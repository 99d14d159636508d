"""Methods that are put together from the package's parts, to measure what a part does."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import secondorder as so
from secondorder.operators import gauss_newton_forms
from secondorder.tree import inner as inner_product


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


class LayerRatesState(NamedTuple):
    """State of `with_layer_rates`.

    Attributes:
        direction: State of the transform that gives the direction.
        steps: Taken so far.
        rates: Of the layers and of the leaves in none ``(P,)``.
    """

    direction: Any
    steps: jax.Array
    rates: jax.Array


def with_layer_rates(
    direction: optax.GradientTransformation, layers: so.Layers, every: int, weight: float
) -> optax.GradientTransformationExtraArgs:
    """A direction whose layers have rates of their own, from the quadratic model, up to a factor.

    They minimize the damped model of the batch on the span of the layers' parts, with the curvature
    of each part counted ``1 + weight`` times, and are cut off at zero. Layers whose parts change
    the outputs alike share what a single rate would have them do several times.

    Args:
        direction: The transform that gives the direction.
        layers: The layers.
        every: Steps from one choice of rates to the next.
        weight: With 0 the rates follow the noise of their batch, and the last layer's gain.

    Returns:
        A transform that needs what `secondorder.scale_by_quadratic_model` passes on.
    """
    inner = optax.with_extra_args_support(direction)
    groups = [*(tuple(layer.leaves) for layer in layers.layers)]
    groups += [(index,) for index, _ in layers.unassigned]

    def parts(tree: chex.ArrayTree) -> tuple[chex.ArrayTree, ...]:
        leaves, structure = jax.tree.flatten(tree)
        kept = ([x if i in g else jnp.zeros_like(x) for i, x in enumerate(leaves)] for g in groups)
        return tuple(jax.tree.unflatten(structure, part) for part in kept)

    def init(params: chex.ArrayTree) -> LayerRatesState:
        rates = jnp.ones((len(groups),))
        return LayerRatesState(inner.init(params), jnp.zeros((), jnp.int32), rates)

    def update(
        updates: chex.ArrayTree,
        state: LayerRatesState,
        params: chex.ArrayTree,
        *,
        value_fn: Any,
        curvature_fn: Any = None,
        damping: chex.Numeric,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, LayerRatesState]:
        vector, direction_state = inner.update(
            updates,
            state.direction,
            params,
            value_fn=value_fn,
            curvature_fn=curvature_fn,
            damping=damping,
            **extra_args,
        )

        def choose(_: jax.Array) -> jax.Array:
            pieces = parts(vector)
            objective = value_fn if curvature_fn is None else curvature_fn
            curvature = gauss_newton_forms(objective, params)(pieces)
            slopes = jnp.stack([inner_product(updates, piece) for piece in pieces])
            squares = jnp.stack([inner_product(piece, piece) for piece in pieces])
            matrix = curvature + damping * jnp.diag(squares)
            scale = jax.lax.rsqrt(jnp.diag(matrix))
            matrix = matrix * jnp.outer(scale, scale) + weight * jnp.eye(len(groups))
            rates = jnp.maximum(scale * jnp.linalg.solve(matrix, scale * slopes), 0)
            return rates / jnp.sqrt(jnp.mean(rates**2))

        rates = jax.lax.cond(state.steps % every == 0, choose, lambda rates: rates, state.rates)
        leaves, structure = jax.tree.flatten(vector)
        of_leaf = {index: k for k, group in enumerate(groups) for index in group}
        scaled = [rates[of_leaf[i]] * leaf for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, scaled), LayerRatesState(
            direction_state, state.steps + 1, rates
        )

    return optax.GradientTransformationExtraArgs(init, update)


def layerwise_kfac(
    layers: so.Layers,
    rates_every: int = 5,
    rates_weight: float = 1.0,
    update_every: int = 1,
    inverse_every: int = 10,
    moment_decay: float = 0.95,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adaptive K-FAC with a rate for each layer.

    Args:
        layers: The layers.
        rates_every: Steps from one choice of rates to the next.
        rates_weight: See `with_layer_rates`.
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
    direction = with_layer_rates(kfac, layers, rates_every, rates_weight)
    return so.scale_by_quadratic_model(direction, **settings)


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
