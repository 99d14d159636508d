"""Cubic penalties: dense minimizers, stationarity, closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from secondorder.solvers import (
    cubic_decrease,
    cubic_step,
    separable_cubic_decrease,
    separable_cubic_step,
)
from tests.solvers.solver_oracles import (
    CASES,
    K,
    as_model,
    assert_finite,
    assert_types,
    cubic_minimum,
    dense_model,
    exact,
    exponents,
    few,
    nearly_hard,
    restricted,
    seeds,
    spread_model,
    vector,
)

solve = jax.jit(cubic_step)
decrease = jax.jit(cubic_decrease)
solve_separable = jax.jit(separable_cubic_step)
decrease_separable = jax.jit(separable_cubic_decrease)
SOLVERS = [(solve, decrease), (solve_separable, decrease_separable)]


def root(value, gradient, weight):
    """The minimizer of ``gradient p + value p²/2 + weight |p|³/3``, from its two quadratics."""
    points = np.concatenate(
        [np.roots([sign * weight, value, gradient]) for sign in (1, -1)] + [[0.0]]
    )
    points = points.real[np.abs(points.imag) < 1e-9]
    costs = gradient * points + value * points**2 / 2 + weight * np.abs(points) ** 3 / 3
    return points[np.argmin(costs)], costs.min()


@pytest.mark.parametrize("case", CASES)
@few
@given(seed=seeds, exponent=exponents)
def test_step_is_the_minimizer(x64, case, seed, exponent):
    weight, dense = 10.0**exponent, dense_model(seed, case)
    step = solve(dense.model, weight)
    p = dense.step(step)
    value = dense.value(p) + weight * np.linalg.norm(p) ** 3 / 3
    minimum = cubic_minimum(*restricted(dense), weight)
    np.testing.assert_allclose(value, minimum, rtol=1e-10)
    np.testing.assert_allclose(decrease(dense.model, step, weight), -minimum, rtol=1e-10)


@pytest.mark.parametrize("case", ["convex", "indefinite", "hard", "complement below"])
@few
@given(seed=seeds, exponent=exponents)
def test_step_is_stationary(x64, case, seed, exponent):
    """``(B + weight ‖p‖ I) p = -g``, in all directions."""
    weight, dense = 10.0**exponent, dense_model(seed, case)
    p = dense.step(solve(dense.model, weight))
    shift = weight * np.linalg.norm(p)
    residual = dense.b @ p + shift * p + dense.g
    size = np.linalg.norm(dense.g) + (np.linalg.norm(dense.b, 2) + shift) * np.linalg.norm(p)
    assert np.linalg.norm(residual) <= 1e-13 * size
    assert np.linalg.eigvalsh(dense.b)[0] + shift >= -1e-13 * np.linalg.norm(dense.b, 2)


@few
@given(seed=seeds, exponent=exponents, share=st.floats(-320, 0))
def test_nearly_hard_case(x64, seed, exponent, share):
    dense = dense_model(seed, "hard")
    model = dense.model._replace(gradient=dense.model.gradient.at[0].set(10.0**share))
    weight = 10.0**exponent
    minimum = cubic_minimum(*exact(model), weight)
    np.testing.assert_allclose(decrease(model, solve(model, weight), weight), -minimum, rtol=1e-10)


@pytest.mark.parametrize("case", CASES)
@few
@given(seed=seeds, exponent=exponents)
def test_separable_step_is_the_minimizer_of_every_coordinate(x64, case, seed, exponent):
    weight, model = 10.0**exponent, dense_model(seed, case).model
    step = solve_separable(model, weight)
    b, g = exact(model)
    known = np.append(model.kept, model.complement_gradient > 0)
    costs = [root(b[i, i], g[i], weight)[1] if known[i] else 0 for i in range(K + 1)]
    p = vector(step)
    np.testing.assert_allclose(decrease_separable(model, step, weight), -sum(costs), rtol=1e-10)
    residual = g + np.diag(b) * p + weight * np.abs(p) * p
    size = np.abs(g) + np.abs(np.diag(b) * p) + weight * p**2
    assert (np.abs(residual[known]) <= 1e-14 * size[known]).all()
    assert not p[~known].any()
    assert (p * g <= 0).all()


def test_negative_curvature_without_gradient():
    model = as_model([-2.0, 1.0], [0.0, 0.0], 1.0, 0.0, [True, True])
    for solver, _ in SOLVERS:
        np.testing.assert_allclose(np.abs(vector(solver(model, 4.0))), [0.5, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(("solver", "promised"), SOLVERS)
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_empty_model_gives_steepest_descent(solver, promised, size):
    """Of length ``√(‖g‖/weight)``."""
    nothing = np.zeros(K)
    model = as_model(nothing, nothing, 0.0, size, nothing > 0)
    step = solver(model, 4.0)
    np.testing.assert_allclose(vector(step), [0] * K + [-np.sqrt(size) / 2], rtol=1e-6)
    np.testing.assert_allclose(promised(model, step, 4.0), size**1.5 / 3, rtol=1e-5)


@pytest.mark.parametrize(("solver", "promised"), SOLVERS)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_to_gain_gives_no_step(solver, promised, kept, value):
    model = as_model(np.full(K, value), np.zeros(K), value, 0.0, np.full(K, kept))
    step = solver(model, 1.0)
    assert not np.any(vector(step))
    assert promised(model, step, 1.0) == 0


@pytest.mark.parametrize(("solver", "promised"), SOLVERS)
@pytest.mark.parametrize("weight", [0.0, 1e-45, 1e-38, 1e-30, 1e-15])
def test_vanishing_weight_gives_newtons_step(solver, promised, weight):
    model = as_model([1.0, 2.0], [1.0, -1.0], 4.0, 1.0, [True, True], dtype=jnp.float32)
    np.testing.assert_allclose(vector(solver(model, weight)), [-1, 0.5, -0.25], rtol=1e-6)


@few
@given(seed=seeds, exponent=st.floats(-3, 3))
def test_float32_with_spread_eigenvalues(seed, exponent):
    model, weight = spread_model(seed, jnp.float32), float(np.float32(10.0**exponent))
    b, g = exact(model)
    p = vector(solve(model, weight))
    value = g @ p + p @ b @ p / 2 + weight * np.linalg.norm(p) ** 3 / 3
    np.testing.assert_allclose(value, cubic_minimum(b, g, weight), rtol=2e-6)
    p = vector(solve_separable(model, weight))
    value = g @ p + p @ b @ p / 2 + weight * np.sum(np.abs(p) ** 3) / 3
    best = sum(root(b[i, i], g[i], weight)[1] for i in range(K + 1))
    np.testing.assert_allclose(value, best, rtol=2e-6)


@few
@given(seed=seeds, exponent=exponents, share=st.floats(-36, 0), force=st.floats(-8, 2))
@example(seed=784, exponent=0.0, share=-33.0, force=-2.5)
def test_float32_nearly_hard_case(seed, exponent, share, force):
    """The distance from the leftmost eigenvalue is resolved far below its rounding."""
    model, weight = nearly_hard(seed, share, force), float(np.float32(10.0**exponent))
    p = vector(solve(model, weight))
    b, g = exact(model)
    value = g @ p + p @ b @ p / 2 + weight * np.linalg.norm(p) ** 3 / 3
    np.testing.assert_allclose(value, cubic_minimum(b, g, weight), rtol=2e-6)


@few
@given(st.lists(st.sampled_from([0.0, 1e-30, 1e-12, 1.0, 1e12]), min_size=8))
def test_extreme_numbers_give_no_nan(numbers):
    a, b, c, d, e, f, weight, size = numbers[:8]
    model = as_model([a, -b, c], [d, -e, 0.0], f, size, [True] * 3, dtype=jnp.float32)
    for solver, _ in SOLVERS:
        assert not np.isnan(vector(solver(model, weight))).any()
        assert_finite(solver(model, max(weight, 1e-12)))


@pytest.mark.parametrize(("solver", "promised"), SOLVERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_is_that_of_the_model(x64, solver, promised, dtype):
    model = spread_model(0, jnp.dtype(dtype))
    step = solver(model, 1.0)
    assert_types([step, promised(model, step, 1.0)], dtype)


@pytest.mark.parametrize("function", [cubic_step, separable_cubic_step])
def test_maps_over_weights(function):
    model = spread_model(0, jnp.float32)
    weights = jnp.array([0.1, 1.0, 10.0])
    together = jax.jit(jax.vmap(function, (None, 0)))(model, weights)
    for i, weight in enumerate(weights):
        one = jax.jit(function)(model, weight)
        np.testing.assert_allclose(together.coordinates[i], one.coordinates, rtol=1e-5, atol=1e-6)
