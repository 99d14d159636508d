"""Eigensolvers on pytrees against dense eigendecompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.solvers import (
    Images,
    adaptive_rank,
    block_krylov,
    complete_basis,
    orthonormalize,
    project_out,
    signal_to_noise,
    single_pass,
    subspace_iteration,
)
from tests.solvers.eigen_oracles import (
    N,
    as_rows,
    as_stack,
    assert_pairs,
    largest,
    product_with,
    random_start,
    with_spectrum,
)

# Ten outliers of both signs above a bulk.
OUTLIERS = np.concatenate(
    [np.geomspace(30, 1, 10) * np.resize([1, -1, 1], 10), np.linspace(-0.02, 0.02, N - 10)]
)


# Orthonormal bases.


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_bases_are_orthonormal_in_single_precision(condition, mixed):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 12)))[0] for n in (N, 12))
    rows = ((right if mixed else np.eye(12)) * np.geomspace(1, 1 / condition, 12)) @ left.T
    stack = as_stack(rows, jnp.float32)
    found = as_rows(jax.jit(orthonormalize)(stack))
    np.testing.assert_allclose(found @ found.T, np.eye(12), atol=5e-6)
    # The span is that of the rows as float32 has them, up to what their condition leaves of it.
    expected = np.linalg.svd(as_rows(stack))[2][:12]
    lost = np.linalg.norm(expected - expected @ found.T @ found, axis=1)
    assert (lost < (3e-7 * condition if mixed else 1e-5)).all()


def test_a_rotation_replaces_a_pass():
    """Vectors that are orthogonal but for a known rotation need two passes at any condition."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 12)))[0] for n in (N, 12))
    rows = (right * np.geomspace(1, 1e-4, 12)) @ left.T
    rotation = jnp.asarray(right.T, jnp.float32)
    found = as_rows(orthonormalize(as_stack(rows, jnp.float32), passes=2, rotation=rotation))
    np.testing.assert_allclose(found @ found.T, np.eye(12), atol=2e-5)


