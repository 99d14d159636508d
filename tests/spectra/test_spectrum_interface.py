"""Wrong arguments, shardings, and figures of the spectrum's functions."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import secondorder as so
from secondorder.tree import Blocks
from tests.meshes import make_mesh, place, use_mesh
from tests.spectra.spectrum_models import KEY, make_batch, make_params, objective_on

P = PartitionSpec
FUNCTIONS = (
    so.curvature_diagonal,
    so.curvature_trace,
    so.extreme_eigenpairs,
    so.spectral_density,
)


def square(p):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p)) / 2


@pytest.mark.parametrize("function", FUNCTIONS)
class TestArguments:
    def test_key(self, function):
        for key in (None, 0, jnp.ones(2), jax.random.split(KEY, 2)):
            with pytest.raises(TypeError, match="`key` must be a PRNG key such as"):
                function(square, jnp.ones(3), key)

    def test_params(self, function):
        with pytest.raises(TypeError, match=r"parameters must be real, got complex64 at \['a'\]"):
            function(square, {"a": jnp.ones(2, complex)}, KEY)
        with pytest.raises(TypeError, match="int32"):
            function(square, jnp.arange(3), KEY)
        with pytest.raises(ValueError, match="has no arrays"):
            function(square, {}, KEY)

    def test_objective(self, function):
        with pytest.raises(TypeError, match=r"so\.Objective"):
            function(square, jnp.ones(3), KEY, matrix="gauss_newton")
        with pytest.raises(TypeError, match="`objective` must be callable"):
            function(jnp.ones(2), jnp.ones(3), KEY)
        with pytest.raises(TypeError, match="one real scalar"):
            function(lambda p: p, jnp.ones(3), KEY)

    def test_matrix_and_blocks(self, function):
        with pytest.raises(ValueError, match="`matrix` must be one of"):
            function(square, jnp.ones(3), KEY, matrix="fisher")
        with pytest.raises(ValueError, match="prefix"):
            function(square, {"a": jnp.ones(3)}, KEY, blocks={"b": 1})
        partition = so.curvature_trace(square, (jnp.ones(3),), KEY, blocks="layers").blocks
        with pytest.raises(ValueError, match="partitions 1 arrays, and there are 2"):
            function(square, (jnp.ones(3), jnp.ones(1)), KEY, blocks=partition)
        layers = so.find_layers(lambda p: jnp.sum(jnp.ones((2, 3)) @ p), jnp.ones((3, 2)))
        with pytest.raises(ValueError, match="do not match the parameters"):
            function(square, jnp.ones((2, 3)), KEY, blocks=layers)


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        (so.extreme_eigenpairs, {"largest": 4}, "at most 3, as there are 3 parameters"),
        (so.extreme_eigenpairs, {"largest": 2, "smallest": 2}, "at most 3"),
        (so.extreme_eigenpairs, {"largest": 0}, "`largest \\+ smallest`"),
        (so.extreme_eigenpairs, {"smallest": -1}, "`smallest` must be"),
        (so.extreme_eigenpairs, {"largest": 2, "steps": 1}, "at least the number of pairs"),
        (so.extreme_eigenpairs, {"steps": 4}, "`steps` must be at most 3"),
        (so.extreme_eigenpairs, {"steps": 4, "blocks": "layers"}, "the largest block has 3"),
        (so.spectral_density, {"steps": 4}, "`steps` must be at most 3"),
        (so.spectral_density, {"probes": 0}, "`probes` must be"),
        (so.spectral_density, {"points": 100}, "`points` must be at least 2 / smoothing"),
        (so.spectral_density, {"smoothing": 0.0}, "`smoothing` must be"),
        (so.spectral_density, {"threshold": 0}, "`threshold` must be"),
        (so.spectral_density, {"log": 1}, "`log` must be"),
        (so.curvature_trace, {"probes": 0}, "`probes` must be"),
        (so.curvature_trace, {"deflate": 4}, "`deflate` must be at most 3"),
        (so.curvature_trace, {"deflate": -1}, "`deflate` must be"),
        (so.curvature_diagonal, {"probes": 1.0}, "`probes` must be"),
    ],
)
def test_settings_out_of_range(function, settings, message):
    with pytest.raises(ValueError, match=message):
        function(square, jnp.ones(3), KEY, **settings)


# Shardings.

SPECS = {"in": {"b": P(), "w": P("model", None)}, "out": {"w": P("model", None)}}


def everything(params, batch):
    objective = objective_on(batch)
    settings = {"matrix": "gauss_newton", "blocks": "layers"}
    return (
        so.extreme_eigenpairs(objective, params, KEY, largest=2, steps=4, **settings),
        so.spectral_density(objective, params, KEY, probes=2, steps=4),
        so.curvature_diagonal(objective, params, KEY, probes=2),
    )


@functools.cache
def on_one_device():
    return jax.jit(everything)(make_params("float32"), make_batch("float32"))


@pytest.mark.skipif(jax.device_count() < 8, reason="XLA_FLAGS asks for fewer host devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sharding_changes_nothing(kind):
    mesh = make_mesh(4, 2, kind=kind)
    expected, expected_density, expected_diagonal = on_one_device()
    with use_mesh(mesh):
        params = jax.tree.map(lambda a, p: place(mesh, a, *p), make_params("float32"), SPECS)
        batch = tuple(place(mesh, leaf, "data") for leaf in make_batch("float32"))
        pairs, density, diagonal = jax.jit(everything)(params, batch)
        assert pairs.blocks == expected.blocks
        np.testing.assert_allclose(pairs.values, expected.values, rtol=1e-3)
        np.testing.assert_allclose(density.nodes, expected_density.nodes, rtol=1e-3, atol=1e-3)
        for got, leaf in zip(*map(jax.tree.leaves, (diagonal, expected_diagonal)), strict=True):
            np.testing.assert_allclose(got, leaf, rtol=1e-3, atol=1e-4)
        if kind == AxisType.Explicit:
            assert pairs.vectors["in"]["w"].sharding.spec == P(None, "model", None)
            assert diagonal.values["out"]["w"].sharding.spec == P("model", None)


# Figures.


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


BLOCKS = Blocks(("first", "second"), (0, 1))
GRID = np.linspace(-1, 3, 50)
DENSITY = so.SpectralDensity(
    eigenvalues=GRID,
    density=np.exp(-(GRID**2)),
    nodes=np.zeros((1, 1)),
    weights=np.ones((1, 1)),
    width=np.float32(0.1),
    threshold=None,
    finite=np.True_,
    blocks=None,
)
PAIRS = so.Eigenpairs(
    values=np.array([1.0, 2.0]),
    vectors=np.eye(2),
    residuals=np.array([0.1, 0.2]),
    steps=np.int32(2),
    blocks=None,
)


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_figures_of_densities(pyplot, tmp_path):
    axes = so.plot_density(DENSITY, label="Hessian", color="red")
    assert (
        so.plot_density(DENSITY._replace(density=DENSITY.density / 9), axes, label="other") is axes
    )
    assert legend_of(axes) == ["Hessian", "other"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    assert axes.get_ylim()[0] < 1e-5 < 1 < axes.get_ylim()[1]

    both = DENSITY._replace(
        eigenvalues=np.stack([GRID, 2 * GRID]),
        density=np.stack([DENSITY.density, DENSITY.density]),
        threshold=np.array([0.1, 0.2]),
        blocks=BLOCKS,
    )
    axes = so.plot_density(both)
    assert axes.get_xscale() == "asinh"
    assert legend_of(axes) == ["first", "second"]
    axes.figure.savefig(tmp_path / "figure.png")


def test_figures_of_eigenvalues(pyplot, tmp_path):
    assert so.plot_eigenvalues(PAIRS).get_ylabel() == "eigenvalue"
    nan = np.array([[np.nan, 1.0], [2.0, 3.0]])
    axes = so.plot_eigenvalues(PAIRS._replace(values=nan, residuals=0.1 * nan, blocks=BLOCKS))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "second"]
    axes.figure.savefig(tmp_path / "figure.png")


def test_figures_of_traces_and_diagonals(pyplot, tmp_path):
    trace = so.TraceEstimate(np.array([2.0, 6.0]), np.array([0.2, 0.3]), np.array([2, 3]), BLOCKS)
    axes = so.plot_trace(trace)
    assert [bar.get_height() for bar in axes.patches] == [1.0, 2.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "second"]
    alone = so.plot_trace(so.TraceEstimate(np.float32(4), np.float32(1), np.int32(2), None))
    assert [bar.get_height() for bar in alone.patches] == [2.0]
    diagonal = {"a": np.arange(5.0), "b": {"c": np.ones((2, 2))}}
    axes = so.plot_diagonal(so.DiagonalEstimate(diagonal, diagonal))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b/c"]
    axes.figure.savefig(tmp_path / "figure.png")


def test_figures_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    one = {"a": np.ones(2)}
    results = {
        so.plot_density: DENSITY,
        so.plot_eigenvalues: PAIRS,
        so.plot_trace: so.TraceEstimate(np.float32(4), np.float32(1), np.int32(2), None),
        so.plot_diagonal: so.DiagonalEstimate(one, one),
    }
    for plot, result in results.items():
        with pytest.raises(ImportError, match=r"pip install 'secondorder\[plot\]'"):
            plot(result)
