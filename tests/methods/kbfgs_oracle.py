"""K-BFGS written out in NumPy, in double precision, with dense matrices and loops.

Independent of the library: pairs are vectors, inverses are matrices, a limited memory is the list
of its pairs from which the inverse is built anew. A layer is given by what it did at each example
``n`` and position ``t``: its inputs ``a``, outputs ``h`` and per-example cotangents ``g``.
"""

import collections
import dataclasses
from typing import Any

import numpy as np

from tests.factors.factor_oracles import remember


@dataclasses.dataclass
class Record:
    """One layer at one point: arrays (examples, positions, features).

    ``a`` has the one of a bias as its last entry; ``g`` is the derivative of the example's own
    loss, the mean loss's times the number of examples.
    """

    a: np.ndarray
    h: np.ndarray
    g: np.ndarray


@dataclasses.dataclass
class LayerState:
    h_a: np.ndarray
    h_g: np.ndarray
    pairs: list
    s: np.ndarray
    y: np.ndarray
    moment: Any = None


DEFAULTS = {
    "damping": 0.3,
    "momentum": 0.9,
    "momentum_form": "ema",
    "input_factor": "minibatch",
    "memory_size": None,
    "forget": "redundant",
    "update_every": 1,
    "pair_decay": 0.9,
    "moment_decay": 0.9,
    "pair_damping": "powell_lm",
    "powell_fraction": 0.2,
    "damping_split": "sqrtT",
    "acceptance": 0.0,
    "refresh_order": "before",
}


def mean(vectors):
    """Over examples and positions."""
    total, count = 0, 0
    for example in vectors:
        for vector in example:
            total, count = total + vector, count + 1
    return total / count


def second_moment(a):
    """Summed over positions, averaged over examples."""
    total = 0
    for example in a:
        for vector in example:
            total = total + np.outer(vector, vector)
    return total / len(a)


def bfgs(h, s, y):
    rho = 1 / (s @ y)
    left = np.eye(len(s)) - rho * np.outer(s, y)
    return left @ h @ left.T + rho * np.outer(s, s)


class Oracle:
    """The optimizer on layers given as matrices (inputs, outputs), the bias in the last row."""

    def __init__(self, shapes, diagonal=(), **settings):
        assert set(settings) <= set(DEFAULTS)
        self.__dict__.update(DEFAULTS | settings)
        self.diagonal = set(diagonal)
        self.count = 0
        self.refreshes = 0
        self.layers = [
            LayerState(np.eye(i), np.eye(o), [], np.zeros(o), np.zeros(o)) for i, o in shapes
        ]
        self.averages = [np.zeros(shape) for shape in shapes]
        self.events = collections.Counter()

    def step(self, gradients, here, before):
        """The direction of every layer; ``before`` is of the same batch at the last parameters."""
        for k, gradient in enumerate(gradients):
            weight = 1 - self.momentum if self.momentum_form == "ema" else 1.0
            self.averages[k] = self.momentum * self.averages[k] + weight * gradient
        if self.refresh_order == "after":
            result = self.precondition()
        if self.count % self.update_every == 0:
            for k in range(len(self.layers)):
                self.refresh(k, here[k], before[k])
            self.refreshes += 1
        if self.refresh_order == "before":
            result = self.precondition()
        self.count += 1
        return result

    def precondition(self):
        return [
            layer.h_a @ average @ layer.h_g
            for layer, average in zip(self.layers, self.averages, strict=True)
        ]

    def split(self, record):
        examples, positions, outputs = record.g.shape
        if self.damping_split == "plain":
            balance = 1.0
        elif self.damping_split == "sqrtT":
            balance = np.sqrt(positions)
        else:
            second = sum(g @ g for example in record.g for g in example) / (examples * positions)
            inputs = record.a.shape[-1]
            balance = np.sqrt(np.trace(second_moment(record.a)) / inputs / (second / outputs))
        root = np.sqrt(self.damping)
        return root * balance, root / balance

    def refresh(self, k, here, before):
        layer = self.layers[k]
        damping_a, damping_g = self.split(here)
        self.refresh_input(layer, here, damping_a, diagonal=k in self.diagonal)
        self.refresh_output(layer, here, before, damping_g)

    def refresh_input(self, layer, here, damping, diagonal):
        moment = second_moment(here.a)
        if diagonal or self.input_factor == "moving_average":
            if self.refreshes > 0:
                moment = self.moment_decay * layer.moment + (1 - self.moment_decay) * moment
            layer.moment = moment
        damped = moment + damping * np.eye(len(moment))
        if diagonal or self.refreshes == 0:
            layer.h_a = np.linalg.inv(damped)
            if diagonal:
                return
        mean_input = mean(here.a)
        s = layer.h_a @ mean_input
        y = damped @ s
        if not self.rejects("input", s, y, mean_input):
            layer.h_a = bfgs(layer.h_a, s, y)

    def refresh_output(self, layer, here, before, damping):
        decay = self.pair_decay
        layer.s = decay * layer.s + (1 - decay) * (mean(here.h) - mean(before.h))
        layer.y = decay * layer.y + (1 - decay) * (mean(here.g) - mean(before.g))
        s, y = layer.s, layer.y
        quadratic = y @ layer.h_g @ y
        if s @ y < self.powell_fraction * quadratic:
            self.events["powell"] += 1
            theta = (1 - self.powell_fraction) * quadratic / (quadratic - s @ y)
            s = theta * s + (1 - theta) * layer.h_g @ y
        if self.pair_damping == "powell_lm":
            y = y + damping * s
        elif s @ y < damping * (s @ s):
            self.events["identity"] += 1
            theta = (1 - damping) * (s @ s) / (s @ s - s @ y)
            y = theta * y + (1 - theta) * s
        if self.rejects("output", s, y, mean(here.g)):
            return
        if self.memory_size is None:
            layer.h_g = bfgs(layer.h_g, s, y)
            return
        layer.pairs = remember(layer.pairs, (s, y), self.memory_size, self.forget)
        layer.h_g = np.eye(len(s))
        for pair in layer.pairs:
            layer.h_g = bfgs(layer.h_g, *pair)

    def rejects(self, side, s, y, reference):
        threshold = self.acceptance * (s @ s) * np.linalg.norm(reference)
        rejected = not (s @ y > 0 and s @ y > threshold)
        self.events[f"{side} {'rejected' if rejected else 'accepted'}"] += 1
        return rejected
