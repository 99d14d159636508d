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
      last: Coefficient of the direction of the last step, a scalar.
    """

    stored: jax.Array
    gradient: jax.Array
    last: jax.Array


class Products(NamedTuple):
    """The inner products of one vector, which is all that the model needs to know of it.

    Attributes:
      stored: With the stored vectors ``(2 m,)``, zero for empty slots.
      gradient: With the gradient.
      square: With itself.
    """

    stored: jax.Array
    gradient: jax.Array
    square: jax.Array


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
    products = clear_empty(memory, products)
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


def clear_empty(memory: vectors.PairMemory, products: jax.Array) -> jax.Array:
    """Clears the products of stored vectors with anything, where a slot is empty.

    Args:
      memory: The memory.
      products: Array ``(2 m,)``.

    Returns:
      The products, in the dtype of the Gram matrix.
    """
    filled = jnp.tile(memory.numbers >= 0, 2)
    return jnp.where(filled, products.astype(memory.gram.dtype), 0)


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
    return Combination(jnp.concatenate([-model.matrix.scale * c, c]), b, jnp.zeros_like(b))


def products_of_newest(model: SR1Model, slot: jax.Array) -> Products:
    """The products of the newest stored step, all of which are known.

    Args:
      model: The model.
      slot: Where the step is stored.

    Returns:
      Its products.
    """
    return Products(model.gram[slot], model.products[slot], model.gram[slot, slot])


def slope_of(model: SR1Model, combination: Combination, last: Products) -> jax.Array:
    """The product of a combination with the gradient.

    Args:
      model: The model.
      combination: Any vector of the span.
      last: The products of the direction of the last step.

    Returns:
      A scalar.
    """
    stored, b, c = combination
    return inner(stored, model.products) + b * model.gradient_square + c * last.gradient


def products_of(model: SR1Model, combination: Combination, last: Products) -> Products:
    """The products of a combination.

    Args:
      model: The model.
      combination: Any vector of the span.
      last: The products of the direction of the last step.

    Returns:
      Its products.
    """
    stored, b, c = combination
    along = matmul(model.gram, stored) + b * model.products + c * last.stored
    slope = slope_of(model, combination, last)
    square = inner(stored, along) + b * slope
    square += c * (inner(stored, last.stored) + b * last.gradient + c * last.square)
    return Products(along, slope, square)


def blend(combination: Combination, length: jax.Array, share: chex.Numeric) -> Combination:
    """Mixes the last step into another: ``(1 - share) p + share length u``.

    Args:
      combination: The step ``p``.
      length: Length of the last step, which has the direction ``u``.
      share: In [0, 1).

    Returns:
      The mixture.
    """
    stored, gradient, last = ((1 - share) * coefficients for coefficients in combination)
    return Combination(stored, gradient, last + share * length)


def scaled_by(factor: jax.Array, products: Products) -> Products:
    """The products of a multiple of a vector.

    Args:
      factor: The factor.
      products: The products of the vector.

    Returns:
      Those of the multiple.
    """
    return Products(
        factor * products.stored, factor * products.gradient, factor**2 * products.square
    )


def decrease_of(model: SR1Model, products: Products) -> jax.Array:
    """The decrease of the quadratic model along a vector.

    Args:
      model: The model.
      products: Of the vector ``p``.

    Returns:
      ``-(gᵀp + pᵀBp/2)``, a scalar.
    """
    bend = curvature_along(model.matrix, products.stored, products.square)
    return -(products.gradient + bend / 2)


def assemble(
    combination: Combination,
    memory: vectors.PairMemory,
    gradient: chex.ArrayTree,
    last: chex.ArrayTree | None,
) -> chex.ArrayTree:
    """The vector that a combination stands for, in one pass over the memory.

    Args:
      combination: Coefficients.
      memory: The memory.
      gradient: The gradient, a pytree of arrays.
      last: The direction of the last step; None if it is the newest stored step.

    Returns:
      A pytree like the gradient.
    """
    coefficients, b, c = combination
    if last is None:
        at = jnp.arange(len(coefficients)) == vectors.newest_slot(memory)
        coefficients = coefficients + jnp.where(at, c, 0)
    stored = vectors.combine_pairs(coefficients, memory)
    step = jax.tree.map(lambda p, g: p + b * g, stored, gradient)
    if last is not None:
        step = jax.tree.map(lambda p, u: p + c * u, step, last)
    return jax.tree.map(lambda p, g: p.astype(g.dtype), step, gradient)


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
