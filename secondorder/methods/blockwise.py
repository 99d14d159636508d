"""What methods share that keep Kronecker factors of the gradient's own second moments.

Shampoo and SOAP know no layers: every parameter is a tensor, which is cut into blocks, and every
axis of a block has the second moment of the gradient unfolded along it.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder import factors as kf
from secondorder import tree as vectors
from secondorder.checks import (
    check_flag,
    check_static_count,
)
from secondorder.methods.layerwise import merge_directions
from secondorder.objective import all_finite
from secondorder.sharding import replicate, shard_like
from secondorder.spread import Devices, devices_of
from secondorder.tree import BlockGroup, BlockLayout

# For each group of equal blocks, for each axis that is treated, matrices (stack, n, n).
AxisMatrices: TypeAlias = tuple[tuple[jax.Array, ...], ...]


@dataclasses.dataclass(frozen=True)
class Blocking:
    """How parameters are cut, and which axes are preconditioned; hyperparameters.

    Attributes:
      block_size: Longest axis of a block.
      merge_dims: Whether short axes are merged.
      one_sided: Whether only the shortest axis of a parameter is treated.
      precondition_vectors: Whether parameters with one axis are treated.
      spread_over: Names of axes of the mesh that share the work, or None for all.
    """

    block_size: int
    merge_dims: bool
    one_sided: bool
    precondition_vectors: bool
    spread_over: Sequence[str] | None

    def check(self) -> None:
        """Raises `ValueError` for hyperparameters out of range."""
        check_static_count("block_size", self.block_size)
        check_flag("merge_dims", self.merge_dims)
        check_flag("one_sided", self.one_sided)
        check_flag("precondition_vectors", self.precondition_vectors)

    def axes_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes that are preconditioned of a parameter with merged axes."""
        if len(shape) == 1 and not self.precondition_vectors:
            return ()
        return (shape.index(min(shape)),) if self.one_sided else tuple(range(len(shape)))

    def blocks_of(self, params: chex.ArrayTree) -> "Blocks":
        """The blocks of some parameters, and who shares the work on them.

        Args:
          params: The parameters, or their tracers.

        Returns:
          The blocks.
        """
        shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
        layout = vectors.arrange_blocks(
            shapes, self.block_size, self.axes_of, merge=self.merge_dims
        )
        return Blocks(layout, devices_of(params, self.spread_over))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of parameters on devices.

    Attributes:
      layout: How the parameters are cut.
      devices: What shares the work.
    """

    layout: BlockLayout
    devices: Devices

    def cut(self, vector: chex.ArrayTree) -> list[jax.Array]:
        """The stacks of blocks of a vector like the parameters."""
        return self.layout.cut([replicate(leaf) for leaf in jax.tree.leaves(vector)])

    def join(self, stacks: Sequence[jax.Array], like: chex.ArrayTree) -> chex.ArrayTree:
        """The vector of some blocks, sharded and typed as another is."""
        joined = self.layout.join([replicate(stack) for stack in stacks])
        found = {leaf: tensor for leaf, tensor in enumerate(joined) if tensor is not None}
        return merge_directions(found, like, like)

    def init(self, make: Callable[[BlockGroup], Any]) -> Any:
        """State of all groups, kept as states are.

        The placeholder for parameters that `optax.tree.map_params` passes has no groups. One leaf,
        which is no parameter, stands for all of their state.

        Args:
          make: Maps a group to its arrays ``(stack, ...)``.

        Returns:
          A tuple of them.
        """
        if not self.layout.shapes:
            return jnp.zeros(())
        return tuple(jax.tree.map(self.devices.keep, make(g)) for g in self.layout.groups)

    def zeros(self, dtype: Any) -> AxisMatrices:
        """Zero matrices for all axes that are treated."""
        return self._matrices(lambda stack, n: jnp.zeros((stack, n, n), dtype))

    def identities(self, dtype: Any) -> AxisMatrices:
        """Identity matrices for all axes that are treated."""
        return self._matrices(lambda stack, n: jnp.tile(jnp.eye(n, dtype=dtype), (stack, 1, 1)))

    def _matrices(self, make: Callable[[int, int], jax.Array]) -> AxisMatrices:
        made: AxisMatrices = self.init(
            lambda group: tuple(make(group.stack, group.shape[axis]) for axis in group.axes)
        )
        return made

    def moments(self, stacks: Sequence[jax.Array]) -> AxisMatrices:
        """The second moments of blocks along every axis that is treated.

        Args:
          stacks: The blocks of a gradient.

        Returns:
          The moments.
        """

        def moments_along(axes: tuple[int, ...]) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
            return lambda stack: tuple(kf.mode_moment(stack, axis) for axis in axes)

        return tuple(
            jax.tree.map(self.devices.keep, self.devices.spread(moments_along(group.axes), stack))
            if group.axes
            else ()
            for group, stack in zip(self.layout.groups, stacks, strict=True)
        )

    def multiply(
        self, matrices: AxisMatrices, stacks: Sequence[jax.Array], *, transpose: bool = True
    ) -> list[jax.Array]:
        """Products of blocks with the matrices of all their axes.

        Args:
          matrices: For each group and axis.
          stacks: The blocks.
          transpose: Whether the matrices are transposed, as those that rotate into a basis are.

        Returns:
          The products.
        """

        def product(axes: tuple[int, ...]) -> Callable[..., jax.Array]:
            def multiply(stack: jax.Array, *factors: jax.Array) -> jax.Array:
                for axis, factor in zip(axes, factors, strict=True):
                    factor = factor if transpose else jnp.swapaxes(factor, 1, 2)
                    stack = kf.mode_product(stack, factor, axis)
                return stack

            return multiply

        return [
            self.devices.spread(product(group.axes), stack, *factors) if factors else stack
            for group, factors, stack in zip(self.layout.groups, matrices, stacks, strict=True)
        ]

    def map_by_size(
        self,
        function: Callable[..., tuple[jax.Array, ...]],
        *matrices: AxisMatrices,
        results: int = 2,
        kind: Callable[[BlockGroup], Hashable] = lambda group: None,
    ) -> tuple[Any, ...]:
        """Applies a function to all matrices, in one call those of one size and kind.

        Args:
          function: Maps a kind and stacks ``(S, n, n)`` to some arrays ``(S, ...)``.
          *matrices: Its arguments.
          results: How many arrays; there may be no matrix to see it from.
          kind: What beside the size must be equal.

        Returns:
          For each result of the function one of the form of the arguments, kept as states are.
        """
        flat = [[replicate(matrix) for group in side for matrix in group] for side in matrices]
        kinds = [kind(group) for group in self.layout.groups for _ in group.axes]
        found: dict[int, tuple[jax.Array, ...]] = {}
        for one in dict.fromkeys(kinds):
            members = [i for i, other in enumerate(kinds) if other == one]
            alike = functools.partial(function, one)

            def spread(*stacks: jax.Array, alike: Any = alike) -> tuple[jax.Array, ...]:
                return tuple(replicate(array) for array in self.devices.spread(alike, *stacks))

            outputs = kf.map_by_size(spread, *([side[i] for i in members] for side in flat))
            found.update(zip(members, outputs, strict=True))
        return tuple(
            self._by_axis([self.devices.keep(found[i][k]) for i in range(len(kinds))])
            for k in range(results)
        )

    def _by_axis(self, flat: Sequence[jax.Array]) -> AxisMatrices:
        """Arrays in a row as arrays by group and axis."""
        left = iter(flat)
        return tuple(tuple(next(left) for _ in group.axes) for group in self.layout.groups)


def widen(updates: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
    """A gradient in the dtype of the state, float32 or wider, sharded as the parameters.

    Args:
      updates: The gradient.
      params: The parameters.

    Returns:
      A pytree like the parameters.
    """
    return cast_like(updates, vectors.zeros_vector(params))


def is_usable(gradient: chex.ArrayTree, value: Any) -> jax.Array:
    """Whether a gradient is finite and can be squared, and the value is finite if there is one.

    Args:
      gradient: Float32 or wider.
      value: The value of the objective, or None.

    Returns:
      A boolean scalar.
    """
    return all_finite((vectors.inner(gradient, gradient), value))


def count_failed(failed: AxisMatrices) -> jax.Array:
    """How many of all matrices failed.

    Args:
      failed: For each group and axis booleans ``(stack,)``.

    Returns:
      An int32 scalar.
    """
    counts = [jnp.sum(replicate(leaf), dtype=jnp.int32) for leaf in jax.tree.leaves(failed)]
    return sum(counts, start=jnp.zeros((), jnp.int32))


def cast_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> Any:
    """Arrays in the dtypes and shardings of others.

    Args:
      tree: A pytree of arrays.
      like: One of equal structure and shapes.

    Returns:
      The arrays of the first.
    """
    return jax.tree.map(lambda a, b: shard_like(a.astype(b.dtype), b), tree, like)


def if_due(
    count: jax.Array, every: int, refresh: Callable[..., Any], old: Any, *operands: Any
) -> Any:
    """Refreshes a part of the state in every so many steps.

    Args:
      count: Steps so far.
      every: The period; static, and 1 for no branch at all.
      refresh: Maps the old part and the operands to a new one.
      old: The part.
      *operands: What else it takes.

    Returns:
      The new part, or the old one.
    """
    if every == 1:
        return refresh(old, *operands)
    return jax.lax.cond(count % every == 0, refresh, lambda old, *_: old, old, *operands)


def check_schedule(update_every: int, precondition_every: int) -> None:
    """Raises `ValueError` unless both periods are Python integers of at least one.

    Args:
      update_every: Steps between refreshes of statistics.
      precondition_every: Steps between refreshes of what is made of them.
    """
    check_static_count("update_every", update_every)
    check_static_count("precondition_every", precondition_every)
