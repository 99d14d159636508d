"""Stochastic Gauss-Newton, by iterations and by exact solves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import secondorder as so
from tests.methods.least_squares import dense, make_problem, train


@pytest.mark.parametrize("solver", ["conjugate_gradient", "dual"])
def test_first_step_is_along_the_dense_solution(x64, solver):
    objective, params = make_problem(jnp.float64)
    theta, _, gradient, matrix = dense(objective, params)
    g, G = gradient(theta), matrix(theta)
    d = -np.linalg.solve(G + 0.1 * np.eye(len(g)), g)
    tx = so.gauss_newton(solver=solver, damping=0.1, max_iterations=80, residual=1e-12)
    trained, state = train(tx, objective, params, 1)
    rate = float(state.metrics.rate)
    assert rate > 0
    np.testing.assert_allclose(ravel_pytree(trained)[0], theta + rate * d, rtol=1e-6)
    expected = rate * g @ d + rate**2 * (d @ G @ d + 0.1 * d @ d) / 2
    np.testing.assert_allclose(state.metrics.predicted, expected, rtol=1e-6)


def test_the_closed_form_of_one_case_with_one_output(x64):
    """Then the matrix has rank one: the step is along the Jacobian of the case."""
    x = jnp.array([[1.0, 2.0, -1.0]])
    objective = so.Objective(lambda w: x @ w, lambda z: jnp.sum((z - 3) ** 2) / 2)
    params = jnp.zeros((3, 1))
    tx = so.gauss_newton(solver="dual", damping=0.5, damping_rule=None)
    trained, _ = train(tx, objective, params, 1)
    expected = 3 * x.T / (0.5 + jnp.sum(x**2))
    np.testing.assert_allclose(trained, expected, rtol=1e-10)


@pytest.mark.parametrize(
    "settings", [{"max_iterations": 5}, {"solver": "dual", "momentum": 0.5, "damping": 0.1}]
)
def test_reduces_the_objective(settings):
    objective, params = make_problem()
    trained, _ = train(so.gauss_newton(**settings), objective, params, 15)
    assert objective(trained) < 0.3 * objective(params)


def test_momentum_is_an_average_without_bias(x64):
    """On a linear objective all gradients are equal, and so is their average."""
    objective = so.Objective(lambda w: w, lambda z: jnp.sum(z))
    tx = so.gauss_newton(momentum=0.9, damping=2.0, damping_rule=None, max_trials=1)
    params, state = train(tx, objective, jnp.zeros(2), 3)
    np.testing.assert_allclose(params, -3 * 0.5, rtol=1e-12)
    np.testing.assert_allclose(state.momentum, 1 - 0.9**3, rtol=1e-12)


def test_a_failed_search_is_an_exact_zero_and_raises_the_damping():
    objective, params = make_problem()
    tx = so.gauss_newton(damping=0.5)
    value, grad = jax.value_and_grad(objective)(params)
    uphill = jax.tree.map(jnp.negative, grad)
    updates, state = jax.jit(
        lambda g, s: tx.update(g, s, params, value=value, grad=g, value_fn=objective)
    )(uphill, tx.init(params))
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    np.testing.assert_allclose(state.damping, 0.75)
    assert state.metrics.rejections == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"solver": "direct"}, "solver"),
        ({"solver": "dual", "damping": 0.0}, "damping"),
        ({"momentum": 1.0}, "momentum"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_wrong_hyperparameters_are_errors(settings, match):
    with pytest.raises(ValueError, match=match):
        so.gauss_newton(**settings)
