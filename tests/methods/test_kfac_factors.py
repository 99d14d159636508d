"""Kronecker factors against dense Gauss-Newton matrices, in double precision.

`blocks` makes the dense block of each weight from Jacobians; `products` what the factors say.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from secondorder import factors as kf
from secondorder.layers.cases import keeps_classes_apart
from secondorder.layers.rows import rotated_moment
from secondorder.methods.kfac_statistics import LayerPass, Settings

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape), dtype=float)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def squared(y):
    return lambda z: jnp.sum((z - y) ** 2) / len(y)


def cross_entropy(labels):
    return lambda z: -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(z), axis=-1))


def settings_of(**settings):
    given = {"curvature": "exact", "weight_sharing": "expand", "diagonals": (), **settings}
    return Settings(
        damping=0.1,
        inverse="cholesky",
        update_every=1,
        inverse_every=1,
        moment_decay=0.5,
        damping_split="trace",
        **given,
    )


def sample_of(objective, params, seed=0, **settings):
    """What a batch says of the layers, and these."""
    layers = so.find_layers(objective, params)
    layer_pass = LayerPass("kfac", settings_of(**settings), layers, objective, params)
    return layer_pass.sample(layer_pass.look(), jax.random.key(seed)), layers


def factors_of(objective, params, seed=0, **settings):
    """The state's factors after one batch, for each layer ``(A, G)``; and the layers."""
    layers = so.find_layers(objective, params)
    given = {"curvature": "exact", "fallback": optax.identity(), **settings}
    tx = so.scale_by_kfac(layers, **given)
    return updated(tx, objective, params)[1].factors, layers


def updated(tx, objective, params):
    """The update and the state after one step."""

    @jax.jit
    def update(params, state):
        return tx.update(jax.grad(objective)(params), state, params, value_fn=objective)

    return update(params, tx.init(params))


def products(factors):
    """For each group of one layer the matrix ``A (x) G``."""
    return [np.kron(a[0], g[0]) for a, g in zip(factors.inputs, factors.outputs, strict=True)]


def blocks(objective, params, layers):
    """For each layer the dense block of the Gauss-Newton matrix of its matrix, row by row."""
    jacobian = jax.jit(jax.jacobian(objective.model))(params)
    outputs = objective.model(params)
    size = outputs.size
    hessian = np.reshape(jax.hessian(objective.loss)(outputs), (size, size))
    rows = [leaf.reshape(size, *leaf.shape[outputs.ndim :]) for leaf in jax.tree.leaves(jacobian)]
    result = []
    for layer in layers.layers:
        to_matrix = jax.vmap(lambda *leaves, layer=layer: layer.to_matrix(leaves))
        matrix = np.reshape(to_matrix(*rows), (size, -1))
        result.append(matrix.T @ hessian @ matrix)
    return result


def assert_blocks(objective, params, rtol=1e-9, **settings):
    factors, layers = factors_of(objective, params, **settings)
    for found, expected in zip(products(factors), blocks(objective, params, layers), strict=True):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


# Where the factors are the Gauss-Newton blocks exactly.


def mlp(activation, sizes=(3, 4, 2)):
    pairs = list(itertools.pairwise(sizes))
    params = [
        {"w": normal(*pair, seed=i), "b": normal(pair[1], seed=i)} for i, pair in enumerate(pairs)
    ]

    def model(params, x):
        for layer in params[:-1]:
            x = activation(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    return model, params


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
    numbers = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}[dimensions]
    x = normal(3, *[5] * dimensions, 2)
    params = {"k": normal(*[3] * dimensions, 2, 4)}

    def model(params):
        z = jax.lax.conv_general_dilated(x, params["k"], dimension_numbers=numbers, **options)
        return jnp.sum(z, axis=tuple(range(1, z.ndim - 1))) if pooled else z

    y = jnp.zeros(jax.eval_shape(model, params).shape)
    return so.Objective(model, squared(y)), params


OPTIONS = {
    "valid": (2, {"window_strides": (1, 1), "padding": "VALID"}),
    "strides": (2, {"window_strides": (2, 2), "padding": "SAME"}),
    "dilation": (1, {"window_strides": (1,), "padding": [(2, 1)], "rhs_dilation": (2,)}),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", OPTIONS)
def test_convolutions(name, sharing):
    """Linear in the patches, so that the factors are exact in the setting of either."""
    dimensions, options = OPTIONS[name]
    objective, params = convolution(dimensions, sharing == "reduce", **options)
    assert_blocks(objective, params, weight_sharing=sharing)


def test_groups_of_a_convolution_are_blocks():
    x = normal(1, 1, 4)

    def model(params):
        return jax.lax.conv_general_dilated(
            x, params, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        )

    objective, params = so.Objective(model, squared(jnp.zeros((1, 1, 6)))), normal(3, 2, 6)
    factors, layers = factors_of(objective, params)
    assert factors.inputs[0].shape == (2, 6, 6)
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


def test_layers_of_a_scan_are_a_stack():
    x, y = normal(1, 3), normal(1, 3)

    def model(params):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)[0]

    params, objective = normal(4, 3, 3), so.Objective(model, squared(y))
    factors, layers = factors_of(objective, params)
    dense = blocks(objective, params, layers)[0].reshape(4, 9, 4, 9)
    for k in range(4):
        found = np.kron(factors.inputs[0][k], factors.outputs[0][k])
        np.testing.assert_allclose(found, dense[k, :, k], rtol=1e-9, atol=1e-12)


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


