"""What the cost of is measured: the gradient alone, and the training step of each method."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax

from benchmarks.methods import Method
from benchmarks.problems import Batch, Params, Problem
from benchmarks.settings import Settings
from benchmarks.steps import (
    BatchSizes,
    CompiledStep,
    IndexArray,
    build_optimizer,
    compile_step,
    epoch_orders,
    gradient_step,
    initial_state,
    training_step,
    wait,
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all contestants of a measurement share.

    Attributes:
        problem: The problem.
        data: Its training samples on the device.
        params: Initial parameters.
        batch_size: Samples per step.
        curvature_batch_size: Samples for the curvature, or None.
    """

    problem: Problem
    data: Batch
    params: Params
    batch_size: int
    curvature_batch_size: int | None = None

    @property
    def sizes(self) -> BatchSizes:
        """Samples of a step, for gradient and curvature."""
        return BatchSizes(self.batch_size, self.curvature_batch_size)

    def batches(self, width: int | None = None) -> Iterator[IndexArray]:
        """Indices of one batch after another, without end; more of them for a ``width``."""
        for order in epoch_orders(len(self.data.inputs), self.batch_size, seed=0, width=width):
            yield from order


class Contestant(Protocol):
    """Something whose steps can be compiled and timed."""

    label: str
    period: int

    def compile(self) -> CompiledStep:
        """Compiles the step anew."""

    def run(self, steps: int) -> float:
        """Takes steps with what was compiled last; returns the seconds they took."""


class GradientContestant:
    """Plain ``value_and_grad``: the unit of cost.

    Attributes:
        label: Name in messages.
        period: Steps after which the cost repeats.
    """

    label = "value_and_grad"
    period = 1

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._batches = setup.batches()
        self._step: CompiledStep | None = None

    def compile(self) -> CompiledStep:
        """Compiles the step anew."""
        args = (self._setup.params, self._setup.data, next(self._batches))
        self._step = compile_step(gradient_step(self._setup.problem), *args, donate=False)
        return self._step

    def run(self, steps: int) -> float:
        """Takes steps; returns the seconds they took."""
        assert self._step is not None, "compile() comes first"
        start = time.perf_counter()
        for _ in range(steps):
            result = self._step.call(self._setup.params, self._setup.data, next(self._batches))
        wait(result)
        return time.perf_counter() - start


class MethodContestant:
    """The whole training step of a method, with donated state.

    Attributes:
        label: How the user wrote the method and its settings.
        method: The method.
        settings: All its settings.
        period: Steps after which the cost repeats.
        setup_seconds: Time to make the optimizer, the search for layers included.
    """

    def __init__(
        self, setup: Setup, method: Method, overrides: Mapping[str, Any], label: str
    ) -> None:
        self.label, self.method = label, method
        self.settings: Settings = method.settings(setup.problem, overrides)
        self.period = method.period(self.settings)
        start = time.perf_counter()
        optimizer = build_optimizer(
            setup.problem, method, self.settings, setup.params, setup.data, setup.batch_size
        )
        self.setup_seconds = time.perf_counter() - start
        self._setup = setup
        self._batches = setup.batches(setup.sizes.width)
        self._function = training_step(setup.problem, optimizer, method, self.settings, setup.sizes)
        self._state = initial_state(optimizer, setup.params)
        self._step: CompiledStep | None = None

    def compile(self) -> CompiledStep:
        """Compiles the step anew."""
        self._step = compile_step(
            self._function, self._state, self._setup.data, next(self._batches)
        )
        return self._step

    def run(self, steps: int) -> float:
        """Takes steps; returns the seconds they took."""
        assert self._step is not None, "compile() comes first"
        start = time.perf_counter()
        for _ in range(steps):
            self._state, _ = self._step.call(self._state, self._setup.data, next(self._batches))
        wait(self._state)
        return time.perf_counter() - start

    def state_elements(self) -> int:
        """Number of elements of the optimizer state."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._state.opt_state))

    def state_bytes(self) -> int:
        """Bytes of the optimizer state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state.opt_state))

    def parameter_elements(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._state.params))


def steps_per_timing(contestant: Contestant, step_seconds: float, target_seconds: float) -> int:
    """Steps to take at once: whole periods that together last about the target."""
    periods = math.ceil(target_seconds / max(step_seconds * contestant.period, 1e-9))
    return contestant.period * max(periods, 1)
