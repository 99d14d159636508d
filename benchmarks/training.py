"""Training runs: one record per epoch, training time apart from all other time."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax

from benchmarks.data import Splits
from benchmarks.evaluation import Evaluator, Metrics
from benchmarks.methods import Method
from benchmarks.problems import Batch, Params, Problem
from benchmarks.records import Record
from benchmarks.settings import SettingError
from benchmarks.steps import (
    BatchSizes,
    CompiledStep,
    IndexArray,
    TrainState,
    build_optimizer,
    compile_step,
    epoch_orders,
    initial_state,
    training_step,
    wait,
)

# Called after each step with the steps done so far and the latest loss that is known.
StepCallback = Callable[[int, float], None]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What to run, and for how long.

    Attributes:
        problem: The problem.
        method: The method.
        overrides: Settings over the method's own.
        epochs: Stop after this many epochs; None for no such limit.
        seconds: Stop after this much training time; None for no such limit.
        gradients: Stop after this much work, in gradients of one batch; None for no such limit.
        seed: Of initial parameters and shuffles.
        batch_size: None takes the problem's.
        curvature_batch_size: Samples for the curvature: the first of the batch, or the batch and
            those that follow it in the epoch; None leaves it to the method.
        record_every: Steps from one record to the next; None records at the end of each epoch.
        records: Into how many equal parts of the work of ``gradients`` records divide a run, after
            one of the first step.
        average: Decay in [0, 1) of a moving average of the parameters, whose losses are recorded in
            place of those of the last parameters; None for these.
    """

    problem: Problem
    method: Method
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    epochs: int | None = None
    seconds: float | None = None
    gradients: float | None = None
    seed: int = 0
    batch_size: int | None = None
    curvature_batch_size: int | None = None
    record_every: int | None = None
    records: int | None = None
    average: float | None = None

    def __post_init__(self) -> None:
        limits = (self.epochs, self.seconds, self.gradients)
        if all(limit is None for limit in limits):
            raise SettingError("A run needs a number of epochs, of seconds or of gradients.")
        sizes = (self.batch_size, self.curvature_batch_size, self.record_every, self.records)
        if any(limit is not None and limit <= 0 for limit in (*limits, *sizes)):
            raise SettingError(
                "Epochs, seconds, gradients, batch sizes and steps must be positive."
            )
        if self.average is not None and not 0 <= self.average < 1:
            raise SettingError(f"The decay of an average is in [0, 1), got {self.average}.")
        if self.records is not None and self.gradients is None:
            raise SettingError("A number of records divides a number of gradients; give that too.")

    @property
    def samples_per_step(self) -> int:
        """The batch size that counts."""
        return self.batch_size or self.problem.batch_size

    @property
    def batch_sizes(self) -> BatchSizes:
        """Samples of a step, for gradient and curvature."""
        return BatchSizes(self.samples_per_step, self.curvature_batch_size)


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """The state of a run after an epoch, or where it stopped.

    Attributes:
        epoch: Whole, except where a limit or a loss ended the run within one, or records are more
            frequent.
        step: Steps so far.
        gradients: Gradients of one batch that were evaluated so far, those of line searches
            included, and what other evaluations and products cost in this unit.
        seconds: Training time so far, without compilation and evaluation.
        cpu_seconds: Processor time of all threads in that time, which other work on the machine
            hardly changes where the run is bound to one core.
        train_loss: Over all training samples, with the L2 term.
        test_loss: Over all test samples, with the L2 term.
        test_accuracy: None for problems without classes.
        diverged: Whether the run stopped because a loss was not finite.
    """

    epoch: float
    step: int
    gradients: float
    seconds: float
    cpu_seconds: float
    train_loss: float
    test_loss: float
    test_accuracy: float | None
    diverged: bool = False

    def as_json(self) -> Record:
        """The record without an accuracy where there is none."""
        fields = dataclasses.asdict(self)
        if self.test_accuracy is None:
            del fields["test_accuracy"]
        return fields


