"""K-BFGS against the algorithm written out in NumPy, step by step in double precision."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from tests.methods.kbfgs_oracle import Oracle, Record

SIZES = [4, 4, 4, 3]  # two layers of one shape, and one of another
BATCH = 6
STEPS = 8


def training_step(tx, model_of):
    """A jitted step, which also returns the updates."""

    @jax.jit
    def step(params, state, batch):
        x, y = batch
        objective = so.Objective(
            lambda p: model_of(p, x),
            lambda z: jnp.mean(jnp.sum(jnp.log(jnp.cosh(z - y)), axis=tuple(range(1, z.ndim)))),
        )
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        params = jax.tree.map(jnp.add, params, updates)
        return params, state, updates

    return step


def layers_of(model_of, params, batch):
    x, y = batch
    return so.find_layers(lambda p: jnp.mean(jnp.sum((model_of(p, x) - y) ** 2, -1)), params)


def mlp(params, x):
    for k, (w, b) in enumerate(params):
        x = x @ w + b
        if k < len(params) - 1:
            x = jnp.tanh(x)
    return x


def mlp_pass(matrices, batch):
    """Gradients and records of the MLP, by hand."""
    x, y = batch
    inputs, outputs = [], []
    for k, w in enumerate(matrices):
        inputs.append(np.concatenate([x, np.ones((len(x), 1))], axis=1))
        outputs.append(inputs[-1] @ w)
        x = np.tanh(outputs[-1]) if k < len(matrices) - 1 else outputs[-1]
    g = np.tanh(x - y)  # the derivative of log cosh
    gradients, records = [], []
    for k in reversed(range(len(matrices))):
        gradients.append(inputs[k].T @ g / len(g))
        records.append(Record(inputs[k][:, None], outputs[k][:, None], g[:, None]))
        if k > 0:
            g = g @ matrices[k][:-1].T * (1 - inputs[k][:, :-1] ** 2)
    return gradients[::-1], records[::-1]


def problem(seed=0, steps=STEPS):
    rng = np.random.default_rng(seed)
    params = [
        (rng.standard_normal((i, o)), 0.1 * rng.standard_normal(o))
        for i, o in itertools.pairwise(SIZES)
    ]
    batches = [
        (rng.standard_normal((BATCH, SIZES[0])), 3 * rng.standard_normal((BATCH, SIZES[-1])))
        for _ in range(steps)
    ]
    return params, batches


def as_matrix(layer):
    w, b = layer
    return np.concatenate([w, b[None]])


@functools.cache
def trajectory(learning_rate=0.3, steps=STEPS, **settings):
    """The updates of the library as matrices, and its last state; under 64-bit types."""
    params, batches = problem(steps=steps)
    params = jax.tree.map(jnp.asarray, params)
    tx = so.kbfgs(learning_rate, layers_of(mlp, params, batches[0]), **settings)
    step = training_step(tx, mlp)
    state = tx.init(params)
    history = []
    for batch in batches:
        params, state, updates = step(params, state, batch)
        history.append([as_matrix(layer) for layer in jax.tree.map(np.asarray, updates)])
    return history, jax.tree.map(np.asarray, state)


def oracle_trajectory(learning_rate=0.3, steps=STEPS, **settings):
    params, batches = problem(steps=steps)
    matrices = [as_matrix(layer) for layer in params]
    previous = matrices
    oracle = Oracle([m.shape for m in matrices], **settings)
    history = []
    for batch in batches:
        gradients, here = mlp_pass(matrices, batch)
        _, before = mlp_pass(previous, batch)
        direction = oracle.step(gradients, here, before)
        previous = matrices
        history.append([-learning_rate * d for d in direction])
        matrices = [m + u for m, u in zip(matrices, history[-1], strict=True)]
    return history, oracle


def assert_equal_histories(found, expected, rtol=1e-8):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for update, oracle_update in zip(one, other, strict=True):
            scale = np.abs(oracle_update).max()
            np.testing.assert_allclose(update, oracle_update, rtol=0, atol=rtol * scale)


PAPER_2020 = {
    "input_factor": "moving_average",
    "pair_damping": "powell_identity",
    "damping_split": "plain",
    "acceptance": 1e-4,
}
VARIANTS = {
    "default": {},
    "paper of 2020": PAPER_2020,
    "trace split, heavy ball": {
        "damping_split": "trace",
        "momentum_form": "heavy_ball",
        "learning_rate": 0.03,
    },
    "strict gate, after, average": {
        "input_factor": "moving_average",
        "damping_split": "trace",
        "acceptance": 1.0,
        "refresh_order": "after",
    },
    "strict gate, heavy ball, identity": {
        "pair_damping": "powell_identity",
        "damping_split": "plain",
        "acceptance": 1.0,
        "momentum_form": "heavy_ball",
        "learning_rate": 0.03,
    },
    "every third": {"update_every": 3, "input_factor": "moving_average"},
    "every third, after, limited": {
        "update_every": 3,
        "refresh_order": "after",
        "memory_size": 1,
    },
    "limited": {"memory_size": 3},
    "limited, paper of 2020": {"memory_size": 2, "forget": "oldest", **PAPER_2020},
    "other decays": {
        "damping": 0.05,
        "pair_decay": 0.0,
        "moment_decay": 0.5,
        "momentum": 0.5,
        "powell_fraction": 0.6,
        "input_factor": "moving_average",
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_and_counters_equal_the_oracle(x64, variant):
    found, state = trajectory(**VARIANTS[variant])
    expected, oracle = oracle_trajectory(**VARIANTS[variant])
    assert_equal_histories(found, expected)
    metrics = state[0].metrics
    assert state[0].count == STEPS
    assert metrics.curvature_updates == oracle.refreshes
    assert metrics.nonfinite_steps == 0
    for side in ("input", "output"):
        for outcome in ("accepted", "rejected"):
            counted = getattr(metrics, f"{side}_pairs_{outcome}")
            assert counted == oracle.events[f"{side} {outcome}"], (side, outcome)


def test_the_variants_exercise_every_rule():
    """Otherwise the comparison above would say little."""
    events = {name: oracle_trajectory(**settings)[1].events for name, settings in VARIANTS.items()}
    assert all(event["powell"] > 0 for event in events.values())
    assert events["paper of 2020"]["identity"] > 0
    assert events["strict gate, after, average"]["input rejected"] > 0
    assert events["strict gate, after, average"]["input accepted"] > 0
    strict = events["strict gate, heavy ball, identity"]
    assert strict["output rejected"] > len(SIZES) - 1  # more than at the first step, where s = 0
    assert strict["output accepted"] > 0


def test_limited_memory_is_the_dense_method_until_it_forgets(x64):
    dense, _ = trajectory()
    limited, state = trajectory(memory_size=3)
    # At the first step nothing has moved, so the pairs of steps 2 to 4 fill the memory.
    assert_equal_histories(limited[:4], dense[:4], rtol=1e-10)
    for one, other in zip(limited[4], dense[4], strict=True):
        assert np.abs(one - other).max() > 1e-6
    assert all((m.accepted == STEPS - 1).all() for m in state[0].factors.output_inverses)


def test_output_inverse_satisfies_the_secant_equation(x64):
    """On a linear model and a squared loss the pair needs no damping of the first kind."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.standard_normal((5, 3))), jnp.asarray(rng.standard_normal((5, 2)))
    params = jnp.asarray(rng.standard_normal((3, 2)))
    objective = so.Objective(lambda w: x @ w, lambda z: jnp.mean(jnp.sum((z - y) ** 2, -1)))
    layers = so.find_layers(objective, params)
    tx = so.scale_by_kbfgs(layers, pair_decay=0.0, damping=0.09, damping_split="plain")
    update = jax.jit(
        lambda state, params: tx.update(
            jax.grad(objective)(params), state, params, value_fn=objective
        )
    )
    _, state = update(tx.init(params), params)
    old = state.factors.input_inverses[0][0]
    _, state = update(state, params - 0.1)
    s, y_ = state.factors.pairs[0][0]
    np.testing.assert_allclose(s, (x @ jnp.full((3, 2), -0.1)).mean(0), rtol=1e-9)
    np.testing.assert_allclose(y_, 2 * s, rtol=1e-9)
    np.testing.assert_allclose(state.factors.output_inverses[0][0] @ (y_ + 0.3 * s), s, rtol=1e-9)
    # Input side: s = H a, y = (A + l I) s.
    step = old @ x.mean(0)
    action = x.T @ (x @ step) / 5 + 0.3 * step
    np.testing.assert_allclose(state.factors.input_inverses[0][0] @ action, step, rtol=1e-9)


