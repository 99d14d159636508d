"""The records of a training run: how they are written, read back, and shown."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plotting import Curve, Line, Panels
from benchmarks.records import Record, Writer, read_records, versions
from benchmarks.settings import SettingError
from benchmarks.training import EpochRecord, Run

# What the losses are plotted over, by the names in the records. Earlier records have no time of
# the processor.
_AXES = {
    "step": "updates",
    "gradients": "gradients of a batch, and work that costs as much",
    "flops": "floating-point operations, as XLA counts a step",
    "cpu_seconds": "training seconds of the processor, without compilation",
    "seconds": "training seconds, without compilation",
}
_FAILURE = "not_run"
_RUN_SETTINGS = ("batch_size", "curvature_batch_size", "seed", "average")


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
        per_step = records[0].get("step_flops")
        flops = [{} if per_step is None else {"flops": per_step * r["step"]} for r in records]
        self.records = [{**record, **own} for record, own in zip(records, flops, strict=True)]
        self.header = self.records[0]

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

    def line(self, axis: str, label: str, quantity: str = "train_loss") -> Line:
        """The finite training losses, or another quantity, over one of the axes."""
        points = [(record[axis], record[quantity]) for record in self.records]
        finite = [(x, loss) for x, loss in points if loss is not None and math.isfinite(loss)]
        return Line(label, [x for x, _ in finite], [loss for _, loss in finite])

    def curve(self, label: str, is_dashed: bool) -> Curve:
        """The training losses over gradients, and over seconds of the processor if there are."""
        records = [record for record in self.records if not record["diverged"]]
        return Curve(
            label,
            is_dashed,
            work=[record["gradients"] for record in records],
            seconds=[record.get("cpu_seconds", record["seconds"]) for record in records],
            losses=[record["train_loss"] for record in records],
        )

    def cells(self) -> tuple[Any, ...]:
        """Where it ended: updates, gradients, seconds, and what stands under `LOSS_COLUMNS`."""
        last, accuracy = self.last, self.last.get("test_accuracy")
        return (
            last["step"],
            last["gradients"],
            last.get("cpu_seconds", last["seconds"]),
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
    return read_runs_and_failures(path)[0]


def read_runs_and_failures(path: Path) -> tuple[list[RecordedRun], dict[str, str]]:
    """The runs of a file, and by contender why others did not run.

    Args:
        path: The file.

    Returns:
        At least one run, and the reasons.

    Raises:
        SettingError: No such file, or no records of training.
    """
    try:
        every = read_records(path)
    except (OSError, ValueError) as error:
        raise SettingError(f"{path} is not a file of records: {error}") from error
    failures = {record["contender"]: record[_FAILURE] for record in every if _FAILURE in record}
    records = [record for record in every if _FAILURE not in record]
    if not records or not all({"step", "gradients", "train_loss"} <= set(r) for r in records):
        raise SettingError(f"{path} has no records of training runs.")
    if "settings" not in records[0]:
        raise SettingError(f"{path} does not begin with the first record of a run.")
    return [RecordedRun(group) for group in _groups(records)], failures


def failure_record(reason: str) -> Record:
    """What stands in a file of runs for one that was refused."""
    return {_FAILURE: reason}


def axes(runs: Sequence[RecordedRun]) -> Mapping[str, str]:
    """What all runs can be plotted over; of the two kinds of seconds the processor's if it can."""
    known = [axis for axis in _AXES if all(axis in run.header for run in runs)]
    unused = "seconds" if "cpu_seconds" in known else "cpu_seconds"
    return {axis: _AXES[axis] for axis in known if axis != unused}


def panels(runs: Sequence[RecordedRun], labels: Sequence[str]) -> list[Panels]:
    """The training losses, and the accuracies if there are any, over each of the `axes`."""
    quantities = {"train_loss": "training loss", "test_accuracy": "test accuracy"}
    return [
        Panels(
            name,
            {
                axis_name: [
                    run.line(axis, label, quantity) for run, label in zip(runs, labels, strict=True)
                ]
                for axis, axis_name in axes(runs).items()
            },
        )
        for quantity, name in quantities.items()
        if all(quantity in run.header for run in runs)
    ]


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    group: list[Record] = []
    for record in records:
        if "settings" in record and group:
            yield group
            group = []
        group.append(record)
    yield group
