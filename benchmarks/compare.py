"""``compare``: tunes and trains the methods of a named comparison, and writes tables and plots."""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

from benchmarks.arguments import add_data_dir
from benchmarks.comparisons import COMPARISONS, Contender, Trial
from benchmarks.data import DataOptions, Splits
from benchmarks.display import LOSS_COLUMNS, console, print_table, progress_bar, watch
from benchmarks.methods import METHODS
from benchmarks.plotting import save_panels
from benchmarks.problems import PROBLEMS
from benchmarks.records import open_writer
from benchmarks.run_records import RecordedRun, panels, read_runs, written
from benchmarks.settings import SettingError, Settings
from benchmarks.sweeps import label
from benchmarks.training import Run, RunOptions

_COLUMNS = ("method", "settings", "updates", "gradients", "seconds", *LOSS_COLUMNS)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The best run of a contender.

    Attributes:
        contender: The contender.
        point: The settings that were best.
        run: Its records.
    """

    contender: Contender
    point: Settings
    run: RecordedRun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("comparison", choices=sorted(COMPARISONS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("comparisons"), metavar="DIR")
    parser.add_argument("--only", metavar="TRIAL", help="this one of its trials")
    parser.add_argument("--seed", type=int, default=0, help="of initial values and shuffles")
    parser.add_argument("--quick", action="store_true", help="little data and work")
    add_data_dir(parser)


def catalogue() -> str:
    """The comparisons with their trials."""
    lines = [
        f"  {name:28} {', '.join(trial.name for trial in trials)}"
        for name, trials in COMPARISONS.items()
    ]
    return "\n".join(["comparisons:", *lines])


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    for trial in _trials(args):
        options = DataOptions.from_environment(args.data_dir, trial.train_size, trial.test_size)
        splits = PROBLEMS[trial.problem].load(options)
        outcomes = list(_outcomes(trial, splits, args.out / trial.problem, args.seed))
        _report(trial, outcomes, args.out)
    return 0


def _trials(args: argparse.Namespace) -> list[Trial]:
    trials = [t for t in COMPARISONS[args.comparison] if args.only in (None, t.name)]
    if not trials:
        names = ", ".join(trial.name for trial in COMPARISONS[args.comparison])
        raise SettingError(f"{args.comparison} has no trial {args.only}; it has: {names}.")
    return [trial.shortened() if args.quick else trial for trial in trials]


def _outcomes(trial: Trial, splits: Splits, folder: Path, seed: int) -> Iterator[Outcome]:
    """The best run of every contender; runs that are on file are not repeated."""
    chosen: dict[str, Settings] = {}
    for contender in trial.contenders:
        points = [chosen[contender.like]] if contender.like else list(contender.points())
        runs = [_recorded(trial, contender, point, splits, folder, seed) for point in points]
        point, best = min(zip(points, runs, strict=True), key=lambda pair: _rank(pair[1]))
        chosen[contender.label] = point
        yield Outcome(contender, point, best)


def _recorded(
    trial: Trial, contender: Contender, point: Settings, splits: Splits, folder: Path, seed: int
) -> RecordedRun:
    """The records of a run, from its file if it was finished before."""
    options = RunOptions(
        PROBLEMS[trial.problem],
        METHODS[contender.method],
        overrides=point,
        gradients=trial.gradients,
        seed=seed,
        batch_size=trial.batch_size,
        curvature_batch_size=contender.curvature_batch_size,
        records=trial.records,
    )
    path = folder / f"{_file_name(options, len(splits.train))}.jsonl"
    if not path.exists():
        _train(Run(options, splits), path, f"{trial.name}: {contender.label} {label(point)}")
    (run,) = read_runs(path)
    return run


def _file_name(options: RunOptions, train_size: int) -> str:
    """All that tells a run from others on the problem."""
    sizes = f"{train_size} {options.samples_per_step} {options.curvature_batch_size}"
    settings = label(dict(options.overrides))
    return f"{options.method.name} {settings} {sizes} {options.gradients:g} {options.seed}".replace(
        " ", "_"
    )


def _train(run: Run, path: Path, title: str) -> None:
    """Trains; the file has its name only once it is whole."""
    unfinished = path.with_suffix(".part")
    unfinished.unlink(missing_ok=True)
    with open_writer(str(unfinished)) as write, progress_bar() as progress:
        list(written(run, watch(run, progress, title), write))
    unfinished.rename(path)


def _rank(run: RecordedRun) -> float:
    last = run.last
    return math.inf if last["diverged"] else float(last["train_loss"])


def _report(trial: Trial, outcomes: list[Outcome], out: Path) -> None:
    """Prints the table; writes it, all records, and the plot."""
    title = f"{trial.name}, {trial.gradients:g} gradients"
    rows = [_row(outcome) for outcome in outcomes]
    print_table(title, _COLUMNS, rows)
    (out / f"{trial.name}.md").write_text(_markdown(rows), encoding="utf-8")
    with (out / f"{trial.name}.jsonl").open("w", encoding="utf-8") as file:
        for outcome in outcomes:
            for record in outcome.run.records:
                print(json.dumps({**record, "contender": outcome.contender.label}), file=file)
    runs = [outcome.run for outcome in outcomes]
    labels = [outcome.contender.label for outcome in outcomes]
    save_panels(out / f"{trial.name}.png", title, panels(runs, labels))
    console.print(f"Plot, table and records: {out / trial.name}.*", highlight=False)


def _row(outcome: Outcome) -> tuple[object, ...]:
    return (
        outcome.contender.label,
        label({key: outcome.point[key] for key in outcome.contender.grid}) or None,
        *outcome.run.cells(),
    )


def _markdown(rows: list[tuple[object, ...]]) -> str:
    """The table for a report."""
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
