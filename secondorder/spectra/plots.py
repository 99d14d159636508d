"""Figures of a spectrum, with matplotlib, which is imported when one is asked for."""

from typing import Any

import jax
import numpy as np

from secondorder.spectra.density import SpectralDensity
from secondorder.spectra.eigenpairs import Eigenpairs
from secondorder.spectra.estimates import DiagonalEstimate, TraceEstimate
from secondorder.tree import leaf_paths

_DECADES = 5  # of a density below its peak that are drawn


def plot_density(density: SpectralDensity, axes: Any = None, **line: Any) -> Any:
    """Draws a density of eigenvalues, one line for each block.

    The axis of the density is logarithmic: an isolated eigenvalue is one part in as many as there
    are parameters.

    Args:
      density: What `spectral_density` found.
      axes: The matplotlib axes to draw on, or None for those of a new figure.
      **line: What `matplotlib.axes.Axes.plot` takes, such as ``label`` and ``color``.

    Returns:
      The axes.

    Raises:
      ImportError: If matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import secondorder as so
      >>> density = so.spectral_density(lambda p: jnp.sum(p**2), jnp.ones(4), jax.random.key(0))
      >>> axes = so.plot_density(density, label="quadratic")  # doctest: +SKIP
    """
    axes = _axes(axes, "plot_density")
    grids, values = (np.atleast_2d(np.asarray(a)) for a in (density.eigenvalues, density.density))
    names = (None,) if density.blocks is None else density.blocks.names
    for name, grid, value in zip(names, grids, values, strict=True):
        style = line if name is None else {"label": name} | line
        axes.plot(grid, value, **style)
    _set_density_scales(axes, density.threshold, values.max())
    axes.set(xlabel="eigenvalue", ylabel="density")
    axes.grid(alpha=0.3)
    if density.blocks is not None or "label" in line:
        axes.legend(frameon=False, loc="upper right")
    return axes


def plot_eigenvalues(pairs: Eigenpairs, axes: Any = None, **marks: Any) -> Any:
    """Draws eigenvalues in descending order, or those of each block above its name.

    Bars are the residuals: an eigenvalue lies within.

    Args:
      pairs: What `extreme_eigenpairs` found.
      axes: The matplotlib axes to draw on, or None for those of a new figure.
      **marks: What `matplotlib.axes.Axes.errorbar` takes, such as ``label`` and ``color``.

    Returns:
      The axes.

    Raises:
      ImportError: If matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import secondorder as so
      >>> pairs = so.extreme_eigenpairs(lambda p: jnp.sum(p**2), jnp.ones(4), jax.random.key(0))
      >>> axes = so.plot_eigenvalues(pairs)  # doctest: +SKIP
    """
    axes = _axes(axes, "plot_eigenvalues")
    values, residuals = np.asarray(pairs.values), np.asarray(pairs.residuals)
    if pairs.blocks is None:
        places = np.arange(len(values), 0, -1)
        axes.set(xlabel="those that were computed, from the largest", xticks=[])
    else:
        count = len(pairs.blocks)
        places = np.repeat(np.arange(count), values.shape[1])
        axes.set_xticks(range(count), pairs.blocks.names, rotation=30, ha="right")
    style = {"fmt": "o", "markersize": 4, "capsize": 2} | marks
    axes.errorbar(places, np.ravel(values), yerr=np.ravel(residuals), **style)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(ylabel="eigenvalue")
    axes.grid(axis="y", alpha=0.3)
    if "label" in marks:
        axes.legend(frameon=False)
    return axes


