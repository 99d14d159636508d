"""The records of a training run: how they are written, read back, and shown."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plotting import Line
from benchmarks.records import Record, Writer, versions
from benchmarks.settings import SettingError
from benchmarks.training import EpochRecord, Run

# What the losses are plotted over, by the names in the records. Earlier records have no time of
# the processor.
_AXES = {
    "step": "updates",
    "gradients": "gradients of a batch, and work that costs as much",
    "cpu_seconds": "training seconds of the processor, without compilation",
    "seconds": "training seconds, without compilation",
}
_RUN_SETTINGS = ("batch_size", "curvature_batch_size", "seed")


def written(
    run: Run, records: Iterable[EpochRecord], write: Writer, **names: Any
) -> Iterator[EpochRecord]:
    """Writes the records of a run as they come; the first also describes it.

    Args:
        run: The run.
        records: Its records, those of `Run.epochs`.
        write: Takes what is written.
        **names: What every record says beside the problem and the method.

    Yields:
        The records.
    """
    names = {"problem": run.options.problem.name, "method": run.options.method.name, **names}
    extra = {**names, **run.header(), "versions": versions()}
    for record in records:
        write({**record.as_json(), **extra})
        extra = names
        yield record


class RecordedRun:
    """The records of one run, as `written` writes them.

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

    @property
    def last(self) -> Record:
        """The last record."""
        return self.records[-1]

    def line(self, axis: str, label: str) -> Line:
        """The finite training losses over one of the axes."""
        points = [(record[axis], record["train_loss"]) for record in self.records]
        finite = [(x, loss) for x, loss in points if loss is not None and math.isfinite(loss)]
        return Line(label, [x for x, _ in finite], [loss for _, loss in finite])

    def cells(self) -> tuple[Any, ...]:
        """Where it ended: updates, gradients, seconds, and what stands under `LOSS_COLUMNS`."""
        last, accuracy = self.last, self.last.get("test_accuracy")
        return (
            *(last[axis] for axis in axes([self])),
            "diverged" if last["diverged"] else last["train_loss"],
            last["test_loss"],
            None if accuracy is None else f"{accuracy:.2%}",
        )


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


def panels(runs: Sequence[RecordedRun], labels: Sequence[str]) -> Mapping[str, Sequence[Line]]:
    """The training losses over each of the `axes`, for `save_panels`."""
    return {
        description: [run.line(axis, label) for run, label in zip(runs, labels, strict=True)]
        for axis, description in axes(runs).items()
    }


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    group: list[Record] = []
    for record in records:
        if "settings" in record and group:
            yield group
            group = []
        group.append(record)
    yield group
