"""Plots of training losses."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

# Okabe and Ito's colours, which colour-blind readers can tell apart, without their yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


@dataclasses.dataclass(frozen=True)
class Curve:
    """The course of one run.

    Attributes:
        label: Its name in the legend.
        is_dashed: Sets the peers apart from the methods of this package.
        steps: Steps at each point.
        seconds: Training seconds at each point.
        losses: Training loss at each point.
    """

    label: str
    is_dashed: bool
    steps: Sequence[int]
    seconds: Sequence[float]
    losses: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Line:
    """Training losses of one run over anything."""

    label: str
    positions: Sequence[float]
    losses: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Panel:
    """The runs of one problem: one row of the figure."""

    title: str
    curves: Sequence[Curve]


def save_comparison(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Saves a figure with a row per problem: loss over steps, and over seconds.

    Args:
        path: The PNG file.
        title: Title of the figure.
        panels: One per problem.
    """
    figure = _figure(title, width=11, height=4 * len(panels))
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for (over_steps, over_seconds), panel in zip(axes, panels, strict=True):
        for number, curve in enumerate(panel.curves):
            style = _style(number, curve.label, curve.is_dashed)
            over_steps.plot(curve.steps, curve.losses, **style)
            over_seconds.plot(curve.seconds, curve.losses, **style)
        _decorate(over_steps, panel.title, "steps")
        _decorate(over_seconds, panel.title, "training seconds, without compilation")
        over_steps.set_xlim(left=0)
        over_seconds.set_xlim(left=0)
        over_steps.legend(frameon=False)
    _save(figure, path)


def save_lines(path: Path, title: str, x_label: str, lines: Sequence[Line]) -> None:
    """Saves a figure with one line per run.

    Args:
        path: The PNG file.
        title: Title of the figure.
        x_label: What the positions are.
        lines: One per run.
    """
    figure = _figure(title, width=7, height=5)
    axes = figure.subplots()
    for number, line in enumerate(lines):
        axes.plot(line.positions, line.losses, **_style(number, line.label, is_dashed=False))
    _decorate(axes, "", x_label)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    _save(figure, path)


def save_panels(path: Path, title: str, panels: Mapping[str, Sequence[Line]]) -> None:
    """Saves a figure with the same runs over several things side by side, on logarithmic axes.

    Args:
        path: The PNG file.
        title: Title of the figure.
        panels: By what the positions are, one line per run; positions must be positive.
    """
    figure = _figure(title, width=5.5 * len(panels), height=5)
    rows = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (x_label, lines) in zip(rows[0], panels.items(), strict=True):
        for number, line in enumerate(lines):
            axes.plot(line.positions, line.losses, **_style(number, line.label, is_dashed=False))
        _decorate(axes, "", x_label)
        axes.set_xscale("log")
        _label_decades(axes.xaxis)
    rows[0, 0].legend(frameon=False)
    _save(figure, path)


def _figure(title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14)
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _style(number: int, label: str, is_dashed: bool) -> dict[str, Any]:
    return {
        "label": label,
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": "--" if is_dashed else "-",
        "linewidth": 1.8,
    }


def _label_decades(axis: Axis) -> None:
    """Labels more than powers of ten, as plain numbers: what is drawn often spans little more."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _decorate(axes: Axes, title: str, x_label: str) -> None:
    axes.set(title=title, xlabel=x_label, ylabel="training loss", yscale="log")
    _label_decades(axes.yaxis)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
