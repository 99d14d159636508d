"""Losses and accuracies over whole splits."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.problems import Batch, Params, Problem

# Bounds the memory of the activations; it does not change the result.
_CHUNK = 1000


class Metrics(NamedTuple):
    """How good parameters are on a split.

    Attributes:
        loss: Mean loss including the L2 term.
        accuracy: Share of right classes, at all positions of sequences; None for problems without
            classes.
    """

    loss: float
    accuracy: float | None

    def is_finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)


class Evaluator:
    """Evaluates parameters of one problem; compiles once per split."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._sums = jax.jit(functools.partial(_sums, problem), static_argnames="size")
        self._penalty = jax.jit(problem.penalty)

    def __call__(self, params: Params, data: Batch) -> Metrics:
        """Evaluates on all samples.

        Args:
            params: The parameters.
            data: A split on the device.

        Returns:
            The mean loss, and the accuracy if the problem has one.
        """
        samples = len(data.inputs)
        starts = range(0, samples, _CHUNK)
        chunks = [
            self._sums(params, data, start, size=min(_CHUNK, samples - start)) for start in starts
        ]
        loss, correct = (float(sum(column)) for column in zip(*chunks, strict=True))
        accuracy = correct / data.targets.size if self._problem.is_classifier else None
        return Metrics(loss / samples + float(self._penalty(params)), accuracy)


def _sums(
    problem: Problem, params: Params, data: Batch, start: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and number of right classes over ``size`` samples from ``start``."""
    chunk = data.take(start + jnp.arange(size))
    outputs = problem.model(params, chunk.inputs)
    correct = (
        jnp.sum(jnp.argmax(outputs, axis=-1) == chunk.targets)
        if problem.is_classifier
        else jnp.zeros((), jnp.int32)
    )
    return size * problem.loss(outputs, chunk.targets), correct
