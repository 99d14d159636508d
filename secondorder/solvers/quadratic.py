"""A quadratic model in the eigenbasis of its matrix, and steps in that basis.

The matrix of a limited-memory method is a multiple of the identity plus a term of low rank,
``B = P diag(λ) Pᵀ + γ (I - P Pᵀ)`` with ``k`` orthonormal columns ``P``. Of everything orthogonal
to them the model ``m(p) = gᵀp + pᵀBp/2`` knows one direction only, that of ``g⊥ = g - P Pᵀg``. A
step is therefore ``k + 1`` numbers, and so is each subproblem, whatever the number of parameters.

Solvers see the complement as one more coordinate, whose gradient is ``‖g⊥‖`` and whose
eigenvalue is ``γ`` (`spectrum`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Eigenvalues of B closer to zero than this many roundings of the largest one have no sign.
_ROUNDINGS = 8


class QuadraticModel(NamedTuple):
    """``m(p) = gᵀp + pᵀBp/2`` in the eigenbasis of ``B``.

    Attributes:
      eigenvalues: those of ``B`` on its k-dimensional subspace (k,); where not ``kept``, equal to
        ``complement``.
      gradient: coordinates (k,) of ``g`` there; zero where not ``kept``.
      complement: ``γ``, the eigenvalue of ``B`` on the orthogonal complement.
      complement_gradient: ``‖g⊥‖``, the norm of the part of ``g`` in the complement, nonnegative.
      kept: which of the k coordinates are real directions, booleans (k,).
    """

    eigenvalues: jax.Array
    gradient: jax.Array
    complement: jax.Array
    complement_gradient: jax.Array
    kept: jax.Array


class ModelStep(NamedTuple):
    """A step ``p`` in the eigenbasis of ``B``.

    Attributes:
      coordinates: along the eigenvectors (k,); zero where not kept.
      complement: along ``g⊥/‖g⊥‖``, never positive; zero where ``g⊥`` is.
    """

    coordinates: jax.Array
    complement: jax.Array


class Spectrum(NamedTuple):
    """A quadratic model as ``m`` independent coordinates: ``m(p) = Σ_j a_j p_j + λ_j p_j²/2``.

    Attributes:
      values: eigenvalues (m,).
      gradient: coordinates (m,) of the gradient, zero where not ``known``.
      known: which coordinates belong to a direction in which one can go, booleans (m,).
    """

    values: jax.Array
    gradient: jax.Array
    known: jax.Array


def spectrum(model: QuadraticModel) -> Spectrum:
    """Returns the model with the complement as its last coordinate.

    The complement is known where ``g⊥`` is not zero: without it, no direction there is at hand.

    Args:
      model: quadratic model of k coordinates.

    Returns:
      Spectrum of k + 1 coordinates, all of the dtype of ``model.eigenvalues``.

    Example:
      >>> model = QuadraticModel(*map(jnp.asarray, ([2.0], [1.0], 3.0, 0.0, [True])))
      >>> spectrum(model).values.tolist(), spectrum(model).known.tolist()
      ([2.0, 3.0], [True, False])
    """
    dtype = model.eigenvalues.dtype

    def join(parallel: jax.Array, last: ArrayLike) -> jax.Array:
        # The explicit dtype also makes the result strongly typed.
        return jnp.append(jnp.asarray(parallel, dtype), jnp.asarray(last, dtype))

    values = join(model.eigenvalues, model.complement)
    gradient = join(model.gradient, model.complement_gradient)
    known = jnp.append(model.kept, gradient[-1] > 0)
    return Spectrum(values, jnp.where(known, gradient, 0), known)


def as_step(vector: jax.Array) -> ModelStep:
    """Returns a step from its k + 1 coordinates, the complement last.

    Args:
      vector: coordinates (k + 1,) in the order of `spectrum`.

    Returns:
      The step.

    Example:
      >>> step = as_step(jnp.array([1.0, 2.0, -3.0]))
      >>> step.coordinates.tolist(), float(step.complement)
      ([1.0, 2.0], -3.0)
    """
    return ModelStep(vector[:-1], vector[-1])


def as_vector(step: ModelStep) -> jax.Array:
    """Returns the k + 1 coordinates of a step, the complement last.

    Args:
      step: step of k + 1 coordinates.

    Returns:
      Vector (k + 1,).

    Example:
      >>> as_vector(ModelStep(jnp.array([1.0]), jnp.array(-3.0))).tolist()
      [1.0, -3.0]
    """
    return jnp.append(step.coordinates, step.complement)


def model_decrease(model: QuadraticModel, step: ModelStep) -> jax.Array:
    """Returns the decrease ``m(0) - m(p) = -(gᵀp + pᵀBp/2)`` that the model promises.

    Args:
      model: quadratic model of k coordinates.
      step: step in the same basis.

    Returns:
      Scalar.

    Example:
      >>> model = QuadraticModel(*map(jnp.asarray, ([2.0], [2.0], 1.0, 4.0, [True])))
      >>> float(model_decrease(model, ModelStep(jnp.array([-1.0]), jnp.array(-4.0))))
      9.0
    """
    values, gradient, _ = spectrum(model)
    vector = as_vector(step)
    # Sums of products and not dot products, which accelerators round to fewer digits.
    return -jnp.sum(vector * (gradient + values * vector / 2))


def step_norm(step: ModelStep) -> jax.Array:
    """Returns the Euclidean norm of a step.

    Args:
      step: step of k + 1 coordinates.

    Returns:
      Scalar.

    Example:
      >>> float(step_norm(ModelStep(jnp.array([3.0]), jnp.array(-4.0))))
      5.0
    """
    return safe_norm(as_vector(step))


def clip_step(step: ModelStep, radius: ArrayLike) -> ModelStep:
    """Shortens a step to a radius, if it is longer.

    Args:
      step: step of k + 1 coordinates.
      radius: largest norm, nonnegative.

    Returns:
      The step times ``min(1, radius/‖p‖)``.

    Example:
      >>> step = clip_step(ModelStep(jnp.array([3.0]), jnp.array(-4.0)), 2.5)
      >>> step.coordinates.tolist(), float(step.complement)
      ([1.5], -2.0)
    """
    return as_step(clip_norm(as_vector(step), radius))


def clip_norm(vector: jax.Array, radius: ArrayLike) -> jax.Array:
    """Shortens a vector to a Euclidean norm, if it is longer.

    Args:
      vector: any vector (m,).
      radius: largest norm, nonnegative.

    Returns:
      Vector (m,).

    Example:
      >>> clip_norm(jnp.array([3.0, 4.0]), 10.0).tolist()
      [3.0, 4.0]
    """
    norm, radius = safe_norm(vector), jnp.asarray(radius, vector.dtype)
    return jnp.where(norm > radius, vector * (radius / positive_or_one(norm)), vector)


def safe_norm(vector: jax.Array) -> jax.Array:
    """Returns the Euclidean norm, whose squares neither overflow nor vanish.

    Args:
      vector: any vector (m,), also an empty one.

    Returns:
      Scalar.

    Example:
      >>> float(safe_norm(jnp.array([0.0, 2.0]) * 2.0**100)) == 2.0**101
      True
    """
    largest = jnp.max(jnp.abs(vector), initial=0)
    return largest * jnp.sqrt(jnp.sum((vector / positive_or_one(largest)) ** 2))


def positive_or_one(x: jax.Array) -> jax.Array:
    """Returns ``x`` where one can divide by it, and 1 elsewhere.

    Args:
      x: nonnegative numbers.

    Returns:
      Array of the same shape; 1 stands for zero and for subnormal numbers, which some devices take
      for zero.

    Example:
      >>> positive_or_one(jnp.array([0.0, 0.5])).tolist()
      [1.0, 0.5]
    """
    return jnp.where(x >= float(np.finfo(x.dtype).tiny), x, 1)


def smallest(problem: Spectrum) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest eigenvalue of the known directions, and where it is.

    Args:
      problem: spectrum of m coordinates.

    Returns:
      The eigenvalue, 0 if nothing is known; and booleans (m,), true at its place only.

    Example:
      >>> known = jnp.array([True, True, False])
      >>> value, place = smallest(Spectrum(jnp.array([1.0, -1.0, -2.0]), jnp.zeros(3), known))
      >>> float(value), place.tolist()
      (-1.0, [False, True, False])
    """
    values = jnp.where(problem.known, problem.values, jnp.inf)
    place = (jnp.arange(values.size) == jnp.argmin(values)) & problem.known
    return jnp.where(place.any(), jnp.min(values), 0), place


