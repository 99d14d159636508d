"""What a trial ends with: its tables, its plot, its records, and the section for the results."""

import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.display import console, print_table, rounded
from benchmarks.plotting import save_panels
from benchmarks.records import Record
from benchmarks.run_records import (
    RecordedRun,
    failure_record,
    panels,
    read_runs_and_failures,
)
from benchmarks.settings import SettingError, Settings
from benchmarks.sweeps import label
from benchmarks.trials import Contender, Trial

_COLUMNS = ("method", "settings", "updates", "gradients", "Tflop", "seconds", "cpu s", "compile s")
_LOSSES = ("train loss", "test loss", "accuracy")
_PRINTED = ("method", "settings", "gradients", "cpu s", *_LOSSES)
_NOT_RUN = "not run"
NOTES = (
    "Each run starts from the same initial parameters and sees the same batches. Seconds leave "
    "compilation and evaluation out; cpu s are the processor's. Floating-point operations (Tflop) "
    "are XLA's count of a step times the steps: it counts the body of a loop once, the costlier "
    "side of a branch always, and no factorizations."
)
_CSV = ("contender", "seed", "step", "gradients", "flops", "seconds", "cpu_seconds")
_CSV_LOSSES = ("train_loss", "test_loss", "test_accuracy", "diverged")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The best setting of a contender, or why there is none.

    Attributes:
        contender: The contender.
        point: The settings that were best.
        runs: Its records, one for each seed.
        failure: Why it cannot run; None beside no records where it was not tried.
    """

    contender: Contender
    point: Settings = dataclasses.field(default_factory=dict)
    runs: tuple[RecordedRun, ...] = ()
    failure: str | None = None


@dataclasses.dataclass(frozen=True)
class Reached:
    """What it took to get somewhere, means over the seeds.

    Attributes:
        contender: Who got there.
        seconds: Training time.
        cpu_seconds: Processor time.
        gradients: Work, in gradients of a batch.
    """

    contender: Contender
    seconds: float
    cpu_seconds: float
    gradients: float

    def cells(self) -> tuple[str, ...]:
        """The three numbers for a table."""
        return tuple(rounded(x, 3) for x in (self.seconds, self.cpu_seconds, self.gradients))


def report(trial: Trial, outcomes: Sequence[Outcome], out: Path) -> str:
    """Prints the tables, writes them with the records and the plot.

    Args:
        trial: The trial.
        outcomes: Of its contenders.
        out: The folder for the files, which have the name of the trial.

    Returns:
        The section about the trial, in Markdown.
    """
    text = _section(trial, outcomes)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{trial.name}.md").write_text(text, encoding="utf-8")
    _write_records(out / trial.name, outcomes)
    ran = [outcome for outcome in outcomes if outcome.runs]
    if ran:
        rows_of_panels = panels([o.runs[0] for o in ran], [o.contender.label for o in ran])
        save_panels(out / f"{trial.name}.png", trial.name, rows_of_panels)
    console.print(f"Plot, tables and records: {out / trial.name}.*", highlight=False)
    return text


def read_outcomes(trial: Trial, path: Path) -> list[Outcome]:
    """The outcomes of a trial from the records that `report` left.

    Args:
        trial: The trial.
        path: Its ``TRIAL.jsonl``.

    Returns:
        One for each contender, without runs for those that have no records.

    Raises:
        SettingError: It is not a file of records.
    """
    recorded, failures = read_runs_and_failures(path)
    runs: dict[str, list[RecordedRun]] = {}
    for run in recorded:
        runs.setdefault(run.header.get("contender", run.header["method"]), []).append(run)
    return [
        Outcome(contender, own[0].header["settings"], tuple(own))
        if (own := runs.get(contender.label))
        else Outcome(contender, failure=failures.get(contender.label))
        for contender in trial.contenders
    ]


def write_region(path: Path, name: str, text: str) -> None:
    """Replaces what stands between the comments of a comparison in a Markdown file.

    Args:
        path: The file. If it has no such comments, they are added at its end.
        name: Of the comparison.
        text: What is to stand there.

    Raises:
        SettingError: The file has the first comment and not the second.
    """
    begin, end = f"<!-- compare {name}: begin -->\n", f"<!-- compare {name}: end -->\n"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    head, found, rest = old.partition(begin)
    if found and end not in rest:
        raise SettingError(f"{path} has {begin.strip()!r} without {end.strip()!r}.")
    tail = rest.partition(end)[2] if found else ""
    gap = "" if found or not head else "\n"
    path.write_text(f"{head}{gap}{begin}\n{text.strip()}\n\n{end}{tail}", encoding="utf-8")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table for a report."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _section(trial: Trial, outcomes: Sequence[Outcome]) -> str:
    """The tables, printed and in Markdown."""
    tried = [outcome for outcome in outcomes if outcome.runs or outcome.failure]
    rows = [_row(outcome) for outcome in tried]
    columns = (*_COLUMNS, *_LOSSES)
    _print(f"{trial.name}, {trial.gradients:g} gradients", columns, rows)
    parts = [f"### {trial.name}\n", f"{_budget(trial, outcomes)}\n"]
    parts.append(markdown(*_without_empty(columns, rows)))
    if len(tried) < len(outcomes):
        names = ", ".join(o.contender.label for o in outcomes if o not in tried)
        parts.append(f"Without records: {names}.\n")
    for title, head, body in _target_tables(trial, outcomes):
        print_table(title, head, body)
        parts.append(f"{title}:\n\n{markdown(head, body)}")
    return "\n".join(parts)


def _budget(trial: Trial, outcomes: Sequence[Outcome]) -> str:
    """What was done for each method, for a reader of the tables."""
    points = sorted({len(list(c.points())) for c in trial.contenders if not c.like})
    seeds = sorted({len(outcome.runs) for outcome in outcomes if outcome.runs}) or [0]
    samples = "all" if trial.train_size is None else trial.train_size
    return (
        f"Problem `{trial.problem}`, {samples} training samples, batches of "
        f"{trial.samples_per_step}. Each method had {_counted(points, 'setting')} to try, each "
        f"with the work of {trial.gradients * trial.tuning:g} gradients of a batch; the best by "
        f"final training loss was run with {trial.gradients:g} and {_counted(seeds, 'seed')}."
    )


def _without_empty(
    columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> tuple[list[str], list[list[Any]]]:
    """The columns that say something, and their cells."""
    kept = [i for i in range(len(columns)) if any(row[i] not in (None, "") for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _counted(numbers: Sequence[int], noun: str) -> str:
    return f"{' or '.join(map(str, numbers))} {noun}{'' if list(numbers) == [1] else 's'}"


def _print(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """The table, as much of it as a terminal is wide for."""
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    for row in table:
        if str(row["settings"]).startswith(_NOT_RUN):
            row["settings"] = _NOT_RUN
    print_table(title, _PRINTED, [tuple(row[column] for column in _PRINTED) for row in table])


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = rounded(value) if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def _row(outcome: Outcome) -> tuple[Any, ...]:
    contender, runs = outcome.contender, outcome.runs
    if not runs:
        blank = (None,) * (len(_COLUMNS) + len(_LOSSES) - 2)
        return (contender.label, f"{_NOT_RUN}: {outcome.failure}", *blank)
    flops = [run.last.get("flops") for run in runs]
    return (
        contender.label,
        label({key: outcome.point[key] for key in contender.grid if key in outcome.point}) or None,
        *(_mean([run.last[key] for run in runs]) for key in ("step", "gradients")),
        _mean([None if number is None else number / 1e12 for number in flops]),
        *(_mean([run.last.get(key) for run in runs]) for key in ("seconds", "cpu_seconds")),
        _mean([run.header["compile_seconds"] for run in runs]),
        _spread([_loss(run.last) for run in runs], "{:.4g}", "diverged"),
        _spread([run.last["test_loss"] for run in runs], "{:.4g}"),
        _spread([run.last.get("test_accuracy") for run in runs], "{:.2%}"),
    )


def _loss(record: Record) -> float | None:
    """The training loss, None of a run that diverged."""
    return None if record["diverged"] else record["train_loss"]


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return None
    mean = statistics.fmean(known)
    return int(mean) if mean.is_integer() else mean


def _spread(numbers: Sequence[float | None], form: str, missing: str | None = None) -> str | None:
    """Mean and standard deviation over the seeds."""
    known = [number for number in numbers if number is not None and math.isfinite(number)]
    if len(known) < len(numbers):
        return missing
    mean = form.format(statistics.fmean(known))
    return f"{mean} ± {form.format(statistics.stdev(known))}" if len(known) > 1 else mean


def _target_tables(
    trial: Trial, outcomes: Sequence[Outcome]
) -> list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    """For each quantity two tables: ours beside the best peer, and all that reached a goal."""
    tables: list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]] = []
    for name, goals in _goals(trial).items():
        reached = {
            goal: [found for o in outcomes if (found := _reached(o, passes))]
            for goal, passes in goals.items()
        }
        if not any(reached.values()):
            continue
        unit = ("cpu s", "gradients")
        head = (name, "ours", *unit, "best peer", *unit, "peer / ours")
        body = [_headline(goal, found) for goal, found in reached.items()]
        tables.append((f"{trial.name}, to reach a {name}", head, body))
        every = [
            (outcome.contender.label, *cells)
            for outcome in outcomes
            if any(cells := [_short(outcome, found) for found in reached.values()])
        ]
        title = f"{trial.name}, seconds / processor seconds / gradients to reach a {name}"
        tables.append((title, ("method", *reached), every))
    return tables


Passes = Callable[[Record], bool]


def _goals(trial: Trial) -> dict[str, dict[str, Passes]]:
    """By quantity and by the name of a goal, which records have reached it."""

    def at_most(target: float) -> Passes:
        return lambda record: _loss(record) is not None and record["train_loss"] <= target

    def at_least(target: float) -> Passes:
        return lambda record: (record.get("test_accuracy") or 0) >= target

    goals = {
        "training loss": {f"{goal:.4g}": at_most(goal) for goal in trial.targets},
        "test accuracy": {f"{goal:.1%}": at_least(goal) for goal in trial.accuracies},
    }
    return {name: passes for name, passes in goals.items() if passes}


def _reached(outcome: Outcome, passes: Passes) -> Reached | None:
    """When the runs had first reached a goal; None if one of them never had."""
    first = [next(filter(passes, run.records), None) for run in outcome.runs]
    records = [record for record in first if record is not None]
    if not records or len(records) < len(first):
        return None
    numbers = {
        key: statistics.fmean(record.get(key, math.nan) for record in records)
        for key in ("seconds", "cpu_seconds", "gradients")
    }
    return Reached(outcome.contender, **numbers)


def _headline(goal: str, found: Sequence[Reached]) -> tuple[Any, ...]:
    """The best method of the package beside the best peer, by processor time."""
    ours, peer = (
        min(
            (one for one in found if one.contender.is_peer == is_peer),
            key=lambda one: one.cpu_seconds,
            default=None,
        )
        for is_peer in (False, True)
    )
    cells = [
        (one.contender.label, *one.cells()[1:]) if one else ("none", "", "") for one in (ours, peer)
    ]
    ratio = f"{peer.cpu_seconds / ours.cpu_seconds:.3g}" if ours and peer else None
    return (goal, *cells[0], *cells[1], ratio)


def _short(outcome: Outcome, found: Sequence[Reached]) -> str | None:
    own = [one for one in found if one.contender == outcome.contender]
    return " / ".join(own[0].cells()) if own else None


def _write_records(path: Path, outcomes: Sequence[Outcome]) -> None:
    """All records as JSON Lines, and their numbers as CSV."""
    with (
        path.with_name(f"{path.name}.jsonl").open("w", encoding="utf-8") as lines,
        path.with_name(f"{path.name}.csv").open("w", encoding="utf-8", newline="") as table,
    ):
        writer = csv.DictWriter(table, (*_CSV, *_CSV_LOSSES), extrasaction="ignore")
        writer.writeheader()
        for outcome in outcomes:
            names = {"contender": outcome.contender.label}
            if outcome.failure is not None:
                print(json.dumps({**failure_record(outcome.failure), **names}), file=lines)
            for run in outcome.runs:
                for record in run.records:
                    print(json.dumps({**record, **names}), file=lines)
                    writer.writerow({**record, **names, "seed": run.header["seed"]})
