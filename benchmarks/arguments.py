"""Command-line arguments that several commands share."""

import argparse

from benchmarks.data import DataOptions, Splits
from benchmarks.data.sources import DATA_VARIABLE
from benchmarks.problems import PROBLEMS, Problem

_DEFAULT_EPOCHS = 10


def add_problem(parser: argparse.ArgumentParser) -> None:
    """Adds ``--problem`` and the options that change its size."""
    parser.add_argument("--problem", required=True, choices=sorted(PROBLEMS), metavar="P")
    parser.add_argument("--batch-size", type=int, metavar="B", help="default: the problem's own")
    parser.add_argument("--seed", type=int, default=0, help="of initial values and shuffles")
    add_data_dir(parser)
    parser.add_argument("--train-size", type=int, metavar="N", help="use N training samples")
    parser.add_argument("--test-size", type=int, metavar="N", help="use N test samples")


def add_curvature_batch(parser: argparse.ArgumentParser) -> None:
    """Adds ``--curvature-batch-size``."""
    parser.add_argument(
        "--curvature-batch-size",
        type=int,
        metavar="N",
        help="samples for the curvature: a part of the batch, or more; default: left to the method",
    )


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Adds ``--epochs``, ``--seconds`` and ``--gradients``."""
    parser.add_argument("--epochs", type=int, metavar="N", help="stop after N epochs")
    parser.add_argument("--seconds", type=float, metavar="S", help="stop after S training seconds")
    parser.add_argument(
        "--gradients",
        type=float,
        metavar="G",
        help="stop after evaluations and products that cost as much as G gradients of a batch",
    )


def epochs_or_default(args: argparse.Namespace) -> int | None:
    """``--epochs``, or 10 where the arguments of `add_limits` set no limit at all."""
    is_endless = args.epochs is None and args.seconds is None and args.gradients is None
    return _DEFAULT_EPOCHS if is_endless else args.epochs


def add_record_every(parser: argparse.ArgumentParser) -> None:
    """Adds ``--record-every``."""
    parser.add_argument(
        "--record-every", type=int, metavar="N", help="record every N steps; default: every epoch"
    )


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Adds ``--data-dir``."""
    parser.add_argument(
        "--data-dir", metavar="DIR", help=f"folder of the data files; default ${DATA_VARIABLE}"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds ``--set``."""
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the method, over its defaults",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json``."""
    parser.add_argument("--json", metavar="FILE", help="append JSON records to it, one per line")


def load_data(problem: Problem, args: argparse.Namespace) -> Splits:
    """The data of a problem as the shared arguments ask for it."""
    options = DataOptions.from_environment(args.data_dir, args.train_size, args.test_size)
    return problem.load(options)
