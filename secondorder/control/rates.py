"""Rates of the parts of a direction that minimize a quadratic model, in terms of inner products."""

import chex
import jax
import jax.numpy as jnp


def part_rates(slopes: jax.Array, matrix: jax.Array, caution: chex.Numeric = 1.0) -> jax.Array:
    r"""The rates of the parts of a direction, up to a factor common to all.

    .. math::
      (M + c\, \mathrm{diag}\, M)\, r = s

    Without caution :math:`c` they minimize the model :math:`-s^\top r + \tfrac12 r^\top M r` of one
    batch: they are large where parts cancel each other's changes of the outputs, and give nearly
    all of the step to the part that fits the noise of the batch best. With Marquardt's damping,
    which is one of ``c`` in units in which every part has a curvature of one, more of a rate is
    the part's own. Rates below zero become zero.

    Args:
      slopes: ``s``, the products of the gradient with the parts (L,), all of which may have the
        other sign: a direction can be one of ascent or of descent.
      matrix: ``M``, symmetric positive semidefinite (L, L), float32 or wider.
      caution: ``c >= 0``.

    Returns:
      The rates ``r`` (L,), whose mean square over the parts with curvature is one. Parts without
      curvature have a rate of one, and so do all if none has a rate above zero.

    Example:
      >>> rates = part_rates(jnp.array([1.0, 28.0]), jnp.diag(jnp.array([1.0, 4.0])))
      >>> [round(float(rate), 3) for rate in rates]  # 1 to 28/4
      [0.2, 1.4]

    Source: Marquardt (1963), An algorithm for least-squares estimation of nonlinear parameters, for
    the damping.
    """
    diagonal = jnp.diag(matrix)
    known = diagonal > 0
    scale = jnp.where(known, jax.lax.rsqrt(jnp.where(known, diagonal, 1)), 0)
    unit = matrix * jnp.outer(scale, scale) + caution * jnp.eye(len(slopes), dtype=matrix.dtype)
    unit = unit + jnp.diag(jnp.where(known, 0, 1).astype(matrix.dtype))  # a part without curvature
    steepness = scale * slopes
    rates = scale * jnp.linalg.solve(unit, steepness * jnp.sign(jnp.sum(steepness)))
    rates = jnp.maximum(rates, 0)
    square = jnp.sum(rates**2) / jnp.maximum(jnp.sum(known), 1)
    some = square > 0
    return jnp.where(known & some, rates * jax.lax.rsqrt(jnp.where(some, square, 1)), 1)
