r"""The eigenpairs of largest magnitude of a symmetric matrix that is known by its products.

Products are asked for with many vectors at once, which a batch makes cheaper than one by one. A
subspace that is kept from one matrix to the next, slightly different one needs a single product
with each of its vectors; a random one needs two, or more if the spectrum decays slowly.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder.products import matmul
from secondorder.sharding import replicate, replicated_zeros
from secondorder.solvers.orthonormal import orthonormalize
from secondorder.tree import accumulation_dtype, gram, mix, stack_size


class Images(NamedTuple):
    r"""Products of a symmetric matrix ``A``, a mean of samples, with the vectors of a stack ``Q``.

    Attributes:
      vectors: :math:`A q_i`, a stack ``(k, *shape)``.
      samples: :math:`Q A_s Q^\top` of each of ``s`` samples of the matrix, array ``(s, k, k)``;
        ``s`` is 0 where there are none.
    """

    vectors: chex.ArrayTree
    samples: jax.Array


# From a stack of vectors to their images.
BlockProduct: TypeAlias = Callable[[chex.ArrayTree], Images]


class Eigenpairs(NamedTuple):
    r"""Approximate eigenpairs, by decreasing magnitude.

    Attributes:
      values: Eigenvalues ``(r,)``; zero where one is not kept.
      vectors: Orthonormal eigenvectors, a stack ``(r, *shape)``; zero where one is not kept.
      kept: Which are there, booleans ``(r,)``.
    """

    values: jax.Array
    vectors: chex.ArrayTree
    kept: jax.Array


class Solution(NamedTuple):
    """What an eigensolver returns.

    Attributes:
      pairs: The eigenpairs.
      basis: Where to start with the next matrix, a stack of as many orthonormal or zero vectors as
        the start had.
      products: Products with single vectors, an int32 scalar.
      finite: Whether all products were finite, and could be squared.
    """

    pairs: Eigenpairs
    basis: chex.ArrayTree
    products: jax.Array
    finite: jax.Array


class _Pass(NamedTuple):
    """A pass: the next basis, its own, the matrix restricted to that, and samples of it."""

    after: chex.ArrayTree
    basis: chex.ArrayTree
    projected: jax.Array
    samples: jax.Array
    finite: jax.Array


def without_samples(product: Callable[[chex.ArrayTree], chex.ArrayTree]) -> BlockProduct:
    """A product with a matrix of which there are no samples.

    Args:
      product: From a stack of vectors to the stack of their products.

    Returns:
      The block product.

    Example:
      >>> without_samples(lambda stack: 2 * stack)(jnp.eye(2)).samples.shape
      (0, 2, 2)
    """

    def images(stack: chex.ArrayTree) -> Images:
        size, vectors = stack_size(stack), product(stack)
        dtype = jax.tree.leaves(vectors)[0].dtype
        return Images(vectors, replicated_zeros((0, size, size), dtype))

    return images


def ritz_coefficients(projected: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The eigenpairs of a small symmetric matrix, by decreasing magnitude.

    Args:
      projected: Array ``(k, k)``; its symmetric part counts.

    Returns:
      The eigenvalues ``(k,)``, and the eigenvectors as rows ``(k, k)``.

    Example:
      >>> ritz_coefficients(jnp.diag(jnp.array([1.0, -3.0, 2.0])))[0].tolist()
      [-3.0, 2.0, 1.0]
    """
    projected = replicate(projected)
    values, basis = jnp.linalg.eigh((projected + projected.T) / 2)
    order = jnp.argsort(-jnp.abs(values))
    return values[order], basis.T[order]


