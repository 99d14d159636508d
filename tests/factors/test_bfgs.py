"""The dense inverse update against its formula, and what must leave it untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secondorder.factors import (
    Change,
    Pair,
    apply_change,
    bfgs_change,
    damp_pair,
    inverse_bfgs_update,
)
from tests.factors.factor_oracles import averaged_pairs, bfgs, convex_pairs, random_inverse

N = 7
few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
update = jax.jit(inverse_bfgs_update)


def draw(seed, n=N):
    rng = np.random.default_rng(seed)
    return random_inverse(rng, n), *convex_pairs(rng, 1, n)[0]


@few
@given(seed=st.integers(0, 2**31), size=st.floats(-8, 8))
def test_update_is_the_bfgs_formula_and_satisfies_the_secant_equation(x64, seed, size):
    h, s, y = draw(seed)
    y = y * 10.0**size
    new = update(jnp.asarray(h), Pair(jnp.asarray(s), jnp.asarray(y)), True)
    expected = bfgs(h, s, y)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-9 * largest)
    # Rounding of the product with y is relative to |H| |y|, which may be much more than |s|.
    rounding = 1e-14 * largest * np.abs(y).max()
    np.testing.assert_allclose(new @ y, s, rtol=1e-9, atol=1e-9 * np.abs(s).max() + rounding)


def test_update_is_exactly_symmetric():
    rng = np.random.default_rng(0)
    n = 37  # odd: leaves a remainder in every vectorized loop
    h = jnp.eye(n)
    for s, y in convex_pairs(rng, 10, n):
        h = update(h, Pair(jnp.float32(s), jnp.float32(y)), True)
    assert not np.array_equal(h, np.eye(n))
    np.testing.assert_array_equal(h, h.T)


def test_update_stays_near_double_precision_on_correlated_pairs():
    rng = np.random.default_rng(0)
    n = 20
    h, exact = jnp.eye(n), np.eye(n)

    @jax.jit
    def damp(h, s, y):
        return damp_pair(Pair(s, y), h @ y, damping=0.5, rule="powell_lm")

    for s, y in averaged_pairs(rng, 200, n, scale=1.0):
        pair = damp(h, jnp.float32(s), jnp.float32(y))
        h, exact = update(h, pair, True), bfgs(exact, *(np.float64(v) for v in pair))
    assert np.linalg.norm(h - exact) < 1e-5 * np.linalg.norm(exact)
    assert np.linalg.eigvalsh(h)[0] > 0


def test_hessian_action_pair_of_an_exact_inverse_changes_nothing(x64):
    """K-BFGS's input side: s = H a, y = (A + l I) s."""
    rng = np.random.default_rng(0)
    inputs, damping = rng.standard_normal((30, N)) + 1, 0.1
    damped = inputs.T @ inputs / 30 + damping * np.eye(N)
    mean_input = inputs.mean(0)
    exact = np.linalg.inv(damped)

    def action_pair(h):
        s = h @ mean_input
        return Pair(jnp.asarray(s), jnp.asarray(damped @ s))

    np.testing.assert_allclose(update(exact, action_pair(exact), True), exact, rtol=0, atol=1e-12)
    # From any other inverse it restores the action on the pair, and does change something.
    pair = action_pair(np.eye(N))
    new = update(jnp.eye(N), pair, True)
    np.testing.assert_allclose(new @ pair.y, pair.s, rtol=1e-9)
    assert np.abs(new - np.eye(N)).max() > 0.01


def spoil(v, value):
    return v.at[1].set(value)


