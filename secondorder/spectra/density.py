r"""The spectrum of a curvature matrix as a density, by stochastic Lanczos quadrature.

Lanczos' process from a random start :math:`z` is a quadrature rule, with nodes :math:`\theta_i` and
weights :math:`\omega_i`, for :math:`z^\top f(A) z / z^\top z`. Averaged over starts it estimates
:math:`\mathrm{tr} f(A) / n` for any function :math:`f`: the mean over the spectrum. With a Gaussian
for :math:`f` that is the density, smoothed.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from secondorder.checks import check_flag, check_range, check_static_count, is_number
from secondorder.solvers import lanczos, ritz_pairs
from secondorder.spectra.curvature import (
    BlockChoice,
    Curvature,
    Matrix,
    check_key,
    check_steps,
    make_curvature,
)
from secondorder.tree import Blocks

_MARGIN = 5  # standard deviations of the smoothing beyond the outermost nodes


class SpectralDensity(NamedTuple):
    r"""A density of eigenvalues on a grid; with ``blocks``, one for every block.

    Attributes:
      eigenvalues: The grid ``(g,)``, ascending; ``(L, g)`` for ``L`` blocks, as all that follows.
      density: The density there, per unit of the eigenvalue; on a logarithmic grid per unit of
        :math:`\mathrm{asinh}(\lambda / \tau)`, the natural logarithm of large ones. It
        integrates to one; to zero if no product was finite.
      nodes: Of the quadrature, ``(probes, steps)``: eigenvalues, smoothed by nothing.
      weights: Of the nodes, ``(probes, steps)``, not negative; their sum is one. The sum of
        ``weights * f(nodes)`` estimates the mean of ``f`` over the spectrum, for every ``f``.
      width: The standard deviation of the smoothing, in the units of the density.
      threshold: :math:`\tau`, where a logarithmic grid becomes linear, or None.
      finite: Whether all products were finite.
      blocks: The partition with its ``names``, or None.
    """

    eigenvalues: jax.Array
    density: jax.Array
    nodes: jax.Array
    weights: jax.Array
    width: jax.Array
    threshold: jax.Array | None
    finite: jax.Array
    blocks: Blocks | None


def spectral_density(
    objective: Any,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    *,
    matrix: Matrix = "hessian",
    blocks: BlockChoice = None,
    probes: int = 4,
    steps: int | None = None,
    log: bool = False,
    threshold: chex.Numeric = 1e-2,
    smoothing: chex.Numeric = 0.01,
    points: int = 1000,
    reorthogonalize: bool = False,
    parallel_probes: int = 1,
) -> SpectralDensity:
    r"""The density of the eigenvalues of the Hessian or Gauss-Newton matrix.

    .. math:: \phi(\lambda) = \frac1m \sum_{j=1}^m \sum_{i=1}^k
        \omega_{ij}\, g_\sigma(\lambda - \theta_{ij})

    with ``m`` random starts of signs and ``k`` products each, in the memory of two vectors.
    Isolated eigenvalues are resolved sharply, and the bulk up to the smoothing. One of ``n``
    eigenvalues has the weight :math:`1 / n`, but for the noise of the starts.

    Args:
      objective: A function from parameters to a scalar, an `Objective` or `Microbatches`; the
        Gauss-Newton matrix needs one of the last two.
      params: The point, a pytree of real floating-point arrays.
      key: PRNG key of the starts.
      matrix: ``"hessian"`` or ``"gauss_newton"``.
      blocks: None for the whole matrix; or its diagonal blocks, all at once: ``"layers"`` for
        leaves that have the same parent, the result of `find_layers`, a function from the path of
        a leaf to a label, or a pytree of labels.
      probes: ``m``, at least 1, static.
      steps: ``k``, at most the number of parameters, static; by default 64, or that number.
      log: Whether the grid and the smoothing are logarithmic on both sides of zero, for spectra of
        several decades: the density is that of :math:`\mathrm{asinh}(\lambda / \tau)`.
      threshold: :math:`\tau` as a fraction of the largest absolute eigenvalue, in (0, 1). Below it
        the grid is linear. A quadrature of ``k`` nodes does not know the bulk in arbitrary detail:
        with a small threshold and few steps its nodes there appear as peaks with gaps between.
      smoothing: :math:`\sigma` as a fraction of the range of the spectrum, positive.
      points: Points of the grid, static; at least ``2 / smoothing``.
      reorthogonalize: Whether to keep all ``k`` vectors and orthogonalize against them, static.
        Without, eigenvalues are found again, and share their weight.
      parallel_probes: Starts that run side by side, static: faster, at the memory of as many.

    Returns:
      The density on a grid, and the quadrature behind it.

    Raises:
      TypeError: If the parameters are not real, the key is none, or the objective is not split.
      ValueError: If a setting is out of range, or ``steps`` is more than the number of parameters.

    Example:
      >>> import secondorder as so
      >>> scale = jnp.array([1.0, 1.0, 1.0, 3.0])
      >>> density = so.spectral_density(
      ...     lambda p: jnp.sum(scale * p**2) / 2, jnp.ones(4), jax.random.key(0))
      >>> round(float(jnp.trapezoid(density.density, density.eigenvalues)), 3)
      1.0
      >>> round(float(jnp.sum(density.weights * density.nodes)), 3)  # the mean eigenvalue
      1.5

    Source: Ubaru, Chen, Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos quadrature,
    SIAM J. Matrix Anal. Appl. 38; Ghorbani, Krishnan, Xiao (2019), An investigation into neural net
    optimization via Hessian eigenvalue density, ICML.
    """
    caller = "spectral_density"
    check_key(key, caller)
    check_flag("log", log)
    check_flag("reorthogonalize", reorthogonalize)
    check_static_count("probes", probes)
    check_static_count("parallel_probes", parallel_probes)
    _check_grid(threshold, smoothing, points)
    curvature = make_curvature(caller, objective, params, matrix, blocks)
    steps = check_steps("steps", steps, 64, curvature)

    def probe(probe_key: chex.PRNGKey) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _quadrature(curvature, probe_key, steps, reorthogonalize)

    keys = jax.random.split(key, probes)
    side_by_side = None if parallel_probes == 1 else min(parallel_probes, probes)
    nodes, weights, finite = jax.lax.map(probe, keys, batch_size=side_by_side)
    rule = jnp.moveaxis(nodes, 0, 1), _normalized(jnp.moveaxis(weights, 0, 1))
    scales = threshold * jnp.max(jnp.abs(rule[0]), axis=(1, 2)) if log else None
    grid, density, width = jax.vmap(
        lambda nodes, weights, scale: _smoothed(nodes, weights, scale, smoothing, points)
    )(*rule, scales)
    squeeze = curvature.squeeze
    return SpectralDensity(
        eigenvalues=squeeze(grid),
        density=squeeze(density),
        nodes=squeeze(rule[0]),
        weights=squeeze(rule[1]),
        width=squeeze(width),
        threshold=None if scales is None else squeeze(scales),
        finite=squeeze(jnp.all(finite, axis=0)),
        blocks=curvature.named_blocks,
    )


def _check_grid(threshold: Any, smoothing: Any, points: int) -> None:
    """Raises unless the grid is fine enough for the smoothing."""
    check_range("threshold", threshold, low=0, high=1, open_low=True)
    check_range("smoothing", smoothing, low=0, open_low=True)
    check_static_count("points", points)
    if is_number(smoothing) and points * smoothing < 2:
        raise ValueError(
            f"`points` must be at least 2 / smoothing, {2 / smoothing:g}, for the grid to resolve "
            f"the density: {points}."
        )


def _quadrature(
    curvature: Curvature, key: chex.PRNGKey, steps: int, reorthogonalize: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Nodes and weights of one start ``(L, steps)``, and whether its products were finite."""
    result = lanczos(
        curvature.operator,
        curvature.draw(key, "rademacher"),
        steps,
        blocks=curvature.blocks,
        reorthogonalize=reorthogonalize,
        keep_vectors=False,
    )
    ritz = ritz_pairs(result)
    return ritz.values, ritz.coefficients[:, 0, :] ** 2, result.finite


