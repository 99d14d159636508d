"""Bases of eigenvectors: from decompositions, and following by orthogonal iterations."""

import jax
import jax.numpy as jnp
import numpy as np

from secondorder.factors import eigenbases, follow_bases


def moments(seed, n=6, count=3):
    """Matrices with eigenvalues that are well apart."""
    rng = np.random.default_rng(seed)
    bases = [np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(count)]
    return np.stack([(basis * 3.0 ** -np.arange(n)) @ basis.T for basis in bases]), np.stack(bases)


def assert_same_columns(found, expected, atol):
    """Up to signs."""
    overlaps = np.einsum("sij,sik->sjk", found, expected)
    np.testing.assert_allclose(
        np.abs(overlaps), np.tile(np.eye(overlaps.shape[-1]), (len(overlaps), 1, 1)), atol=atol
    )


def test_eigenbases_are_sorted(x64):
    matrices, expected = moments(0)
    found, failed = eigenbases(jnp.asarray(matrices), jnp.zeros_like(matrices))
    assert not failed.any()
    assert_same_columns(found, expected, 1e-10)


def test_iterations_converge_to_the_eigenvectors(x64):
    matrices, expected = moments(1)
    follow = jax.jit(follow_bases)
    bases = jnp.tile(jnp.eye(6), (3, 1, 1))
    for _ in range(60):
        bases, _, failed = follow(jnp.asarray(matrices), bases)
        assert not failed.any()
        np.testing.assert_allclose(
            jnp.einsum("sij,sik->sjk", bases, bases), jnp.tile(jnp.eye(6), (3, 1, 1)), atol=1e-12
        )
    assert_same_columns(bases, expected, 1e-8)


def test_sorting_follows_the_columns(x64):
    """Eigenvectors in another order stay what they are, and the order says which is which."""
    matrices, expected = moments(2)
    shuffled = np.array([3, 0, 5, 1, 2, 4])
    bases, order, _ = follow_bases(jnp.asarray(matrices), jnp.asarray(expected[:, :, shuffled]))
    assert_same_columns(bases, expected, 1e-10)
    np.testing.assert_array_equal(shuffled[order], np.tile(np.arange(6), (3, 1)))


def test_singular_matrices_have_orthonormal_bases():
    matrices = jnp.zeros((2, 4, 4)).at[0, 1, 1].set(1.0)
    bases, _, failed = follow_bases(matrices, jnp.tile(jnp.eye(4), (2, 1, 1)))
    assert not failed.any()
    np.testing.assert_allclose(bases[0, :, 0] ** 2, [0, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(
        jnp.einsum("sij,sik->sjk", bases, bases), jnp.tile(jnp.eye(4), (2, 1, 1)), atol=1e-6
    )


def test_what_is_not_finite_keeps_its_basis():
    matrices, expected = moments(3)
    matrices[1, 2, 2] = np.inf
    previous = jnp.float32(expected[:, :, ::-1])
    bases, order, failed = follow_bases(jnp.float32(matrices), previous)
    assert failed.tolist() == [False, True, False]
    np.testing.assert_array_equal(bases[1], previous[1])
    np.testing.assert_array_equal(order[1], np.arange(6))
    assert_same_columns(bases[::2], expected[::2], 1e-4)
    bases, failed = eigenbases(jnp.float32(matrices), previous)
    assert failed.tolist() == [False, True, False]
    np.testing.assert_array_equal(bases[1], previous[1])