def largest_curvature(problem: Spectrum) -> jax.Array:
    """Returns the largest absolute eigenvalue of the known directions.

    Args:
      problem: spectrum of m coordinates.

    Returns:
      Scalar, 0 if nothing is known.

    Example:
      >>> known = jnp.array([True, True, False])
      >>> float(largest_curvature(Spectrum(jnp.array([1.0, -2.0, 3.0]), jnp.zeros(3), known)))
      2.0
    """
    return jnp.max(jnp.where(problem.known, jnp.abs(problem.values), 0), initial=0)


def curves_down(problem: Spectrum) -> jax.Array:
    """Tells in which known directions the curvature is negative beyond rounding.

    Where the gradient is zero, nothing but a negative eigenvalue is a reason to go anywhere; an
    eigenvalue of zero that rounding made negative is not.

    Args:
      problem: spectrum of m coordinates.

    Returns:
      Booleans (m,): ``λ_j < -8 ε max|λ|`` with ``ε`` the resolution of the dtype.

    Example:
      >>> values, known = jnp.array([1.0, -1e-9, -0.1]), jnp.ones(3, bool)
      >>> curves_down(Spectrum(values, jnp.zeros(3), known)).tolist()
      [False, False, True]
    """
    rounding = _ROUNDINGS * float(np.finfo(problem.values.dtype).eps)
    return problem.known & (problem.values < -rounding * largest_curvature(problem))
