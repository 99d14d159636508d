"""Plain NumPy forms of what the factors compute, and pairs to try them on."""

import numpy as np


def bfgs(h, s, y):
    """The product form of the inverse BFGS update."""
    rho = 1 / (s @ y)
    left = np.eye(len(s)) - rho * np.outer(s, y)
    return left @ h @ left.T + rho * np.outer(s, s)


def bfgs_of(pairs, n):
    """The inverse after a list of pairs, from the identity."""
    h = np.eye(n)
    for s, y in pairs:
        h = bfgs(h, s, y)
    return h


def remember(kept, pair, memory_size, forget):
    """The pairs kept after one more, oldest first."""
    kept = [*kept, pair]
    if len(kept) <= memory_size:
        return kept
    units = [s / np.linalg.norm(s) for s, _ in kept]
    repeated = [max(abs(units[i] @ u) for u in units[i + 1 :]) for i in range(len(kept) - 1)]
    dropped = int(np.argmax(repeated)) if forget == "redundant" else 0
    return kept[:dropped] + kept[dropped + 1 :]


def random_inverse(rng, n, smallest=0.1, largest=10.0):
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    h = (basis * np.geomspace(smallest, largest, n)) @ basis.T
    return (h + h.T) / 2


def convex_pairs(rng, count, n, condition=100.0):
    """Independent pairs of a fixed positive definite Hessian."""
    hessian = random_inverse(rng, n, 1 / condition, 1.0)
    steps = rng.standard_normal((count, n))
    return list(zip(steps, steps @ hessian, strict=True))


def averaged_pairs(rng, count, n, scale, decay=0.9):
    """Strongly correlated pairs of an indefinite Hessian: averages of noisy differences."""
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    signs = np.where(rng.random(n) < 0.2, -1, 1)
    hessian = (basis * (scale * signs * np.geomspace(1e-4, 1, n))) @ basis.T
    s, y, pairs = np.zeros(n), np.zeros(n), []
    for _ in range(count):
        step = 0.01 * rng.standard_normal(n)
        noise = 0.001 * scale * rng.standard_normal(n)
        s = decay * s + (1 - decay) * step
        y = decay * y + (1 - decay) * (hessian @ step + noise)
        pairs.append((s, y))
    return pairs
