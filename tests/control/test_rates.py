"""Rates of the parts of a direction against a dense solve, and where there is none."""

import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.control import part_rates

ROOT = np.random.default_rng(0).normal(size=(4, 6))
MATRIX = ROOT @ ROOT.T
SLOPES = MATRIX @ np.array([1.0, 2.0, 0.5, 3.0])  # of rates above zero without caution


def rates_of(slopes, matrix, caution=1.0):
    return np.asarray(part_rates(jnp.asarray(slopes), jnp.asarray(matrix), caution))


@pytest.mark.parametrize("caution", [0.0, 0.3, 1.0])
def test_they_are_the_dense_solve_up_to_a_factor(x64, caution):
    damped = MATRIX + caution * np.diag(np.diag(MATRIX))
    expected = np.maximum(np.linalg.solve(damped, SLOPES), 0)
    found = rates_of(SLOPES, MATRIX, caution)
    np.testing.assert_allclose(found, expected / np.sqrt(np.mean(expected**2)), rtol=1e-10)


def test_without_caution_they_minimize_the_model(x64):
    found = rates_of(SLOPES, MATRIX, 0.0)
    np.testing.assert_allclose(found / found[0], [1.0, 2.0, 0.5, 3.0], rtol=1e-9)


def test_the_step_does_not_depend_on_the_lengths_of_the_parts(x64):
    lengths = np.array([1e-6, 1.0, 1e3, 2.0])
    scaled = rates_of(SLOPES * lengths, MATRIX * np.outer(lengths, lengths)) * lengths
    plain = rates_of(SLOPES, MATRIX)
    np.testing.assert_allclose(scaled / scaled.max(), plain / plain.max(), rtol=1e-9, atol=1e-12)


def test_a_step_down_has_the_rates_of_the_direction_up(x64):
    np.testing.assert_allclose(rates_of(-SLOPES, MATRIX), rates_of(SLOPES, MATRIX), rtol=1e-12)


def test_rates_below_zero_are_zero(x64):
    found = rates_of([3.0, -1.0], np.diag([1.0, 1.0]))
    np.testing.assert_allclose(found, [np.sqrt(2), 0.0], rtol=1e-12)


def test_parts_without_curvature_have_a_rate_of_one():
    matrix = np.diag([4.0, 0.0, 1.0])
    found = rates_of([4.0, 0.0, 3.0], matrix)
    np.testing.assert_allclose(found, [np.sqrt(0.2), 1.0, np.sqrt(1.8)], rtol=1e-6)
    np.testing.assert_array_equal(rates_of(np.zeros(3), np.zeros((3, 3))), 1.0)


def test_without_a_slope_all_are_one():
    np.testing.assert_array_equal(rates_of(np.zeros(4), MATRIX), 1.0)
