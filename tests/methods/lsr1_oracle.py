"""L-SR1 written out in NumPy, in double precision, with dense matrices and the list of its pairs.

Independent of the library: a vector is one flat array, a pair is two of them, and the matrix is
built anew from the list at every step and diagonalized as a whole.
"""

import collections

import numpy as np

from tests.solvers.solver_oracles import ball_minimum, cubic_minimum
from tests.solvers.sr1_oracles import sequential_sr1

DEFAULTS = {
    "memory_size": 4,
    "model": "trust_region",
    "scale": "bb",
    "radius": 1.0,
    "shrink": 0.5,
    "grow": 2.0,
    "shrink_below": 0.1,
    "grow_above": 0.75,
    "reach": 0.8,
    "acceptance": 1e-4,
    "skip": 1e-8,
    "momentum": 0.0,
    "diagonal": False,
    "diagonal_decay": 0.99,
    "restart_after": 5,
    "update_every": 1,
    "slope_rate": 0.0,
    "slope_target": 0.0,
    "weight_decay": 0.0,
}
REDUNDANT = 1e-6  # what a Gram matrix in double precision resolves
BOUNDED = ("trust_region", "shape_changing")


class Oracle:
    """The optimizer on one flat vector; ``step`` returns what is added to it."""

    def __init__(self, **settings):
        assert set(settings) <= set(DEFAULTS)
        self.__dict__.update(DEFAULTS | settings)
        self.pairs = []  # oldest first
        self.last = None  # the last step, if it was taken
        self.slope = 0.0  # along it, at its start
        self.in_a_row = 0
        self.count = 0
        self.moments = 0.0
        self.metrics = {}
        self.events = collections.Counter()

    def step(self, x, objective, curvature=None):
        """``objective`` and ``curvature`` map a point to value and gradient."""
        value, g = self.decayed(objective, x)
        root = self.metric(g)
        self.follow(g / root)
        p, length, decrease = self.propose(g / root)
        trial = x + p / root
        trial_value, trial_g = self.decayed(objective, trial)
        ratio = reduction_ratio(value, trial_value, decrease)
        finite = np.isfinite(trial_value) and np.isfinite(trial_g).all()
        ratio = ratio if finite else -np.inf
        self.events["not finite"] += not finite
        accepted = ratio > self.acceptance
        is_filling = len(self.pairs) < self.memory_size
        if finite and (is_filling or self.count % self.update_every == 0):
            before, after = (
                (g, trial_g)
                if curvature is None
                else (self.decayed(curvature, point)[1] for point in (x, trial))
            )
            s = trial - x
            self.pairs = [*self.pairs, (root * s, (after - before) / root)][-self.memory_size :]
            self.events["wrapped"] += len(self.pairs) == self.memory_size
        self.events["accepted" if accepted else "rejected"] += 1
        self.last, self.slope = (p, g / root @ p) if accepted else (None, 0.0)
        self.steer(ratio, length, accepted)
        self.metrics |= {"ratio": ratio, "step_norm": np.linalg.norm(p)}
        self.count += 1
        return accepted * (p / root)

    def follow(self, g):
        """The radius in view of the slope that the last step left."""
        if self.last is None or self.slope >= 0:
            return
        share = np.clip(g @ self.last / self.slope, -1, 1)
        self.events["overshot"] += share < 0
        self.radius *= np.exp(self.slope_rate * (share - self.slope_target))

    def decayed(self, objective, x):
        value, gradient = objective(x)
        return value + self.weight_decay / 2 * (x @ x), gradient + self.weight_decay * x

    def metric(self, g):
        """The square root of the diagonal metric."""
        if not self.diagonal:
            return np.ones_like(g)
        decay = self.diagonal_decay
        self.moments = decay * self.moments + (1 - decay) * g**2
        return np.sqrt(np.sqrt(self.moments / (1 - decay ** (self.count + 1))) + 1e-8)

    def propose(self, g):
        """The step, its length in the norm of the region, and the decrease that is promised."""
        gamma = initial_scale(self.pairs, self.scale)
        b, used = gamma * np.eye(len(g)), []
        if self.pairs:
            b, used = sequential_sr1(self.pairs, gamma, self.skip, REDUNDANT)
        values = np.linalg.eigvalsh(b)
        self.events["skipped"] += len(used) - sum(used)
        self.events["negative curvature"] += values[0] < 0
        self.metrics |= {
            "scale": gamma,
            "smallest_eigenvalue": values[0],
            "largest_eigenvalue": values[-1],
            "pairs_kept": sum(used),
            "pairs_skipped": len(used) - sum(used),
        }
        p, length = self.minimize(b, g, gamma)
        decrease = self.promise(b, g, p)
        if self.model == "trust_region":
            np.testing.assert_allclose(-decrease, ball_minimum(b, g, self.radius), rtol=1e-8)
        if self.model == "cubic":
            np.testing.assert_allclose(-decrease, cubic_minimum(b, g, 1 / self.radius), rtol=1e-8)
        return self.blend(b, g, p, length, decrease)

    def minimize(self, b, g, gamma):
        """The minimizer of the model, and its length in the norm of the region."""
        values, vectors = np.linalg.eigh(b)
        a, radius = vectors.T @ g, self.radius
        if self.model == "trust_region":
            p = vectors @ secular(values, a, lambda shift: radius)
            return p, np.linalg.norm(p)
        if self.model == "cubic":
            return vectors @ secular(values, a, lambda shift: shift * radius), radius
        if self.model == "shape_changing":
            return box_step(values, vectors, g, gamma, radius)
        shift = max(1 / radius, -2 * values[0], 1e-4 * np.abs(values).max() - values[0])
        return -vectors @ (a / (values + shift)), 1 / shift

    def blend(self, b, g, p, length, decrease):
        if self.last is None or self.momentum == 0:
            return p, length, decrease
        mixed = (1 - self.momentum) * p + self.momentum * self.last
        if self.model in BOUNDED:
            norm = np.linalg.norm(mixed)
            self.events["clipped"] += norm > self.radius
            mixed = mixed * min(1, self.radius / norm)
        promise = self.promise(b, g, mixed)
        self.events["momentum used" if promise > 0 else "momentum refused"] += 1
        if promise <= 0:
            return p, length, decrease
        return mixed, np.linalg.norm(mixed) if self.model in BOUNDED else length, promise

    def promise(self, b, g, p):
        decrease = -(g @ p + p @ b @ p / 2)
        if self.model == "cubic":
            decrease -= np.linalg.norm(p) ** 3 / (3 * self.radius)
        return decrease

    def steer(self, ratio, length, accepted):
        if ratio < self.shrink_below:
            self.events["shrunk"] += 1
            self.radius = self.shrink * min(self.radius, length)
        elif ratio > self.grow_above and length >= self.reach * self.radius:
            self.events["grown"] += 1
            self.radius *= self.grow
        self.in_a_row = 0 if accepted else self.in_a_row + 1
        if self.in_a_row >= self.restart_after:
            self.events["restarted"] += 1
            self.pairs, self.in_a_row = [], 0


