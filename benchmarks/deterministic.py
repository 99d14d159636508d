"""``deterministic``: minimizes smooth functions until the gradient is small, and counts gradients.

Everything runs in double precision. The methods of this package and optax stand beside SciPy's.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks import minimization, scipy_peers
from benchmarks.arguments import add_data_dir, add_json
from benchmarks.data import DataOptions
from benchmarks.display import console, print_table, progress_bar
from benchmarks.functions import FUNCTIONS, Function, Instance
from benchmarks.minimization import Iterate, Limits
from benchmarks.precision import double_precision
from benchmarks.records import Record, Writer, open_writer, versions
from benchmarks.scipy_peers import PEERS
from benchmarks.settings import SettingError, choose_problems
from benchmarks.solvers import Variant, available, solver_catalogue

_DEFAULT_SOLVERS = ("lsr1", "lbfgs")
_COLUMNS = ("method", "done", "grads", "values", "Hv", "value", "|grad|", "sec.")


class Contestant(NamedTuple):
    """A way to minimize.

    Attributes:
        label: What the user called it.
        settings: Its settings over its defaults, empty for SciPy's.
        minimize: Minimizes within limits.
    """

    label: str
    settings: dict[str, Any]
    minimize: Callable[[Instance, Limits], Iterate]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--problems", metavar="P,Q,...", help="functions; default: all")
    parser.add_argument(
        "--methods",
        metavar="M,N,...",
        help="methods, each with settings of its own if wanted: lbfgs:memory_size=5; "
        "default: all that are not first-order",
    )
    parser.add_argument(
        "--max-gradients",
        type=int,
        default=5000,
        metavar="N",
        help="most gradients, and most values without gradient, of a run; default %(default)s",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="T",
        help="norm of the gradient to reach; default %(default)s",
    )
    add_data_dir(parser)
    add_json(parser)


def catalogue() -> str:
    """The functions and methods with their descriptions."""
    functions = [f"  {name:24} {function.description}" for name, function in FUNCTIONS.items()]
    peers = [f"  {name:24} {peer.description}" for name, peer in PEERS.items()]
    return "\n".join(["problems:", *functions, "", *solver_catalogue(), *peers])


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    limits = Limits(args.max_gradients, args.tolerance)
    if limits.max_gradients < 1 or not limits.tolerance > 0:
        raise SettingError("--max-gradients and --tolerance must be positive.")
    functions = choose_problems(args.problems, FUNCTIONS)
    with double_precision():
        contestants = [_contestant(text) for text in _labels(args.methods)]
        options = DataOptions.from_environment(args.data_dir)
        with open_writer(args.json) as write:
            records = list(_records(functions, contestants, options, limits, write))
    for function in functions:
        _print_records(function, [r for r in records if r["problem"] == function.name])
    console.print(
        f"Done: gradient norm at most {limits.tolerance:g} within {limits.max_gradients} "
        "gradients. Each gradient comes with its value; values are those evaluated alone, Hv "
        "products with the Hessian.",
        style="dim",
    )
    return 0


def _labels(methods: str | None) -> list[str]:
    if methods is not None:
        return methods.split(",")
    return [*available(_DEFAULT_SOLVERS), *PEERS]


def _contestant(text: str) -> Contestant:
    if text in PEERS:
        peer = PEERS[text]
        return Contestant(
            text, {}, lambda instance, limits: scipy_peers.minimize(instance, peer, limits)
        )
    _, solver, settings = Variant.parse(text, others=PEERS)
    solver.build(settings)  # Mistakes are reported before anything is run.
    return Contestant(
        text,
        settings,
        lambda instance, limits: minimization.minimize(instance, solver, settings, limits),
    )


def _records(
    functions: list[Function],
    contestants: list[Contestant],
    options: DataOptions,
    limits: Limits,
    write: Writer,
) -> Iterator[Record]:
    """Runs every contestant on every function; writes and yields a record of each."""
    with progress_bar() as progress:
        task = progress.add_task("minimize", total=len(functions) * len(contestants), status="")
        for function in functions:
            instance = function.load(options)
            for contestant in contestants:
                progress.update(task, status=f"{function.name} {contestant.label}")
                point = contestant.minimize(instance, limits)
                record = _record(function, contestant, limits, point)
                write({**record, "versions": versions()})
                yield record
                progress.advance(task)


def _record(function: Function, contestant: Contestant, limits: Limits, point: Iterate) -> Record:
    return {
        "problem": function.name,
        "method": contestant.label.split(":")[0],
        "label": contestant.label,
        "settings": contestant.settings,
        "reached": limits.is_reached(point),
        **point._asdict(),
        **limits._asdict(),
    }


def _print_records(function: Function, records: list[Record]) -> None:
    rows = [
        (
            record["label"].replace(":", "\n "),
            "yes" if record["reached"] else "no",
            record["gradients"],
            record["values"],
            record["products"],
            record["value"],
            f"{record['gradient_norm']:.1e}",
            f"{record['seconds']:.3g}",
        )
        for record in records
    ]
    print_table(f"{function.name}: {function.description}", _COLUMNS, rows)
