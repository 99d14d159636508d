"""Descent, negative curvature, and the search along their curve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondorder.solvers import curvilinear_decrease, curvilinear_search, curvilinear_steps
from tests.solvers.solver_oracles import (
    CASES,
    K,
    as_model,
    assert_finite,
    assert_types,
    dense_model,
    few,
    seeds,
    spread_model,
    vector,
)

FLOOR = 1e-3

steps_of = jax.jit(curvilinear_steps)


@pytest.mark.parametrize("case", CASES)
@few
@given(seed=seeds)
def test_steps(x64, case, seed):
    dense = dense_model(seed, case)
    d, u = map(dense.step, steps_of(dense.model, FLOOR))
    known = dense.basis[:, dense.basis.any(0)]
    values, vectors = np.linalg.eigh(known.T @ dense.b @ known)
    largest = np.abs(values).max()
    sizes = np.maximum(np.abs(values), FLOOR * largest)
    absolute = known @ ((vectors / sizes) @ vectors.T) @ known.T
    np.testing.assert_allclose(d, -absolute @ dense.g, rtol=1e-7, atol=1e-9)
    assert dense.g @ d <= 0
    assert dense.g @ u <= 1e-12
    follows = values[0] < -FLOOR * largest
    np.testing.assert_allclose(u @ dense.b @ u, -(values[0] ** 2) if follows else 0, rtol=1e-9)
    expected = -dense.g @ d - (u @ dense.b @ u) / 2
    found = curvilinear_decrease(dense.model, *steps_of(dense.model, FLOOR), 0.5, 0.25)
    np.testing.assert_allclose(found, expected / 16, rtol=1e-9)


def quartic(dense):
    """A function that has the model as its second-order expansion, and is bounded below."""

    def evaluate(step, alpha):
        d, u = step
        p = jnp.asarray(dense.basis) @ (
            alpha**2 * jnp.append(d.coordinates, d.complement)
            + alpha * jnp.append(u.coordinates, u.complement)
        )
        return dense.g @ p + p @ dense.b @ p / 2 + 3 * jnp.sum(p**4)

    return evaluate


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_search_accepts_the_first_sufficient_decrease(x64, case, seed):
    dense = dense_model(seed, case, scale=10.0)
    steps = steps_of(dense.model, FLOOR)
    f = quartic(dense)
    result = curvilinear_search(lambda a: f(steps, a), 0.0, dense.model, *steps, fraction=0.3)
    for halvings in range(21):
        alpha = 0.5**halvings
        bound = -float(curvilinear_decrease(dense.model, *steps, alpha, 0.3))
        if f(steps, alpha) <= bound:
            break
    assert result.alpha == alpha
    assert result.evaluations == halvings + 1
    np.testing.assert_allclose(result.value, f(steps, alpha), rtol=1e-12)


def test_saddle_is_left():
    model = as_model([-4.0, 1.0], [0.0, 0.0], 1.0, 0.0, [True, True])
    steps = steps_of(model, FLOOR)
    u = float(steps[1].coordinates[0])
    result = curvilinear_search(lambda a: -2 * (a * u) ** 2 + (a * u) ** 4, 0.0, model, *steps)
    assert result.alpha == 0.5
    assert result.value == -1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_failures(bad):
    model = spread_model(0, jnp.float32)
    steps = steps_of(model, FLOOR)

    def evaluate(alpha):
        return jnp.where(alpha > 0.2, bad, -1.0 * alpha * 1e6)

    result = curvilinear_search(evaluate, 0.0, model, *steps)
    assert (result.alpha, result.evaluations) == (0.125, 4)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_without_acceptance_nothing_moves(value):
    model = spread_model(0, jnp.float32)
    calls = jax.jit(
        lambda v: curvilinear_search(
            lambda a: 1.0 + a, v, model, *curvilinear_steps(model, FLOOR), max_halvings=5
        )
    )
    result = calls(value)
    assert (result.alpha, result.evaluations) == (0, 6)
    np.testing.assert_array_equal(result.value, value)


def test_curvature_of_rounding_is_not_followed():
    model = as_model([1.0, -1e-5], [1.0, 1.0], 1.0, 0.0, [True, True])
    descent, curvature = steps_of(model, FLOOR)
    assert not vector(curvature).any()
    np.testing.assert_allclose(vector(descent), [-1, -1e3, 0], rtol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e12])
def test_empty_model_gives_steepest_descent(size):
    nothing = np.zeros(K)
    descent, curvature = steps_of(as_model(nothing, nothing, 0.0, size, nothing > 0), FLOOR)
    np.testing.assert_allclose(vector(descent), [0] * K + [-size], rtol=1e-6)
    assert not vector(curvature).any()


@few
@given(st.lists(st.sampled_from([0.0, 1e-30, 1e-12, 1.0, 1e12]), min_size=7))
def test_extreme_numbers_give_no_nan(numbers):
    a, b, c, d, e, f, size = numbers[:7]
    model = as_model([a, -b, c], [d, -e, 0.0], f, size, [True] * 3, dtype=jnp.float32)
    descent, curvature = steps_of(model, FLOOR)
    assert not np.isnan([vector(descent), vector(curvature)]).any()
    assert_finite(curvature)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_is_that_of_the_model(x64, dtype):
    model = spread_model(0, jnp.dtype(dtype))
    steps = steps_of(model, FLOOR)
    result = curvilinear_search(lambda a: -a, 0.0, model, *steps)
    assert_types([steps, curvilinear_decrease(model, *steps, 1.0), result[:2]], dtype)


def test_values_of_another_dtype_are_kept(x64):
    model = spread_model(0, jnp.float32)
    result = curvilinear_search(
        lambda a: -a.astype(jnp.float64), 0.0, model, *steps_of(model, FLOOR)
    )
    assert (result.alpha.dtype, result.value.dtype) == ("float32", "float64")


def test_maps_over_objectives():
    model = spread_model(0, jnp.float32)
    steps = steps_of(model, FLOOR)
    search = jax.jit(
        jax.vmap(lambda c: curvilinear_search(lambda a: 1e3 * a * (a - c), 0.0, model, *steps))
    )
    result = search(jnp.array([2.0, 0.6, 0.3]))
    np.testing.assert_array_equal(result.alpha, [1.0, 0.5, 0.25])
    np.testing.assert_array_equal(result.evaluations, [1, 2, 3])
