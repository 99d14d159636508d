"""Damping and acceptance: every inequality that the theory of the method rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secondorder.factors import (
    Pair,
    accept_pair,
    damp_pair,
    identity_damping,
    inverse_bfgs_update,
    levenberg_marquardt_damping,
    normalize_pair,
    powell_damping,
)
from tests.factors.factor_oracles import random_inverse

N = 5
few = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**31)
RULES = ["powell_identity", "powell_lm"]

powell = jax.jit(powell_damping)
identity = jax.jit(identity_damping)
accept = jax.jit(accept_pair)
normalize = jax.jit(normalize_pair)
update = jax.jit(inverse_bfgs_update)


@jax.jit
def damp_identity(h, pair, damping):
    return damp_pair(pair, h @ pair.y, mu=0.2, damping=damping, rule="powell_identity")


@jax.jit
def damp_lm(h, pair, damping):
    return damp_pair(pair, h @ pair.y, mu=0.2, damping=damping, rule="powell_lm")


DAMP = {"powell_identity": damp_identity, "powell_lm": damp_lm}


def draw(seed):
    """A positive definite inverse and a pair of any sign and relative length."""
    rng = np.random.default_rng(seed)
    h = random_inverse(rng, N, *np.sort(10.0 ** rng.uniform(-3, 3, 2)))
    s, y = rng.standard_normal((2, N))
    return h, Pair(s, y * 10.0 ** rng.uniform(-3, 3))


def as_arrays(*values):
    return jax.tree.map(jnp.asarray, values)


@few
@given(seed=seeds)
def test_powell_attains_its_bound_where_it_acts(x64, seed):
    h, pair = draw(seed)
    hy = h @ pair.y
    damped = powell(*as_arrays(pair, hy), 0.2)
    quadratic = pair.y @ hy
    if pair.s @ pair.y < 0.2 * quadratic:
        np.testing.assert_allclose(damped.s @ pair.y, 0.2 * quadratic, rtol=1e-9)
        np.testing.assert_allclose(np.linalg.matrix_rank([pair.s, hy, damped.s], 1e-8), 2)
    else:
        np.testing.assert_array_equal(damped.s, pair.s)
    np.testing.assert_array_equal(damped.y, pair.y)


@few
@given(seed=seeds, mu=st.floats(0.01, 0.99))
def test_identity_damping_attains_its_bound_where_it_acts(x64, seed, mu):
    _, pair = draw(seed)
    damped = identity(*as_arrays(pair), mu)
    length = pair.s @ pair.s
    if pair.s @ pair.y < mu * length:
        np.testing.assert_allclose(damped.s @ damped.y, mu * length, rtol=1e-9)
    else:
        np.testing.assert_array_equal(damped.y, pair.y)
    np.testing.assert_array_equal(damped.s, pair.s)


@pytest.mark.parametrize("rule", RULES)
@few
@given(seed=seeds, damping=st.floats(1e-3, 0.99))
def test_damped_pairs_are_bounded(x64, rule, seed, damping):
    mu, (h, pair) = 0.2, draw(seed)
    s, y = map(np.asarray, DAMP[rule](*as_arrays(h, pair), damping))
    eigenvalues = np.linalg.eigvalsh(h)
    smallest, norm = eigenvalues[0], eigenvalues[-1]
    curvature = s @ y
    slack = 1 + 1e-7
    first, second = s @ s / curvature, y @ h @ y / curvature
    assert curvature > 0
    assert first <= slack / damping
    if rule == "powell_lm":
        assert second <= slack * (2 / mu + 2 * damping * norm)
        assert y @ y / curvature <= slack * max(2 / (mu * smallest), 2 * damping)
    else:
        assert second <= slack * (1 / np.sqrt(mu) + np.sqrt(damping * norm)) ** 2
    updated = np.asarray(update(*as_arrays(h, Pair(s, y)), True))
    bound = (np.sqrt(norm) + np.sqrt(first * second)) ** 2 + first
    assert np.linalg.norm(updated, 2) <= slack * bound
    assert np.linalg.eigvalsh(updated)[0] > 0


def test_levenberg_marquardt_adds_curvature():
    pair = Pair(jnp.array([1.0, -2.0]), jnp.array([3.0, 0.0]))
    s, y = levenberg_marquardt_damping(pair, 0.25)
    np.testing.assert_array_equal(s, pair.s)
    np.testing.assert_array_equal(y, [3.25, -0.5])


def test_identity_damping_at_its_pole_gives_no_nan():
    s = jnp.array([1.0, 0.0])
    assert np.isfinite(identity(Pair(s, s), 2.0).y).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("exponent", [-40, -20, 40])
@pytest.mark.parametrize("seed", range(4))
def test_gate_damping_and_update_do_not_see_a_common_factor(rule, exponent, seed):
    h, pair = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), draw(seed))
    factor = 2.0**exponent  # a power of two: nothing but the exponent may change
    scaled = Pair(pair.s * factor, pair.y * factor)
    damped, damped_scaled = DAMP[rule](h, pair, 0.1), DAMP[rule](h, scaled, 0.1)
    for one, other in zip(damped, damped_scaled, strict=True):
        np.testing.assert_allclose(other / factor, one, rtol=1e-5, atol=1e-5)
    taken = accept(damped, 1.0, 1e-4)
    assert taken == accept(damped_scaled, 1.0, 1e-4)
    new = update(h, damped, taken)
    assert not np.array_equal(new, h)
    np.testing.assert_allclose(update(h, damped_scaled, taken), new, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dead", ["s", "y", "both"])
def test_dead_layer_gives_no_nan(rule, dead):
    v, zero = jnp.arange(1.0, N + 1), jnp.zeros(N)
    pair = Pair(zero if dead in ("s", "both") else v, zero if dead in ("y", "both") else v)
    h = jnp.eye(N)
    damped = DAMP[rule](h, pair, 0.1)
    assert all(np.isfinite(x).all() for x in damped)
    assert not accept(pair, 0.0, 0.0)
    if dead == "both":
        assert not accept(damped, 0.0, 0.0)
    assert np.isfinite(update(h, damped, True)).all()


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_acceptance_is_safe_from_underflow_and_overflow(size):
    v = jnp.array([0.5, 1.0, 2.0], jnp.float32) * size
    assert accept(Pair(v, v), 0.0, 0.0)
    assert not accept(Pair(v, -v), 0.0, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["s", "y", "both"])
def test_non_finite_pairs_are_rejected(bad, place):
    v = jnp.array([1.0, 2.0, 3.0])
    spoiled = v.at[1].set(bad)
    pair = Pair(spoiled if place != "y" else v, spoiled if place != "s" else v)
    assert not accept(pair, 0.0, 0.0)
    assert all((x == 0).all() for x in normalize(pair))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_reference_rejects(bad):
    v = jnp.array([1.0, 2.0, 3.0])
    assert not accept(Pair(v, v), bad, 1e-4)


def test_gate_compares_curvature_with_reference():
    s = jnp.array([3.0, 4.0])
    pair = Pair(s, 1e-3 * s)  # curvature per squared length: 1e-3
    assert accept(pair, 9.9, 1e-4)
    assert not accept(pair, 10.1, 1e-4)


def test_curvature_of_rounding_is_rejected():
    s, y = jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0 + 6e-8])
    assert s @ y > 0
    assert not accept(Pair(s, y), 0.0, 0.0)
    assert accept(Pair(s, y.at[1].set(-1.0 + 1e-5)), 0.0, 0.0)


@pytest.mark.parametrize("ratio", [1e-24, 1.0, 1e24])
def test_normalized_pairs_have_unit_curvature(ratio):
    s = jnp.array([1.0, 2.0, -1.0]) / ratio**0.5
    y = jnp.array([2.0, 1.0, 0.5]) * ratio**0.5
    unit = normalize(Pair(s, y))
    np.testing.assert_allclose(unit.s @ unit.y, 1, rtol=1e-6)
    np.testing.assert_allclose(unit.s / s, (unit.s / s)[0], rtol=1e-6)


@pytest.mark.parametrize("sizes", [(1e12, 1e12), (1e-12, 1e-12), (1e12, 1e-12), (1e-12, 1e12)])
def test_normalizing_extreme_pairs_stays_exact(sizes):
    unit = normalize(Pair(*(jnp.full(3, size, jnp.float32) for size in sizes)))
    np.testing.assert_allclose(unit.s @ unit.y, 1, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(3e38, 3e38), (2e-38, 2e-38), (np.inf, 1.0), (np.nan, 1.0)])
def test_a_pair_that_cannot_be_normalized_is_zero(sizes):
    """Where the product overflows, vanishes or means nothing; never half a pair."""
    unit = normalize(Pair(*(jnp.full(3, size, jnp.float32) for size in sizes)))
    assert all((v == 0).all() for v in unit)


def test_unknown_rule_is_an_error():
    v = jnp.ones(2)
    with pytest.raises(ValueError, match="powell_lm"):
        damp_pair(Pair(v, v), v, damping=0.1, rule="powell")
