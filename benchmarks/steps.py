"""The compiled training step, the same one for training and for measuring its cost."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from benchmarks.evaluations import linesearch_gradients
from benchmarks.methods import Context, Method
from benchmarks.problems import Batch, Params, Problem
from benchmarks.settings import SettingError, Settings

IndexArray = NDArray[np.int32]


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        params: The parameters.
        opt_state: The state of the optimizer.
        linesearch_gradients: Gradients that line searches have evaluated so far.
    """

    params: Params
    opt_state: optax.OptState
    linesearch_gradients: jax.Array


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step ready to run.

    Attributes:
        call: ``(state, data, indices) -> (state, loss)``. It donates the state.
        compile_seconds: Time to trace, lower and compile it.
        costs: What XLA says about it: ``flops``, ``bytes accessed`` and more.
        temporary_bytes: Memory for intermediate results, or None if XLA does not say.
    """

    call: Callable[..., Any]
    compile_seconds: float
    costs: dict[str, float]
    temporary_bytes: int | None


def training_step(
    problem: Problem, optimizer: optax.GradientTransformationExtraArgs
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, jax.Array]]:
    """The whole step: gather the batch, gradient, update, new parameters.

    It is written exactly as for `optax.lbfgs`, for every method.
    """

    def step(state: TrainState, data: Batch, indices: jax.Array) -> tuple[TrainState, jax.Array]:
        objective = problem.objective(data.take(indices))
        value, grads = jax.value_and_grad(objective)(state.params)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, value=value, grad=grads, value_fn=objective
        )
        params = optax.apply_updates(state.params, updates)
        searched = state.linesearch_gradients + linesearch_gradients(opt_state)
        return TrainState(params, opt_state, searched), value

    return step


def gradient_step(problem: Problem) -> Callable[[Params, Batch, jax.Array], Any]:
    """Value and gradient alone, with the same gathering of the batch: the unit of cost."""

    def step(params: Params, data: Batch, indices: jax.Array) -> Any:
        return jax.value_and_grad(problem.objective(data.take(indices)))(params)

    return step


def build_optimizer(
    problem: Problem, method: Method, settings: Settings, params: Params, data: Batch, size: int
) -> optax.GradientTransformationExtraArgs:
    """The transform of a method for a problem and a batch size."""
    objective = problem.objective(data.take(jnp.arange(size)))
    return method.build(Context(problem, objective, params), settings)


def initial_state(optimizer: optax.GradientTransformationExtraArgs, params: Params) -> TrainState:
    """A state that may be donated: no two of its arrays share memory.

    The parameters are copied, because a method may keep them in its own state too.
    """
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    copied: TrainState = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
    return copied


def wait(tree: Any) -> None:
    """Waits until the arrays of a pytree are computed."""
    jax.block_until_ready(tree)  # type: ignore[no-untyped-call]


def compile_step(function: Callable[..., Any], *args: Any, donate: bool = True) -> CompiledStep:
    """Compiles a step ahead of time for arguments of the given shapes.

    Args:
        function: The step.
        *args: Its arguments; they are not consumed.
        donate: Whether the first argument's memory is reused for the result.

    Returns:
        The compiled step with its costs.
    """
    start = time.perf_counter()
    jitted = jax.jit(function, donate_argnums=(0,) if donate else ())
    compiled = jitted.lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return CompiledStep(
        call=compiled,
        compile_seconds=seconds,
        costs=dict(compiled.cost_analysis() or {}),
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
    )


def epoch_orders(samples: int, batch_size: int, seed: int) -> Iterator[IndexArray]:
    """Sample numbers of the batches of one epoch after another, without end.

    The first epoch takes the samples as they come; they are reshuffled before each later one, as
    in the papers' code. A ragged last batch is dropped, so that one compiled step serves all.

    Args:
        samples: Number of training samples.
        batch_size: Samples per batch.
        seed: Of the shuffles.

    Yields:
        ``(steps, batch_size)`` indices.

    Raises:
        SettingError: If not even one batch fits.
    """
    steps = samples // batch_size
    if steps < 1:
        raise SettingError(f"A batch of {batch_size} needs as many samples; there are {samples}.")
    rng = np.random.default_rng(seed)
    order = np.arange(samples, dtype=np.int32)
    while True:
        yield order[: steps * batch_size].reshape(steps, batch_size)
        order = rng.permutation(order)
