"""Eigenvectors of Kronecker factors, and inverses in stacks of nearly equal sizes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from secondorder.factors.moments import apply_all, damped_inverse
from secondorder.products import map_matrices, matmul

# Matrices are padded to the size of larger ones if that at most so much multiplies their work.
_WASTE = 1.2


def in_stacks(
    function: Callable[..., tuple[jax.Array, ...]],
    matrices: Sequence[jax.Array],
    numbers: Sequence[jax.Array],
    spread: Callable[..., Any] = apply_all,
) -> list[tuple[jax.Array, ...]]:
    """Maps a function over stacks of matrices, those of nearly equal size as one batch.

    Args:
      function: Maps a matrix ``(n, n)`` and a number to arrays whose axes are all of length ``n``.
        The last rows and columns of a matrix may be zero.
      matrices: Stacks ``(S, n, n)``; ``S`` and ``n`` may differ.
      numbers: For each stack ``(S,)``.
      spread: Applies a function to stacks, as `secondorder.spread.Devices.spread` does; its results
        can be cut anywhere.

    Returns:
      For each stack the results, ``(S, n, ...)``.
    """
    results: dict[int, tuple[jax.Array, ...]] = {}
    for width, members in _buckets([matrix.shape[-1] for matrix in matrices]):
        margins = [width - matrices[i].shape[-1] for i in members]
        padded = [
            jnp.pad(matrices[i], ((0, 0), (0, margin), (0, margin)))
            for i, margin in zip(members, margins, strict=True)
        ]
        outputs = spread(
            functools.partial(map_matrices, function),
            jnp.concatenate(padded),
            jnp.concatenate([numbers[i] for i in members]),
        )
        start = 0
        for i in members:
            stack, size = matrices[i].shape[:2]
            results[i] = tuple(
                output[(slice(start, start + stack), *[slice(size)] * (output.ndim - 1))]
                for output in outputs
            )
            start += stack
    return [results[i] for i in range(len(matrices))]


def _buckets(sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Groups indices whose sizes are close, with the largest size of each group."""
    buckets: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if buckets and buckets[-1][0] ** 3 <= _WASTE * sizes[index] ** 3:
            buckets[-1][1].append(index)
        else:
            buckets.append((sizes[index], [index]))
    return buckets


def map_by_size(function: Callable[..., Any], *arguments: Sequence[jax.Array]) -> list[Any]:
    """Applies a function to stacks of matrices, once for all stacks of one size.

    Args:
      function: Maps stacks ``(S, n, n)`` to arrays ``(S, ...)``, each matrix on its own.
      *arguments: For each of its arguments the stacks, those of one index of equal shape.

    Returns:
      For each index what the function makes of its stacks.

    Example:
      >>> stacks = [jnp.ones((1, 1, 1)), jnp.ones((1, 2, 2)), jnp.ones((3, 1, 1))]
      >>> [sums.tolist() for sums in map_by_size(lambda m: jnp.sum(m, axis=(1, 2)), stacks)]
      [[1.0], [4.0], [1.0, 1.0, 1.0]]
    """
    results: dict[int, Any] = {}
    sizes = [matrix.shape[-1] for matrix in arguments[0]]
    for size in dict.fromkeys(sizes):
        members = [index for index, other in enumerate(sizes) if other == size]
        output = function(*(jnp.concatenate([side[i] for i in members]) for side in arguments))
        start = 0
        for i in members:
            part = slice(start, start + len(arguments[0][i]))
            results[i] = jax.tree.map(lambda array, part=part: array[part], output)
            start = part.stop
    return [results[i] for i in range(len(sizes))]


def stacked_inverses(
    matrices: Sequence[jax.Array],
    dampings: Sequence[jax.Array],
    spread: Callable[..., Any] = apply_all,
) -> list[jax.Array]:
    """Returns ``(M + λI)⁻¹`` for stacks of matrices of different sizes.

    Args:
      matrices: stacks (S, n, n) of symmetric positive semidefinite matrices.
      dampings: ``λ`` for each matrix of each stack, (S,), positive.
      spread: Applies a function to stacks, as for `in_stacks`.

    Returns:
      Stacks like ``matrices``; not finite where ``M + λI`` is not positive definite to rounding.

    Example:
      >>> small, large = stacked_inverses(
      ...     [15 * jnp.ones((1, 1, 1)), 3 * jnp.eye(2)[None]], [jnp.ones(1), jnp.ones(1)])
      >>> small.tolist(), large.tolist()
      ([[[0.0625]]], [[[0.25, 0.0], [0.0, 0.25]]])
    """

    def invert(matrix: jax.Array, damping: jax.Array) -> tuple[jax.Array]:
        return (damped_inverse(matrix, damping.astype(matrix.dtype)),)

    return [inverse for (inverse,) in in_stacks(invert, matrices, dampings, spread)]


def stacked_eigenvectors(
    matrices: Sequence[jax.Array], spread: Callable[..., Any] = apply_all
) -> list[tuple[jax.Array, jax.Array]]:
    """Returns the eigenvectors of stacks of matrices of different sizes.

    Args:
      matrices: stacks (S, n, n) of symmetric positive semidefinite matrices.
      spread: Applies a function to stacks, as for `in_stacks`.

    Returns:
      For each the eigenvalues (S, n), not negative, and eigenvectors as columns (S, n, n). Each
      matrix is decomposed in its own size: padding would add eigenvectors.

    Example:
      >>> ((values, vectors),) = stacked_eigenvectors([jnp.diag(jnp.array([2.0, 1.0]))[None]])
      >>> values.tolist(), jnp.abs(vectors).tolist()
      ([[1.0, 2.0]], [[[0.0, 1.0], [1.0, 0.0]]])
    """

    def decompose(stack: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, vectors = map_matrices(jnp.linalg.eigh, stack)
        return jnp.maximum(values, 0), vectors

    return map_by_size(lambda stack: spread(decompose, stack), matrices)


def rotate(input_basis: jax.Array, matrix: jax.Array, output_basis: jax.Array) -> jax.Array:
    """Returns ``U_Aᵀ V U_G`` of stacked matrices; with transposed bases the way back.

    Args:
      input_basis: (S, i, i); or (S, i) for an embedding, whose basis is the identity.
      matrix: (S, i, o).
      output_basis: (S, o, o).

    Returns:
      Stack (S, i, o).

    Example:
      >>> rotate(jnp.ones((1, 1, 1)), 2 * jnp.ones((1, 1, 1)), 3 * jnp.ones((1, 1, 1))).tolist()
      [[[6.0]]]
    """
    if input_basis.ndim == 3:
        matrix = matmul(jnp.swapaxes(input_basis, 1, 2), matrix)
    return matmul(matrix, output_basis)
