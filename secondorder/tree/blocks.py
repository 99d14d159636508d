r"""Vectors that are pytrees, cut into blocks of leaves.

A block-diagonal matrix acts on each block of the parameters by itself. What a method computes for
all blocks at once is one vector as usual, and one scalar per block: an array of length ``L``.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder.tree.vectors import accumulation_dtype, combine, is_function, project

# How a user says what the blocks are; see `label_blocks`.
BlockSetting: TypeAlias = Callable[[str], Hashable] | chex.ArrayTree | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Blocks:
    """A partition of the leaves of a pytree; static, and without leaves in a pytree of results.

    Attributes:
      names: What each block is called.
      labels: For each leaf, in the order of `jax.tree.leaves`, the index of its block.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def leaves_of(self, block: int) -> tuple[int, ...]:
        """The indices of the leaves of a block."""
        return tuple(leaf for leaf, label in enumerate(self.labels) if label == block)


def one_block(params: chex.ArrayTree) -> Blocks:
    """All leaves in one block.

    Args:
      params: A pytree of arrays.

    Returns:
      The partition.

    Example:
      >>> one_block({"a": jnp.ones(2), "b": jnp.ones(3)}).labels
      (0, 0)
    """
    return Blocks(("all",), (0,) * len(jax.tree.leaves(params)))


def label_blocks(setting: BlockSetting, params: chex.ArrayTree) -> Blocks:
    """Cuts the parameters into blocks.

    Args:
      setting: None: leaves that have the same parent are a block, such as the kernel and the
        bias of a layer. A callable: from the path of a leaf, such as ``"encoder/0/kernel"``, to the
        label of its block. A pytree of labels: a tree prefix of the parameters, as
        `optax.partition` takes.
      params: The parameters, arrays or abstract.

    Returns:
      The partition, its blocks in the order of their first leaves.

    Raises:
      ValueError: If a pytree of labels is not a prefix of the parameters.

    Example:
      >>> params = {"enc": {"w": jnp.ones(2), "b": jnp.ones(1)}, "dec": {"w": jnp.ones(2)}}
      >>> label_blocks(None, params).names
      ('dec', 'enc')
      >>> label_blocks(lambda path: path[-1], params).names
      ('w', 'b')
    """
    paths = leaf_paths(params)
    if setting is None:
        given: list[Any] = [path.rpartition("/")[0] or path or "(params)" for path in paths]
    elif is_function(setting):
        given = [setting(path) for path in paths]
    else:
        given = _broadcast_labels(setting, params)
    numbers: dict[Hashable, int] = collections.defaultdict(lambda: len(numbers))
    labels = tuple(numbers[label] for label in given)
    return Blocks(tuple(map(str, numbers)), labels)


def leaf_paths(params: chex.ArrayTree) -> list[str]:
    """The paths of the leaves of a pytree, their keys joined by slashes.

    Flax's NNX wraps each array in a variable in some calls and not in others, so that the last key
    of it, an attribute ``value``, is left out.

    Args:
      params: A pytree.

    Returns:
      One path per leaf, in the order of `jax.tree.leaves`; empty for a pytree that is a leaf.

    Example:
      >>> leaf_paths({"enc": {"w": 1.0, "b": 0.0}})
      ['enc/b', 'enc/w']
    """
    wrapper = jax.tree_util.GetAttrKey("value")
    return [
        jax.tree_util.keystr(
            path[:-1] if path[-1:] == (wrapper,) else path, simple=True, separator="/"
        )
        for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]


def _broadcast_labels(labels: chex.ArrayTree, params: chex.ArrayTree) -> list[Any]:
    """The label of each leaf, from a tree prefix."""
    try:
        full = jax.tree.map(lambda label, part: jax.tree.map(lambda _: label, part), labels, params)
    except ValueError as error:
        raise ValueError(
            "The labels of the blocks must be a pytree like the parameters, or a prefix of it, "
            f"with a string or a number at each leaf: {error}"
        ) from error
    return jax.tree.leaves(full)


def block_inner(blocks: Blocks, x: chex.ArrayTree, y: chex.ArrayTree) -> jax.Array:
    r"""The inner products :math:`x_b^\top y_b` of all blocks.

    Args:
      blocks: The partition, of ``L`` blocks.
      x: A pytree of arrays.
      y: A pytree like it.

    Returns:
      Array ``(L,)``, float32 or wider.

    Example:
      >>> blocks = Blocks(("a", "b"), (0, 1))
      >>> block_inner(blocks, (jnp.ones(2), jnp.ones(3)), (jnp.ones(2), jnp.ones(3))).tolist()
      [2.0, 3.0]
    """
    dtype = accumulation_dtype((x, y))
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    sums: list[Any] = [jnp.zeros((), dtype)] * len(blocks)
    for label, (a, b) in zip(blocks.labels, pairs, strict=True):
        sums[label] = sums[label] + jnp.sum(a.astype(dtype) * b.astype(dtype))
    return jnp.stack(sums)


