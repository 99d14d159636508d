"""``regression``: minimizes small sums of squares, and counts evaluations of the residuals.

Everything runs in double precision. `optimistix.LevenbergMarquardt` stands beside the package's.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import secondorder as so
from benchmarks.arguments import add_json
from benchmarks.display import print_table, progress_bar
from benchmarks.least_squares import REGRESSIONS, Params, Regression, Residuals
from benchmarks.minimization import value_and_grad_at
from benchmarks.precision import double_precision
from benchmarks.records import Record, open_writer, versions
from benchmarks.settings import SettingError, Settings, check_keys, choose_problems, parse_variant
from secondorder.objective import Objective

_COLUMNS = ("method", "done", "steps", "residuals", "sum of squares", "|grad|", "sec.")


class Stop(NamedTuple):
    """When to stop, in optimistix's terms.

    Attributes:
        rtol: A step, and the change of half the sum of squares, are small below
            ``atol + rtol * |where it is|``, by the largest element.
        atol: See ``rtol``.
        max_steps: Steps that a run may try.
    """

    rtol: float
    atol: float
    max_steps: int


class Fit(NamedTuple):
    """Where a method stopped, and at what cost.

    Attributes:
        converged: Whether the last accepted step was small.
        steps: Trial steps, each with a linearization of the residuals.
        residuals: Evaluations of all residuals.
        sum_of_squares: Of the residuals.
        gradient_norm: Euclidean norm of the gradient of half the sum of squares.
        seconds: Of a second run, without compilation.
    """

    converged: bool
    steps: int
    residuals: int
    sum_of_squares: float
    gradient_norm: float
    seconds: float


Solver = Callable[[Residuals, Params, Stop, Settings], Fit]


class _Iterate(NamedTuple):
    params: Params
    opt_state: optax.OptState
    value: jax.Array
    grads: Params
    steps: jax.Array
    residuals: jax.Array
    is_small: jax.Array


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--problems", metavar="P,Q,...", help="default: all")
    parser.add_argument(
        "--methods",
        default="lm,optimistix",
        metavar="M,N,...",
        help="methods, each with settings of its own if wanted: lm:scaling=identity; "
        "default: %(default)s",
    )
    parser.add_argument("--tolerance", type=float, default=1e-8, metavar="T", help="%(default)s")
    parser.add_argument("--max-steps", type=int, default=500, metavar="N", help="%(default)s")
    add_json(parser)


def catalogue() -> str:
    """The problems and methods with their descriptions."""
    problems = [f"  {name:14} {problem.description}" for name, problem in REGRESSIONS.items()]
    methods = ["  lm             so.levenberg_marquardt"]
    return "\n".join(
        ["problems:", *problems, "", "methods:", *methods, "  optimistix     LevenbergMarquardt"]
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    stop = Stop(args.tolerance, args.tolerance, args.max_steps)
    if not stop.rtol > 0 or stop.max_steps < 1:
        raise SettingError("--tolerance and --max-steps must be positive.")
    problems = choose_problems(args.problems, REGRESSIONS)
    variants = [parse_variant(text) for text in args.methods.split(",")]
    for name, settings in variants:
        _check(name, settings)
    records = []
    with double_precision(), open_writer(args.json) as write:
        for record in _records(problems, variants, stop):
            write({**record, "versions": versions()})
            records.append(record)
    for problem in problems:
        _print(problem, [record for record in records if record["problem"] == problem.name])
    return 0


def _check(name: str, settings: Settings) -> None:
    """Reports methods that there are not, before anything is run."""
    if name not in _SOLVERS:
        raise SettingError(f"There is no method {name!r}; there are: {', '.join(_SOLVERS)}.")
    if name != "lm":
        check_keys(settings, (), name)
        _optimistix()


def _records(
    problems: list[Regression], variants: list[tuple[str, Settings]], stop: Stop
) -> Iterator[Record]:
    with progress_bar() as progress:
        task = progress.add_task("fit", total=len(problems) * len(variants), status="")
        for problem in problems:
            residuals, start = problem.load()
            for name, settings in variants:
                progress.update(task, status=f"{problem.name} {name}")
                fit = _SOLVERS[name](residuals, start, stop, settings)
                yield {
                    "problem": problem.name,
                    "method": name,
                    "settings": settings,
                    **fit._asdict(),
                    **stop._asdict(),
                }
                progress.advance(task)


def fit_package(residuals: Residuals, start: Params, stop: Stop, settings: Settings) -> Fit:
    """Fits with `so.levenberg_marquardt`.

    With ``full_batch``, the default here, each step evaluates the residuals twice: where it starts,
    to linearize them, and at the trial point, with the gradient that the next step is given.
    """
    try:
        optimizer = so.levenberg_marquardt(**{"full_batch": True, **settings})
    except (TypeError, ValueError) as error:
        raise SettingError(f"lm: {error}") from error
    objective: Objective[Params] = Objective(residuals, lambda r: 0.5 * jnp.sum(r**2))

    def advance(point: _Iterate) -> _Iterate:
        updates, opt_state = optimizer.update(
            point.grads,
            point.opt_state,
            point.params,
            value=point.value,
            grad=point.grads,
            value_fn=objective,
        )
        params = optax.apply_updates(point.params, updates)
        value, grads, evaluated = value_and_grad_at(objective, params, opt_state)
        is_small = _is_small(stop, point.params, updates, point.value, value)
        count = point.residuals + 2 + evaluated
        return _Iterate(params, opt_state, value, grads, point.steps + 1, count, is_small)

    @jax.jit
    def minimize(params: Params) -> _Iterate:
        value, grads = jax.value_and_grad(objective)(params)
        zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        first = _Iterate(params, optimizer.init(params), value, grads, zero, zero + 1, no)
        return jax.lax.while_loop(
            lambda point: ~point.is_small & (point.steps < stop.max_steps), advance, first
        )

    point, seconds = _timed(minimize, start)
    return _fit(residuals, point.params, point.is_small, point.steps, point.residuals, seconds)


def fit_optimistix(residuals: Residuals, start: Params, stop: Stop, settings: Settings) -> Fit:
    """Fits with optimistix, which evaluates and linearizes the residuals once in each step."""
    optimistix = _optimistix()
    solver = optimistix.LevenbergMarquardt(rtol=stop.rtol, atol=stop.atol)

    @jax.jit
    def minimize(params: Params) -> tuple[Params, jax.Array, jax.Array]:
        solution = optimistix.least_squares(
            lambda point, _: residuals(point), solver, params, max_steps=stop.max_steps, throw=False
        )
        converged = solution.result == optimistix.RESULTS.successful
        return solution.value, solution.stats["num_steps"], converged

    (params, steps, converged), seconds = _timed(minimize, start)
    return _fit(residuals, params, converged, steps, steps, seconds)


_SOLVERS: dict[str, Solver] = {"lm": fit_package, "optimistix": fit_optimistix}


def _optimistix() -> Any:
    try:
        import optimistix
    except ImportError:
        raise SettingError(
            "The method optimistix needs the package: pip install optimistix."
        ) from None
    return optimistix


def _is_small(
    stop: Stop, params: Params, updates: Params, value: jax.Array, following: jax.Array
) -> jax.Array:
    """Cauchy's criterion on a step that was taken; a rejected one is zero."""
    step, size = _largest(updates), _largest(params)
    change = jnp.abs(following - value)
    small_step = step < stop.atol + stop.rtol * size
    small_change = change < stop.atol + stop.rtol * jnp.abs(value)
    return (step > 0) & small_step & small_change