# Inverses.


@functools.cache
def network():
    return network_on(0), mlp(jnp.tanh)[1]


def network_on(seed):
    model, _ = mlp(jnp.tanh)
    x, y = normal(8, 3, seed=seed), jax.nn.softmax(normal(8, 2, seed=seed))
    return so.Objective(lambda p: model(p, x), cross_entropy(y))


def direction_of(**settings):
    objective, params = network()
    layers = so.find_layers(objective, params)
    tx = so.scale_by_kfac(layers, damping=0.1, curvature="exact", **settings)
    gradient = jax.grad(objective)(params)
    updates, state = updated(tx, objective, params)
    return [
        (
            np.ravel(layer.to_matrix(jax.tree.leaves(updates))),
            np.ravel(layer.to_matrix(jax.tree.leaves(gradient))),
            a[0],
            g[0],
        )
        for layer, a, g in zip(
            layers.layers, state.factors.inputs, state.factors.outputs, strict=True
        )
    ], state


def test_eigenvectors_solve_the_damped_system():
    for found, gradient, a, g in direction_of(inverse="eigen")[0]:
        dense = np.kron(a, g) + 0.1 * np.eye(len(gradient))
        np.testing.assert_allclose(found, np.linalg.solve(dense, gradient), rtol=1e-7)


@pytest.mark.parametrize("split", ["trace", "plain"])
def test_inverses_of_damped_factors(split):
    for found, gradient, a, g in direction_of(damping_split=split)[0]:
        balance = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g))) if split == "trace" else 1
        first = a + np.sqrt(0.1) * balance * np.eye(len(a))
        second = g + np.sqrt(0.1) / balance * np.eye(len(g))
        dense = np.kron(first, second)
        np.testing.assert_allclose(found, np.linalg.solve(dense, gradient), rtol=1e-7)


def test_corrected_eigenvalues_are_nearer_to_the_curvature():
    _, state = direction_of(inverse="corrected")
    objective, params = network()
    layers = so.find_layers(objective, params)
    inverses = state.inverses
    for index, expected in enumerate(blocks(objective, params, layers)):
        basis = np.kron(inverses.inputs[index][0], inverses.outputs[index][0])
        corrected = basis @ np.diag(np.ravel(inverses.spectra[index][0])) @ basis.T
        plain = products(state.factors)[index]
        distances = [np.linalg.norm(m - expected) for m in (corrected, plain)]
        assert distances[0] < 0.999 * distances[1]
        diagonal = np.diag(basis.T @ expected @ basis)
        np.testing.assert_allclose(
            np.ravel(inverses.spectra[index][0]), diagonal, rtol=1e-8, atol=1e-14
        )


def corrected_run(batches, decay=0.8):
    """States after one step for each batch, at the same parameters, with a new basis in each."""
    layers = so.find_layers(batches[0], network()[1])
    tx = so.scale_by_kfac(
        layers, curvature="exact", inverse="corrected", inverse_every=1, moment_decay=decay
    )
    params, states = network()[1], [tx.init(network()[1])]
    for objective in batches:
        update = jax.jit(lambda g, s, o=objective: tx.update(g, s, params, value_fn=o))
        states.append(update(jax.grad(objective)(params), states[-1])[1])
    return layers, states[1:]


def test_moments_in_a_new_basis_start_from_the_product():
    batches = [network_on(seed) for seed in range(3)]
    layers, states = corrected_run(batches)
    decay, last = float(kf.warm_decay(0.8, jnp.int32(2))), states[-1]
    dense = blocks(batches[-1], network()[1], layers)
    for index, (product, block) in enumerate(zip(products(last.factors), dense, strict=True)):
        basis = np.kron(last.inverses.inputs[index][0], last.inverses.outputs[index][0])
        before, now = (np.diag(basis.T @ matrix @ basis) for matrix in (product, block))
        found = np.ravel(last.inverses.spectra[index][0])
        np.testing.assert_allclose(
            found, decay * before + (1 - decay) * now, rtol=1e-6, atol=1e-9 * now.max()
        )


