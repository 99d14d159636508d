"""What a comparison is made of: contenders with their grids, and trials with their work."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.methods import PEERS
from benchmarks.problems import PROBLEMS
from benchmarks.settings import Settings

Grid = Mapping[str, Sequence[Any]]

# Compilation of a run, and what steps cost over the gradients that are counted.
_COMPILE_SECONDS, _STEP_OVERHEAD = 20.0, 1.3
_QUICK_BATCH = 100
# Where a trial takes all samples: about as many as the largest problems have.
_ALL_SAMPLES = (60000, 10000)


@dataclasses.dataclass(frozen=True)
class Contender:
    """A method with the settings that are tuned for it.

    Attributes:
        method: Its name in `METHODS`.
        grid: Values of settings, of which every combination is tried.
        settings: Further settings, the same for all of them.
        name: What it is called in the plot; by default the method.
        like: Another contender whose best settings it takes instead of a grid of its own.
        curvature_batch_size: Samples for the curvature; None leaves it to the method.
    """

    method: str
    grid: Grid = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str | None = None
    like: str | None = None
    curvature_batch_size: int | None = None

    @property
    def label(self) -> str:
        """What it is called."""
        return self.name or self.method

    @property
    def is_peer(self) -> bool:
        """Whether it is what a user would take instead of a method of the package."""
        return self.method in PEERS

    def points(self) -> Iterator[Settings]:
        """All settings to try, one if there is no grid."""
        for values in itertools.product(*self.grid.values()):
            yield {**self.settings, **dict(zip(self.grid, values, strict=True))}

    def shortened(self, batch_size: int) -> "Contender":
        """The contender at the middle of its grid, with a curvature batch within the batch."""
        middle = {key: (values[len(values) // 2],) for key, values in self.grid.items()}
        size = self.curvature_batch_size and min(self.curvature_batch_size, batch_size)
        return dataclasses.replace(self, grid=middle, curvature_batch_size=size)


@dataclasses.dataclass(frozen=True)
class Trial:
    """Several methods on one problem.

    Attributes:
        name: Of its plot and its table.
        problem: The problem's name in `PROBLEMS`.
        contenders: The methods; one that is ``like`` another comes after it.
        gradients: Work to spend on each run, in gradients of a batch.
        batch_size: Samples per step; None takes the problem's.
        train_size: Training samples; None takes all.
        test_size: Test samples; None takes all.
        records: Losses that are recorded over the run.
        tuning: Share of the work that is spent on each point of a grid.
        targets: Training losses, in falling order: the work until they are reached is reported.
        accuracies: Test accuracies, likewise, in rising order.
        gradient_seconds: Time of a gradient of a batch on one core, for the estimate.
    """

    name: str
    problem: str
    contenders: tuple[Contender, ...]
    gradients: float
    batch_size: int | None = None
    train_size: int | None = None
    test_size: int | None = None
    records: int = 8
    tuning: float = 1.0
    targets: tuple[float, ...] = ()
    accuracies: tuple[float, ...] = ()
    gradient_seconds: float = 0.1

    @property
    def samples_per_step(self) -> int:
        """The batch size that counts."""
        return self.batch_size or PROBLEMS[self.problem].batch_size

    def shortened(self, is_first: bool) -> "Trial":
        """The trial with little data and little work: whether all runs, not what they reach.

        Args:
            is_first: Whether it is the first of its comparison. Of the others two methods are kept,
                the first peer and the first of the package.

        Returns:
            A trial of one point for each method.
        """
        batch = min(_QUICK_BATCH, self.samples_per_step)
        chosen = [contender.shortened(batch) for contender in self.contenders]
        if not is_first:
            kinds = {contender.is_peer: contender for contender in reversed(chosen)}
            chosen = [contender for contender in chosen if contender in kinds.values()]
        return dataclasses.replace(
            self,
            contenders=tuple(chosen),
            gradients=6,
            batch_size=batch,
            train_size=500,
            test_size=100,
            records=2,
            gradient_seconds=self.gradient_seconds / 5,
        )

    def runs(self, seeds: int) -> int:
        """How many trainings it takes."""
        return sum(self._runs(contender, seeds)[0] for contender in self.contenders)

    def hours(self, seeds: int) -> float:
        """How long it takes on one core, about."""
        work = sum(self._runs(contender, seeds)[1] for contender in self.contenders)
        samples = (self.train_size or _ALL_SAMPLES[0]) + (self.test_size or _ALL_SAMPLES[1])
        forward = samples / self.samples_per_step / 3
        gradients = self.gradients * _STEP_OVERHEAD + self.records * forward
        seconds = work * gradients * self.gradient_seconds + self.runs(seeds) * _COMPILE_SECONDS
        return seconds / 3600

    def _runs(self, contender: Contender, seeds: int) -> tuple[int, float]:
        """Trainings of a contender, and their work in units of a whole one."""
        points = 1 if contender.like else len(list(contender.points()))
        if points == 1:
            return seeds, seeds
        if self.tuning == 1:  # the best run of the grid is one of the seeds
            return points + seeds - 1, points + seeds - 1
        return points + seeds, points * self.tuning + seeds
