r"""Inverse roots :math:`(M + \epsilon\, \mathrm{tr} M\, I)^{-1/p}` of stacked second moments.

The damping is relative to the trace, which is at least the largest eigenvalue and cannot be lost to
rounding. A matrix of zeros, of a parameter that no gradient has reached, has the identity as root.
"""

from typing import Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder.products import map_matrices, matmul

RootSolver: TypeAlias = Literal["eigh", "newton"]

_MORE_DAMPING = 1e3
_MAX_ITERATIONS = 100
_CONVERGING = 0.1  # below it the error is squared by every iteration


def _normalize(
    matrices: jax.Array, order: chex.Numeric, eps: chex.Numeric
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Matrices of trace one, multiples of the identity to add, and the scales of their roots."""
    trace = jnp.trace(matrices, axis1=1, axis2=2)[:, None, None]
    is_zero = trace <= jnp.finfo(matrices.dtype).tiny  # type: ignore[no-untyped-call]
    unit = jnp.where(is_zero, 1, trace)
    shift = jnp.where(is_zero, 1, jnp.asarray(eps, matrices.dtype))
    return matrices / unit, shift, unit ** (-1 / jnp.asarray(order, matrices.dtype))


def eigh_roots(matrices: jax.Array, order: chex.Numeric, eps: chex.Numeric) -> jax.Array:
    r"""Inverse roots from eigenvalues and eigenvectors.

    Args:
      matrices: :math:`M`, symmetric positive semidefinite, (S, n, n), float32 or wider.
      order: :math:`p > 0`.
      eps: :math:`\epsilon > 0`, relative damping.

    Returns:
      :math:`(M + \epsilon\, \mathrm{tr} M\, I)^{-1/p}`, (S, n, n); not finite where no
      decomposition was found.

    Example:
      >>> matrices = jnp.diag(jnp.array([15.0, 1.0]) / 16)[None]
      >>> jnp.diagonal(eigh_roots(matrices, 3, 1 / 16)[0]).round(3).tolist()
      [1.0, 2.0]
    """
    matrices, shift, scale = _normalize(matrices, order, eps)
    values, vectors = map_matrices(jnp.linalg.eigh, matrices)
    damped = jnp.maximum(values, 0)[:, None, :] + shift
    powers = damped ** (-1 / jnp.asarray(order, matrices.dtype))
    return scale * matmul(vectors * powers, jnp.swapaxes(vectors, 1, 2))


class _Newton(NamedTuple):
    """Iterates of a stack: ``X``, ``Y``, the error ``|Y - I|``, and the ``X`` before it grew."""

    count: jax.Array  # type: ignore[assignment]
    x: jax.Array
    y: jax.Array
    error: jax.Array
    active: jax.Array
    best: jax.Array


def newton_roots(matrices: jax.Array, order: int, eps: chex.Numeric) -> jax.Array:
    r"""Inverse roots by the coupled Newton iteration, which is products of matrices alone.

    From :math:`X_0 = c^{1/p} I` and :math:`Y_0 = c M`,

    .. math:: T_k = \frac{(p + 1) I - Y_k}{p}, \qquad X_{k+1} = X_k T_k, \qquad
      Y_{k+1} = T_k^p Y_k,

    so that :math:`X_k \to M^{-1/p}` as :math:`Y_k \to I`; with
    :math:`c = (p + 1) / (2 \|M\|_F)` it converges for every positive definite matrix.

    Args:
      matrices: :math:`M` before damping, symmetric positive semidefinite, (S, n, n).
      order: :math:`p`, a positive integer. Static.
      eps: :math:`\epsilon > 0`, relative damping.

    Returns:
      :math:`(M + \epsilon\, \mathrm{tr} M\, I)^{-1/p}`, (S, n, n); not finite where it did not
      converge.

    Example:
      >>> matrices = jnp.diag(jnp.array([15.0, 1.0]) / 16)[None]
      >>> jnp.diagonal(newton_roots(matrices, 3, 1 / 16)[0]).round(3).tolist()
      [1.0, 2.0]

    Source: Guo, Higham (2006), A Schur-Newton method for the matrix pth root and its inverse,
    equation (3.3); Anil et al. (2020), arXiv 2002.09018, appendix.
    """
    normalized, shift, scale = _normalize(matrices, order, eps)
    identity = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    damped = normalized + shift * identity
    c = (order + 1) / (2 * jnp.sqrt(jnp.sum(damped**2, axis=(1, 2), keepdims=True)))
    first = identity * c ** (1 / order)
    start = _Newton(
        count=jnp.zeros((), jnp.int32),
        x=first,
        y=c * damped,
        error=jnp.full(len(matrices), jnp.inf, matrices.dtype),
        active=jnp.full(len(matrices), True),
        best=first,
    )
    tolerance = jnp.finfo(matrices.dtype).eps  # type: ignore[no-untyped-call]

    def goes_on(now: _Newton) -> jax.Array:
        return jnp.any(now.active) & (now.count < _MAX_ITERATIONS)

    def iterate(now: _Newton) -> _Newton:
        t = ((order + 1) * identity - now.y) / order
        x, y = matmul(now.x, t), matmul(_power(t, order), now.y)
        error = jnp.max(jnp.abs(y - identity), axis=(1, 2))
        # Errors shrink slowly, then are squared; where they are no longer, they are roundings.
        active = (error > tolerance) & ((error < now.error / 2) | (now.error > _CONVERGING))
        best = jnp.where((error <= now.error)[:, None, None], x, now.best)
        return _Newton(now.count + 1, x, y, error, active, best)

    last = jax.lax.while_loop(goes_on, iterate, start)
    return jnp.where((last.error < _CONVERGING)[:, None, None], scale * last.best, jnp.nan)


def _power(matrices: jax.Array, exponent: int) -> jax.Array:
    """A positive integer power by squaring."""
    half, odd = divmod(exponent, 2)
    if half == 0:
        return matrices
    root = _power(matrices, half)
    square = matmul(root, root)
    return matmul(square, matrices) if odd else square


def inverse_roots(
    matrices: jax.Array,
    previous: jax.Array,
    order: chex.Numeric,
    eps: chex.Numeric,
    solver: RootSolver = "eigh",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Inverse roots, or the previous ones where there are none.

    Where Newton's iteration fails it is tried once more with a thousand times the damping.

    Args:
      matrices: :math:`M`, symmetric positive semidefinite, (S, n, n), float32 or wider.
      previous: Roots so far, (S, n, n).
      order: :math:`p > 0`; a Python integer for ``"newton"``.
      eps: :math:`\epsilon > 0`, relative damping.
      solver: `eigh_roots` or `newton_roots`. Static.

    Returns:
      The roots, finite if the previous ones were; which of them are the previous ones, (S,); and
      which were found with more damping only, (S,).

    Example:
      >>> matrices = jnp.array([[[jnp.nan]], [[4.0]]])
      >>> roots, failed, retried = inverse_roots(matrices, jnp.ones((2, 1, 1)), 2, 1e-6)
      >>> roots.round(3).ravel().tolist(), failed.tolist(), retried.tolist()
      ([1.0, 0.5], [True, False], [False, False])
    """
    if solver == "eigh":
        roots = eigh_roots(matrices, order, eps)
        at_once = finite_matrices(roots)
    else:
        assert isinstance(order, int)
        roots = newton_roots(matrices, order, eps)
        at_once = finite_matrices(roots)

        def again(roots: jax.Array) -> jax.Array:
            damped = newton_roots(matrices, order, _MORE_DAMPING * eps)
            return jnp.where(at_once[:, None, None], roots, damped)

        roots = jax.lax.cond(jnp.all(at_once), lambda roots: roots, again, roots)
    found = finite_matrices(roots)
    return jnp.where(found[:, None, None], roots, previous), ~found, found & ~at_once


def finite_matrices(stack: jax.Array) -> jax.Array:
    """Which matrices of a stack are finite.

    Args:
      stack: (S, n, n).

    Returns:
      Booleans (S,).

    Example:
      >>> finite_matrices(jnp.array([[[1.0]], [[jnp.nan]]])).tolist()
      [True, False]
    """
    return jnp.isfinite(jnp.sum(stack, axis=(1, 2)))
