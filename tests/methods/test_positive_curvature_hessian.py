"""BDA-PCH as an optimizer: its directions, what it refuses, and that it trains."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from secondorder.methods.positive_curvature import (
    positive_curvature_hessian,
    scale_by_positive_curvature,
)
from secondorder.operators.expectation import expected_curvature, expected_operator
from secondorder.operators.positive_curvature import block_positive_curvature
from tests.methods.comparisons import all_finite, all_zero, identical

WIDTHS = (4, 6, 5, 3)
PAPER = {"solver": "conjugate_gradient", "max_iterations": 50, "residual": 0.1}
VARIANTS = {
    "direct": {},
    "full": {"input_moment": "full", "slope_moment": "full"},
    "paper": PAPER,
    "exact": {"expectation": "exact"},
}


def normal(*shape, seed=0, scale=0.7):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(scale * rng.normal(size=shape), dtype=float)


def params_of(dtype=None):
    sides = itertools.pairwise(WIDTHS)
    params = [{"b": normal(b, seed=i), "w": normal(a, b, seed=i)} for i, (a, b) in enumerate(sides)]
    return jax.tree.map(lambda p: p.astype(dtype or p.dtype), params)


def mlp(params, x):
    for layer in params[:-1]:
        x = jax.nn.sigmoid(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def batch_of(seed=3, size=32, dtype=None):
    x = normal(size, WIDTHS[0], seed=seed, scale=1.0).astype(dtype or float)
    return x, jnp.argmax(jnp.stack([x[:, 0], x[:, 1] * x[:, 2], x[:, 3]], axis=1), axis=1)


def objective_on(batch):
    x, y = batch
    onehot = jax.nn.one_hot(y, WIDTHS[-1])
    return so.Objective(
        lambda p: mlp(p, x), lambda z: -jnp.mean(jnp.sum(onehot * jax.nn.log_softmax(z), axis=-1))
    )


def layers_of(dtype=None):
    return so.find_layers(objective_on(batch_of(dtype=dtype)), params_of(dtype))


def step_of(tx):
    @jax.jit
    def step(params, state, batch):
        objective = objective_on(batch)
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, updates

    return step


def first_update(tx, grads, params, **functions):
    """Updates and state after one step, compiled whole: one by one its operations take longer."""
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p, **functions))(grads, params)


def losses(tx, steps, dtype=None):
    params, batch = params_of(dtype), batch_of(size=64, dtype=dtype)
    tx = optax.with_extra_args_support(tx)
    state, step, values = tx.init(params), step_of(tx), []
    for _ in range(steps):
        params, state, _ = step(params, state, batch)
        values.append(float(objective_on(batch)(params)))
    assert step._cache_size() == 1
    return values


# Directions.


def dense_direction(matrix, grads, mixing):
    flat, unravel = jax.flatten_util.ravel_pytree(grads)
    system = (1 - mixing) * np.asarray(matrix) + mixing * np.eye(len(flat))
    return unravel(jnp.asarray(np.linalg.solve(system, flat)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", ["direct", "full", "iterated", "exact"])
def test_direction_solves_the_mixed_system(variant):
    objective, params = objective_on(batch_of()), params_of()
    layers, mixing = so.find_layers(objective, params), 0.1
    tight = {"solver": "conjugate_gradient", "residual": 1e-13, "max_iterations": 200}
    settings = {"direct": {}, "full": VARIANTS["full"], "iterated": tight}
    settings["exact"] = {"expectation": "exact", **tight}
    moments = VARIANTS["full"] if variant == "full" else {}
    if variant == "exact":
        operator = block_positive_curvature(objective, params, layers)
    else:
        curvatures = expected_curvature(objective, params, layers, **moments)
        operator = expected_operator(curvatures, params, layers)
    grads = jax.grad(objective)(params)
    tx = scale_by_positive_curvature(layers, mixing=mixing, **settings[variant])
    found, state = first_update(tx, grads, params, value_fn=objective)
    expected = dense_direction(operator.as_matrix(), grads, mixing)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), found, expected
    )
    assert (state.metrics.iterations > 0) == (variant in ("iterated", "exact"))


@pytest.mark.usefixtures("x64")
def test_the_papers_solution_is_within_its_residual():
    objective, params = objective_on(batch_of()), params_of()
    layers = so.find_layers(objective, params)
    operator = expected_operator(expected_curvature(objective, params, layers), params, layers)
    grads = jax.grad(objective)(params)
    tx = scale_by_positive_curvature(layers, **PAPER)
    found, state = first_update(tx, grads, params, value_fn=objective)
    damped = operator.scaled(0.98).damped(0.02)
    image = damped(dict(enumerate(jax.tree.leaves(found))))
    for index, gradient in enumerate(jax.tree.leaves(grads)):
        rest = jnp.linalg.norm(image[index] - gradient)
        assert rest <= 0.1001 * jnp.linalg.norm(gradient)
    assert 1 <= state.metrics.iterations <= 50


def test_curvature_comes_from_its_own_batch():
    objective, other, params = objective_on(batch_of()), objective_on(batch_of(9, 8)), params_of()
    grads, tx = jax.grad(objective)(params), scale_by_positive_curvature(layers_of())

    def update(objective, **other):
        return first_update(tx, grads, params, value_fn=objective, **other)[0]

    assert identical(update(objective, curvature_fn=other), update(other))
    assert not identical(update(objective, curvature_fn=other), update(objective))


def test_parameters_in_no_layer():
    x, _ = batch_of()
    params = {"layers": params_of(), "scale": jnp.asarray(1.5)}
    objective = so.Objective(lambda p: p["scale"] * mlp(p["layers"], x), lambda z: jnp.mean(z**2))
    layers, grads = so.find_layers(objective, params), jax.grad(objective)(params)

    def direction(**settings):
        tx = scale_by_positive_curvature(layers, **settings)
        return first_update(tx, grads, params, value_fn=objective)[0]["scale"]

    np.testing.assert_allclose(direction(), grads["scale"])
    np.testing.assert_allclose(direction(fallback=optax.scale(3.0)), 3 * grads["scale"], rtol=1e-6)
    with pytest.raises(ValueError, match="scale"):
        scale_by_positive_curvature(layers, strict=True)


# Training.


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_faster_per_step_than_gradient_descent(variant):
    ours = losses(positive_curvature_hessian(0.1, layers_of(), **VARIANTS[variant]), 40)
    assert np.isfinite(ours).all()
    descent = min(losses(optax.sgd(rate, momentum=0.9), 40)[-1] for rate in (0.1, 0.3))
    assert ours[-1] < descent


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_trains(variant):
    dtype = jnp.bfloat16
    values = losses(
        positive_curvature_hessian(0.1, layers_of(dtype), **VARIANTS[variant]), 15, dtype
    )
    assert np.isfinite(values).all()
    assert values[-1] < 0.97 * float(objective_on(batch_of(size=64, dtype=dtype))(params_of(dtype)))


def test_weight_decay():
    objective, params = objective_on(batch_of()), params_of()
    grads = jax.grad(objective)(params)
    bare = scale_by_positive_curvature(layers_of())

    def update(tx, grads):
        return first_update(tx, grads, params, value_fn=objective)[0]

    direction = update(bare, jax.tree.map(lambda g, p: g + 0.3 * p, grads, params))
    found = update(positive_curvature_hessian(0.1, layers_of(), weight_decay=0.3), grads)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(lambda u, d: compare(u, -0.1 * d), found, direction)
    decoupled = positive_curvature_hessian(
        0.1, layers_of(), weight_decay=0.3, weight_decay_form="decoupled"
    )
    expected = jax.tree.map(lambda d, p: -0.1 * (d + 0.3 * p), update(bare, grads), params)
    jax.tree.map(compare, update(decoupled, grads), expected)


# What is not finite, and what is wrong.


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_that_is_not_finite_changes_nothing_but_a_counter(variant):
    tx = scale_by_positive_curvature(layers_of(), **VARIANTS[variant])
    params, step = params_of(), step_of(tx)
    _, state, _ = step(params, tx.init(params), batch_of())
    x, y = batch_of()
    _, after, updates = step(params, state, (x.at[0, 0].set(jnp.nan), y))
    assert all_zero(updates)
    assert after.metrics.nonfinite_steps == 1
    assert identical(after._replace(metrics=state.metrics), state)
    assert after.metrics.iterations == state.metrics.iterations
    assert all_finite(step(params, after, batch_of())[2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_curvature_that_is_not_finite_does_likewise(variant):
    fallback = optax.trace(0.9)
    tx = scale_by_positive_curvature(layers_of(), fallback=fallback, **VARIANTS[variant])
    params, (x, y) = params_of(), batch_of()
    objective, broken = objective_on((x, y)), objective_on((x.at[0, 0].set(jnp.inf), y))
    state = tx.init(params)
    updates, after = tx.update(
        jax.grad(objective)(params), state, params, value_fn=objective, curvature_fn=broken
    )
    assert all_zero(updates)
    assert (after.metrics.nonfinite_steps, after.metrics.nonfinite_curvature) == (0, 1)
    assert identical(after._replace(metrics=state.metrics), state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mixing", 0.0),
        ("mixing", 1.0),
        ("residual", -0.1),
        ("transform", "square"),
        ("expectation", "none"),
        ("input_moment", "diagonal"),
        ("slope_moment", "diagonal"),
        ("solver", "lu"),
        ("max_iterations", 0),
        ("weight_decay", -1.0),
        ("weight_decay_form", "l1"),
    ],
)
def test_wrong_hyperparameters(name, value):
    with pytest.raises(ValueError, match=name):
        positive_curvature_hessian(0.1, layers_of(), **{name: value})


def test_wrong_arguments():
    tx, params = scale_by_positive_curvature(layers_of()), params_of()
    objective, state = objective_on(batch_of()), tx.init(params)
    with pytest.raises(ValueError, match="params"):
        tx.update(params, state, value_fn=objective)
    with pytest.raises(ValueError, match="value_fn"):
        tx.update(params, state, params)
    with pytest.raises(TypeError, match="curvature_fn"):
        tx.update(params, state, params, value_fn=objective, curvature_fn=lambda p: objective(p))
    with pytest.raises(TypeError, match="find_layers"):
        scale_by_positive_curvature(params)
    none = so.find_layers(lambda p: jnp.sum(p**2), jnp.ones(3))
    with pytest.raises(ValueError, match="no layer"):
        scale_by_positive_curvature(none)
