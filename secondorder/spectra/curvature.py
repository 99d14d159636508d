"""The matrix that a user asks for, and its blocks; checks of the arguments."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder import operators
from secondorder.checks import check_choice, check_static_count
from secondorder.layers import Layers
from secondorder.layers.blocks import parameter_blocks
from secondorder.objective import check_has_arrays, check_split, check_value_fn
from secondorder.operators import LinearOperator
from secondorder.tree import Blocks, Distribution, one_block, random_vector

Matrix: TypeAlias = Literal["hessian", "gauss_newton"]
# How a user says what the blocks are; see `make_curvature`.
BlockChoice: TypeAlias = (
    Literal["layers"] | Layers | Blocks | Callable[[str], Hashable] | chex.ArrayTree | None
)


@dataclasses.dataclass(frozen=True)
class Curvature:
    """A curvature matrix at a point, or its diagonal blocks.

    Attributes:
      operator: Its products; block diagonal if there are several blocks.
      params: The point.
      blocks: The partition, of ``L`` blocks; of one if the matrix is taken as a whole.
      is_whole: Whether it is, so that results have no axis for blocks.
    """

    operator: LinearOperator
    params: chex.ArrayTree
    blocks: Blocks
    is_whole: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of parameters of each block."""
        leaves = jax.tree.leaves(self.params)
        parts = (self.blocks.leaves_of(block) for block in range(len(self.blocks)))
        return tuple(sum(leaves[index].size for index in part) for part in parts)

    @property
    def named_blocks(self) -> Blocks | None:
        """The partition that results carry; None for the matrix as a whole."""
        return None if self.is_whole else self.blocks

    def draw(self, key: chex.PRNGKey, distribution: Distribution) -> chex.ArrayTree:
        """A vector of independent random numbers."""
        return random_vector(distribution, key, self.params)

    def squeeze(self, result: jax.Array) -> jax.Array:
        """Drops the axis for blocks ``(L, ...)`` if the matrix is taken as a whole."""
        return result[0] if self.is_whole else result


def make_curvature(
    caller: str, objective: Any, params: chex.ArrayTree, matrix: Matrix, blocks: BlockChoice
) -> Curvature:
    """The matrix, and its blocks.

    Args:
      caller: Name of the public function, for messages.
      objective: A function from parameters to a scalar, an `Objective` or `Microbatches`.
      params: The point, a pytree of real floating-point arrays.
      matrix: ``"hessian"`` or ``"gauss_newton"``.
      blocks: None: the whole matrix. ``"layers"``: leaves that have the same parent are a block.
        `Layers`: weight and bias of a layer are, and every other leaf. Otherwise a partition, or
        what `label_blocks` takes: a function from the path of a leaf to a label, or labels.

    Returns:
      The matrix.

    Raises:
      TypeError: If a leaf is not real and floating-point, or the objective is not split for
        ``"gauss_newton"``.
      ValueError: If there are no parameters, ``matrix`` is none of the two, or the blocks do not
        fit the parameters.

    Example:
      >>> curvature = make_curvature("f", lambda p: jnp.sum(p**2), jnp.ones(3), "hessian", None)
      >>> curvature.operator(jnp.ones(3)).tolist(), curvature.sizes
      ([2.0, 2.0, 2.0], (3,))
    """
    check_choice("matrix", matrix, ("hessian", "gauss_newton"))
    check_has_arrays(params, caller)
    _check_real(params, caller)
    if matrix == "hessian":
        check_value_fn(objective, caller, "objective")
    else:
        check_split(objective, caller, "objective")
    if blocks is None:
        make = operators.hessian if matrix == "hessian" else operators.gauss_newton
        return Curvature(make(objective, params), params, one_block(params), is_whole=True)
    partition = _partition(blocks, params)
    make_blocks = operators.block_hessian if matrix == "hessian" else operators.block_gauss_newton
    operator = make_blocks(objective, params, partition)
    return Curvature(operator, params, partition, is_whole=False)


def check_key(key: Any, caller: str) -> None:
    """Raises unless the argument is a PRNG key.

    Args:
      key: The argument.
      caller: Name of the public function, for the message.

    Raises:
      TypeError: If it is anything else.

    Example:
      >>> check_key(0, "curvature_trace")
      Traceback (most recent call last):
      TypeError: curvature_trace: `key` must be a PRNG key such as jax.random.key(0), got 0.
    """
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_raw = dtype == jnp.uint32 and key.ndim == 1
    if not (is_raw or (is_typed and key.ndim == 0)):
        raise TypeError(
            f"{caller}: `key` must be a PRNG key such as jax.random.key(0), got {key!r}."
        )


def check_steps(name: str, steps: int | None, default: int, curvature: Curvature) -> int:
    """The number of Lanczos vectors, at most that of the parameters of the largest block.

    Args:
      name: Name of the argument, for the message.
      steps: As it was given, or None.
      default: What None means, where there are as many parameters.
      curvature: The matrix.

    Returns:
      The number.

    Raises:
      ValueError: If it is not a positive integer, or larger than the number of parameters.
    """
    most = max(curvature.sizes)
    if steps is None:
        return min(default, most)
    check_static_count(name, steps)
    if steps > most:
        where = "there are" if curvature.is_whole else "the largest block has"
        raise ValueError(f"`{name}` must be at most {most}, as {where} {most} parameters: {steps}.")
    return steps


def _check_real(params: chex.ArrayTree, caller: str) -> None:
    """Raises unless all parameters are real floating-point numbers."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
            raise TypeError(
                f"{caller}: parameters must be real floating-point numbers, and {name!r} is "
                f"{dtype}; split complex numbers into real and imaginary parts, and close over "
                "what is not trained."
            )


def _partition(blocks: Any, params: chex.ArrayTree) -> Blocks:
    """The partition of the parameters that a user asks for."""
    if isinstance(blocks, str) and blocks == "layers":
        blocks = None  # what `label_blocks` takes for leaves with the same parent
    if not isinstance(blocks, Blocks):
        return parameter_blocks(blocks, params)
    count = len(jax.tree.leaves(params))
    if len(blocks.labels) != count:
        raise ValueError(
            f"`blocks` partitions {len(blocks.labels)} arrays, and there are {count} in `params`."
        )
    return blocks
