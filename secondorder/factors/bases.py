"""Orthonormal bases of eigenvectors, and how they follow matrices that change slowly."""

import jax
import jax.numpy as jnp

from secondorder.factors.roots import finite_matrices
from secondorder.products import map_matrices, matmul


def eigenbases(matrices: jax.Array, previous: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The eigenvectors of stacked matrices, those of large eigenvalues first.

    Args:
      matrices: Symmetric, (S, n, n), float32 or wider.
      previous: What stays where no decomposition was found, (S, n, n).

    Returns:
      Eigenvectors as columns, (S, n, n); and where there are none, (S,).

    Example:
      >>> bases, failed = eigenbases(jnp.diag(jnp.array([1.0, 2.0]))[None], jnp.eye(2)[None])
      >>> jnp.abs(bases).tolist(), failed.tolist()
      ([[[0.0, 1.0], [1.0, 0.0]]], [False])
    """
    values, vectors = map_matrices(jnp.linalg.eigh, matrices)
    found = finite_matrices(vectors * values[:, None, :])
    return jnp.where(found[:, None, None], vectors[:, :, ::-1], previous), ~found


def follow_bases(matrices: jax.Array, bases: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""One step of orthogonal iteration, :math:`M Q_\pi = Q^+ R`.

    The columns are first sorted by their Rayleigh quotients, :math:`\pi`: those that come first
    converge fastest.

    Args:
      matrices: :math:`M`, symmetric positive semidefinite, (S, n, n), float32 or wider.
      bases: :math:`Q`, orthonormal columns, (S, n, n).

    Returns:
      The new bases, (S, n, n); the sorting :math:`\pi`, (S, n), by which what is known along the
      old columns belongs to the new ones; and where both are as they were, as the new basis was not
      finite, (S,).

    Example:
      >>> bases, order, _ = follow_bases(jnp.diag(jnp.array([1.0, 2.0]))[None], jnp.eye(2)[None])
      >>> jnp.abs(bases).tolist(), order.tolist()
      ([[[0.0, 1.0], [1.0, 0.0]]], [[1, 0]])

    Source: Vyas et al. (2024), SOAP, arXiv 2409.11321, algorithm 4.
    """
    images = matmul(matrices, bases)
    order = jnp.argsort(-jnp.sum(bases * images, axis=1), axis=1)
    new, _ = map_matrices(jnp.linalg.qr, jnp.take_along_axis(images, order[:, None, :], axis=2))
    found = finite_matrices(new)
    same = jnp.arange(bases.shape[-1], dtype=order.dtype)
    return (
        jnp.where(found[:, None, None], new, bases),
        jnp.where(found[:, None], order, same),
        ~found,
    )
