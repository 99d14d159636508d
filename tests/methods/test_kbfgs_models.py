"""K-BFGS on models that share, stack or scan their layers, and on Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def train(model, params, x, target, steps=6, learning_rate=0.1, **settings):
    """Losses, updates of all steps and the last parameters, on one batch."""

    def loss(z):
        return jnp.mean(jnp.sum((z - target) ** 2, axis=-1))

    objective = so.Objective(lambda p: model(p, x), loss)
    layers = so.find_layers(objective, params)
    tx = so.kbfgs(learning_rate, layers, **settings)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return (optax.apply_updates(params, updates), state), (value, updates)

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))
    (params, state), (values, updates) = run((params, tx.init(params)))
    return np.asarray(values), updates, params, layers, state


def assert_trains(values, factor):
    assert np.isfinite(values).all()
    assert values[-1] < factor * values[0]


def test_dense_equals_convolution_of_single_pixels(x64):
    x, y = normal(0, 6, 4), normal(1, 6, 2)
    k, b, w = normal(2, 4, 3), normal(3, 3), normal(4, 3, 2)

    def dense(params, x):
        k, b, w = params
        return jnp.tanh(x @ k + b) @ w

    def conv(params, x):
        k, b, w = params
        h = jax.lax.conv_general_dilated(
            x[:, None, None], k[None, None], (1, 1), "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return jnp.tanh(h + b)[:, 0, 0] @ w

    _, one, _, dense_layers, _ = train(dense, (k, b, w), x, y)
    _, other, _, conv_layers, _ = train(conv, (k, b, w), x, y)
    assert [layer.kind for layer in conv_layers.layers] == ["conv", "dense"]
    assert [layer.kind for layer in dense_layers.layers] == ["dense", "dense"]
    for a, c in zip(one, other, strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-9, atol=1e-12)


def test_scan_over_layers_equals_the_unrolled_model(x64):
    x, y = normal(0, 6, 3), normal(1, 6, 3)
    w, b = normal(2, 2, 3, 3), normal(3, 2, 3)

    def scanned(params, x):
        def body(h, layer):
            return jnp.tanh(h @ layer[0] + layer[1]), None

        return jax.lax.scan(body, x, params)[0]

    def unrolled(params, x):
        for w, b in params:
            x = jnp.tanh(x @ w + b)
        return x

    _, stacked, _, layers, _ = train(scanned, (w, b), x, y)
    _, separate, _, _, _ = train(unrolled, [(w[0], b[0]), (w[1], b[1])], x, y)
    assert [layer.stack for layer in layers.layers] == [2]
    for k in range(2):
        for a, c in zip(stacked, separate[k], strict=True):
            np.testing.assert_allclose(a[:, k], c, rtol=1e-9, atol=1e-12)


def test_a_layer_used_twice_trains():
    def model(w, x):
        return jnp.tanh(x @ w) @ w

    values, _, _, layers, state = train(
        model, 0.5 * normal(0, 3, 3), normal(1, 8, 3), normal(2, 8, 3) / 4, steps=40
    )
    assert layers.usages[0].uses == 2
    assert state[0].metrics.output_pairs_accepted == 39
    assert_trains(values, 0.8)


def test_a_tied_autoencoder_trains():
    x = normal(0, 16, 2) @ normal(1, 2, 6)  # of rank two: two units are enough

    def model(params, x):
        return (x @ params["w"] + params["b"]) @ params["w"].T

    params = {"w": normal(2, 6, 2) / 3, "b": jnp.zeros(2)}
    values, _, _, layers, _ = train(model, params, x, x, steps=40)
    assert layers.usages[0].tied == 1
    assert_trains(values, 0.3)


def test_flax_batch_norm_and_dropout_train():
    """The objective has aux outputs; scales and offsets of the normalization use the fallback."""
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(8)(x))
            x = nn.Dropout(0.2, deterministic=False)(nn.relu(x))
            return nn.Dense(2)(x)

    model, x = Model(), normal(0, 16, 4)
    y = jnp.stack([x[:, 0] * x[:, 1], x[:, 2]], axis=1)
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

    def objective_on(stats, key):
        def apply(params):
            return model.apply(
                {"params": params, "batch_stats": stats}, x,
                rngs={"dropout": key}, mutable=["batch_stats"],
            )  # fmt: skip

        return so.Objective(apply, lambda z: jnp.mean((z - y) ** 2), has_aux=True)

    params, stats = variables["params"], variables["batch_stats"]
    layers = so.find_layers(objective_on(stats, jax.random.key(0)), params)
    assert len(layers) == 2
    unassigned = [layers.leaves[i].path for i, _ in layers.unassigned]

    assert sorted(unassigned) == ["BatchNorm_0/bias", "BatchNorm_0/scale"]
    tx = so.kbfgs(0.1, layers)

    def step(carry, key):
        params, stats, state = carry
        objective = objective_on(stats, key)
        (value, aux), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return (optax.apply_updates(params, updates), aux["batch_stats"], state), value

    keys = jax.random.split(jax.random.key(2), 100)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))
    (trained, new_stats, state), values = run((params, stats, tx.init(params)))
    assert_trains([values[:10].mean(), values[-10:].mean()], 0.5)
    assert state[0].metrics.nonfinite_steps == 0
    old, new = params["BatchNorm_0"]["scale"], trained["BatchNorm_0"]["scale"]
    assert np.abs(new - old).max() > 1e-3
    assert not jnp.array_equal(new_stats["BatchNorm_0"]["mean"], stats["BatchNorm_0"]["mean"])
