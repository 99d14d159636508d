"""Curvature passed back through one layer, and the closed forms, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.factors import positive_curvature as pc

INPUTS, OUTPUTS = 5, 3
pytestmark = pytest.mark.usefixtures("x64")


def psd(n, rank=None, seed=0):
    root = np.random.default_rng([seed, n]).normal(size=(n, rank or n))
    return jnp.asarray(root @ root.T / n)


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def moment_of(kind):
    return normal(INPUTS) if kind == "mean" else psd(INPUTS, 2)


def dense_block(inputs, outputs):
    moment = jnp.outer(inputs, inputs) if inputs.ndim == 1 else inputs
    return np.kron(moment, outputs)  # rows of the weight are the major index


@pytest.mark.parametrize("moment", ["mean", "full"])
@pytest.mark.parametrize("mixing", [1e-4, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("rank", [1, OUTPUTS])
def test_closed_forms_solve_the_dense_system(moment, mixing, rank):
    inputs = moment_of(moment)
    outputs, matrix = psd(OUTPUTS, rank), normal(INPUTS, OUTPUTS)
    block = dense_block(inputs, outputs)
    system = (1 - mixing) * block + mixing * np.eye(len(block))
    expected = np.linalg.solve(system, matrix.ravel()).reshape(matrix.shape)
    found = pc.solve_mixed_kronecker(inputs, outputs, matrix, mixing)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 / mixing)
    found = pc.solve_mixed(outputs, matrix[0], mixing)
    system = (1 - mixing) * outputs + mixing * np.eye(OUTPUTS)
    np.testing.assert_allclose(found, np.linalg.solve(system, matrix[0]), rtol=1e-9)


@pytest.mark.parametrize("moment", ["mean", "full"])
def test_products_equal_the_dense_block(moment):
    inputs, outputs, matrix = moment_of(moment), psd(OUTPUTS), normal(INPUTS, OUTPUTS)
    expected = dense_block(inputs, outputs) @ matrix.ravel()
    found = pc.kronecker_product(inputs, outputs, matrix)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-12)


def test_inputs_of_mean_zero_have_no_curvature():
    matrix = normal(INPUTS, OUTPUTS)
    found = pc.solve_mixed_kronecker(jnp.zeros(INPUTS), psd(OUTPUTS), matrix, 0.5)
    np.testing.assert_allclose(found, 2 * matrix)


def test_a_singular_matrix_of_large_scale_is_factorized_in_float32():
    """Its rounding errors are larger than the share of the identity."""
    matrix = jnp.asarray(1e6 * psd(40, 1), jnp.float32)
    found = pc.solve_mixed(matrix, jnp.ones(40, jnp.float32), 1e-4)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("transform", "expected"), [("abs", [2.0, 3.0]), ("clip", [0.0, 3.0]), ("zero", [0.0, 0.0])]
)
def test_transforms(transform, expected):
    found = pc.make_positive(jnp.array([-2.0, 3.0]), transform)
    assert found.tolist() == expected
    passed = pc.pass_back(
        psd(OUTPUTS), jnp.zeros((2, OUTPUTS)), normal(2), jnp.array([-2.0, 3.0]), transform
    )
    np.testing.assert_allclose(passed, np.diag(expected))


@pytest.mark.parametrize("moment", ["mean", "full"])
def test_curvature_stays_positive_semidefinite(moment):
    slopes = moment_of(moment)
    weight, bend = normal(INPUTS, OUTPUTS), normal(INPUTS, seed=2)
    passed = pc.pass_back(psd(OUTPUTS), weight, slopes, bend, "abs")
    square = np.outer(slopes, slopes) if slopes.ndim == 1 else slopes
    expected = (weight @ psd(OUTPUTS) @ weight.T) * square + np.diag(np.abs(bend))
    np.testing.assert_allclose(passed, expected, rtol=1e-12)
    assert np.linalg.eigvalsh(passed).min() > 0
    assert (passed == passed.T).all()


def test_solves_can_be_mapped_and_keep_float32():
    stack = jnp.stack([psd(OUTPUTS), psd(OUTPUTS, seed=3)]).astype(jnp.float32)
    vectors = normal(2, OUTPUTS).astype(jnp.float32)
    found = jax.vmap(lambda s, v: pc.solve_mixed(s, v, 0.1))(stack, vectors)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[1], pc.solve_mixed(stack[1], vectors[1], 0.1), rtol=1e-5)
