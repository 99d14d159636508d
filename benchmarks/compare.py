"""``compare``: tunes and trains the methods of a named comparison, and writes tables and plots."""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks import suites
from benchmarks.arguments import add_data_dir
from benchmarks.comparison_report import NOTES, Outcome, read_outcomes, report, write_region
from benchmarks.comparisons import COMPARISONS
from benchmarks.data import DataOptions, Splits
from benchmarks.display import console, progress_bar, watch
from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.records import open_writer
from benchmarks.run_records import RecordedRun, read_runs, written
from benchmarks.settings import SettingError, Settings
from benchmarks.suites import SUITES
from benchmarks.sweeps import label
from benchmarks.training import Run, RunOptions
from benchmarks.trials import Contender, Trial

_RESULTS = Path(__file__).with_name("RESULTS.md")


@dataclasses.dataclass(frozen=True)
class Session:
    """What the runs of a trial share.

    Attributes:
        trial: The trial.
        splits: Its data.
        folder: For the records of its runs.
        seed: Of the runs to tune with; the others follow it.
        seeds: How often the best setting is run.
    """

    trial: Trial
    splits: Splits
    folder: Path
    seed: int
    seeds: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    names = sorted((*COMPARISONS, *SUITES))
    parser.add_argument("comparison", choices=names, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("comparisons"), metavar="DIR")
    parser.add_argument(
        "--records",
        type=Path,
        metavar="DIR",
        help="run nothing: make the tables from the TRIAL.jsonl that earlier runs left in DIR",
    )
    parser.add_argument("--only", metavar="TRIAL", help="this one of its trials")
    parser.add_argument("--methods", metavar="M,N,...", help="these of its methods; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of initial values and shuffles")
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="run the best settings with N seeds, from --seed on; default %(default)s",
    )
    parser.add_argument("--quick", action="store_true", help="little data and work")
    parser.add_argument(
        "--write-results",
        nargs="?",
        type=Path,
        const=_RESULTS,
        metavar="FILE",
        help="put the tables between the comments of the comparison in FILE; default: RESULTS.md",
    )
    add_data_dir(parser)


def catalogue() -> str:
    """The comparisons with their trials and their lengths."""
    lines = ["comparisons, with their length on one core for one seed and for three:"]
    for name, trials in COMPARISONS.items():
        lengths = ", ".join(_duration(sum(t.hours(seeds) for t in trials)) for seeds in (1, 3))
        lines.append(f"  {name:26} {lengths}: {', '.join(trial.name for trial in trials)}")
    lines += [f"  {name:26} {suite.description}" for name, suite in SUITES.items()]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.seeds < 1:
        raise SettingError("--seeds must be at least 1.")
    with _compiled_fast() if args.quick else contextlib.nullcontext():
        if args.comparison in SUITES:
            _refuse_trial_options(args)
            sections = suites.run(SUITES[args.comparison], args.out, args.data_dir, args.quick)
        else:
            make = _run_trials if args.records is None else _read_trials
            sections = [f"{NOTES}\n", *make(args)]
    text = "\n".join([f"Made by `{_command(args)}`.\n", *sections])
    (args.out / f"{args.comparison}.md").write_text(text, encoding="utf-8")
    if args.write_results is not None:
        write_region(args.write_results, args.comparison, text)
        console.print(f"Results: {args.write_results}", highlight=False)
    return 0


@contextlib.contextmanager
def _compiled_fast() -> Iterator[None]:
    """For runs that are mostly compilation, and whose seconds say nothing."""
    option = "jax_disable_most_optimizations"
    jax.config.update(option, True)
    try:
        yield
    finally:
        jax.config.update(option, False)


def _command(args: argparse.Namespace) -> str:
    """The command line that makes the same tables, wherever their files are."""
    words = ["python -m benchmarks compare", args.comparison]
    for option in ("only", "methods", "seed", "seeds", "records"):
        value = getattr(args, option)
        if value not in (None, {"seed": 0, "seeds": 1}.get(option)):
            words.append(f"--{option} {value}")
    return " ".join([*words, "--quick"] if args.quick else words)


def _refuse_trial_options(args: argparse.Namespace) -> None:
    if args.only or args.methods or args.records or args.seeds > 1:
        raise SettingError(f"{args.comparison} has no --only, --methods, --records and --seeds.")


def _run_trials(args: argparse.Namespace) -> list[str]:
    trials = _trials(args)
    hours = sum(trial.hours(args.seeds) for trial in trials)
    count = sum(trial.runs(args.seeds) for trial in trials)
    console.print(
        f"{count} runs, about {_duration(hours)} on one core; those on file are not repeated.",
        highlight=False,
    )
    sections = []
    for trial in trials:
        options = DataOptions.from_environment(args.data_dir, trial.train_size, trial.test_size)
        splits = PROBLEMS[trial.problem].load(options)
        session = Session(trial, splits, args.out / trial.problem, args.seed, args.seeds)
        sections.append(report(trial, list(_outcomes(session)), args.out))
    return sections


