"""``plot``: draws the records of several runs over updates, over gradients and over seconds."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.display import LOSS_COLUMNS, console, print_table
from benchmarks.methods import PEERS
from benchmarks.plotting import Panel, save_headline, save_panels
from benchmarks.run_records import RecordedRun, panels, read_runs

_COLUMNS = ("run", "updates", "gradients", "seconds", *LOSS_COLUMNS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="records of train or sensitivity, of one run or of several",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="the plot")
    parser.add_argument("--title", help="default: the problem")
    parser.add_argument(
        "--columns",
        action="store_true",
        help="a column per problem, seconds above gradients; peers are dashed",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    runs = [run for path in args.runs for run in read_runs(path)]
    labels = label_runs(runs)
    title = args.title or ", ".join(dict.fromkeys(run.header["problem"] for run in runs))
    print_table(
        title, _COLUMNS, [(label, *run.cells()) for run, label in zip(runs, labels, strict=True)]
    )
    if args.png is not None:
        if args.columns:
            save_headline(args.png, title, _columns(runs, labels))
        else:
            save_panels(args.png, title, panels(runs, labels))
        console.print(f"Plot: {args.png}", highlight=False)
    return 0


def _columns(runs: Sequence[RecordedRun], labels: Sequence[str]) -> list[Panel]:
    """One per problem, in the order of the records."""
    names = dict.fromkeys(run.header["problem"] for run in runs)
    labeled = list(zip(runs, labels, strict=True))
    return [
        Panel(
            name,
            [
                run.curve(label, is_dashed=run.header["method"] in PEERS)
                for run, label in labeled
                if run.header["problem"] == name
            ],
        )
        for name in names
    ]


def label_runs(runs: Sequence[RecordedRun]) -> list[str]:
    """The method of each run, and the settings in which runs of the method differ."""
    return [_label(run, [other for other in runs if other.name == run.name]) for run in runs]


def _label(run: RecordedRun, alike: Sequence[RecordedRun]) -> str:
    own = run.settings
    different = [
        f"{name}={value}"
        for name, value in own.items()
        if any(other.settings.get(name) != value for other in alike)
    ]
    return " ".join([run.header["method"], *different])