def test_moments_stay_nearer_to_the_curvature_in_every_new_basis():
    objective, params = network()
    layers, states = corrected_run([objective] * 3)
    for state in states:
        for index, expected in enumerate(blocks(objective, params, layers)):
            basis = np.kron(state.inverses.inputs[index][0], state.inverses.outputs[index][0])
            corrected = basis @ np.diag(np.ravel(state.inverses.spectra[index][0])) @ basis.T
            plain = products(state.factors)[index]
            distances = [np.linalg.norm(m - expected) for m in (corrected, plain)]
            assert distances[0] < 0.9999 * distances[1]


@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "corrected"])
def test_rows_of_an_embedding_that_were_not_seen(inverse):
    """Their gradient is not divided by the damping alone: a batch with one uses them once."""
    tokens, damping = jnp.array([[0, 2, 2], [1, 2, 0]]), 1e-3
    y = normal(2, 3, 4)
    objective = so.Objective(
        lambda p: jnp.tanh(p["t"][tokens]) @ p["v"], lambda z: jnp.sum((z - y) ** 2) / 2
    )
    params = {"t": normal(5, 3), "v": normal(3, 4)}
    layers = so.find_layers(objective, params)
    tx = so.scale_by_kfac(layers, damping=damping, curvature="exact", inverse=inverse)
    gradient = {"t": normal(5, 3, seed=1), "v": normal(3, 4, seed=1)}
    update = jax.jit(lambda g, s: tx.update(g, s, params, value_fn=objective))
    updates, state = update(gradient, tx.init(params))
    a, g = state.factors.inputs[0][0], state.factors.outputs[0][0]
    np.testing.assert_allclose(a, np.array([2, 1, 3, 0, 0]) / 2)
    least = np.maximum(a, 1 / 2)
    pi = np.sqrt(least.mean() / (np.trace(g) / 3))
    root = np.sqrt(damping)
    for row in (0, 3, 4) if inverse != "corrected" else (3, 4):
        dense = least[row] * g + damping * np.eye(3)
        if inverse == "cholesky":
            dense = (least[row] + pi * root) * (g + root / pi * np.eye(3))
        if inverse == "corrected":
            basis = state.inverses.outputs[0][0]
            dense = basis @ np.diag(np.diag(basis.T @ g @ basis) / 2 + damping) @ basis.T
        expected = np.linalg.solve(dense, gradient["t"][row])
        np.testing.assert_allclose(updates["t"][row], expected, rtol=1e-7)


def test_moments_that_overflow_are_left_out():
    """Though the factors are finite: the squares of their rows are not."""
    params, x = normal(4, 3), normal(16, 4)

    def on(scale):
        return so.Objective(lambda p: scale * x @ p, lambda z: scale**2 * jnp.mean(z**2))

    tx = so.scale_by_kfac(
        so.find_layers(on(1.0), params), inverse="corrected", inverse_every=4, moment_decay=0.5
    )
    update = jax.jit(lambda state, scale: tx.update(params, state, params, value_fn=on(scale)))
    state = tx.init(params)
    for _ in range(3):
        _, state = update(state, 1.0)
    _, new = update(state, 1e80)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new.factors))
    np.testing.assert_array_equal(new.inverses.spectra[0], state.inverses.spectra[0])
    assert new.metrics.failed_inverses == state.metrics.failed_inverses + 1 == 1


def test_rotated_moments_of_an_embedding():
    tokens = jnp.array([[0, 2, 2], [1, 2, 0]])
    objective = so.Objective(lambda p: p[tokens], squared(jnp.zeros((2, 3, 4))))
    sample, _ = sample_of(objective, normal(5, 4), curvature="sampled")
    (row,) = sample.rows
    basis = jnp.linalg.qr(normal(4, 4))[0][None]
    found = rotated_moment(row, jnp.ones((1, 5)), basis)[0]
    one_hot = jax.nn.one_hot(row.inputs[0], 5)
    expected = np.einsum("ri,ro->io", one_hot, (row.cotangents[0, 0] @ basis[0]) ** 2)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_inverses_of_different_sizes():
    matrices = [normal(2, n, 2 * n, seed=n) for n in (9, 10, 4)]
    matrices = [m @ jnp.swapaxes(m, 1, 2) for m in matrices]
    dampings = [jnp.array([0.1, 2.0])] * 3
    for matrix, damping, found in zip(
        matrices, dampings, kf.stacked_inverses(matrices, dampings), strict=True
    ):
        shift = damping[:, None, None] * np.eye(matrix.shape[-1])
        np.testing.assert_allclose(found, np.linalg.inv(matrix + shift), rtol=1e-7, atol=1e-9)


def test_averages_have_weights_that_sum_to_one():
    average = 0.0
    for count, value in enumerate((1.0, 2.0, 4.0)):
        decay = float(kf.warm_decay(0.5, jnp.int32(count)))
        average = decay * average + (1 - decay) * value
    assert average == pytest.approx((4 + 2 / 2 + 1 / 4) / (1 + 1 / 2 + 1 / 4))


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
