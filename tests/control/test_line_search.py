"""Rates: backtracking, along a ray and along stored iterates, and the minimizer of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.control import backtrack, best_stored, optimal_rate


def armijo(value_fn, value, slope, first=1.0, shrink=0.8, sufficient=1e-2, max_trials=60):
    """The search of the paper, without a floor of noise."""
    rate = first
    for trial in range(1, max_trials + 1):
        found = value_fn(rate)
        if np.isfinite(found) and found <= value + sufficient * rate * slope:
            return rate, found, trial, True
        rate *= shrink
    return 0.0, value, max_trials, False


def quadratic(curvature):
    return lambda rate: 3 - 2 * rate + curvature * rate**2 / 2


def listening(value_fn, calls):
    """Notes every rate at which the function is really evaluated."""

    def evaluate(rate):
        jax.debug.callback(lambda x: calls.append(float(x)), rate)
        return value_fn(rate)

    return evaluate


# Backtracking along a ray.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("curvature", [-1.0, 1.0, 3.9, 5.0, 30.0, 1e4])
@pytest.mark.parametrize(
    "options", [{}, {"first": 4.0, "shrink": 0.5}, {"sufficient": 0.4}, {"max_trials": 7}]
)
def test_search_is_that_of_the_paper(x64, dtype, curvature, options):
    expected = armijo(quadratic(curvature), 3.0, -2.0, **options)
    found = jax.jit(lambda value, slope: backtrack(quadratic(curvature), value, slope, **options))(
        jnp.asarray(3.0, dtype), jnp.asarray(-2.0, dtype)
    )
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(found, np.array(expected, float), rtol=tolerance)
    assert [x.dtype for x in found] == [dtype, dtype, "int32", "bool"]
    assert not any(x.weak_type for x in found)


def test_usual_case_costs_one_evaluation():
    calls = []
    result = backtrack(listening(quadratic(1.0), calls), jnp.float32(3.0), jnp.float32(-2.0))
    jax.effects_barrier()
    assert calls == [1.0]
    assert (result.rate, result.value, result.trials, result.accepted) == (1.0, 1.5, 1, True)


def test_trials_are_what_is_evaluated():
    calls = []
    result = backtrack(listening(quadratic(30.0), calls), jnp.float32(3.0), jnp.float32(-2.0))
    jax.effects_barrier()
    assert len(calls) == result.trials > 5
    np.testing.assert_allclose(calls, 0.8 ** np.arange(len(calls)), rtol=1e-5)
    assert calls[-1] == result.rate


@pytest.mark.parametrize("bad", [4.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("max_trials", [1, 13, 60])
def test_failure_is_exactly_zero(bad, max_trials):
    """And the value is the original one, to the last bit."""
    value = np.float32(3.1)
    result = backtrack(lambda rate: bad + 0 * rate, value, -2.0, max_trials=max_trials)
    assert result.rate == 0
    assert result.value == value
    assert result.trials == max_trials
    assert not result.accepted


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_trials_that_are_not_finite_are_passed(bad):
    def value_fn(rate):
        return jnp.where(rate > 0.6, bad, quadratic(1.0)(rate))

    result = backtrack(value_fn, jnp.float32(3.0), jnp.float32(-2.0))
    np.testing.assert_allclose(result.rate, 0.8**3, rtol=1e-6)
    assert result.trials == 4


@pytest.mark.parametrize(
    ("value", "slope"),
    [(3.0, 0.0), (3.0, 1.0), (3.0, np.nan), (3.0, -np.inf), (np.nan, -1.0), (np.inf, -1.0)],
)
@pytest.mark.parametrize("first_value", [None, 0.0])
def test_nothing_is_evaluated_where_nothing_can_be_accepted(value, slope, first_value):
    calls = []
    value_fn = listening(quadratic(1.0), calls)
    result = backtrack(value_fn, jnp.float32(value), jnp.float32(slope), first_value=first_value)
    jax.effects_barrier()
    assert calls == []
    assert result.trials == 0
    assert result.rate == 0
    assert not result.accepted
    np.testing.assert_array_equal(result.value, np.float32(value))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [1.0, -250.0, 1e20])
def test_differences_below_the_rounding_of_the_value_pass(x64, dtype, value):
    """Near a minimum: the rise is a rounding error, and the slope promises less than one."""
    rounding = float(np.finfo(dtype).eps) * abs(value)
    value = jnp.asarray(value, dtype)
    result = backtrack(lambda rate: value + 2 * rounding, value, -rounding)
    assert (result.rate, result.trials, result.accepted) == (1, 1, True)
    # But not if it promises what would be resolved.
    assert not backtrack(lambda rate: value + 2 * rounding, value, -1e12 * rounding).accepted


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e20])
def test_search_does_not_depend_on_the_scale_of_the_objective(scale):
    def search(scale):
        value_fn = quadratic(30.0)
        return backtrack(lambda rate: scale * value_fn(rate), 3.0 * scale, -2.0 * scale)

    assert search(scale).rate == search(1.0).rate
    assert search(scale).trials == search(1.0).trials


def test_first_value_is_not_evaluated_again():
    calls = []
    known = backtrack(listening(quadratic(1.0), calls), 3.0, -2.0, first_value=1.5)
    jax.effects_barrier()
    assert calls == []
    assert (known.rate, known.value, known.trials, known.accepted) == (1, 1.5, 0, True)
    plain = backtrack(quadratic(30.0), 3.0, -2.0)
    known = backtrack(quadratic(30.0), 3.0, -2.0, first_value=quadratic(30.0)(1.0))
    assert known.trials == plain.trials - 1
    assert (known.rate, known.value, known.accepted) == (plain.rate, plain.value, True)
    failed = backtrack(lambda rate: 4 + rate, 3.0, -2.0, first_value=jnp.nan, max_trials=9)
    assert (failed.rate, failed.value, failed.trials, failed.accepted) == (0, 3, 8, False)


def test_one_rate_at_most_that_is_known():
    """No evaluation is left for a second."""
    calls = []
    value_fn = listening(quadratic(1.0), calls)
    result = backtrack(value_fn, 3.0, -2.0, first_value=9.0, max_trials=1)
    jax.effects_barrier()
    assert calls == []
    assert (result.rate, result.value, result.trials, result.accepted) == (0, 3, 0, False)


def test_half_precision_is_widened():
    value = jnp.asarray(3.0, jnp.bfloat16)
    result = backtrack(lambda rate: quadratic(1.0)(rate).astype(jnp.bfloat16), value, -2.0)
    assert result.rate.dtype == result.value.dtype == jnp.float32
    assert (result.rate, result.value) == (1.0, 1.5)


def test_dtype_is_that_of_the_value(x64):
    """Whatever those of the other numbers."""
    numbers = {"first": np.float64(1.0), "shrink": np.float64(0.5), "first_value": np.float64(7.0)}
    result = backtrack(quadratic(5.0), jnp.float32(3.0), jnp.float64(-2.0), **numbers)
    assert result.rate.dtype == result.value.dtype == jnp.float32
    assert result.rate == 0.5


def test_mapped_searches_are_those_of_each():
    """Each stops on its own, and none moves on while the others still search."""
    curvatures = jnp.array([1.0, 5.0, 30.0, 1e9, 1.0])
    slopes = jnp.array([-2.0, -2.0, -2.0, -2.0, 2.0])

    def search(curvature, slope):
        return backtrack(quadratic(curvature), 3.0, slope, max_trials=20)

    together = jax.jit(jax.vmap(search))(curvatures, slopes)
    for number, pair in enumerate(zip(curvatures, slopes, strict=True)):
        alone = search(*pair)
        np.testing.assert_allclose([x[number] for x in together], alone, rtol=1e-6)
    assert together.rate[3] == together.rate[4] == 0
    assert together.trials.tolist()[3:] == [20, 0]


# Back along stored iterates.


def best_by_hand(values):
    """The last value, and its predecessors as long as they are no worse."""
    values = np.where(np.isfinite(values), values, np.inf)
    index, count = len(values) - 1, 1
    while index > 0:
        count += 1
        if values[index - 1] > values[index]:
            break
        index -= 1
    usable = len(values) > 0 and np.isfinite(values[index])
    return (index, values[index], count) if usable else (-1, np.inf, len(values))


VALUES = {
    "falls": [5.0, 4.0, 3.0, 1.0],
    "rises": [1.0, 2.0, 3.0, 4.0],
    "turns": [4.0, 2.0, 1.0, 3.0, 6.0],
    "stops at the first": [0.0, 3.0, 2.0, 4.0],
    "goes on where equal": [5.0, 2.0, 2.0, 2.0],
    "one": [3.0],
    "NaN before": [1.0, np.nan, 2.0, 3.0],
    "infinity before": [1.0, -np.inf, 2.0, 3.0],
    "NaN last": [4.0, 1.0, 2.0, np.nan, np.inf],
    "NaN first": [np.nan, 1.0, 2.0],
    "no number": [np.nan, np.inf, np.nan],
    "nothing": [],
}


@pytest.mark.parametrize("case", VALUES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_best_stored(x64, case, dtype):
    values = VALUES[case]
    # Iterates that are not stored would win.
    stored = jnp.asarray([*values, -9.0, -9.0], dtype)
    found = jax.jit(lambda last: best_stored(lambda index: stored[index], last))(len(values) - 1)
    np.testing.assert_array_equal([float(x) for x in found], best_by_hand(values))
    assert [x.dtype for x in found] == ["int32", dtype, "int32"]
    assert not any(x.weak_type for x in found)


def test_iterates_are_evaluated_once_each():
    calls = []
    values = jnp.array([0.0, 7.0, 1.0, 2.0, 3.0])
    result = best_stored(listening(lambda index: values[index], calls), 4)
    jax.effects_barrier()
    assert calls == [4, 3, 2, 1]
    assert (result.place, result.evaluations) == (2, 4)


def test_mapped_iterates():
    """All cases at once, whose searches end at different times."""
    cases = list(VALUES.values())
    stored = jnp.asarray([values + [-9.0] * (6 - len(values)) for values in cases], jnp.float32)
    last = jnp.asarray([len(values) - 1 for values in cases])
    found = jax.vmap(lambda row, last: best_stored(lambda index: row[index], last))(stored, last)
    np.testing.assert_array_equal(np.transpose(found), [best_by_hand(values) for values in cases])


# The minimizer of a model.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_optimal_rate_minimizes_the_model(x64, dtype):
    rng = np.random.default_rng(0)
    for _ in range(20):
        factor, g = rng.normal(size=(4, 4)), rng.normal(size=4)
        matrix = factor @ factor.T + 0.1 * np.eye(4)
        d = -np.linalg.solve(np.diag(np.diag(matrix)), g)
        rates = np.linspace(0, 0.7, 7001)
        values = g @ d * rates + d @ matrix @ d * rates**2 / 2
        found = optimal_rate(jnp.asarray(g @ d, dtype), jnp.asarray(d @ matrix @ d, dtype), 0.7)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, rates[np.argmin(values)], atol=1e-4)


def test_optimal_rate_of_a_newton_step_is_one():
    matrix, g = np.diag([1.0, 20.0]), np.array([3.0, -4.0])
    d = -np.linalg.solve(matrix, g)
    np.testing.assert_allclose(optimal_rate(g @ d, d @ matrix @ d, 5.0), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("slope", "curvature", "expected"),
    [
        (-1.0, 4.0, 0.25),
        (-1.0, 0.1, 2.0),  # beyond the bound
        (-1.0, 0.0, 2.0),
        (-1.0, -3.0, 2.0),
        (-1e30, 1e-30, 2.0),
        (0.0, 4.0, 0.0),
        (1.0, 4.0, 0.0),
        (1.0, -4.0, 0.0),
        (0.0, 0.0, 0.0),
        (-1.0, np.nan, 0.0),
        (-1.0, np.inf, 0.0),
        (-1.0, -np.inf, 0.0),
        (np.nan, 4.0, 0.0),
        (-np.inf, 4.0, 0.0),
        (np.nan, -4.0, 0.0),
        (np.inf, 4.0, 0.0),
    ],
)
def test_cases_of_the_optimal_rate(slope, curvature, expected):
    assert optimal_rate(jnp.float32(slope), jnp.float32(curvature), 2.0) == expected
    both = jax.jit(jax.vmap(optimal_rate))(jnp.array([slope, -1.0]), jnp.array([curvature, 2.0]))
    np.testing.assert_array_equal(both, [min(expected, 1.0), 0.5])


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e20])
def test_optimal_rate_does_not_depend_on_the_scale_of_the_objective(scale):
    np.testing.assert_allclose(optimal_rate(-2.0 * scale, 8.0 * scale), 0.25, rtol=1e-6)
