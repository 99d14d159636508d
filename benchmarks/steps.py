"""The compiled training step, the same one for training and for measuring its cost."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from benchmarks.evaluations import Site
from benchmarks.methods import Context, Method
from benchmarks.problems import Batch, Params, Problem
from benchmarks.settings import SettingError, Settings

IndexArray = NDArray[np.int32]


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        params: The parameters.
        opt_state: The state of the optimizer.
        extra_gradients: What updates have evaluated so far that the state of the optimizer counts,
            in gradients of one batch, float32.
    """

    params: Params
    opt_state: optax.OptState
    extra_gradients: jax.Array


class BatchSizes(NamedTuple):
    """How many samples a step takes.

    Attributes:
        gradient: For value and gradient.
        curvature: For the curvature, the first of the same samples or more; None passes no
            objective for it, so that methods take the other one.
    """

    gradient: int
    curvature: int | None = None

    @property
    def width(self) -> int:
        """Samples that must be drawn."""
        return max(self.gradient, self.curvature or 0)

    @property
    def curvature_share(self) -> float:
        """Samples for the curvature per sample for the gradient."""
        return 1.0 if self.curvature is None else self.curvature / self.gradient


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
    problem: Problem,
    optimizer: optax.GradientTransformationExtraArgs,
    method: Method,
    settings: Mapping[str, Any],
    sizes: BatchSizes,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, jax.Array]]:
    """The whole step: gather the batch, gradient, update, new parameters.

    It is written exactly as for `optax.lbfgs`, for every method; with a curvature batch, its
    objective is one more argument.
    """
    all_settings = method.complete(settings)

    def step(state: TrainState, data: Batch, indices: jax.Array) -> tuple[TrainState, jax.Array]:
        batch = data.take(indices[: sizes.gradient])
        objective = problem.objective(batch)
        extra: dict[str, Any] = {"value_fn": objective}
        if method.takes_batch:
            extra["batch"] = batch
        if sizes.curvature is not None:
            extra["curvature_fn"] = problem.objective(data.take(indices[: sizes.curvature]))
        value, grads = jax.value_and_grad(objective)(state.params)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, value=value, grad=grads, **extra
        )
        params = optax.apply_updates(state.params, updates)
        site = Site(all_settings, extra.get("curvature_fn", objective), state.params)
        work = method.work(opt_state, site).in_gradients(sizes.curvature_share)
        return TrainState(params, opt_state, state.extra_gradients + work), value

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
    batch = data.take(jnp.arange(size))
    return method.build(Context(problem, problem.objective(batch), params, batch), settings)


def initial_state(optimizer: optax.GradientTransformationExtraArgs, params: Params) -> TrainState:
    """A state that may be donated: no two of its arrays share memory.

    The parameters are copied, because a method may keep them in its own state too.
    """
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.float32))
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


def epoch_orders(
    samples: int, batch_size: int, seed: int, width: int | None = None
) -> Iterator[IndexArray]:
    """Sample numbers of the batches of one epoch after another, without end.

    The first epoch takes the samples as they come; they are reshuffled before each later one, as
    in the papers' code. A ragged last batch is dropped, so that one compiled step serves all.

    Args:
        samples: Number of training samples.
        batch_size: Samples per batch.
        seed: Of the shuffles.
        width: Indices per batch, if more than its samples: those that follow in the order, which
            begins anew at its end.

    Yields:
        ``(steps, width)`` indices.

    Raises:
        SettingError: If not even one batch fits.
    """
    width = batch_size if width is None else width
    steps = samples // batch_size
    if samples < width:
        raise SettingError(f"A batch of {width} needs as many samples; there are {samples}.")
    rng = np.random.default_rng(seed)
    order = np.arange(samples, dtype=np.int32)
    places = batch_size * np.arange(steps)[:, None] + np.arange(width)
    while True:
        yield order[places % samples]
        order = rng.permutation(order)