def signal_to_noise(rows: jax.Array, samples: jax.Array) -> jax.Array:
    r"""How certain eigenvalues are, :math:`|\mathrm{mean}| / \mathrm{std}` over samples.

    Of the Rayleigh quotients :math:`v_i^\top T_s v_i` of vectors with the samples of a matrix.

    Args:
      rows: The vectors ``v_i`` in the coordinates of the samples, array ``(r, k)``.
      samples: The matrices :math:`T_s`, array ``(s, k, k)``, of at least two.

    Returns:
      Array ``(r,)``; infinity where all quotients are equal, but not where they are zero.

    Example:
      >>> samples = jnp.array([1.0, 3.0])[:, None, None] * jnp.eye(1)
      >>> jnp.rint(1000 * signal_to_noise(jnp.eye(1), samples)).tolist()
      [1414.0]

    Source: O'Leary-Roseberry, Alger, Ghattas (2020), arXiv 2002.02881.
    """
    images = jnp.einsum("ik,skl->sil", rows, samples, precision=jax.lax.Precision.HIGHEST)
    quotients = jnp.sum(images * rows, axis=2)
    mean, spread = jnp.abs(jnp.mean(quotients, axis=0)), jnp.std(quotients, axis=0, ddof=1)
    certain = jnp.where(mean > 0, jnp.inf, 0)
    return jnp.where(spread > 0, mean / jnp.where(spread > 0, spread, 1), certain)


def keep_significant(
    values: jax.Array, rows: jax.Array, samples: jax.Array, least: chex.Numeric | None
) -> jax.Array:
    """Which eigenpairs are more than noise.

    Args:
      values: Eigenvalues ``(r,)``.
      rows: Their vectors in the coordinates of the samples, array ``(r, k)``.
      samples: Samples of the restricted matrix, array ``(s, k, k)``.
      least: Smallest ratio of signal to noise, or None to keep all that are not zero.

    Returns:
      Booleans ``(r,)``.

    Example:
      >>> samples = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[1.1, 0.0], [0.0, -1.1]]])
      >>> keep_significant(jnp.array([1.05, -0.05]), jnp.eye(2), samples, 1.0).tolist()
      [True, False]
    """
    kept = jnp.isfinite(values) & (values != 0)
    return kept if least is None else kept & (signal_to_noise(rows, samples) >= least)


def eigenpairs(
    values: jax.Array, rows: jax.Array, kept: jax.Array, basis: chex.ArrayTree
) -> Eigenpairs:
    """The pairs of a restricted matrix as those of the matrix, zero where they are not kept.

    Args:
      values: Eigenvalues ``(r,)``.
      rows: Eigenvectors in the coordinates of the basis, array ``(r, k)``.
      kept: Which to keep, booleans ``(r,)``.
      basis: A stack of ``k`` vectors.

    Returns:
      The pairs.

    Example:
      >>> eigenpairs(jnp.ones(1), jnp.array([[0.6, 0.8]]), jnp.ones(1, bool), jnp.eye(2)).vectors
      Array([[0.6, 0.8]], dtype=float32)
    """
    rows = jnp.where(kept[:, None], rows, 0)
    return Eigenpairs(jnp.where(kept, values, 0), mix(rows, basis), kept)


