"""``train``: trains one method on one problem and records every epoch."""

import argparse

from benchmarks.arguments import (
    add_curvature_batch,
    add_json,
    add_limits,
    add_problem,
    add_record_every,
    add_settings,
    epochs_or_default,
    load_data,
)
from benchmarks.display import console, describe, progress_bar, watch
from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.records import open_writer
from benchmarks.run_records import written
from benchmarks.settings import parse_settings
from benchmarks.training import EpochRecord, Run, RunOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_problem(parser)
    add_curvature_batch(parser)
    parser.add_argument("--method", required=True, choices=sorted(METHODS), metavar="M")
    add_limits(parser)
    add_record_every(parser)
    parser.add_argument(
        "--average",
        type=float,
        metavar="D",
        help="record the losses of a moving average of the parameters with this decay",
    )
    add_settings(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 if the training diverged."""
    problem, method = PROBLEMS[args.problem], METHODS[args.method]
    options = RunOptions(
        problem,
        method,
        overrides=parse_settings(args.settings),
        epochs=epochs_or_default(args),
        seconds=args.seconds,
        gradients=args.gradients,
        seed=args.seed,
        batch_size=args.batch_size,
        curvature_batch_size=args.curvature_batch_size,
        record_every=args.record_every,
        average=args.average,
    )
    # Wrong settings are reported before the data is read.
    method.settings(problem, options.overrides)
    console.print(f"[bold]{problem.name}[/bold]: {problem.description}", highlight=False)
    training = Run(options, load_data(problem, args))
    last = _train(training, args.json)
    return _report(last)


def _train(training: Run, path: str | None) -> EpochRecord:
    """Trains, prints a line per epoch, and writes the records; returns the last."""
    options = training.options
    title = f"{options.problem.name} {options.method.name}"
    with open_writer(path) as write, progress_bar() as progress:
        for record in written(training, watch(training, progress, title), write):
            progress.console.print(
                f"epoch {record.epoch}: {describe(record)}, {record.seconds:.1f} s",
                highlight=False,
            )
    return record


def _report(last: EpochRecord) -> int:
    if last.diverged:
        console.print(
            f"[bold red]Stopped: the loss is not finite at step {last.step}.[/bold red] "
            "A smaller learning rate or more damping may help."
        )
        return 1
    return 0
