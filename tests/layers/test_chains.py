"""Chains: what is one and what is not, and the derivatives of the functions between layers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder.layers import chains

BATCH, WIDTHS = 6, (3, 4, 4, 2)


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(0.7 * rng.normal(size=shape), dtype=float)


def params_of(widths=WIDTHS):
    sides = itertools.pairwise(widths)
    return [{"w": normal(a, b, seed=i), "b": normal(b, seed=i)} for i, (a, b) in enumerate(sides)]


def mlp(function, params, x):
    for layer in params[:-1]:
        x = function(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss(z):
    return jnp.mean(jnp.sum((z - 1) ** 2, axis=-1))


def objective_of(model):
    x = normal(BATCH, WIDTHS[0], seed=9)
    return so.Objective(lambda p: model(p, x), loss)


def trace(model, params, loss=None, **settings):
    objective = objective_of(model)
    if loss is not None:
        objective = objective.with_loss(loss)
    return chains.trace_chain(
        objective, params, so.find_layers(objective, params, **settings)
    ), objective


def units_by_hand(function, params, x):
    """Slope and bend of every function, by scalar derivatives and the gradient in its value."""
    first = jax.vmap(jax.vmap(jax.grad(function)))
    second = jax.vmap(jax.vmap(jax.grad(jax.grad(function))))
    result, value = [], x
    for index, layer in enumerate(params[:-1]):
        s = value @ layer["w"] + layer["b"]
        value = function(s)
        outward = jax.grad(lambda a, k=index: loss(mlp(function, params[k + 1 :], a)))(value)
        result.append((first(s), second(s) * outward))
    return result


FUNCTIONS = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "scaled": lambda s: 1.7 * jnp.sin(s / 2) + s**2,
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_units(name):
    params = params_of()
    chain, _ = trace(lambda p, x: mlp(FUNCTIONS[name], p, x), params)
    expected = units_by_hand(FUNCTIONS[name], params, normal(BATCH, WIDTHS[0], seed=9))
    units = chains.read_units(chain, params)
    assert len(units) == len(WIDTHS) - 2
    for unit, (slope, bend) in zip(units, expected, strict=True):
        np.testing.assert_allclose(unit.slope, slope, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(unit.bend, bend, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_inputs_and_sums():
    params = params_of()
    chain, _ = trace(lambda p, x: mlp(jnp.tanh, p, x), params)
    seen = chain.run(params)
    x = normal(BATCH, WIDTHS[0], seed=9)
    inputs, sums = chains.layer_inputs(chain, seen), chains.layer_sums(chain, seen, params)
    for layer, a, s in zip(params, inputs, sums, strict=True):
        np.testing.assert_allclose(a, x, rtol=1e-12)
        x = jnp.tanh(x @ layer["w"] + layer["b"])
        np.testing.assert_allclose(jnp.tanh(s), x, rtol=1e-12)
    np.testing.assert_allclose(seen.outputs, sums[-1], rtol=1e-12)


def per_case(params, x):
    """As Equinox has it: weights from the left, vmapped over cases, with transposes between."""

    def one(x):
        for layer in params[:-1]:
            x = jnp.tanh(layer["w"].T @ x + layer["b"])
        return params[-1]["w"].T @ x + params[-1]["b"]

    return jax.vmap(one)(x)


def jitted(params, x):
    return jax.jit(lambda p, x: mlp(jax.jit(jax.nn.relu), p, x))(params, x)


def rematerialized(params, x):
    return jax.checkpoint(lambda p, x: mlp(jnp.tanh, p, x))(params, x)


def without_bias(params, x):
    return jnp.tanh(x @ params[0]["w"]) @ params[1]["w"] @ params[2]["w"]


def scaled_units(params, x):
    """Every unit has a function of its own."""
    return jnp.tanh(x @ params[0]["w"]) * params[0]["b"] @ params[1]["w"] @ params[2]["w"]


def with_a_head(params, x):
    return jax.nn.log_softmax(jnp.tanh(mlp(jnp.tanh, params, x)))[:, 0]


def before_the_first_layer(params, x):
    return mlp(jnp.tanh, params, (x - x.mean(0)) / jnp.linalg.norm(x))


@pytest.mark.parametrize(
    "model",
    [
        per_case,
        jitted,
        rematerialized,
        without_bias,
        scaled_units,
        with_a_head,
        before_the_first_layer,
    ],
)
def test_these_are_chains(model):
    params = params_of()
    chain, objective = trace(model, params, loss=lambda z: jnp.mean(z**2))
    assert len(chain.layers) == 3
    np.testing.assert_allclose(chain.run(params).outputs, objective.model(params), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_weights_from_the_left_make_the_same_units():
    params = params_of()
    chain, _ = trace(per_case, params)
    plain, _ = trace(lambda p, x: mlp(jnp.tanh, p, x), params)
    found, expected = (chains.read_units(c, params) for c in (chain, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


def softmax(params, x):
    return mlp(jax.nn.softmax, params, x)


def normalized(params, x):
    return mlp(lambda h: h - h.mean(-1, keepdims=True), params, x)


def shared(params, x):
    h = jnp.tanh(x @ params[0]["w"]) @ params[1]["w"]
    return jnp.tanh(h) @ params[1]["w"]


def residual(params, x):
    h = jnp.tanh(x @ params[0]["w"])
    return (jnp.tanh(h @ params[1]["w"]) + h) @ params[2]["w"]


def skip_to_the_result(params, x):
    h = jnp.tanh(x @ params[0]["w"])
    return h @ params[1]["w"] + h


def branches(params, x):
    return x @ params[0]["w"] + x[:, :1] @ params[0]["b"][None]


def attention(params, x):
    q, k = x @ params[0]["w"], x @ params[0]["w"][:, ::-1]
    return jax.nn.softmax(q @ k.T) @ q @ params[1]["w"]


def convolution(params, x):
    kernel = params[0]["w"][:, :, None].transpose(1, 2, 0)
    h = jax.lax.conv_general_dilated(x[:, None], kernel, (1,), "SAME")
    return h.reshape(len(x), -1)[:, :4] @ params[1]["w"]


def over_time(params, x):
    return mlp(jnp.tanh, params, jnp.stack([x, 2 * x], axis=1))[:, 0]


REFUSED = {
    "softmax": (softmax, "stands before '1/w'"),
    "normalized": (normalized, "`reduce_sum`"),
    "shared": (shared, "'1/w' is used 2 times"),
    "residual": (residual, "comes from '0/w', '1/w'"),
    "skip": (skip_to_the_result, "the result comes from '0/w', '1/w'"),
    "branches": (branches, "should come from"),
    "attention": (attention, "no chain"),
    "convolution": (convolution, "a layer of kind 'conv'"),
    "over_time": (over_time, "positions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_these_are_not(name):
    model, message = REFUSED[name]
    settings = {"batch_size": BATCH} if name == "over_time" else {}
    with pytest.raises(ValueError, match=r"no chain of dense layers") as error:
        trace(model, params_of(), **settings)
    assert message in str(error.value)


def test_a_scan_over_layers_is_not():
    params = {"in": normal(3, 4), "stack": normal(2, 4, 4)}

    def model(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["in"], p["stack"])[0]

    with pytest.raises(ValueError, match="stands in a scan"):
        trace(model, params)


def test_an_excluded_layer_in_the_middle_is_in_the_way():
    with pytest.raises(ValueError, match="`dot_general` stands before '2/w'"):
        trace(
            lambda p, x: mlp(jnp.tanh, p, x), params_of(), exclude=lambda path: path.startswith("1")
        )


def test_half_precision_is_read_in_float32():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params_of())
    x = normal(BATCH, WIDTHS[0]).astype(jnp.bfloat16)
    objective = so.Objective(lambda p: mlp(jnp.tanh, p, x), loss)
    chain = chains.trace_chain(objective, params, so.find_layers(objective, params))
    for unit in chains.read_units(chain, params):
        assert unit.slope.dtype == unit.bend.dtype == jnp.float32
