"""Every optimizer on eight devices does what it does on one.

Under Auto and Explicit axes: data-parallel, with every axis of the weights sharded in turn, and
tensor-parallel. By default one optimizer of each kind is tested in one cell of that table; the
whole is slow.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import secondorder as so
from tests.meshes import make_mesh, use_mesh
from tests.protocol.registry import LAYERS, REGISTRY
from tests.steps import training_step

P = PartitionSpec
STEPS = 2
pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="XLA_FLAGS asks for fewer than eight host devices"
)


def random(*shape):
    return np.random.default_rng([5, *shape]).normal(size=shape) * 0.5


# A chain of dense layers, which every method knows; with a parameter in no layer.
PARAMS = {
    "in": {"w": random(8, 8), "b": random(8)},
    "out": {"w": random(8, 8), "b": random(8)},
    "scale": np.asarray(1.25),
}
BATCH = random(16, 8), np.sin(random(16, 8))


def multiply(h, w):
    """A product; where the hidden axis is sharded on an Explicit mesh, the model says of what."""
    sharding = jax.typeof(w).sharding
    if sharding.spec and sharding.spec[0] == "model":
        return jnp.einsum("bi,io->bo", h, w, out_sharding=P("data", None))
    return h @ w


def objective_on(batch):
    x, y = batch

    def model(p):
        h = jnp.tanh(x @ p["in"]["w"] + p["in"]["b"])
        return p["scale"] * (multiply(h, p["out"]["w"]) + p["out"]["b"])

    return so.Objective(model, lambda z: jnp.mean(jnp.sum((z - y) ** 2, axis=-1)))


def spread(weight, bias, head=None):
    layer = {"w": weight, "b": bias}
    return {"in": layer, "out": {"w": head, "b": P()} if head else layer, "scale": P()}


LAYOUTS = {
    "data": spread(P(), P()),
    "rows": spread(P("model", None), P()),
    "columns": spread(P(None, "model"), P("model")),
    "tensor": spread(P(None, "model"), P("model"), P("model", None)),
}
# One of each kind; the slow tests run the others, whose products and solvers these share.
METHODS = (
    "kbfgs", "lsr1", "hessian_free", "block_hessian_free", "pch", "lrsfn", "shampoo", "soap",
    "kfac", "scale_by_kfac", "kfac-adaptive", "scale_by_quadratic_model",
)  # fmt: skip
CELLS = list(itertools.product(("Auto", "Explicit"), LAYOUTS))


def make(entry):
    """The optimizer; one that only gives a direction is followed by the learning rate."""
    given = dict(entry.settings)
    if LAYERS in entry.needs:
        given["layers"] = so.find_layers(objective_on(BATCH), PARAMS)
    if entry.learning_rate:
        given["learning_rate"] = 0.1
    tx = entry.factory(**given)
    if entry.learning_rate or entry.terminal:
        return tx
    return optax.chain(tx, optax.scale_by_learning_rate(0.1))


@functools.cache
def on_one_device(name):
    tx = make(next(entry for entry in REGISTRY if entry.name == name))
    step = jax.jit(training_step(tx, objective_on))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(STEPS):
        params, state = step(params, state, BATCH)
    return tx, params


def check(name, kind, layout):
    tx, expected = on_one_device(name)
    mesh = make_mesh(4, 2, kind=AxisType[kind])
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), LAYOUTS[layout], is_leaf=lambda x: isinstance(x, P)
    )
    with use_mesh(mesh):
        params = jax.device_put(PARAMS, places)
        batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
        shardings = so.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        step = jax.jit(
            training_step(tx, objective_on),
            out_shardings=(places, shardings),
            donate_argnums=(0, 1),
        )
        for _ in range(STEPS):
            params, state = step(params, state, batch)
        assert step._cache_size() == 1
    for found, known in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, known, rtol=1e-5, atol=1e-5)
    assert_fixed_point(state, shardings, kind)


def assert_fixed_point(state, shardings, kind):
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        assert leaf.sharding.mesh.axis_types == (AxisType[kind],) * 2


@pytest.mark.parametrize(
    ("name", "cell"),
    [(name, CELLS[(3 * i + 1) % len(CELLS)]) for i, name in enumerate(METHODS)],
    ids=str,
)
def test_one_cell(x64, name, cell):
    check(name, *cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("name", [entry.name for entry in REGISTRY])
def test_all_cells(x64, name, cell):
    check(name, *cell)