def test_an_exact_input_inverse_is_left_alone(x64):
    """The average of a constant batch's moment is that moment, whose inverse is known."""
    params, batches = problem()
    params = jax.tree.map(jnp.asarray, params)
    tx = so.kbfgs(0.3, layers_of(mlp, params, batches[0]), input_factor="moving_average")
    step = training_step(tx, mlp)
    state = tx.init(params)
    for _ in range(5):
        params, state, _ = step(params, state, batches[0])
    x = np.concatenate([batches[0][0], np.ones((BATCH, 1))], axis=1)
    exact = np.linalg.inv(x.T @ x / BATCH + np.sqrt(0.3) * np.eye(5))
    first, second = state[0].factors.input_inverses[0]
    np.testing.assert_allclose(first, exact, rtol=0, atol=1e-10)
    # The second layer's inputs move, so its inverse is only followed.
    moment = state[0].factors.input_moments[0][1]
    assert np.abs(np.linalg.inv(moment + np.sqrt(0.3) * np.eye(5)) - second).max() > 1e-4


# Convolutions and embeddings: many positions per example.


def run_both(model, params, batches, oracle, matrices, oracle_pass, to_matrices, **settings):
    """Trains by the library and by the oracle, and compares the updates."""
    tx = so.kbfgs(0.3, layers_of(model, params, batches[0]), **settings)
    step = training_step(tx, model)
    state, previous = tx.init(params), matrices
    for batch in batches:
        params, state, updates = step(params, state, batch)
        gradients, here = oracle_pass(matrices, batch)
        _, before = oracle_pass(previous, batch)
        direction = oracle.step(gradients, here, before)
        previous = matrices
        matrices = [m - 0.3 * d for m, d in zip(matrices, direction, strict=True)]
        found = to_matrices(jax.tree.map(np.asarray, updates))
        assert_equal_histories([found], [[-0.3 * d for d in direction]])