def _read_trials(args: argparse.Namespace) -> list[str]:
    """The sections of the trials whose records are in the folder; those of others say so."""
    if args.quick or args.seeds > 1:
        raise SettingError("--records runs nothing: leave --quick and --seeds out.")
    trials = _trials(args)
    if not any((args.records / f"{trial.name}.jsonl").exists() for trial in trials):
        names = ", ".join(f"{trial.name}.jsonl" for trial in trials)
        raise SettingError(f"{args.records} has none of the records of {args.comparison}: {names}.")
    sections = []
    for trial in trials:
        path = args.records / f"{trial.name}.jsonl"
        if path.exists():
            sections.append(report(trial, read_outcomes(trial, path), args.out))
        else:
            sections.append(f"### {trial.name}\n\nNot run: there is no {path.name}.\n")
    return sections


def _trials(args: argparse.Namespace) -> list[Trial]:
    trials = [t for t in COMPARISONS[args.comparison] if args.only in (None, t.name)]
    if not trials:
        names = ", ".join(trial.name for trial in COMPARISONS[args.comparison])
        raise SettingError(f"{args.comparison} has no trial {args.only}; it has: {names}.")
    if args.methods is not None:
        trials = [_with_methods(trial, args.methods.split(",")) for trial in trials]
    if args.quick:
        trials = [trial.shortened(is_first=trial is trials[0]) for trial in trials]
    return trials


def _with_methods(trial: Trial, names: list[str]) -> Trial:
    known = {contender.label: contender for contender in trial.contenders}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SettingError(f"{trial.name} has no {', '.join(unknown)}; it has: {', '.join(known)}.")
    chosen = {name: known[name] for name in known if name in names}
    missing = [c.like for c in chosen.values() if c.like and c.like not in chosen]
    if missing:
        raise SettingError(f"{', '.join(missing)} must be among --methods: others take its rates.")
    return dataclasses.replace(trial, contenders=tuple(chosen.values()))


def _outcomes(session: Session) -> Iterator[Outcome]:
    """The best setting of every contender; runs that are on file are not repeated."""
    chosen: dict[str, Settings] = {}
    for number, contender in enumerate(session.trial.contenders, start=1):
        title = f"{number}/{len(session.trial.contenders)} {session.trial.name}"
        try:
            if contender.like and contender.like not in chosen:
                raise SettingError(f"it takes the settings of {contender.like}, which has not run")
            given = [chosen[contender.like]] if contender.like else list(contender.points())
            point = _tuned(session, contender, given, title)
            seeds = range(session.seed, session.seed + session.seeds)
            runs = [_recorded(session, contender, point, seed, 1.0, title) for seed in seeds]
        except SettingError as error:
            console.print(f"{title}: {contender.label} not run: {error}", markup=False)
            yield Outcome(contender, failure=str(error))
        else:
            chosen[contender.label] = point
            yield Outcome(contender, point, tuple(runs))


def _tuned(session: Session, contender: Contender, points: list[Settings], title: str) -> Settings:
    """The point whose run ends at the smallest training loss."""
    if len(points) == 1:
        return points[0]
    share = session.trial.tuning
    runs = [_recorded(session, contender, point, session.seed, share, title) for point in points]
    return min(zip(points, runs, strict=True), key=lambda pair: _rank(pair[1]))[0]


def _recorded(
    session: Session, contender: Contender, point: Settings, seed: int, share: float, title: str
) -> RecordedRun:
    """The records of a run, from its file if it was finished before."""
    trial = session.trial
    options = RunOptions(
        PROBLEMS[trial.problem],
        METHODS[contender.method],
        overrides=point,
        gradients=trial.gradients * share,
        seed=seed,
        batch_size=trial.batch_size,
        curvature_batch_size=contender.curvature_batch_size,
        records=trial.records if share == 1 else 2,
    )
    path = session.folder / f"{_file_name(options, len(session.splits.train))}.jsonl"
    if not path.exists():
        run = _compiled(options, session.splits)
        _train(run, path, f"{title}: {contender.label} {label(point)} seed={seed}")
    (run_on_file,) = read_runs(path)
    return run_on_file


def _compiled(options: RunOptions, splits: Splits) -> Run:
    """The run, or an error of one kind where a method does not treat the model."""
    try:
        return Run(options, splits)
    except SettingError:
        raise
    except (NotImplementedError, TypeError, ValueError) as error:
        message = (str(error).splitlines() or [""])[0]
        raise SettingError(f"{type(error).__name__}: {message}") from error


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
    return math.inf if run.last["diverged"] else float(run.last["train_loss"])


def _duration(hours: float) -> str:
    return f"{hours:.0f} h" if hours >= 2 else f"{60 * hours:.0f} min"
