"""``tune``: trains a method with every combination of some settings."""

import argparse

from benchmarks import sweeps
from benchmarks.records import Record, open_writer, versions
from benchmarks.settings import parse_grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        required=True,
        metavar="KEY=V,V,...",
        help="values to try, of (curvature_)batch_size too; of several keys every combination",
    )
    sweeps.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    results = []
    with open_writer(args.json) as write:
        for result in sweeps.sweep(args, list(parse_grid(args.grid))):
            results.append(result)
            write(_record(result))
    sweeps.print_results(f"{args.method} on {args.problem}", results)
    return 0


def _record(result: sweeps.Result) -> Record:
    return {
        "problem": result.run.options.problem.name,
        "method": result.run.options.method.name,
        **result.last.as_json(),
        **result.run.header(),
        "versions": versions(),
    }
