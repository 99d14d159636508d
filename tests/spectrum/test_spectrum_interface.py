"""Wrong arguments, shardings, and figures of the spectrum's functions."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from spectrum_models import KEY, make_batch, make_params, objective_on

import secondorder as so

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
        with pytest.raises(TypeError, match="real floating-point numbers, and 'a' is complex64"):
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
        with pytest.raises(ValueError, match="layers of other parameters"):
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

SPECS = {
    "in": {"b": P(), "w": P("model", None)},
    "out": {"b": P(), "w": P("model", None)},
    "scale": P(),
}


def everything(params, batch, key):
    objective, settings = objective_on(batch), {"matrix": "gauss_newton", "blocks": "layers"}
    return {
        "pairs": so.extreme_eigenpairs(objective, params, key, largest=2, steps=3, **settings),
        "density": so.spectral_density(objective, params, key, probes=2, steps=4),
        "trace": so.curvature_trace(objective, params, key, probes=2, deflate=2, **settings),
        "diagonal": so.curvature_diagonal(objective, params, key, probes=2),
    }


@functools.cache
def small():
    """Parameters of which the hidden units can be shared by two devices, and a batch."""
    params, batch = make_params("float32"), make_batch("float32")
    wider = {
        "b": jnp.pad(params["in"]["b"], (0, 1)),
        "w": jnp.pad(params["in"]["w"], ((0, 0), (0, 1))),
    }
    out = params["out"] | {"w": jnp.pad(params["out"]["w"], ((0, 1), (0, 0)), constant_values=0.5)}
    return params | {"in": wider, "out": out}, batch


@functools.cache
def on_one_device():
    return jax.jit(everything)(*small(), KEY)


@pytest.mark.skipif(jax.device_count() < 8, reason="XLA_FLAGS asks for fewer host devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sharding_changes_nothing(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    params, batch = small()
    use = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
    with use(mesh):

        def put(leaf, spec):
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        placed = jax.tree.map(put, params, SPECS)
        found = jax.jit(everything)(placed, tuple(put(leaf, P("data")) for leaf in batch), KEY)
        expected = on_one_device()
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for name in ("trace", "diagonal"):
            for got, leaf in zip(*map(jax.tree.leaves, (found[name], expected[name])), strict=True):
                np.testing.assert_allclose(got, leaf, rtol=1e-3, atol=1e-4)
        for name, field in [("pairs", "values"), ("density", "density"), ("density", "nodes")]:
            got, leaf = (np.asarray(getattr(tree[name], field)) for tree in (found, expected))
            np.testing.assert_allclose(got, leaf, rtol=2e-3, atol=2e-3 * np.nanmax(leaf))
        if kind == AxisType.Explicit:
            assert found["pairs"].vectors["in"]["w"].sharding.spec == P(None, "model", None)
            assert found["diagonal"].values["out"]["w"].sharding.spec == P("model", None)


# Figures.


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_figures(pyplot, tmp_path):
    params, batch = small()
    objective = objective_on(batch)
    linear = on_one_device()["density"]
    log = so.spectral_density(objective, params, KEY, steps=3, log=True, blocks="layers")
    axes = so.plot_density(linear, label="Hessian", color="red")
    assert so.plot_density(linear, axes, label="again") is axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Hessian", "again"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    assert axes.get_ylim()[1] > float(linear.density.max())

    axes = so.plot_density(log)
    assert axes.get_xscale() == "asinh"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["in", "out", "scale"]

    whole = so.extreme_eigenpairs(objective, params, KEY, largest=3, steps=6)
    for pairs in (whole, on_one_device()["pairs"]):
        axes = so.plot_eigenvalues(pairs)
        axes.figure.savefig(tmp_path / "figure.png")
        assert axes.get_ylabel() == "eigenvalue"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["in", "out", "scale"]


def test_figures_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for plot, result in [
        (so.plot_density, on_one_device()["density"]),
        (so.plot_eigenvalues, on_one_device()["pairs"]),
    ]:
        with pytest.raises(ImportError, match=r"pip install 'secondorder\[plot\]'"):
            plot(result)
