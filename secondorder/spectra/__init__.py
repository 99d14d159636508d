"""What the curvature of an objective looks like at a point, by matrix-free means.

* `curvature`: the matrix and its blocks, from what a user says; checks of the arguments.
* `eigenpairs`: the outermost eigenvalues with their eigenvectors, by Lanczos' process.
* `density`: the whole spectrum as a density, by stochastic Lanczos quadrature.
* `estimates`: trace and diagonal, from products with random signs.
* `overview`: all of these in one call.
* `plots`: their figures, with matplotlib.
"""

from secondorder.spectra.curvature import BlockChoice, Matrix
from secondorder.spectra.density import SpectralDensity, spectral_density
from secondorder.spectra.eigenpairs import Eigenpairs, extreme_eigenpairs
from secondorder.spectra.estimates import (
    DiagonalEstimate,
    TraceEstimate,
    curvature_diagonal,
    curvature_trace,
)
from secondorder.spectra.overview import Spectrum, spectrum
from secondorder.spectra.plots import plot_density, plot_diagonal, plot_eigenvalues, plot_trace

__all__ = [
    "BlockChoice",
    "DiagonalEstimate",
    "Eigenpairs",
    "Matrix",
    "SpectralDensity",
    "Spectrum",
    "TraceEstimate",
    "curvature_diagonal",
    "curvature_trace",
    "extreme_eigenpairs",
    "plot_density",
    "plot_diagonal",
    "plot_eigenvalues",
    "plot_trace",
    "spectral_density",
    "spectrum",
]
