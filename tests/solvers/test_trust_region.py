"""The trust-region step against a dense minimizer, in all cases and scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondorder.solvers import model_decrease, step_norm, trust_region_step
from tests.solvers.solver_oracles import (
    CASES,
    K,
    as_model,
    assert_finite,
    assert_types,
    ball_minimum,
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

solve = jax.jit(trust_region_step)


@pytest.mark.parametrize("case", CASES)
@few
@given(seed=seeds, exponent=exponents)
def test_step_is_the_minimizer(x64, case, seed, exponent):
    radius = 10.0**exponent
    dense = dense_model(seed, case)
    step = solve(dense.model, radius)
    p = dense.step(step)
    assert np.linalg.norm(p) <= radius * (1 + 1e-14)
    minimum = ball_minimum(*restricted(dense), radius)
    np.testing.assert_allclose(dense.value(p), minimum, rtol=1e-10)
    np.testing.assert_allclose(model_decrease(dense.model, step), -minimum, rtol=1e-10)


@pytest.mark.parametrize("case", ["convex", "indefinite", "singular", "hard", "complement below"])
def test_step_minimizes_over_all_directions(x64, case):
    """Also over those of the complement that the model does not know."""
    for seed in range(10):
        dense = dense_model(seed, case)
        p = dense.step(solve(dense.model, 1.5))
        np.testing.assert_allclose(dense.value(p), ball_minimum(dense.b, dense.g, 1.5), rtol=1e-10)


@few
@given(seed=seeds, exponent=exponents, share=st.floats(-320, 0))
def test_nearly_hard_case(x64, seed, exponent, share):
    """A gradient along the leftmost eigenvector of any size, also one that vanishes."""
    dense = dense_model(seed, "hard")
    model = dense.model._replace(gradient=dense.model.gradient.at[0].set(10.0**share))
    step = solve(model, 10.0**exponent)
    minimum = ball_minimum(*exact(model), 10.0**exponent)
    np.testing.assert_allclose(model_decrease(model, step), -minimum, rtol=1e-10)


def test_interior_step_is_newtons(x64):
    dense = dense_model(3, "convex")
    p = dense.step(solve(dense.model, 1e6))
    np.testing.assert_allclose(p, -np.linalg.solve(dense.b, dense.g), rtol=1e-9)


def test_hard_case_follows_the_leftmost_eigenvector(x64):
    model = as_model([-2.0, 1.0], [0.0, 3.0], 1.0, 0.0, [True, True])
    step = solve(model, 2.0)
    np.testing.assert_allclose(np.abs(vector(step)), [np.sqrt(3), 1, 0], rtol=1e-14)


def test_leftmost_complement_without_gradient_is_left_alone(x64):
    """No direction in it is known: the step is the best one without it."""
    model = as_model([-1.0, 2.0], [0.0, 1.0], -5.0, 0.0, [True, True])
    np.testing.assert_allclose(np.abs(vector(solve(model, 1.0))), [np.sqrt(8) / 3, 1 / 3, 0])
    convex = as_model([1.0, 2.0], [1.0, 1.0], -5.0, 0.0, [True, True])
    np.testing.assert_allclose(vector(solve(convex, 9.0)), [-1, -0.5, 0])


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("complement", [0.0, -1.0])
def test_empty_model_gives_steepest_descent(size, complement):
    nothing = np.zeros(K)
    model = as_model(nothing + complement, nothing, complement, size, nothing > 0)
    np.testing.assert_allclose(vector(solve(model, 0.5)), [0] * K + [-0.5], rtol=1e-6)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_to_gain_gives_no_step(kept, value):
    model = as_model(np.full(K, value), np.zeros(K), value, 0.0, np.full(K, kept))
    assert not np.any(vector(solve(model, 1.0)))


def test_curvature_of_rounding_is_no_reason_to_go():
    model = as_model([1.0, -1e-9], [0.1, 0.0], 1.0, 0.0, [True, True])
    np.testing.assert_allclose(vector(solve(model, 1.0)), [-0.1, 0, 0], rtol=1e-6)
    curved = model._replace(eigenvalues=jnp.array([1.0, -1e-3]))
    assert abs(step_norm(solve(curved, 1.0)) - 1) < 1e-6


@few
@given(seed=seeds, exponent=st.floats(-3, 3))
def test_float32_with_spread_eigenvalues(seed, exponent):
    model, radius = spread_model(seed, jnp.float32), float(np.float32(10.0**exponent))
    p = vector(solve(model, radius))
    b, g = exact(model)
    assert np.linalg.norm(p) <= radius * (1 + 1e-6)
    np.testing.assert_allclose(g @ p + p @ b @ p / 2, ball_minimum(b, g, radius), rtol=2e-6)


@few
@given(seed=seeds, exponent=exponents, share=st.floats(-36, 0), force=st.floats(-8, 2))
def test_float32_nearly_hard_case(seed, exponent, share, force):
    """The distance from the leftmost eigenvalue is resolved far below its rounding."""
    model, radius = nearly_hard(seed, share, force), float(np.float32(10.0**exponent))
    p = vector(solve(model, radius))
    b, g = exact(model)
    np.testing.assert_allclose(g @ p + p @ b @ p / 2, ball_minimum(b, g, radius), rtol=2e-6)


@few
@given(seed=seeds, size=st.sampled_from([-12, 0, 12]), length=st.sampled_from([-12, 0, 12]))
def test_common_factors_do_not_matter(seed, size, length):
    """Of the objective, and of the parameters."""
    model = spread_model(seed, jnp.float32)
    f, r = 2.0 ** (3 * size), 2.0 ** (2 * length)  # powers of two: only exponents change
    scaled = model._replace(
        eigenvalues=model.eigenvalues * f / r,
        gradient=model.gradient * f,
        complement=model.complement * f / r,
        complement_gradient=model.complement_gradient * f,
    )
    one, other = vector(solve(model, 3.0)), vector(solve(scaled, 3.0 * r)) / r
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


@few
@given(st.lists(st.sampled_from([0.0, 1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e30]), min_size=8))
def test_extreme_numbers_give_no_nan(numbers):
    a, b, c, d, e, f, radius, size = numbers[:8]
    model = as_model([a, -b, c], [d, -e, 0.0], f, size, [True] * 3, dtype=jnp.float32)
    step = solve(model, radius)
    assert_finite(step)
    assert step_norm(step) <= radius * 1.000002


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_is_that_of_the_model(x64, dtype):
    model = spread_model(0, jnp.dtype(dtype))
    assert_types(solve(model, 1.0), dtype)
    assert_types(trust_region_step(model._replace(complement=1.0), 1.0), dtype)


def test_maps_over_models_and_radii():
    models = [spread_model(seed, jnp.float32) for seed in range(3)]
    radii = jnp.array([0.1, 1.0, 10.0])
    together = jax.jit(jax.vmap(trust_region_step))(
        jax.tree.map(lambda *x: jnp.stack(x), *models), radii
    )
    for i, model in enumerate(models):
        one = solve(model, radii[i])
        np.testing.assert_allclose(together.coordinates[i], one.coordinates, rtol=1e-5, atol=1e-6)
