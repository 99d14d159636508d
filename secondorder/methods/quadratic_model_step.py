"""The step of `scale_by_quadratic_model`: rates of parts, the minimizer on a plane, clipped."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from secondorder import tree as vectors
from secondorder.control import minimize_on_plane, part_rates
from secondorder.operators import block_gauss_newton_forms
from secondorder.sharding import shard_like
from secondorder.tree import Blocks


class Plane(NamedTuple):
    """The plane of the direction and the last step, or the line of the direction.

    Attributes:
      basis: One or two vectors.
      scales: What they are multiplied by ``(2,)``, powers of two, so that squares stay in range.
    """

    basis: tuple[chex.ArrayTree, ...]
    scales: jax.Array

    def scaled(self) -> tuple[chex.ArrayTree, ...]:
        """The vectors times their scales, to be fused into what reads them."""
        return tuple(
            jax.tree.map(lambda leaf, s=s: s * leaf, v)
            for v, s in zip(self.basis, self.scales, strict=False)
        )


class Step(NamedTuple):
    """A step on the plane, by numbers alone.

    Attributes:
      coefficients: Of both vectors times their scales ``(2,)``.
      slope: Its product with the gradient.
      curvature: Its value of the Gauss-Newton matrix.
      square: Its squared length.
    """

    coefficients: jax.Array
    slope: jax.Array
    curvature: jax.Array
    square: jax.Array

    def times(self, factor: jax.Array) -> "Step":
        """The step times a number."""
        linear, quadratic = factor, factor**2
        return Step(
            linear * self.coefficients,
            linear * self.slope,
            quadratic * self.curvature,
            quadratic * self.square,
        )


def rates_of_parts(
    blocks: Blocks,
    objective: Any,
    params: chex.ArrayTree,
    gradient: chex.ArrayTree,
    direction: chex.ArrayTree,
    shift: jax.Array,
) -> jax.Array:
    """The rates of the parts of a direction of any length; see `part_rates`.

    Args:
      blocks: The parts, ``L`` of them.
      objective: A split objective.
      params: The parameters.
      gradient: The gradient.
      direction: The direction.
      shift: Damping and weight decay.

    Returns:
      The rates ``(L,)``.
    """
    with jax.named_scope("part_rates"):
        scale = vectors.unit_scale(direction)
        unit = jax.tree.map(lambda leaf: scale * leaf, direction)
        matrix = block_gauss_newton_forms(objective, params, blocks)(unit)
        squares = vectors.block_inner(blocks, unit, unit)
        slopes = vectors.block_inner(blocks, gradient, unit)
        return part_rates(slopes, matrix + shift * jnp.diag(squares))


def plane_of(direction: chex.ArrayTree, last_step: chex.ArrayTree | None) -> Plane:
    """The plane of a direction of any length, and the last step, which has that of a step.

    Args:
      direction: A pytree of arrays.
      last_step: Another; or None.

    Returns:
      The plane; its scales are NaN if the direction is not finite.
    """
    scale = vectors.unit_scale(direction)
    basis = (direction,) if last_step is None else (direction, last_step)
    return Plane(basis, jnp.stack([scale, jnp.ones_like(scale)]))


def minimize(
    forms: Callable[..., jax.Array],
    gradient: chex.ArrayTree,
    plane: Plane,
    shift: jax.Array,
    last: jax.Array,
    plane_is_due: jax.Array | None,
) -> tuple[Step, jax.Array]:
    """The minimizer of the damped model on the plane, or on the line of the last proportions.

    Args:
      forms: Values of the Gauss-Newton matrix, from `gauss_newton_forms`.
      gradient: The gradient.
      plane: The plane.
      shift: Damping and weight decay.
      last: The coefficients of the last step, in the scales of this plane ``(2,)``.
      plane_is_due: Whether both coefficients are chosen; None if they always are.

    Returns:
      The step; and the value of the Gauss-Newton matrix for the last step: NaN on a line, and of no
      meaning without a last step.
    """
    scaled = plane.scaled()
    slopes = jnp.stack([vectors.inner(gradient, v) for v in scaled])
    gram = _symmetric(
        [[vectors.inner(v, w) for w in scaled[: i + 1]] for i, v in enumerate(scaled)]
    )
    # Without a last step its row and column are zero, as they are before the first step.
    missing = 2 - len(scaled)
    slopes, gram = jnp.pad(slopes, (0, missing)), jnp.pad(gram, (0, missing))

    def on_plane(_: jax.Array) -> tuple[Step, jax.Array]:
        found = forms(plane.basis, plane.scales[: len(scaled)])
        curvature = jnp.pad(found, (0, missing))
        best = minimize_on_plane(slopes, curvature + shift * gram)
        step = Step(best, _dot(slopes, best), _form(curvature, best), _form(gram, best))
        return step, curvature[1, 1]

    def on_line(last: jax.Array) -> tuple[Step, jax.Array]:
        known = last[0] != 0
        share = jnp.where(known, last[1] / jnp.where(known, last[0], 1), 0)
        line = jnp.stack([jnp.ones_like(share), share])
        curvature = forms([combine(line, plane, plane.basis[0])])[0, 0]
        unit = Step(line, _dot(slopes, line), curvature, _form(gram, line))
        damped = unit.curvature + shift * unit.square
        rate, _ = minimize_on_plane(jnp.pad(unit.slope[None], (0, 1)), _corner(damped))
        return unit.times(rate), jnp.full_like(rate, jnp.nan)

    if plane_is_due is None or missing:
        return on_plane(last)
    return jax.lax.cond(plane_is_due, on_plane, on_line, last)


def clip(
    step: Step, max_norm: chex.Numeric | None, max_divergence: chex.Numeric | None
) -> tuple[Step, jax.Array]:
    """Shortens a step to the limits.

    Args:
      step: The step.
      max_norm: Longest; None for any.
      max_divergence: Largest half of its curvature; None for any.

    Returns:
      The step, and whether it was shortened.
    """
    limits = []
    if max_norm is not None:
        limits.append((step.square, max_norm**2))
    if max_divergence is not None:
        limits.append((step.curvature, 2 * max_divergence))
    factor = jnp.ones_like(step.slope)
    for size, limit in limits:
        factor = jnp.minimum(factor, jnp.sqrt(limit / jnp.maximum(size, limit)))
    return step.times(factor), factor < 1


def combine(coefficients: jax.Array, plane: Plane, like: chex.ArrayTree) -> chex.ArrayTree:
    """A combination of the scaled vectors, typed and sharded like a pytree.

    Args:
      coefficients: Of both ``(2,)``.
      plane: The vectors.
      like: A pytree like them.

    Returns:
      The combination.
    """
    factors = coefficients * plane.scales

    def leaf(like: jax.Array, *leaves: jax.Array) -> jax.Array:
        total = sum(c * v for c, v in zip(factors, leaves, strict=False))
        return shard_like(jnp.asarray(total).astype(like.dtype), like)

    return jax.tree.map(leaf, like, *plane.basis)


def choose(
    moves: jax.Array, step: chex.ArrayTree, undoes: jax.Array, last_step: chex.ArrayTree
) -> chex.ArrayTree:
    """The step, minus the last one, or zero.

    Args:
      moves: Whether it is the step.
      step: The step.
      undoes: Whether it is minus the last one, where it is not the step.
      last_step: The last one.

    Returns:
      The update.
    """

    def leaf(new: jax.Array, last: jax.Array) -> jax.Array:
        return jnp.where(moves, new, jnp.where(undoes, -last, jnp.zeros_like(last)))

    return jax.tree.map(leaf, step, last_step)


def _symmetric(triangle: list[list[jax.Array]]) -> jax.Array:
    """A matrix from the rows of its lower triangle."""
    size = range(len(triangle))
    return jnp.stack([jnp.stack([triangle[max(i, j)][min(i, j)] for j in size]) for i in size])


def _corner(entry: jax.Array) -> jax.Array:
    """The matrix (2, 2) with one entry at its start, and zeros."""
    return jnp.pad(entry[None, None], (0, 1))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b)


def _form(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """``v^T M v``; sums of products, which no accelerator rounds."""
    return jnp.sum(matrix * vector[:, None] * vector[None, :])