def plot_trace(trace: TraceEstimate, axes: Any = None, **bars: Any) -> Any:
    """Draws the mean eigenvalue, that is the trace by the number of parameters, of each block.

    Lines on the bars are one standard error.

    Args:
      trace: What `curvature_trace` found.
      axes: The matplotlib axes to draw on, or None for those of a new figure.
      **bars: What `matplotlib.axes.Axes.bar` takes, such as ``label`` and ``color``.

    Returns:
      The axes.

    Raises:
      ImportError: If matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import secondorder as so
      >>> trace = so.curvature_trace(lambda p: jnp.sum(p**2), jnp.ones(4), jax.random.key(0))
      >>> axes = so.plot_trace(trace)  # doctest: +SKIP
    """
    axes = _axes(axes, "plot_trace")
    size = np.atleast_1d(np.asarray(trace.size))
    means, errors = (np.atleast_1d(np.asarray(a)) / size for a in (trace.value, trace.error))
    names = ("all parameters",) if trace.blocks is None else trace.blocks.names
    axes.bar(range(len(means)), means, yerr=errors, **({"capsize": 2, "width": 0.6} | bars))
    axes.set_xticks(range(len(means)), names, rotation=30, ha="right")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(ylabel="mean eigenvalue")
    axes.grid(axis="y", alpha=0.3)
    if "label" in bars:
        axes.legend(frameon=False)
    return axes


def plot_diagonal(diagonal: DiagonalEstimate, axes: Any = None, **box: Any) -> Any:
    """Draws how the diagonal is distributed in each array of the parameters.

    Boxes hold the middle half, whiskers all but five percent on either side.

    Args:
      diagonal: What `curvature_diagonal` found.
      axes: The matplotlib axes to draw on, or None for those of a new figure.
      **box: What `matplotlib.axes.Axes.boxplot` takes.

    Returns:
      The axes.

    Raises:
      ImportError: If matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import secondorder as so
      >>> diagonal = so.curvature_diagonal(
      ...     lambda p: jnp.sum(p["a"] ** 4), {"a": jnp.arange(4.0)}, jax.random.key(0))
      >>> axes = so.plot_diagonal(diagonal)  # doctest: +SKIP
    """
    axes = _axes(axes, "plot_diagonal")
    leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(diagonal.values)]
    axes.boxplot(leaves, **({"whis": (5, 95), "showfliers": False} | box))
    names = [path or "all parameters" for path in leaf_paths(diagonal.values)]
    axes.set_xticks(range(1, len(leaves) + 1), names, rotation=30, ha="right")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(ylabel="diagonal element")
    axes.grid(axis="y", alpha=0.3)
    return axes


def _axes(axes: Any, caller: str) -> Any:
    """The given axes, or those of a new figure."""
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib; install it with `pip install 'secondorder[plot]'`."
        ) from error
    return pyplot.subplots(figsize=(6, 3.5), layout="constrained")[1]


def _set_density_scales(axes: Any, threshold: Any, peak: float) -> None:
    """Scales of the axes of a density, for all that are drawn there."""
    if threshold is not None:
        scale = max(float(np.max(threshold)), _linear_width(axes))
        axes.set_xscale("asinh", linear_width=scale if scale > 0 else 1)
        low, high = axes.get_xlim()
        axes.set_xticks(_decades(low, high, scale))
        axes.set_xticks([], minor=True)
    if peak > 0:
        low, high = axes.get_ylim() if axes.get_yscale() == "log" else (np.inf, 0)
        axes.set_yscale("log")
        axes.set_ylim(min(low, peak * 10.0**-_DECADES), max(high, 2 * peak))


def _linear_width(axes: Any) -> float:
    """Where the logarithmic axis of an earlier density becomes linear, or zero."""
    return float(getattr(axes.xaxis.get_transform(), "linear_width", 0))


def _decades(low: float, high: float, scale: float) -> list[float]:
    """Zero, and powers of ten on both sides of it that do not crowd there."""
    top = max(-low, high, scale)
    first, last = (int(np.floor(np.log10(x))) for x in (max(2 * scale, 1e-3 * top), top))
    powers = [10.0**power for power in range(last, first, -1)] or [10.0**last]
    return [-x for x in powers if x < -low] + [0.0] + [x for x in powers if x < high]
