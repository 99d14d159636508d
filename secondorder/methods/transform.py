"""The transform that a method is, with a check of the state that it is given."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder.sharding import explicit_spec


class GuardedTransformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """A transform that leaves its own state whole, but for counters, if a batch is not finite."""


def spoiled_unless(usable: jax.Array, updates: chex.ArrayTree) -> chex.ArrayTree:
    """Tells a `GuardedTransformation` of a batch that something else in it is not finite.

    Args:
      usable: Whether all of the batch is finite.
      updates: What the transform gets, a pytree of arrays.

    Returns:
      The updates; if not usable, with NaN in the smallest leaf, which tells as much as all would
      and copies less.
    """
    leaves, structure = jax.tree.flatten(updates)
    least = min(range(len(leaves)), key=lambda index: leaves[index].size)
    leaves[least] = jnp.where(usable, leaves[least], jnp.full_like(leaves[least], jnp.nan))
    return jax.tree.unflatten(structure, leaves)


def make_transform(
    method: str, init: Callable[[Any], Any], update: Callable[..., Any]
) -> GuardedTransformation:
    """A transform whose update first asks whether the state is one of these parameters.

    Only shapes are asked for, while it is traced, and on an Explicit mesh shardings.

    Args:
      method: Name of the method, for messages.
      init: Makes the state.
      update: Maps updates, state, parameters and extra arguments to updates and state.

    Returns:
      The transform.
    """

    def checked(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        # What is no array, or missing, has an error of its own.
        if params is not None and all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(params)):
            check_state(method, state, jax.eval_shape(init, params))
        return update(updates, state, params, **extra_args)

    return GuardedTransformation(init, checked)


def check_state(method: str, state: chex.ArrayTree, like: chex.ArrayTree) -> None:
    """Raises unless a state is like the one that its parameters would start with.

    Args:
      method: Name of the method, for messages.
      state: The state that ``update`` received.
      like: The shapes of a new one.

    Raises:
      ValueError: If a leaf differs in shape, or on an Explicit mesh in sharding.
    """
    structure: Any = jax.tree.structure(state)
    if structure != jax.tree.structure(like):
        raise ValueError(
            f"{method}: the state is not one of these parameters and hyperparameters.\n"
            f"It is:        {structure}\nIt should be: {jax.tree.structure(like)}"
        )
    found, _ = jax.tree_util.tree_flatten_with_path(state)
    for (path, leaf), new in zip(found, jax.tree.leaves(like), strict=True):
        if jnp.shape(leaf) != new.shape:
            raise ValueError(
                f"{method}: state{jax.tree_util.keystr(path)} has the shape {jnp.shape(leaf)}, but "
                f"these parameters and hyperparameters make it {new.shape}. Was the state made or "
                "restored for others?"
            )
        specs = explicit_spec(leaf), explicit_spec(new)
        if None not in specs and specs[0] != specs[1]:
            raise ValueError(
                f"{method}: state{jax.tree_util.keystr(path)} is sharded as {specs[0]}, but these "
                f"parameters make it {specs[1]}. If their sharding was changed, move the state "
                "along: jax.device_put(state, so.state_shardings(tx, params))."
            )
