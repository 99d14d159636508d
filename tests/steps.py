"""The training step of the README, for objectives of any batch."""

from collections.abc import Callable
from typing import Any

import jax
import optax


def training_step(
    tx: optax.GradientTransformation, objective_on: Callable[[Any], Callable[[Any], jax.Array]]
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Maps parameters, state and batch to the next parameters and state."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        objective = objective_on(batch)
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    return step
