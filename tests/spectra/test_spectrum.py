"""Eigenpairs, densities, traces and diagonals against dense matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import secondorder as so
from secondorder.spectra.curvature import make_curvature
from tests.spectra.spectrum_models import (
    KEY,
    MATRICES,
    dense,
    make_batch,
    make_params,
    objective_on,
    parts_of,
)


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


def blocks_of(matrix, blocks):
    """The indices of each block, and the dense block."""
    params, _, matrices = problem()
    return [(part, matrices[matrix][np.ix_(part, part)]) for part in parts_of(params, blocks)]


def rows_of(stack):
    leaves = jax.tree.leaves(stack)
    return np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in leaves], axis=1)


# Eigenpairs.


def test_outermost_eigenpairs():
    pairs = measure(so.extreme_eigenpairs, largest=3, smallest=2)
    exact = problem()[2]["hessian"]
    values = np.linalg.eigvalsh(exact)
    rows = rows_of(pairs.vectors)
    assert pairs.blocks is None
    assert values[0] < -1e-3
    np.testing.assert_allclose(pairs.values, values[[0, 1, -3, -2, -1]], rtol=1e-8)
    np.testing.assert_allclose(rows @ rows.T, np.eye(5), atol=1e-10)
    errors = np.linalg.norm(rows @ exact - np.asarray(pairs.values)[:, None] * rows, axis=1)
    np.testing.assert_allclose(pairs.residuals, errors, atol=1e-12)


def test_residuals_say_whether_the_steps_were_enough():
    exact = np.linalg.eigvalsh(problem()[2]["hessian"])
    few = measure(so.extreme_eigenpairs, largest=2, steps=4)
    assert int(few.steps) == 4
    assert (np.asarray(few.residuals) > 1e-4).all()
    distance = np.min(np.abs(np.asarray(few.values)[:, None] - exact), axis=1)
    assert (distance <= np.asarray(few.residuals)).all()


def test_eigenvalues_in_float32():
    pairs = measure(so.extreme_eigenpairs, "float32", largest=2)
    assert pairs.values.dtype == pairs.vectors["out"]["w"].dtype == jnp.float32
    exact = np.linalg.eigvalsh(problem()[2]["hessian"])
    np.testing.assert_allclose(pairs.values, exact[-2:], rtol=1e-5)
    assert (np.asarray(pairs.residuals) < 1e-5 * exact[-1]).all()


def test_eigenvalues_of_layers_are_those_of_dense_blocks():
    pairs = measure(so.extreme_eigenpairs, largest=2, smallest=1, blocks="layers")
    assert pairs.blocks.names == ("in", "out")
    rows = rows_of(pairs.vectors)
    for block, (part, exact) in enumerate(blocks_of("hessian", pairs.blocks)):
        values = np.linalg.eigvalsh(exact)
        np.testing.assert_allclose(pairs.values[block], values[[0, -2, -1]], atol=1e-9)
        for row, value in zip(rows[:, part], pairs.values[block], strict=True):
            np.testing.assert_allclose(exact @ row, value * row, atol=1e-8)


def test_a_block_with_too_few_eigenvalues_has_the_largest():
    """And NaN for the others: of a small block, and of a matrix of low rank."""
    scale = {"a": jnp.arange(1.0, 7.0), "b": jnp.array([2.0, 3.0]), "c": jnp.full(5, 4.0)}

    def quadratic(p):
        return sum(jnp.sum(scale[name] * p[name] ** 2) / 2 for name in scale)

    pairs = so.extreme_eigenpairs(
        quadratic, scale, KEY, largest=2, smallest=1, blocks=lambda path: path
    )
    assert pairs.steps.tolist() == [6, 2, 1]
    expected = [[1, 5, 6], [np.nan, 2, 3], [np.nan, np.nan, 4]]
    np.testing.assert_allclose(pairs.values, expected, rtol=1e-12)
    assert np.isnan(pairs.residuals).tolist() == np.isnan(expected).tolist()
    assert not pairs.vectors["c"][:2].any()


def test_the_ways_to_name_blocks():
    params, objective, _ = problem()
    layers = so.find_layers(objective, params)
    whole = make_curvature("test", objective, params, "hessian", None)
    assert whole.named_blocks is None
    for setting, names in [
        ("layers", ("in", "out")),
        (layers, ("in", "out")),
        (lambda path: path[-1], ("b", "w")),
        ({"in": "all", "out": "all"}, ("all",)),
    ]:
        curvature = make_curvature("test", objective, params, "hessian", setting)
        assert curvature.named_blocks.names == names
        assert sum(curvature.sizes) == whole.sizes[0]
        again = make_curvature("test", objective, params, "hessian", curvature.blocks)
        assert again.blocks == curvature.blocks


# Densities.

DENSITY = {"probes": 100, "steps": 12}


def integral(density, power=0):
    grid = np.asarray(density.eigenvalues)
    places = grid if density.threshold is None else np.arcsinh(grid / float(density.threshold))
    return np.trapezoid(np.asarray(density.density) * grid**power, places)


def assert_is_moment(nodes, weights, power, exact):
    """The mean over starts is that of the spectrum, within three standard errors."""
    samples = len(nodes) * np.sum(weights * nodes**power, axis=1)
    error = np.std(samples, ddof=1) / len(nodes) ** 0.5
    moment = np.trace(np.linalg.matrix_power(exact, power)) / len(exact)
    assert abs(np.mean(samples) - moment) < 3 * error + 1e-12
    assert error < 0.2 * (np.trace(exact @ exact) / len(exact)) ** (power / 2)


def test_density_has_the_moments_of_the_spectrum():
    """The smoothing adds its variance to the second."""
    density = measure(so.spectral_density, **DENSITY)
    assert density.nodes.shape == density.weights.shape == (100, 12)
    np.testing.assert_allclose(integral(density), 1, rtol=1e-5)
    nodes, weights = np.asarray(density.nodes), np.asarray(density.weights)
    for power in (1, 2):
        assert_is_moment(nodes, weights, power, problem()[2]["hessian"])
        extra = float(density.width) ** 2 if power == 2 else 0
        of_rule = np.sum(weights * nodes**power)
        np.testing.assert_allclose(integral(density, power), of_rule + extra, rtol=1e-5)


def test_densities_of_layers():
    settings = {"matrix": "gauss_newton", "blocks": "layers", **DENSITY}
    density = measure(so.spectral_density, **settings)
    assert density.eigenvalues.shape == density.density.shape == (2, 1000)
    assert density.finite.tolist() == [True] * 2
    nodes, weights = np.asarray(density.nodes), np.asarray(density.weights)
    for block, (_, exact) in enumerate(blocks_of("gauss_newton", density.blocks)):
        area = np.trapezoid(density.density[block], density.eigenvalues[block])
        np.testing.assert_allclose(area, 1, rtol=1e-5)
        for power in (1, 2):
            assert_is_moment(nodes[block], weights[block], power, exact)
        assert nodes[block].max() <= np.linalg.eigvalsh(exact)[-1] * (1 + 1e-9)
        assert nodes[block].min() > -1e-9


def test_orthogonal_vectors_and_parallel_probes_change_nothing():
    short = measure(so.spectral_density, **DENSITY)
    full = measure(so.spectral_density, **DENSITY, reorthogonalize=True, parallel_probes=32)
    np.testing.assert_allclose(full.nodes, short.nodes, atol=1e-6)
    np.testing.assert_allclose(full.density, short.density, atol=1e-5 * short.density.max())


def test_logarithmic_density_is_of_the_same_spectrum():
    linear = measure(so.spectral_density, **DENSITY)
    log = measure(so.spectral_density, **DENSITY, log=True, threshold=1e-3)
    np.testing.assert_allclose(linear.nodes, log.nodes, atol=1e-9)
    assert linear.threshold is None
    np.testing.assert_allclose(log.threshold, 1e-3 * np.abs(log.nodes).max(), rtol=1e-9)
    np.testing.assert_allclose(integral(log), 1, rtol=1e-5)
    assert (np.diff(log.eigenvalues) > 0).all()
    # The same share lies above any eigenvalue, but for the smoothing.
    above = [np.asarray(d.eigenvalues) > 0.05 * linear.nodes.max() for d in (linear, log)]
    places = linear.eigenvalues, np.arcsinh(log.eigenvalues / log.threshold)
    shares = [
        np.trapezoid(np.asarray(d.density)[mask], np.asarray(place)[mask])
        for d, mask, place in zip((linear, log), above, places, strict=True)
    ]
    np.testing.assert_allclose(*shares, atol=0.03)


def test_density_of_a_multiple_of_the_identity():
    """One eigenvalue, found in one step; and a matrix that is zero."""

    @jax.jit
    def run(factor):
        return so.spectral_density(lambda p: factor * jnp.sum(p**2) / 2, jnp.ones(6), KEY)

    for factor in (2.0, 0.0):
        density = run(factor)
        assert density.nodes.shape == (4, 6)
        np.testing.assert_allclose(np.sum(density.weights * density.nodes), factor, atol=1e-12)
        np.testing.assert_allclose(integral(density), 1, rtol=1e-5)
        assert density.eigenvalues[0] < factor < density.eigenvalues[-1]


def test_what_is_not_finite_is_said():
    def broken(p):
        return jnp.sum(p**2) / jnp.sum(0 * p)

    @jax.jit
    def run(p):
        density = so.spectral_density(broken, p, KEY, log=True)
        return density, so.extreme_eigenpairs(broken, p, KEY), so.curvature_trace(broken, p, KEY)

    density, pairs, trace = run(jnp.ones(3))
    assert not density.finite
    assert np.isfinite(density.eigenvalues).all()
    assert not np.asarray(density.density).any()
    assert np.isnan(pairs.values).all()
    assert int(pairs.steps) == 0
    assert np.isnan(trace.value)


# Traces and diagonals.

PROBES = 200


def test_trace_is_within_its_standard_error():
    plain = measure(so.curvature_trace, probes=PROBES)
    better = measure(so.curvature_trace, probes=PROBES, deflate=8)
    exact = problem()[2]["hessian"]
    off_diagonal = exact - np.diag(np.diagonal(exact))
    expected = np.sqrt(2 * np.sum(off_diagonal**2) / PROBES)
    np.testing.assert_allclose(plain.error, expected, rtol=0.25)
    assert better.error < 0.5 * plain.error
    for trace in (plain, better):
        assert abs(trace.value - np.trace(exact)) < 3 * trace.error
        assert int(trace.size) == len(exact)


def test_deflating_all_of_every_layer_is_exact():
    trace = measure(
        so.curvature_trace, probes=2, deflate=30, blocks="layers", matrix="gauss_newton"
    )
    for block, (_, exact) in enumerate(blocks_of("gauss_newton", trace.blocks)):
        np.testing.assert_allclose(trace.value[block], np.trace(exact), rtol=1e-8)
        assert trace.size[block] == len(exact)
    assert (np.asarray(trace.error) < 1e-8).all()


def test_diagonal_is_within_its_standard_error():
    errors = []
    for blocks in (None, "layers"):
        estimate = measure(so.curvature_diagonal, probes=PROBES, blocks=blocks)
        values, error = ravel_pytree(estimate.values)[0], ravel_pytree(estimate.errors)[0]
        scores = np.abs(values - np.diagonal(problem()[2]["hessian"])) / error
        assert (scores < 4).all()
        assert np.mean(scores < 1) > 0.5
        errors.append(np.linalg.norm(error))
    assert errors[1] < errors[0]


def test_microbatches_are_the_whole_batch():
    params, _, _ = problem()
    pieces = so.Microbatches.split(objective_on, make_batch("float64"), 4)
    found = jax.jit(lambda p: so.curvature_trace(pieces, p, KEY, probes=PROBES))(params)
    whole = measure(so.curvature_trace, probes=PROBES)
    np.testing.assert_allclose(found.value, whole.value, rtol=1e-9)


def test_same_key_gives_the_same_numbers():
    weights = jnp.arange(1.0, 5.0)

    @jax.jit
    def run(key):
        return so.curvature_trace(lambda p: (weights @ p) ** 2, jnp.ones(4), key, probes=1)

    first, again, raw, other = map(run, (KEY, KEY, jax.random.PRNGKey(3), jax.random.key(4)))
    assert first.value == again.value == raw.value != other.value
    assert np.isnan(first.error)  # one probe says nothing of its error


def test_overview_has_what_its_parts_find():
    params, objective, matrices = problem()
    found = measure(so.spectrum, largest=2, probes=2)
    eigenvalues = np.linalg.eigvalsh(matrices["hessian"])
    np.testing.assert_allclose(found.eigenpairs.values, eigenvalues[[0, -2, -1]], rtol=1e-6)
    assert abs(found.trace.value - eigenvalues.sum()) < 4 * found.trace.error
    assert jax.tree.structure(found.diagonal.values) == jax.tree.structure(params)
    step = np.diff(found.density.eigenvalues)[0]
    np.testing.assert_allclose(found.density.density.sum() * step, 1, rtol=1e-2)
    with pytest.raises(TypeError, match="spectrum"):
        so.spectrum(objective, params, None)
