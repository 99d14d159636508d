"""Shifted Newton steps against dense solves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondorder.solvers import model_decrease, raised_shift, regularized_step
from tests.solvers.solver_oracles import (
    CASES,
    K,
    N,
    as_model,
    assert_finite,
    assert_types,
    dense_model,
    few,
    seeds,
    spread_model,
    vector,
)

solve = jax.jit(regularized_step)
raised = jax.jit(raised_shift)


@pytest.mark.parametrize("case", CASES)
@few
@given(seed=seeds, exponent=st.floats(-4, 4))
def test_step_solves_the_shifted_system(x64, case, seed, exponent):
    dense, shift = dense_model(seed, case), 10.0**exponent
    mu = float(raised(dense.model, shift))
    p = dense.step(solve(dense.model, shift))
    expected = -np.linalg.solve(dense.b + mu * np.eye(N), dense.g)
    np.testing.assert_allclose(p, expected, rtol=1e-8, atol=1e-9 * np.linalg.norm(expected))
    assert dense.g @ p <= 0
    assert mu >= shift


@few
@given(seed=seeds, margin=st.floats(1e-6, 1.0))
def test_shift_is_raised_to_the_margin(x64, seed, margin):
    dense = dense_model(seed, "indefinite")
    values = np.linalg.eigvalsh(dense.b)
    needed = margin * np.abs(values).max() - values[0]
    np.testing.assert_allclose(raised(dense.model, 0.0, margin), needed, rtol=1e-12)
    assert raised(dense.model, 2 * needed, margin) == 2 * needed


def test_unknown_directions_do_not_raise_the_shift():
    model = as_model([1.0, -7.0], [1.0, 0.0], -7.0, 0.0, [True, False])
    np.testing.assert_allclose(raised(model, 0.5), 0.5)
    np.testing.assert_allclose(vector(solve(model, 0.0)), [-1, 0, 0])


def test_float32_near_the_pole():
    """The denominator of the leftmost direction does not cancel."""
    model = as_model([-1.0, 1.0], [1.0, 1.0], 1.0, 1.0, [True, True], dtype=jnp.float32)
    p = vector(solve(model, 0.0, 1e-6))
    np.testing.assert_allclose(p, [-1e6, -0.5, -0.5], rtol=1e-5)


def test_model_without_curvature():
    nothing = np.zeros(K)
    model = as_model(nothing, nothing, 0.0, 3.0, nothing > 0)
    np.testing.assert_allclose(vector(solve(model, 2.0)), [0] * K + [-1.5])
    assert_finite(solve(model, 0.0))
    assert not vector(solve(model._replace(complement_gradient=0.0), 2.0)).any()


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_gradients_of_any_size(size):
    model = spread_model(0, jnp.float32)
    scaled = model._replace(
        gradient=model.gradient * size, complement_gradient=model.complement_gradient * size
    )
    np.testing.assert_allclose(
        vector(solve(scaled, 0.1)) / size, vector(solve(model, 0.1)), rtol=1e-5
    )


def test_positive_definite_steps_decrease_the_model(x64):
    dense = dense_model(1, "convex")
    steps = [solve(dense.model, shift) for shift in (0.0, 1.0, 10.0)]
    promised = [float(model_decrease(dense.model, step)) for step in steps]
    assert promised == sorted(promised, reverse=True)
    assert promised[-1] > 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_is_that_of_the_model(x64, dtype):
    model = spread_model(0, jnp.dtype(dtype))
    assert_types([solve(model, 1.0), raised(model, 1.0)], dtype)


def test_maps_over_shifts():
    model, shifts = spread_model(0, jnp.float32), jnp.array([0.1, 1.0])
    together = jax.vmap(regularized_step, (None, 0))(model, shifts)
    np.testing.assert_allclose(together.coordinates[1], solve(model, 1.0).coordinates, rtol=1e-6)
