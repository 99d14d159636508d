"""What the curvature of an objective looks like at a point, by matrix-free means.

* `curvature`: the matrix and its blocks, from what a user says; checks of the arguments.
* `eigenpairs`: the outermost eigenvalues with their eigenvectors, by Lanczos' process.
* `density`: the whole spectrum as a density, by stochastic Lanczos quadrature.
* `estimates`: trace and diagonal, from products with random signs.
* `plots`: figures of the first two, with matplotlib.
"""

from secondorder.spectrum.curvature import BlockChoice, Matrix
from secondorder.spectrum.density import SpectralDensity, spectral_density
from secondorder.spectrum.eigenpairs import Eigenpairs, extreme_eigenpairs
from secondorder.spectrum.estimates import (
    DiagonalEstimate,
    TraceEstimate,
    curvature_diagonal,
    curvature_trace,
)
from secondorder.spectrum.plots import plot_density, plot_eigenvalues

__all__ = [
    "BlockChoice",
    "DiagonalEstimate",
    "Eigenpairs",
    "Matrix",
    "SpectralDensity",
    "TraceEstimate",
    "curvature_diagonal",
    "curvature_trace",
    "extreme_eigenpairs",
    "plot_density",
    "plot_eigenvalues",
    "spectral_density",
]
