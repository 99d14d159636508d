"""``directions``: measures how the layers' parts of a direction of K-FAC agree, and what is noise.

At the parameters that some steps of Adam lead to, K-FAC sees batch after batch. Its last direction
is then judged by the exact quadratic model, part by part and as a whole, on the batch that it was
made from and on batches that it knows nothing of.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import secondorder as so
from benchmarks.arguments import add_json, add_problem, add_settings, load_data
from benchmarks.display import console, print_table
from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS, Batch, Params, Problem
from benchmarks.records import open_writer, versions
from benchmarks.settings import SettingError, parse_settings
from benchmarks.steps import (
    BatchSizes,
    build_optimizer,
    compile_step,
    epoch_orders,
    initial_state,
    training_step,
)
from secondorder.layers.blocks import parameter_blocks
from secondorder.operators import block_gauss_newton_forms
from secondorder.tree import block_inner

_COLUMNS = ("part", "rate", "share", "promise\nown batch", "promise\nothers")
_OTHERS = 6  # batches


@dataclasses.dataclass(frozen=True)
class Model:
    """The quadratic model of batches on the span of the parts of a direction.

    Attributes:
        slopes: Products of the gradient with the parts ``(P,)``.
        curvature: The Gauss-Newton matrix on them ``(P, P)``.
    """

    slopes: NDArray[np.float64]
    curvature: NDArray[np.float64]

    def promise(self, coefficients: NDArray[np.float64]) -> float:
        """How much the objective falls by a step, at the best multiple of it."""
        slope = float(self.slopes @ coefficients)
        curvature = float(coefficients @ self.curvature @ coefficients)
        return slope**2 / (2 * curvature) if slope > 0 < curvature else 0.0


@dataclasses.dataclass(frozen=True)
class Row:
    """A step, judged.

    Attributes:
        name: Of the parts that it has.
        rate: Multiple of the direction that is best for its own batch, damping included; None for
            several.
        share: Of the slope on its own batch, how much there is on others.
        own: What its own batch promises at best.
        others: What others promise at best.
    """

    name: str
    rate: float | None
    share: float
    own: float
    others: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_problem(parser)
    parser.add_argument("--steps", type=int, default=125, help="of Adam; default %(default)s")
    parser.add_argument(
        "--rate", type=float, default=1e-3, help="learning rate of Adam; default %(default)s"
    )
    parser.add_argument(
        "--batches", type=int, default=33, help="for K-FAC to see; default %(default)s"
    )
    add_settings(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if min(args.steps, args.batches) < 1:
        raise SettingError("--steps and --batches must be at least 1.")
    problem = PROBLEMS[args.problem]
    settings = {"damping": 1e-3, **parse_settings(args.settings)}
    data = Batch.put(load_data(problem, args).train)
    size = args.batch_size or problem.batch_size
    orders = epoch_orders(len(data.inputs), size, args.seed)
    batches = (jnp.asarray(batch) for order in orders for batch in order)
    start = jax.jit(problem.init)(jax.random.key(args.seed))
    params = _trained(problem, start, data, itertools.islice(batches, args.steps), size, args.rate)
    seen = list(itertools.islice(batches, args.batches))
    others = jnp.concatenate(list(itertools.islice(batches, _OTHERS)))
    try:
        rows = measure(problem, params, data, seen, others, settings)
    except (TypeError, ValueError) as error:
        raise SettingError(f"scale_by_kfac: {error}") from error
    cells = [dataclasses.astuple(row) for row in rows]
    print_table(f"{problem.name}, after {args.steps} steps of Adam", _COLUMNS, cells)
    console.print("The own batch is the one that the direction was made from.", highlight=False)
    header = {"problem": problem.name, "steps": args.steps, "batch_size": size}
    header |= {"settings": settings, "versions": versions()}
    with open_writer(args.json) as write:
        for row in rows:
            write({**dataclasses.asdict(row), **header})
    return 0


def measure(
    problem: Problem,
    params: Params,
    data: Batch,
    seen: Sequence[jax.Array],
    others: jax.Array,
    settings: dict[str, Any],
) -> list[Row]:
    """Judges K-FAC's direction at some parameters.

    Args:
        problem: The problem.
        params: The parameters.
        data: Its samples.
        seen: Indices of the batches that K-FAC sees; it is judged after the last.
        others: Indices of samples that it does not see.
        settings: Of `scale_by_kfac`, the damping among them.

    Returns:
        A row for each layer and each leaf in no layer, one for the direction, and one for the step
        with a coefficient for each of these parts.
    """

    def objective_on(indices: jax.Array) -> so.Objective[Params]:
        return problem.objective(data.take(indices))

    layers = so.find_layers(objective_on(seen[0]), params)
    tx = so.scale_by_kfac(layers, **settings)

    @jax.jit
    def update(state: Any, indices: jax.Array) -> tuple[Params, Any]:
        objective = objective_on(indices)
        value, grads = jax.value_and_grad(objective)(params)
        return tx.update(grads, state, params, value=value, grad=grads, value_fn=objective)

    state = tx.init(params)
    for indices in seen:
        direction, state = update(state, indices)
    blocks = parameter_blocks(layers, params)

    @jax.jit
    def model(indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        objective = objective_on(indices)
        slopes = block_inner(blocks, jax.grad(objective)(params), direction)
        return slopes, block_gauss_newton_forms(objective, params, blocks)(direction)

    own, other = (
        Model(*(np.asarray(array, np.float64) for array in model(indices)))
        for indices in (seen[-1], others)
    )
    squares = np.asarray(block_inner(blocks, direction, direction))
    return judge(blocks.names, own, other, settings["damping"] * np.diag(squares))


def judge(
    names: Sequence[str], own: Model, other: Model, damping: NDArray[np.float64]
) -> list[Row]:
    """Judges every part, all of them, and the best combination of them.

    Args:
        names: Of the parts.
        own: The model of the batch that the direction was made from.
        other: The model of others.
        damping: What is added to the curvature ``(P, P)``.

    Returns:
        As many rows as parts, and two.
    """
    damped = own.curvature + damping

    def row(name: str, step: NDArray[np.float64], has_rate: bool = True) -> Row:
        slope = float(own.slopes @ step)
        rate = slope / float(step @ damped @ step) if has_rate else None
        share = float(other.slopes @ step) / slope
        return Row(name, rate, share, own.promise(step), other.promise(step))

    parts = [row(name, unit) for name, unit in zip(names, np.eye(len(names)), strict=True)]
    best = np.linalg.lstsq(damped, own.slopes, rcond=None)[0].astype(np.float64)
    return [*parts, row("all", np.ones(len(names))), row("a rate each", best, has_rate=False)]


def _trained(
    problem: Problem,
    params: Params,
    data: Batch,
    batches: Iterator[jax.Array],
    size: int,
    rate: float,
) -> Params:
    """The parameters after steps of Adam."""
    adam = METHODS["adam"]
    settings = adam.settings(problem, {"learning_rate": rate, "eps": 1e-8})
    optimizer = build_optimizer(problem, adam, settings, params, data, size)
    state = initial_state(optimizer, params)
    function = training_step(problem, optimizer, adam, settings, BatchSizes(size))
    step = compile_step(function, state, data, jnp.arange(size))
    for batch in batches:
        state, _ = step.call(state, data, batch)
    return state.params
