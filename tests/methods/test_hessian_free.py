"""Hessian-free optimization, full and stochastic."""

import hessian_free_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import secondorder as so
from secondorder.control import DampingRule
from tests.methods.least_squares import dense, make_problem, train


@pytest.mark.parametrize("backtracking", [True, False])
def test_equals_the_dense_oracle(x64, backtracking):
    objective, params = make_problem(jnp.float64)
    theta, f, g, G = dense(objective, params)
    damping, last = 0.1, np.zeros_like(theta)
    # More iterations would amplify rounding errors, as conjugacy is lost.
    settings = {"warm_start": 0.9, "max_iterations": 9, "backtracking": backtracking}
    for _ in range(6):
        moved, damping, last = oracle.step(f, theta, g(theta), G(theta), damping, last, **settings)
        theta = theta + moved
    tx = so.hessian_free(damping=0.1, **settings)
    trained, state = train(tx, objective, params, 6)
    np.testing.assert_allclose(ravel_pytree(trained)[0], theta, rtol=1e-7)
    np.testing.assert_allclose(state.damping, damping, rtol=1e-12)
    np.testing.assert_allclose(ravel_pytree(state.solution)[0], last, rtol=1e-5, atol=1e-9)


def test_solves_a_quadratic_in_one_step(x64):
    scale = jnp.array([1.0, 10.0, 100.0])
    objective = so.Objective(lambda p: jnp.sqrt(scale) * p, lambda z: jnp.sum((z - 1) ** 2) / 2)
    tx = so.hessian_free(damping=0.0, damping_rule=None)
    trained, state = train(tx, objective, jnp.zeros(3), 1)
    np.testing.assert_allclose(trained, 1 / jnp.sqrt(scale), rtol=1e-10)
    assert 3 <= state.metrics.iterations <= 4  # one more for rounding errors
    np.testing.assert_allclose(state.metrics.ratio, 1, rtol=1e-10)


@pytest.mark.parametrize(
    ("curvature", "preconditioner"),
    [
        ("gauss_newton", "empirical_fisher"),
        ("empirical_fisher", "gauss_newton"),
        ("hessian", None),
    ],
)
def test_reduces_the_objective(curvature, preconditioner):
    objective, params = make_problem()
    tx = so.hessian_free(
        curvature=curvature, preconditioner=preconditioner, damping=0.1, max_iterations=12
    )
    trained, _ = train(tx, objective, params, 10)
    assert objective(trained) < 0.5 * objective(params)


def test_scaling_the_objective_scales_nothing_else(x64):
    """With the damping scaled alike; an absolute bound somewhere in the solver would show here."""
    objective, params = make_problem(jnp.float64)
    scale = 2.0**-20  # a power of two, which rounds nothing
    small = so.Objective(objective.model, lambda z: scale * objective.loss(z))
    settings = {"max_iterations": 30, "damping_rule": None}
    one, _ = train(so.hessian_free(damping=1e-2, **settings), objective, params, 4)
    other, _ = train(so.hessian_free(damping=1e-2 * scale, **settings), small, params, 4)
    np.testing.assert_allclose(ravel_pytree(one)[0], ravel_pytree(other)[0], rtol=1e-9)


def test_a_failed_search_is_an_exact_zero_and_raises_the_damping():
    """The gradient that is passed points uphill, so that no rate can succeed."""
    objective, params = make_problem()
    tx = so.hessian_free(damping=0.5)
    state = tx.init(params)
    value, grad = jax.value_and_grad(objective)(params)
    uphill = jax.tree.map(jnp.negative, grad)
    updates, state = jax.jit(
        lambda g, s: tx.update(g, s, params, value=value, grad=g, value_fn=objective)
    )(uphill, state)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    np.testing.assert_allclose(state.damping, 0.75)
    assert state.metrics.rejections == 1
    assert state.metrics.rate == 0


def test_a_batch_that_is_not_finite_changes_nothing():
    objective, params = make_problem()
    tx = so.hessian_free(preconditioner="empirical_fisher")
    params, state = train(tx, objective, params, 2)
    broken = so.Objective(objective.model, lambda z: objective.loss(z) * jnp.nan)
    value, grad = jax.value_and_grad(broken)(params)
    updates, new = jax.jit(
        lambda g, s: tx.update(g, s, params, value=value, grad=g, value_fn=broken)
    )(grad, state)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    assert new.metrics.nonfinite_steps == 1
    metrics = new.metrics._replace(nonfinite_steps=state.metrics.nonfinite_steps)
    jax.tree.map(np.testing.assert_array_equal, new._replace(metrics=metrics), state)


