"""The compact form against the dense recursion, its eigenbasis against a dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondorder.solvers import (
    barzilai_borwein,
    compact_sr1,
    curvature_range,
    initial_scale,
    middle_matrix,
    orthonormal_combinations,
    pair_gram,
    sr1_eigenbasis,
)
from tests.solvers.sr1_oracles import noisy_pairs, quadratic_pairs, ring, sequential_sr1

N, M = 12, 5


def grams(s, y, numbers, dtype=None):
    rows = np.concatenate([s, y]).astype(np.float64)
    return pair_gram(jnp.asarray(rows @ rows.T, dtype or jnp.float64), jnp.asarray(numbers))


@jax.jit
def matrix_and_basis(pairs, scale, skip):
    matrix = compact_sr1(pairs, scale, skip)
    return matrix, sr1_eigenbasis(matrix)


def dense(s, y, matrix):
    psi = (y - float(matrix.scale) * s).T
    return float(matrix.scale) * np.eye(s.shape[1]) + psi @ np.asarray(matrix.weights) @ psi.T


def dense_of_basis(s, y, matrix, basis):
    p = (y - float(matrix.scale) * s).T @ np.asarray(basis.directions)
    values = np.asarray(basis.eigenvalues) - float(matrix.scale)
    return float(matrix.scale) * np.eye(s.shape[1]) + (p * values) @ p.T


@pytest.mark.parametrize("count", [0, 1, M - 1, M, M + 3, 3 * M])
@pytest.mark.parametrize("scale", [0.3, -0.2])
@pytest.mark.parametrize("kind", ["quadratic", "noisy"])
def test_compact_form_is_the_recursion_in_ring_order(x64, count, scale, kind):
    rng = np.random.default_rng(count)
    make = {
        "quadratic": lambda: quadratic_pairs(rng, max(count, 1), N, np.linspace(-1, 3, N))[0],
        "noisy": lambda: noisy_pairs(rng, max(count, 1), N),
    }
    pairs = make[kind]()
    s, y, numbers = ring(pairs[:count] or [(np.zeros(N), np.zeros(N))], M)
    if count == 0:
        numbers[:] = -1
    matrix, basis = matrix_and_basis(grams(s, y, numbers), scale, 1e-8)
    expected, used = sequential_sr1(pairs[:count][-M:], scale) if count else (scale * np.eye(N), [])
    np.testing.assert_allclose(dense(s, y, matrix), expected, rtol=0, atol=1e-8)
    assert int(matrix.used.sum()) == sum(used)
    rebuilt = dense_of_basis(s, y, matrix, basis)
    np.testing.assert_allclose(rebuilt, expected, rtol=0, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), skip=st.sampled_from([1e-8, 0.05, 0.3]))
def test_skips_are_those_of_the_recursion(seed, skip):
    """Repeated and orthogonal pairs among others, with a rule that leaves out some of them."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        rng = np.random.default_rng(seed)
        pairs = noisy_pairs(rng, M, N)
        pairs[2] = tuple(2.0 * v for v in pairs[1])  # known already
        s, y = pairs[3]
        y = 0.5 * s + y - s * (y @ s) / (s @ s)  # the residual of B = I / 2 is orthogonal to s
        pairs[0] = (s, y)
        s, y, numbers = ring(pairs, M)
        matrix, _ = matrix_and_basis(grams(s, y, numbers), 0.5, skip)
        expected, used = sequential_sr1(pairs, 0.5, skip)
        assert matrix.used.tolist() == used
        assert not used[0]
        np.testing.assert_allclose(
            dense(s, y, matrix), expected, rtol=0, atol=1e-7 * np.abs(expected).max()
        )


def test_secant_equation_holds_for_the_newest_pair(x64):
    pairs, _ = quadratic_pairs(np.random.default_rng(0), M, N, np.linspace(-1, 3, N))
    s, y, numbers = ring(pairs, M)
    matrix, _ = matrix_and_basis(grams(s, y, numbers), 0.4, 1e-8)
    np.testing.assert_allclose(dense(s, y, matrix) @ s.T, y.T, rtol=0, atol=1e-8)


def test_scaling_of_the_pairs_changes_nothing(x64):
    pairs = noisy_pairs(np.random.default_rng(1), M, N)
    scaled = [(s * f, y * f) for (s, y), f in zip(pairs, 10.0 ** np.arange(-2, 3), strict=True)]
    found = []
    for these in (pairs, scaled):
        s, y, numbers = ring(these, M)
        found.append(dense(s, y, matrix_and_basis(grams(s, y, numbers), 0.4, 1e-8)[0]))
    np.testing.assert_allclose(*found, rtol=0, atol=1e-8 * np.abs(found[0]).max())


