"""Checks of hyperparameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from secondorder.checks import check_choice, check_range, check_static_count, is_number


@pytest.mark.parametrize("value", [0, 1, -2.5, float("inf"), np.float64(0.5)])
def test_plain_numbers_are_judged(value):
    assert is_number(value)


@pytest.mark.parametrize(
    "value", [True, None, "1", jnp.ones(()), np.ones(()), optax.constant_schedule(1.0)]
)
def test_everything_else_is_not(value):
    assert not is_number(value)


@pytest.mark.parametrize(
    ("value", "bounds", "interval"),
    [
        (-0.1, {"low": 0}, "[0, inf)"),
        (0, {"low": 0, "open_low": True}, "(0, inf)"),
        (1, {"low": 0, "high": 1}, "[0, 1)"),
        (2.5, {"high": 2}, "(-inf, 2)"),
        (1.0, {"low": 0, "high": 1, "open_low": True}, "(0, 1)"),
        (float("nan"), {"low": 0, "high": 1}, "[0, 1)"),
        (float("nan"), {"low": 0}, "[0, inf)"),
    ],
)
def test_out_of_range(value, bounds, interval):
    with pytest.raises(ValueError, match="must be in") as caught:
        check_range("momentum", value, **bounds)
    assert str(caught.value) == f"`momentum` must be in {interval}, got {value}."


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (0, {"low": 0}),
        (1e-12, {"low": 0, "open_low": True}),
        (0.999, {"low": 0, "high": 1}),
        (-3, {"high": 0}),
        (5, {}),
        (jnp.array(-1.0), {"low": 0}),  # may be traced, so never compared
        (lambda step: -1.0, {"low": 0}),
    ],
)
def test_in_range(value, bounds):
    check_range("momentum", value, **bounds)


def test_traced_numbers_pass():
    jax.jit(lambda value: check_range("momentum", value, low=0, high=1))(2.0)


def test_choice():
    check_choice("form", "ema", ("ema", "heavy_ball"))
    with pytest.raises(ValueError, match="must be one of") as caught:
        check_choice("form", "sum", ("ema", "heavy_ball"))
    assert str(caught.value) == "`form` must be one of 'ema', 'heavy_ball', got 'sum'."


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, True])
def test_not_a_count(value):
    with pytest.raises(ValueError, match=f"Python integer of at least 1, got {value}"):
        check_static_count("memory_size", value)


def test_count():
    check_static_count("memory_size", 1)


def test_traced_count_names_the_remedy():
    with pytest.raises(ValueError, match="inject_hyperparams name it in static_args"):
        jax.jit(lambda value: check_static_count("memory_size", value))(3)
