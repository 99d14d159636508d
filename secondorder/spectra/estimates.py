r"""Trace and diagonal of a curvature matrix, from products with random signs.

With independent signs :math:`z`, :math:`E[z z^\top] = I`, so that :math:`z^\top A z` has the
expectation :math:`\mathrm{tr} A` and :math:`z \circ A z` that of the diagonal.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from secondorder.checks import check_static_count
from secondorder.solvers import LanczosResult, lanczos
from secondorder.spectra.curvature import (
    BlockChoice,
    Curvature,
    Matrix,
    check_key,
    check_steps,
    make_curvature,
)
from secondorder.tree import Blocks, block_combine, block_inner, block_project


class TraceEstimate(NamedTuple):
    """An unbiased estimate of a trace; with ``blocks``, that of every block.

    Attributes:
      value: The estimate, a scalar, or ``(L,)`` for ``L`` blocks.
      error: Its standard error; NaN with one probe.
      size: The number of parameters, so that ``value / size`` is the mean eigenvalue.
      blocks: The partition with its ``names``, or None.
    """

    value: jax.Array
    error: jax.Array
    size: jax.Array
    blocks: Blocks | None


class DiagonalEstimate(NamedTuple):
    """An unbiased estimate of a diagonal.

    Attributes:
      values: The estimate, a pytree like the parameters, float32 or wider.
      errors: The standard error of each element, a pytree like it; NaN with one probe.
    """

    values: chex.ArrayTree
    errors: chex.ArrayTree


def curvature_trace(
    objective: Any,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    *,
    matrix: Matrix = "hessian",
    blocks: BlockChoice = None,
    probes: int = 30,
    deflate: int = 0,
) -> TraceEstimate:
    r"""The trace of the Hessian or Gauss-Newton matrix, by Hutchinson's estimator or Hutch++.

    .. math:: \mathrm{tr} A = \mathrm{tr}\, Q A Q^\top + E[z^\top (I - Q^\top Q) A (I - Q^\top Q) z]

    The rows of ``Q`` are ``deflate`` Lanczos vectors of another random start. They carry the
    outermost eigenvalues, from which most of the variance comes; none at all is Hutchinson's
    estimator.

    Args:
      objective: A function from parameters to a scalar, an `Objective` or `Microbatches`; the
        Gauss-Newton matrix needs one of the last two.
      params: The point, a pytree of real floating-point arrays.
      key: PRNG key of the signs.
      matrix: ``"hessian"`` or ``"gauss_newton"``.
      blocks: None for the whole matrix; or its diagonal blocks, all at once: ``"layers"`` for
        leaves that have the same parent, the result of `find_layers`, a function from the path of
        a leaf to a label, or a pytree of labels.
      probes: Random vectors, a product each; at least 1, static.
      deflate: Rows of ``Q``, a product each and as many vectors in memory; at most the number of
        parameters, static.

    Returns:
      The estimate and its standard error.

    Raises:
      TypeError: If the parameters are not real, the key is none, or the objective is not split.
      ValueError: If a setting is out of range.

    Example:
      >>> import secondorder as so
      >>> scale = jnp.array([1.0, 2.0, 3.0])
      >>> trace = so.curvature_trace(
      ...     lambda p: jnp.sum(scale * p**2) / 2, jnp.ones(3), jax.random.key(0))
      >>> round(float(trace.value), 3), round(float(trace.error), 3)  # as the matrix is diagonal
      (6.0, 0.0)

    Source: Hutchinson (1989), Commun. Stat. Simul. Comput. 18; Meyer, Musco, Musco, Woodruff
    (2021), Hutch++: Optimal stochastic trace estimation; Chen, Hallman (2023), Krylov-aware
    stochastic trace estimation, on a Krylov space for ``Q``.
    """
    caller = "curvature_trace"
    check_key(key, caller)
    check_static_count("probes", probes)
    curvature = make_curvature(caller, objective, params, matrix, blocks)
    partition, known = curvature.blocks, None
    key, start_key = jax.random.split(key)
    if deflate != 0:
        rows = check_steps("deflate", deflate, 1, curvature)
        start = curvature.draw(start_key, "normal")
        known = lanczos(curvature.operator, start, rows, blocks=partition)

    def measure(probe_key: chex.PRNGKey) -> jax.Array:
        signs = curvature.draw(probe_key, "rademacher")
        outside = _outside(curvature, known, signs)
        return block_inner(partition, outside, curvature.operator(outside))

    samples = jax.lax.map(measure, jax.random.split(key, probes))
    value = jnp.mean(samples, axis=0)
    squares = jnp.sum((samples - value) ** 2, axis=0)
    if known is not None:
        value = value + jnp.sum(known.alphas, axis=1)
    return TraceEstimate(
        value=curvature.squeeze(value),
        error=curvature.squeeze(_standard_error(squares, probes)),
        size=curvature.squeeze(jnp.asarray(curvature.sizes, jnp.int32)),
        blocks=curvature.named_blocks,
    )


def curvature_diagonal(
    objective: Any,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    *,
    matrix: Matrix = "hessian",
    blocks: BlockChoice = None,
    probes: int = 30,
) -> DiagonalEstimate:
    r"""The diagonal of the Hessian or Gauss-Newton matrix.

    .. math:: \frac1m \sum_{j=1}^m z_j \circ A z_j, \qquad
        \text{variance } \frac1m \sum_{l \ne i} A_{il}^2 \text{ of element } i

    Args:
      objective: A function from parameters to a scalar, an `Objective` or `Microbatches`; the
        Gauss-Newton matrix needs one of the last two.
      params: The point, a pytree of real floating-point arrays.
      key: PRNG key of the signs.
      matrix: ``"hessian"`` or ``"gauss_newton"``.
      blocks: Products with diagonal blocks only leave out the variance that comes from what is
        beside them: ``"layers"`` for leaves that have the same parent, the result of
        `find_layers`, a function from the path of a leaf to a label, or a pytree of labels; None
        for products with the whole matrix.
      probes: ``m``, a product each; at least 1, static.

    Returns:
      The estimate and its standard error.

    Raises:
      TypeError: If the parameters are not real, the key is none, or the objective is not split.
      ValueError: If a setting is out of range.

    Example:
      >>> import secondorder as so
      >>> scale = jnp.array([1.0, 2.0, 3.0])
      >>> diagonal = so.curvature_diagonal(
      ...     lambda p: jnp.sum(scale * p**2) / 2, jnp.ones(3), jax.random.key(0))
      >>> diagonal.values.tolist()  # exact, as the matrix is diagonal
      [1.0, 2.0, 3.0]

    Source: Bekas, Kokiopoulou, Saad (2007), An estimator for the diagonal of a matrix, Applied
    Numerical Mathematics 57.
    """
    caller = "curvature_diagonal"
    check_key(key, caller)
    check_static_count("probes", probes)
    curvature = make_curvature(caller, objective, params, matrix, blocks)

    def add(
        moments: tuple[chex.ArrayTree, chex.ArrayTree], numbered: tuple[jax.Array, chex.PRNGKey]
    ) -> tuple[tuple[chex.ArrayTree, chex.ArrayTree], None]:
        number, probe_key = numbered
        signs = curvature.draw(probe_key, "rademacher")
        sample = jax.tree.map(jnp.multiply, signs, curvature.operator(signs))
        return _add_sample(moments, sample, number), None

    zeros = jax.tree.map(jnp.zeros_like, curvature.draw(key, "rademacher"))
    numbered = jnp.arange(1, probes + 1), jax.random.split(key, probes)
    (means, squares), _ = jax.lax.scan(add, (zeros, zeros), numbered)
    return DiagonalEstimate(means, jax.tree.map(lambda s: _standard_error(s, probes), squares))


def _outside(
    curvature: Curvature, known: LanczosResult | None, vector: chex.ArrayTree
) -> chex.ArrayTree:
    """What of a vector is orthogonal to the Lanczos vectors."""
    if known is None:
        return vector
    blocks, stack = curvature.blocks, known.vectors
    inside = block_combine(blocks, block_project(blocks, stack, vector), stack)
    return jax.tree.map(jnp.subtract, vector, inside)


def _add_sample(
    moments: tuple[chex.ArrayTree, chex.ArrayTree], sample: chex.ArrayTree, number: jax.Array
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Mean and sum of squared deviations with one more sample, by Welford's recursion."""
    means, squares = moments
    moved = jax.tree.map(lambda m, x: m + (x - m) / number.astype(m.dtype), means, sample)
    grown = jax.tree.map(lambda s, x, m, n: s + (x - m) * (x - n), squares, sample, means, moved)
    return moved, grown


def _standard_error(squares: jax.Array, count: int) -> jax.Array:
    """The standard error of a mean, from the sum of squared deviations; NaN of one sample."""
    if count == 1:
        return jnp.full_like(squares, jnp.nan)
    return jnp.sqrt(squares / (count * (count - 1)))