def test_a_product_that_is_not_finite_is_counted_and_harmless():
    objective, params = make_problem()
    # The square root of zero has an infinite second derivative.
    broken = so.Objective(objective.model, lambda z: jnp.sum(jnp.sqrt(jnp.abs(z - z))))
    tx = so.hessian_free()
    state = tx.init(params)
    value, grad = jax.value_and_grad(objective)(params)
    updates, state = jax.jit(
        lambda g, s: tx.update(
            g, s, params, value=value, grad=g, value_fn=objective, curvature_fn=broken
        )
    )(grad, state)
    assert state.metrics.nonfinite_products == 1
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    kept = (state.solution, state.damping)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))


def test_negative_curvature_ends_the_iterations():
    objective, params = make_problem()
    concave = so.Objective(objective.model, lambda z: -jnp.sum(z**2))
    tx = so.hessian_free(damping=1e-3, curvature="hessian")
    _, state = train(tx, concave, params, 1)
    assert state.metrics.negative_curvature == 1


def test_structural_damping_shortens_steps_that_move_the_hidden_units():
    objective, params = make_problem()

    def model(p):
        x = jnp.eye(3)
        hidden = jnp.tanh(x @ p["a"]["w"] + p["a"]["b"])
        return {"hidden": hidden, "outputs": objective.model(p)}

    def distance(z, reference):
        return jnp.mean((z["hidden"] - reference["hidden"]) ** 2)

    split = so.Objective(model, lambda z: objective.loss(z["outputs"]))
    moved = []
    for mu in (0.0, 10.0, 1000.0):
        tx = so.hessian_free(
            damping=1.0, structural_damping=mu, distance=distance, max_iterations=30
        )
        trained, state = train(tx, split, params, 1)
        moved.append(float(distance(model(trained), model(params))))
        assert state.metrics.predicted < 0
    assert moved[0] > 2 * moved[1] > 4 * moved[2] > 0


def test_the_curvature_batch_is_used():
    objective, params = make_problem()
    flat = so.Objective(objective.model, lambda z: 0.0 * jnp.sum(z))
    tx = so.hessian_free(damping=2.0, damping_rule=None, backtracking=False)
    trained, state = train(tx, objective, params, 1, curvature_fn=flat)
    grad = jax.grad(objective)(params)
    rate = float(state.metrics.rate)
    for step, g in zip(
        jax.tree.leaves(jax.tree.map(jnp.subtract, trained, params)),
        jax.tree.leaves(grad),
        strict=True,
    ):
        np.testing.assert_allclose(step, -rate * g / 2, rtol=1e-3, atol=1e-5)


def test_weight_decay_is_part_of_gradient_curvature_and_value(x64):
    objective, params = make_problem(jnp.float64)

    def outputs(p):
        return objective.model(p), ravel_pytree(p)[0]

    decayed = so.Objective(outputs, lambda z: objective.loss(z[0]) + 0.05 * jnp.sum(z[1] ** 2))
    settings = {"damping": 0.1, "max_iterations": 9}
    one, _ = train(so.hessian_free(weight_decay=0.1, **settings), objective, params, 3)
    other, _ = train(so.hessian_free(**settings), decayed, params, 3)
    np.testing.assert_allclose(ravel_pytree(one)[0], ravel_pytree(other)[0], rtol=1e-8)


def test_stochastic_settings_with_schedules_train():
    objective, params = make_problem(cases=64)
    tx = so.stochastic_hessian_free(
        warm_start=lambda count: jnp.minimum(0.5 * 1.01**count, 0.99),
        learning_rate=optax.exponential_decay(1.0, 10, 0.998),
    )
    trained, state = train(tx, objective, params, 20)
    assert objective(trained) < 0.3 * objective(params)
    assert 0 < state.metrics.iterations <= 5


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"curvature": "newton"}, "curvature"),
        ({"damping": -1.0}, "damping"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"preconditioner": "diagonal"}, "preconditioner"),
        ({"warm_start": -0.1}, "warm_start"),
        ({"shrink": 1.0}, "shrink"),
        ({"structural_damping": 0.1}, "distance"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"backtracking": 1}, "backtracking"),
    ],
)
def test_wrong_hyperparameters_are_errors(settings, match):
    with pytest.raises(ValueError, match=match):
        so.hessian_free(**settings)


def test_a_plain_callable_is_an_error_that_says_what_to_write():
    tx, params = so.hessian_free(), jnp.ones(2)
    with pytest.raises(TypeError, match="Objective"):
        tx.update(params, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))


def test_damping_rule_none_keeps_the_damping():
    objective, params = make_problem()
    _, state = train(so.hessian_free(damping=0.3, damping_rule=None), objective, params, 3)
    np.testing.assert_allclose(state.damping, 0.3)
    rule = DampingRule(smallest=0.29)
    _, state = train(so.hessian_free(damping=0.3, damping_rule=rule), objective, params, 5)
    assert state.damping >= 0.29
