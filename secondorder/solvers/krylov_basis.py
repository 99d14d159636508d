r"""Orthonormal bases of Krylov spaces, and a matrix restricted to them.

The space of :math:`v, M^{-1} A v, (M^{-1} A)^2 v, \dots` holds what conjugate gradients would find
in as many products, preconditioned by ``M``. A basis of it costs the memory of its vectors; what
it buys is that anything can be minimized over it, not only a quadratic model, and that float32
does not lose its orthogonality.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from secondorder.checks import check_static_count
from secondorder.sharding import replicate, replicated_zeros
from secondorder.tree import accumulation_dtype, combine, inner, project, write, zeros_stack

_ROUNDINGS = 10  # what is left of a unit vector, at most, if it was in the span of the others


class KrylovBasis(NamedTuple):
    r"""An orthonormal basis of ``k`` vectors, and a matrix restricted to their span.

    Attributes:
      vectors: The rows of ``V``, a stack of pytrees ``(k, *shape)``. A vector that would bring
        nothing new is zero.
      projected: :math:`V A V^\top`, array ``(k, k)``, symmetric; zero in rows of vectors that are.
      used: Vectors that are not zero, booleans ``(k,)``.
      finite: Whether every product was finite. A vector whose product was not is left out, and
        those that would follow from it.
    """

    vectors: chex.ArrayTree
    projected: jax.Array
    used: jax.Array
    finite: jax.Array


class _State(NamedTuple):
    """The basis so far, and what may become its next vector."""

    vectors: chex.ArrayTree
    projected: jax.Array
    used: jax.Array
    finite: jax.Array
    candidate: chex.ArrayTree


def krylov_basis(
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    start: chex.ArrayTree,
    size: int,
    *,
    preconditioner: chex.ArrayTree | None = None,
    extra: chex.ArrayTree | None = None,
) -> KrylovBasis:
    r"""Builds an orthonormal basis of a Krylov space by Arnoldi's process.

    .. math:: \mathrm{span}\{M^{-1} v, M^{-1} A M^{-1} v, \dots, (M^{-1} A)^{k-1} M^{-1} v\}

    Each vector is orthogonalized against all others twice, which is enough for full accuracy.

    Args:
      product: Maps a pytree like ``start`` to its product with a symmetric matrix ``A``; called
        once per vector of the basis.
      start: ``v``, such as the gradient; a pytree of arrays, float32 or wider.
      size: Dimension of the space, at least 1; static.
      preconditioner: A positive diagonal ``M``, a pytree like ``start``, or None.
      extra: One more vector for the basis, such as the last step, or None.

    Returns:
      The basis, of ``size`` vectors, or ``size + 1`` with ``extra``, which is the last one.

    Raises:
      ValueError: If ``size`` is not an integer of at least 1.

    Example:
      >>> basis = krylov_basis(lambda v: jnp.array([1.0, 2.0]) * v, jnp.array([3.0, 3.0]), 3)
      >>> basis.used.tolist()
      [True, True, False]
      >>> jnp.rint(2 * basis.projected).tolist()
      [[3.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]]

    Source: Vinyals, Povey (2012), Krylov subspace descent for deep learning, algorithm 1; Giraud,
    Langou, Rozložník, van den Eshof (2005), Numerische Mathematik 101, on two passes.
    """
    check_static_count("size", size)
    rows = size if extra is None else size + 1

    def precondition(vector: chex.ArrayTree) -> chex.ArrayTree:
        if preconditioner is None:
            return vector
        return jax.tree.map(lambda v, m: (v / m).astype(v.dtype), vector, preconditioner)

    def extend(index: jax.Array, state: _State) -> _State:
        vector = _orthonormalized(state.vectors, state.candidate)
        image = product(vector)
        finite = jnp.isfinite(inner(image, image))
        vector, image = _zero_unless(finite, vector), _zero_unless(finite, image)
        stack = write(state.vectors, index, vector)
        # Rows that are not written yet are zero, and get their products when they are.
        column = project(stack, [image])[:, 0]
        candidate = precondition(image)
        if extra is not None:
            candidate = _choose(index + 1 == size, extra, candidate)
        return _State(
            vectors=stack,
            projected=_write_symmetric(state.projected, index, column),
            used=state.used | (jnp.arange(rows) == index) & (inner(vector, vector) > 0),
            finite=state.finite & finite,
            candidate=candidate,
        )

    dtype = accumulation_dtype(start)
    first = _State(
        vectors=zeros_stack(start, rows, dtype),
        projected=replicated_zeros((rows, rows), dtype),
        used=replicated_zeros((rows,), bool),
        finite=jnp.ones((), bool),
        candidate=precondition(start),
    )
    last = jax.lax.fori_loop(0, rows, extend, first)
    return KrylovBasis(last.vectors, last.projected, last.used, last.finite)


def whitening(projected: jax.Array, floor: chex.Numeric) -> tuple[jax.Array, jax.Array]:
    r"""Coordinates in which a restricted matrix is the identity.

    With :math:`V A V^\top = Q \Lambda Q^\top`,

    .. math::
      T = Q\, \max(\Lambda, \phi \max_i |\lambda_i|)^{-1/2}, \qquad
      T^\top (V A V^\top)\, T = I

    but for eigenvalues below the floor, negative ones among them.

    Args:
      projected: :math:`V A V^\top`, array ``(k, k)``, symmetric and finite.
      floor: :math:`\phi`, in (0, 1].

    Returns:
      ``T``, array ``(k, k)``, from the new coordinates to the old; and the eigenvalues ``(k,)``
      before the floor, ascending. ``T`` is the identity if the matrix is zero.

    Example:
      >>> transform, values = whitening(jnp.diag(jnp.array([4.0, -100.0])), 1e-2)
      >>> jnp.abs(transform).tolist(), values.tolist()
      ([[0.0, 0.5], [1.0, 0.0]], [-100.0, 4.0])

    Source: Vinyals, Povey (2012), section 3.
    """
    values, basis = jnp.linalg.eigh(replicate(projected))
    largest = jnp.max(jnp.abs(values))
    floored = jnp.maximum(values, floor * largest).astype(values.dtype)
    lengths = jax.lax.rsqrt(jnp.where(largest > 0, floored, 1))
    return basis * lengths, values


def _orthonormalized(stack: chex.ArrayTree, vector: chex.ArrayTree) -> chex.ArrayTree:
    """What a vector adds to the span of others, of length one; zero if that is only rounding."""
    size = jnp.sqrt(inner(vector, vector))
    usable = jnp.isfinite(size) & (size > 0)
    vector = _scaled(jnp.where(usable, 1 / jnp.where(usable, size, 1), 0), vector)
    vector = _zero_unless(usable, vector)
    for _ in range(2):
        inside = combine(project(stack, [vector])[:, 0], stack)
        vector = jax.tree.map(lambda v, w: v - w.astype(v.dtype), vector, inside)
    rest = jnp.sqrt(inner(vector, vector))
    is_new = rest > _ROUNDINGS * float(np.finfo(rest.dtype).eps)
    return _scaled(jnp.where(is_new, 1 / jnp.where(is_new, rest, 1), 0), vector)


def _write_symmetric(matrix: jax.Array, index: jax.Array, column: jax.Array) -> jax.Array:
    """Replaces one row and the same column."""
    column = replicate(column)
    here = jnp.arange(len(matrix)) == index
    return jnp.where(here[:, None], column, jnp.where(here, column[:, None], matrix))


def _scaled(factor: jax.Array, vector: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda v: (factor * v).astype(v.dtype), vector)


def _zero_unless(condition: jax.Array, vector: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda v: jnp.where(condition, v, jnp.zeros_like(v)), vector)


def _choose(condition: jax.Array, one: chex.ArrayTree, other: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a.astype(b.dtype), b), one, other)
