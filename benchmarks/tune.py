"""``tune``: trains a method with every combination of some settings."""

import argparse
import math

from benchmarks.arguments import add_json, add_problem, add_settings, load_data
from benchmarks.display import LOSS_COLUMNS, loss_cells, print_table, progress_bar, watch
from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.records import Record, open_writer, versions
from benchmarks.settings import Settings, parse_grid, parse_settings
from benchmarks.training import EpochRecord, Run, RunOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_problem(parser)
    parser.add_argument("--method", required=True, choices=sorted(METHODS), metavar="M")
    parser.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        required=True,
        metavar="KEY=V,V,...",
        help="values to try; of several keys every combination",
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="epochs of each run")
    parser.add_argument("--seconds", type=float, metavar="S", help="training seconds of each run")
    add_settings(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    problem, method = PROBLEMS[args.problem], METHODS[args.method]
    fixed, points = parse_settings(args.settings), list(parse_grid(args.grid))
    runs = [_options(args, {**fixed, **point}) for point in points]
    for options in runs:
        method.settings(problem, options.overrides)
    splits = load_data(problem, args)
    results: list[tuple[Settings, EpochRecord]] = []
    with open_writer(args.json) as write, progress_bar() as progress:
        for point, options in zip(points, runs, strict=True):
            training = Run(options, splits)
            *_, last = watch(training, progress, _label(point))
            results.append((point, last))
            write(_record(training, last))
    _print_results(f"{method.name} on {problem.name}", results)
    return 0


def _options(args: argparse.Namespace, overrides: Settings) -> RunOptions:
    return RunOptions(
        PROBLEMS[args.problem],
        METHODS[args.method],
        overrides=overrides,
        epochs=args.epochs,
        seconds=args.seconds,
        seed=args.seed,
        batch_size=args.batch_size,
    )


def _record(training: Run, last: EpochRecord) -> Record:
    return {
        "problem": training.options.problem.name,
        "method": training.options.method.name,
        **last.as_json(),
        **training.header(),
        "versions": versions(),
    }


def _print_results(title: str, results: list[tuple[Settings, EpochRecord]]) -> None:
    """Prints the runs, best final training loss first and diverged ones last."""
    ranked = sorted(results, key=lambda item: _rank(item[1]))
    rows = [(_label(point), last.epoch, *loss_cells(last), last.seconds) for point, last in ranked]
    print_table(title, ("settings", "epoch", *LOSS_COLUMNS, "seconds"), rows)


def _rank(last: EpochRecord) -> float:
    return math.inf if last.diverged else last.train_loss


def _label(settings: Settings) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())
