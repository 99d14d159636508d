"""Eigenpairs, densities, traces and diagonals against dense matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from spectrum_models import KEY, MATRICES, dense, make_batch, make_params, objective_on, parts_of

import secondorder as so


@pytest.fixture(scope="module", autouse=True)
def double():
    """Double precision for all tests of this file, so that what is compiled once is kept."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@functools.cache
def problem(dtype="float64"):
    """Parameters, objective, and both dense matrices, which are always of float64."""
    wide = make_params("float64"), objective_on(make_batch("float64"))
    matrices = {name: dense(wide[1], wide[0], name) for name in MATRICES}
    return make_params(dtype), objective_on(make_batch(dtype)), matrices


@functools.cache
def measure(function, dtype="float64", **settings):
    """What a function of the package finds, compiled."""
    params, objective, _ = problem(dtype)
    return jax.jit(lambda p, k: function(objective, p, k, **settings))(params, KEY)


def rows_of(stack):
    leaves = jax.tree.leaves(stack)
    return np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in leaves], axis=1)


# Eigenpairs.


@pytest.mark.parametrize("matrix", MATRICES)
def test_outermost_eigenpairs(matrix):
    pairs = measure(so.extreme_eigenpairs, largest=3, smallest=2, matrix=matrix)
    exact = problem()[2][matrix]
    values = np.linalg.eigvalsh(exact)
    rows = rows_of(pairs.vectors)
    assert pairs.blocks is None
    np.testing.assert_allclose(rows @ rows.T, np.eye(5), atol=1e-10)
    np.testing.assert_allclose(pairs.values[2:], values[-3:], rtol=1e-9)
    errors = np.linalg.norm(rows @ exact - np.asarray(pairs.values)[:, None] * rows, axis=1)
    np.testing.assert_allclose(pairs.residuals, errors, atol=1e-12)
    if matrix == "hessian":
        assert values[0] < -1e-3
        np.testing.assert_allclose(pairs.values[:2], values[:2], rtol=1e-8)
    else:
        # Of several eigenvectors with the eigenvalue zero, one is found.
        np.testing.assert_allclose(pairs.values[0], 0, atol=1e-10)


def test_residuals_say_whether_the_steps_were_enough():
    exact = np.linalg.eigvalsh(problem()[2]["hessian"])
    few = measure(so.extreme_eigenpairs, largest=2, steps=4)
    assert int(few.steps) == 4
    assert (np.asarray(few.residuals) > 1e-4).all()
    distance = np.min(np.abs(np.asarray(few.values)[:, None] - exact), axis=1)
    assert (distance <= np.asarray(few.residuals)).all()


@pytest.mark.parametrize("matrix", MATRICES)
def test_eigenvalues_of_layers_are_those_of_dense_blocks(matrix):
    pairs = measure(so.extreme_eigenpairs, largest=2, smallest=2, matrix=matrix, blocks="layers")
    params, _, matrices = problem()
    assert pairs.blocks.names == ("in", "out", "scale")
    rows = rows_of(pairs.vectors)
    for block, part in enumerate(parts_of(params, pairs.blocks)):
        exact = matrices[matrix][np.ix_(part, part)]
        values = np.linalg.eigvalsh(exact)
        found = np.asarray(pairs.values[block])
        if len(part) < 4:  # the largest come first
            assert np.isnan(found).tolist() == [False, True, False, False]
            assert not rows[1, part].any()
        np.testing.assert_allclose(found[2:], values[-2:], atol=1e-9)
        np.testing.assert_allclose(found[0], values[0], atol=1e-9)
        for row, value in zip(rows[:, part], found, strict=True):
            if not np.isnan(value):
                np.testing.assert_allclose(exact @ row, value * row, atol=1e-8)


def test_the_ways_to_name_blocks():
    params, objective, matrices = problem()
    layers = so.find_layers(objective, params)
    by_labels = {"in": "first", "out": "rest", "scale": "rest"}
    names = {
        "layers": ("in", "out", "scale"),
        layers: ("in", "out", "scale"),
        (lambda path: path[-1]): ("b", "w", "e"),
        None: None,
    }
    for setting, expected in [*names.items(), (by_labels, ("first", "rest"))]:
        trace = so.curvature_trace(objective, params, KEY, blocks=setting, probes=2)
        assert (trace.blocks and trace.blocks.names) == expected
        assert np.sum(trace.size) == len(matrices["hessian"])
        again = so.curvature_trace(objective, params, KEY, blocks=trace.blocks, probes=2)
        np.testing.assert_array_equal(again.value, trace.value)


