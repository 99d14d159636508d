"""K-FAC on eight devices: the numbers of one, a share of the factors on each, and of the work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import secondorder as so
from benchmarks.programs import batched_sizes
from tests.meshes import make_mesh, use_mesh
from tests.steps import training_step

P = PartitionSpec
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
WIDTH, DEPTH = 10, 5  # so that layers are a smaller share than rows
pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="XLA_FLAGS asks for fewer than eight host devices"
)


def random(*shape):
    return np.random.default_rng([11, *shape]).normal(size=shape) * 0.4


# Five layers of one shape in two leaves, one that has no like, and a scale in no layer.
PARAMS = {
    "in": random(6, WIDTH),
    "stack": random(DEPTH - 1, WIDTH, WIDTH),
    "out": random(WIDTH, WIDTH),
    "scale": 1 + random(WIDTH),
}
BATCH = random(16, 6), np.sin(random(16, WIDTH))
ROWS = {"in": P(), "stack": P(None, "model", None), "out": P("model", None), "scale": P()}
COLUMNS = {
    "in": P(None, "model"),
    "stack": P(None, None, "model"),
    "out": P(None, "model"),
    "scale": P("model"),
}


def objective_on(batch):
    x, y = batch

    def model(p):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), jnp.tanh(x @ p["in"]), p["stack"])
        return (h @ p["out"]) * p["scale"]

    return so.Objective(model, lambda z: jnp.mean(jnp.sum((z - y) ** 2, axis=-1)))


FORMS = {
    "cholesky": {"learning_rate": 0.1},
    "eigen": {"learning_rate": 0.1, "inverse": "eigen"},
    "corrected": {"learning_rate": 0.1, "inverse": "corrected"},
    "adaptive": {"learning_rate": None},
}


@functools.cache
def make(form):
    return so.kfac(layers=so.find_layers(objective_on(BATCH), PARAMS), damping=0.1, **FORMS[form])


def put(tree, mesh, specs):
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), tree, specs)


@pytest.mark.parametrize(
    ("form", "kind", "places"),
    [
        ("cholesky", AUTO, ROWS),
        ("eigen", AUTO, COLUMNS),
        ("corrected", EXPLICIT, ROWS),
        ("adaptive", EXPLICIT, COLUMNS),
    ],
    ids=["cholesky", "eigen", "corrected", "adaptive"],
)
def test_the_numbers_of_one_device(x64, form, kind, places):
    """With five layers on eight devices, and one that is cut by rows."""
    tx, (params, state), steps = make(form), (PARAMS, make(form).init(PARAMS)), 3
    run = jax.jit(training_step(tx, objective_on))
    for _ in range(steps):
        params, state = run(params, state, BATCH)

    mesh = make_mesh(4, 2, kind=kind)
    with use_mesh(mesh):
        spread = put(PARAMS, mesh, places)
        batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
        asked = jax.tree.map(lambda leaf: leaf.sharding, spread), so.state_shardings(tx, spread)
        spread_state = jax.jit(tx.init, out_shardings=asked[1])(spread)
        run = jax.jit(training_step(tx, objective_on), out_shardings=asked)
        for _ in range(steps):
            spread, spread_state = run(spread, spread_state, batch)
    assert run._cache_size() == 1
    for found, known in zip(jax.tree.leaves(spread), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(found, known, rtol=1e-7, atol=1e-9)
    metrics, known = so.metrics(spread_state), so.metrics(state)
    assert metrics["kfac/inverse_updates"] == known["kfac/inverse_updates"] == steps
    assert metrics["kfac/failed_inverses"] == 0


# Who holds what, and who does what: layers of one width, all factors of one size.


def chain(depth):
    params = [jnp.eye(WIDTH)] * depth

    def on(x):
        return so.Objective(
            lambda p: functools.reduce(lambda h, w: jnp.tanh(h @ w), p, x),
            lambda z: jnp.mean(jnp.sum(z**2, axis=-1)),
        )

    return params, on, so.find_layers(on(jnp.ones((8, WIDTH))), params)


def stacks_of(state):
    return [leaf for leaf in jax.tree.leaves((state.factors, state.inverses)) if leaf.ndim > 1]


@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "corrected"])
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_each_device_holds_its_share(kind, inverse):
    params, _, layers = chain(16)
    mesh = make_mesh(4, 2, kind=kind)
    with use_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        tx = so.scale_by_kfac(layers, inverse=inverse)
        state = jax.jit(tx.init, out_shardings=so.state_shardings(tx, params))(params)
    stacks = stacks_of(state)
    assert len(stacks) >= 4
    for leaf in stacks:
        assert leaf.shape[0] == 16
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {2}


@pytest.mark.parametrize(("axes", "share"), [(("model",), 8), ((), 16)])
def test_the_axes_are_chosen(axes, share):
    params, _, layers = chain(16)
    mesh = make_mesh(4, 2, kind=AUTO)
    params = jax.device_put(params, NamedSharding(mesh, P()))
    tx = so.scale_by_kfac(layers, spread_over=axes)
    state = jax.jit(tx.init, out_shardings=so.state_shardings(tx, params))(params)
    for leaf in stacks_of(state):
        assert leaf.addressable_shards[0].data.shape[0] == share


def test_axes_that_the_mesh_does_not_have():
    params, _, layers = chain(2)
    params = jax.device_put(params, NamedSharding(make_mesh(8, names=("data",), kind=AUTO), P()))
    with pytest.raises(ValueError, match=r"spread_over names \['pipeline'\]"):
        so.state_shardings(so.kfac(0.1, layers, spread_over=("pipeline",)), params)


@pytest.mark.parametrize(
    ("inverse", "depth", "kind"),
    [
        ("cholesky", 8, AUTO),
        ("cholesky", 11, EXPLICIT),
        ("eigen", 11, AUTO),
        ("corrected", 8, EXPLICIT),
    ],
    ids=str,
)
def test_each_device_factorizes_its_share(inverse, depth, kind):
    """Both factors of all layers are one batch here, of twice the depth."""
    params, on, layers = chain(depth)
    tx = so.scale_by_kfac(layers, inverse=inverse)

    def step(params, state, x):
        value_fn = on(x)
        return tx.update(jax.grad(value_fn)(params), state, params, value_fn=value_fn)

    mesh = make_mesh(4, 2, kind=kind)
    with use_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        batch = jax.device_put(jnp.ones((8, WIDTH)), NamedSharding(mesh, P("data")))
        shardings = so.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        run = jax.jit(step, out_shardings=(None, shardings))
        text = run.lower(params, state, batch).compile().as_text()
    factorized = batched_sizes(text, "potrf" if inverse == "cholesky" else "syevd")
    assert [shape[0] for shape in factorized] == [-(-2 * depth // 8)]
