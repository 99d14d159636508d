r"""The quadratic model of limited-memory SR1, from a memory of pairs and a gradient.

Vectors of the size of the parameters are touched twice: once for all inner products with the
memory, once to put a step together. Between the two everything is algebra of the size of the
memory. A step is a combination ``p = c S + d Y + b g`` of the stored vectors and the gradient.
"""

from typing import Literal, NamedTuple, TypeAlias, cast, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

from secondorder import solvers
from secondorder import tree as vectors
from secondorder.checks import check_choice, is_number
from secondorder.products import inner, matmul

ScaleSetting: TypeAlias = solvers.ScaleRule | chex.Numeric
ModelKind: TypeAlias = Literal[
    "trust_region", "shape_changing", "cubic", "regularized", "regularised"
]


class SR1Model(NamedTuple):
    """A quadratic model around the present point, and what links it to long vectors.

    Attributes:
      quadratic: The model in the eigenbasis of its matrix.
      matrix: The SR1 matrix ``B``.
      directions: ``E`` with the eigenvectors ``Ψ E``.
      gram: Gram matrix of the stored vectors ``(2 m, 2 m)``, empty slots cleared.
      products: Products of the stored vectors with the gradient ``(2 m,)``, likewise.
      gradient_square: ``|g|^2``.
    """

    quadratic: solvers.QuadraticModel
    matrix: solvers.CompactSR1
    directions: jax.Array
    gram: jax.Array
    products: jax.Array
    gradient_square: jax.Array


class Combination(NamedTuple):
    """A vector as a combination of the stored vectors and the gradient.

    Attributes:
      stored: Coefficients ``(2 m,)``.
      gradient: Coefficient, a scalar.
    """

    stored: jax.Array
    gradient: jax.Array


class Measures(NamedTuple):
    """What the model says of a step: its length in the norm of its region, and its promise."""

    length: jax.Array
    decrease: jax.Array


def build_matrix(
    memory: vectors.PairMemory, scale: ScaleSetting, skip: chex.Numeric
) -> solvers.CompactSR1:
    """The SR1 matrix of a memory.

    Args:
      memory: A memory whose Gram matrix is complete.
      scale: Rule for ``γ``, or its value.
      skip: Threshold of the SR1 denominator.

    Returns:
      The matrix. Without pairs ``γ`` is 0.
    """
    pairs = solvers.pair_gram(memory.gram, memory.numbers)
    if isinstance(scale, str):
        gamma = solvers.initial_scale(pairs, cast(solvers.ScaleRule, scale))
    else:
        known = jnp.any(memory.numbers >= 0)
        gamma = jnp.where(known, jnp.asarray(scale, memory.gram.dtype), 0)
    return solvers.compact_sr1(pairs, gamma, skip)


def curvature_along(
    matrix: solvers.CompactSR1, products: jax.Array, square: jax.Array
) -> jax.Array:
    """The curvature ``pᵀBp`` along a vector.

    Args:
      matrix: The matrix ``B``.
      products: Products of the stored vectors with ``p`` ``(2 m,)``, zero for empty slots.
      square: ``|p|^2``.

    Returns:
      A scalar.
    """
    along = _residual_products(matrix, products)
    return matrix.scale * square + inner(along, matmul(matrix.weights, along))


def build_model(
    memory: vectors.PairMemory,
    products: jax.Array,
    gradient_square: jax.Array,
    scale: ScaleSetting,
    skip: chex.Numeric,
) -> SR1Model:
    """Builds the model from the memory and its products with the gradient.

    Args:
      memory: A memory whose Gram matrix is complete.
      products: Products of its vectors with the gradient ``(2 m,)``.
      gradient_square: ``|g|^2``.
      scale: Rule for ``γ``, or its value.
      skip: Threshold of the SR1 denominator.

    Returns:
      The model. Without pairs ``γ`` is 0: all that is known is the gradient.
    """
    filled = jnp.tile(memory.numbers >= 0, 2)
    products = jnp.where(filled, products.astype(memory.gram.dtype), 0)
    matrix = build_matrix(memory, scale, skip)
    basis = solvers.sr1_eigenbasis(matrix)
    coordinates = matmul(basis.directions.T, _residual_products(matrix, products))
    square = jnp.asarray(gradient_square, memory.gram.dtype)
    return SR1Model(
        quadratic=solvers.QuadraticModel(
            eigenvalues=basis.eigenvalues,
            gradient=coordinates,
            complement=matrix.scale,
            complement_gradient=_complement_norm(square, coordinates),
            kept=basis.kept,
        ),
        matrix=matrix,
        directions=basis.directions,
        gram=jnp.where(filled[:, None] & filled, memory.gram, 0),
        products=products,
        gradient_square=square,
    )


