"""The ratio of reductions, and the radius that follows it."""

import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder.control import follow_slope, next_radius, reduction_ratio

# As in the textbook, and bounds that are in reach.
RULE = so.RadiusRule(
    shrink=0.25, grow=2.0, shrink_below=0.25, grow_above=0.75, reach=0.9, smallest=0.1, largest=10.0
)


def ratio_of(*numbers, dtype=jnp.float32):
    return reduction_ratio(*(jnp.asarray(number, dtype) for number in numbers))


# The ratio.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ratio_of_reductions_that_are_resolved(x64, dtype):
    for value, trial, predicted in ((3.0, 1.0, 4.0), (-1.0, -7.0, 3.0), (1.0, 2.0, 0.5)):
        ratio = ratio_of(value, trial, predicted, dtype=dtype)
        assert ratio.dtype == dtype
        np.testing.assert_allclose(ratio, (value - trial) / predicted, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [1.0, -250.0, 1e20])
def test_ratio_is_about_one_where_nothing_is_resolved(x64, dtype, value):
    """Both reductions are smaller than a rounding of the value, of either sign."""
    rounding = float(np.finfo(dtype).eps) * abs(value)
    for gain in (-rounding, 0.0, rounding):
        ratio = ratio_of(value, value - gain, rounding / 2, dtype=dtype)
        np.testing.assert_allclose(ratio, 1, atol=0.2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_floor_follows_the_precision(x64, dtype):
    """What is noise in single precision is resolved in double precision."""
    ratio = ratio_of(1.0, 1.0, 1e-8, dtype=dtype)
    if dtype == "float32":
        assert ratio > 0.9
    else:
        assert abs(ratio) < 1e-5


def test_noise_floor_is_that_of_the_larger_value():
    """An increase beyond the rounding of both is not noise."""
    assert ratio_of(0.0, 1.0, 1e-3) < -100
    assert ratio_of(1.0, 1.001, 1e-9) < -100


def test_half_precision_is_widened():
    ratio = ratio_of(2.0, 1.0, 2.0, dtype=jnp.bfloat16)
    assert ratio.dtype == jnp.float32
    np.testing.assert_allclose(ratio, 0.5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_noise_floor_follows_the_precision_of_the_computation(dtype):
    """A value that was rounded to half precision and widened since is no better for it."""
    eps = float(jnp.finfo(dtype).eps)
    numbers = [jnp.float32(x) for x in (1.0, 1.0 + eps, eps / 4)]
    assert reduction_ratio(*numbers) < -2
    assert reduction_ratio(*numbers, eps) > 0.8
    # A gain that is far above this noise is judged as ever.
    np.testing.assert_allclose(
        reduction_ratio(jnp.float32(1e3), jnp.float32(0.0), jnp.float32(4e3), 1e-5), 0.25, rtol=1e-3
    )


def test_noise_floor_is_never_finer_than_the_dtype():
    numbers = [jnp.float32(x) for x in (1.0, 1.0, 1e-8)]
    assert reduction_ratio(*numbers, 1e-16) == reduction_ratio(*numbers)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_give_minus_infinity(bad):
    assert ratio_of(1.0, bad, 1.0) == -np.inf
    assert ratio_of(1.0, 0.5, bad) == -np.inf


def test_a_promise_that_is_not_positive_gives_minus_infinity():
    assert ratio_of(1.0, 0.5, -1e-3) == -np.inf
    assert ratio_of(1.0, 0.5, -1e30) == -np.inf
    # No promise and no noise: nothing to divide by.
    assert ratio_of(0.0, 0.0, 0.0) == -np.inf


def test_no_promise_but_a_reduction():
    """Of a random step: any reduction that is resolved gives more than one, any increase less."""
    next_above = np.nextafter(np.float32(1), np.float32(2))
    next_below = np.nextafter(np.float32(1), np.float32(0))
    assert ratio_of(1.0, next_below, 0.0) > 1.01
    assert ratio_of(1.0, 1.0, 0.0) == 1
    assert ratio_of(1.0, next_above, 0.0) < 0.99


# The radius.


@pytest.mark.parametrize(
    ("ratio", "length", "expected"),
    [
        (-np.inf, 2.0, 0.5),
        (-3.0, 2.0, 0.5),
        (0.249, 2.0, 0.5),
        (0.249, 1.0, 0.25),  # from the length of the step
        (-1.0, 3.0, 0.5),  # but not if it is longer than the radius
        (0.25, 2.0, 2.0),
        (0.5, 2.0, 2.0),
        (0.75, 2.0, 2.0),
        (0.76, 2.0, 4.0),
        (np.inf, 2.0, 4.0),
        (0.76, 1.8, 4.0),
        (0.76, 1.79, 2.0),  # well inside
        (-1.0, 1e-3, 0.1),
        (-1.0, 0.0, 0.1),
    ],
)
def test_branches_of_the_rule(ratio, length, expected):
    radius = next_radius(RULE, jnp.float32(2.0), jnp.float32(ratio), length)
    np.testing.assert_allclose(radius, expected, rtol=1e-6)


def test_radius_stays_within_its_bounds():
    assert next_radius(RULE, jnp.float32(8.0), jnp.float32(1.0), 8.0) == 10.0
    assert next_radius(RULE, jnp.float32(0.2), jnp.float32(0.0), 0.2) == np.float32(0.1)
    # A radius that was outside comes back, whatever the ratio.
    assert next_radius(RULE, jnp.float32(50.0), jnp.float32(0.5), 50.0) == 10.0
    assert next_radius(RULE, jnp.float32(np.inf), jnp.float32(-1.0), np.inf) == 10.0


def test_a_ratio_that_is_not_a_number_changes_nothing():
    assert next_radius(RULE, jnp.float32(2.0), jnp.float32(np.nan), 2.0) == 2.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_radius_keeps_its_dtype(x64, dtype):
    """Whatever the dtypes of the ratio, the length and the rule."""
    other = jnp.float64 if dtype == "float32" else jnp.float32
    numbers = {name: other(getattr(RULE, name)) for name in ("shrink", "grow", "largest")}
    for rule in (RULE, so.RadiusRule(**numbers)):
        for ratio in (-1.0, 0.5, 1.0):
            radius = next_radius(rule, jnp.asarray(1.0, dtype), other(ratio), other(1.0))
            assert radius.dtype == dtype
            assert not radius.weak_type


# The slope on the next batch.

FOLLOW = so.RadiusRule(slope_rate=0.5, slope_target=0.2, smallest=0.1, largest=10.0)


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        (-2.0, -2.0, 1.0),  # still descending as steeply
        (-2.0, -1.0, 0.5),
        (-2.0, 0.0, 0.0),
        (-2.0, 1.0, -0.5),  # the step was too long for this batch
        (-2.0, -9.0, 1.0),  # shares are clipped
        (-2.0, 9.0, -1.0),
        (-2.0, np.inf, -1.0),
        (-1e-30, -1e-30, 1.0),
    ],
)
def test_radius_follows_the_slope_that_is_left(before, after, share):
    found = follow_slope(FOLLOW, jnp.float32(2.0), jnp.float32(before), jnp.float32(after))
    np.testing.assert_allclose(found, 2 * np.exp(0.5 * (share - 0.2)), rtol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(0.0, -1.0), (1.0, -1.0), (-1.0, np.nan)])
