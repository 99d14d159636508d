"""The functions to minimize: starts, minima and gradients that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from benchmarks import functions
from benchmarks.data import DataOptions
from benchmarks.functions import FUNCTIONS
from benchmarks.precision import double_precision
from benchmarks.saddle_points import SADDLES

pytestmark = pytest.mark.usefixtures("x64")

MINIMIZERS = {
    "rosenbrock-2": np.ones(2),
    "rosenbrock-10": np.ones(10),
    "rosenbrock-100": np.ones(100),
    "beale": np.array([3, 0.5]),
    "wood": np.ones(4),
    "powell-singular": np.zeros(4),
}
# Of Moré, Garbow and Hillstrom, ACM TOMS 7 (1981), where they have the function.
START_VALUES = {
    "rosenbrock-2": 24.2,
    "beale": 14.203125,
    "wood": 19192,
    "powell-singular": 215,
}


@pytest.mark.parametrize("name", MINIMIZERS)
def test_classical_minima(name):
    function = FUNCTIONS[name].load(DataOptions()).function
    value, gradient = jax.value_and_grad(function)(jnp.asarray(MINIMIZERS[name], jnp.float64), ())
    assert abs(value) < 1e-28
    assert np.linalg.norm(gradient) < 1e-12
    hessian = jax.hessian(function)(jnp.asarray(MINIMIZERS[name], jnp.float64), ())
    assert np.linalg.eigvalsh(hessian).min() > -1e-9


@pytest.mark.parametrize("name", START_VALUES)
def test_classical_starts(name):
    instance = FUNCTIONS[name].load(DataOptions())
    assert instance.start.dtype == jnp.float64
    value = instance.function(instance.start, ())
    assert float(value) == pytest.approx(START_VALUES[name], rel=1e-14)


def test_rosenbrock_is_that_of_scipy():
    instance = FUNCTIONS["rosenbrock-10"].load(DataOptions())
    np.testing.assert_array_equal(instance.start, np.resize([-1.2, 1], 10))
    value, gradient = jax.value_and_grad(functions.rosenbrock)(instance.start)
    assert float(value) == pytest.approx(scipy.optimize.rosen(instance.start))
    np.testing.assert_allclose(gradient, scipy.optimize.rosen_der(instance.start))


def test_wood_is_the_sum_of_squares_of_the_paper():
    x = np.array([0.3, -1.2, 2.0, 0.7])
    residuals = [
        10 * (x[1] - x[0] ** 2),
        1 - x[0],
        90**0.5 * (x[3] - x[2] ** 2),
        1 - x[2],
        10**0.5 * (x[1] + x[3] - 2),
        10**-0.5 * (x[1] - x[3]),
    ]
    assert float(functions.wood(jnp.asarray(x))) == pytest.approx(np.sum(np.square(residuals)))


@pytest.mark.parametrize("name", ["a9a", "breast-cancer"])
def test_logistic_regression(name, data_folder):
    function, start, (features, signs) = FUNCTIONS[name].load(DataOptions(data_folder))
    assert float(function(start, (features, signs))) == pytest.approx(np.log(2))
    weights = np.random.default_rng(0).standard_normal(start.shape)
    value, gradient = jax.value_and_grad(function)(jnp.asarray(weights), (features, signs))
    margins = np.asarray(signs) * (np.asarray(features) @ weights)
    penalty = 0.5 * weights @ weights / len(margins)
    assert float(value) == pytest.approx(np.mean(np.log1p(np.exp(-margins))) + penalty)
    slopes = -np.asarray(signs) / (1 + np.exp(margins))
    expected = (np.asarray(features).T @ slopes + weights) / len(margins)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)


def test_breast_cancer_is_standardized():
    _, start, (features, signs) = FUNCTIONS["breast-cancer"].load(DataOptions())
    assert start.shape == (30,)
    assert features.shape == (569, 30)
    np.testing.assert_allclose(np.mean(features, axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.var(features, axis=0), 1, rtol=1e-12)
    assert np.sum(np.asarray(signs) == 1) == 357


@pytest.mark.data
def test_a9a(real_data):
    _, start, (features, signs) = FUNCTIONS["a9a"].load(real_data)
    assert start.shape == (123,)
    assert features.shape == (32561, 123)
    assert (np.sum(signs == -1), np.sum(signs == 1)) == (24720, 7841)
    assert np.sum(np.asarray(features)) == 451592


class TestSaddles:
    @pytest.mark.parametrize("name", ["double-well-0", "monkey-0", "factorization-0"])
    def test_exact_saddles_are_stationary(self, name):
        instance = SADDLES[name].load()
        gradient = jax.grad(instance.function)(instance.start, instance.data)
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))

    @pytest.mark.parametrize(
        ("name", "at_most"),
        [
            ("double-well-1-near", 3e-8),
            ("monkey-0-near", 1e-15),
            ("factorization-0-near", 1e-4),
            ("deep-linear-1e-3", 1e-8),
            ("deep-linear-1e-2", 1e-4),
        ],
    )
    def test_near_saddles_are_nearly_stationary(self, name, at_most):
        instance = SADDLES[name].load()
        gradient = jax.grad(instance.function)(instance.start, instance.data)
        if name == "double-well-1-near":
            gradient = gradient[1]  # Across the valley the start is not stationary.
        norm = np.sqrt(sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(gradient)))
        assert 0 < norm <= at_most

    @pytest.mark.parametrize(
        ("name", "minimizer"),
        [("double-well-0", [0, np.sqrt(2)]), ("double-well-1", [0, -np.sqrt(2)])]
        + [("monkey-0", [3 * np.cos(a), 3 * np.sin(a)]) for a in (np.pi / 3, np.pi)],
    )
    def test_minima_in_the_plane(self, name, minimizer):
        saddle, instance = SADDLES[name], SADDLES[name].load()
        point = jnp.asarray(minimizer)
        value, gradient = jax.value_and_grad(instance.function)(point, ())
        assert float(value) == pytest.approx(saddle.minimum)
        assert np.linalg.norm(gradient) < 1e-12
        assert np.linalg.eigvalsh(jax.hessian(instance.function)(point, ())).min() > 0

    def test_monkey_saddle_has_no_hessian(self):
        function = SADDLES["monkey-0"].load().function
        np.testing.assert_array_equal(jax.hessian(function)(jnp.zeros(2), ()), np.zeros((2, 2)))

    def test_factorization_has_minimum_zero(self):
        function, start, matrix = SADDLES["factorization-0"].load()
        assert np.linalg.matrix_rank(matrix) == 4
        assert float(function(start, matrix)) == pytest.approx(15)  # 0.5 (16 + 9 + 4 + 1)
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        best = {"U": left[:, :4] * values[:4], "V": right[:4].T}
        assert float(function(jax.tree.map(jnp.asarray, best), matrix)) < 1e-28

    def test_deep_linear_has_minimum_zero(self):
        function, start, (inputs, targets) = SADDLES["deep-linear-1e-2"].load()
        target, *_ = np.linalg.lstsq(inputs, targets, rcond=None)
        assert [matrix.shape for matrix in start] == [(10, 10)] * 5
        weights = [jnp.asarray(target), *(jnp.eye(10) for _ in range(4))]
        assert float(function(weights, (inputs, targets))) < 1e-26

    def test_starts_are_the_same_each_time(self):
        first, second = (SADDLES["deep-linear-1e-2"].load().start for _ in range(2))
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


def test_double_precision_is_left_as_it_was():
    jax.config.update("jax_enable_x64", False)
    with double_precision():
        assert jnp.zeros(()).dtype == jnp.float64
    assert jnp.zeros(()).dtype == jnp.float32