def _normalized(weights: jax.Array) -> jax.Array:
    """Weights ``(L, m, k)`` whose sum is one in each block; zero if there are none."""
    total = jnp.sum(weights, axis=(1, 2), keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def _smoothed(
    nodes: jax.Array,
    weights: jax.Array,
    scale: jax.Array | None,
    smoothing: chex.Numeric,
    points: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The grid of eigenvalues, the density there, and the width, of one block."""
    nodes, weights = jnp.ravel(nodes), jnp.ravel(weights)
    safe = None if scale is None else jnp.where(scale > 0, scale, 1)
    places = nodes if safe is None else jnp.arcsinh(nodes / safe)
    # Nodes without weight are those of vectors that there are not.
    lowest = jnp.min(jnp.where(weights > 0, places, jnp.inf), initial=jnp.inf)
    highest = jnp.max(jnp.where(weights > 0, places, -jnp.inf), initial=-jnp.inf)
    lowest, highest = (jnp.where(jnp.isfinite(end), end, 0) for end in (lowest, highest))
    size = jnp.maximum(jnp.abs(lowest), jnp.abs(highest))
    span = jnp.maximum(highest - lowest, jnp.where(size > 0, 0.01 * size, 1))
    width = (smoothing * span).astype(nodes.dtype)
    grid = jnp.linspace(lowest - _MARGIN * width, highest + _MARGIN * width, points)
    bells = jnp.exp(-(((grid[:, None] - places) / width) ** 2) / 2)
    density = jnp.sum(bells * weights, axis=1) / (width * (2 * jnp.pi) ** 0.5)
    return grid if safe is None else safe * jnp.sinh(grid), density, width