def test_float32_is_close():
    for function, settings in [
        (so.extreme_eigenpairs, {"largest": 2}),
        (so.curvature_trace, {"probes": 5, "deflate": 8}),
    ]:
        narrow, wide = measure(function, "float32", **settings), measure(function, **settings)
        value = narrow.values if hasattr(narrow, "values") else narrow.value
        assert value.dtype == jnp.float32
    exact = np.linalg.eigvalsh(problem()[2]["hessian"])
    pairs = measure(so.extreme_eigenpairs, "float32", largest=2)
    np.testing.assert_allclose(pairs.values, exact[-2:], rtol=1e-5)
    np.testing.assert_allclose(narrow.value, np.trace(problem()[2]["hessian"]), atol=4 * wide.error)


# Densities.


def integral(density, power=0):
    grid = np.asarray(density.eigenvalues)
    places = grid if density.threshold is None else np.arcsinh(grid / float(density.threshold))
    return np.trapezoid(np.asarray(density.density) * grid**power, places)


@pytest.mark.parametrize("matrix", MATRICES)
def test_density_has_the_moments_of_the_spectrum(matrix):
    """Up to the noise of the starts; the smoothing adds its variance to the second."""
    density = measure(so.spectral_density, matrix=matrix, probes=100, steps=12)
    exact = problem()[2][matrix]
    size, width = len(exact), float(density.width)
    np.testing.assert_allclose(integral(density), 1, rtol=1e-5)
    nodes, weights = np.asarray(density.nodes), np.asarray(density.weights)
    assert nodes.shape == weights.shape == (100, 12)
    for power in (1, 2):
        of_rule = np.sum(weights * nodes**power)
        extra = width**2 if power == 2 else 0
        np.testing.assert_allclose(integral(density, power), of_rule + extra, rtol=1e-5)
        samples = 100 * np.sum(weights * nodes**power, axis=1)
        error = np.std(samples, ddof=1) / 10
        moment = np.trace(np.linalg.matrix_power(exact, power)) / size
        assert abs(of_rule - moment) < 3 * error


def test_quadrature_with_all_steps_knows_the_moments_of_its_starts():
    """Ghosts of a process of three terms change nothing, nor do probes side by side."""
    settings = {"probes": 3, "steps": 20}
    short = measure(so.spectral_density, **settings)
    full = measure(so.spectral_density, **settings, reorthogonalize=True, parallel_probes=2)
    assert not np.array_equal(short.nodes, full.nodes)
    for power in range(4):
        moments = [
            np.sum(np.asarray(d.weights) * np.asarray(d.nodes) ** power) for d in (short, full)
        ]
        np.testing.assert_allclose(*moments, rtol=1e-9)
    np.testing.assert_allclose(short.density, full.density, atol=0.02 * short.density.max())


def test_logarithmic_density_integrates_to_one():
    linear = measure(so.spectral_density, probes=3, steps=20)
    log = measure(so.spectral_density, probes=3, steps=20, log=True, threshold=1e-3)
    np.testing.assert_array_equal(linear.nodes, log.nodes)
    assert linear.threshold is None
    np.testing.assert_allclose(log.threshold, 1e-3 * np.abs(log.nodes).max(), rtol=1e-12)
    np.testing.assert_allclose(integral(log), 1, rtol=1e-5)
    assert (np.diff(log.eigenvalues) > 0).all()
    # The same part of the spectrum lies below a place between two eigenvalues.
    positive = [np.asarray(d.eigenvalues) > 0.05 for d in (linear, log)]
    shares = [
        np.trapezoid(np.asarray(d.density)[p], c[p])
        for d, p, c in zip(
            (linear, log),
            positive,
            (linear.eigenvalues, np.arcsinh(log.eigenvalues / log.threshold)),
            strict=True,
        )
    ]
    np.testing.assert_allclose(*shares, atol=0.05)


def test_densities_of_layers():
    density = measure(
        so.spectral_density, matrix="gauss_newton", probes=50, steps=8, blocks="layers"
    )
    params, _, matrices = problem()
    assert density.eigenvalues.shape == density.density.shape == (3, 1000)
    assert density.finite.tolist() == [True] * 3
    for block, part in enumerate(parts_of(params, density.blocks)):
        exact = matrices["gauss_newton"][np.ix_(part, part)]
        area = np.trapezoid(density.density[block], density.eigenvalues[block])
        np.testing.assert_allclose(area, 1, rtol=1e-5)
        samples = 50 * np.sum(density.weights[block] * density.nodes[block], axis=-1)
        error = np.std(samples, ddof=1) / 50**0.5
        assert abs(np.mean(samples) - np.trace(exact) / len(part)) < 3 * error + 1e-12
        assert density.nodes[block].max() <= np.linalg.eigvalsh(exact)[-1] * (1 + 1e-9)