def solve_model(
    kind: ModelKind, quadratic: solvers.QuadraticModel, radius: jax.Array
) -> tuple[solvers.ModelStep, Measures]:
    """Minimizes the model within a region, or with a penalty of the inverse radius.

    Args:
      kind: Which region or penalty; static.
      quadratic: The model.
      radius: Radius of the region; for penalties the inverse of their weight.

    Returns:
      The step and what the model says of it. Penalized steps reach their boundary, but for those
      whose penalty had to be larger to make the model convex: the "length" is then its inverse.
    """
    if kind == "trust_region":
        step = solvers.trust_region_step(quadratic, radius)
        return step, Measures(solvers.step_norm(step), solvers.model_decrease(quadratic, step))
    if kind == "shape_changing":
        step = solvers.shape_changing_step(quadratic, radius)
        return step, Measures(solvers.shape_norm(step), solvers.model_decrease(quadratic, step))
    if kind == "cubic":
        step = solvers.cubic_step(quadratic, 1 / radius)
        return step, Measures(radius, solvers.cubic_decrease(quadratic, step, 1 / radius))
    # Along negative curvature the step is then at most as long as along positive of that size.
    lowest = jnp.minimum(jnp.min(quadratic.eigenvalues), quadratic.complement)
    shift = solvers.raised_shift(quadratic, jnp.maximum(1 / radius, -2 * lowest))
    step = solvers.regularized_step(quadratic, shift)
    return step, Measures(1 / shift, solvers.model_decrease(quadratic, step))


def as_combination(model: SR1Model, step: solvers.ModelStep) -> Combination:
    """A step of the model in terms of the stored vectors and the gradient.

    Args:
      model: The model.
      step: A step in its eigenbasis.

    Returns:
      ``p = Ψ E (v - b a) + b g`` with ``b`` the step along ``g⊥`` over its length.
    """
    normal = model.quadratic.complement_gradient
    b = jnp.where(normal > 0, step.complement / jnp.where(normal > 0, normal, 1), 0)
    c = matmul(model.directions, step.coordinates - b * model.quadratic.gradient)
    return Combination(jnp.concatenate([-model.matrix.scale * c, c]), b)


def blend(
    combination: Combination, index: jax.Array, length: jax.Array, share: chex.Numeric
) -> Combination:
    """Mixes a stored vector into a step: ``(1 - share) p + share length v``.

    Args:
      combination: The step ``p``.
      index: Which stored vector.
      length: How much of it.
      share: In [0, 1).

    Returns:
      The mixture.
    """
    at = jnp.arange(len(combination.stored)) == index
    stored = (1 - share) * combination.stored + jnp.where(at, share * length, 0)
    return Combination(stored, (1 - share) * combination.gradient)


def norm_of(model: SR1Model, combination: Combination) -> jax.Array:
    """The Euclidean norm of a combination.

    Args:
      model: The model.
      combination: Any vector of the span.

    Returns:
      A scalar.
    """
    stored, b = combination
    square = inner(stored, matmul(model.gram, stored))
    cross = 2 * b * inner(stored, model.products)
    return jnp.sqrt(jnp.maximum(square + cross + b**2 * model.gradient_square, 0))


def decrease_of(model: SR1Model, combination: Combination) -> jax.Array:
    """The decrease of the quadratic model along any combination.

    Args:
      model: The model.
      combination: Any vector of the span.

    Returns:
      ``-(gᵀp + pᵀBp/2)``, a scalar.
    """
    stored, b = combination
    slope = inner(stored, model.products) + b * model.gradient_square
    projected = matmul(model.gram, stored) + b * model.products
    bend = curvature_along(model.matrix, projected, norm_of(model, combination) ** 2)
    return -(slope + bend / 2)


def assemble(
    combination: Combination, memory: vectors.PairMemory, gradient: chex.ArrayTree
) -> chex.ArrayTree:
    """The vector that a combination stands for, in one pass over the memory.

    Args:
      combination: Coefficients.
      memory: The memory.
      gradient: The gradient, a pytree of arrays.

    Returns:
      A pytree like the gradient.
    """
    stored = vectors.combine_pairs(combination.stored, memory)
    return jax.tree.map(
        lambda p, g: (p + combination.gradient * g).astype(g.dtype), stored, gradient
    )


def check_scale(scale: ScaleSetting) -> None:
    """Raises unless ``scale`` is a number or the name of a rule.

    Args:
      scale: The hyperparameter.

    Raises:
      ValueError: If it is another string, or not finite.
    """
    if isinstance(scale, str):
        check_choice("scale", scale, get_args(solvers.ScaleRule))
    elif is_number(scale) and not np.isfinite(scale):
        raise ValueError(f"`scale` must be finite or the name of a rule, got {scale}.")


def _complement_norm(square: jax.Array, coordinates: jax.Array) -> jax.Array:
    """``|g⊥|``, or zero where the difference of the squares is no more than rounding."""
    rest = square - jnp.sum(coordinates**2)
    resolution = 32 * float(np.finfo(square.dtype).eps) * square
    return jnp.where(rest > resolution, jnp.sqrt(jnp.maximum(rest, 0)), 0)


def _residual_products(matrix: solvers.CompactSR1, products: jax.Array) -> jax.Array:
    """``Ψᵀ v = (Y - γ S)ᵀ v`` from the products of the stored vectors with ``v``."""
    size = len(matrix.used)
    return products[size:] - matrix.scale * products[:size]
