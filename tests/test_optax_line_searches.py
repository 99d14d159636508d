"""Optax's line searches behind the directions of this package."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so

X = np.random.default_rng(0).standard_normal((12, 3)).astype("float32")
Y = np.sin(X[:, :2])
PARAMS = {"w": jnp.asarray(X[:3, :2]), "b": jnp.zeros(2)}


def objective_on(x, y):
    return so.Objective(
        lambda p: (jnp.tanh(x @ p["w"] + p["b"]), {"aux": x}),
        lambda z: jnp.mean((z - y) ** 2),
        True,
    )


OBJECTIVE, CURVATURE = objective_on(X, Y), objective_on(X[:6], Y[:6])
LAYERS = so.find_layers(OBJECTIVE, PARAMS)
DIRECTIONS = {
    "kbfgs": lambda: so.scale_by_kbfgs(LAYERS, momentum=0.0),
    "lsr1": lambda: so.scale_by_lsr1(memory_size=2),
    "lrsfn": lambda: so.scale_by_low_rank_saddle_free_newton(rank=2),
    "pch": lambda: so.scale_by_positive_curvature(LAYERS),
}
SEARCHES = {
    "backtracking": functools.partial(
        optax.scale_by_backtracking_linesearch, max_backtracking_steps=20
    ),
    "zoom": functools.partial(optax.scale_by_zoom_linesearch, max_linesearch_steps=20),
}


def make_step(tx, **extra):
    def step(params, state):
        (value, _), grads = jax.value_and_grad(OBJECTIVE, has_aux=True)(params)
        given = {"value": value, "grad": grads, "value_fn": OBJECTIVE} | extra
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state, value

    return step


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_search_follows_a_direction(direction, search):
    """With a curvature batch, arguments that nobody knows, and auxiliary outputs."""
    link = so.line_search(SEARCHES[search]())
    tx = optax.chain(DIRECTIONS[direction](), optax.scale(-20.0), link)
    step = make_step(tx, curvature_fn=CURVATURE, unknown=1)
    state = tx.init(PARAMS)
    new = jax.eval_shape(step, PARAMS, state)[1]
    assert jax.tree.structure(new) == jax.tree.structure(state)
    if search == "zoom" and direction != "lsr1":
        return  # traced is enough: what is searched along is tested with the other search
    params, step, values = PARAMS, jax.jit(step), []
    for _ in range(4):
        params, state, value = step(params, state)
        values.append(float(value))
    assert np.all(np.diff(values) <= 0)  # without a search so long a step goes up
    assert values[-1] < 0.7 * values[0]
    assert step._cache_size() == 1


def test_value_and_gradient_are_evaluated_if_they_are_missing():
    tx = so.line_search(SEARCHES["backtracking"]())
    down = jax.grad(lambda p: -OBJECTIVE(p)[0])(PARAMS)
    found = tx.update(down, tx.init(PARAMS), PARAMS, value_fn=OBJECTIVE)
    (value, _), grad = jax.value_and_grad(OBJECTIVE, has_aux=True)(PARAMS)
    expected = tx.update(
        down, tx.init(PARAMS), PARAMS, value=value, grad=grad, value_fn=OBJECTIVE.without_aux()
    )
    jax.tree.map(np.testing.assert_allclose, found, expected)


def test_missing_arguments_are_named():
    tx = so.line_search(SEARCHES["zoom"]())
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS), value_fn=OBJECTIVE)
    with pytest.raises(ValueError, match="value_fn"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
