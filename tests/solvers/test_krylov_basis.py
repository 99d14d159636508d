"""Orthonormal bases of Krylov spaces against NumPy, in single and double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.solvers import krylov_basis, whitening

SHAPES = {"a": (3, 4), "b": (5,), "c": ()}
N = 18
EPS = {jnp.float32: 1e-6, jnp.float64: 1e-14}


def as_tree(vector, dtype):
    parts = np.split(np.asarray(vector), [12, 17])
    return {
        name: jnp.asarray(part.reshape(shape), dtype)
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }


def as_rows(stack):
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in stack.values()], 1)


def as_vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in tree.values()])


def product_with(matrix, dtype):
    matrix = jnp.asarray(matrix, dtype)

    def product(tree):
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in tree.values()])
        parts = jnp.split(jnp.matmul(matrix, flat, precision="highest"), [12, 17])
        return {
            name: jnp.reshape(part, shape)
            for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
        }

    return product


def symmetric(rng, spread=3.0, signs=False):
    basis = np.linalg.qr(rng.standard_normal((N, N)))[0]
    values = 10 ** np.linspace(-spread, 0, N)
    return (basis * (values * (rng.choice([-1, 1], N) if signs else 1))) @ basis.T


def span_error(rows, others):
    """How far the rows of one are from the span of the other's."""
    q = np.linalg.qr(others.T)[0]
    return np.abs(rows.T - q @ (q.T @ rows.T)).max()


def krylov_vectors(matrix, start, size):
    """Normalized one by one, and orthogonalized by QR, as powers alone lose all digits."""
    rows = [start / np.linalg.norm(start)]
    for _ in range(size - 1):
        q = np.linalg.qr(np.stack(rows).T)[0]
        new = matrix @ rows[-1]
        new -= q @ (q.T @ new)
        new -= q @ (q.T @ new)
        rows.append(new / np.linalg.norm(new))
    return np.stack(rows)


@pytest.fixture(params=[jnp.float32, jnp.float64], ids=["float32", "float64"])
def dtype(request, x64):
    return request.param


@pytest.mark.parametrize("signs", [False, True], ids=["definite", "indefinite"])
@pytest.mark.parametrize("seed", range(2))
def test_basis_is_orthonormal_and_projects_the_matrix(dtype, seed, signs):
    rng = np.random.default_rng(seed)
    matrix, start, last = symmetric(rng, signs=signs), *rng.standard_normal((2, N))
    diagonal = rng.uniform(0.1, 2, N)
    basis = jax.jit(
        lambda v, m, e: krylov_basis(product_with(matrix, dtype), v, 6, preconditioner=m, extra=e)
    )(*(as_tree(x, dtype) for x in (start, diagonal, last)))
    rows, eps = as_rows(basis.vectors), EPS[dtype]
    assert basis.used.all()
    assert basis.finite
    assert rows.shape == (7, N)
    assert {leaf.dtype for leaf in jax.tree.leaves(basis.vectors)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(rows @ rows.T, np.eye(7), atol=5 * eps)
    np.testing.assert_allclose(basis.projected, rows @ matrix @ rows.T, atol=5 * eps)
    assert (np.asarray(basis.projected) == np.asarray(basis.projected).T).all()
    # The spaces are nested, those of the exact process, and the extra vector is in the last.
    expected = krylov_vectors(matrix / diagonal[:, None], start / diagonal, 6)
    for size in range(1, 7):
        assert span_error(rows[:size], expected[:size]) < 1e4 * eps
    assert span_error(last[None] / np.linalg.norm(last), rows) < 10 * eps


def test_basis_stays_orthonormal_where_lanczos_does_not(dtype):
    """Outlying eigenvalues converge early; three terms alone would then find them again."""
    rng = np.random.default_rng(0)
    matrix = symmetric(rng, spread=0.5) + 1e5 * np.diag(np.arange(N) < 2)
    basis = krylov_basis(product_with(matrix, dtype), as_tree(rng.standard_normal(N), dtype), 16)
    rows = as_rows(basis.vectors)[np.asarray(basis.used)]
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=20 * EPS[dtype])


def test_more_vectors_than_dimensions(dtype):
    rng = np.random.default_rng(1)
    matrix = symmetric(rng, spread=1.0)
    extra = as_tree(rng.standard_normal(N), dtype)
    basis = krylov_basis(
        product_with(matrix, dtype), as_tree(rng.standard_normal(N), dtype), 25, extra=extra
    )
    rows, used = as_rows(basis.vectors), np.asarray(basis.used)
    assert used.sum() == N
    assert used[:10].all()
    assert not rows[~used].any()
    assert not np.asarray(basis.projected)[~used].any()
    np.testing.assert_allclose(rows @ rows.T, np.diag(used), atol=20 * EPS[dtype])


