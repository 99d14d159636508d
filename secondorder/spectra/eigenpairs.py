"""The outermost eigenvalues of a curvature matrix, with their eigenvectors."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from secondorder.solvers import LanczosResult, RitzPairs, lanczos, ritz_pairs
from secondorder.spectra.curvature import (
    BlockChoice,
    Curvature,
    Matrix,
    check_key,
    check_steps,
    make_curvature,
)
from secondorder.tree import Blocks, block_combine, block_inner, block_scale


class Eigenpairs(NamedTuple):
    r"""Some eigenvalues with their eigenvectors; with ``blocks``, those of every block.

    Attributes:
      values: Eigenvalues ``(k,)``, ascending: the smallest ones, then the largest; ``(L, k)`` for
        ``L`` blocks. NaN for those that a block does not have, or where the objective is not
        finite.
      vectors: Eigenvectors, orthonormal, a stack of pytrees ``(k, *shape)`` like the parameters;
        with blocks, in the leaves of each block its own. Zero where the value is NaN.
      residuals: The length of :math:`A v - \lambda v` of each pair, of the shape of ``values``. An
        eigenvalue of ``A`` is no farther from :math:`\lambda`.
      steps: Lanczos vectors that were made, int32, or ``(L,)``. Fewer than asked for where the
        start has parts along fewer eigenvectors, as of a matrix of low rank.
      blocks: The partition with its ``names``, or None.
    """

    values: jax.Array
    vectors: chex.ArrayTree
    residuals: jax.Array
    steps: jax.Array
    blocks: Blocks | None


def extreme_eigenpairs(
    objective: Any,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    *,
    largest: int = 1,
    smallest: int = 0,
    matrix: Matrix = "hessian",
    blocks: BlockChoice = None,
    steps: int | None = None,
) -> Eigenpairs:
    """The largest and the smallest eigenvalues of the Hessian or Gauss-Newton matrix.

    Lanczos' process from a random start, with full orthogonalization: ``steps`` products, and as
    many vectors in memory; then a product per pair, for its residual. Whether ``steps`` were enough
    is what the residuals say. Of an eigenvalue with several eigenvectors one is found.

    The smallest are the most negative ones of an indefinite matrix. Those next to zero lie within
    the spectrum, and are not found.

    Args:
      objective: A function from parameters to a scalar, an `Objective` or `Microbatches`; the
        Gauss-Newton matrix needs one of the last two.
      params: The point, a pytree of real floating-point arrays.
      key: PRNG key of the start.
      largest: How many of the largest eigenvalues, static.
      smallest: How many of the smallest, static.
      matrix: ``"hessian"`` or ``"gauss_newton"``.
      blocks: None for the whole matrix; or its diagonal blocks, all at once: ``"layers"`` for
        leaves that have the same parent, the result of `find_layers`, a function from the path of
        a leaf to a label, or a pytree of labels.
      steps: Lanczos vectors, at most the number of parameters, static; by default four for each
        pair, and at least 40.

    Returns:
      The pairs.

    Raises:
      TypeError: If the parameters are not real, the key is none, or the objective is not split.
      ValueError: If no pair is asked for, or more than there are parameters; if ``steps`` is less
        than that, or more than the number of parameters.

    Example:
      >>> import secondorder as so
      >>> scale = jnp.array([-1.0, 2.0, 3.0])
      >>> pairs = so.extreme_eigenpairs(
      ...     lambda p: jnp.sum(scale * p**2) / 2, jnp.ones(3), jax.random.key(0), smallest=1)
      >>> jnp.rint(pairs.values).tolist()
      [-1.0, 3.0]

    Source: Golub, Van Loan (2013), Matrix computations, section 10.1.
    """
    caller = "extreme_eigenpairs"
    check_key(key, caller)
    curvature = make_curvature(caller, objective, params, matrix, blocks)
    count = _check_counts(largest, smallest, curvature)
    steps = check_steps("steps", steps, max(4 * count, 40), curvature)
    if steps < count:
        raise ValueError(f"`steps` must be at least the number of pairs, {count}: {steps}.")
    start = curvature.draw(key, "normal")
    result = lanczos(curvature.operator, start, steps, blocks=curvature.blocks)
    values, coefficients = _choose_pairs(ritz_pairs(result), result, largest, smallest)
    vectors, residuals = _with_residuals(curvature, result, values, coefficients)
    missing = ~jnp.isfinite(residuals) | ~jnp.any(coefficients != 0, axis=1)
    return Eigenpairs(
        values=curvature.squeeze(jnp.where(missing, jnp.nan, values)),
        vectors=vectors,
        residuals=curvature.squeeze(jnp.where(missing, jnp.nan, residuals)),
        steps=curvature.squeeze(result.steps),
        blocks=curvature.named_blocks,
    )


def _check_counts(largest: int, smallest: int, curvature: Curvature) -> int:
    """The number of pairs; raises unless it is possible."""
    for name, value in (("largest", largest), ("smallest", smallest)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"`{name}` must be a Python integer of at least 0, got {value}.")
    return check_steps("largest + smallest", largest + smallest, 1, curvature)


def _choose_pairs(
    ritz: RitzPairs, result: LanczosResult, largest: int, smallest: int
) -> tuple[jax.Array, jax.Array]:
    """Values ``(L, k)``, and coefficients ``(L, steps, k)``, zero for pairs that there are not."""
    steps = result.steps[:, None]
    below, above = jnp.arange(smallest), jnp.arange(largest) - largest
    index = jnp.concatenate([jnp.broadcast_to(below, (len(steps), smallest)), steps + above], 1)
    # The largest come first where there are fewer than asked for.
    exists = jnp.concatenate([below < steps - largest, steps + above >= 0], 1)
    index = jnp.clip(index, 0, ritz.values.shape[-1] - 1)
    values = jnp.take_along_axis(ritz.values, index, axis=1)
    coefficients = jnp.take_along_axis(ritz.coefficients, index[:, None, :], axis=2)
    return values, jnp.where(exists[:, None, :], coefficients, 0)


def _with_residuals(
    curvature: Curvature, result: LanczosResult, values: jax.Array, coefficients: jax.Array
) -> tuple[chex.ArrayTree, jax.Array]:
    """The vectors ``(k, *shape)``, and the lengths of their residuals ``(L, k)``."""
    blocks = curvature.blocks

    def measure(pair: tuple[jax.Array, jax.Array]) -> tuple[chex.ArrayTree, jax.Array]:
        value, column = pair
        vector = block_combine(blocks, column, result.vectors)
        image, expected = curvature.operator(vector), block_scale(blocks, value, vector)
        rest = jax.tree.map(jnp.subtract, image, expected)
        return vector, jnp.sqrt(block_inner(blocks, rest, rest))

    pairs = jnp.moveaxis(values, 1, 0), jnp.moveaxis(coefficients, 2, 0)
    vectors, residuals = jax.lax.map(measure, pairs)
    return vectors, residuals.T
