r"""Eigensolvers whose basis grows block by block: block Krylov spaces, and an adaptive rank."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from secondorder.checks import check_static_count
from secondorder.sharding import replicate, replicated_zeros
from secondorder.solvers.eigenpairs import (
    BlockProduct,
    Images,
    Solution,
    eigenpairs,
    keep_significant,
    ritz_coefficients,
    signal_to_noise,
)
from secondorder.solvers.orthonormal import orthonormalize, project_out
from secondorder.tree import (
    accumulation_dtype,
    gram,
    mix,
    random_stack,
    stack_size,
    zeros_stack,
)


class _Growth(NamedTuple):
    """A basis so far, in blocks of equal size, and the matrix restricted to it.

    Attributes:
      basis: Orthonormal vectors, then zeros: a stack of ``k``.
      projected: Array ``(k, k)``.
      blocks: How many blocks there are, int32.
      finite: Whether all products were finite.
    """

    basis: chex.ArrayTree
    projected: jax.Array
    blocks: jax.Array
    finite: jax.Array


def block_krylov(
    product: BlockProduct, start: chex.ArrayTree, rank: int, *, depth: int = 2
) -> Solution:
    r"""The Rayleigh-Ritz procedure on a block Krylov space.

    .. math:: \mathrm{span}\{\Omega, A \Omega, \dots, A^{d-1} \Omega\}

    Of as many products as subspace iteration with ``d`` passes, whose last basis it contains, it
    makes the best: it converges in the square root of its passes where eigenvalues are close. It
    holds ``d`` bases.

    Args:
      product: Products with ``A``.
      start: The ``b`` vectors :math:`\Omega`, orthonormal, random or from the matrix before.
      rank: How many pairs to return, at most ``b``; static.
      depth: ``d``, at least 1; less where the space would not have so many dimensions. Static.

    Returns:
      The pairs, and the ``b`` leading Ritz vectors as the next start.

    Raises:
      ValueError: If ``depth`` is not an integer of at least 1.

    Example:
      >>> from secondorder.solvers.eigenpairs import without_samples
      >>> matrix = jnp.diag(jnp.array([9.0, -8.0, 1.0, 0.1]))
      >>> start = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (4, 1)))[0].T
      >>> product = without_samples(lambda stack: stack @ matrix)
      >>> block_krylov(product, start, 1, depth=4).pairs.values.round(3).tolist()
      [9.0]

    Source: Musco, Musco (2015), Randomized block Krylov methods for stronger and faster approximate
    singular value decomposition, NeurIPS.
    """
    check_static_count("depth", depth)
    block = stack_size(start)
    depth = min(depth, _dimension(start) // block)

    def extend(_: int, carry: tuple[_Growth, chex.ArrayTree]) -> tuple[_Growth, chex.ArrayTree]:
        growth, images = _append(carry[0], carry[1], product)
        return growth, images.vectors

    growth, _ = jax.lax.fori_loop(0, depth, extend, (_empty(start, block * depth), start))
    values, rows = ritz_coefficients(growth.projected)
    kept = keep_significant(values[:rank], rows[:rank], growth.projected[:0], None)
    pairs = eigenpairs(values[:rank], rows[:rank], kept, growth.basis)
    count = jnp.asarray(block * depth, jnp.int32)
    return Solution(pairs, mix(rows[:block], growth.basis), count, growth.finite)


def adaptive_rank(
    product: BlockProduct,
    like: chex.ArrayTree,
    rank: int,
    key: jax.Array,
    *,
    block: int = 10,
    tolerance: chex.Numeric = 0.1,
    noise: chex.Numeric | None = None,
) -> Solution:
    r"""The randomized eigensolver, with as many vectors as the matrix needs.

    Blocks of products with random vectors join the basis ``Q`` until it holds the product with one
    more random vector,

    .. math:: \|(I - Q^\top Q)\, A w\| < \epsilon\, \|A w\|,

    or until a vector of the last block is noise: the Rayleigh quotients of the samples of the
    matrix with it have a mean below ``noise`` times their standard deviation.

    Args:
      product: Products with ``A``.
      like: One vector, a pytree of arrays.
      rank: Most pairs; those of as many whole blocks are returned. Static.
      key: A PRNG key.
      block: Vectors in a block, at least 1; static.
      tolerance: :math:`\epsilon`, in (0, 1).
      noise: Least ratio of signal to noise, or None.

    Returns:
      The pairs, ``rank`` of them, and the basis.

    Raises:
      ValueError: If ``block`` is not an integer of at least 1.

    Example:
      >>> from secondorder.solvers.eigenpairs import without_samples
      >>> matrix = jnp.diag(jnp.array([9.0, -8.0, 0.0, 0.0, 0.0]))
      >>> product = without_samples(lambda stack: stack @ matrix)
      >>> solution = adaptive_rank(product, jnp.ones(5), 4, jax.random.key(0), block=2)
      >>> solution.pairs.values.round(3).tolist(), int(solution.products)
      ([9.0, -8.0, 0.0, 0.0], 5)

    Source: Halko, Martinsson, Tropp (2011), section 4.4; O'Leary-Roseberry, Alger, Ghattas (2020),
    arXiv 2002.02881.
    """
    check_static_count("block", block)
    block = min(block, rank)
    most = rank // block
    probe_key, block_key = jax.random.split(key)
    probe = product(random_stack(probe_key, like, 1)).vectors
    size = jnp.sqrt(replicate(gram(probe, probe))[0, 0])

    def grow(carry: _Search) -> _Search:
        drawn = random_stack(jax.random.fold_in(block_key, carry.growth.blocks), like, block)
        candidate = product(orthonormalize(drawn)).vectors
        growth, images = _append(carry.growth, candidate, product)
        rest = project_out(growth.basis, carry.rest)
        left = jnp.sqrt(replicate(gram(rest, rest))[0, 0])
        return _Search(growth, rest, _is_enough(left, tolerance * size, images, noise))

    start = _Search(_empty(probe, block * most), probe, ~jnp.isfinite(size))
    search = jax.lax.while_loop(
        lambda search: ~search.ended & (search.growth.blocks < most), grow, start
    )
    growth = search.growth
    values, rows = ritz_coefficients(growth.projected)
    rows = jnp.pad(rows, ((0, rank - len(rows)), (0, 0)))
    values = jnp.pad(values, (0, rank - len(values)))
    # What is not in the basis has rows of zeros, and with them eigenvalues of zero.
    kept = keep_significant(values, rows, growth.projected[:0], None)
    pairs = eigenpairs(values, rows, kept, growth.basis)
    count = 1 + 2 * block * growth.blocks
    return Solution(pairs, growth.basis, count, growth.finite & jnp.isfinite(size))


class _Search(NamedTuple):
    """A basis, what it has not of the probe, and whether it is large enough."""

    growth: _Growth
    rest: chex.ArrayTree
    ended: jax.Array


def _is_enough(
    left: jax.Array, bound: chex.Numeric, images: Images, noise: chex.Numeric | None
) -> jax.Array:
    """Whether little is left of the probe, or a vector of the last block is noise."""
    enough = ~(left >= bound)
    if noise is None:
        return enough
    identity = jnp.eye(images.samples.shape[-1], dtype=images.samples.dtype)
    return enough | jnp.any(signal_to_noise(identity, images.samples) < noise)


def _dimension(stack: chex.ArrayTree) -> int:
    return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(stack))


def _empty(stack: chex.ArrayTree, size: int) -> _Growth:
    """No basis yet, with room for ``size`` vectors like those of a stack."""
    one, dtype = jax.tree.map(lambda rows: rows[0], stack), accumulation_dtype(stack)
    projected = replicated_zeros((size, size), dtype)
    return _Growth(
        zeros_stack(one, size, dtype), projected, jnp.zeros((), jnp.int32), jnp.ones((), bool)
    )


def _append(
    growth: _Growth, candidate: chex.ArrayTree, product: BlockProduct
) -> tuple[_Growth, Images]:
    """Adds what a block has of new directions; returns its images too."""
    for _ in range(2):  # what is left may be little, and not orthogonal after its lengths are one
        candidate = orthonormalize(project_out(growth.basis, candidate))
    images = product(candidate)
    place = growth.blocks * stack_size(candidate)

    def write(rows: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, new.astype(rows.dtype), place, 0)

    basis = jax.tree.map(write, growth.basis, candidate)
    # Rows that are not written yet are zero, and get their products when they are.
    column = replicate(gram(basis, images.vectors))
    projected = jax.lax.dynamic_update_slice_in_dim(growth.projected, column, place, 1)
    projected = jax.lax.dynamic_update_slice_in_dim(projected, column.T, place, 0)
    finite = growth.finite & jnp.isfinite(jnp.sum(gram(images.vectors, images.vectors)))
    return _Growth(basis, projected, growth.blocks + 1, finite), images
