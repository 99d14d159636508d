"""``products``: measures curvature products and a Hessian-free step made of them.

Products are counted as what one more of them adds to a program that has linearized the model
already: XLA's operations of two chained products minus those of one, and the time of a loop over
many minus that of a loop over one. All programs are timed in turns, in one process.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import secondorder as so
from benchmarks.arguments import add_json, add_problem, load_data
from benchmarks.display import console, print_table, progress_bar
from benchmarks.networks import init_dense_stack
from benchmarks.problems import PROBLEMS, Batch, Params
from benchmarks.records import Record, open_writer, versions
from secondorder import operators
from secondorder.objective import Objective
from secondorder.operators import LinearOperator
from secondorder.tree import label_blocks, one_block, random_stack

_FEW, _MANY = 1, 9
_STEP_PRODUCTS = 20
_COLUMNS_AT_ONCE, _CHUNK = 20, 4  # products with the Hessian of vectors of one stack
_COLUMNS = {
    "flops_over_gradient": "flops\n/gradient",
    "flops_over_forward": "flops\n/forward",
    "setup_over_forward": "setup\n/forward",
    "seconds_over_gradient": "time\n/gradient",
    "step_over_parts": "step\n/parts",
}

# From an objective and the parameters to an operator.
MakeOperator = Callable[[Objective[Any], Params], LinearOperator]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model on a batch, and the operators to measure on it."""

    name: str
    objective: Objective[Any]
    params: Params
    operators: Mapping[str, MakeOperator]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_problem(parser)
    parser.add_argument(
        "--depths",
        default="3,8,16",
        metavar="L,L,...",
        help="depths of the classifiers with equal layers and ten outputs beside the problem",
    )
    parser.add_argument("--width", type=int, default=512, metavar="D", help="of their layers")
    parser.add_argument("--repeats", type=int, default=7, metavar="R", help="timings of each")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="time by the processor's clock, which other work on the machine does not change",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    subjects = [_of_problem(args)]
    subjects += [_classifier(int(depth), args.width) for depth in args.depths.split(",") if depth]
    clock = time.process_time if args.processor_time else time.perf_counter
    records = []
    with open_writer(args.json) as write, progress_bar() as progress:
        task = progress.add_task("measure", total=len(subjects), status="")
        for subject in subjects:
            progress.update(task, status=subject.name)
            for record in _measure(subject, args.repeats, clock):
                write(record)
                records.append(record)
            progress.advance(task)
    rows = [(r["subject"], r["what"], *(r.get(key) for key in _COLUMNS)) for r in records]
    print_table("Curvature products", ("model", "what", *_COLUMNS.values()), rows)
    console.print(
        "A forward pass and a gradient are counted by XLA. The parts of a step are its gradient "
        "and its products, at the price of the row above that is called full."
    )
    return 0


def _of_problem(args: argparse.Namespace) -> Subject:
    problem = PROBLEMS[args.problem]
    size = args.batch_size or problem.batch_size
    data = Batch.put(load_data(problem, args).train)
    batch = data.take(jnp.arange(size))
    params = jax.jit(problem.init)(jax.random.key(args.seed))
    return Subject(
        f"{problem.name}, batch {size}",
        problem.objective(batch),
        params,
        {
            "full": operators.gauss_newton,
            "blocks, linearized": _linearized,
            "Hessian": operators.hessian,
        },
    )


def _classifier(depth: int, width: int, outputs: int = 10, cases: int = 64) -> Subject:
    """A classifier with dense layers of equal width and a few outputs."""
    keys = jax.random.split(jax.random.key(depth))
    params = init_dense_stack(keys[0], [width] * depth + [outputs])
    inputs = jax.random.normal(keys[1], (cases, width))
    labels = jnp.arange(cases) % outputs

    def model(params: Params) -> jax.Array:
        hidden = inputs
        for layer in params[:-1]:
            hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"])
        return hidden @ params[-1]["kernel"] + params[-1]["bias"]

    def loss(logits: jax.Array) -> jax.Array:
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(cases), labels])

    makers: dict[str, MakeOperator] = {
        "full": operators.gauss_newton,
        "blocks, linearized": _linearized,
        "blocks, factored": _factored,
        "full, factored": _factored_full,
        "Hessian": operators.hessian,
    }
    return Subject(f"{depth} layers, batch {cases}", Objective(model, loss), params, makers)


def _linearized(objective: Objective[Any], params: Params) -> LinearOperator:
    return operators.block_gauss_newton(objective, params, label_blocks(None, params))


def _factored(objective: Objective[Any], params: Params) -> LinearOperator:
    factors = operators.factor_gauss_newton(objective, params)
    return factors.operator(label_blocks(None, params))


def _factored_full(objective: Objective[Any], params: Params) -> LinearOperator:
    return operators.factor_gauss_newton(objective, params).operator(one_block(params))


