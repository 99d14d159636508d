"""Training steps inside `jax.shard_map`, as users write who map their model by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import secondorder as so
from tests.marks import with_slow
from tests.meshes import make_mesh
from tests.protocol.registry import REGISTRY
from tests.protocol.test_sharded_protocol import BATCH, PARAMS, make, objective_on, on_one_device

P = PartitionSpec
pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="fewer than eight host devices"),
    pytest.mark.skipif(
        jax.__version_info__ < (0, 7), reason="JAX 0.6 loses track of what varies in its own loops"
    ),
]
GENERAL = ("lsr1", "shampoo", "soap", "scale_by_quadratic_model", "gauss_newton", "newton_cg")
NEEDS_EXAMPLES = ("kbfgs", "kfac", "pch", "hessian_free")  # the latter for its preconditioner


def objective_of_part(batch):
    """The mean over all devices, of which each has a part of the examples."""
    whole = objective_on(batch)
    return so.Objective(whole.model, lambda z: jax.lax.pmean(whole.loss(z), "data"))


def step(tx, params, state, batch):
    objective = objective_of_part(batch)
    value, grads = jax.value_and_grad(objective)(params)
    updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=objective)
    return optax.apply_updates(params, updates), state


def train(name):
    tx = make(next(entry for entry in REGISTRY if entry.name == name))
    mesh = make_mesh(8, names=("data",), kind=AxisType.Auto)
    specs = P(), P(), P("data")
    mapped = jax.jit(
        jax.shard_map(functools.partial(step, tx), mesh=mesh, in_specs=specs, out_specs=(P(), P()))
    )
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        params, state = mapped(params, state, BATCH)
    return params


@pytest.mark.parametrize("name", with_slow(GENERAL, "gauss_newton", "newton_cg"))
def test_gradients_and_products_are_enough(x64, name):
    expected = on_one_device(name)[1]
    for a, b in zip(*map(jax.tree.leaves, (train(name), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NEEDS_EXAMPLES)
def test_statistics_of_examples_are_refused(name):
    with pytest.raises(ValueError, match=r"statistics of the whole batch.*docs/sharding.md"):
        train(name)


def test_a_model_for_each_device():
    """Nothing is exchanged then, and nothing refused."""
    params = jnp.stack([np.eye(8, 2) * (i + 1) for i in range(8)])
    x = jnp.ones((8, 4, 8))

    def objective(p, x):
        return so.Objective(lambda p: x @ p, lambda z: jnp.mean(jnp.sum(z**2, axis=-1)))(p)

    tx = so.scale_by_kbfgs(so.find_layers(objective, params[0], x[0]))

    def update(p, x):
        value_fn = functools.partial(objective, x=x)
        return tx.update(jax.grad(value_fn)(p), tx.init(p), p, value_fn=value_fn)[0]

    mesh = make_mesh(8, names=("data",), kind=AxisType.Auto)
    mapped = jax.shard_map(
        lambda p, x: update(p[0], x[0])[None],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=False,
    )
    found = jax.jit(mapped)(params, x)
    np.testing.assert_allclose(found, jax.jit(jax.vmap(update))(params, x), rtol=1e-4, atol=1e-6)
