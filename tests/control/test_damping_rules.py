"""The damping that follows the ratio of reductions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.control import (
    DampingRule,
    NielsenState,
    damping_bound,
    next_damping,
    nielsen_damping,
    raised_damping,
)

# Bounds that are in reach.
RULE = DampingRule(smallest=0.1, largest=10.0)
RATIOS = [-np.inf, np.nan, -3.0, 0.0, 0.2, 0.25, 0.5, 0.75, 0.9, 2.0, np.inf]


def martens(damping, ratio):
    if np.isnan(ratio) or ratio < 0.25:
        return damping * 3 / 2
    return damping * 2 / 3 if ratio > 0.75 else damping


def nielsen(damping, factor, ratio):
    if np.isfinite(ratio) and ratio > 0:
        return damping * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 2.0
    return damping * factor, 2 * factor


# The rule with two thresholds.


@pytest.mark.parametrize(
    ("ratio", "expected"), [(-np.inf, 3.0), (np.nan, 3.0), (0.2, 3.0), (0.5, 2.0), (0.9, 4 / 3)]
)
def test_table(ratio, expected):
    damping = next_damping(DampingRule(), jnp.float32(2.0), jnp.float32(ratio))
    np.testing.assert_allclose(damping, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_damping_for_each_block(x64, dtype):
    """All branches at once, with one ratio for each or one for all."""
    dampings = np.linspace(1, 3, len(RATIOS))
    found = jax.jit(next_damping, static_argnums=0)(
        RULE, jnp.asarray(dampings, dtype), jnp.asarray(RATIOS, dtype)
    )
    expected = [martens(*pair) for pair in zip(dampings, RATIOS, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for ratio in RATIOS:
        found = next_damping(RULE, jnp.asarray(dampings, dtype), jnp.asarray(ratio, dtype))
        np.testing.assert_allclose(found, [martens(x, ratio) for x in dampings], rtol=1e-6)


def test_other_numbers():
    """Those of a ratio that is noisy."""
    rule = DampingRule(raise_by=1 / 0.99, lower_by=0.99, raise_below=0.1, lower_above=0.6)
    for ratio, expected in ((0.09, 2 / 0.99), (0.11, 2.0), (0.59, 2.0), (0.61, 1.98)):
        damping = next_damping(rule, jnp.float32(2.0), jnp.float32(ratio))
        np.testing.assert_allclose(damping, expected, rtol=1e-6)


def test_damping_stays_within_its_bounds():
    assert next_damping(RULE, jnp.float32(8.0), jnp.float32(-1.0)) == 10.0
    assert next_damping(RULE, jnp.float32(0.12), jnp.float32(1.0)) == np.float32(0.1)
    # A damping that was outside comes back, whatever the ratio.
    assert next_damping(RULE, jnp.float32(50.0), jnp.float32(0.5)) == 10.0
    assert next_damping(RULE, jnp.float32(0.0), jnp.float32(1.0)) == np.float32(0.1)
    assert next_damping(RULE, jnp.float32(np.inf), jnp.float32(np.nan)) == 10.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_damping_keeps_its_dtype(x64, dtype):
    """Whatever the dtypes of the ratio and the rule."""
    other = jnp.float64 if dtype == "float32" else jnp.float32
    names = ("raise_by", "lower_by", "smallest", "largest")
    numbers = {name: other(getattr(RULE, name)) for name in names}
    for rule in (RULE, DampingRule(**numbers)):
        for ratio in (-1.0, 0.5, 1.0):
            damping = next_damping(rule, jnp.asarray(1.0, dtype), other(ratio))
            assert damping.dtype == dtype
            assert not damping.weak_type


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("raise_by", 0.9), ("raise_by", np.nan), ("lower_by", 0.0), ("lower_by", 1.0),
        ("raise_below", -0.1), ("raise_below", 1.0), ("lower_above", -0.1), ("lower_above", 1.0),
        ("smallest", 0.0), ("largest", -1.0),
    ],
)  # fmt: skip
def test_bad_numbers_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be in"):
        DampingRule(**{name: value})


def test_numbers_may_be_traced():
    @jax.jit
    def raised(factor):
        return next_damping(DampingRule(raise_by=factor), jnp.float32(2.0), jnp.float32(0.0))

    assert raised(4.0) == 8.0


# Nielsen's rule.


@pytest.mark.parametrize("ratio", [*RATIOS, 1e-6, 1.0, 1e30])
def test_one_step_of_nielsen(ratio):
    state = NielsenState(jnp.float32(3.0), jnp.float32(8.0))
    found = nielsen_damping(state, jnp.float32(ratio))
    np.testing.assert_allclose(found, nielsen(3.0, 8.0, ratio), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_many_steps_of_nielsen(x64, dtype):
    ratios = np.random.default_rng(0).normal(0.5, 0.7, (40, 3))
    ratios[5, 0], ratios[6, 1], ratios[7, 2] = np.nan, -np.inf, np.inf
    start = NielsenState(jnp.ones(3, dtype), jnp.full(3, 2, dtype))
    _, found = jax.lax.scan(
        lambda state, ratio: 2 * (nielsen_damping(state, ratio),), start, jnp.asarray(ratios, dtype)
    )
    expected = [(1.0, 2.0)] * 3
    for step, row in enumerate(ratios):
        expected = [nielsen(*pair, ratio) for pair, ratio in zip(expected, row, strict=True)]
        now = np.transpose([found.damping[step], found.factor[step]])
        np.testing.assert_allclose(now, expected, rtol=1e-5 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("ratio", [-1.0, np.nan])
def test_failures_in_a_row_do_not_overflow(ratio):
    """And the way back is open."""
    state = NielsenState(jnp.float32(1.0), jnp.float32(2.0))
    for _ in range(200):
        state = nielsen_damping(state, jnp.float32(ratio), smallest=0.1, largest=1e6)
    np.testing.assert_allclose(state, (1e6, 1e7))
    state = nielsen_damping(state, jnp.float32(1.0), smallest=0.1, largest=1e6)
    np.testing.assert_allclose(state, (1e6 / 3, 2))


def test_successes_in_a_row_do_not_underflow():
    state = NielsenState(jnp.float32(1.0), jnp.float32(2.0))
    for _ in range(200):
        state = nielsen_damping(state, jnp.float32(1.0))
    np.testing.assert_allclose(state, (1e-10, 2))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nielsen_keeps_dtypes(x64, dtype):
    other = jnp.float64 if dtype == "float32" else jnp.float32
    for ratio in (-1.0, 0.5):
        state = NielsenState(jnp.asarray(1.0, dtype), jnp.asarray(2.0, dtype))
        for array in nielsen_damping(state, other(ratio), largest=other(10.0)):
            assert array.dtype == dtype
            assert not array.weak_type


# Where no ratio is known.


@pytest.mark.parametrize(
    ("rule", "damping", "expected"),
    [
        (RULE, 1.0, 4.0),
        (RULE, 5.0, 10.0),
        (DampingRule(raise_by=20 / 19), 1.0, 4.0),
        (DampingRule(raise_by=8.0), 1.0, 8.0),
    ],
)
def test_a_step_that_cannot_be_taken_raises_the_damping(rule, damping, expected):
    np.testing.assert_allclose(raised_damping(rule, jnp.float32(damping)), expected, rtol=1e-6)


def test_the_bound_that_a_damping_is_at():
    """As the rule itself has clipped it, in float32."""
    lowest, between, largest = (next_damping(RULE, jnp.float32(d), 0.5) for d in (0.01, 0.11, 99.0))
    assert [int(damping_bound(RULE, d)) for d in (lowest, between, largest)] == [-1, 0, 1]