def block_scale(blocks: Blocks, coefficients: jax.Array, x: chex.ArrayTree) -> chex.ArrayTree:
    """Multiplies each block by a number of its own.

    Args:
      blocks: The partition, of ``L`` blocks.
      coefficients: Array ``(L,)``.
      x: A pytree of arrays.

    Returns:
      A pytree like ``x``.

    Example:
      >>> block_scale(Blocks(("a", "b"), (0, 1)), jnp.array([2.0, 3.0]), (jnp.ones(1), jnp.ones(1)))
      (Array([2.], dtype=float32), Array([3.], dtype=float32))
    """
    leaves, structure = jax.tree.flatten(x)
    scaled = [
        coefficients[label].astype(leaf.dtype) * leaf
        for label, leaf in zip(blocks.labels, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, scaled)


def embedding(
    tree: chex.ArrayTree, indices: Sequence[int]
) -> Callable[[list[jax.Array]], chex.ArrayTree]:
    """The map from a few leaves of a pytree to all of it, with the others held.

    Args:
      tree: The point, a pytree of arrays.
      indices: Positions of the leaves in ``jax.tree.leaves(tree)``.

    Returns:
      A function of the list of these leaves.

    Example:
      >>> embed = embedding({"a": 2, "b": 3}, [1])
      >>> embed([5])
      {'a': 2, 'b': 5}
    """
    leaves, structure = jax.tree.flatten(tree)

    def embed(part: list[jax.Array]) -> chex.ArrayTree:
        moved = dict(zip(indices, part, strict=True))
        point = [moved.get(index, leaf) for index, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, point)

    return embed


def block_choose(
    blocks: Blocks, chosen: jax.Array, x: chex.ArrayTree, y: chex.ArrayTree
) -> chex.ArrayTree:
    """The blocks of one vector where chosen, those of another elsewhere.

    Args:
      blocks: The partition, of ``L`` blocks.
      chosen: Booleans ``(L,)``.
      x: A pytree of arrays.
      y: A pytree like it.

    Returns:
      A pytree in the dtypes of ``y``.

    Example:
      >>> blocks = Blocks(("a", "b"), (0, 1))
      >>> x, y = (jnp.ones(1), jnp.ones(1)), (jnp.zeros(1), jnp.zeros(1))
      >>> block_choose(blocks, jnp.array([True, False]), x, y)
      (Array([1.], dtype=float32), Array([0.], dtype=float32))
    """
    others, structure = jax.tree.flatten(y)
    leaves = zip(blocks.labels, jax.tree.leaves(x), others, strict=True)
    picked = [jnp.where(chosen[label], a, b).astype(b.dtype) for label, a, b in leaves]
    return jax.tree.unflatten(structure, picked)


def block_project(blocks: Blocks, stack: chex.ArrayTree, vector: chex.ArrayTree) -> jax.Array:
    r"""The products of all vectors of a stack with one other, block by block.

    Args:
      blocks: The partition, of ``L`` blocks.
      stack: The vectors, a pytree of arrays ``(k, *shape)``.
      vector: A pytree of arrays ``(*shape)``.

    Returns:
      Array ``(L, k)``, float32 or wider.

    Example:
      >>> stack = jnp.eye(2), jnp.ones((2, 1))
      >>> block_project(Blocks(("a", "b"), (0, 1)), stack, (jnp.arange(2.0), jnp.ones(1))).tolist()
      [[0.0, 1.0], [1.0, 1.0]]
    """
    rows, leaves = jax.tree.leaves(stack), jax.tree.leaves(vector)
    parts = [blocks.leaves_of(block) for block in range(len(blocks))]
    products = [project([rows[i] for i in part], [[leaves[i] for i in part]]) for part in parts]
    return jnp.stack([product[:, 0] for product in products])


def block_combine(blocks: Blocks, coefficients: jax.Array, stack: chex.ArrayTree) -> chex.ArrayTree:
    """A linear combination of the vectors of a stack in each block.

    Args:
      blocks: The partition, of ``L`` blocks.
      coefficients: Array ``(L, k)``.
      stack: The vectors, a pytree of arrays ``(k, *shape)``.

    Returns:
      One vector, a pytree of arrays ``(*shape)``, float32 or wider.

    Example:
      >>> stack = jnp.eye(2), jnp.ones((2, 1))
      >>> block_combine(Blocks(("a", "b"), (0, 1)), jnp.array([[2.0, 3.0], [4.0, 5.0]]), stack)
      (Array([2., 3.], dtype=float32), Array([9.], dtype=float32))
    """
    leaves, structure = jax.tree.flatten(stack)
    combined = [
        combine(coefficients[label], rows)
        for label, rows in zip(blocks.labels, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, combined)
