"""What a probed pass records, against perturbations written into the model; and what it costs."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder.layers import probes
from secondorder.layers.layer import trace_layers
from tests.layers.layer_models import normal, tokens

X = normal(4, 3)


def dense(p, eps):
    return jnp.tanh(X @ p["w"] + eps) ** 2


def dense_per_example(p, eps):
    return jax.vmap(lambda x, e: jnp.tanh(p["w"].T @ x + e))(X, eps.T) ** 2


def conv(p, eps):
    image = normal(4, 2, 5)
    return jnp.tanh(jax.lax.conv_general_dilated(image, p["k"], (2,), "SAME") + eps) ** 2


def embedding(p, eps):
    return jnp.tanh(p["t"][tokens(4, 2)] + eps) ** 2


def remat(p, eps):
    return jax.checkpoint(lambda w, e: jnp.tanh(X @ w + e))(p["w"], eps) ** 2


def stacked(p, eps):
    def body(h, layer):
        w, e = layer
        return jnp.tanh(h @ w + e), None

    return jax.lax.scan(body, X, (p["stack"], eps))[0] ** 2


def recurrent(p, eps):
    def body(h, e):
        h = jnp.tanh(h @ p["square"] + e)
        return h, h

    return jax.lax.scan(body, X, eps, reverse=True)[1] ** 2


def nested(p, eps):
    def outer(h, layer):
        w, e = layer

        def inner(h, e):
            return jnp.tanh(h @ w + e), None

        return jax.lax.scan(inner, h, e)

    return jax.lax.scan(outer, X, (p["stack"], eps))[0] ** 2


PARAMS = {
    "w": normal(3, 5),
    "square": normal(3, 3),
    "stack": normal(2, 3, 3),
    "k": normal(2, 2, 3),
    "t": normal(7, 3),
}
# Each with the shape of the perturbation: that of the layer's output, behind the axes of scans.
MODELS = {
    dense: (4, 5),
    dense_per_example: (5, 4),
    conv: (4, 2, 3),
    embedding: (4, 2, 3),
    remat: (4, 5),
    stacked: (2, 4, 3),
    recurrent: (3, 4, 3),
    nested: (2, 3, 4, 3),
}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_cotangents_are_derivatives_in_the_outputs(model):
    zeros = jnp.zeros(MODELS[model])

    def objective(p, eps=zeros):
        return jnp.mean(model(p, eps))

    layers = so.find_layers(objective, PARAMS)
    assert len(layers) == 1

    @jax.jit
    def both(params):
        discovery, (traced,), _ = trace_layers(layers, objective, params)
        tape = probes.record(discovery, params)
        site = traced.uses[0].site
        expected = jax.jacrev(objective, argnums=1)(params, zeros)
        return tape.value, objective(params), tape.cotangents[site], expected

    value, expected_value, cotangent, expected = both(PARAMS)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    assert np.all(expected != 0)
    if cotangent.shape != expected.shape:  # vmap chose another order of the axes
        assert model is dense_per_example
        cotangent = cotangent.T
    np.testing.assert_allclose(cotangent, expected, rtol=1e-5, atol=1e-7)


def test_records_operands_and_outputs_before_the_bias():
    params = {"w": normal(3, 5), "b": normal(5), "v": normal(5, 2)}

    def objective(p):
        return jnp.mean(jnp.tanh(X @ p["w"] + p["b"]) @ p["v"])

    layers = so.find_layers(objective, params)
    discovery, (first, second), _ = trace_layers(layers, objective, params)
    tape = probes.record(discovery, params)
    hidden = jnp.tanh(X @ params["w"] + params["b"])
    for traced, operand, output in (
        (first, X, X @ params["w"]),
        (second, hidden, hidden @ params["v"]),
    ):
        site = traced.uses[0].site
        np.testing.assert_allclose(tape.operands[site], operand, rtol=1e-6)
        np.testing.assert_allclose(tape.outputs[site], output, rtol=1e-5)


def test_records_at_any_point_and_with_further_arguments():
    """A trace is made once; parameters and batch are then arguments."""
    from secondorder.layers.discovery import discover

    def objective(p, x):
        return jnp.mean(jnp.tanh(x @ p) ** 2)

    discovery = discover(objective, normal(3, 5), X)
    w, x = normal(3, 5, seed=1), normal(4, 3, seed=1)
    tape = probes.record(discovery, w, x)
    np.testing.assert_allclose(tape.value, objective(w, x), rtol=1e-6)
    np.testing.assert_array_equal(tape.operands[0], x)


def test_other_derivative_rules_are_kept():
    """Functions with a rule of their own around layers still use it."""

    @jax.custom_vjp
    def scaled(h):
        return h

    scaled.defvjp(lambda h: (h, None), lambda _, g: (3 * g,))

    def objective(w):
        return jnp.mean(scaled(X @ w) ** 2)

    w = normal(3, 5)
    layers = so.find_layers(objective, w)
    discovery, (traced,), _ = trace_layers(layers, objective, w)
    cotangent = probes.record(discovery, w).cotangents[traced.uses[0].site]
    np.testing.assert_allclose(X.T @ cotangent, jax.grad(objective)(w), rtol=1e-5)


def mlp():
    sizes = [32, 64, 48, 32, 16, 32, 64, 32]
    pairs = itertools.pairwise(sizes)
    params = [{"w": normal(i, o), "b": normal(o)} for i, o in pairs]
    x = normal(64, 32)

    def objective(p):
        h = x
        for layer in p:
            h = jax.nn.relu(h @ layer["w"] + layer["b"])
        return jnp.mean((h - x) ** 2)

    return objective, params


def cnn():
    images = normal(16, 12, 12, 3)

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def objective(p):
        h = nn.max_pool(nn.relu(conv(images, p["k1"]) + p["b1"]), (2, 2), (2, 2))
        h = nn.max_pool(nn.relu(conv(h, p["k2"]) + p["b2"]), (2, 2), (2, 2))
        return -jnp.mean(nn.log_softmax(h.reshape(16, -1) @ p["w"])[:, 0])

    params = {
        "k1": normal(3, 3, 3, 8),
        "b1": normal(8),
        "k2": normal(3, 3, 8, 16),
        "b2": normal(16),
        "w": normal(144, 10),
    }
    return objective, params


def flops(function, *args) -> float:
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


@pytest.mark.parametrize("build", [mlp, cnn])
def test_xla_merges_the_pass_with_the_gradient(build):
    objective, params = build()
    layers = so.find_layers(objective, params)

    def gradient_and_record(params):
        gradient = jax.value_and_grad(objective)(params)
        discovery, _, _ = trace_layers(layers, objective, params)
        assert discovery.plan.merges
        return gradient, probes.record(discovery, params)

    alone = flops(jax.value_and_grad(objective), params)
    assert flops(gradient_and_record, params) <= 1.01 * alone


@pytest.mark.parametrize(("model", "merges"), [(dense, True), (remat, False), (stacked, False)])
def test_says_whether_xla_merges_it(model, merges):
    def objective(p):
        return jnp.mean(model(p, jnp.zeros(MODELS[model])))

    discovery, _, _ = trace_layers(so.find_layers(objective, PARAMS), objective, PARAMS)
    assert discovery.plan.merges == merges
