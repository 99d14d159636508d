"""Layers as blocks of parameters."""

import collections

import chex
import jax

from secondorder.layers.layer import Layers
from secondorder.tree import Blocks, label_blocks


def layer_blocks(layers: Layers, params: chex.ArrayTree) -> Blocks:
    """Weight and bias of a layer are a block, and every leaf in no layer.

    Args:
      layers: The layers of the model.
      params: Its parameters, arrays or abstract.

    Returns:
      The partition. A layer is called what its weight is, or its parent if that has no other.

    Raises:
      ValueError: If the parameters are others than those of the layers.

    Example:
      >>> import jax.numpy as jnp
      >>> import secondorder as so
      >>> params = {"scale": jnp.ones(()), "dense": {"bias": jnp.ones(2), "kernel": jnp.eye(2)}}
      >>> def loss(p):
      ...     z = jnp.ones((4, 2)) @ p["dense"]["kernel"] + p["dense"]["bias"]
      ...     return jnp.sum(p["scale"] * z)
      >>> layer_blocks(so.find_layers(loss, params), params)
      Blocks(names=('dense', 'scale'), labels=(0, 0, 1))
    """
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(params))
    if shapes != tuple(leaf.shape for leaf in layers.leaves):
        raise ValueError(
            "`blocks` are layers of other parameters; call so.find_layers(objective, params) with "
            "these."
        )
    labels = [leaf.path for leaf in layers.leaves]
    parents = collections.Counter(_parent(labels[layer.weight]) for layer in layers.layers)
    for layer in layers.layers:
        weight = labels[layer.weight]
        alone = parents[_parent(weight)] == 1 and _parent(weight)
        for leaf in layer.leaves:
            labels[leaf] = alone or weight
    return label_blocks(jax.tree.unflatten(jax.tree.structure(params), labels), params)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
