"""``saddles``: minimizes from saddle points, exactly and nearly stationary ones.

A method that follows the gradient stays at the first and needs long to leave the second. Everything
runs in double precision.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.arguments import add_json
from benchmarks.display import console, print_table, progress_bar
from benchmarks.functions import Instance
from benchmarks.minimization import Iterate, Limits, iterates, within
from benchmarks.precision import double_precision
from benchmarks.records import Record, Writer, open_writer, versions
from benchmarks.saddle_points import SADDLES, Saddle
from benchmarks.settings import SettingError, Settings, choose_problems
from benchmarks.solvers import SOLVERS, Variant, available, solver_catalogue

# How far the value may still be above the minimum, as a share of the way from the start.
_SHARE = 1e-3
_COLUMNS = ("method", "start", "minimum", "final", "gradients\nto reach", "gradient\nnorm")


class Trial(NamedTuple):
    """A run from a saddle point.

    Attributes:
        settings: Of the method.
        start: The first point.
        last: The last point within the budget whose value is finite.
        reached: Gradients until the value was near the minimum, None if it never was.
        is_finite: Whether all values were finite.
    """

    settings: Settings
    start: Iterate
    last: Iterate
    reached: int | None
    is_finite: bool

    def rank(self) -> tuple[bool, float, float]:
        """Smaller for better runs: by gradients to reach the minimum, then by the last value."""
        reached = math.inf if self.reached is None else self.reached
        return not self.is_finite, reached, self.last.value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--problems", metavar="P,Q,...", help="saddle points; default: all")
    parser.add_argument(
        "--methods",
        metavar="M,N,...",
        help="methods, each with settings of its own if wanted: adam:learning_rate=0.1; "
        "default: all. Of those with a learning rate the best of a few is shown.",
    )
    parser.add_argument(
        "--max-gradients",
        type=int,
        default=500,
        metavar="N",
        help="gradients of each run; default %(default)s",
    )
    add_json(parser)


def catalogue() -> str:
    """The saddle points and methods with their descriptions."""
    saddles = [f"  {name:24} {saddle.description}" for name, saddle in SADDLES.items()]
    return "\n".join(["problems:", *saddles, "", *solver_catalogue()])


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.max_gradients < 1:
        raise SettingError("--max-gradients must be positive.")
    limits = Limits(args.max_gradients)
    saddles = choose_problems(args.problems, SADDLES)
    with double_precision():
        variants = _variants(args.methods)
        with open_writer(args.json) as write:
            records = list(_records(saddles, variants, limits, write))
    for saddle in saddles:
        _print_records(saddle, [r for r in records if r["problem"] == saddle.name])
    console.print(
        f"Reached: within {_SHARE:g} of (start - minimum) above the minimum; final: after "
        f"{limits.max_gradients} gradients.",
        style="dim",
    )
    return 0


def try_saddle(
    saddle: Saddle, instance: Instance, variant: Variant, settings: Settings, limits: Limits
) -> Trial:
    """Runs a method from a saddle point until the budget is used up."""
    points = within(limits, iterates(instance, variant.solver, settings))
    start = last = next(points)
    bound = saddle.minimum + _SHARE * (start.value - saddle.minimum)
    reached: int | None = None
    for point in points:
        if not math.isfinite(point.value):
            return Trial(settings, start, last, reached, is_finite=False)
        last = point
        if reached is None and point.value <= bound:
            reached = point.gradients
    return Trial(settings, start, last, reached, is_finite=True)


def _variants(methods: str | None) -> list[Variant]:
    texts = available(SOLVERS) if methods is None else methods.split(",")
    variants = [Variant.parse(text) for text in texts]
    for _, solver, overrides in variants:
        for settings in solver.trials(overrides):
            solver.build(settings)  # Mistakes are reported before anything is run.
    return variants


def _records(
    saddles: list[Saddle], variants: list[Variant], limits: Limits, write: Writer
) -> Iterator[Record]:
    """Runs every method from every saddle; writes a record of each trial, yields the best."""
    with progress_bar() as progress:
        task = progress.add_task("saddles", total=len(saddles) * len(variants), status="")
        for saddle in saddles:
            instance = saddle.load()
            for variant in variants:
                progress.update(task, status=f"{saddle.name} {variant.label}")
                trials = [
                    try_saddle(saddle, instance, variant, settings, limits)
                    for settings in variant.solver.trials(variant.overrides)
                ]
                best = min(trials, key=Trial.rank)
                for trial in trials:
                    record = _record(saddle, variant, limits, trial, is_best=trial is best)
                    write({**record, "versions": versions()})
                yield _record(saddle, variant, limits, best, is_best=True)
                progress.advance(task)


def _record(
    saddle: Saddle, variant: Variant, limits: Limits, trial: Trial, is_best: bool
) -> Record:
    return {
        "problem": saddle.name,
        "method": variant.solver.name,
        "label": variant.label,
        "settings": trial.settings,
        "is_best": is_best,
        "max_gradients": limits.max_gradients,
        "start_value": trial.start.value,
        "minimum": saddle.minimum,
        "final_value": trial.last.value,
        "gradients_to_reach": trial.reached,
        "gradient_norm": trial.last.gradient_norm,
        "gradients": trial.last.gradients,
        "updates": trial.last.updates,
        "seconds": trial.last.seconds,
        "diverged": not trial.is_finite,
    }


def _print_records(saddle: Saddle, records: list[Record]) -> None:
    rows = [
        (
            _name(record["method"], record["settings"]),
            record["start_value"],
            record["minimum"],
            "diverged" if record["diverged"] else record["final_value"],
            record["gradients_to_reach"],
            record["gradient_norm"],
        )
        for record in records
    ]
    print_table(f"{saddle.name}: {saddle.description}", _COLUMNS, rows)


def _name(method: str, settings: Mapping[str, Any]) -> str:
    """The method with the settings that were best, each on a line of its own."""
    return "\n ".join([method, *(f"{key}={value}" for key, value in settings.items())])
