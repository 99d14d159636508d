"""Pairs by coefficients and a Gram matrix: every rule gives what it gives on the vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.factors import (
    Pair,
    accept_pair,
    apply_change,
    bfgs_change,
    damp_pair,
    gram_product,
    identity_damping,
    levenberg_marquardt_damping,
    normalize_pair,
    powell_damping,
)
from tests.factors.factor_oracles import random_inverse

N = 9
RULES = ["powell_lm", "powell_identity"]
# Coefficients with respect to the rows s, y, H s, H y, H H s, H H y.
UNIT = np.eye(6)


def draw(seed):
    """An inverse, a basis of six rows, and its Gram matrix; the pair is rows 0 and 1.

    Even seeds make a pair of little curvature, which damping changes; odd ones a convex one.
    """
    rng = np.random.default_rng(seed)
    h = random_inverse(rng, N)
    s = rng.standard_normal(N)
    y = rng.standard_normal(N) if seed % 2 == 0 else s @ random_inverse(rng, N, 0.5, 5)
    rows = np.stack([s, y])
    basis = np.concatenate([rows, rows @ h, rows @ h @ h])
    return h, jnp.asarray(basis), gram_product(jnp.asarray(basis @ basis.T))


def vectors_of(pair, basis):
    return Pair(pair.s @ basis, pair.y @ basis)


def assert_same(pair, expected, basis):
    for found, vector in zip(vectors_of(pair, basis), expected, strict=True):
        np.testing.assert_allclose(found, vector, rtol=0, atol=1e-10 * np.abs(vector).max())


@pytest.fixture(params=range(4))
def seed(request, x64):
    return request.param


def test_inner_product(seed):
    _, basis, inner = draw(seed)
    a, b = np.random.default_rng(seed).standard_normal((2, 6))
    np.testing.assert_allclose(inner(a, b), (a @ basis) @ (b @ basis), rtol=1e-10)


def test_powell(seed):
    _, basis, inner = draw(seed)
    found = powell_damping(Pair(*jnp.asarray(UNIT[:2])), jnp.asarray(UNIT[3]), 0.2, inner)
    expected = powell_damping(Pair(basis[0], basis[1]), basis[3], 0.2)
    assert_same(found, expected, basis)


def test_identity(seed):
    _, basis, inner = draw(seed)
    found = identity_damping(Pair(*jnp.asarray(UNIT[:2])), 0.9, inner)
    assert_same(found, identity_damping(Pair(basis[0], basis[1]), 0.9), basis)


def test_levenberg_marquardt(seed):
    _, basis, _ = draw(seed)
    found = levenberg_marquardt_damping(Pair(*jnp.asarray(UNIT[:2])), 0.3)
    assert_same(found, levenberg_marquardt_damping(Pair(basis[0], basis[1]), 0.3), basis)


@pytest.mark.parametrize("rule", RULES)
def test_the_whole_update(seed, rule):
    """Damped, accepted, normalized, and turned into a change of the inverse."""
    h, basis, inner = draw(seed)
    s, y, _, hy, _, _ = jnp.asarray(UNIT)
    pair = damp_pair(Pair(s, y), hy, damping=0.3, rule=rule, inner=inner)
    expected = damp_pair(Pair(basis[0], basis[1]), basis[3], damping=0.3, rule=rule)
    assert_same(pair, expected, basis)

    for threshold in (0.0, 1e-4, 1e3):
        accepted = accept_pair(pair, 2.0, threshold, inner)
        assert accepted == accept_pair(expected, 2.0, threshold)
        unit = normalize_pair(pair, accepted, inner)
        expected_unit = normalize_pair(expected, accepted)
        assert_same(unit, expected_unit, basis)

    unit, expected_unit = normalize_pair(pair, True, inner), normalize_pair(expected)
    np.testing.assert_allclose(inner(*unit), 1, rtol=1e-10)
    # H y: each coefficient moves to the next power of H.
    change = bfgs_change(unit, jnp.roll(unit.y, 2), inner)
    expected_change = bfgs_change(expected_unit, h @ expected_unit.y)
    for found, vector in zip(change, expected_change, strict=True):
        np.testing.assert_allclose(found @ basis, vector, rtol=1e-8, atol=1e-10)
    new = apply_change(jnp.asarray(h), type(change)(*(v @ basis for v in change)))
    np.testing.assert_allclose(new @ expected_unit.y, expected_unit.s, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gram_matrix_that_is_not_finite_accepts_nothing(bad):
    inner = gram_product(jnp.full((6, 6), bad))
    pair = Pair(*jnp.asarray(UNIT[:2], jnp.float32))
    assert not accept_pair(pair, inner=inner)
    assert all((v == 0).all() for v in normalize_pair(pair, True, inner))
    change = bfgs_change(pair, jnp.asarray(UNIT[3], jnp.float32), inner)
    assert all((v == 0).all() for v in change)


def test_dead_layer_accepts_nothing():
    inner = gram_product(jnp.zeros((6, 6)))
    s, y, _, hy, _, _ = jnp.asarray(UNIT, jnp.float32)
    for rule in RULES:
        pair = damp_pair(Pair(s, y), hy, damping=0.3, rule=rule, inner=inner)
        assert all(np.isfinite(v).all() for v in pair)
        assert not accept_pair(pair, inner=inner)


def test_many_blocks_at_once():
    """The rules are mapped over the Gram matrices of blocks of different lengths."""
    rng = np.random.default_rng(0)
    pairs = [rng.standard_normal((2, n)).astype(np.float32) for n in (3, 50, 7)]
    hys = [2 * pair[1] for pair in pairs]  # H = 2 I
    bases = [np.concatenate([pair, hy[None]]) for pair, hy in zip(pairs, hys, strict=True)]
    s, y, hy = jnp.eye(3)

    def damp(gram):
        return damp_pair(Pair(s, y), hy, damping=0.3, inner=gram_product(gram))

    found = jax.vmap(damp)(jnp.stack([basis @ basis.T for basis in bases]))
    for k, basis in enumerate(bases):
        expected = damp_pair(Pair(basis[0], basis[1]), basis[2], damping=0.3)
        np.testing.assert_allclose(found.s[k] @ basis, expected.s, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.y[k] @ basis, expected.y, rtol=1e-4, atol=1e-5)
