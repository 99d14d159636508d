"""Symmetric matrices on vectors that are pytrees, and their eigenpairs by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from secondorder.solvers import without_samples

SHAPES = {"a": (4, 6), "b": (15,), "c": ()}
CUTS = [24, 39]
N = 40


def as_stack(rows, dtype=jnp.float64):
    """Vectors that are rows of an array, as a stack of pytrees."""
    parts = np.split(np.asarray(rows), CUTS, axis=1)
    return {
        name: jnp.asarray(part.reshape(len(part), *shape), dtype)
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }


def as_rows(stack):
    return np.concatenate(
        [np.asarray(leaf, float).reshape(len(leaf), -1) for leaf in stack.values()], 1
    )


def with_spectrum(values, seed=0):
    """A dense matrix of given eigenvalues."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((N, N)))[0]
    return (basis * values) @ basis.T


def random_start(size, seed=1, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return as_stack(np.linalg.qr(rng.standard_normal((N, size)))[0].T, dtype)


def product_with(matrix, dtype=jnp.float64):
    """Products with all vectors of a stack."""
    matrix = jnp.asarray(matrix, dtype)

    def product(stack):
        size = len(stack["c"])
        flat = jnp.concatenate([leaf.reshape(size, -1) for leaf in stack.values()], axis=1)
        parts = jnp.split(jnp.matmul(flat, matrix, precision="highest"), CUTS, axis=1)
        return {
            name: part.reshape(size, *shape)
            for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
        }

    return without_samples(product)


def largest(matrix, rank):
    """The eigenvalues of largest magnitude, by decreasing magnitude."""
    values = np.linalg.eigvalsh(matrix)
    return values[np.argsort(-np.abs(values))][:rank]


def assert_pairs(pairs, matrix, rank, rtol, dtype=jnp.float64):
    """They are eigenpairs of the matrix, and those of largest magnitude."""
    expected = largest(matrix, rank)
    np.testing.assert_allclose(pairs.values, expected, rtol=rtol)
    rows = as_rows(pairs.vectors)
    error = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(rows @ rows.T, np.eye(rank), atol=error)
    residuals = rows @ matrix - np.asarray(pairs.values, float)[:, None] * rows
    bound = np.sqrt(rtol) * np.abs(expected[0])
    assert np.linalg.norm(residuals, axis=1).max() < bound
    assert {leaf.dtype for leaf in jax.tree.leaves(pairs)} == {jnp.dtype(dtype), jnp.dtype(bool)}