class Run:
    """One training run. Making it compiles the step; `epochs` trains.

    Attributes:
        options: What is run.
        settings: All settings of the method.
        compile_seconds: Time to trace, lower and compile the step.
        steps_per_epoch: Number of whole batches in the training split.
        initial: Metrics of the initial parameters on the training split.
    """

    def __init__(self, options: RunOptions, splits: Splits) -> None:
        self.options = options
        self.settings = options.method.settings(options.problem, options.overrides)
        self.steps_per_epoch = len(splits.train) // options.samples_per_step
        sizes = options.batch_sizes
        self._orders = epoch_orders(len(splits.train), sizes.gradient, options.seed, sizes.width)
        self._train, self._test = Batch.put(splits.train), Batch.put(splits.test)
        self._evaluate = Evaluator(options.problem)
        self._steps, self._seconds, self._cpu_seconds = 0, 0.0, 0.0
        self._state, self._step = self._compile()
        self._average: Params | None = None
        self.compile_seconds = self._step.compile_seconds
        self.initial: Metrics = self._evaluate(self._state.params, self._train)

    def epochs(self, on_step: StepCallback = lambda step, loss: None) -> Iterator[EpochRecord]:
        """Trains until one of the limits is used up or the loss is not finite.

        Args:
            on_step: Called after each step.

        Yields:
            One record per epoch; the last may stand for a part of an epoch.
        """
        for order in itertools.islice(self._orders, self.options.epochs):
            start = 0
            while start < len(order):
                stop = start + self._steps_to_record(len(order) - start)
                record = self._record(self._train_steps(order[start:stop], on_step))
                yield record
                if record.diverged or self._is_out_of_time() or self._is_out_of_work():
                    return
                start = stop

    @property
    def samples_share(self) -> float:
        """Share of the training samples that one batch holds."""
        return self.options.samples_per_step / len(self._train.inputs)

    def header(self) -> Record:
        """What describes the run in its first record."""
        return {
            "settings": self.settings,
            "seed": self.options.seed,
            "batch_size": self.options.samples_per_step,
            "curvature_batch_size": self.options.curvature_batch_size,
            "average": self.options.average,
            "compile_seconds": self.compile_seconds,
            "initial_train_loss": self.initial.loss,
            "step_flops": self._step.costs.get("flops"),
        }

    def _compile(self) -> tuple[TrainState, CompiledStep]:
        problem, method = self.options.problem, self.options.method
        sizes = self.options.batch_sizes
        params = jax.jit(problem.init)(jax.random.key(self.options.seed))
        optimizer = build_optimizer(
            problem, method, self.settings, params, self._train, sizes.gradient
        )
        state = initial_state(optimizer, params)
        indices = next(
            epoch_orders(len(self._train.inputs), sizes.gradient, seed=0, width=sizes.width)
        )[0]
        step = training_step(problem, optimizer, method, self.settings, sizes)
        return state, compile_step(step, state, self._train, indices)

    def _train_steps(self, order: IndexArray, on_step: StepCallback) -> bool:
        """Takes the steps of an epoch, or of a part of it; returns whether the losses were finite.

        Each loss is read while the next step already runs: the device never waits for Python,
        and yet a run ends at most one step after its time or its first loss that is not finite.
        """
        seconds_before, start = self._seconds, time.perf_counter()
        cpu_start = time.process_time()
        previous: jax.Array | None = None
        for indices in order:
            self._state, loss = self._step.call(self._state, self._train, indices)
            self._steps += 1
            self._average_in()
            value = float(loss if previous is None else previous)
            self._seconds = seconds_before + time.perf_counter() - start
            on_step(self._steps, value)
            if not math.isfinite(value) or self._is_out_of_time():
                break
            previous = loss
        is_finite = math.isfinite(value) and math.isfinite(float(loss))
        wait((self._state, self._average))
        self._seconds = seconds_before + time.perf_counter() - start
        self._cpu_seconds += time.process_time() - cpu_start
        return is_finite

    def _average_in(self) -> None:
        """Moves the average toward the parameters; it is a plain mean of the first of them."""
        if self.options.average is None:
            return
        weight = max(1 - self.options.average, 1 / self._steps)
        params = self._state.params
        self._average = _move(params if self._average is None else self._average, params, weight)

    def _steps_to_record(self, left: int) -> int:
        """How many of the steps that are left of an epoch are done before the next record."""
        count, budget = min(left, self.options.record_every or left), self.options.gradients
        if budget is None:
            return count
        if self._steps == 0:
            return 1  # what a step costs is known after one
        per_step = self._gradients() / self._steps
        due = budget - self._gradients()
        if self.options.records is not None:
            due = min(due, budget / self.options.records)
        return max(1, min(count, math.ceil(due / per_step)))

    def _is_out_of_work(self) -> bool:
        return self.options.gradients is not None and self._gradients() >= self.options.gradients

    def _is_out_of_time(self) -> bool:
        return self.options.seconds is not None and self._seconds >= self.options.seconds

    def _gradients(self) -> float:
        regular = self.options.method.gradients(self.settings, self._steps)
        return _rounded(regular + float(self._state.extra_gradients))

    def _record(self, is_finite: bool) -> EpochRecord:
        params = self._state.params if self._average is None else self._average
        train, test = (self._evaluate(params, split) for split in (self._train, self._test))
        epoch = self._steps / self.steps_per_epoch
        return EpochRecord(
            epoch=_rounded(epoch),
            step=self._steps,
            gradients=self._gradients(),
            seconds=self._seconds,
            cpu_seconds=self._cpu_seconds,
            train_loss=train.loss,
            test_loss=test.loss,
            test_accuracy=test.accuracy,
            diverged=not (is_finite and train.is_finite()),
        )


@jax.jit
def _move(average: Params, params: Params, weight: jax.Array) -> Params:
    return optax.incremental_update(params, average, weight)


def _rounded(number: float) -> float:
    """An integer where the number is one, else four decimals."""
    return int(number) if number.is_integer() else round(number, 4)
