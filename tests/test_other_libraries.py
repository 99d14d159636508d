"""Models of Equinox and Haiku, with a method that works layer by layer and one that does not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from tests.marks import with_slow

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = np.sin(X[:, :1]) + X[:, 1:2]


def mean_square(outputs):
    return jnp.mean((outputs - Y) ** 2)


def equinox_model():
    """A module with functions and numbers in it; its arrays are the parameters."""
    equinox = pytest.importorskip("equinox", exc_type=ImportError)
    module = equinox.nn.MLP(4, 1, 8, 2, activation=jax.nn.tanh, key=jax.random.key(0))
    params, static = equinox.partition(module, equinox.is_inexact_array)
    return params, lambda p: jax.vmap(equinox.combine(p, static))(X)


def haiku_model():
    """A function that is transformed, with a state beside the parameters."""
    haiku = pytest.importorskip("haiku", exc_type=ImportError)

    def forward(x):
        average = haiku.ExponentialMovingAverage(0.9)(jnp.mean(x))
        return haiku.nets.MLP([8, 8, 1], activation=jnp.tanh)(x) + 0 * average

    model = haiku.without_apply_rng(haiku.transform_with_state(forward))
    params, state = model.init(jax.random.key(0), X)
    return params, lambda p: model.apply(p, state, X)[0]


MODELS = {"equinox": equinox_model, "haiku": haiku_model}
METHODS = {
    "kbfgs": lambda objective, params: so.kbfgs(
        0.3, so.find_layers(objective, params), strict=True
    ),
    "lsr1": lambda objective, params: so.lsr1(memory_size=4),
}


@pytest.mark.parametrize("method", with_slow(METHODS, "lsr1"))
@pytest.mark.parametrize("library", MODELS)
def test_models_of_other_libraries_train(library, method):
    params, model = MODELS[library]()
    objective = so.Objective(model, mean_square)
    tx = METHODS[method](objective, params)
    if method == "kbfgs":
        assert len(so.find_layers(objective, params)) == 3

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    start, state = params, tx.init(params)
    for _ in range(15):
        params, state = step(params, state)
    assert step._cache_size() == 1
    assert jax.tree.structure(params) == jax.tree.structure(start)
    assert objective(params) < 0.5 * objective(start)
    assert so.metrics(state)