UNTOUCHED = {
    "rejected": lambda s, y: (s, y, False),
    "negative curvature": lambda s, y: (s, -y, True),
    "zero pair": lambda s, y: (0 * s, 0 * y, True),
    "zero y": lambda s, y: (s, 0 * y, True),
    "nan in s": lambda s, y: (spoil(s, np.nan), y, True),
    "nan in y": lambda s, y: (s, spoil(y, np.nan), True),
    "inf in both": lambda s, y: (spoil(s, np.inf), spoil(y, np.inf), True),
    "-inf in s, rejected": lambda s, y: (spoil(s, -np.inf), y, False),
    "overflow of s sᵀ": lambda s, y: (s * 1e20, y * 1e-20, True),
    "overflow of yᵀHy": lambda s, y: (s * 1e-20, y * 1e20, True),
    "overflow of H y": lambda s, y: (s * 1e-37, y * 1e37, True),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_inverse_is_bit_identical_after(case):
    h, s, y = (jnp.float32(v) for v in draw(3))
    h = h.at[0, 1].set(-0.0).at[1, 0].set(-0.0)
    new = update(h, *_pair_and_accept(*UNTOUCHED[case](s, y)))
    assert np.asarray(new).tobytes() == np.asarray(h).tobytes()
    assert np.asarray(update(h, Pair(s, y), True)).tobytes() != np.asarray(h).tobytes()


def _pair_and_accept(s, y, accept):
    return Pair(s, y), accept


def test_changes_that_could_overflow_in_a_sum_leave_the_inverse():
    """Entries of one change stay below the square root of the largest number."""
    h, v = jnp.eye(2, dtype=jnp.float32), jnp.array([1.0, 0.0], jnp.float32)
    limit = float(np.sqrt(np.finfo(np.float32).max))
    # With y = s / c the new entry is c.
    used = update(h, Pair(v, v / (0.1 * limit)), True)
    np.testing.assert_allclose(used, np.diag([0.1 * limit, 1]), rtol=1e-5)
    np.testing.assert_array_equal(update(h, Pair(v, v / (10 * limit)), True), h)


def test_change_is_a_difference_of_squares():
    grow, drop = jnp.array([1.0, 2.0, 0.0]), jnp.array([0.0, 1.0, 3.0])
    h = jnp.eye(3).at[0, 1].set(-0.0)
    expected = np.eye(3) + np.outer(grow, grow) - np.outer(drop, drop)
    np.testing.assert_array_equal(apply_change(h, Change(grow, drop)), expected)
    same = apply_change(h, Change(0 * grow, -0.0 * drop))
    assert np.asarray(same).tobytes() == np.asarray(h).tobytes()


def test_update_is_its_change_applied():
    h, s, y = (jnp.float32(v) for v in draw(1))
    unit = Pair(s / jnp.sqrt(s @ y), y / jnp.sqrt(s @ y))
    new = apply_change(h, bfgs_change(unit, h @ unit.y))
    np.testing.assert_allclose(new, update(h, Pair(s, y), True), rtol=1e-4, atol=1e-4)
    nothing = bfgs_change(Pair(0 * s, 0 * y), 0 * s)
    assert all((v == 0).all() for v in nothing)


def test_nothing_selects_between_whole_matrices():
    n = 11
    v = jnp.ones(n)
    jaxpr = jax.make_jaxpr(inverse_bfgs_update)(jnp.eye(n), Pair(v, v), jnp.array(True))
    assert "select_n" in str(jaxpr)

    def selects(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "select_n":
                yield equation.outvars[0].aval.shape
            for inner in equation.params.values():
                yield from selects(inner.jaxpr) if hasattr(inner, "jaxpr") else ()

    shapes = list(selects(jaxpr.jaxpr))
    assert shapes
    assert (n, n) not in shapes


def test_dtype_of_the_inverse_is_kept(x64):
    h, s, y = draw(0)
    assert update(jnp.float32(h), Pair(jnp.asarray(s), jnp.asarray(y)), True).dtype == jnp.float32
    assert update(jnp.asarray(h), Pair(jnp.float32(s), jnp.float32(y)), True).dtype == jnp.float64


def test_stack_equals_loop():
    h, s, y = (jnp.float32(np.stack(v)) for v in zip(*map(draw, range(4)), strict=True))
    s = s.at[1, 0].set(jnp.nan)
    accept = jnp.array([True, True, False, True])
    stacked = jax.jit(jax.vmap(inverse_bfgs_update))(h, Pair(s, y), accept)
    for k in range(4):
        one = update(h[k], Pair(s[k], y[k]), accept[k])
        np.testing.assert_allclose(stacked[k], one, rtol=1e-5, atol=1e-5)
    for k in (1, 2):
        np.testing.assert_array_equal(stacked[k], h[k])
