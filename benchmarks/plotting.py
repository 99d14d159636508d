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

# Okabe and Ito's colors, which color-blind readers can tell apart, with a gray for their yellow.
_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
    "#999999",
)


@dataclasses.dataclass(frozen=True)
class Curve:
    """The course of one run.

    Attributes:
        label: Its name in the legend.
        is_dashed: Sets the peers apart from the methods of this package.
        work: Steps, or what else the work is counted in, at each point.
        seconds: Training seconds at each point.
        losses: Training loss at each point.
    """

    label: str
    is_dashed: bool
    work: Sequence[float]
    seconds: Sequence[float]
    losses: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Line:
    """Training losses, or another quantity, of one run over anything."""

    label: str
    positions: Sequence[float]
    losses: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Panels:
    """One quantity of all runs over several things: a row of a figure.

    Attributes:
        name: Of the quantity.
        lines: By what the positions are, one line per run.
    """

    name: str
    lines: Mapping[str, Sequence[Line]]


@dataclasses.dataclass(frozen=True)
class Panel:
    """The runs of one problem: one row of the figure, or one column."""

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
    axes, places = figure.subplots(len(panels), 2, squeeze=False), _places(panels)
    for (over_steps, over_seconds), panel in zip(axes, panels, strict=True):
        over_steps.set_title(panel.title)
        _draw(panel, over_steps, over_seconds, "steps", places)
        over_steps.legend(frameon=False)
    _save(figure, path)


def save_headline(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Saves a figure with a column per problem: loss over seconds, and over gradients.

    Args:
        path: The PNG file.
        title: Title of the figure.
        panels: One per problem.
    """
    figure = _figure(title, width=4.5 * len(panels), height=7)
    axes, places = figure.subplots(2, len(panels), squeeze=False).T, _places(panels)
    work = "gradients of a batch, and equal work"
    for (over_seconds, over_gradients), panel in zip(axes, panels, strict=True):
        over_seconds.set_title(panel.title)
        _draw(panel, over_gradients, over_seconds, work, places)
    # One for all: a problem's panel can be full of lines.
    lines = {line.get_label(): line for drawn in axes[:, 0] for line in drawn.get_lines()}
    handles = [lines[label] for label in places]
    figure.legend(handles, places, loc="outside lower center", ncols=len(places), frameon=False)
    _save(figure, path)


def _places(panels: Sequence[Panel]) -> dict[str, int]:
    """A number for every label, the same in all panels, by which it has its color."""
    labels = dict.fromkeys(curve.label for panel in panels for curve in panel.curves)
    return {label: number for number, label in enumerate(labels)}


def _draw(
    panel: Panel, over_work: Axes, over_seconds: Axes, work: str, places: Mapping[str, int]
) -> None:
    for curve in panel.curves:
        style = _style(places[curve.label], curve.label, curve.is_dashed)
        over_work.plot(curve.work, curve.losses, **style)
        over_seconds.plot(curve.seconds, curve.losses, **style)
    _decorate(over_work, work)
    _decorate(over_seconds, "training seconds, without compilation")
    over_work.set_xlim(left=0)
    over_seconds.set_xlim(left=0)


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
    _decorate(axes, x_label)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    _save(figure, path)


def save_panels(path: Path, title: str, rows: Sequence[Panels]) -> None:
    """Saves a figure with the same runs over several things side by side.

    Args:
        path: The PNG file.
        title: Title of the figure.
        rows: Over the same things; positions must be positive. The axes of the first row, which
            has the losses, are logarithmic.
    """
    columns = len(rows[0].lines)
    figure = _figure(title, width=5.5 * columns, height=5 * len(rows))
    grid = figure.subplots(len(rows), columns, sharey="row", squeeze=False)
    for number, row in enumerate(rows):
        for axes, (x_label, lines) in zip(grid[number], row.lines.items(), strict=True):
            for place, line in enumerate(lines):
                axes.plot(line.positions, line.losses, **_style(place, line.label, False))
            _decorate(axes, x_label, row.name, y_scale="linear" if number else "log")
            axes.set_xscale("log")
            _label_decades(axes.xaxis)
    grid[0, 0].legend(frameon=False, fontsize="small")
    _save(figure, path)


def save_profile(path: Path, title: str, x_label: str, lines: Sequence[Line]) -> None:
    """Saves how the share of solved problems grows with the work.

    Args:
        path: The PNG file.
        title: Title of the figure.
        x_label: What the work is measured in.
        lines: One per method: the work after which each of its problems was solved, in rising
            order, with the share that was solved by then.
    """
    figure = _figure(title, width=7, height=5)
    axes = figure.subplots()
    end = 1.5 * max((x for line in lines for x in line.positions), default=1.0)
    for number, line in enumerate(lines):
        positions, shares = [1.0, *line.positions, end], [0.0, *line.losses]
        heights = [*shares, shares[-1]]
        axes.step(positions, heights, where="post", **_style(number, line.label, False))
    _decorate(axes, x_label, "share of problems solved", y_scale="linear")
    axes.set(xscale="log", ylim=(0, 1.05))
    _label_decades(axes.xaxis)
    axes.legend(frameon=False, fontsize="small")
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
    # More lines than colors are told apart by their dots; dashes are those of the peers.
    dashes = ("--",) if is_dashed else ("-", ":", "-.")
    return {
        "label": label,
        "color": _COLORS[number % len(_COLORS)],
        "linestyle": dashes[number // len(_COLORS) % len(dashes)],
        "linewidth": 1.8,
    }


def _label_decades(axis: Axis) -> None:
    """Labels powers of ten as plain numbers, and more than these where there would be few."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _decorate(
    axes: Axes, x_label: str, y_label: str = "training loss", y_scale: str = "log"
) -> None:
    axes.set(xlabel=x_label, ylabel=y_label, yscale=y_scale)
    if y_scale == "log":
        _label_decades(axes.yaxis)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
