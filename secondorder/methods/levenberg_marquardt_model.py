r"""One trial step of Levenberg-Marquardt: the damped systems of blocks, and their joint step.

A block is solved by itself: its objective is that of the parameters with all others held. The whole
is a single block, blocks that move at once are several, and blocks in turn are one at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder import tree as vectors
from secondorder.checks import is_zero
from secondorder.control import optimal_rate
from secondorder.methods.terminal import Point
from secondorder.objective import all_finite, reparametrize
from secondorder.operators import LinearOperator, gauss_newton, gauss_newton_diagonal
from secondorder.products import matmul
from secondorder.sharding import replicate, shard_like
from secondorder.solvers import conjugate_gradient
from secondorder.solvers.quadratic import positive_or_one
from secondorder.tree import Blocks

Scaling: TypeAlias = Literal["identity", "diagonal", "running_diagonal"]
SolverKind: TypeAlias = Literal["dense", "conjugate_gradient"]
StepKind: TypeAlias = Literal["optimal", "full"]
Part: TypeAlias = list[jax.Array]  # the leaves of one block


class SystemSettings(NamedTuple):
    """How the systems are made and solved; see `levenberg_marquardt`."""

    relative: bool
    scaling: Scaling
    solver: SolverKind
    tolerance: chex.Numeric
    max_iterations: int
    step: StepKind
    diagonal_probes: int
    weight_decay: chex.Numeric
    seed: int


class Measures(NamedTuple):
    """What is measured of the curvature, for the damping.

    Attributes:
      scale: Unit of a relative damping of each block (L,); 0 where it is still to be measured.
      diagonal: The largest diagonal of the curvature so far, a pytree like the parameters, or None.
    """

    scale: jax.Array
    diagonal: chex.ArrayTree | None


class TrialStep(NamedTuple):
    r"""A step and what the model promises of it.

    Attributes:
      direction: ``h``, a pytree like the parameters, float32 or wider; zero in blocks at rest.
      rate: The step is ``rate * h``.
      predicted: Reduction by the step of the model without damping.
      iterations: Of conjugate gradients, the most of any block; 0 for direct solutions.
      solved: Whether the systems could be solved; otherwise ``h`` is zero in some block.
      measures: The new measures.
    """

    direction: chex.ArrayTree
    rate: jax.Array
    predicted: jax.Array
    iterations: jax.Array
    solved: jax.Array
    measures: Measures


class _System(NamedTuple):
    r"""The system :math:`(B + \mu D) h = -g` of a block.

    Attributes:
      matrix: ``B``.
      dense: ``B`` as an array, or None.
      gradient: ``g``.
      damping: :math:`\mu`.
      metric: The diagonal of ``D``, or None for the identity.
    """

    matrix: LinearOperator
    dense: jax.Array | None
    gradient: Part
    damping: jax.Array
    metric: Part | None


class _Solution(NamedTuple):
    r"""The solution of the system of a block.

    Attributes:
      step: ``h``; zero if it is not finite.
      slope: :math:`g^\top h`.
      model: :math:`g^\top h + \tfrac12 h^\top (B + \mu D) h`.
      damped: :math:`\mu h^\top D h`.
      iterations: Of conjugate gradients, int32.
      solved: Whether it is finite.
    """

    step: Part
    slope: jax.Array
    model: jax.Array
    damped: jax.Array
    iterations: jax.Array
    solved: jax.Array


def propose(
    settings: SystemSettings,
    objective: Any,
    point: Point,
    blocks: Blocks,
    turn: Sequence[int],
    damping: jax.Array,
    measures: Measures,
    count: jax.Array,
) -> TrialStep:
    r"""Solves the systems of some blocks, and puts their steps together.

    The curvature between blocks is in none of the systems, so that their joint step would be too
    long: it is scaled by :math:`\alpha^* = -g^\top h / h^\top (G + \mu D) h`, with the whole
    matrix, unless the settings ask for the full step.

    Args:
      settings: How.
      objective: The split objective of the curvature batch.
      point: Where.
      blocks: The partition of the parameters, of ``L`` blocks.
      turn: The blocks that move; static.
      damping: Of the systems, in the unit of each block; a scalar.
      measures: What was measured before.
      count: Number of the update, for random probes.

    Returns:
      The trial step.
    """
    solutions: list[_Solution] = []
    for block in turn:
        system, measures = _make_system(
            settings, objective, point, blocks, block, damping, measures, count
        )
        solutions.append(_solve(settings, system))
    direction = _assemble(point.params, blocks, turn, [each.step for each in solutions])
    slope = _total([each.slope for each in solutions])
    damped = _total([each.damped for each in solutions])
    # Blocks are taken for independent here; of exact solutions it is `h'(μDh - g)/2`.
    rate, predicted = jnp.ones_like(slope), damped / 2 - _total([each.model for each in solutions])
    if len(turn) > 1 and settings.step == "optimal":
        curvature = _curvature_along(settings, objective, point.params, direction)
        rate = optimal_rate(slope, curvature + damped)
        predicted = -rate * slope - rate**2 * curvature / 2
    iterations = jnp.max(jnp.stack([each.iterations for each in solutions]))
    solved = jnp.all(jnp.stack([each.solved for each in solutions]))
    return TrialStep(direction, rate, predicted, iterations, solved, measures)


def _make_system(
    settings: SystemSettings,
    objective: Any,
    point: Point,
    blocks: Blocks,
    block: int,
    damping: jax.Array,
    measures: Measures,
    count: jax.Array,
) -> tuple[_System, Measures]:
    """The system of a block, and the measures with what its curvature tells."""
    indices = blocks.leaves_of(block)
    params = _part(point.params, indices)
    held = reparametrize(objective, vectors.embedding(point.params, indices))
    matrix = _matrix(settings, held, params)
    gradient = jax.tree.map(
        lambda g, v: g.astype(v.dtype), _part(point.gradient, indices), matrix.like
    )
    dense = _as_array(matrix, params) if settings.solver == "dense" else None

    def measure_diagonal() -> Part:
        if dense is not None:
            return _unflatten(jnp.diagonal(dense), params, matrix.like)
        key = jax.random.fold_in(jax.random.key(settings.seed), count)
        estimate: Part = gauss_newton_diagonal(held, params, key, settings.diagonal_probes)
        return [d + settings.weight_decay for d in estimate]

    if settings.scaling != "identity":
        diagonal = measure_diagonal()
        if measures.diagonal is not None:
            diagonal = _largest_so_far(_part(measures.diagonal, indices), diagonal)
            measures = measures._replace(diagonal=_put(measures.diagonal, indices, diagonal))
        return _System(matrix, dense, gradient, damping, _positive(diagonal)), measures

    def measure_scale() -> jax.Array:
        if dense is not None:
            return jnp.max(jnp.diagonal(dense))
        square = vectors.inner(gradient, gradient)
        return vectors.inner(gradient, matrix(gradient)) / positive_or_one(square)

    if not settings.relative:
        return _System(matrix, dense, gradient, damping, None), measures
    scale = _measure_once(measures.scale[block], measure_scale)
    scales = [scale if b == block else measures.scale[b] for b in range(len(blocks))]
    measures = measures._replace(scale=jnp.stack(scales))
    return _System(matrix, dense, gradient, damping * positive_or_one(scale), None), measures


def _matrix(settings: SystemSettings, objective: Any, params: chex.ArrayTree) -> LinearOperator:
    """The curvature of the model: Gauss-Newton, and that of the weight decay."""
    with jax.named_scope("curvature"):
        matrix = gauss_newton(objective, params)
    return matrix if is_zero(settings.weight_decay) else matrix.damped(settings.weight_decay)


def _curvature_along(
    settings: SystemSettings, objective: Any, params: chex.ArrayTree, direction: chex.ArrayTree
) -> jax.Array:
    return vectors.inner(direction, _matrix(settings, objective, params)(direction))


def _measure_once(scale: jax.Array, measure: Callable[[], jax.Array]) -> jax.Array:
    """The scale; measured if it is not known yet, and left unknown by what is not finite."""

    def measured() -> jax.Array:
        found = measure().astype(scale.dtype)
        return jnp.where(jnp.isfinite(found) & (found > 0), found, 0)

    return jax.lax.cond(scale > 0, lambda: scale, measured)


def _largest_so_far(seen: Part, diagonal: Part) -> Part:
    return [
        jnp.where(jnp.isfinite(d), jnp.maximum(s, d), s).astype(s.dtype)
        for s, d in zip(seen, diagonal, strict=True)
    ]


def _positive(diagonal: Part) -> Part:
    """Replaces zeros, of parameters without influence, by the largest element."""
    largest = positive_or_one(jnp.max(jnp.stack([jnp.max(d, initial=0) for d in diagonal])))
    return [jnp.where(d > 0, d, largest.astype(d.dtype)) for d in diagonal]


# Solutions.


def _solve(settings: SystemSettings, system: _System) -> _Solution:
    with jax.named_scope("solve"):
        if system.dense is not None:
            return _solve_densely(system, system.dense)
        return _solve_by_products(settings, system)


def _solve_densely(system: _System, matrix: jax.Array) -> _Solution:
    """By Cholesky factors; what is not positive definite to rounding gives numbers not finite."""
    gradient = _flatten(system.gradient, matrix.dtype)
    if system.metric is None:
        metric = jnp.ones_like(gradient)
    else:
        metric = _flatten(system.metric, matrix.dtype)
    damping = system.damping.astype(matrix.dtype)
    factor = jax.scipy.linalg.cho_factor(matrix + jnp.diag(damping * metric))
    step = -jax.scipy.linalg.cho_solve(factor, gradient)
    solved = all_finite(step)
    step = jnp.where(solved, step, 0)
    slope = matmul(gradient, step)
    return _Solution(
        step=_unflatten(step, system.gradient, system.matrix.like),
        slope=slope,
        model=slope / 2,
        damped=damping * matmul(step, metric * step),
        iterations=jnp.zeros((), jnp.int32),
        solved=solved,
    )


def _solve_by_products(settings: SystemSettings, system: _System) -> _Solution:
    """By conjugate gradients; where the metric is a diagonal, it preconditions as well."""
    weights = None
    if system.metric is None:
        matrix = system.matrix.damped(system.damping)
    else:
        weights = [(system.damping * m).astype(m.dtype) for m in system.metric]
        matrix = system.matrix.plus_diagonal(weights)
    result = conjugate_gradient(
        matrix,
        jax.tree.map(jnp.negative, system.gradient),
        vectors.one_block(system.gradient),
        preconditioner=system.metric,
        max_iterations=settings.max_iterations,
        progress=None,
        residual=settings.tolerance,
    )
    step = result.solution
    square = vectors.inner(step, step)
    if weights is None:
        damped = system.damping * square
    else:
        damped = vectors.inner(step, [w * h for w, h in zip(weights, step, strict=True)])
    return _Solution(
        step=step,
        slope=vectors.inner(system.gradient, step),
        model=result.model[0],
        damped=damped,
        iterations=result.iterations[0],
        solved=result.finite[0] & jnp.isfinite(damped),
    )


# Blocks of leaves, as lists and as one array.


def _part(tree: chex.ArrayTree, indices: Sequence[int]) -> Part:
    leaves = jax.tree.leaves(tree)
    return [leaves[index] for index in indices]


def _put(tree: chex.ArrayTree, indices: Sequence[int], part: Part) -> chex.ArrayTree:
    leaves, structure = jax.tree.flatten(tree)
    for index, leaf in zip(indices, part, strict=True):
        leaves[index] = leaf
    return jax.tree.unflatten(structure, leaves)


def _assemble(
    params: chex.ArrayTree, blocks: Blocks, turn: Sequence[int], steps: Sequence[Part]
) -> chex.ArrayTree:
    """The joint step, zero in the blocks at rest."""
    direction = zeros = vectors.zeros_vector(params)
    for block, step in zip(turn, steps, strict=True):
        direction = _put(direction, blocks.leaves_of(block), step)
    return jax.tree.map(lambda h, zero: shard_like(h.astype(zero.dtype), zero), direction, zeros)


def _as_array(matrix: LinearOperator, params: Part) -> jax.Array:
    """The dense matrix, on every device of an Explicit mesh."""

    def product(part: Part) -> Part:
        image = matrix([shard_like(v, p) for v, p in zip(part, params, strict=True)])
        return [replicate(leaf) for leaf in image]

    return LinearOperator(product, matrix.like).as_matrix()


def _flatten(part: Part, dtype: Any) -> jax.Array:
    return jnp.concatenate([jnp.ravel(replicate(leaf)).astype(dtype) for leaf in part])


def _unflatten(vector: jax.Array, params: Part, like: chex.ArrayTree) -> Part:
    """The inverse of `_flatten`, sharded as the parameters."""
    part, start = [], 0
    for p, v in zip(params, like, strict=True):
        leaf = vector[start : start + v.size].reshape(v.shape).astype(v.dtype)
        part.append(shard_like(leaf, p))
        start += v.size
    return part


def _total(terms: Sequence[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(terms))
