"""``demo``: trains two small networks with seven methods, and compares in a table and a plot.

It needs no data files: scikit-learn ships the handwritten digits.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from rich.progress import Progress

from benchmarks.data import DataOptions, Splits
from benchmarks.display import LOSS_COLUMNS, console, loss_cells, print_table, progress_bar, watch
from benchmarks.methods import METHODS, Method
from benchmarks.plotting import Curve, Panel, save_comparison
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.training import EpochRecord, Run, RunOptions

# Epochs by problem: enough for the methods to part, seconds for each run.
_EPOCHS = {"digits-autoencoder": 150, "digits-cnn": 30}
# Methods that are shown beside those of this package.
_PEERS = ("adam", "sgd")
# Training time of all runs together; compiling takes about as long again.
_TOTAL_SECONDS = 75.0
_COLUMNS = ("method", *LOSS_COLUMNS, "seconds", "step / Adam")


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        problem: What was trained.
        method: With what.
        initial_loss: Training loss before the first step.
        records: One per epoch.
    """

    problem: Problem
    method: Method
    initial_loss: float
    records: tuple[EpochRecord, ...]

    def step_seconds(self) -> float:
        """Seconds per step, the median over epochs."""
        start = dataclasses.replace(self.records[0], step=0, seconds=0.0)
        epochs = pairwise((start, *self.records))
        return statistics.median((b.seconds - a.seconds) / (b.step - a.step) for a, b in epochs)

    def curve(self) -> Curve:
        """The training loss over steps and over seconds."""
        return Curve(
            label=self.method.name,
            is_dashed=not self.method.is_second_order,
            work=[0, *(record.step for record in self.records)],
            seconds=[0.0, *(record.seconds for record in self.records)],
            losses=[self.initial_loss, *(record.train_loss for record in self.records)],
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--output", type=Path, default=Path("demo.png"), metavar="FILE")
    parser.add_argument(
        "--seconds-per-run",
        type=float,
        metavar="S",
        help=f"longest training time of a run; default {_TOTAL_SECONDS:g} shared by all runs",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    methods = _methods()
    limit = args.seconds_per_run or _TOTAL_SECONDS / (len(_EPOCHS) * len(methods))
    results = []
    with progress_bar() as progress:
        for name, epochs in _EPOCHS.items():
            problem = PROBLEMS[name]
            splits = problem.load(DataOptions())
            for method in methods:
                options = RunOptions(problem, method, epochs=epochs, seconds=limit)
                results.append(_train(options, splits, progress))
    _print_results(results)
    save_comparison(args.output, "Training on handwritten digits", list(_panels(results)))
    console.print(f"Plot: {args.output}", highlight=False)
    return 0


def _methods() -> list[Method]:
    """Every method of this package that there is, then its peers."""
    own = [m for m in METHODS.values() if m.is_second_order and m.is_available()]
    return own + [METHODS[name] for name in _PEERS]


def _train(options: RunOptions, splits: Splits, progress: Progress) -> Result:
    title = f"{options.problem.name} {options.method.name}"
    training = Run(options, splits)
    records = tuple(watch(training, progress, title))
    return Result(options.problem, options.method, training.initial.loss, records)


def _by_problem(results: list[Result]) -> dict[str, list[Result]]:
    return {name: [r for r in results if r.problem.name == name] for name in _EPOCHS}


def _panels(results: list[Result]) -> Iterator[Panel]:
    for name, found in _by_problem(results).items():
        yield Panel(name, [result.curve() for result in found])


def _print_results(results: list[Result]) -> None:
    """Prints a table for each problem: names would not fit beside those of the problems."""
    for name, found in _by_problem(results).items():
        (adam,) = (r.step_seconds() for r in found if r.method.name == "adam")
        rows = []
        for result in found:
            last, cost = result.records[-1], result.step_seconds() / adam
            rows.append((result.method.name, *loss_cells(last), last.seconds, cost))
        print_table(f"Handwritten digits: {name}", _COLUMNS, rows)
