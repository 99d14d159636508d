"""What methods share that work layer by layer: their layers, the other parameters, aliases."""

import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import optax

from secondorder.layers.layer import Layers
from secondorder.sharding import shard_like


def check_layers(layers: Layers, strict: bool) -> None:
    """Raises unless layers were found, and with ``strict`` unless they hold every parameter whole.

    Args:
      layers: The argument as the factory received it.
      strict: Whether parameters in no layer, and uses that are no part of one, are errors.

    Raises:
      TypeError: If ``layers`` does not come from `find_layers`.
      ValueError: If a parameter is in no layer, or a use of a weight sees it as another matrix.
    """
    if not isinstance(layers, Layers):
        raise TypeError(
            f"`layers` must come from so.find_layers(objective, params), got {type(layers)}."
        )
    if strict and layers.unassigned:
        raise ValueError(
            "strict=True, but these parameters are in no layer:\n  "
            + "\n  ".join(f"{layers.leaves[i].path}: {reason}" for i, reason in layers.unassigned)
        )
    tied = [
        layers.leaves[layer.weight].path
        for layer, usage in zip(layers.layers, layers.usages, strict=True)
        if usage.tied
    ]
    if strict and tied:
        raise ValueError(
            "strict=True, but these weights are also used as another matrix, such as the "
            f"transposed one, which has no part in their factors:\n  {', '.join(tied)}\nLeave "
            "them to the fallback with so.find_layers(..., exclude=...), or do without strict."
        )


def merge_directions(
    direction: dict[int, jax.Array], rest: chex.ArrayTree, params: chex.ArrayTree
) -> chex.ArrayTree:
    """Joins the directions of layers and of the rest, typed and sharded like the parameters.

    Args:
      direction: By leaf, that of each parameter in a layer.
      rest: That of the others, a pytree like the parameters.
      params: The parameters.

    Returns:
      A pytree like the parameters.
    """
    leaves, structure = jax.tree.flatten(params)
    merged = [
        shard_like(direction.get(i, other).astype(leaf.dtype), leaf)
        for i, (leaf, other) in enumerate(zip(leaves, jax.tree.leaves(rest), strict=True))
    ]
    return jax.tree.unflatten(structure, merged)


def on_unassigned(
    fallback: optax.GradientTransformation | None, layers: Layers
) -> optax.GradientTransformationExtraArgs:
    """The fallback on the parameters in no layer; other updates pass through it.

    Args:
      fallback: A transform, or None for the identity.
      layers: The layers.

    Returns:
      A transform of all parameters.
    """
    if fallback is None:
        return optax.with_extra_args_support(optax.identity())
    unassigned = {leaf for leaf, _ in layers.unassigned}

    def mask(tree: chex.ArrayTree) -> chex.ArrayTree:
        structure = jax.tree.structure(tree)
        return jax.tree.unflatten(
            structure, [i in unassigned for i in range(len(jax.tree.leaves(tree)))]
        )

    return optax.with_extra_args_support(optax.masked(fallback, mask))


def with_settings_of(
    direction: Callable[..., Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Puts the hyperparameters of a factory into the signature of an alias that has ``**``.

    `optax.inject_hyperparams` reads there which hyperparameters a factory has.

    Args:
      direction: The factory that the alias calls. Arguments that both have are the alias' own.

    Returns:
      A decorator of the alias.
    """

    def decorate(alias: Callable[..., Any]) -> Callable[..., Any]:
        own = list(inspect.signature(alias).parameters.values())[:-1]
        names = {parameter.name for parameter in own}
        given = inspect.signature(direction).parameters
        more = [parameter for name, parameter in given.items() if name not in names]
        alias.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
        return alias

    return decorate
