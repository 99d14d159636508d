"""Inverses, eigenvectors and moments along them against dense matrices, in double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder import factors as kf
from secondorder.layers.rows import rotated_moment
from tests.methods.comparisons import count_primitives
from tests.methods.kfac_oracle import (
    blocks,
    cross_entropy,
    mlp,
    normal,
    products,
    sample_of,
    squared,
    updated,
)

pytestmark = pytest.mark.usefixtures("x64")


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


def test_moments_of_sums_over_positions():
    """Linear and pooled, so that "reduce" gives the solution of the dense block."""
    x, y, params = normal(4, 5, 3), normal(4, 2), normal(3, 2)
    objective = so.Objective(lambda w: jnp.mean(x @ w, axis=1), squared(y))
    layers = so.find_layers(objective, params)
    tx = so.scale_by_kfac(
        layers, damping=0.1, curvature="exact", inverse="corrected", weight_sharing="reduce"
    )
    updates, _ = updated(tx, objective, params)
    (dense,) = blocks(objective, params, layers)
    gradient = np.ravel(jax.grad(objective)(params))
    expected = np.linalg.solve(dense + 0.1 * np.eye(6), gradient)
    np.testing.assert_allclose(np.ravel(updates), expected, rtol=1e-9)


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


# Behind a learning rate.


def step_by_hand(params, batch, averages, number):
    """Of tanh(x w + b) v with squared losses: new averages of the factors, and the gradient."""
    x, y = map(np.asarray, batch)
    (w, b), v = params
    ones, m = np.ones((len(x), 1)), len(x)
    first = np.concatenate([x, ones], axis=1)
    h = np.tanh(x @ w + b)
    slope, residual = 1 - h**2, 2 / m * (h @ v - y)
    gradients = [first.T @ ((residual @ v.T) * slope), h.T @ residual]
    back = np.einsum("nh,hk->nhk", slope, v) * np.sqrt(2 / m)  # for each case and each output
    new = [
        (first.T @ first / m, np.einsum("nhk,ngk->hg", back, back)),
        (h.T @ h / m, 2 * np.eye(2)),
    ]
    decay = 0.5 * (1 - 0.5**number) / (1 - 0.5 ** (number + 1))
    pairs = [
        tuple(decay * a + (1 - decay) * b for a, b in zip(old, now, strict=True))
        for old, now in zip(averages or new, new, strict=True)
    ]
    return pairs, gradients


def test_steps_of_the_optimizer_by_hand():
    """Momentum, weight decay, averages, and inverses that are not new in every step."""
    rng = np.random.default_rng(0)
    params = ((rng.normal(size=(3, 4)), rng.normal(size=4)), rng.normal(size=(4, 2)))

    def objective_on(x, y):
        return so.Objective(lambda p: jnp.tanh(x @ p[0][0] + p[0][1]) @ p[1], squared(y))

    batches = [(normal(8, 3, seed=k), normal(8, 2, seed=k)) for k in range(4)]
    given = jax.tree.map(jnp.asarray, params)
    layers = so.find_layers(objective_on(*batches[0]), given)
    tx = so.kfac(
        0.2, layers, momentum=0.7, weight_decay=0.05, damping=0.3, curvature="exact",
        inverse_every=4, moment_decay=0.5,
    )  # fmt: skip

    @jax.jit
    def step(params, state, batch):
        objective = objective_on(*batch)
        updates, state = tx.update(jax.grad(objective)(params), state, params, value_fn=objective)
        return jax.tree.map(jnp.add, params, updates), state

    state = tx.init(given)
    matrices = [np.concatenate([params[0][0], params[0][1][None]]), params[1]]
    velocities, averages, inverses = [0 * m for m in matrices], None, None
    for number, batch in enumerate(batches):
        given, state = step(given, state, batch)
        now = ((matrices[0][:-1], matrices[0][-1]), matrices[1])
        averages, gradients = step_by_hand(now, batch, averages, number)
        if number in (0, 1, 2):  # the fourth takes those of the third
            inverses = []
            for a, g in averages:
                balance = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
                inverses.append(
                    [
                        np.linalg.inv(factor + np.sqrt(0.3) * share * np.eye(len(factor)))
                        for factor, share in ((a, balance), (g, 1 / balance))
                    ]
                )
        for k, (first, second) in enumerate(inverses):
            direction = first @ (gradients[k] + 0.05 * matrices[k]) @ second
            velocities[k] = 0.7 * velocities[k] - 0.2 * direction
            matrices[k] = matrices[k] + velocities[k]
        # The weights of averages are in single precision.
        np.testing.assert_allclose(given[0][0], matrices[0][:-1], rtol=2e-6)
        np.testing.assert_allclose(given[0][1], matrices[0][-1], rtol=2e-6)
        np.testing.assert_allclose(given[1], matrices[1], rtol=2e-6)


# What it compiles to.


@pytest.mark.parametrize(
    ("inverse", "names"), [("cholesky", ("cholesky", "triangular_solve")), ("eigen", ("eigh",))]
)
def test_equal_layers_are_not_inverted_one_by_one(inverse, names):
    counts = []
    for depth in (2, 6):
        params = [normal(4, 4, seed=k) for k in range(depth)]
        objective = so.Objective(
            lambda p: functools.reduce(lambda h, w: jnp.tanh(h @ w), p, normal(8, 4)),
            lambda z: jnp.mean(z**2),
        )
        tx = so.scale_by_kfac(so.find_layers(objective, params), inverse=inverse)

        def update(params, state, tx=tx, objective=objective):
            return tx.update(params, state, params, value_fn=objective)

        traced = jax.make_jaxpr(update)(params, tx.init(params))
        counts.append([count_primitives(traced.jaxpr, {name}) for name in names])
    # One after another on CPUs, and as a batch elsewhere.
    assert counts[0] == counts[1] == [2] * len(names)
