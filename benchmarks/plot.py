"""``plot``: draws the records of several runs over updates, over gradients and over seconds."""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.display import LOSS_COLUMNS, console, print_table
from benchmarks.plotting import Line, save_panels
from benchmarks.records import Record
from benchmarks.settings import SettingError

# What the losses are plotted over, by the names in the records. Earlier records have no time of
# the processor.
_AXES = {
    "step": "updates",
    "gradients": "gradients of a batch, and work that costs as much",
    "cpu_seconds": "training seconds of the processor, without compilation",
    "seconds": "training seconds, without compilation",
}
_COLUMNS = ("run", "updates", "gradients", "seconds", *LOSS_COLUMNS)
_RUN_SETTINGS = ("batch_size", "curvature_batch_size", "seed")


class RecordedRun:
    """The records of one run, as ``train`` and ``sensitivity`` write them.

    Attributes:
        header: The first record, which describes the run.
        records: All of them.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.header, self.records = records[0], records

    @property
    def name(self) -> str:
        """Problem and method."""
        return f"{self.header['problem']} {self.header['method']}"

    @property
    def settings(self) -> Record:
        """Settings of the method and of the run."""
        return {
            **self.header["settings"],
            **{name: self.header.get(name) for name in _RUN_SETTINGS},
        }

    def line(self, axis: str, label: str) -> Line:
        """The finite training losses over one of the axes."""
        points = [(record[axis], record["train_loss"]) for record in self.records]
        finite = [(x, loss) for x, loss in points if loss is not None and math.isfinite(loss)]
        return Line(label, [x for x, _ in finite], [loss for _, loss in finite])


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


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    runs = [run for path in args.runs for run in read_runs(path)]
    labels = label_runs(runs)
    title = args.title or ", ".join(dict.fromkeys(run.header["problem"] for run in runs))
    print_table(
        title, _COLUMNS, [_row(run, label) for run, label in zip(runs, labels, strict=True)]
    )
    if args.png is not None:
        panels = {
            description: [run.line(axis, label) for run, label in zip(runs, labels, strict=True)]
            for axis, description in axes(runs).items()
        }
        save_panels(args.png, title, panels)
        console.print(f"Plot: {args.png}", highlight=False)
    return 0


def read_runs(path: Path) -> list[RecordedRun]:
    """The runs of a file, each of which begins with a record that has its settings.

    Args:
        path: The file.

    Returns:
        At least one run.

    Raises:
        SettingError: No such file, or no records of training.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise SettingError(f"{path} is not a file of records: {error}") from error
    if not records or not all({"step", "gradients", "train_loss"} <= set(r) for r in records):
        raise SettingError(f"{path} has no records of training runs.")
    if "settings" not in records[0]:
        raise SettingError(f"{path} does not begin with the first record of a run.")
    return [RecordedRun(group) for group in _groups(records)]


def axes(runs: Sequence[RecordedRun]) -> Mapping[str, str]:
    """Updates, gradients and one kind of seconds: the processor's where all runs have them."""
    missing = "seconds" if all("cpu_seconds" in run.header for run in runs) else "cpu_seconds"
    return {axis: description for axis, description in _AXES.items() if axis != missing}


def label_runs(runs: Sequence[RecordedRun]) -> list[str]:
    """The method of each run, and the settings in which runs of the method differ."""
    return [_label(run, [other for other in runs if other.name == run.name]) for run in runs]


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    group: list[Record] = []
    for record in records:
        if "settings" in record and group:
            yield group
            group = []
        group.append(record)
    yield group


def _label(run: RecordedRun, alike: Sequence[RecordedRun]) -> str:
    own = run.settings
    different = [
        f"{name}={value}"
        for name, value in own.items()
        if any(other.settings.get(name) != value for other in alike)
    ]
    return " ".join([run.header["method"], *different])


def _row(run: RecordedRun, label: str) -> tuple[object, ...]:
    last = run.records[-1]
    accuracy = last.get("test_accuracy")
    return (
        label,
        *(last[axis] for axis in axes([run])),
        "diverged" if last["diverged"] else last["train_loss"],
        last["test_loss"],
        None if accuracy is None else f"{accuracy:.2%}",
    )