def _measure(subject: Subject, repeats: int, clock: Callable[[], float]) -> list[Record]:
    """Measures all operators of a model, and a step of Hessian-free optimization."""
    objective, params = subject.objective, subject.params
    forward = _compile(lambda p: objective(p), params)
    gradient = _compile(jax.value_and_grad(objective), params)
    programs: dict[str, Any] = {
        "gradient": gradient,
        "step": _step(objective, params),
        "low rank": _low_rank_step(objective, params),
    }
    for count in (_FEW, _MANY):
        programs[f"batched/{count}"] = _compile(_batched_loop(objective, count), params)
    for name, make in subject.operators.items():
        for count in (_FEW, _MANY):
            programs[f"{name}/{count}"] = _compile(_loop(objective, make, count), params)
    seconds = _time_all(programs, params, repeats, clock)
    costs = {name: _product_flops(objective, make, params) for name, make in
             subject.operators.items()}  # fmt: skip
    unit, pass_ = _flops(gradient), _flops(forward)
    products = {
        name: (seconds[f"{name}/{_MANY}"] - seconds[f"{name}/{_FEW}"]) / (_MANY - _FEW)
        for name in subject.operators
    }
    records = [
        {
            "subject": subject.name,
            "what": name,
            "flops_over_gradient": product / unit,
            "flops_over_forward": product / pass_,
            "setup_over_forward": (first - product) / pass_,
            "seconds_over_gradient": float(np.median(products[name] / seconds["gradient"])),
            "versions": versions(),
        }
        for name, (product, first) in costs.items()
    ]
    count = int(programs["step"](params)[1].metrics.products)
    parts = seconds["gradient"] + count * products["full"]
    step: Record = {
        "subject": subject.name,
        "what": f"HF step, {count} products",
        "seconds_over_gradient": float(np.median(seconds["step"] / seconds["gradient"])),
        "step_over_parts": float(np.median(seconds["step"] / parts)),
        "versions": versions(),
    }
    return [*records, step, *_low_rank_records(subject.name, seconds)]


def _low_rank_records(name: str, seconds: Mapping[str, Any]) -> list[Record]:
    """Hessian products side by side, and a step of low-rank saddle-free Newton made of them."""
    gradient = seconds["gradient"]
    several = (seconds[f"batched/{_MANY}"] - seconds[f"batched/{_FEW}"]) / (_MANY - _FEW)
    count, step = _COLUMNS_AT_ONCE, seconds["low rank"]
    rows = {
        f"Hessian, {count} at once": {"seconds_over_gradient": several / count / gradient},
        f"LRSFN step, {count} products": {
            "seconds_over_gradient": step / gradient,
            "step_over_parts": step / (gradient + several),
        },
    }
    return [
        {
            "subject": name,
            "what": what,
            **{key: float(np.median(ratio)) for key, ratio in ratios.items()},
            "versions": versions(),
        }
        for what, ratios in rows.items()
    ]


def _batched_loop(objective: Objective[Any], count: int) -> Callable[[Params], Any]:
    """Several products with all vectors of a stack, one after the other."""

    def program(params: Params) -> Any:
        product = operators.hessian_on_stacks(objective, params, chunk_size=_CHUNK)
        stack = random_stack(jax.random.key(0), params, _COLUMNS_AT_ONCE)
        return jax.lax.fori_loop(0, count, lambda _, vectors: product(vectors).vectors, stack)

    return program


def _low_rank_step(objective: Objective[Any], params: Params) -> Any:
    """A step of low-rank saddle-free Newton with a warm start."""
    optimizer = so.low_rank_saddle_free_newton(
        1e-3, _COLUMNS_AT_ONCE, refresh_every=1, initial_passes=1, chunk_size=_CHUNK
    )

    def program(params: Params, state: Any) -> Any:
        value, grad = jax.value_and_grad(objective)(params)
        return optimizer.update(grad, state, params, value=value, grad=grad, value_fn=objective)

    first = optimizer.init(params)
    compiled = jax.jit(program).lower(params, first).compile()
    state = compiled(params, first)[1]
    return lambda params: compiled(params, state)


def _loop(objective: Objective[Any], make: MakeOperator, count: int) -> Callable[[Params], Any]:
    """Several products, one after the other, with one operator."""

    def program(params: Params) -> Any:
        operator = make(objective, params)
        return jax.lax.fori_loop(0, count, lambda _, vector: operator(vector), params)

    return program


def _product_flops(
    objective: Objective[Any], make: MakeOperator, params: Params
) -> tuple[float, float]:
    """XLA's operations of one more product, and of the first with its set-up."""

    def chained(count: int) -> Callable[[Params], Any]:
        def program(params: Params) -> Any:
            operator = make(objective, params)
            # Not the parameters themselves, whose products the forward pass has already.
            vector = jax.tree.map(jnp.sin, params)
            for _ in range(count):
                vector = operator(vector)
            return vector

        return program

    one, two = (_flops(_compile(chained(count), params)) for count in (1, 2))
    return two - one, one


def _step(objective: Objective[Any], params: Params) -> Any:
    """A step of Hessian-free optimization with a fixed number of products."""
    optimizer = so.hessian_free(
        damping=1e-6,  # so small that the iterations do not converge before
        max_iterations=_STEP_PRODUCTS,
        progress=0.0,
        warm_start=0.0,
        backtracking=False,
        max_trials=1,  # values along the step are none of its products
    )
    state = optimizer.init(params)

    def program(params: Params) -> Any:
        value, grad = jax.value_and_grad(objective)(params)
        return optimizer.update(grad, state, params, value=value, grad=grad, value_fn=objective)

    return _compile(program, params)


def _compile(function: Callable[[Params], Any], params: Params) -> Any:
    return jax.jit(function).lower(params).compile()


def _flops(program: Any) -> float:
    return float(program.cost_analysis()["flops"])


def _time_all(
    programs: dict[str, Any], params: Params, repeats: int, clock: Callable[[], float]
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Seconds of each program, timed in turns."""
    names: Sequence[str] = list(programs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            start = clock()
            jax.block_until_ready(programs[name](params))
            seconds[name].append(clock() - start)
    # The first turn also loads code and fills caches.
    return {name: np.array(values[1:]) for name, values in seconds.items()}