def test_without_a_slope_to_compare_with_the_radius_stays(before, after):
    radius = jnp.float32(2.0)
    assert follow_slope(FOLLOW, radius, jnp.float32(before), jnp.float32(after)) == radius


def test_a_rate_of_zero_follows_nothing_if_it_is_traced_too():
    slopes = jnp.float32(-2.0), jnp.float32(1.0)
    for rate in (0.0, jnp.float32(0.0)):
        rule = so.RadiusRule(slope_rate=rate)
        assert follow_slope(rule, jnp.float32(2.0), *slopes) == 2


def test_followed_radius_stays_within_its_bounds():
    slopes = jnp.float32(-1.0), jnp.float32(-1.0)
    assert follow_slope(FOLLOW, jnp.float32(9.0), *slopes) == 10
    assert follow_slope(FOLLOW, jnp.float32(0.11), slopes[0], -slopes[1]) == np.float32(0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slope_rate", -0.1), ("slope_rate", np.nan),
        ("slope_target", -1.1), ("slope_target", 1.1),
        ("shrink", 0.0), ("shrink", 1.0), ("shrink", np.nan), ("grow", 0.9),
        ("shrink_below", -0.1), ("shrink_below", 1.0), ("grow_above", -0.1), ("grow_above", 1.0),
        ("reach", 0.0), ("smallest", 0.0), ("largest", -1.0),
    ],
)  # fmt: skip
def test_bad_numbers_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be in"):
        so.RadiusRule(**{name: value})
