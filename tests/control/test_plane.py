"""The minimizer on a plane against a dense solve."""

import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.control import minimize_on_plane

MATRIX = np.array([[3.0, 1.2], [1.2, 0.7]])
SLOPES = np.array([-2.0, 0.4])


def solve(slopes, matrix):
    return np.asarray(minimize_on_plane(jnp.asarray(slopes), jnp.asarray(matrix)))


def test_it_is_the_dense_solve(x64):
    np.testing.assert_allclose(solve(SLOPES, MATRIX), -np.linalg.solve(MATRIX, SLOPES), rtol=1e-12)


@pytest.mark.parametrize("scales", [(1e-9, 1.0), (1e8, 1e-8), (3.0, -2.0)])
def test_the_step_does_not_depend_on_the_lengths_of_the_vectors(x64, scales):
    units = np.asarray(scales)
    scaled = solve(SLOPES * units, MATRIX * np.outer(units, units))
    np.testing.assert_allclose(scaled * units, solve(SLOPES, MATRIX), rtol=1e-9)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_zero_vector_gets_no_part(missing):
    keep = np.arange(2) != missing
    found = solve(SLOPES * keep, MATRIX * np.outer(keep, keep))
    np.testing.assert_allclose(found, np.where(keep, -SLOPES / np.diag(MATRIX), 0), rtol=1e-6)


def test_of_two_vectors_on_one_line_the_first_gets_all():
    line = np.float32([1.0, 3.0])
    found = solve(-4 * line, 2 * np.outer(line, line))
    np.testing.assert_allclose(found, [2.0, 0.0], rtol=1e-6)


def test_two_zero_vectors_give_zero():
    np.testing.assert_array_equal(solve(np.zeros(2), np.zeros((2, 2))), 0)
