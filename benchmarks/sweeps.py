"""Training runs that differ in some settings: what ``tune`` and ``sensitivity`` share."""

import argparse
import dataclasses
import math
from collections.abc import Iterator, Sequence

from benchmarks.arguments import (
    add_curvature_batch,
    add_json,
    add_limits,
    add_problem,
    add_record_every,
    add_settings,
    load_data,
)
from benchmarks.display import LOSS_COLUMNS, loss_cells, print_table, progress_bar, watch
from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.settings import SettingError, Settings, parse_settings
from benchmarks.training import EpochRecord, Run, RunOptions

# Varied like settings, though they are those of the run and not of the method.
RUN_SETTINGS = ("batch_size", "curvature_batch_size")


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run of a sweep.

    Attributes:
        point: What distinguishes it from the others.
        run: The run.
        records: One per epoch.
    """

    point: Settings
    run: Run
    records: tuple[EpochRecord, ...]

    @property
    def label(self) -> str:
        """What distinguishes it, as the user wrote it."""
        return label(self.point)

    @property
    def last(self) -> EpochRecord:
        """The last record."""
        return self.records[-1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the runs."""
    add_problem(parser)
    add_curvature_batch(parser)
    parser.add_argument("--method", required=True, choices=sorted(METHODS), metavar="M")
    add_limits(parser)
    add_record_every(parser)
    add_settings(parser)
    add_json(parser)


def sweep(args: argparse.Namespace, points: Sequence[Settings]) -> Iterator[Result]:
    """Trains once for each point.

    Args:
        args: The arguments of `add_arguments`.
        points: Settings of the method, and `RUN_SETTINGS`, over those of the arguments.

    Yields:
        The finished runs.

    Raises:
        SettingError: One of the points cannot be; nothing is trained then.
    """
    problem, method = PROBLEMS[args.problem], METHODS[args.method]
    runs = [_options(args, point) for point in points]
    for options in runs:
        method.settings(problem, options.overrides)
    splits = load_data(problem, args)
    with progress_bar() as progress:
        for point, options in zip(points, runs, strict=True):
            run = Run(options, splits)
            yield Result(point, run, tuple(watch(run, progress, label(point))))


def print_results(title: str, results: Sequence[Result]) -> None:
    """Prints the runs, best final training loss first and diverged ones last."""
    rows = [
        (
            result.label,
            result.last.epoch,
            result.last.gradients,
            *loss_cells(result.last),
            result.last.seconds,
        )
        for result in sorted(results, key=lambda result: _rank(result.last))
    ]
    columns = ("settings", "epoch", "gradients", *LOSS_COLUMNS, "seconds")
    print_table(title, columns, rows)


def label(point: Settings) -> str:
    """Settings as the user wrote them."""
    return " ".join(f"{key}={value}" for key, value in point.items())


def _options(args: argparse.Namespace, point: Settings) -> RunOptions:
    overrides = {**parse_settings(args.settings), **point}
    of_run = {name: overrides.pop(name, getattr(args, name)) for name in RUN_SETTINGS}
    for name, size in of_run.items():
        if size is not None and not isinstance(size, int):
            raise SettingError(f"{name} must be a whole number, got {size!r}.")
    return RunOptions(
        PROBLEMS[args.problem],
        METHODS[args.method],
        overrides=overrides,
        epochs=args.epochs,
        seconds=args.seconds,
        gradients=args.gradients,
        seed=args.seed,
        record_every=args.record_every,
        **of_run,
    )


def _rank(last: EpochRecord) -> float:
    return math.inf if last.diverged else last.train_loss
