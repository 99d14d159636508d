"""Models of dense matrices, and minimizers that are found without the eigenbasis of the model.

The oracles know ``B`` and ``g`` only. They are float64, and bisect until nothing changes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from secondorder.solvers import QuadraticModel

N, K = 9, 4
KEPT = np.array([True, True, False, True])  # one of the k places holds no direction
CASES = ["convex", "indefinite", "singular", "hard", "complement below", "no gradient", "no g_perp"]

few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**31)
exponents = st.floats(-4, 4)


class Dense(NamedTuple):
    """A model in all n coordinates, and the basis in which ``model`` is given."""

    b: np.ndarray
    g: np.ndarray
    basis: np.ndarray  # (n, k + 1), zero where nothing is known
    model: QuadraticModel

    def step(self, step):
        """The step in all coordinates."""
        return self.basis @ np.append(step.coordinates, step.complement).astype(float)

    def value(self, p):
        return self.g @ p + p @ self.b @ p / 2


def dense_model(seed, case, scale=1.0):
    """A random matrix ``P diag(λ) Pᵀ + γ(I - P Pᵀ)`` and a gradient, of one of the `CASES`."""
    rng = np.random.default_rng(seed)
    p = np.linalg.qr(rng.standard_normal((N, K)))[0] * KEPT
    values, gamma = 10.0 ** rng.uniform(-2, 1, K), 10.0 ** rng.uniform(-2, 1)
    g = scale * rng.standard_normal(N)
    if case in ("indefinite", "hard", "no gradient"):
        values *= rng.choice([-1, 1], K)
        values[0] = -2 * np.abs(values).max()
    if case == "singular":
        values[:2] = 0
    if case == "complement below":
        gamma = -2 * values.max()
    if case in ("hard", "singular"):
        g -= p[:, :2] @ (p[:, :2].T @ g)
    if case == "no g_perp":
        g = p @ (p.T @ g)
    if case == "no gradient":
        g *= 0
    return assemble(p, values, gamma, g, case)


def assemble(p, values, gamma, g, case):
    b = (p * values) @ p.T + gamma * (np.eye(N) - p @ p.T)
    a = p.T @ g
    if case in ("hard", "singular"):
        a[:2] = 0  # and not what rounding leaves
    rest = g - p @ a
    known = case not in ("no g_perp", "no gradient")
    size = np.linalg.norm(rest) if known else 0.0
    basis = np.column_stack([p, rest / size if known else 0 * rest])
    return Dense(b, g, basis, as_model(np.where(KEPT, values, gamma), a, gamma, size, KEPT))


def as_model(*fields, dtype=None):
    """A model of the default float, or of ``dtype``."""
    *numbers, kept = fields
    return QuadraticModel(*(jnp.asarray(x, dtype or float) for x in numbers), jnp.asarray(kept))


def restricted(dense):
    """The model in an orthonormal basis of the known directions, turned at random."""
    known = dense.basis[:, np.linalg.norm(dense.basis, axis=0) > 0]
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((known.shape[1],) * 2))[0]
    q = known @ turn
    return q.T @ dense.b @ q, q.T @ dense.g


def ball_minimum(b, g, radius):
    """The minimum of ``gᵀp + pᵀBp/2`` over ``‖p‖ ≤ radius``."""
    return secular_minimum(b, g, lambda shift: radius, bounded=True)[1]


def cubic_minimum(b, g, weight):
    """The minimum of ``gᵀp + pᵀBp/2 + weight ‖p‖³/3``."""
    length, value = secular_minimum(b, g, lambda shift: shift / weight, bounded=False)
    return value + weight * length**3 / 3


@np.errstate(over="ignore")  # at a pole the step is infinitely long
def secular_minimum(b, g, allowed, bounded):
    """Norm of the minimizer and value of the quadratic there, by bisection on the shift."""
    values, vectors = np.linalg.eigh(b)
    a, gap = vectors.T @ g, values - values[0]
    start = max(0.0, -values[0])
    noise = 1e-13 * np.abs(values).max()
    base = gap if start else values

    def step(u):
        d = base + u
        live = (np.abs(a) > 1e-13 * np.linalg.norm(a)) | (d > noise)
        return np.where(live, -a / np.where(live, np.maximum(d, 1e-300), 1), 0)

    low, high = 0.0, np.linalg.norm(a) + np.abs(values).max() + 1
    while allowed(start + high) < np.linalg.norm(step(high)):
        high *= 2
    p = step(0.0)
    if np.linalg.norm(p) > allowed(start):
        for _ in range(2000):
            middle = (low + high) / 2 if low > 1e-3 * high else max(np.sqrt(low * high), high / 1e3)
            if middle in (low, high):
                break
            long = np.linalg.norm(step(middle)) > allowed(start + middle)
            low, high = (middle, high) if long else (low, middle)
        p = step(high)
    elif start > noise:
        p[0] += np.sqrt(allowed(start) ** 2 - p @ p) * (-1 if a[0] > 0 else 1)
    if bounded:
        p *= min(1.0, allowed(0) / max(np.linalg.norm(p), 1e-300))
    return np.linalg.norm(p), a @ p + values @ p**2 / 2


def spread_model(seed, dtype, spread=1e3):
    """A model whose eigenvalues are spread, as a device would hold it."""
    rng = np.random.default_rng(seed)
    values = np.geomspace(1 / spread, 1, K) * rng.choice([-1, 1], K)
    gamma, a, size = 0.1, rng.standard_normal(K), abs(rng.standard_normal())
    return as_model(values, a, gamma, size, np.ones(K, bool), dtype=dtype)


def nearly_hard(seed, share, force):
    """A float32 model whose gradient is small, and smaller along the leftmost eigenvector."""
    rng = np.random.default_rng(seed)
    values = 10.0 ** rng.uniform(-3, 0, K)
    values[0] = -1.1 * values.max()
    a = 10.0**force * rng.standard_normal(K)
    a[0] *= 10.0**share
    last = 10.0**force * abs(rng.standard_normal())
    return as_model(values, a, 0.1, last, np.ones(K, bool), dtype=jnp.float32)


def exact(model):
    """The diagonal matrix and the gradient of a model in float64."""
    values = np.append(model.eigenvalues, model.complement).astype(float)
    return np.diag(values), np.append(model.gradient, model.complement_gradient).astype(float)


def vector(step):
    return np.append(step.coordinates, step.complement).astype(float)


def assert_finite(tree):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def assert_types(tree, dtype):
    """Of the dtype of the model, and not weakly typed."""
    assert all(leaf.dtype == dtype and not leaf.weak_type for leaf in jax.tree.leaves(tree))