def subspace_iteration(
    product: BlockProduct,
    start: chex.ArrayTree,
    rank: int,
    *,
    passes: chex.Numeric = 1,
    noise: chex.Numeric | None = None,
    cleanings: int = 2,
) -> Solution:
    r"""Subspace iteration with the Rayleigh-Ritz procedure.

    In each pass, with the basis ``Q`` that the one before has left,

    .. math:: Q A Q^\top = V \Lambda V^\top, \qquad U = V^\top Q, \qquad Q_+ = \mathrm{orth}(A Q),

    so that a pass costs one product with each vector. From a random start the second pass makes of
    it the randomized double-pass solver. With the basis that it returned for the matrix before, one
    pass is a step of a warm start: an error of a pair falls by
    :math:`(\lambda_{k+1}/\lambda_i)^2` per step.

    Args:
      product: Products with ``A``.
      start: An orthonormal basis ``Q`` of ``k`` vectors, random or from the matrix before.
      rank: How many pairs to return, at most ``k``; static.
      passes: How many passes, at least 1; may be traced.
      noise: Least ratio of signal to noise of a pair over the samples, or None.
      cleanings: Passes of each orthonormalization; three for random starts, as two may be too few
        in float32. Static.

    Returns:
      The pairs of the last basis that was multiplied with, and the next basis.

    Example:
      >>> matrix = jnp.diag(jnp.array([9.0, -4.0, 1e-3]))
      >>> product = without_samples(lambda stack: stack @ matrix)
      >>> start = jnp.linalg.qr(jnp.array([[1.0, 1.0], [1.0, -1.0], [0.0, 1.0]]))[0].T
      >>> solution = subspace_iteration(product, start, 2, passes=2)
      >>> solution.pairs.values.round(3).tolist(), int(solution.products)
      ([9.0, -4.0], 4)

    Source: Halko, Martinsson, Tropp (2011), Finding structure with randomness, SIAM Review 53,
    algorithms 4.4 and 5.3; Saad (2011), Numerical methods for large eigenvalue problems, section 5.
    """

    def iterate(_: chex.Numeric, last: _Pass) -> _Pass:
        basis = last.after
        images = product(basis)
        projected = replicate(gram(basis, images.vectors))
        finite = last.finite & jnp.isfinite(jnp.sum(gram(images.vectors, images.vectors)))
        rotation = ritz_coefficients(projected)[1]
        after = orthonormalize(images.vectors, passes=cleanings, rotation=rotation)
        return _Pass(after, basis, projected, images.samples, finite)

    size, dtype = stack_size(start), accumulation_dtype(start)
    samples = jax.eval_shape(product, start).samples.shape
    blank = (replicated_zeros((size, size), dtype), replicated_zeros(samples, dtype))
    first = _Pass(start, start, *blank, jnp.ones((), bool))
    is_one = isinstance(passes, int) and passes == 1  # then a loop would only copy
    last = iterate(0, first) if is_one else jax.lax.fori_loop(0, passes, iterate, first)
    values, rows = (leaf[:rank] for leaf in ritz_coefficients(last.projected))
    kept = keep_significant(values, rows, last.samples, noise)
    pairs = eigenpairs(values, rows, kept, last.basis)
    return Solution(pairs, last.after, jnp.asarray(passes * size, jnp.int32), last.finite)


def single_pass(product: BlockProduct, start: chex.ArrayTree, rank: int) -> Solution:
    r"""The randomized eigensolver that sees each vector once.

    With :math:`Y = A \Omega` and ``Q`` an orthonormal basis of the ``r`` leading singular vectors
    of ``Y``, :math:`T = Q A Q^\top` is what satisfies :math:`T\, (Q \Omega^\top) = Q Y^\top` best.
    Half the products of the double pass, and errors that are larger: it needs more vectors than
    ``rank``, as the system is then overdetermined.

    Args:
      product: Products with ``A``.
      start: The vectors :math:`\Omega`, orthonormal, random or from the matrix before.
      rank: How many pairs to return, less than their number; static.

    Returns:
      The pairs, and the orthonormalized products as the next start.

    Example:
      >>> matrix = jnp.diag(jnp.array([9.0, -4.0, 0.0, 0.0]))
      >>> start = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (4, 3)))[0].T
      >>> solution = single_pass(without_samples(lambda stack: stack @ matrix), start, 2)
      >>> solution.pairs.values.round(3).tolist(), int(solution.products)
      ([9.0, -4.0], 3)

    Source: Halko, Martinsson, Tropp (2011), section 5.5.
    """
    images = product(start)
    square = gram(images.vectors, images.vectors)
    after = orthonormalize(images.vectors)
    # The leading singular vectors of the images, in the coordinates of their basis.
    inside = replicate(gram(after, images.vectors))
    leading = jnp.linalg.eigh(matmul(inside, inside.T))[1].T[::-1][:rank]
    left = matmul(leading, replicate(gram(after, start)))
    right = matmul(leading, inside)
    values, rows = ritz_coefficients(matmul(right, jnp.linalg.pinv(left)))
    rows = matmul(rows, leading)
    kept = keep_significant(values, rows, images.samples, None)
    pairs = eigenpairs(values, rows, kept, after)
    count = jnp.asarray(stack_size(start), jnp.int32)
    return Solution(pairs, after, count, jnp.isfinite(jnp.sum(square)))
