"""Inverse roots against dense eigendecompositions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.factors import eigh_roots, inverse_roots, newton_roots

EPS = 1e-4


def moments(seed, n, count=3, rows=None):
    """Second moments; by default of half as many rows as columns, singular."""
    rows = np.random.default_rng(seed).standard_normal((count, rows or n // 2 + 1, n))
    return np.swapaxes(rows, 1, 2) @ rows


def oracle(matrices, order, eps=EPS):
    roots = []
    for matrix in matrices:
        damped = matrix + eps * np.trace(matrix) * np.eye(len(matrix))
        values, vectors = np.linalg.eigh(damped)
        roots.append((vectors * values ** (-1 / order)) @ vectors.T)
    return np.stack(roots)


SOLVERS = {"eigh": eigh_roots, "newton": newton_roots}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
def test_in_float64(x64, name, order):
    matrices = moments(order, 7)
    found = SOLVERS[name](jnp.asarray(matrices), order, EPS)
    np.testing.assert_allclose(found, oracle(matrices, order), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_in_float32_at_any_scale(name, scale):
    matrices = moments(0, 12)
    found = SOLVERS[name](jnp.float32(scale * matrices), 4, EPS)
    expected = oracle(scale * matrices, 4)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_newton_of_an_ill_conditioned_matrix():
    matrices = moments(1, 24, rows=2)
    found = newton_roots(jnp.float32(matrices), 4, 1e-6)
    expected = oracle(matrices, 4, 1e-6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 * np.abs(expected).max())


def test_orders_that_are_not_integers(x64):
    matrices = moments(2, 5)
    found = eigh_roots(jnp.asarray(matrices), 1.82, EPS)
    np.testing.assert_allclose(found, oracle(matrices, 1.82), rtol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_has_the_identity_as_root(name):
    roots = SOLVERS[name](jnp.zeros((2, 3, 3)), 4, 1e-6)
    np.testing.assert_allclose(roots, np.tile(np.eye(3), (2, 1, 1)), rtol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_root_that_is_not_found_is_the_previous_one(name):
    """Alone: the other matrices of the stack have theirs."""
    matrices = np.float32(moments(3, 4))
    previous = jnp.tile(5 * jnp.eye(4), (3, 1, 1))
    find = jax.jit(lambda m: inverse_roots(m, previous, 4, EPS, name))
    expected, failed, retried = find(matrices)
    assert not failed.any()
    assert not retried.any()
    matrices[1, 0, 0] = np.nan
    roots, failed, retried = find(matrices)
    assert failed.tolist() == [False, True, False]
    assert not retried.any()
    np.testing.assert_array_equal(roots[1], previous[1])
    np.testing.assert_allclose(roots[::2], expected[::2], rtol=1e-6)


def test_newton_is_tried_again_with_more_damping():
    """A matrix that rounding has made indefinite."""
    matrix = jnp.diag(jnp.array([1.0, 0.5, -1e-4]))[None]
    assert not np.isfinite(newton_roots(matrix, 4, 1e-6)).all()
    roots, failed, retried = inverse_roots(matrix, jnp.eye(3)[None], 4, 1e-6, "newton")
    assert not failed.any()
    assert retried.all()
    expected = oracle(np.asarray(matrix, np.float64), 4, 1e-3)
    np.testing.assert_allclose(roots, expected, rtol=1e-3, atol=1e-5)


def test_newton_is_products_alone():
    text = str(jax.make_jaxpr(lambda m: newton_roots(m, 4, EPS))(jnp.ones((2, 3, 3))))
    assert "dot_general" in text
    for name in ("eigh", "lu", "cholesky", "qr", "custom_linear_solve"):
        assert f" {name}[" not in text