def test_density_of_a_multiple_of_the_identity():
    """One eigenvalue, found in one step; and a matrix that is zero."""
    for factor in (2.0, 0.0):
        density = so.spectral_density(lambda p, c=factor: c * jnp.sum(p**2) / 2, jnp.ones(6), KEY)
        assert density.nodes.shape == (4, 6)
        np.testing.assert_allclose(np.sum(density.weights * density.nodes), factor, atol=1e-12)
        np.testing.assert_allclose(integral(density), 1, rtol=1e-5)
        assert density.eigenvalues[0] < factor < density.eigenvalues[-1]


def test_what_is_not_finite_is_said():
    def broken(p):
        return jnp.sum(p**2) / jnp.sum(0 * p)

    density = so.spectral_density(broken, jnp.ones(3), KEY, log=True)
    assert not density.finite
    assert np.isfinite(density.eigenvalues).all()
    assert not np.asarray(density.density).any()
    pairs = so.extreme_eigenpairs(broken, jnp.ones(3), KEY)
    assert np.isnan(pairs.values).all()
    assert int(pairs.steps) == 0
    assert np.isnan(so.curvature_trace(broken, jnp.ones(3), KEY).value)


# Traces and diagonals.


@pytest.mark.parametrize("matrix", MATRICES)
def test_trace_is_within_its_standard_error(matrix):
    plain = measure(so.curvature_trace, matrix=matrix, probes=200)
    better = measure(so.curvature_trace, matrix=matrix, probes=200, deflate=8)
    exact = problem()[2][matrix]
    off_diagonal = exact - np.diag(np.diagonal(exact))
    np.testing.assert_allclose(plain.error, np.sqrt(2 * np.sum(off_diagonal**2) / 200), rtol=0.25)
    assert better.error < 0.5 * plain.error
    for trace in (plain, better):
        assert abs(trace.value - np.trace(exact)) < 3 * trace.error
        assert int(trace.size) == len(exact)


def test_deflating_everything_is_exact():
    matrices = problem()[2]
    size = len(matrices["hessian"])
    trace = measure(so.curvature_trace, probes=2, deflate=size)
    np.testing.assert_allclose(trace.value, np.trace(matrices["hessian"]), rtol=1e-8)
    assert trace.error < 1e-8


def test_traces_of_layers():
    trace = measure(so.curvature_trace, probes=200, deflate=2, blocks="layers")
    params, _, matrices = problem()
    for block, part in enumerate(parts_of(params, trace.blocks)):
        exact = np.trace(matrices["hessian"][np.ix_(part, part)])
        assert abs(trace.value[block] - exact) < 3 * trace.error[block]
        assert trace.size[block] == len(part)


@pytest.mark.parametrize("matrix", MATRICES)
def test_diagonal_is_within_its_standard_error(matrix):
    whole = measure(so.curvature_diagonal, matrix=matrix, probes=200)
    layers = measure(so.curvature_diagonal, matrix=matrix, probes=200, blocks="layers")
    exact = np.diagonal(problem()[2][matrix])
    errors = []
    for estimate in (whole, layers):
        values, error = ravel_pytree(estimate.values)[0], ravel_pytree(estimate.errors)[0]
        scores = np.abs(values - exact) / error
        assert (scores < 4).all()
        assert np.mean(scores < 1) > 0.5
        errors.append(np.linalg.norm(error))
    assert errors[1] < errors[0]


def test_one_probe_has_no_standard_error():
    trace = measure(so.curvature_trace, probes=1)
    assert np.isfinite(trace.value)
    assert np.isnan(trace.error)


# Any objective, any key, any place.


def test_same_key_gives_the_same_numbers():
    params, objective, _ = problem()
    run = jax.jit(lambda p, k: so.curvature_trace(objective, p, k, probes=2).value)
    assert run(params, KEY) == run(params, KEY) != run(params, jax.random.key(4))
    assert run(params, jax.random.PRNGKey(3)) == run(params, KEY)


def test_microbatches_are_the_whole_batch():
    params, _, _ = problem()
    pieces = so.Microbatches.split(objective_on, make_batch("float64"), 4)
    for matrix in MATRICES:
        whole = measure(so.curvature_trace, matrix=matrix, probes=200)
        found = jax.jit(
            lambda p, m=matrix: so.curvature_trace(pieces, p, KEY, matrix=m, probes=200)
        )(params)
        np.testing.assert_allclose(found.value, whole.value, rtol=1e-9)