def test_zeros_stay_and_are_filled(x64):
    rows = np.random.default_rng(0).standard_normal((6, N))
    rows[[2, 5]] = 0
    found = as_rows(jax.jit(orthonormalize)(as_stack(rows)))
    np.testing.assert_allclose(
        np.sort(np.linalg.norm(found, axis=1)), [0, 0, 1, 1, 1, 1], atol=1e-12
    )
    complete = jax.jit(complete_basis)
    completed = as_rows(complete(as_stack(found), jax.random.key(0)))
    np.testing.assert_allclose(completed @ completed.T, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(found @ completed.T @ completed, found, atol=1e-12)
    from_nothing = as_rows(complete(as_stack(0 * rows), jax.random.key(0)))
    np.testing.assert_allclose(from_nothing @ from_nothing.T, np.eye(6), atol=1e-12)
    start = random_start(6)
    assert (as_rows(complete(start, jax.random.key(0))) == as_rows(start)).all()


def test_dependent_vectors_give_new_directions(x64):
    rows = np.random.default_rng(0).standard_normal((6, N))
    rows[4] = rows[0] - rows[1]
    found = as_rows(orthonormalize(as_stack(rows)))
    np.testing.assert_allclose(found @ found.T, np.eye(6), atol=1e-6)
    span = np.linalg.qr(rows[[0, 1, 2, 3, 5]].T)[0]
    np.testing.assert_allclose(found.T @ (found @ span), span, atol=1e-9)


def test_projection(x64):
    basis, rows = random_start(5), np.random.default_rng(2).standard_normal((3, N))
    q = as_rows(basis)
    found = as_rows(project_out(basis, as_stack(rows)))
    np.testing.assert_allclose(found, rows - rows @ q.T @ q, atol=1e-13)


# Subspace iteration.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
def test_subspace_iteration_converges(x64, dtype):
    matrix = with_spectrum(OUTLIERS)
    run = jax.jit(lambda start: subspace_iteration(product_with(matrix, dtype), start, 8, passes=6))
    solution = run(random_start(10, dtype=dtype))
    assert_pairs(solution.pairs, matrix, 8, 2e-6, dtype)
    assert solution.products == 60
    assert solution.finite


def test_a_kept_basis_is_as_good_as_more_passes(x64):
    """Warm steps on one matrix are passes; one solver, whose passes may be traced."""
    product, start = product_with(with_spectrum(OUTLIERS)), random_start(10)
    solve = jax.jit(lambda start, passes: subspace_iteration(product, start, 8, passes=passes))
    at_once, basis = solve(start, 4), start
    one_step = jax.jit(lambda start: subspace_iteration(product, start, 8))
    for _ in range(4):
        solution = one_step(basis)
        basis = solution.basis
    np.testing.assert_allclose(solution.pairs.values, at_once.pairs.values, rtol=1e-12)
    found, expected = as_rows(solution.basis), as_rows(at_once.basis)
    np.testing.assert_allclose(found @ expected.T @ expected, found, atol=1e-9)


def test_double_pass_is_the_papers(x64):
    """QR of the products with random vectors, and the matrix restricted to that."""
    matrix = with_spectrum(OUTLIERS)
    start = random_start(12)
    q = np.linalg.qr(matrix @ as_rows(start).T)[0]
    expected = largest(q.T @ matrix @ q, 7)
    product = product_with(matrix)
    run = jax.jit(lambda start: subspace_iteration(product, start, 7, passes=2, cleanings=3))
    found = run(start)
    np.testing.assert_allclose(found.pairs.values, expected, rtol=1e-9)


def test_one_pass_is_rayleigh_ritz_on_the_start(x64):
    matrix, start = with_spectrum(OUTLIERS), random_start(12)
    q = as_rows(start)
    found = jax.jit(lambda start: subspace_iteration(product_with(matrix), start, 12).pairs)(start)
    np.testing.assert_allclose(found.values, largest(q @ matrix @ q.T, 12), rtol=1e-9)
    rows = as_rows(found.vectors)
    np.testing.assert_allclose(rows @ q.T @ q, rows, atol=1e-12)


def test_full_rank_is_exact(x64):
    matrix = with_spectrum(np.geomspace(100, 1e-3, N) * np.resize([1, -1, 1], N))
    run = jax.jit(lambda start: subspace_iteration(product_with(matrix), start, N))
    assert_pairs(run(random_start(N)).pairs, matrix, N, 1e-10)


def test_matrices_of_less_rank_and_zero(x64):
    matrix = with_spectrum(np.concatenate([[5.0, -2.0], np.zeros(N - 2)]))
    product, start = product_with(matrix), random_start(6)
    pairs = jax.jit(lambda start: subspace_iteration(product, start, 4, passes=3).pairs)(start)
    np.testing.assert_allclose(pairs.values, [5, -2, 0, 0], atol=1e-12)
    zero = product_with(0 * matrix)
    pairs = jax.jit(lambda start: subspace_iteration(zero, start, 4).pairs)(start)
    assert not pairs.kept.any()
    assert not as_rows(pairs.vectors).any()


def test_products_that_are_not_finite_are_seen(x64):
    product = product_with(with_spectrum(OUTLIERS) * np.nan)

    @jax.jit
    def run(start):
        one, key = jax.tree.map(lambda leaf: leaf[0], start), jax.random.key(0)
        return [
            subspace_iteration(product, start, 4, passes=2),
            single_pass(product, start, 3),
            block_krylov(product, start, 4),
            adaptive_rank(product, one, 8, key, block=4),
        ]

    assert not any(solution.finite for solution in run(random_start(4)))


# Samples of the matrix.


def test_signal_to_noise(x64):
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((6, 3, 3))
    rows = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    quotients = np.array([np.diag(rows @ sample @ rows.T) for sample in samples])
    expected = np.abs(quotients.mean(0)) / quotients.std(0, ddof=1)
    found = signal_to_noise(jnp.asarray(rows), jnp.asarray(samples))
    np.testing.assert_allclose(found, expected)
    same = jnp.stack([jnp.diag(jnp.array([2.0, 0.0]))] * 4)
    assert signal_to_noise(jnp.eye(2), same).tolist() == [np.inf, 0]


def sampled(matrices):
    """The product with the mean of some matrices, with its samples."""

    def product(stack):
        vectors = product_with(np.mean(matrices, 0))(stack).vectors
        rows = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in stack.values()], 1)
        return Images(vectors, jnp.stack([rows @ m @ rows.T for m in matrices]))

    return product


