"""Where an optimizer keeps its state on a mesh, and states that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import secondorder as so
from tests.meshes import make_mesh, place, use_mesh
from tests.protocol.registry import LAYERS, REGISTRY

P = PartitionSpec
KINDS = [AxisType.Auto, AxisType.Explicit]
pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="XLA_FLAGS asks for fewer than eight host devices"
)

# A 2-D, a 3-D (under scan) and a 4-D weight, of which each axis is sharded in turn.
SHAPES = {"in": (8, 16), "stack": (8, 16, 16), "kernel": (8, 8, 8, 16)}


def objective(params, x, images):
    h = jnp.tanh(x @ params["in"])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
    seen = jax.lax.conv_general_dilated(
        images, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean(h**2) + jnp.mean(seen**2)


def shapes_on(mesh, axis=None):
    """The shapes of the parameters, each sharded along one of its axes, if it has so many."""

    def shape(size):
        sharded = axis is not None and axis < len(size)
        spec = P(*[None] * axis, "data") if sharded else P()
        return jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(shape, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def make(entry):
    given = dict(entry.settings) | ({"learning_rate": 0.1} if entry.learning_rate else {})
    if LAYERS in entry.needs:
        mesh = make_mesh(1, names=("data",), kind=AxisType.Auto)
        batch = jax.ShapeDtypeStruct((4, 8), jnp.float32), jnp.zeros((4, 3, 3, 8))
        given["layers"] = so.find_layers(objective, shapes_on(mesh), *batch)
    return entry.factory(**given)


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.name)
def test_what_is_like_a_parameter_is_sharded_as_it_is(entry, axis):
    """So that its bytes per device fall as one over their number. By tracing alone."""
    tx = make(entry)
    mesh = make_mesh(8, names=("data",), kind=AxisType.Auto)
    params = shapes_on(mesh, axis)
    shardings = so.state_shardings(tx, params)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(tx.init, params),
        shardings,
    )
    seen = []

    def check(leaf, param):
        seen.append(leaf)
        behind = [None] * (len(leaf.shape) - len(param.shape))
        wanted = NamedSharding(mesh, P(*behind, *param.sharding.spec))
        assert leaf.sharding.is_equivalent_to(wanted, len(leaf.shape))

    optax.tree_utils.tree_map_params(tx, check, state, params)
    assert bool(seen) == entry.remembers


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_state(kind):
    """Counted in what is on a device: parameters, pairs, and the factors of eight equal layers."""
    mesh = make_mesh(4, 2, kind=kind)
    params = {"stack": jnp.ones((8, 16, 16))}

    def loss(params, x):
        return jnp.mean(jax.lax.scan(lambda h, w: (h @ w, None), x, params["stack"])[0] ** 2)

    layers = so.find_layers(loss, params, jnp.ones((4, 16)))
    places = NamedSharding(mesh, P(None, "data", "model"))
    for tx in (so.kbfgs(0.1, layers), so.kbfgs(0.1, layers, memory_size=8), so.lsr1(memory_size=4)):
        with use_mesh(mesh):
            sharded = jax.device_put(params, places)
            state = jax.jit(tx.init, out_shardings=so.state_shardings(tx, sharded))(sharded)
        leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.size >= 1024]
        assert leaves
        for leaf in leaves:
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size
        rest = sum(leaf.size for leaf in jax.tree.leaves(state)) - sum(leaf.size for leaf in leaves)
        assert rest < 1024


def test_any_transform_has_shardings():
    mesh = make_mesh(8, names=("data",), kind=AxisType.Auto)
    params = shapes_on(mesh, 1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    adam = so.state_shardings(tx, params)[1][0]
    assert adam.mu["stack"].spec == P(None, "data", None)
    assert adam.count.spec == P()


def test_parameters_on_no_mesh():
    with pytest.raises(ValueError, match="one mesh, but these are on 0"):
        so.state_shardings(optax.adam(1e-3), {"w": jnp.ones(3)})


# States that do not fit.


def step(tx, params, state):
    value, grads = jax.value_and_grad(loss_of)(params)
    return tx.update(grads, state, params, value=value, grad=grads, value_fn=loss_of)


def loss_of(params):
    return jnp.sum(jnp.sin(params["w"]) ** 2)


@pytest.mark.parametrize("jit", [False, True])
def test_a_state_of_other_shapes(jit):
    tx = so.lsr1(memory_size=3)
    state = tx.init({"w": jnp.ones((4, 4))})
    run = jax.jit(lambda p, s: step(tx, p, s)) if jit else (lambda p, s: step(tx, p, s))
    message = r"lsr1: state.*has the shape \(3, 4, 4\), but .* make it \(3, 4, 5\)"
    with pytest.raises(ValueError, match=message):
        run({"w": jnp.ones((4, 5))}, state)
    with pytest.raises(ValueError, match=r"state is not one of these parameters"):
        run({"w": jnp.ones((4, 4)), "b": jnp.ones(4)}, state)


def test_parameters_whose_sharding_changed_under_explicit_axes():
    """An error that says what to do; which then works."""
    tx = so.scale_by_lsr1(memory_size=2)
    mesh = make_mesh(4, 2)
    with use_mesh(mesh):
        before = {"w": place(mesh, np.ones((8, 8), np.float32), "data", None)}
        after = {"w": place(mesh, np.ones((8, 8), np.float32), None, "model")}
        state = jax.jit(tx.init)(before)
        run = jax.jit(lambda p, s: step(tx, p, s)[0])
        expected = run(before, state)
        with pytest.raises(ValueError, match=r"is sharded as .*move the state along"):
            run(after, state)
        found = run(after, jax.device_put(state, so.state_shardings(tx, after)))
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)


def test_parameters_whose_sharding_changed_under_auto_axes():
    """The step is compiled anew; the state stays where it was asked to be."""
    tx = so.scale_by_lsr1(memory_size=2)
    mesh = make_mesh(4, 2, kind=AxisType.Auto)
    before = {"w": place(mesh, np.ones((8, 8), np.float32), "data", None)}
    after = {"w": place(mesh, np.ones((8, 8), np.float32), None, "model")}
    shardings = so.state_shardings(tx, before)
    state = jax.jit(tx.init, out_shardings=shardings)(before)
    run = jax.jit(lambda p, s: step(tx, p, s), out_shardings=(None, shardings))
    expected, found = run(before, state), run(after, state)
    np.testing.assert_allclose(found[0]["w"], expected[0]["w"], rtol=1e-6)
    for leaf, asked in zip(jax.tree.leaves(found[1]), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(asked, leaf.ndim)


@pytest.mark.parametrize("sizes", [(8,), (2,), (3,)])
def test_a_state_moves_to_another_mesh(sizes):
    """As a checkpoint does; also to one that does not divide the layers."""
    rng = np.random.default_rng(0)
    params = [rng.normal(size=(6, 6)).astype(np.float32)] * 8

    def value_fn(p):
        x = jnp.eye(6)
        for w in p:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    tx = so.kbfgs(0.1, so.find_layers(so.Objective(value_fn, lambda z: z), params))

    def run(params, state):
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    one = jax.jit(run)
    middle = one(params, tx.init(params))
    expected, _ = one(*middle)
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[: sizes[0]]), ("data",), axis_types=(AxisType.Auto,)
    )
    moved = jax.device_put(middle[0], NamedSharding(mesh, P()))
    state = jax.device_put(middle[1], so.state_shardings(tx, moved))
    found, _ = jax.jit(run)(moved, state)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
