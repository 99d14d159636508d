"""The command line: one sub-command per module."""

import argparse
from collections.abc import Sequence
from types import ModuleType

from benchmarks import (
    compare,
    cost,
    demo,
    deterministic,
    directions,
    plot,
    products,
    regression,
    saddles,
    scaling,
    sensitivity,
    train,
    tune,
)
from benchmarks.data import DataError
from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.records import fail
from benchmarks.settings import SettingError

_COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "tune": tune,
    "sensitivity": sensitivity,
    "compare": compare,
    "plot": plot,
    "cost": cost,
    "products": products,
    "directions": directions,
    "deterministic": deterministic,
    "saddles": saddles,
    "regression": regression,
    "scaling": scaling,
    "demo": demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Those of the command line without the program; None reads them from there.

    Returns:
        The exit status: 0, 1 for a diverged run, 2 for a mistake in the arguments or the data.
    """
    args = _parser().parse_args(arguments)
    try:
        return int(_COMMANDS[args.command].run(args))
    # All that a user can set right is one of these, with a message that says how.
    except (DataError, SettingError) as error:
        return fail(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Benchmarks of second-order optimizers.",
        epilog=_catalogue(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").split(": ", 1)[1].strip()
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            # Some commands have problems and methods of their own.
            epilog=getattr(module, "catalogue", _catalogue)(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def _catalogue() -> str:
    """The problems and methods with their descriptions."""
    problems = [f"  {name:24} {problem.description}" for name, problem in PROBLEMS.items()]
    methods = [f"  {name:24} {method.description}" for name, method in METHODS.items()]
    return "\n".join(["problems:", *problems, "", "methods:", *methods])
