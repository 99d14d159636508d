r"""Lanczos' process: a symmetric matrix as a small tridiagonal one.

From a start :math:`q_1` of length one, ``k`` products give an orthonormal basis of the Krylov space
of :math:`A` in which it is

.. math::
  Q A Q^\top = T = \begin{pmatrix} \alpha_1 & \beta_1 & & \\ \beta_1 & \alpha_2 & \ddots & \\
  & \ddots & \ddots & \beta_{k-1} \\ & & \beta_{k-1} & \alpha_k \end{pmatrix}.

The eigenvalues of :math:`T` are the outer ones of :math:`A` first. With the squares of the first
components of its eigenvectors they are also a quadrature rule of ``k`` nodes for the spectrum of
:math:`A` as the start sees it, exact for polynomials of degree ``2 k - 1``.

Where :math:`A` is block diagonal, all blocks run in lockstep, each with a matrix :math:`T` of its
own: a product with :math:`A` is one with each of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from secondorder.checks import check_static_count
from secondorder.sharding import replicate, replicated_zeros
from secondorder.tree import (
    Blocks,
    accumulation_dtype,
    block_choose,
    block_combine,
    block_inner,
    block_project,
    block_scale,
    one_block,
    write,
    zeros_stack,
)

_ROUNDINGS = 10  # of the largest element of T: what is left if the space is invariant


class LanczosResult(NamedTuple):
    r"""A symmetric matrix in ``k`` Lanczos vectors; with blocks, one of them in each.

    Attributes:
      alphas: The diagonal of ``T``, array ``(k,)``, or ``(L, k)`` for ``L`` blocks; zero from
        ``steps`` on.
      betas: What stands beside it, of the same shape: ``betas[i]`` couples ``i`` and ``i + 1``,
        and the last one is the length of the residual :math:`A q_k - \alpha_k q_k - \beta_{k-1}
        q_{k-1}`. Zero where the process ended: the space is invariant then.
      vectors: The rows of ``Q``, a stack of pytrees ``(k, *shape)``, zero from ``steps`` on; None
        if they are not kept.
      steps: Number of vectors, int32 in ``[0, k]``, or ``(L,)``.
      finite: Whether every product was finite, a boolean, or ``(L,)``. A vector whose product was
        not is left out, and those that would follow from it.
    """

    alphas: jax.Array
    betas: jax.Array
    vectors: chex.ArrayTree | None
    steps: jax.Array
    finite: jax.Array


class RitzPairs(NamedTuple):
    """Eigenvalues and eigenvectors of the matrix ``T``.

    Attributes:
      values: Ritz values ``(..., k)``, ascending; zero from the number of steps on.
      coefficients: Of the Ritz vectors in the basis, as columns ``(..., k, k)``; zero columns
        from the number of steps on. The squares of the first row are weights of a quadrature.
      residuals: The length of ``A v - λ v`` of each pair ``(..., k)``, exact but for rounding.
      valid: Which pairs there are ``(..., k)``.
    """

    values: jax.Array
    coefficients: jax.Array
    residuals: jax.Array
    valid: jax.Array


class _State(NamedTuple):
    """The tridiagonal matrices so far ``(L, k)``, and two vectors."""

    alphas: jax.Array
    betas: jax.Array
    steps: jax.Array
    active: jax.Array
    finite: jax.Array
    largest: jax.Array
    vector: chex.ArrayTree
    previous: chex.ArrayTree
    basis: chex.ArrayTree | None


def lanczos(
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    start: chex.ArrayTree,
    size: int,
    *,
    blocks: Blocks | None = None,
    reorthogonalize: bool = True,
    keep_vectors: bool = True,
) -> LanczosResult:
    r"""Tridiagonalizes a symmetric matrix that is known by its products.

    .. math:: \beta_i q_{i+1} = A q_i - \alpha_i q_i - \beta_{i-1} q_{i-1}, \qquad
        \alpha_i = q_i^\top A q_i

    Three terms alone lose orthogonality as soon as an eigenvalue has converged, and find it again.
    For a quadrature that does little harm; for eigenpairs each vector is orthogonalized against
    all others, twice. A block ends where what is left of the product is its rounding.

    Args:
      product: Maps ``v`` to ``A v``, pytrees like ``start``; symmetric, and block diagonal if there
        are several blocks. Called once per vector.
      start: Any vector but zero, such as a random one or the gradient; a pytree of arrays. Its
        length in each block does not matter.
      size: ``k``, the number of vectors, at least 1; static.
      blocks: The partition of the leaves into ``L`` blocks, or None for one matrix, whose result
        has no axis for blocks.
      reorthogonalize: Whether to orthogonalize against all vectors; static.
      keep_vectors: Whether to return the basis; static. Without both, the memory is that of two
        vectors.

    Returns:
      The matrix ``T`` and the basis, float32 or wider.

    Raises:
      ValueError: If ``size`` is not an integer of at least 1.

    Example:
      >>> result = lanczos(lambda v: jnp.array([1.0, 3.0]) * v, jnp.ones(2), 3)
      >>> int(result.steps), result.alphas.round(3).tolist(), result.betas.round(3).tolist()
      (2, [2.0, 2.0, 0.0], [1.0, 0.0, 0.0])

    Source: Golub, Van Loan (2013), Matrix computations, sections 10.1 and 10.3; Giraud, Langou,
    Rozložník, van den Eshof (2005), Numerische Mathematik 101, on two passes.
    """
    check_static_count("size", size)
    partition = one_block(start) if blocks is None else blocks
    state = _init_state(partition, start, size, keep=reorthogonalize or keep_vectors)
    last = jax.lax.fori_loop(
        0, size, lambda i, s: _extend(partition, product, i, s, reorthogonalize), state
    )
    result = LanczosResult(
        last.alphas, last.betas, last.basis if keep_vectors else None, last.steps, last.finite
    )
    if blocks is not None:
        return result
    return result._replace(
        alphas=last.alphas[0], betas=last.betas[0], steps=last.steps[0], finite=last.finite[0]
    )


def ritz_pairs(result: LanczosResult) -> RitzPairs:
    r"""Diagonalizes the matrix ``T``.

    A pair :math:`(\lambda, Q^\top s)` has the residual :math:`\beta_k |s_k|`: at least one
    eigenvalue of ``A`` is no farther from :math:`\lambda`.

    Args:
      result: What `lanczos` found.

    Returns:
      The pairs, of every block.

    Example:
      >>> result = lanczos(lambda v: jnp.array([1.0, 3.0]) * v, jnp.ones(2), 2)
      >>> ritz = ritz_pairs(result)
      >>> jnp.rint(ritz.values).tolist(), jnp.rint(100 * ritz.coefficients[0] ** 2).tolist()
      ([1.0, 3.0], [50.0, 50.0])

    Source: Golub, Van Loan (2013), theorem 10.1.2.
    """
    alphas, betas = replicate(result.alphas), replicate(result.betas)
    size = alphas.shape[-1]
    index = jnp.arange(size)
    valid = index < result.steps[..., None]
    coupled = index + 1 < result.steps[..., None]
    inside = jnp.where(coupled, betas, 0)
    left = jnp.concatenate([jnp.zeros_like(inside[..., :1]), inside[..., :-1]], axis=-1)
    bound = jnp.max(jnp.abs(alphas) + inside + left, axis=-1, keepdims=True)
    # Rows that are not used get an eigenvalue above all others, so that nothing mixes with them.
    apart = jnp.where(bound > 0, 2 * bound, 1)
    diagonal = jnp.where(valid, alphas, apart)[..., None] * jnp.eye(size, dtype=alphas.dtype)
    upper = inside[..., None] * jnp.eye(size, k=1, dtype=alphas.dtype)
    values, vectors = jnp.linalg.eigh(diagonal + upper + jnp.swapaxes(upper, -1, -2))
    vectors = jnp.where(valid[..., None, :] & valid[..., :, None], vectors, 0)
    is_last = valid & ~coupled
    ends = jnp.sum(jnp.where(is_last[..., None], vectors, 0), axis=-2)
    residual = jnp.sum(jnp.where(is_last, betas, 0), axis=-1, keepdims=True)
    return RitzPairs(jnp.where(valid, values, 0), vectors, residual * jnp.abs(ends), valid)


def _init_state(blocks: Blocks, start: chex.ArrayTree, size: int, *, keep: bool) -> _State:
    """No vectors yet, and the first one of length one."""
    dtype = accumulation_dtype(start)
    start = jax.tree.map(lambda leaf: leaf.astype(dtype), start)
    length = jnp.sqrt(block_inner(blocks, start, start))
    finite = jnp.isfinite(length)
    active = finite & (length > 0)
    vector = _divided(blocks, start, length, active)
    return _State(
        alphas=replicated_zeros((len(blocks), size), dtype),
        betas=replicated_zeros((len(blocks), size), dtype),
        steps=jnp.zeros_like(length, jnp.int32),
        active=active,
        finite=finite,
        largest=jnp.zeros_like(length),
        vector=vector,
        previous=jax.tree.map(jnp.zeros_like, vector),
        basis=zeros_stack(start, size, dtype) if keep else None,
    )


def _extend(
    blocks: Blocks,
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    index: jax.Array,
    state: _State,
    reorthogonalize: bool,
) -> _State:
    """One product: another row of ``T``, and the next vector."""
    image = jax.tree.map(lambda a, v: a.astype(v.dtype), product(state.vector), state.vector)
    finite = jnp.isfinite(block_inner(blocks, image, image))
    used = state.active & finite
    vector = _zero_unless(blocks, used, state.vector)
    image = _zero_unless(blocks, used, image)
    basis = state.basis if state.basis is None else write(state.basis, index, vector)

    here = jnp.arange(state.alphas.shape[1]) == index
    before = jnp.sum(jnp.where(jnp.arange(len(here)) == index - 1, state.betas, 0), axis=1)
    before = jnp.where(used, before, 0)
    rest = _minus(image, block_scale(blocks, before, state.previous))
    alpha = block_inner(blocks, rest, vector)
    rest = _minus(rest, block_scale(blocks, alpha, vector))
    for _ in range(2 if reorthogonalize else 0):
        rest = _minus(rest, block_combine(blocks, block_project(blocks, basis, rest), basis))

    length = jnp.sqrt(block_inner(blocks, rest, rest))
    largest = jnp.maximum(state.largest, jnp.abs(alpha) + before + length)
    rounding = _ROUNDINGS * float(np.finfo(length.dtype).eps)
    active = used & (length > rounding * largest)
    return _State(
        alphas=jnp.where(here, alpha[:, None], state.alphas),
        betas=jnp.where(here, jnp.where(active, length, 0)[:, None], state.betas),
        steps=state.steps + used,
        active=active,
        finite=state.finite & (finite | ~state.active),
        largest=largest,
        vector=_divided(blocks, rest, length, active),
        previous=vector,
        basis=basis,
    )


def _divided(
    blocks: Blocks, vector: chex.ArrayTree, lengths: jax.Array, active: jax.Array
) -> chex.ArrayTree:
    """Each block divided by its length; zero in blocks that are not active."""
    vector = _zero_unless(blocks, active, vector)
    return block_scale(blocks, jnp.where(active, 1 / jnp.where(active, lengths, 1), 0), vector)


def _zero_unless(blocks: Blocks, conditions: jax.Array, vector: chex.ArrayTree) -> chex.ArrayTree:
    """Zero in the blocks whose condition does not hold, whatever is there."""
    return block_choose(blocks, conditions, vector, jax.tree.map(jnp.zeros_like, vector))


def _minus(one: chex.ArrayTree, other: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda a, b: a - b.astype(a.dtype), one, other)
