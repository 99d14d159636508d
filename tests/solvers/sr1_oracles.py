"""Dense SR1 in double precision, one pair after another."""

import numpy as np


def sequential_sr1(pairs, scale, skip=1e-8, redundant=1e-6):
    """The matrix after all pairs, oldest first, and which of them were used."""
    n = len(pairs[0][0])
    b, used = scale * np.eye(n), []
    for s, y in pairs:
        r = y - b @ s
        bound = redundant * (np.linalg.norm(y) + abs(scale) * np.linalg.norm(s))
        pivot, norm = s @ r, np.linalg.norm(r)
        use = abs(pivot) >= skip * np.linalg.norm(s) * norm and norm > bound
        used.append(use)
        if use:
            b = b + np.outer(r, r) / pivot
    return b, used


def quadratic_pairs(rng, count, n, eigenvalues):
    """Pairs of one constant symmetric Hessian, which is returned too."""
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    hessian = (basis * eigenvalues) @ basis.T
    steps = rng.standard_normal((count, n))
    return list(zip(steps, steps @ hessian, strict=True)), hessian


def noisy_pairs(rng, count, n):
    """Pairs of no Hessian at all."""
    return list(zip(rng.standard_normal((count, n)), rng.standard_normal((count, n)), strict=True))


def ring(pairs, memory_size, dtype=np.float64):
    """S and Y (m, n) with pair c in slot c mod m, and the numbers of the slots."""
    n = len(pairs[0][0])
    s, y = np.zeros((memory_size, n), dtype), np.zeros((memory_size, n), dtype)
    numbers = np.full(memory_size, -1, np.int32)
    for c, pair in enumerate(pairs):
        s[c % memory_size], y[c % memory_size] = pair
        numbers[c % memory_size] = c
    return s, y, numbers
