"""Moments and products along an axis, against unfolded matrices."""

import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.factors import mode_moment, mode_product


def unfold(tensor, axis):
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


CASES = [(shape, axis) for shape in [(4,), (3, 5), (2, 3, 4)] for axis in range(len(shape))]


@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_moments(x64, shape, axis):
    stack = np.random.default_rng(0).standard_normal((2, *shape))
    found = mode_moment(jnp.asarray(stack), axis)
    expected = [unfold(tensor, axis) @ unfold(tensor, axis).T for tensor in stack]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_products(x64, shape, axis):
    rng = np.random.default_rng(1)
    stack, matrices = rng.standard_normal((2, *shape)), rng.standard_normal((2, shape[axis], 6))
    found = mode_product(jnp.asarray(stack), jnp.asarray(matrices), axis)
    for tensor, matrix, product in zip(stack, matrices, found, strict=True):
        np.testing.assert_allclose(
            unfold(np.asarray(product), axis), matrix.T @ unfold(tensor, axis)
        )