def test_eigenbasis_is_orthonormal_and_has_the_eigenvalues(x64):
    pairs = noisy_pairs(np.random.default_rng(2), M, N)
    s, y, numbers = ring(pairs, M)
    _, basis = matrix_and_basis(grams(s, y, numbers), 0.4, 1e-8)
    p = (y - 0.4 * s).T @ np.asarray(basis.directions)
    np.testing.assert_allclose(p.T @ p, np.eye(M), rtol=0, atol=1e-10)
    expected = np.linalg.eigvalsh(sequential_sr1(pairs, 0.4)[0])
    found = np.sort(np.append(basis.eigenvalues, np.full(N - M, 0.4)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


# The tolerances hold with and without fused multiply-add, which halves the rounding.
@pytest.mark.parametrize(("condition", "tolerance"), [(30.0, 4e-4), (300.0, 4e-2), (1e3, 1.0)])
def test_float32_with_nearly_dependent_pairs(condition, tolerance):
    """The Gram matrix squares the condition; what it cannot resolve must do no harm."""
    rng = np.random.default_rng(3)
    pairs, _ = quadratic_pairs(rng, M, N, np.geomspace(0.5, 2, N))
    psi = np.linalg.svd(np.array([y - 0.25 * s for s, y in pairs]), full_matrices=False)
    mixing = (psi[0] * np.geomspace(1, 1 / condition, M) / psi[1]) @ psi[0].T
    mixed = [
        tuple(mixing[i] @ np.array(column) for column in zip(*pairs, strict=True)) for i in range(M)
    ]
    s, y, numbers = ring(mixed, M)
    np.testing.assert_allclose(np.linalg.cond(y - 0.25 * s), condition)
    matrix, basis = matrix_and_basis(grams(s, y, numbers, jnp.float32), 0.25, 1e-8)
    values = np.asarray(basis.eigenvalues)[np.asarray(basis.kept)]
    assert values.min() > 0.25
    assert values.max() < 2.1  # the Hessian's are below 2
    found = dense_of_basis(s, y, matrix, basis)
    expected = sequential_sr1(mixed, 0.25)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_an_empty_memory_is_the_scaled_identity():
    pairs = pair_gram(jnp.full((2 * M, 2 * M), jnp.nan), jnp.full(M, -1))
    matrix, basis = matrix_and_basis(pairs, 0.7, 1e-8)
    for cleared in (matrix.used, matrix.weights, basis.kept, basis.directions):
        assert not cleared.any()
    np.testing.assert_array_equal(basis.eigenvalues, jnp.full(M, jnp.float32(0.7)))


def test_slots_that_are_empty_are_not_looked_at(x64):
    pairs = noisy_pairs(np.random.default_rng(5), 3, N)
    s, y, numbers = ring(pairs, M)
    gram = np.concatenate([s, y]) @ np.concatenate([s, y]).T
    for slot in (3, 4, M + 3, M + 4):
        gram[slot] = gram[:, slot] = np.nan
    matrix, _ = matrix_and_basis(pair_gram(jnp.asarray(gram), jnp.asarray(numbers)), 0.5, 1e-8)
    expected, _ = sequential_sr1(pairs, 0.5)
    np.testing.assert_allclose(dense(s, y, matrix), expected, rtol=0, atol=1e-8)


def test_orthonormal_combinations_of_dependent_vectors(x64):
    rng = np.random.default_rng(6)
    vectors = (
        rng.standard_normal((M, 3)) @ rng.standard_normal((3, N)) * 10.0 ** np.arange(M)[:, None]
    )
    gram = jnp.asarray(vectors @ vectors.T)
    c, resolved = orthonormal_combinations(gram, jnp.ones(M, bool), 1e-12)
    assert resolved.sum() == 3
    np.testing.assert_allclose(c.T @ gram @ c, np.diag(resolved.astype(float)), atol=1e-8)


def test_middle_matrix_of_a_quadratic(x64):
    pairs, hessian = quadratic_pairs(np.random.default_rng(7), M + 2, N, np.linspace(-1, 3, N))
    s, y, numbers = ring(pairs, M)
    expected = s @ (hessian - 0.3 * np.eye(N)) @ s.T
    np.testing.assert_allclose(middle_matrix(grams(s, y, numbers), 0.3), expected, atol=1e-10)


@pytest.mark.parametrize(("low", "high"), [(0.1, 3.0), (-1.0, 3.0), (-3.0, -0.5)])
def test_pencil_rules_bound_the_curvature_of_the_pairs(x64, low, high):
    pairs, _ = quadratic_pairs(np.random.default_rng(8), M, N, np.linspace(low, high, N))
    s, y, numbers = ring(pairs, M)
    these = grams(s, y, numbers)
    basis = np.linalg.qr(s.T)[0]
    hessian = basis.T @ np.linalg.lstsq(s, y, rcond=None)[0].T @ basis
    expected = np.linalg.eigvalsh((hessian + hessian.T) / 2)[[0, -1]]
    found = np.asarray(curvature_range(these))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    below, above = (float(initial_scale(these, f"pencil_{side}")) for side in ("below", "above"))
    np.testing.assert_allclose(below, found[0] * (0.5 if found[0] > 0 else 1.5), rtol=1e-6)
    assert above > 0
    assert below < found[0] or found[0] == 0
    # M is definite then, so no eigenvalue lies outside the range of the pairs and gamma.
    matrix, eigen = matrix_and_basis(these, below, 1e-8)
    values = np.asarray(eigen.eigenvalues)[np.asarray(eigen.kept)]
    assert matrix.used.all()
    assert values.min() > below - 1e-9


def test_barzilai_borwein_looks_at_the_newest_pair(x64):
    pairs = noisy_pairs(np.random.default_rng(9), M + 2, N)
    s, y = pairs[-1]
    s_, y_, numbers = ring(pairs, M)
    found = float(barzilai_borwein(grams(s_, y_, numbers)))
    expected = y @ y / (s @ y) if s @ y > 0 else np.linalg.norm(y) / np.linalg.norm(s)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_scale_rules_without_pairs_give_zero():
    pairs = pair_gram(jnp.zeros((2 * M, 2 * M)), jnp.full(M, -1))
    for rule in ("bb", "pencil_below", "pencil_above"):
        assert initial_scale(pairs, rule) == 0
    with pytest.raises(ValueError, match="rule"):
        initial_scale(pairs, "zero")
