"""``sensitivity``: trains a method with several values of one setting, and plots the losses."""

import argparse
import math
from pathlib import Path

from benchmarks import sweeps
from benchmarks.arguments import epochs_or_default
from benchmarks.display import console
from benchmarks.plotting import Line, save_lines
from benchmarks.records import open_writer
from benchmarks.run_records import written
from benchmarks.settings import SettingError, Settings, parse_grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--vary",
        required=True,
        metavar="KEY=V,V,...",
        help="one setting of the method, or (curvature_)batch_size, with the values to compare",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="the plot")
    sweeps.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    args.epochs = epochs_or_default(args)
    points = list(parse_grid([args.vary]))
    _check_distinct(points)
    results = []
    with open_writer(args.json) as write:
        for result in sweeps.sweep(args, points):
            results.append(result)
            list(written(result.run, result.records, write, vary=result.point))
    title = f"{args.method} on {args.problem}"
    sweeps.print_results(title, results)
    if args.png is not None:
        _save(args.png, title, results)
        console.print(f"Plot: {args.png}", highlight=False)
    return 0


def _check_distinct(points: list[Settings]) -> None:
    labels = [*map(sweeps.label, points)]
    if len(set(labels)) < len(labels):
        raise SettingError(f"--vary repeats a value: {', '.join(labels)}.")


def _save(path: Path, title: str, results: list[sweeps.Result]) -> None:
    """Plots losses over gradients, of samples instead of batches where their sizes differ."""
    sizes = {result.run.options.samples_per_step for result in results}
    if len(sizes) == 1:
        save_lines(path, title, "gradients of a batch", [_line(result, 1.0) for result in results])
        return
    lines = [_line(result, result.run.samples_share) for result in results]
    save_lines(path, title, "gradients, in passes over the training samples", lines)


def _line(result: sweeps.Result, unit: float) -> Line:
    """The finite training losses of a run, from before the first step."""
    points: list[tuple[float, float]] = [(0, result.run.initial.loss)]
    points += [(record.gradients, record.train_loss) for record in result.records]
    finite = [(unit * gradients, loss) for gradients, loss in points if math.isfinite(loss)]
    return Line(result.label, [x for x, _ in finite], [y for _, y in finite])