def test_noisy_eigenpairs_are_dropped(x64):
    """One eigenvalue is the same in all samples, the other changes its sign."""
    signs = np.array([1, -1, 1, -1, 1.2])
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
    matrices = [(basis[:, :2] * [1.0, 5 * s]) @ basis[:, :2].T for s in signs]
    start = random_start(4)
    product = sampled(matrices)
    run = jax.jit(lambda start: subspace_iteration(product, start, 3, passes=4, noise=1.0))
    solution = run(start)
    np.testing.assert_allclose(np.sort(solution.pairs.values), [0, 0, 1], atol=1e-9)
    assert solution.pairs.kept.sum() == 1
    rows = as_rows(solution.pairs.vectors)
    np.testing.assert_allclose(np.abs(rows @ basis[:, 0]).max(), 1)


# The other solvers.


def test_single_pass(x64):
    """Exact for a matrix of less rank; near it with a bulk that is small."""
    low = np.where(np.abs(OUTLIERS) > 0.5, OUTLIERS, 0)
    product = product_with(with_spectrum(low))
    found = jax.jit(lambda start: single_pass(product, start, 10))(random_start(14))
    assert_pairs(found.pairs, with_spectrum(low), 10, 1e-9)
    assert found.products == 14
    matrix = with_spectrum(low + 0.05 * (OUTLIERS - low))
    found = jax.jit(lambda start: single_pass(product_with(matrix), start, 10))(random_start(20))
    np.testing.assert_allclose(found.pairs.values[:6], largest(matrix, 6), rtol=1e-2)
    rows = as_rows(found.basis)
    np.testing.assert_allclose(rows @ rows.T, np.eye(20), atol=1e-12)


def test_block_krylov_is_rayleigh_ritz_on_its_space(x64):
    matrix, start = with_spectrum(OUTLIERS), random_start(4)
    powers = [as_rows(start).T]
    for _ in range(2):
        powers.append(matrix @ powers[-1])
    q = np.linalg.qr(np.concatenate(powers, axis=1))[0]
    found = jax.jit(lambda start: block_krylov(product_with(matrix), start, 4, depth=3))(start)
    np.testing.assert_allclose(found.pairs.values, largest(q.T @ matrix @ q, 4), rtol=1e-9)
    assert found.products == 12
    rows = as_rows(found.basis)
    np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-12)


def test_block_krylov_beats_subspace_iteration_and_may_fill_the_space(x64):
    matrix = with_spectrum(np.linspace(1, 2, N))
    product, start = product_with(matrix), random_start(5)
    expected = largest(matrix, 3)

    @jax.jit
    def run(start):
        krylov = block_krylov(product, start, 3, depth=5).pairs.values
        simple = subspace_iteration(product, start, 3, passes=5).pairs.values
        return krylov, simple, block_krylov(product, start, 3, depth=50)

    krylov, simple, full = run(start)
    assert (np.abs(krylov - expected) < 0.5 * np.abs(simple - expected)).all()
    np.testing.assert_allclose(full.pairs.values, expected, rtol=1e-10)
    assert full.products == N


def test_adaptive_rank_finds_the_outliers(x64):
    matrix = with_spectrum(OUTLIERS)
    one = jax.tree.map(lambda leaf: leaf[0], random_start(1))
    run = jax.jit(
        lambda key: adaptive_rank(product_with(matrix), one, 30, key, block=5, tolerance=0.02)
    )
    solution = run(jax.random.key(0))
    found = int(solution.products)
    assert 10 <= (found - 1) // 2 <= 20
    np.testing.assert_allclose(solution.pairs.values[:7], largest(matrix, 7), rtol=0.02)
    assert solution.pairs.values.shape == (30,)
    assert solution.pairs.kept.sum() == (found - 1) // 2


def test_adaptive_rank_ends_at_noise(x64):
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
    rng = np.random.default_rng(1)
    values = rng.standard_normal((4, N))
    values[:, :3] = 100
    matrices = [(basis * v) @ basis.T for v in values]
    one = jax.tree.map(lambda leaf: leaf[0], random_start(1))
    settings = {"block": 3, "tolerance": 1e-3, "noise": 1.0}
    run = jax.jit(lambda key: adaptive_rank(sampled(matrices), one, 30, key, **settings))
    solution = run(jax.random.key(0))
    assert solution.pairs.kept.sum() == 6
