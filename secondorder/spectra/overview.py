"""Eigenvalues, density and trace of a curvature matrix in one call."""

from typing import Any, NamedTuple

import chex
import jax

from secondorder.spectra.curvature import BlockChoice, Matrix, check_key
from secondorder.spectra.density import SpectralDensity, spectral_density
from secondorder.spectra.eigenpairs import Eigenpairs, extreme_eigenpairs
from secondorder.spectra.estimates import (
    DiagonalEstimate,
    TraceEstimate,
    curvature_diagonal,
    curvature_trace,
)


class Spectrum(NamedTuple):
    """What `spectrum` finds; with ``blocks``, of every block.

    Attributes:
      eigenpairs: The outermost eigenvalues with their eigenvectors.
      density: All of them, as a density.
      trace: Their sum.
      diagonal: Of the whole matrix.
    """

    eigenpairs: Eigenpairs
    density: SpectralDensity
    trace: TraceEstimate
    diagonal: DiagonalEstimate


def spectrum(
    objective: Any,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    *,
    matrix: Matrix = "hessian",
    blocks: BlockChoice = None,
    largest: int = 5,
    smallest: int = 1,
    probes: int = 4,
    log: bool = False,
) -> Spectrum:
    """The spectrum of the Hessian or Gauss-Newton matrix at a point.

    `extreme_eigenpairs`, `spectral_density`, `curvature_trace` and `curvature_diagonal` with their
    defaults; call them one by one to choose the number of products.

    Args:
      objective: A function from parameters to a scalar, an `Objective` or `Microbatches`; the
        Gauss-Newton matrix needs one of the last two.
      params: The point, a pytree of real floating-point arrays.
      key: PRNG key.
      matrix: ``"hessian"`` or ``"gauss_newton"``.
      blocks: None for the whole matrix; or its diagonal blocks, all at once: ``"layers"`` for
        leaves that have the same parent, the result of `find_layers`, a function from the path of
        a leaf to a label, or a pytree of labels.
      largest: How many of the largest eigenvalues, static.
      smallest: How many of the smallest, static.
      probes: Random starts of the density, static.
      log: Whether the grid of the density is logarithmic, static.

    Returns:
      All of it. `plot_eigenvalues`, `plot_density`, `plot_trace` and `plot_diagonal` draw the
      parts.

    Raises:
      TypeError: If the parameters are not real, the key is none, or the objective is not split.
      ValueError: If more eigenvalues are asked for than there are parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import secondorder as so
      >>> scale = jnp.array([-1.0, 2.0, 3.0])
      >>> found = so.spectrum(
      ...     lambda p: jnp.sum(scale * p**2) / 2, jnp.ones(3), jax.random.key(0), largest=1)
      >>> jnp.rint(found.eigenpairs.values).tolist(), round(float(found.trace.value))
      ([-1.0, 3.0], 4)

    Source: Ghorbani, Krishnan, Xiao (2019), An investigation into neural net optimization via
    Hessian eigenvalue density, ICML.
    """
    check_key(key, "spectrum")
    keys = jax.random.split(key, 4)
    return Spectrum(
        extreme_eigenpairs(
            objective,
            params,
            keys[0],
            largest=largest,
            smallest=smallest,
            matrix=matrix,
            blocks=blocks,
        ),
        spectral_density(
            objective, params, keys[1], matrix=matrix, blocks=blocks, probes=probes, log=log
        ),
        curvature_trace(objective, params, keys[2], matrix=matrix, blocks=blocks),
        curvature_diagonal(objective, params, keys[3], matrix=matrix),
    )
