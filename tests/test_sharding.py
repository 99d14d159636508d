"""Statistics and whole steps on meshes of eight devices equal those on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import secondorder as so
from secondorder.layers import probes, statistics
from secondorder.layers.layer import trace_layers
from secondorder.sharding import replicated_zeros
from tests.meshes import make_mesh, use_mesh

P = PartitionSpec
needs_rules = pytest.mark.skipif(
    jax.__version_info__ < (0, 7),
    reason="JAX 0.6 cannot differentiate convolutions and lookups on Explicit meshes",
)
pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="XLA_FLAGS asks for fewer than eight host devices"
)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng([7, *shape]).normal(size=shape).astype(np.float32) * 0.5


PARAMS = {
    "in": {"w": random(6, 8), "b": random(8)},
    "stack": {"w": random(2, 8, 8), "b": random(2, 8)},
    "out": {"w": random(8, 8), "b": random(8)},
    "scale": random(8),
}
BATCH = random(16, 6), random(16, 8)
ROWS = {
    "in": {"w": P("model", None), "b": P()},
    "stack": {"w": P(None, "model", None), "b": P()},
    "out": {"w": P("model", None), "b": P()},
    "scale": P(),
}
COLUMNS = {
    "in": {"w": P(None, "model"), "b": P("model")},
    "stack": {"w": P(None, None, "model"), "b": P(None, "model")},
    "out": {"w": P(None, "model"), "b": P("model")},
    "scale": P("model"),
}

OTHER_PARAMS = {"kernel": random(2, 2, 2, 4), "table": random(6, 4), "w": random(4, 2)}
OTHER_BATCH = random(8, 4, 4, 2), np.random.default_rng(0).integers(0, 6, (8, 4))
OTHER_COLUMNS = {
    "kernel": P(None, None, None, "model"),
    "table": P(None, "model"),
    "w": P("model", None),
}
OTHER_DENSE = {"kernel": P(), "table": P(), "w": P("model", None)}


def mlp(params, x, y):
    def layer(h, p):
        return jnp.tanh(h @ p["w"] + p["b"]), None

    h, _ = layer(x, params["in"])
    h, _ = jax.lax.scan(layer, h, params["stack"])
    outputs = (h @ params["out"]["w"] + params["out"]["b"]) * params["scale"]
    return jnp.mean((outputs - y) ** 2)


def conv_and_embedding(params, images, words):
    pixels = jax.lax.conv_general_dilated(
        images, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    seen = jnp.mean(jnp.tanh(pixels), axis=(1, 2))
    spec = tuple(jax.typeof(words).sharding.spec)[:1]
    place = P(*spec, None, None) if any(spec) else None  # what JAX asks for on an Explicit mesh
    rows = params["table"].at[words].get(out_sharding=place)
    read = jnp.mean(jnp.tanh(rows), axis=1)
    return jnp.mean((jnp.tanh(seen + read) @ params["w"]) ** 2)


def put(mesh, tree, places):
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), tree, places)


def all_statistics(loss, layers, params, batch):
    """Every statistic of every layer, and the gradient."""

    def objective(p):
        return loss(p, *batch)

    gradient = jax.grad(objective)(params)
    discovery, traced, batch_size = trace_layers(layers, objective, params)
    tape = probes.record(discovery, params)
    result = []
    for t in traced:
        rows = replicated_zeros((t.layer.stack, 2, t.layer.inputs), jnp.float64) + 1
        gram = statistics.input_counts if t.layer.diagonal_input else statistics.input_gram
        result.append(
            {
                "mean_input": statistics.mean_input(t, tape),
                "output_sums": statistics.output_sums(t, tape),
                "gram": gram(t, tape),
                "gram_product": statistics.gram_product(t, tape, rows),
                "eigenvalues": statistics.mean_eigenvalues(t, tape, batch_size),
            }
        )
    return gradient, tape.value, result


CASES = {
    "rows": (mlp, PARAMS, ROWS, BATCH),
    "columns": (mlp, PARAMS, COLUMNS, BATCH),
    "other_kinds": (conv_and_embedding, OTHER_PARAMS, OTHER_COLUMNS, OTHER_BATCH),
    "other_kinds_replicated": (conv_and_embedding, OTHER_PARAMS, OTHER_DENSE, OTHER_BATCH),
}


def double(tree):
    return jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, tree)


@pytest.mark.parametrize(
    "name", ["rows", "columns", pytest.param("other_kinds_replicated", marks=needs_rules)]
)
def test_statistics_on_an_explicit_mesh(x64, name):
    loss, params, places, batch = CASES[name]
    params, batch = double(params), double(batch)
    layers = so.find_layers(loss, params, *batch)
    assert len(layers) == 3
    expected = jax.jit(lambda p, *b: all_statistics(loss, layers, p, b))(params, *batch)

    mesh = make_mesh(4, 2)
    with use_mesh(mesh):
        params = put(mesh, params, places)
        batch = put(mesh, batch, (P("data"), P("data")))
        assert so.find_layers(loss, params, *batch) == layers
        result = jax.jit(lambda p, *b: all_statistics(loss, layers, p, b))(params, *batch)
    assert_close(result, expected)


def assert_close(result, expected, tolerance=1e-9):
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(result)[0], jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        scale = np.max(np.abs(b), initial=1e-6)
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=where)


def train(optimizer, loss, params, batch, steps=3, places=(None, None)):
    """A few steps; the updates, the states, and how often the step was compiled.

    Args:
      places: Shardings of parameters and of the state.
    """

    @functools.partial(jax.jit, out_shardings=(places[0], places[1], places[0]))
    def step(params, state, *batch):
        def objective(p):
            return loss(p, *batch)

        value, grads = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return updates, state, optax.apply_updates(params, updates)

    state = jax.jit(optimizer.init, out_shardings=places[1])(params)
    all_updates, states = [], [state]
    for _ in range(steps):
        updates, state, params = step(params, state, *batch)
        all_updates.append(updates)
        states.append(state)
    return all_updates, states, step._cache_size()


def same_shardings(actual, expected) -> bool:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in pairs)


SETTINGS = {
    "default": {},
    "limited": {"memory_size": 3, "update_every": 2},
    "paper_2020": {
        "input_factor": "moving_average",
        "pair_damping": "powell_identity",
        "damping_split": "trace",
        "acceptance": 1e-4,
    },
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@functools.cache
def train_on_one_device(name, settings_name):
    loss, params, _, batch = CASES[name]
    layers = so.find_layers(loss, double(params), *double(batch))
    optimizer = so.kbfgs(0.3, layers, **SETTINGS[settings_name])
    return optimizer, train(optimizer, loss, double(params), double(batch))[0]


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        pytest.param(AUTO, "columns", "limited", marks=pytest.mark.slow),
        (AUTO, "other_kinds", "paper_2020"),
        (EXPLICIT, "rows", "limited"),
        pytest.param(EXPLICIT, "columns", "default", marks=pytest.mark.slow),
        pytest.param(EXPLICIT, "other_kinds_replicated", "paper_2020", marks=needs_rules),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_kbfgs_step(x64, kind, name, settings):
    loss, params, places, batch = CASES[name]
    optimizer, expected = train_on_one_device(name.removesuffix("_replicated"), settings)

    mesh = make_mesh(4, 2, kind=kind)
    with use_mesh(mesh):
        params = put(mesh, double(params), places)
        batch = put(mesh, double(batch), (P("data"), P("data")))
        own = jax.tree.map(lambda leaf: leaf.sharding, params)
        asked = own, so.state_shardings(optimizer, params)
        updates, states, compilations = train(optimizer, loss, params, batch, places=asked)
    assert_close(updates, expected, 1e-6)
    assert compilations == 1
    for update in updates:
        assert same_shardings(update, params)
    for state in states[1:]:
        assert same_shardings(state, states[0])
