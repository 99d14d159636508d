"""Operators, and steps made of them, on meshes of eight devices equal those on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import secondorder as so
from secondorder import operators
from secondorder.tree import label_blocks, one_block
from tests.operators.operator_models import assert_close

P = PartitionSpec
KINDS = [AxisType.Auto, AxisType.Explicit]
pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="XLA_FLAGS asks for fewer than eight host devices"
)


def random(*shape):
    return np.random.default_rng([3, *shape]).normal(size=shape).astype(np.float32) * 0.5


PARAMS = {"in": {"w": random(6, 8), "b": random(8)}, "out": {"w": random(8, 4), "b": random(4)}}
BATCH = {"x": random(16, 6), "labels": np.arange(16) % 4}
# The hidden axis is contracted in the last layer: its result is a sum over devices.
HIDDEN = {"in": {"w": P(None, "model"), "b": P("model")}, "out": {"w": P(), "b": P()}}
CLASSES = {"in": {"w": P(), "b": P()}, "out": {"w": P(None, "model"), "b": P("model")}}
PLACES = {"hidden": HIDDEN, "classes": CLASSES}


def objective_on(batch):
    def model(p):
        h = jnp.tanh(batch["x"] @ p["in"]["w"] + p["in"]["b"])
        return h @ p["out"]["w"] + p["out"]["b"]

    def loss(z):
        chosen = jax.nn.one_hot(batch["labels"], 4, dtype=z.dtype)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(z) * chosen, axis=-1))

    return so.Objective(model, loss)


def place(kind, places):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    params = jax.tree.map(
        lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), PARAMS, places
    )
    return params, jax.device_put(BATCH, NamedSharding(mesh, P("data")))


def diagonal(objective, params):
    return operators.gauss_newton_diagonal(objective, params, jax.random.key(0))


def sampled(objective, params):
    return operators.fisher(objective, params, jax.random.key(0))(params)


def linearized(objective, params):
    return operators.block_gauss_newton(objective, params, label_blocks(None, params))(params)


def factored(objective, params):
    factors = operators.factor_gauss_newton(objective, params)
    return factors.operator(label_blocks(None, params))(params)


def factored_whole(objective, params):
    return operators.factor_gauss_newton(objective, params).operator(one_block(params))(params)


def dual(objective, params):
    factors = operators.factor_gauss_newton(objective, params)
    return operators.dual_solve(factors, params, 0.1, label_blocks(None, params))


PRODUCTS = {
    "diagonal": diagonal,
    "sampled": sampled,
    "linearized": linearized,
    "factored": factored,
    "factored, full": factored_whole,
    "dual": dual,
}


def assert_same(found, expected, params):
    for one, other, like in zip(*map(jax.tree.leaves, (found, expected, params)), strict=True):
        assert_close(one, other, 1e-5)
        assert jax.typeof(one).sharding.spec == jax.typeof(like).sharding.spec


@functools.cache
def on_one_device(name):
    return jax.jit(lambda p, batch: PRODUCTS[name](objective_on(batch), p))(PARAMS, BATCH)


@pytest.mark.parametrize(
    ("kind", "places"), [("Auto", "hidden"), ("Explicit", "hidden"), ("Explicit", "classes")]
)
@pytest.mark.parametrize("name", PRODUCTS)
def test_same_as_on_one_device(name, kind, places):
    params, batch = place(AxisType[kind], PLACES[places])
    found = jax.jit(lambda p, batch: PRODUCTS[name](objective_on(batch), p))(params, batch)
    assert_same(found, on_one_device(name), params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["factored", "dual"])
def test_step_of_every_engine(method, kind):
    """The updates are sharded as the parameters."""
    optimizer = so.block_hessian_free(engine=method, max_iterations=5, damping=0.1)

    @jax.jit
    def step(params, batch):
        objective = objective_on(batch)
        value, grad = jax.value_and_grad(objective)(params)
        state = optimizer.init(params)
        return optimizer.update(grad, state, params, value=value, grad=grad, value_fn=objective)[0]

    expected = step(PARAMS, BATCH)
    params, batch = place(kind, HIDDEN)
    assert_same(step(params, batch), expected, params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["factored", "dual"])
def test_convolution(name, kind):
    params = {"kernel": random(2, 2, 2, 4), "w": random(4, 3)}
    images = random(8, 4, 4, 2)
    dimensions = ("NHWC", "HWIO", "NHWC")

    def evaluate(p, images):
        def model(p):
            pixels = jax.lax.conv_general_dilated(
                images, p["kernel"], (1, 1), "SAME", dimension_numbers=dimensions
            )
            return jnp.mean(jnp.tanh(pixels), axis=(1, 2)) @ p["w"]

        objective = so.Objective(model, lambda z: jnp.mean(jnp.sum((z - 1) ** 2, axis=-1)))
        return PRODUCTS[name](objective, p)

    expected = jax.jit(evaluate)(params, images)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    images = jax.device_put(images, NamedSharding(mesh, P("data")))
    assert_same(jax.jit(evaluate)(params, images), expected, params)
