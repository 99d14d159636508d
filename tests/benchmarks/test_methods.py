"""Settings and methods: parsing, errors, and what the peers compute."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.methods import METHODS, Context, Method, adam, sgd
from benchmarks.problems import PROBLEMS
from benchmarks.settings import (
    SettingError,
    parse_grid,
    parse_settings,
    parse_value,
    parse_variant,
)

PROBLEM = PROBLEMS["digits-cnn"]


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


def test_period_is_update_every():
    def factory(learning_rate, layers, update_every=4, weight_decay=0.0): ...

    method = Method("m", "", factory=lambda: factory, needs_layers=True)
    assert method.period({}) == 4
    assert method.period({"update_every": 7}) == 7
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
        assert settings["learning_rate"] > 0
