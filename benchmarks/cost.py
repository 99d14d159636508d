"""``cost``: measures the cost of a training step relative to the gradient and to Adam.

All contestants are timed in one process, in turns, and ratios are taken within a turn, so that
whatever else the machine does hits both sides of a ratio. Compilation is measured apart.
"""

import argparse
import statistics
from collections.abc import Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from benchmarks.arguments import add_curvature_batch, add_json, add_problem, add_settings, load_data
from benchmarks.contestants import (
    Contestant,
    GradientContestant,
    MethodContestant,
    Setup,
    steps_per_timing,
)
from benchmarks.display import console, print_table, progress_bar
from benchmarks.methods import METHODS, Method
from benchmarks.problems import PROBLEMS, Batch
from benchmarks.records import Record, open_writer, versions
from benchmarks.settings import SettingError, Settings, parse_settings, parse_variant
from benchmarks.steps import CompiledStep

# Long enough that neither the clock nor the dispatch of a step counts.
_TIMING_SECONDS = 0.25
_COMPILATIONS = 3
_COLUMNS = {
    "step_over_gradient": "step\n/grad",
    "step_over_adam": "step\n/Adam",
    "flops_over_gradient": "flops\n/grad",
    "bytes_over_gradient": "bytes\n/grad",
    "state_over_params": "state\n/params",
    "compile_seconds": "compile\nseconds",
    "compile_over_adam": "compile\n/Adam",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_problem(parser)
    add_curvature_batch(parser)
    parser.add_argument(
        "--methods",
        required=True,
        metavar="M,N,...",
        help="methods, each with settings of its own if wanted: kbfgs:update_every=10",
    )
    parser.add_argument("--repeats", type=int, default=10, metavar="R", help="timings of each")
    add_settings(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    counts = (args.repeats, args.batch_size, args.curvature_batch_size)
    if any(count is not None and count < 1 for count in counts):
        raise SettingError("--repeats and batch sizes must be at least 1.")
    # A cache on disk would make the compile times those of reading it.
    jax.config.update("jax_enable_compilation_cache", False)  # type: ignore[no-untyped-call]
    variants = [_variant(args, text) for text in args.methods.split(",")]
    setup = _setup(args)
    gradient = GradientContestant(setup)
    adam = MethodContestant(setup, METHODS["adam"], {}, label="adam")
    methods = [MethodContestant(setup, *variant) for variant in variants]
    contestants: list[Contestant] = [gradient, adam, *methods]
    compiled = _compile_all(contestants)
    seconds = _time_all(contestants, args.repeats)
    records = [
        _record(setup, method, seconds, compiled, column)
        for column, method in enumerate(methods, start=2)
    ]
    with open_writer(args.json) as write:
        for record in records:
            write(record)
    _print_records(setup, records)
    return 0


def _setup(args: argparse.Namespace) -> Setup:
    problem = PROBLEMS[args.problem]
    return Setup(
        problem,
        data=Batch.put(load_data(problem, args).train),
        params=jax.jit(problem.init)(jax.random.key(args.seed)),
        batch_size=args.batch_size or problem.batch_size,
        curvature_batch_size=args.curvature_batch_size,
    )


def _variant(args: argparse.Namespace, text: str) -> tuple[Method, Settings, str]:
    """Method, overrides and label of one of ``--methods``, checked before the data is read."""
    name, own = parse_variant(text)
    if name not in METHODS:
        raise SettingError(f"There is no method {name!r}; there are: {', '.join(METHODS)}.")
    overrides = {**parse_settings(args.settings), **own}
    METHODS[name].settings(PROBLEMS[args.problem], overrides)
    return METHODS[name], overrides, text


def _compile_all(contestants: Sequence[Contestant]) -> list[list[CompiledStep]]:
    """Compiles each contestant several times from cold caches, in turns.

    Returns:
        Compiled steps by contestant and turn.
    """
    turns = []
    with progress_bar() as progress:
        task = progress.add_task("compile", total=_COMPILATIONS * len(contestants), status="")
        for _ in range(_COMPILATIONS):
            turn = []
            for contestant in contestants:
                progress.update(task, status=contestant.label)
                jax.clear_caches()  # type: ignore[no-untyped-call]
                turn.append(contestant.compile())
                progress.advance(task)
            turns.append(turn)
    return [list(steps) for steps in zip(*turns, strict=True)]


def _time_all(contestants: Sequence[Contestant], repeats: int) -> NDArray[np.float64]:
    """Seconds per step, ``(repeats, contestants)``, timed in turns."""
    counts = []
    for contestant in contestants:
        contestant.run(contestant.period)  # The first steps also load code and fill caches.
        step_seconds = contestant.run(contestant.period) / contestant.period
        counts.append(steps_per_timing(contestant, step_seconds, _TIMING_SECONDS))
    seconds = np.empty((repeats, len(contestants)))
    with progress_bar() as progress:
        task = progress.add_task("time", total=seconds.size, status="")
        for turn in range(repeats):
            # Another one begins each turn: who follows whom must not matter.
            for place in range(len(contestants)):
                column = (place + turn) % len(contestants)
                contestant = contestants[column]
                progress.update(task, status=contestant.label)
                seconds[turn, column] = contestant.run(counts[column]) / counts[column]
                progress.advance(task)
    return seconds


def _record(
    setup: Setup,
    contestant: MethodContestant,
    seconds: NDArray[np.float64],
    compiled: Sequence[Sequence[CompiledStep]],
    column: int,
) -> Record:
    """The record of one method; columns 0 and 1 are the gradient and Adam."""
    ratios = seconds[:, column, None] / seconds
    compile_turns = np.array([[step.compile_seconds for step in steps] for steps in compiled])
    own, gradient = compiled[column][-1], compiled[0][-1]
    return {
        "problem": setup.problem.name,
        "method": contestant.method.name,
        "label": contestant.label,
        "settings": contestant.settings,
        "batch_size": setup.batch_size,
        "curvature_batch_size": setup.curvature_batch_size,
        "step_over_gradient": float(np.median(ratios[:, 0])),
        "step_over_adam": float(np.median(ratios[:, 1])),
        "step_over_gradient_quartiles": np.quantile(ratios[:, 0], [0.25, 0.75]).tolist(),
        "step_seconds": float(np.median(seconds[:, column])),
        "gradient_seconds": float(np.median(seconds[:, 0])),
        "flops_over_gradient": _cost_ratio(own, gradient, "flops"),
        "bytes_over_gradient": _cost_ratio(own, gradient, "bytes accessed"),
        "flops": own.costs.get("flops"),
        "bytes_accessed": own.costs.get("bytes accessed"),
        "temporary_bytes": own.temporary_bytes,
        "compile_seconds": statistics.median(compile_turns[column]),
        "compile_over_adam": float(np.median(compile_turns[column] / compile_turns[1])),
        "setup_seconds": contestant.setup_seconds,
        "state_elements": contestant.state_elements(),
        "state_bytes": contestant.state_bytes(),
        "state_over_params": contestant.state_elements() / contestant.parameter_elements(),
        "repeats": len(seconds),
        "versions": versions(),
    }


def _cost_ratio(step: CompiledStep, unit: CompiledStep, key: str) -> float | None:
    """Ratio of two of XLA's counts, None where it does not count."""
    if key not in step.costs or not unit.costs.get(key):
        return None
    return step.costs[key] / unit.costs[key]


def _print_records(setup: Setup, records: Sequence[Record]) -> None:
    title = f"Cost of a step on {setup.problem.name}, batch {setup.batch_size}"
    labels = [record["label"].replace(":", "\n ") for record in records]
    rows = [
        (label, *(record[key] for key in _COLUMNS))
        for label, record in zip(labels, records, strict=True)
    ]
    print_table(title, ("method", *_COLUMNS.values()), rows)
    console.print(
        "Times are medians of ratios within a turn. XLA counts the costlier branch of a lax.cond "
        "as if every step took it, so its counts do not show update_every.",
        style="dim",
    )
