"""Blocks of parameters, as users ask for them: by layers or by labels."""

import collections

import chex
import jax

from secondorder.layers.layer import Layers, check_leaves
from secondorder.tree import Blocks, BlockSetting, label_blocks


def parameter_blocks(setting: Layers | BlockSetting, params: chex.ArrayTree) -> Blocks:
    """Cuts the parameters into blocks.

    Args:
      setting: Layers: the weight and the bias of each are a block, and every leaf in no layer. Else
        what `label_blocks` takes.
      params: The parameters, arrays or abstract.

    Returns:
      The partition. A layer is called what its weight is, or its parent if that has no other.

    Raises:
      ValueError: If the layers are of other parameters, or labels no prefix of the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import secondorder as so
      >>> params = {"scale": jnp.ones(()), "dense": {"bias": jnp.ones(2), "kernel": jnp.eye(2)}}
      >>> def loss(p):
      ...     z = jnp.ones((4, 2)) @ p["dense"]["kernel"] + p["dense"]["bias"]
      ...     return jnp.sum(p["scale"] * z)
      >>> parameter_blocks(so.find_layers(loss, params), params)
      Blocks(names=('dense', 'scale'), labels=(0, 0, 1))
    """
    if not isinstance(setting, Layers):
        return label_blocks(setting, params)
    if jax.tree.leaves(params):  # There are none in the placeholder of `optax.tree.map_params`.
        check_leaves(setting, params)
    return _layer_blocks(setting)


def _layer_blocks(layers: Layers) -> Blocks:
    """Weight and bias of a layer are a block, and every leaf in no layer."""
    labels = [leaf.path for leaf in layers.leaves]
    parents = collections.Counter(_parent(labels[layer.weight]) for layer in layers.layers)
    for layer in layers.layers:
        weight = labels[layer.weight]
        alone = parents[_parent(weight)] == 1 and _parent(weight)
        for leaf in layer.leaves:
            labels[leaf] = alone or weight
    names = tuple(dict.fromkeys(labels))
    return Blocks(names, tuple(names.index(label) for label in labels))


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
