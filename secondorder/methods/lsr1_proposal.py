"""The trial step of L-SR1: the minimizer of the model, with momentum, or a random step."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from secondorder import tree as vectors
from secondorder.checks import is_number
from secondorder.methods.lsr1_model import (
    Combination,
    Measures,
    ModelKind,
    Products,
    SR1Model,
    as_combination,
    assemble,
    blend,
    decrease_of,
    products_of,
    scaled_by,
    slope_of,
    solve_model,
)
from secondorder.solvers import step_norm
from secondorder.tree import PairMemory


class LastStep(NamedTuple):
    """The step before this one, if it was taken.

    Attributes:
      direction: Its direction, like the parameters; None if it is the newest stored step.
      products: Products of the direction.
      length: Its length, 0 if it was not taken.
    """

    direction: chex.ArrayTree | None
    products: Products
    length: jax.Array


class Proposal(NamedTuple):
    """A trial step in the coordinates of the model, and what the model says of it.

    Attributes:
      step: A pytree like the parameters.
      norm: Its Euclidean length.
      slope: Product of its direction with the gradient; 0 if it is random.
      measures: Its length in the norm of the region, and the decrease that is predicted.
      is_probe: Whether it is random.
    """

    step: chex.ArrayTree
    norm: jax.Array
    slope: jax.Array
    measures: Measures
    is_probe: jax.Array


def propose(
    kind: ModelKind,
    model: SR1Model,
    memory: PairMemory,
    gradient: chex.ArrayTree,
    radius: jax.Array,
    last: LastStep,
    momentum: chex.Numeric,
    value: jax.Array,
    largest_gradient: jax.Array,
    key: jax.Array,
) -> Proposal:
    """The step of the model, or a random one where the gradient vanishes and the model is convex.

    Args:
      kind: Which region or penalty; static.
      model: The model.
      memory: The memory that it is made of.
      gradient: The gradient.
      radius: Radius of the region; for penalties the inverse of their weight.
      last: The last step.
      momentum: Share of the last step in this one.
      value: Of the objective. A step that promises less than its rounding promises nothing.
      largest_gradient: The largest gradient norm so far: what vanishes is judged by it.
      key: Of the random step.

    Returns:
      The proposal.
    """
    step, measures = solve_model(kind, model.quadratic, radius)
    combination, norm = as_combination(model, step), step_norm(step)
    if not (is_number(momentum) and momentum == 0):
        combination, norm, measures = _add_momentum(
            kind, model, combination, norm, measures, radius, last, momentum
        )
    slope = slope_of(model, combination, last.products) / jnp.where(norm > 0, norm, 1)
    eps = float(np.finfo(norm.dtype).eps)
    stationary = jnp.sqrt(model.gradient_square) <= eps * largest_gradient
    # The Barzilai-Borwein scale of a single pair makes an eigenvalue that is zero but for rounding.
    values = model.quadratic.eigenvalues  # ``γ`` where not kept
    largest = jnp.maximum(jnp.max(jnp.abs(values)), jnp.abs(model.quadratic.complement))
    curves_down = jnp.any(model.quadratic.kept & (values < -8 * eps**0.5 * largest))
    hopeless = measures.decrease <= 10 * eps * jnp.abs(value)
    hopeless |= model.gradient_square == 0  # all that is promised then is rounding
    is_probe = stationary & hopeless & (~curves_down | (norm == 0))

    # The memory stays out of the branches: the compiler would copy it there.
    vector = jax.lax.cond(
        is_probe,
        lambda vector: _random_step(key, vector, radius),
        lambda vector: vector,
        assemble(combination, memory, gradient, last.direction),
    )
    return Proposal(
        step=vector,
        norm=jnp.where(is_probe, radius, norm),
        slope=jnp.where(is_probe | (norm == 0), 0, slope),
        measures=Measures(
            jnp.where(is_probe, radius, measures.length),
            jnp.where(is_probe, 0, measures.decrease),
        ),
        is_probe=is_probe,
    )


def _add_momentum(
    kind: ModelKind,
    model: SR1Model,
    combination: Combination,
    norm: jax.Array,
    measures: Measures,
    radius: jax.Array,
    last: LastStep,
    momentum: chex.Numeric,
) -> tuple[Combination, jax.Array, Measures]:
    """Blends the last step in, if the model promises a decrease along the mixture too."""
    mixed = blend(combination, last.length, momentum)
    products = products_of(model, mixed, last.products)
    mixed_norm = jnp.sqrt(jnp.maximum(products.square, 0))
    is_region = kind in ("trust_region", "shape_changing")
    if is_region:
        factor = jnp.minimum(1, radius / jnp.where(mixed_norm > 0, mixed_norm, 1))
        mixed = jax.tree.map(lambda c: factor * c, mixed)
        mixed_norm, products = factor * mixed_norm, scaled_by(factor, products)
    decrease = decrease_of(model, products)
    if kind == "cubic":
        decrease -= mixed_norm**3 / (3 * radius)
    # A share that is traced may be zero, and then nothing is clipped either.
    use = (momentum > 0) & (last.length > 0) & (decrease > 0)
    length = mixed_norm if is_region else measures.length
    return jax.tree.map(
        lambda new, old: jnp.where(use, new, old),
        (mixed, mixed_norm, Measures(length, decrease)),
        (combination, norm, measures),
    )


def _random_step(key: jax.Array, like: chex.ArrayTree, length: jax.Array) -> chex.ArrayTree:
    """A step of a given length in a random direction."""
    direction = vectors.random_vector("uniform", key, like)
    norm = jnp.sqrt(vectors.inner(direction, direction))
    return jax.tree.map(lambda d: d * (length / norm), direction)