def _largest(params: Params) -> jax.Array:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(params)]))


def _timed(minimize: Callable[[Params], Any], start: Params) -> tuple[Any, float]:
    """The result, and the seconds of a second run."""
    jax.block_until_ready(minimize(start))  # type: ignore[no-untyped-call]
    before = time.perf_counter()
    result = jax.block_until_ready(minimize(start))  # type: ignore[no-untyped-call]
    return result, time.perf_counter() - before


def _fit(
    residuals: Residuals,
    params: Params,
    converged: jax.Array,
    steps: jax.Array,
    evaluations: jax.Array,
    seconds: float,
) -> Fit:
    half, grads = jax.value_and_grad(lambda p: 0.5 * jnp.sum(residuals(p) ** 2))(params)
    squares = [jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(grads)]
    return Fit(
        converged=bool(converged),
        steps=int(steps),
        residuals=int(evaluations),
        sum_of_squares=2 * float(half),
        gradient_norm=float(jnp.sqrt(jnp.sum(jnp.stack(squares)))),
        seconds=seconds,
    )


def _print(problem: Regression, records: list[Record]) -> None:
    rows = [
        (
            " ".join([record["method"], *(f"{k}={v}" for k, v in record["settings"].items())]),
            "yes" if record["converged"] else "no",
            record["steps"],
            record["residuals"],
            f"{record['sum_of_squares']:.8g}",
            f"{record['gradient_norm']:.1e}",
            f"{record['seconds']:.2g}",
        )
        for record in records
    ]
    print_table(f"{problem.name}: {problem.description}", _COLUMNS, rows)
