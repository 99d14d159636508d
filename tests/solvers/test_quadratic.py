"""The model and its steps: values, norms, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.solvers import ModelStep, clip_step, model_decrease, step_norm
from secondorder.solvers.quadratic import (
    curves_down,
    largest_curvature,
    positive_or_one,
    safe_norm,
    smallest,
    spectrum,
)
from tests.solvers.solver_oracles import CASES, K, as_model, assert_types, dense_model, spread_model


@pytest.mark.parametrize("case", CASES)
def test_decrease_is_that_of_the_dense_model(x64, case):
    dense = dense_model(5, case)
    rng = np.random.default_rng(0)
    coordinates = jnp.asarray(rng.standard_normal(K) * np.asarray(dense.model.kept))
    last = -1.5 if dense.model.complement_gradient else 0.0
    step = ModelStep(coordinates, jnp.asarray(last))
    p = dense.step(step)
    np.testing.assert_allclose(model_decrease(dense.model, step), -dense.value(p), rtol=1e-12)
    np.testing.assert_allclose(step_norm(step), np.linalg.norm(p), rtol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_norm_neither_overflows_nor_vanishes(size):
    step = ModelStep(jnp.array([3.0, 0.0]) * size, jnp.asarray(-4.0 * size))
    np.testing.assert_allclose(step_norm(step), 5 * np.float32(size), rtol=1e-6)


def test_norm_of_nothing():
    assert safe_norm(jnp.zeros(0)) == 0


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_clipping(size):
    step = ModelStep(jnp.array([3.0, 0.0]) * size, jnp.asarray(-4.0 * size))
    clipped = clip_step(step, 2.5 * size)
    np.testing.assert_allclose(clipped.coordinates, [1.5 * size, 0], rtol=1e-6)
    np.testing.assert_allclose(clipped.complement, -2 * size, rtol=1e-6)
    same = clip_step(step, 6 * size)
    np.testing.assert_array_equal(same.coordinates, step.coordinates)
    np.testing.assert_array_equal(step_norm(clip_step(step, 0.0)), 0)


def test_clipping_of_nothing():
    np.testing.assert_array_equal(
        step_norm(clip_step(ModelStep(jnp.zeros(2), jnp.zeros(())), 0)), 0
    )


def test_spectrum_has_one_dtype():
    """Also where numbers are Python's, or weakly typed."""
    model = spread_model(0, jnp.float32)._replace(complement=2, complement_gradient=1.0)
    values, gradient, known = spectrum(model)
    assert_types([values, gradient], "float32")
    assert values[-1] == 2
    assert known.all()


def test_unknown_directions_are_not_seen():
    problem = spectrum(as_model([1.0, -5.0, -2.0], np.ones(3), -5.0, 0.0, [True, False, True]))
    value, place = smallest(problem)
    assert value == -2
    np.testing.assert_array_equal(place, [False, False, True, False])
    assert largest_curvature(problem) == 2
    np.testing.assert_array_equal(curves_down(problem), place)
    np.testing.assert_array_equal(problem.gradient, [1, 0, 1, 0])


def test_nothing_known():
    problem = spectrum(as_model([-1.0, -1.0], np.zeros(2), -1.0, 0.0, [False, False]))
    value, place = smallest(problem)
    assert value == largest_curvature(problem) == 0
    assert not place.any()
    assert not curves_down(problem).any()


def test_smallest_of_equals_is_one_direction():
    problem = spectrum(as_model([-1.0, -1.0], np.zeros(2), -1.0, 1.0, [True, True]))
    assert smallest(problem)[1].sum() == 1


def test_safe_denominators():
    x = jnp.array([0.0, 1e-45, 1e-38, 0.5])
    assert np.isfinite(jax.jit(lambda v: 1 / positive_or_one(v))(x)).all()
