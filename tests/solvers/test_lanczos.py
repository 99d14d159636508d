"""Lanczos' process and the eigenpairs that it finds, against dense matrices in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from secondorder.solvers import lanczos, ritz_pairs
from secondorder.tree import Blocks, block_combine
from tests.meshes import make_mesh, place, use_mesh

SHAPES = {"a": (3, 4), "b": (5,), "c": ()}
N = 18
EPS = {jnp.float32: 1e-6, jnp.float64: 1e-14}
BLOCKS = Blocks(("a", "bc"), (0, 1, 1))
PARTS = slice(0, 12), slice(12, 18)


def as_tree(vector, dtype):
    parts = np.split(np.asarray(vector), [12, 17])
    return {
        name: jnp.asarray(part.reshape(shape), dtype)
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }


def as_rows(stack):
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in stack.values()], 1)


def multiply(matrix, tree):
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in tree.values()])
    parts = jnp.split(jnp.matmul(matrix, flat, precision="highest"), [12, 17])
    return {
        name: jnp.reshape(part, shape)
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }


@functools.partial(jax.jit, static_argnames=("size", "blocks", "reorthogonalize", "keep_vectors"))
def run(matrix, start, size, **settings):
    return lanczos(functools.partial(multiply, matrix), start, size, **settings)


diagonalize = jax.jit(ritz_pairs)


def symmetric(rng, values):
    basis = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    return (basis * values) @ basis.T


def tridiagonal(alphas, betas):
    inside = np.diag(np.asarray(betas)[:-1], 1)
    return np.diag(np.asarray(alphas)) + inside + inside.T


@pytest.fixture(params=[jnp.float32, jnp.float64], ids=["float32", "float64"])
def dtype(request, x64):
    return request.param


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_matrix_is_tridiagonal_in_the_basis(dtype, reorthogonalize):
    rng = np.random.default_rng(0)
    matrix, start = symmetric(rng, np.linspace(-2, 3, N)), rng.standard_normal(N)
    result = run(
        jnp.asarray(matrix, dtype), as_tree(start, dtype), 6, reorthogonalize=reorthogonalize
    )
    rows, eps = as_rows(result.vectors), EPS[dtype]
    assert int(result.steps) == 6
    assert bool(result.finite)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.vectors)} == {jnp.dtype(dtype)}
    assert result.alphas.dtype == result.betas.dtype == dtype
    np.testing.assert_allclose(rows[0], start / np.linalg.norm(start), atol=eps)
    np.testing.assert_allclose(rows @ rows.T, np.eye(6), atol=20 * eps)
    expected = tridiagonal(result.alphas, result.betas)
    np.testing.assert_allclose(rows @ matrix @ rows.T, expected, atol=20 * eps)
    residual = matrix @ rows[-1] - rows.T @ expected[-1]
    np.testing.assert_allclose(np.linalg.norm(residual), result.betas[-1], atol=20 * eps)


def test_two_vectors_give_the_same_matrix(x64):
    rng = np.random.default_rng(1)
    matrix = jnp.asarray(symmetric(rng, np.linspace(-2, 3, N)))
    start = as_tree(rng.standard_normal(N), jnp.float64)
    kept = run(matrix, start, 6)
    short = run(matrix, start, 6, reorthogonalize=False, keep_vectors=False)
    assert short.vectors is None
    np.testing.assert_allclose(short.alphas, kept.alphas, atol=1e-12)
    np.testing.assert_allclose(short.betas, kept.betas, atol=1e-12)


def test_all_eigenpairs_after_as_many_steps_as_dimensions(dtype):
    """And none that is not there, although there are more steps than dimensions."""
    rng = np.random.default_rng(2)
    matrix = symmetric(rng, np.linspace(-2, 3, N))
    result = run(jnp.asarray(matrix, dtype), as_tree(rng.standard_normal(N), dtype), 21)
    ritz, eps = diagonalize(result), EPS[dtype]
    steps = int(result.steps)
    assert steps == N or dtype == jnp.float32  # where rounding may go on for a step
    assert steps <= 19
    assert ritz.valid.tolist() == [i < steps for i in range(21)]
    values = np.asarray(ritz.values)[:steps]
    assert (np.diff(values) >= 0).all()
    np.testing.assert_allclose(values[:3], np.linspace(-2, 3, N)[:3], atol=20 * eps)
    np.testing.assert_allclose(values[-3:], np.linspace(-2, 3, N)[-3:], atol=20 * eps)
    vectors = np.asarray(ritz.coefficients).T @ as_rows(result.vectors)
    for pair in range(3):
        error = matrix @ vectors[pair] - values[pair] * vectors[pair]
        assert np.linalg.norm(error) < 20 * eps
    assert not vectors[steps:].any()


def test_residuals_are_those_of_the_pairs(x64):
    rng = np.random.default_rng(3)
    matrix = symmetric(rng, np.linspace(-2, 3, N))
    result = run(jnp.asarray(matrix), as_tree(rng.standard_normal(N), jnp.float64), 7)
    ritz = diagonalize(result)
    vectors = np.asarray(ritz.coefficients).T @ as_rows(result.vectors)
    errors = vectors @ matrix - np.asarray(ritz.values)[:, None] * vectors
    np.testing.assert_allclose(np.linalg.norm(errors, axis=1), ritz.residuals, atol=1e-13)


def test_orthogonality_survives_convergence(dtype):
    """Outlying eigenvalues converge early; three terms alone find them again, as ghosts."""
    rng = np.random.default_rng(4)
    values = np.r_[np.linspace(1, 2, N - 2), 1e4, 2e4]
    matrix = jnp.asarray(symmetric(rng, values), dtype)
    start = as_tree(rng.standard_normal(N), dtype)
    full, short = (run(matrix, start, 16, reorthogonalize=full) for full in (True, False))
    gram = as_rows(full.vectors) @ as_rows(full.vectors).T
    np.testing.assert_allclose(gram, np.eye(16), atol=20 * EPS[dtype])
    assert (np.asarray(diagonalize(full).values) > 1e3).sum() == 2
    assert (np.asarray(diagonalize(short).values) > 1e3).sum() > 2


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_invariant_space_ends_the_process(x64, reorthogonalize):
    """The start has two eigenvalues, one of them zero."""
    values = np.repeat([0.0, 2.0, 5.0], 6)
    start = as_tree(np.where(values < 5, 1.0, 0.0), jnp.float64)
    result = run(
        jnp.asarray(np.diag(values), jnp.float64), start, 5, reorthogonalize=reorthogonalize
    )
    assert int(result.steps) == 2
    assert bool(result.finite)
    assert not np.asarray(result.alphas)[2:].any()
    assert not np.asarray(result.betas)[1:].any()
    assert not as_rows(result.vectors)[2:].any()
    ritz = diagonalize(result)
    np.testing.assert_allclose(ritz.values, [0, 2, 0, 0, 0], atol=1e-6)
    assert not np.asarray(ritz.residuals).any()
    np.testing.assert_allclose(ritz.coefficients[0] ** 2, [0.5, 0.5, 0, 0, 0], atol=1e-6)


def test_quadrature_is_exact_for_polynomials(x64):
    """The first rows of the eigenvectors weigh moments up to the degree 2 k - 1."""
    rng = np.random.default_rng(5)
    matrix, start = symmetric(rng, np.linspace(-1, 1, N)), rng.standard_normal(N)
    ritz = diagonalize(run(jnp.asarray(matrix), as_tree(start, jnp.float64), 4, keep_vectors=False))
    weights = np.asarray(ritz.coefficients[0]) ** 2
    unit = start / np.linalg.norm(start)
    for degree in range(8):
        exact = unit @ np.linalg.matrix_power(matrix, degree) @ unit
        np.testing.assert_allclose(weights @ np.asarray(ritz.values) ** degree, exact, atol=1e-13)


def test_blocks_run_in_lockstep(dtype):
    """Each as if it were alone, although one of them ends before the others."""
    rng = np.random.default_rng(6)
    first = symmetric(rng, np.repeat([1.0, 2.0, 4.0], 4))
    second = symmetric(rng, np.linspace(-1, 1, 6))
    matrix, start = np.zeros((N, N)), rng.standard_normal(N)
    matrix[PARTS[0], PARTS[0]], matrix[PARTS[1], PARTS[1]] = first, second
    result = run(jnp.asarray(matrix, dtype), as_tree(start, dtype), 5, blocks=BLOCKS)
    assert result.steps.tolist() == [3, 5]
    ritz = diagonalize(result)
    assert ritz.coefficients.shape == (2, 5, 5)
    np.testing.assert_allclose(ritz.values[0, :3], [1, 2, 4], atol=20 * EPS[dtype])
    for block, (part, exact) in enumerate(zip(PARTS, (first, second), strict=True)):
        rows = as_rows(result.vectors)[: result.steps[block], part]
        expected = tridiagonal(result.alphas[block], result.betas[block])
        np.testing.assert_allclose(
            rows @ exact @ rows.T, expected[: len(rows), : len(rows)], atol=20 * EPS[dtype]
        )
    largest = jnp.stack([ritz.coefficients[0, :, 2], ritz.coefficients[1, :, 4]])
    vector = as_rows(
        jax.tree.map(lambda x: x[None], block_combine(BLOCKS, largest, result.vectors))
    )
    for part in PARTS:
        np.testing.assert_allclose(np.linalg.norm(vector[0, part]), 1, atol=10 * EPS[dtype])


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_start_that_is_no_direction_gives_no_vectors(value):
    start = as_tree(np.full(N, value), jnp.float32)
    result = run(jnp.eye(N), start, 3)
    assert int(result.steps) == 0
    assert bool(result.finite) == (value == 0)
    assert not as_rows(result.vectors).any()
    ritz = diagonalize(result)
    assert not np.asarray(ritz.valid).any()
    assert all(np.isfinite(leaf).all() for leaf in ritz)


def test_a_product_that_is_not_finite_ends_the_process():
    """The vector is left out whose product it was, and the other block goes on."""
    rng = np.random.default_rng(7)
    matrix = np.zeros((N, N))
    matrix[PARTS[0], PARTS[0]] = symmetric(rng, np.linspace(1, 2, 12))
    matrix[PARTS[1], PARTS[1]] = symmetric(rng, np.linspace(1, 2, 6))
    start = as_tree(rng.standard_normal(N), jnp.float32)
    good = run(jnp.asarray(matrix, jnp.float32), start, 4, blocks=BLOCKS)
    marked = good.vectors["a"][2]

    @jax.jit
    def broken(start):
        def product(tree):
            image = multiply(jnp.asarray(matrix, jnp.float32), tree)
            hit = jnp.abs(jnp.sum(tree["a"] * marked)) > 0.99
            return image | {"a": jnp.where(hit, jnp.nan, image["a"])}

        return lanczos(product, start, 4, blocks=BLOCKS)

    result, first_two = broken(start), np.arange(4) < 2
    assert result.steps.tolist() == [2, 4]
    assert result.finite.tolist() == [False, True]
    np.testing.assert_allclose(result.alphas[0], good.alphas[0] * first_two, atol=1e-5)
    np.testing.assert_allclose(result.betas[0], good.betas[0] * first_two, atol=1e-5)
    np.testing.assert_allclose(result.alphas[1], good.alphas[1], atol=1e-5)
    assert np.isfinite(as_rows(result.vectors)).all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_nothing_is_compared_with_an_absolute_number(scale):
    rng = np.random.default_rng(8)
    matrix, start = symmetric(rng, np.linspace(-2, 3, N)), rng.standard_normal(N)
    plain, scaled = (
        run(jnp.asarray(c * matrix, jnp.float32), as_tree(c * start, jnp.float32), 5)
        for c in (1.0, scale)
    )
    assert int(scaled.steps) == 5
    np.testing.assert_allclose(scaled.alphas / scale, plain.alphas, atol=1e-5)
    np.testing.assert_allclose(as_rows(scaled.vectors), as_rows(plain.vectors), atol=1e-4)


@pytest.mark.skipif(jax.device_count() < 8, reason="XLA_FLAGS asks for fewer host devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharding_changes_nothing(kind):
    mesh = make_mesh(4, 2, names=("x", "y"), kind=kind)
    specs = {"w": PartitionSpec("x", "y"), "v": PartitionSpec("y"), "s": PartitionSpec()}
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 4), "v": (6,), "s": ()}
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    scale = {n: (np.abs(rng.standard_normal(s)) + 0.5).astype("f") for n, s in shapes.items()}
    blocks = Blocks(("s", "vw"), (0, 1, 1))

    def find(start, scale):
        result = lanczos(lambda v: jax.tree.map(jnp.multiply, scale, v), start, 5, blocks=blocks)
        return result, ritz_pairs(result)

    def put(tree):
        return {name: place(mesh, leaf, *specs[name]) for name, leaf in tree.items()}

    expected, expected_ritz = jax.jit(find)(start, scale)
    with use_mesh(mesh):
        found, ritz = jax.jit(find)(put(start), put(scale))
        assert found.steps.tolist() == expected.steps.tolist() == [1, 5]
        np.testing.assert_allclose(ritz.values, expected_ritz.values, atol=1e-5)
        for name in shapes:
            np.testing.assert_allclose(found.vectors[name], expected.vectors[name], atol=1e-4)
            if kind == AxisType.Explicit:
                assert found.vectors[name].sharding.spec == PartitionSpec(None, *specs[name])


def test_size_must_be_a_count():
    for size in (0, 2.0, True):
        with pytest.raises(ValueError, match="`size` must be"):
            lanczos(lambda v: v, jnp.ones(2), size)
