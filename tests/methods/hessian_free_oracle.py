"""Hessian-free optimization in NumPy float64, written from the paper with dense matrices."""

import math

import numpy as np


def conjugate_gradient(A, b, x0, max_iterations, progress=5e-4, M=None):
    """All iterates from the shortened start on; the last is where Martens' rule stops."""
    M = np.ones_like(b) if M is None else M
    curvature = x0 @ A @ x0
    t = np.clip(b @ x0 / curvature, 0, 1) if curvature > 0 else 0.0
    x = t * x0
    r = A @ x - b
    y = r / M
    p = -y
    iterates, values = [x], [0.5 * x @ (r - b)]
    for i in range(1, max_iterations + 1):
        Ap = A @ p
        if p @ Ap <= 0 or r @ y == 0:
            break
        a = (r @ y) / (p @ Ap)
        x = x + a * p
        r_new = r + a * Ap
        y_new = r_new / M
        p = -y_new + (r_new @ y_new) / (r @ y) * p
        r, y = r_new, y_new
        iterates.append(x)
        values.append(0.5 * x @ (r - b))
        k = max(10, math.ceil(0.1 * i))
        if i > k and values[i - k] < 0 and (values[i] - values[i - k]) / values[i] < k * progress:
            break
    return iterates


def stored(iterates):
    """The numbers of the iterates on the paper's grid, with the last."""
    grid, following = [], 5.0
    for i in range(1, len(iterates)):
        if i == math.ceil(following):
            grid.append(i)
            following *= 1.3
    last = len(iterates) - 1
    return grid if grid and grid[-1] == last else [*grid, last]


def step(f, theta, g, B, damping, last, *, warm_start, max_iterations, backtracking=True, M=None):
    """One update: the step, the next damping and the solution to start from."""
    identity = np.eye(len(theta))
    iterates = conjugate_gradient(
        B + damping * identity, -g, warm_start * last, max_iterations, M=M
    )
    chosen = iterates[-1]
    if backtracking:
        for i in reversed(stored(iterates)[:-1]):
            if f(theta + iterates[i]) > f(theta + chosen):
                break
            chosen = iterates[i]
    rate, value = 1.0, f(theta)
    for _ in range(60):
        if f(theta + rate * chosen) <= value + 1e-2 * rate * g @ chosen:
            break
        rate *= 0.8
    else:
        rate = 0.0
    moved = rate * chosen
    promised = g @ moved + 0.5 * moved @ B @ moved
    ratio = (f(theta + moved) - value) / promised if rate else -np.inf
    if ratio < 0.25:
        damping *= 1.5
    elif ratio > 0.75:
        damping *= 2 / 3
    return moved, damping, iterates[-1]