def test_invariant_space_ends_the_process_but_not_the_extra_vector(dtype):
    """The start has two eigenvalues; a third vector would be in their span."""
    values = np.repeat([1.0, 2.0, 5.0], 6)
    start = as_tree(np.where(values < 5, 1.0, 0.0), dtype)
    extra = as_tree(np.arange(N) + 1.0, dtype)
    basis = krylov_basis(product_with(np.diag(values), dtype), start, 5, extra=extra)
    assert basis.used.tolist() == [True, True, False, False, False, True]
    assert basis.finite


@pytest.mark.parametrize("extra", [None, 0.0], ids=["none", "zero"])
def test_zero_start_gives_no_vectors(extra):
    zero = as_tree(np.zeros(N), jnp.float32)
    basis = krylov_basis(
        product_with(np.eye(N), jnp.float32), zero, 3, extra=None if extra is None else zero
    )
    assert not basis.used.any()
    assert basis.finite
    assert not as_rows(basis.vectors).any()


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_product_that_is_not_finite_ends_the_process(bad, value):
    """Its vector is left out; those before it and the extra one stay."""
    rng = np.random.default_rng(2)
    matrix, start = symmetric(rng), rng.standard_normal(N)
    good = krylov_basis(product_with(matrix, jnp.float32), as_tree(start, jnp.float32), 4)
    marked = as_vector(jax.tree.map(lambda rows: rows[bad], good.vectors))

    def product(tree):
        image = product_with(matrix, jnp.float32)(tree)
        same = jnp.abs(jnp.vdot(as_flat(tree), jnp.asarray(marked))) > 0.999
        return image | {"c": jnp.where(same, value, image["c"])}

    extra = as_tree(rng.standard_normal(N), jnp.float32)
    basis = krylov_basis(product, as_tree(start, jnp.float32), 4, extra=extra)
    assert not basis.finite
    assert basis.used.tolist() == [k < bad for k in range(4)] + [True]
    assert np.isfinite(as_rows(basis.vectors)).all()
    assert np.isfinite(basis.projected).all()
    np.testing.assert_allclose(basis.projected[:bad, :bad], good.projected[:bad, :bad], atol=1e-5)


def as_flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in tree.values()])


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_nothing_is_compared_with_an_absolute_number(scale):
    rng = np.random.default_rng(3)
    matrix, start = symmetric(rng, signs=True), rng.standard_normal(N)
    plain, scaled = (
        krylov_basis(product_with(c * matrix, jnp.float32), as_tree(c * start, jnp.float32), 5)
        for c in (1.0, scale)
    )
    np.testing.assert_allclose(as_rows(scaled.vectors), as_rows(plain.vectors), atol=1e-4)
    np.testing.assert_allclose(scaled.projected / scale, plain.projected, atol=1e-5)


def test_size_must_be_a_count():
    for size in (0, 2.0, True):
        with pytest.raises(ValueError, match="`size` must be"):
            krylov_basis(lambda v: v, jnp.ones(2), size)


# Coordinates in which the matrix is the identity.


def test_whitening(dtype):
    rng = np.random.default_rng(4)
    matrix = symmetric(rng, spread=2.0)
    transform, values = jax.jit(whitening, static_argnums=1)(jnp.asarray(matrix, dtype), 1e-4)
    assert transform.dtype == values.dtype == dtype
    np.testing.assert_allclose(transform.T @ matrix @ transform, np.eye(N), atol=300 * EPS[dtype])
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix), atol=10 * EPS[dtype])


def test_whitening_floors_eigenvalues(x64):
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    matrix = (basis * [2.0, 1e-3, 0.0, -4.0]) @ basis.T
    transform, values = whitening(jnp.asarray(matrix), 0.1)
    np.testing.assert_allclose(values, [-4.0, 0.0, 1e-3, 2.0], atol=1e-12)
    inverse = transform @ transform.T
    np.testing.assert_allclose(inverse, (basis / [2.0, 0.4, 0.4, 0.4]) @ basis.T, rtol=1e-9)


def test_whitening_of_zero_is_the_identity():
    transform, values = whitening(jnp.zeros((3, 3)), 1e-4)
    np.testing.assert_array_equal(np.abs(transform), np.eye(3))
    assert not values.any()
