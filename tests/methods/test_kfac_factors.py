"""Kronecker factors against dense Gauss-Newton matrices, in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from secondorder.layers.cases import keeps_classes_apart
from secondorder.methods.kfac_statistics import LayerPass
from tests.methods.kfac_oracle import (
    assert_blocks,
    blocks,
    cross_entropy,
    factors_of,
    mlp,
    normal,
    products,
    settings_of,
    squared,
    updated,
)

pytestmark = pytest.mark.usefixtures("x64")


# Where the factors are the Gauss-Newton blocks exactly.


@pytest.mark.parametrize("loss", ["squares", "cross entropy"])
def test_one_case_with_any_loss(loss):
    model, params = mlp(jnp.tanh)
    x, y = normal(1, 3), jnp.array([[0.0, 1.0]])
    made = squared(y) if loss == "squares" else cross_entropy(y)
    assert_blocks(so.Objective(lambda p: model(p, x), made), params)


def test_deep_linear_network_with_squared_loss():
    model, params = mlp(lambda h: h, (3, 4, 3, 2))
    x, y = normal(6, 3), normal(6, 2)
    assert_blocks(so.Objective(lambda p: model(p, x), squared(y)), params)


def test_of_piecewise_linear_networks_the_blocks_are_those_of_the_hessian():
    model, params = mlp(jax.nn.relu)
    x, y = normal(1, 3), normal(1, 2)
    objective = so.Objective(lambda p: model(p, x), squared(y))
    factors, _ = factors_of(objective, params)
    hessian = jax.hessian(lambda w: objective([{**params[0], "w": w}, params[1]]))(params[0]["w"])
    found = products(factors)[0].reshape(4, 4, 4, 4)[:3, :, :3]  # without the bias's row
    np.testing.assert_allclose(found, hessian, rtol=1e-9, atol=1e-9)


def test_expand_where_positions_are_apart():
    """Tokens through linear layers, with a loss for each."""
    model, params = mlp(lambda h: h, (3, 4, 2))
    x, y = normal(4, 5, 3), normal(4, 5, 2)
    objective = so.Objective(lambda p: model(p, x), squared(y))
    assert_blocks(objective, params)


def test_reduce_where_outputs_are_means_over_positions():
    model, params = mlp(lambda h: h, (3, 4, 2))
    x, y = normal(4, 5, 3), normal(4, 2)
    objective = so.Objective(lambda p: jnp.mean(model(p, x), axis=1), squared(y))
    assert_blocks(objective, params, weight_sharing="reduce")
    factors, layers = factors_of(objective, params)
    expected = blocks(objective, params, layers)[0]
    assert not np.allclose(products(factors)[0], expected, rtol=1e-2)  # and expand is not


def convolution(dimensions, pooled, **options):
    """A convolution with whatever options, summed over pixels or not."""
    numbers = {
        1: ("NWC", "WIO", "NWC"),
        2: ("NHWC", "HWIO", "NHWC"),
        3: ("NDHWC", "DHWIO", "NDHWC"),
    }[dimensions]
    width, kernel = (5, 3) if dimensions < 3 else (4, 2)
    x = normal(3, *[width] * dimensions, 2)
    params = {"k": normal(*[kernel] * dimensions, 2, 4)}

    def model(params):
        z = jax.lax.conv_general_dilated(x, params["k"], dimension_numbers=numbers, **options)
        return jnp.sum(z, axis=tuple(range(1, z.ndim - 1))) if pooled else z

    y = jnp.zeros(jax.eval_shape(model, params).shape)
    return so.Objective(model, squared(y)), params


OPTIONS = {
    "valid": (2, {"window_strides": (1, 1), "padding": "VALID"}),
    "strides": (2, {"window_strides": (2, 2), "padding": "SAME"}),
    "dilation": (1, {"window_strides": (1,), "padding": [(2, 1)], "rhs_dilation": (2,)}),
    "volume": (3, {"window_strides": (1, 2, 1), "padding": "VALID", "rhs_dilation": (2, 1, 2)}),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", OPTIONS)
def test_convolutions(name, sharing):
    """Linear in the patches, so that the factors are exact in the setting of either."""
    dimensions, options = OPTIONS[name]
    objective, params = convolution(dimensions, sharing == "reduce", **options)
    assert_blocks(objective, params, weight_sharing=sharing)


@pytest.mark.parametrize(
    ("x", "kernel", "numbers"),
    [((1, 1, 4), (3, 2, 6), ("NWC", "WIO", "NWC")), ((3, 3, 4, 4), (3, 2, 2, 6), None)],
    ids=["one position", "positions of two dimensions"],
)
def test_groups_of_a_convolution_are_blocks(x, kernel, numbers):
    x, numbers = normal(*x), numbers or ("NHWC", "HWIO", "NHWC")

    def model(params):
        strides = (1,) * (x.ndim - 2)
        return jax.lax.conv_general_dilated(
            x, params, strides, "SAME", dimension_numbers=numbers, feature_group_count=2
        )

    y = jnp.zeros((*x.shape[:-1], 6))
    objective, params = so.Objective(model, squared(y)), normal(*kernel)
    factors, layers = factors_of(objective, params)
    width = np.prod(kernel[:-1])
    assert factors.inputs[0].shape == (2, width, width)
    dense = blocks(objective, params, layers)[0]
    size = len(dense) // 2
    for k in range(2):
        part = slice(k * size, (k + 1) * size)
        found = np.kron(factors.inputs[0][k], factors.outputs[0][k])
        np.testing.assert_allclose(found, dense[part, part], rtol=1e-9, atol=1e-12)


def test_embeddings_have_a_diagonal_factor():
    tokens = jnp.array([[0, 2, 2], [1, 2, 0]])
    objective = so.Objective(lambda p: p[tokens], squared(jnp.zeros((2, 3, 4))))
    factors, _ = factors_of(objective, normal(5, 4))
    np.testing.assert_allclose(factors.inputs[0][0], np.array([2, 1, 3, 0, 0]) / 2)
    np.testing.assert_allclose(factors.outputs[0][0], 2 * np.eye(4) * 3 / 3, rtol=1e-9)


def assert_stack_of_blocks(objective, params, atol):
    """Of a scan over one stack of square weights each has the block of its own."""
    factors, layers = factors_of(objective, params)
    length, size = len(params), params[0].size
    dense = blocks(objective, params, layers)[0].reshape(length, size, length, size)
    for k in range(length):
        found = np.kron(factors.inputs[0][k], factors.outputs[0][k])
        np.testing.assert_allclose(found, dense[k, :, k], rtol=1e-9, atol=atol)


def test_layers_of_a_scan_are_a_stack():
    x, y = normal(1, 3), normal(1, 3)

    def model(params):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)[0]

    assert_stack_of_blocks(so.Objective(model, squared(y)), normal(4, 3, 3), atol=1e-12)


def test_layers_of_a_scan_at_several_positions():
    x, y = normal(4, 3, 2), normal(4, 3, 2)

    def model(params):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, params)[0]

    assert_stack_of_blocks(so.Objective(model, squared(y)), normal(3, 2, 2), atol=1e-10)


def test_a_weight_of_all_steps_of_a_scan():
    x, y = normal(4, 5, 3), normal(4, 5, 2)

    def model(params):
        _, outputs = jax.lax.scan(
            lambda c, token: (c, token @ params["w"] + params["b"]), 0.0, jnp.moveaxis(x, 1, 0)
        )
        return jnp.moveaxis(outputs, 0, 1)

    assert_blocks(so.Objective(model, squared(y)), {"w": normal(3, 2), "b": normal(2)})


def test_one_case_with_a_normalization_between_layers():
    x, y = normal(1, 3), normal(1, 2)
    params = {"w": normal(3, 4), "b": normal(4), "v": normal(4, 2), "scale": normal(4)}

    def model(p):
        h = jnp.tanh(x @ p["w"] + p["b"])
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        h = h / jnp.sqrt(1e-3 + jnp.mean(h**2, axis=-1, keepdims=True))
        return (h * p["scale"]) @ p["v"]

    assert_blocks(so.Objective(model, squared(y)), params)


def test_heads_of_attention():
    """Of the queries, at one position of one case; and of the outputs, at any number."""
    params = {"q": normal(4, 2, 3), "o": normal(2, 4, 5)}

    def objective_on(cases, queries):
        tokens = normal(cases, 6, 4)

        def model(p):
            q = jnp.einsum("ntd,dhe->nthe", tokens[:, :queries], p["q"])
            k = jnp.einsum("nsd,dhe->nshe", tokens, normal(4, 2, 3, seed=1))
            weights = jax.nn.softmax(jnp.einsum("nthe,nshe->nhts", q, k))
            mixed = jnp.einsum("nhts,nsd->nthd", weights, tokens)
            return jnp.einsum("nthd,hdo->nto", mixed, p["o"])

        return so.Objective(model, squared(normal(cases, queries, 5)))

    for cases, queries, exact in ((1, 1, "qo"), (2, 3, "o")):
        objective = objective_on(cases, queries)
        factors, layers = factors_of(objective, params)
        found, dense = products(factors), blocks(objective, params, layers)
        paths = [layers.leaves[layer.weight].path for layer in layers.layers]
        for name in exact:
            index = paths.index(name)
            expected = dense[index]
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found[index], expected, rtol=1e-9, atol=1e-9 * scale)


def test_a_weight_that_is_used_twice():
    """Linear, so that a case's gradient is the mean input's product with the sum of cotangents."""
    x, z, y = normal(4, 3), normal(4, 3, seed=1), normal(4, 2)
    objective = so.Objective(lambda w: x @ w + z @ w, squared(y))
    assert_blocks(objective, normal(3, 2), weight_sharing="reduce")


def test_a_table_that_is_also_the_softmax_has_the_factors_of_its_lookup():
    tokens, y = jnp.array([3]), jnp.array([[0.0, 1.0, 0.0, 0.0]])

    def model(p):
        return jnp.tanh(p["in"][tokens]) @ p.get("out", p["in"]).T

    objective, table = so.Objective(model, cross_entropy(y)), normal(4, 3)
    factors, layers = factors_of(objective, {"in": table})
    assert layers.usages[0].tied == 1
    apart = {"in": table, "out": table}
    dense = blocks(objective, apart, so.find_layers(objective, apart))[0]
    found = np.kron(np.diag(factors.inputs[0][0]), factors.outputs[0][0])
    np.testing.assert_allclose(found, dense, rtol=1e-9, atol=1e-12)


def test_the_empirical_factors_of_one_case_are_its_gradient():
    model, params = mlp(jnp.tanh)
    x, y = normal(1, 3), normal(1, 2)
    objective = so.Objective(lambda p: model(p, x), squared(y))
    factors, layers = factors_of(objective, params, curvature="empirical")
    leaves = jax.tree.leaves(jax.grad(objective)(params))
    for found, layer in zip(products(factors), layers.layers, strict=True):
        gradient = np.ravel(layer.to_matrix(leaves))
        np.testing.assert_allclose(found, np.outer(gradient, gradient), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_empirical_factors_are_the_same_by_both_ways(sharing):
    """From the value, as the gradient is made, or from the outputs of the model."""
    model, params = mlp(jnp.tanh)
    x, y = normal(6, 3), normal(6, 2)
    objective = so.Objective(lambda p: model(p, x), squared(y))
    plain, _ = factors_of(objective, params, curvature="empirical")
    other, _ = factors_of(
        objective, params, curvature="empirical", weight_sharing=sharing, fallback="diagonal"
    )
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)


# In the mean.


@pytest.mark.parametrize("loss", ["squares", "cross entropy"])
def test_sampled_factors_tend_to_the_exact_ones(loss):
    model, params = mlp(jnp.tanh)
    x, y = normal(6, 3), jax.nn.softmax(normal(6, 2))
    made = squared(y) if loss == "squares" else cross_entropy(y)
    objective = so.Objective(lambda p: model(p, x), made)
    exact, _ = factors_of(objective, params)
    layers = so.find_layers(objective, params)
    layer_pass = LayerPass("kfac", settings_of(curvature="sampled"), layers, objective, params)
    seen = layer_pass.look()

    def output_factors(key):
        rows = layer_pass.sample(seen, key).rows
        return [jnp.einsum("msri,msrj->sij", row.cotangents, row.cotangents) for row in rows]

    keys = jax.random.split(jax.random.key(0), 4000)
    means = jax.tree.map(lambda leaf: np.mean(leaf, axis=0), jax.vmap(output_factors)(keys))
    for mean, expected in zip(means, exact.outputs, strict=True):
        np.testing.assert_allclose(mean, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("curvature", ["sampled", "exact", "empirical"])
def test_diagonals_of_other_parameters(curvature):
    """The estimate is right in the mean; a scale for each feature, which is in no layer."""
    x, y = normal(5, 3), normal(5, 3, seed=1)
    params = {"scale": normal(3), "shift": normal(3, seed=1)}
    objective = so.Objective(lambda p: jnp.tanh(x * p["scale"]) * p["shift"], squared(y))
    layers = so.find_layers(objective, params)
    settings = settings_of(curvature=curvature, diagonals=(0, 1))
    layer_pass = LayerPass("kfac", settings, layers, objective, params)
    seen = layer_pass.look()
    keys = jax.random.split(jax.random.key(0), 4000)
    squares = jax.vmap(lambda key: layer_pass.sample(seen, key).squares)(keys)
    mean = np.concatenate([np.mean(leaf, axis=0) for leaf in squares])
    if curvature == "empirical":

        def case(p, x, y):
            return jnp.sum((jnp.tanh(x * p["scale"]) * p["shift"] - y) ** 2)

        gradients = jax.vmap(jax.grad(case), (None, 0, 0))(params, x, y)
        expected = np.concatenate([np.mean(g**2, axis=0) for g in jax.tree.leaves(gradients)])
    else:
        jacobian = jax.jacobian(objective.model)(params)
        rows = [leaf.reshape(15, 3) for leaf in jax.tree.leaves(jacobian)]
        expected = 2 / 5 * np.concatenate([np.sum(row**2, axis=0) for row in rows])
    np.testing.assert_allclose(mean, expected, rtol=0.15)


@pytest.mark.parametrize("curvature", ["sampled", "exact"])
def test_diagonals_of_one_sample_are_near_the_curvature(curvature):
    """Of a normalization inside of a network: no entry is a small part of what it should be."""
    x, y = normal(64, 4), normal(64, 3)
    params = {
        "w": normal(4, 64), "scale": 1 + normal(64) / 8, "shift": normal(64), "v": normal(64, 3)
    }  # fmt: skip

    def model(p):
        h = jnp.tanh(x @ p["w"])
        return ((h - jnp.mean(h, 1, keepdims=True)) * p["scale"] + p["shift"]) @ p["v"]

    objective = so.Objective(model, squared(y))
    tx = so.scale_by_kfac(so.find_layers(objective, params), damping=1e-6, curvature=curvature)
    updates, _ = updated(tx, objective, params)
    gradient, jacobian = jax.grad(objective)(params), jax.jacobian(model)(params)
    for name in ("scale", "shift"):
        diagonal = 2 / 64 * np.sum(np.asarray(jacobian[name]) ** 2, axis=(0, 1))
        ratio = (gradient[name] / updates[name] - 1e-6) / diagonal
        assert ratio.min() > 0.1  # of the squares alone about 1e-3


def test_halves_of_a_batch_add():
    model, params = mlp(jnp.tanh)
    x, y = normal(8, 3), normal(8, 2)

    def factors(part):
        objective = so.Objective(lambda p: model(p, x[part]), squared(y[part]))
        return factors_of(objective, params)[0]

    whole, halves = factors(slice(None)), [factors(slice(4)), factors(slice(4, 8))]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "apart"),
    [
        (lambda z: jnp.mean(jnp.sum(jnp.maximum(z, 0) - z + jnp.log1p(jnp.exp(z)), -1)), True),
        (lambda z: jnp.mean(optax.sigmoid_binary_cross_entropy(z, jnp.ones_like(z))), True),
        (lambda z: jnp.mean(optax.softmax_cross_entropy(z, jnp.ones_like(z))), False),
        (lambda z: jnp.sum(jnp.linalg.norm(z, axis=-1)), False),
        (lambda z: jnp.sum(z[:, ::-1] * z), False),
    ],
)
def test_losses_that_keep_classes_apart(loss, apart):
    assert keeps_classes_apart(loss, normal(4, 3)) == apart
