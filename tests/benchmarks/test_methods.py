"""Settings and methods: parsing, errors, and what the peers compute."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from benchmarks.baselines import adadelta, adam, lbfgs, nag, sgd
from benchmarks.evaluations import linesearch_gradients
from benchmarks.methods import METHODS, Context, Method
from benchmarks.problems import PROBLEMS
from benchmarks.settings import (
    SettingError,
    parse_grid,
    parse_settings,
    parse_value,
    parse_variant,
)

PROBLEM = PROBLEMS["digits-cnn"]
# Methods that find the length of their steps themselves.
WITHOUT_RATE = {
    *("lbfgs", "lsr1", "hf", "bhf", "shf", "sgn", "lm", "pch", "ksd", "newton-cg", "sfn"),
    *("kbfgs-model", "kfac-adaptive", "kfac-averaged", "kfac-layerwise"),
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-2", -2),
        ("1e-4", 1e-4),
        ("0.5", 0.5),
        ("true", True),
        ("False", False),
        ("None", None),
        ("minibatch", "minibatch"),
        ("(1, 2)", "(1, 2)"),
    ],
)
def test_values(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("item", ["learning_rate", "=3", "learning_rate=", ""])
def test_items_that_are_not_settings(item):
    with pytest.raises(SettingError, match="written key=value"):
        parse_settings([item])


def test_grid_is_a_product():
    points = list(parse_grid(["a=1,2", "b=x,None"]))
    assert points == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": None},
        {"a": 2, "b": "x"},
        {"a": 2, "b": None},
    ]


def test_variant():
    assert parse_variant("kbfgs:update_every=10:input_factor=minibatch") == (
        "kbfgs",
        {"update_every": 10, "input_factor": "minibatch"},
    )


def test_unknown_setting_lists_the_valid_ones():
    with pytest.raises(SettingError, match=r"adam has no setting lr.*b1, b2, eps, learning_rate"):
        METHODS["adam"].settings(PROBLEM, {"lr": 1})


def test_precedence_of_settings():
    method = Method(
        "m",
        "",
        factory=lambda: adam,
        defaults={"learning_rate": 1, "b1": 1},
        by_problem={"digits-cnn": {"learning_rate": 2, "b2": 2}},
    )
    assert method.settings(PROBLEM, {"b2": 3}) == {
        "learning_rate": 2,
        "b1": 1,
        "b2": 3,
        "weight_decay": PROBLEM.l2,
    }


def test_period_is_that_of_all_settings_together():
    def factory(learning_rate, layers, update_every=4, weight_decay=0.0): ...

    def two(learning_rate, update_every=4, inverse_every=6): ...

    method = Method("m", "", factory=lambda: factory)
    assert method.period({}) == 4
    assert method.period({"update_every": 7}) == 7
    assert Method("m", "", factory=lambda: two).period({}) == 12
    assert METHODS["adam"].period({}) == 1
    with pytest.raises(SettingError, match="no setting layers"):
        method.settings(PROBLEM, {"layers": 1})


def test_arguments_that_are_passed_on_are_settings():
    def factory(learning_rate, layers, weight_decay=0.0, **settings): ...

    def inner(layers, *, update_every=3): ...

    method = Method("m", "", factory=lambda: factory, forwards_to=lambda: inner)
    assert method.period({}) == 3
    assert method.settings(PROBLEM, {"update_every": 5})["update_every"] == 5
    with pytest.raises(SettingError, match=r"learning_rate, update_every, weight_decay\."):
        method.settings(PROBLEM, {"settings": 1})


def test_wrong_value_is_reported_with_the_method():
    def factory(weight_decay):
        raise ValueError("weight_decay must not be negative")

    method = Method("m", "", factory=lambda: factory)
    with pytest.raises(SettingError, match="m: weight_decay must not be negative"):
        method.build(Context(PROBLEM, None, None), {"weight_decay": -1})


def test_sgd_is_the_moving_average_form():
    transform = sgd(learning_rate=0.1, momentum=0.9, weight_decay=0.5)
    params, grads = jnp.array(2.0), jnp.array(1.0)
    updates, state = transform.update(grads, transform.init(params), params)
    assert float(updates) == pytest.approx(-0.1 * 0.1 * 2.0)
    updates, _ = transform.update(grads, state, params)
    assert float(updates) == pytest.approx(-0.1 * (0.9 * 0.2 + 0.2))


def test_adam_puts_weight_decay_into_the_gradient():
    transform = adam(learning_rate=0.1, weight_decay=1.0)
    params = jnp.array([1.0, -1.0])
    updates, _ = transform.update(jnp.zeros(2), transform.init(params), params)
    np.testing.assert_allclose(updates, [-0.1, 0.1], rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_settings_for_every_problem(name):
    if not METHODS[name].is_available():
        pytest.skip(f"the package has no {name}")
    for problem in PROBLEMS.values():
        settings = METHODS[name].settings(problem, {})
        assert settings["weight_decay"] == problem.l2
        if name not in WITHOUT_RATE:
            assert settings["learning_rate"] > 0


@pytest.mark.parametrize(
    ("name", "overrides", "steps", "gradients"),
    [
        ("sgd", {}, 7, 7),
        ("nag", {}, 7, 7),
        ("lbfgs", {}, 7, 7),  # Its line searches are counted in its state.
        ("kbfgs", {}, 7, 14),
        ("kbfgs", {"update_every": 3}, 7, 10),
        ("kbfgs", {"update_every": 3}, 6, 8),
        ("kbfgs-l", {"update_every": 10}, 1, 2),
        ("lsr1", {"update_every": 4}, 7, 7),  # What it does at trial points is in its state.
    ],
)
def test_gradients(name, overrides, steps, gradients, monkeypatch):
    if not METHODS[name].is_available():
        monkeypatch.setattr(so, name, lambda learning_rate: None, raising=False)
    method = METHODS[name]
    assert method.gradients(method.settings(PROBLEM, overrides), steps) == gradients


def test_nag_looks_ahead():
    transform = nag(learning_rate=0.1, momentum=0.5, weight_decay=0.5)
    params, grads = jnp.array(2.0), jnp.array(1.0)
    updates, state = transform.update(grads, transform.init(params), params)
    assert float(updates) == pytest.approx(-0.1 * (2.0 + 0.5 * 2.0))
    updates, _ = transform.update(grads, state, params)
    assert float(updates) == pytest.approx(-0.1 * (2.0 + 0.5 * 3.0))


def test_adadelta_puts_weight_decay_into_the_gradient():
    transform, plain = adadelta(weight_decay=0.5), optax.adadelta(1.0)
    params = jnp.array([1.0, -2.0])
    updates, _ = transform.update(jnp.ones(2), transform.init(params), params)
    expected, _ = plain.update(1 + 0.5 * params, plain.init(params), params)
    np.testing.assert_allclose(updates, expected)


def quartic(x):
    return jnp.sum(x**4) + jnp.sum(x)


@pytest.mark.parametrize("weight_decay", [0.0, 0.7])
def test_lbfgs_minimizes_the_objective_with_its_penalty(weight_decay):
    """The line search sees the term: the steps are those on the whole objective."""

    def whole(x):
        return quartic(x) + 0.5 * weight_decay * jnp.sum(x**2)

    def steps(transform, function):
        @jax.jit
        def step(x, state):
            value, grads = jax.value_and_grad(function)(x)
            updates, state = transform.update(
                grads, state, x, value=value, grad=grads, value_fn=function
            )
            return x + updates, state

        x = jnp.array([2.0, -1.0])
        state = transform.init(x)
        for _ in range(12):
            x, state = step(x, state)
            yield x

    ours = steps(lbfgs(memory_size=3, weight_decay=weight_decay), quartic)
    for x, y in zip(ours, steps(optax.lbfgs(memory_size=3), whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)
    assert np.linalg.norm(jax.grad(whole)(x)) < 1e-3


def test_lbfgs_without_line_search():
    transform = METHODS["lbfgs-nols"].build(
        Context(PROBLEM, None, None), {"learning_rate": 0.5, "memory_size": 2, "weight_decay": 1.0}
    )
    params = jnp.array([1.0, 2.0])
    updates, state = transform.update(jnp.zeros(2), transform.init(params), params)
    plain = optax.scale_by_lbfgs(memory_size=2)
    expected, _ = plain.update(params, plain.init(params), params)
    np.testing.assert_allclose(updates, -0.5 * expected)
    assert int(linesearch_gradients(state)) == 0


def test_factors_of_the_radius_are_settings_of_lsr1(monkeypatch):
    seen = {}

    def fake(memory_size=5, radius_rule=None, weight_decay=0.0):
        seen.update(memory=memory_size, rule=radius_rule, weight_decay=weight_decay)
        return optax.identity()

    monkeypatch.setattr(so, "lsr1", fake, raising=False)
    monkeypatch.setattr(so, "RadiusRule", lambda **factors: factors, raising=False)
    settings = METHODS["lsr1"].settings(PROBLEM, {"memory_size": 9, "grow": 3.0})
    METHODS["lsr1"].build(Context(PROBLEM, None, None), settings)
    assert seen == {"memory": 9, "rule": {"grow": 3.0}, "weight_decay": PROBLEM.l2}
    METHODS["lsr1"].build(Context(PROBLEM, None, None), {"weight_decay": 0.5})
    assert seen == {"memory": 5, "rule": None, "weight_decay": 0.5}
