"""Norms that follow the eigenbasis: closed forms, a grid, the dense minimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondorder.solvers import ModelStep, model_decrease, shape_changing_step, shape_norm
from tests.solvers.solver_oracles import (
    CASES,
    KEPT,
    K,
    as_model,
    assert_finite,
    assert_types,
    ball_minimum,
    dense_model,
    exact,
    exponents,
    few,
    seeds,
    spread_model,
    vector,
)

NORMS = ["p_inf", "p_2"]

solve = jax.jit(shape_changing_step, static_argnames="norm")


def interval_minimum(value, gradient, radius):
    """The minimum over ``|p| ≤ radius``: at an end or where the derivative is zero."""
    points = [-radius, radius]
    if value and abs(gradient / value) < radius:
        points.append(-gradient / value)
    return min(gradient * p + value * p**2 / 2 for p in points)


def complement_minimum(dense, radius):
    model = dense.model
    if not model.complement_gradient:
        return 0.0  # no direction is known
    return interval_minimum(float(model.complement), float(model.complement_gradient), radius)


@pytest.mark.parametrize("case", CASES)
@few
@given(seed=seeds, exponent=exponents)
def test_box_is_minimized_coordinate_by_coordinate(x64, case, seed, exponent):
    radius, dense = 10.0**exponent, dense_model(seed, case)
    step = solve(dense.model, radius, "p_inf")
    assert shape_norm(step, "p_inf") <= radius
    minimum = complement_minimum(dense, radius) + sum(
        interval_minimum(q @ dense.b @ q, a, radius)
        for q, a in zip(dense.basis.T[:K], np.asarray(dense.model.gradient), strict=True)
        if q.any()
    )
    # What rounding makes of a zero eigenvalue counts for a step of length 1e4.
    rounding = 1e-15 * radius**2 * np.linalg.norm(dense.b)
    np.testing.assert_allclose(dense.value(dense.step(step)), minimum, rtol=1e-10, atol=rounding)


@pytest.mark.parametrize("case", CASES)
@few
@given(seed=seeds, exponent=exponents)
def test_ball_and_complement_are_minimized_apart(x64, case, seed, exponent):
    radius, dense = 10.0**exponent, dense_model(seed, case)
    step = solve(dense.model, radius, "p_2")
    assert shape_norm(step, "p_2") <= radius * (1 + 1e-14)
    q = dense.basis[:, :K][:, KEPT]
    parallel = ball_minimum(q.T @ dense.b @ q, q.T @ dense.g, radius)
    minimum = parallel + complement_minimum(dense, radius)
    np.testing.assert_allclose(dense.value(dense.step(step)), minimum, rtol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_no_point_of_a_grid_is_better(x64, seed):
    model = spread_model(seed, jnp.float64, spread=10.0)
    radius = 0.7
    axes = np.meshgrid(*[np.linspace(-radius, radius, 9)] * (K + 1))
    points = np.stack([axis.ravel() for axis in axes], axis=1)
    points = points[points[:, -1] <= 0]
    b, g = exact(model)
    values = points @ g + (points**2 @ np.diag(b)) / 2
    round_ones = np.linalg.norm(points[:, :-1], axis=1) <= radius
    assert -model_decrease(model, solve(model, radius, "p_inf")) <= values.min() + 1e-12
    assert -model_decrease(model, solve(model, radius, "p_2")) <= values[round_ones].min() + 1e-12


def test_without_gradient_only_negative_curvature_moves():
    values, kept = [-1.0, -1.0, 0.0, 1.0], [True, False, True, True]
    model = as_model(values, np.zeros(4), -1.0, 0.0, kept)
    np.testing.assert_array_equal(np.abs(vector(solve(model, 2.0, "p_inf"))), [2, 0, 0, 0, 0])
    np.testing.assert_array_equal(np.abs(vector(solve(model, 2.0, "p_2"))), [2, 0, 0, 0, 0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_empty_model_gives_steepest_descent(norm, size):
    nothing = np.zeros(K)
    model = as_model(nothing, nothing, 0.0, size, nothing > 0)
    np.testing.assert_allclose(vector(solve(model, 0.5, norm)), [0] * K + [-0.5], rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@few
@given(seed=seeds, exponent=st.floats(-3, 3))
def test_float32_with_spread_eigenvalues(norm, seed, exponent):
    model, radius = spread_model(seed, jnp.float32), float(np.float32(10.0**exponent))
    step = solve(model, radius, norm)
    p, (b, g) = vector(step), exact(model)
    last = interval_minimum(b[K, K], g[K], radius)
    if norm == "p_inf":
        rest = sum(interval_minimum(b[i, i], g[i], radius) for i in range(K))
    else:
        rest = ball_minimum(b[:K, :K], g[:K], radius)
    assert shape_norm(step, norm) <= radius * (1 + 1e-6)
    np.testing.assert_allclose(g @ p + p @ b @ p / 2, rest + last, rtol=2e-6)


@pytest.mark.parametrize("norm", NORMS)
@few
@given(st.lists(st.sampled_from([0.0, 1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e30]), min_size=8))
def test_extreme_numbers_give_no_nan(norm, numbers):
    a, b, c, d, e, f, radius, size = numbers[:8]
    model = as_model([a, -b, c], [d, -e, 0.0], f, size, [True] * 3, dtype=jnp.float32)
    step = solve(model, radius, norm)
    assert_finite(step)
    assert shape_norm(step, norm) <= radius * 1.000002


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_is_that_of_the_model(x64, norm, dtype):
    step = solve(spread_model(0, jnp.dtype(dtype)), 1.0, norm)
    assert_types([step, shape_norm(step, norm)], dtype)


def test_norms():
    step = ModelStep(jnp.array([3.0, -4.0]), jnp.array(-4.5))
    assert (shape_norm(step, "p_inf"), shape_norm(step, "p_2")) == (4.5, 5.0)


def test_unknown_norm_is_an_error():
    model = spread_model(0, jnp.float32)
    with pytest.raises(ValueError, match="p_inf"):
        shape_changing_step(model, 1.0, norm="l2")
    with pytest.raises(ValueError, match="p_inf"):
        shape_norm(shape_changing_step(model, 1.0), "l2")