def head_pass(inputs, outputs, matrix, batch):
    """A last dense layer on tanh of all outputs of the first: gradients, records, cotangent."""
    y = batch[1]
    flat = np.tanh(outputs).reshape(len(y), -1)
    a = np.concatenate([flat, np.ones((len(y), 1))], axis=1)
    z = a @ matrix
    g = np.tanh(z - y)
    back = ((g @ matrix[:-1].T) * (1 - flat**2)).reshape(outputs.shape)
    gradient = np.einsum("nti,nto->io", inputs, back) / len(y)
    records = [Record(inputs, outputs, back), Record(a[:, None], z[:, None], g[:, None])]
    return [gradient, a.T @ g / len(y)], records


def patches(x):
    """The windows of a 3x3 convolution with stride 2 and padding (0, 1), by loops, with a one."""
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    windows = [
        [
            np.append(image[r : r + 3, c : c + 3].reshape(-1), 1.0)
            for r in range(0, image.shape[0] - 2, 2)
            for c in range(0, image.shape[1] - 2, 2)
        ]
        for image in padded
    ]
    return np.array(windows)


def cnn(params, x):
    (k, b), (w, c) = params
    h = jax.lax.conv_general_dilated(
        x, k, (2, 2), ((0, 1), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(h + b).reshape(len(x), -1) @ w + c


def cnn_pass(matrices, batch):
    inputs = patches(batch[0])
    return head_pass(inputs, inputs @ matrices[0], matrices[1], batch)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"damping_split": "trace", "input_factor": "moving_average", "memory_size": 2},
        {"damping_split": "plain", "pair_damping": "powell_identity"},
    ],
    ids=["sqrtT", "trace, average, limited", "plain, identity"],
)
def test_convolution_equals_the_oracle_on_patches(x64, settings):
    rng = np.random.default_rng(1)
    params = [
        (rng.standard_normal((3, 3, 2, 3)) / 4, rng.standard_normal(3)),
        (rng.standard_normal((12, 2)) / 3, rng.standard_normal(2)),
    ]
    batches = [(rng.standard_normal((4, 4, 4, 2)), rng.standard_normal((4, 2))) for _ in range(5)]

    def to_matrices(tree):
        (k, b), last = tree
        return [np.concatenate([k.reshape(-1, 3), b[None]]), as_matrix(last)]

    matrices = to_matrices(params)
    oracle = Oracle([m.shape for m in matrices], **settings)
    assert patches(batches[0][0]).shape == (4, 4, 19)
    run_both(
        cnn,
        jax.tree.map(jnp.asarray, params),
        batches,
        oracle,
        matrices,
        cnn_pass,
        to_matrices,
        **settings,
    )


def embed(params, x):
    table, (w, c) = params
    return jnp.tanh(table[x]).reshape(len(x), -1) @ w + c


def embed_pass(matrices, batch):
    inputs = np.eye(5)[batch[0]]
    return head_pass(inputs, inputs @ matrices[0], matrices[1], batch)


def test_embedding_has_a_diagonal_input_inverse(x64):
    rng = np.random.default_rng(2)
    params = (rng.standard_normal((5, 3)), (rng.standard_normal((6, 2)), rng.standard_normal(2)))
    # Few tokens per batch, so that some are never seen in it.
    batches = [(rng.integers(0, 5, (3, 2)), rng.standard_normal((3, 2))) for _ in range(5)]

    def to_matrices(tree):
        return [tree[0], as_matrix(tree[1])]

    matrices = to_matrices(params)
    oracle = Oracle([m.shape for m in matrices], diagonal=[0])
    run_both(
        embed, jax.tree.map(jnp.asarray, params), batches, oracle, matrices, embed_pass, to_matrices
    )
    assert oracle.layers[0].moment.shape == (5, 5)
