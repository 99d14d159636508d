"""The parts of a step of low-rank saddle-free Newton: eigenpairs, damping, direction, exit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from secondorder import tree as vectors
from secondorder.methods.low_rank_settings import EigenSettings, Spectrum
from secondorder.objective import value_and_aux
from secondorder.operators import hessian_on_stacks
from secondorder.sharding import replicate
from secondorder.solvers import (
    Eigenpairs,
    Solution,
    adaptive_rank,
    block_krylov,
    complete_basis,
    orthonormalize,
    single_pass,
    subspace_iteration,
)


class Direction(NamedTuple):
    """Where to go, before the sign.

    Attributes:
      vector: The preconditioned gradient, a pytree like it.
      damping: What was added to the curvature of all directions.
      clipped: Whether it was shortened.
      decrease: Of the model along it.
    """

    vector: chex.ArrayTree
    damping: jax.Array
    clipped: jax.Array
    decrease: jax.Array


def find_eigenpairs(
    settings: EigenSettings,
    objective: Any,
    params: chex.ArrayTree,
    key: jax.Array,
    basis: chex.ArrayTree | None,
    is_first: jax.Array,
) -> Solution:
    """The eigenpairs of largest magnitude of a Hessian, linearized once for all products.

    Args:
      settings: How.
      objective: Of the curvature batch; `Microbatches` if the settings ask for samples.
      params: The parameters.
      key: A PRNG key.
      basis: What the last refresh left, for warm starts; zero at first.
      is_first: Whether this is the first refresh.

    Returns:
      The eigenpairs, and the next basis.
    """
    product = hessian_on_stacks(
        objective,
        params,
        settings.mode,
        chunk_size=settings.chunk_size,
        with_samples=settings.signal_to_noise is not None,
    )
    if settings.eigensolver == "adaptive":
        return adaptive_rank(
            product,
            params,
            settings.rank,
            key,
            block=settings.block_size,
            tolerance=settings.tolerance,
            noise=settings.signal_to_noise,
        )
    if basis is None:
        start = orthonormalize(vectors.random_stack(key, params, settings.columns(params)))
    else:
        start = complete_basis(basis, key)
    if settings.eigensolver == "single_pass":
        return single_pass(product, start, settings.rank)
    if settings.eigensolver == "block_krylov":
        return block_krylov(product, start, settings.rank, depth=settings.passes)
    passes: chex.Numeric = settings.passes
    if settings.warm_start and settings.initial_passes != settings.passes:
        passes = jnp.where(is_first, settings.initial_passes, settings.passes)
    return subspace_iteration(
        product,
        start,
        settings.rank,
        passes=passes,
        noise=settings.signal_to_noise,
        cleanings=2 if settings.warm_start else 3,
    )


def tied_damping(pairs: Eigenpairs, smallest: chex.Numeric, share: chex.Numeric) -> jax.Array:
    r"""The damping :math:`\max(\gamma, c \min_i |\lambda_i|)` over the eigenpairs that are kept.

    What is not among them has no larger curvature than the smallest that is.

    Args:
      pairs: The eigenpairs.
      smallest: :math:`\gamma`.
      share: ``c``; with 0 the damping is fixed.

    Returns:
      A scalar.
    """
    magnitudes = jnp.where(pairs.kept, jnp.abs(pairs.values), jnp.inf)
    least = jnp.min(magnitudes)
    least = jnp.where(jnp.isfinite(least), least, 0)
    return jnp.maximum(smallest, share * least).astype(pairs.values.dtype)


def precondition(
    pairs: Eigenpairs,
    gradient: chex.ArrayTree,
    damping: jax.Array,
    spectrum: Spectrum,
    max_norm: chex.Numeric | None,
) -> Direction:
    r"""The inverse of a matrix of low rank plus a damping, times the gradient.

    .. math::
      d = U \,\mathrm{diag}\Big(\frac{1}{c_i + \gamma}\Big)\, U^\top g
        + \frac{1}{\gamma} (I - U U^\top)\, g

    which is Woodbury's formula without its cancellation. It is shortened to a length of at most
    ``max_norm``.

    Args:
      pairs: ``U`` and its eigenvalues.
      gradient: ``g``.
      damping: :math:`\gamma`, positive.
      spectrum: What is taken for the curvatures :math:`c_i`.
      max_norm: The largest length, or None.

    Returns:
      The direction.
    """
    curvatures, damping = _positive_curvatures(pairs, damping, spectrum)
    inside = replicate(vectors.project(pairs.vectors, [gradient]))[:, 0]
    rest = _minus(gradient, vectors.combine(inside, pairs.vectors))
    # What rounding has left inside the span would be divided by the damping.
    left = replicate(vectors.project(pairs.vectors, [rest]))[:, 0]
    coefficients = inside / (curvatures + damping) - left / damping
    direction = jax.tree.map(
        lambda r, u: (r / damping + u).astype(r.dtype),
        rest,
        vectors.combine(coefficients, pairs.vectors),
    )
    scale = jnp.ones((), damping.dtype)
    if max_norm is not None:
        norm = jnp.sqrt(vectors.inner(direction, direction))
        scale = jnp.where(norm > max_norm, max_norm / norm, 1).astype(damping.dtype)
        direction = jax.tree.map(lambda d: scale * d, direction)
    decrease = (1 - scale / 2) * vectors.inner(gradient, direction)
    return Direction(direction, damping, scale < 1, decrease)


def way_out(
    pairs: Eigenpairs, gradient: chex.ArrayTree, key: jax.Array, length: chex.Numeric
) -> tuple[chex.ArrayTree, jax.Array]:
    r"""A step along negative curvature, uphill by the gradient, and what it gains.

    Its gain in the model is :math:`-\tfrac12 \lambda \ell^2`. Where gradient and curvature vanish
    it is a random one, and its gain infinite, as nothing else is known.

    Args:
      pairs: The eigenpairs.
      gradient: The gradient.
      key: A PRNG key.
      length: Length of the step, positive.

    Returns:
      The step, and its gain; zero where no curvature is negative.
    """
    lowest = jnp.argmin(pairs.values)
    is_flat = ~jnp.any(pairs.kept) & (vectors.inner(gradient, gradient) == 0)

    def random_direction() -> chex.ArrayTree:
        return orthonormalize(vectors.random_stack(key, gradient, 1))

    def eigenvector() -> chex.ArrayTree:
        return jax.tree.map(
            lambda rows: jnp.expand_dims(rows, 0), vectors.read(pairs.vectors, lowest)
        )

    # Drawn only where there is no eigenvector, which is rare.
    stack = jax.lax.cond(is_flat, random_direction, eigenvector)
    vector = jax.tree.map(lambda rows: rows[0], stack)
    uphill = jnp.where(vectors.inner(vector, gradient) < 0, -length, length)
    gain = -jnp.minimum(pairs.values[lowest], 0) * length**2 / 2
    step = jax.tree.map(lambda v: (uphill * v).astype(v.dtype), vector)
    return step, jnp.where(is_flat, jnp.inf, gain)


def lower_end(
    value_fn: Callable[[Any], Any], params: chex.ArrayTree, step: chex.ArrayTree
) -> tuple[jax.Array, jax.Array]:
    """Which of two opposite steps lowers the objective more.

    Args:
      value_fn: The objective.
      params: Where they start.
      step: One of them, which is subtracted as an update by a direction is.

    Returns:
      1, or -1 for the opposite one; and whether that is lower than the start.
    """
    evaluate = value_and_aux(value_fn)

    def value_at(sign: jax.Array) -> jax.Array:
        moved = jax.tree.map(lambda p, s: (p - sign * s).astype(p.dtype), params, step)
        return evaluate(moved)[0]

    # In a loop, so that the objective is compiled once.
    here, ahead, behind = jax.lax.map(value_at, jnp.array([0, 1, -1], jnp.int32))
    sign = jnp.where(behind < ahead, -1, 1).astype(jnp.int32)
    return sign, jnp.minimum(ahead, behind) < here


def _positive_curvatures(
    pairs: Eigenpairs, damping: jax.Array, spectrum: Spectrum
) -> tuple[jax.Array, jax.Array]:
    """What eigenvalues are taken for, and the damping that goes with it."""
    if spectrum == "absolute":
        return jnp.abs(pairs.values), damping
    if spectrum == "shifted":
        return pairs.values, damping - jnp.minimum(jnp.min(pairs.values), 0)
    assert callable(spectrum)
    return spectrum(pairs.values), damping


def _minus(left: chex.ArrayTree, right: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda a, b: a - b.astype(a.dtype), left, right)
