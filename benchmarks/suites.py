"""Comparisons that are not of training: the commands that have them, through one door."""

import argparse
import csv
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import deterministic, regression, saddles
from benchmarks.comparison_report import markdown
from benchmarks.data import DataError
from benchmarks.display import console
from benchmarks.functions import FUNCTIONS
from benchmarks.least_squares import REGRESSIONS
from benchmarks.plotting import Line, save_profile
from benchmarks.records import Record, read_records
from benchmarks.saddle_points import SADDLES
from benchmarks.settings import SettingError

_QUICK_PROBLEMS = 2


@dataclasses.dataclass(frozen=True)
class Part:
    """A command with its problems.

    Attributes:
        command: Its module.
        problems: Names of its problems.
        columns: What is shown of each record, beside the problem and the method.
        work: What is counted until a problem is solved.
        solved: The entry that says whether it is; None where ``work`` is empty if it is not.
        quick: Arguments for a quick run.
        has_data: Whether it takes a folder of data.
    """

    command: ModuleType
    problems: Sequence[str]
    columns: Sequence[str]
    work: str
    solved: str | None = None
    quick: Sequence[str] = ()
    has_data: bool = False

    @property
    def name(self) -> str:
        """Of the command, and of the files."""
        return self.command.__name__.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class Suite:
    """Commands that make one comparison.

    Attributes:
        description: One line.
        parts: The commands.
    """

    description: str
    parts: tuple[Part, ...]


SUITES: Mapping[str, Suite] = {
    "classical": Suite(
        "5 min: deterministic and regression, beside SciPy, L-BFGS of optax, and optimistix",
        (
            Part(
                deterministic,
                tuple(FUNCTIONS),
                ("gradients", "values", "products", "value", "gradient_norm", "seconds"),
                work="gradients",
                solved="reached",
                quick=("--max-gradients", "50"),
                has_data=True,
            ),
            Part(
                regression,
                tuple(REGRESSIONS),
                ("steps", "residuals", "sum_of_squares", "gradient_norm", "seconds"),
                work="residuals",
                solved="converged",
                quick=("--max-steps", "20"),
            ),
        ),
    ),
    "saddles": Suite(
        "10 min: saddles, L-SR1, both saddle-free methods, L-BFGS, Adam and SGD",
        (
            Part(
                saddles,
                tuple(SADDLES),
                ("start_value", "minimum", "final_value", "gradients_to_reach", "gradient_norm"),
                work="gradients_to_reach",
                quick=("--max-gradients", "50"),
            ),
        ),
    ),
}


def run(suite: Suite, out: Path, data_dir: str | None, quick: bool) -> list[str]:
    """Runs the commands of a suite on one problem after another; those on file are not repeated.

    Args:
        suite: The suite.
        out: The folder for the records of each problem, and for tables and plots.
        data_dir: The folder of the data, or None for the default.
        quick: Whether to run two problems of each command with little work.

    Returns:
        A section for each command, in Markdown.
    """
    return [_run_part(part, out, data_dir, quick) for part in suite.parts]


def _run_part(part: Part, out: Path, data_dir: str | None, quick: bool) -> str:
    name = f"{part.name}-quick" if quick else part.name
    arguments = [*part.quick] if quick else []
    if part.has_data and data_dir is not None:
        arguments += ["--data-dir", data_dir]
    records: list[Record] = []
    failures = []
    for problem in part.problems[:_QUICK_PROBLEMS] if quick else part.problems:
        try:
            records += _records(part, problem, arguments, out / name)
        except (DataError, SettingError) as error:
            failures.append(f"* {problem} not run: {error}")
            console.print(failures[-1], markup=False)
    shown = [record for record in records if record.get("is_best", True)]
    _write_csv(out / f"{name}.csv", records)
    unit = f"{part.work.replace('_', ' ')}, in multiples of the best"
    if shown:
        save_profile(out / f"{name}.png", name, unit, _profile(part, shown))
    console.print(f"Plot, table and records: {out / name}*", highlight=False)
    columns = ("problem", "method", *([part.solved] if part.solved else []), *part.columns)
    rows = [[_cell(record, column) for column in columns] for record in shown]
    heads = [column.replace("_", " ") for column in columns]
    return "\n".join([f"### {name}\n", markdown(heads, rows), *failures])


def _records(part: Part, problem: str, arguments: Sequence[str], folder: Path) -> list[Record]:
    """The records of all methods on a problem, from its file if that is whole."""
    path = folder / f"{problem}.jsonl"
    if not path.exists():
        unfinished = path.with_suffix(".part")
        unfinished.unlink(missing_ok=True)
        parser = argparse.ArgumentParser()
        part.command.add_arguments(parser)
        own = ["--problems", problem, "--json", str(unfinished)]
        part.command.run(parser.parse_args([*own, *arguments]))
        unfinished.rename(path)
    return read_records(path)


def _cell(record: Record, column: str) -> Any:
    value = _method(record) if column == "method" else record[column]
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def _method(record: Record) -> str:
    settings = " ".join(f"{key}={value}" for key, value in record["settings"].items())
    return f"{record['method']} {settings}".strip()


def _profile(part: Part, records: Iterable[Record]) -> list[Line]:
    """By method, the share of problems solved with so many times the work of the best method.

    Dolan and More (2002), "Benchmarking optimization software with performance profiles".
    """
    work: dict[str, dict[str, float]] = {}
    for record in records:
        is_solved = record[part.solved] if part.solved else record[part.work] is not None
        own = work.setdefault(record["method"], {})
        own[record["problem"]] = max(record[part.work], 1) if is_solved else math.inf
    problems = sorted({problem for own in work.values() for problem in own})
    best = {
        problem: min(own.get(problem, math.inf) for own in work.values()) for problem in problems
    }
    lines = []
    for method, own in work.items():
        solved = [p for p in problems if math.isfinite(own.get(p, math.inf))]
        ratios = sorted(own[problem] / best[problem] for problem in solved)
        shares = [(number + 1) / len(problems) for number in range(len(ratios))]
        lines.append(Line(method, ratios, shares))
    return lines


def _write_csv(path: Path, records: Sequence[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = dict.fromkeys(key for record in records for key in record if key != "versions")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(keys), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
