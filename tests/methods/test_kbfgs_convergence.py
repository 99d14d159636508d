"""K-BFGS trains an autoencoder and a small CNN, faster than SGD with momentum at its best rate."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so

SGD_RATES = 10.0 ** jnp.arange(-3.5, 1.01, 0.25)


def autoencoder():
    """Data of rank three through three units; a mean of squared errors summed over features."""
    rng = np.random.default_rng(0)
    sizes = [16, 12, 3, 12, 16]
    params = [
        (jnp.float32(rng.standard_normal((i, o)) / i**0.5), jnp.zeros(o))
        for i, o in itertools.pairwise(sizes)
    ]
    data = jnp.float32(rng.standard_normal((64, 3)) @ rng.standard_normal((3, 16)))

    def model(params):
        h = data
        for k, (w, b) in enumerate(params):
            h = h @ w + b
            h = jnp.tanh(h) if k in (0, 2) else h
        return h

    return so.Objective(model, lambda z: jnp.mean(jnp.sum((z - data) ** 2, axis=1))), params


def digits_cnn():
    """One convolution and one dense layer on handwritten digits; cross entropy."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = jnp.float32(digits.images[:200, :, :, None] / 16)
    labels = jnp.asarray(digits.target[:200])
    rng = np.random.default_rng(0)
    params = [
        (jnp.float32(rng.standard_normal((3, 3, 1, 4)) / 3), jnp.zeros(4)),
        (jnp.float32(rng.standard_normal((64, 10)) / 8), jnp.zeros(10)),
    ]

    def model(params):
        (k, b), (w, c) = params
        h = jax.lax.conv_general_dilated(
            images, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(h + b).reshape(len(images), -1) @ w + c

    def loss(z):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, labels))

    return so.Objective(model, loss), params


PROBLEMS = {"autoencoder": autoencoder, "digits-cnn": digits_cnn}
# Steps, settings, and the factor by which the loss must fall.
TASKS = {
    "autoencoder": (60, {"learning_rate": 0.3, "damping": 0.3}, 0.06),
    "digits-cnn": (20, {"learning_rate": 3.0, "damping": 0.03}, 0.05),
}
VARIANTS = {
    "kbfgs": {},
    "kbfgs-l": {"memory_size": 10},
    "paper of 2020": {
        "input_factor": "moving_average",
        "pair_damping": "powell_identity",
        "damping_split": "plain",
        "acceptance": 1e-4,
    },
    "every second": {"update_every": 2},
}


def final_loss(objective, tx, params, steps):
    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    return objective(params)


@functools.cache
def best_of_sgd(name):
    """The lowest loss over a grid of rates around the best, after the same number of steps."""
    objective, params = PROBLEMS[name]()
    steps = TASKS[name][0]

    def trained(rate):
        tx = optax.with_extra_args_support(optax.sgd(rate, momentum=0.9))
        return final_loss(objective, tx, params, steps)

    losses = np.asarray(jax.jit(jax.vmap(trained))(SGD_RATES))
    losses = np.where(np.isfinite(losses), losses, np.inf)
    assert 0 < np.argmin(losses) < len(losses) - 1  # the grid holds the best rate
    return losses.min()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_loss_falls_and_sgd_is_beaten(name, variant):
    objective, params = PROBLEMS[name]()
    steps, settings, factor = TASKS[name]
    tx = so.kbfgs(layers=so.find_layers(objective, params), **settings, **VARIANTS[variant])
    loss = jax.jit(lambda params: final_loss(objective, tx, params, steps))(params)
    assert loss < factor * objective(params)
    assert loss < 0.8 * best_of_sgd(name)