def reduction_ratio(value, trial_value, decrease):
    noise = 10 * np.finfo(float).eps * max(abs(value), abs(trial_value))
    return (value - trial_value + noise) / (decrease + noise) if decrease >= 0 else -np.inf


def initial_scale(pairs, rule):
    if not pairs:
        return 0.0
    quotients = [s @ y / (s @ s) for s, y in pairs]
    if rule == "least_rayleigh" and max(quotients) > 0:
        return min(quotient for quotient in quotients if quotient > 0)
    if rule in ("bb", "least_rayleigh"):
        s, y = pairs[-1]
        sizes = np.linalg.norm(s), np.linalg.norm(y)
        return y @ y / (s @ y) if s @ y > 1e-6 * sizes[0] * sizes[1] else sizes[1] / sizes[0]
    if not isinstance(rule, str):
        return rule
    lowest, highest = curvature_range(pairs)
    floor = 1e-6 * max(abs(lowest), abs(highest))
    if rule == "pencil_above":
        return max(1.5 * highest, floor)
    return max(lowest / 2, floor) if lowest > 0 else min(1.5 * lowest, -floor)


def curvature_range(pairs):
    """Extreme eigenvalues of the pencil of ``D + L + L'`` and ``S'S``, on what ``S`` resolves."""
    units = np.array([s / np.linalg.norm(s) for s, _ in pairs]).T
    curved = np.array([y / np.linalg.norm(s) for s, y in pairs]).T
    middle = np.tril(units.T @ curved)  # a newer step times an older change
    middle = middle + np.tril(middle, -1).T
    _, sizes, rows = np.linalg.svd(units, full_matrices=False)
    resolved = sizes**2 > 1e-8 * sizes[0] ** 2
    basis = rows[resolved].T / sizes[resolved]
    return np.linalg.eigvalsh(basis.T @ middle @ basis)[[0, -1]]


@np.errstate(divide="ignore", invalid="ignore")
def secular(values, a, allowed):
    """``-a / (values + shift)`` with the shift at which its norm is what is allowed there."""

    def step(shift):
        return -a / (values + shift)

    low = max(0.0, -values[0])
    if values[0] > 0 and np.linalg.norm(step(0.0)) <= allowed(0.0):
        return step(0.0)
    high = low + 1
    while np.linalg.norm(step(high)) > allowed(high):
        high = low + 2 * (high - low)
    for _ in range(200):
        middle = (low + high) / 2
        too_long = np.linalg.norm(step(middle)) > allowed(middle)
        low, high = (middle, high) if too_long else (low, middle)
    return step(high)


def box_step(values, vectors, g, gamma, radius):
    """Every eigenvector of its own, and all that belong to ``gamma`` as one direction."""
    own = np.abs(values - gamma) > 1e-9 * np.abs(values).max()
    rest = g - vectors[:, own] @ (vectors[:, own].T @ g)
    basis = np.column_stack([vectors[:, own], rest / np.linalg.norm(rest)])
    eigenvalues, a = np.append(values[own], gamma), basis.T @ g
    inside = (eigenvalues > 0) & (np.abs(a) <= eigenvalues * radius)
    coordinates = -np.where(inside, a / np.where(inside, eigenvalues, 1), np.sign(a) * radius)
    return basis @ coordinates, np.abs(coordinates).max()
