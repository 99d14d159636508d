"""How many gradients an update evaluated beyond the one that it was given."""

import jax
import jax.numpy as jnp
import optax

# `optax.ZoomLinesearchInfo` keeps the number of steps of the last line search under this name. Each
# of them evaluates the value and the gradient once.
_LINESEARCH_STEPS = "num_linesearch_steps"


def linesearch_gradients(state: optax.OptState) -> jax.Array:
    """Gradients that optax's zoom line search evaluated in the last update.

    Args:
        state: The state of an optimizer after the update.

    Returns:
        A 32-bit integer, 0 where the optimizer has no line search.
    """
    found = optax.tree_utils.tree_get_all_with_path(state, _LINESEARCH_STEPS)
    return sum((jnp.asarray(steps, jnp.int32) for _, steps in found), jnp.zeros((), jnp.int32))


def stores_gradient(state: optax.OptState) -> bool:
    """Whether a state keeps the value and the gradient for `optax.value_and_grad_from_state`."""
    return all(optax.tree_utils.tree_get(state, name) is not None for name in ("value", "grad"))
