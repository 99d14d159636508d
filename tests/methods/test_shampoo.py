"""Shampoo: against an oracle with Kronecker products, and against what it is grafted with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from tests.meshes import make_mesh, place, use_mesh
from tests.methods import blockwise_oracle
from tests.methods.comparisons import count_primitives

STEPS = 5
SHAPES = {"scalar": (), "vector": (4,), "matrix": (3, 4), "tensor": (2, 3, 4)}


def gradients_of(shape, steps=STEPS, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return [rng.standard_normal(shape) for _ in range(steps)]


def directions_of(tx, gradients, params=None):
    """The directions at fixed parameters, and the last state."""
    params = jax.tree.map(jnp.zeros_like, gradients[0]) if params is None else params
    state, found, update = tx.init(params), [], jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        found.append(updates)
    return found, state


def tree_of(shapes=SHAPES, steps=STEPS, dtype=jnp.float32):
    columns = {name: gradients_of(shape, steps) for name, shape in shapes.items()}
    return [
        {name: jnp.asarray(column[t], dtype) for name, column in columns.items()}
        for t in range(steps)
    ]


def as_oracle(gradient):
    return gradient.reshape(gradient.shape or (1,))


PLAIN = {
    "grafting": "none",
    "gradient_decay": 0.0,
    "moment_decay": 0.9,
    "eps": 1e-3,
    "merge_dims": False,
}
ORACLES = [
    ({"moment_decay": None, "precondition_every": 1}, {"decay": None, "eps": 1e-3}),
    (
        {"gradient_decay": 0.5, "precondition_every": 2},
        {"decay": 0.9, "b1": 0.5, "every": 2, "eps": 1e-3},
    ),
    (
        {"root_order": 3, "start_preconditioning_step": 2, "precondition_every": 2},
        {"decay": 0.9, "eps": 1e-3, "order": 3, "start": 2, "every": 2},
    ),
    (
        {"root_solver": "newton", "precondition_every": 1},
        {"decay": 0.9, "eps": 1e-3},
    ),
]


@pytest.mark.parametrize(("settings", "expected"), ORACLES)
def test_against_the_oracle(x64, settings, expected):
    """Of tensors with any number of axes, all at once."""
    gradients = tree_of(dtype=jnp.float64)
    found, _ = directions_of(so.scale_by_shampoo(**PLAIN | settings), gradients)
    for name in SHAPES:
        known = blockwise_oracle.shampoo(
            [as_oracle(np.asarray(g[name])) for g in gradients], **expected
        )
        for direction, other in zip(found, known, strict=True):
            np.testing.assert_allclose(
                as_oracle(np.asarray(direction[name])), other, rtol=1e-6, atol=1e-8
            )


def test_one_side_is_the_shortest_axis(x64):
    shapes = {"wide": (3, 4), "tall": (4, 3), "square": (3, 3)}
    gradients = tree_of(shapes, dtype=jnp.float64)
    tx = so.scale_by_shampoo(**PLAIN, one_sided=True, precondition_every=1)
    found, state = directions_of(tx, gradients)
    for name, axis in {"wide": 0, "tall": 1, "square": 0}.items():
        given = [np.asarray(g[name]) for g in gradients]
        known = blockwise_oracle.shampoo(given, axes=[axis], decay=0.9, eps=1e-3)
        np.testing.assert_allclose(found[-1][name], known[-1], rtol=1e-6, atol=1e-7)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.statistics)) == 3 * 9


def test_merged_axes_are_those_of_a_matrix():
    """Of the kernel of a convolution."""
    kernels = gradients_of((2, 2, 3, 4))
    settings = PLAIN | {"merge_dims": True, "precondition_every": 1}
    merged, state = directions_of(so.scale_by_shampoo(**settings), list(map(jnp.float32, kernels)))
    matrices = [jnp.float32(kernel.reshape(12, 4)) for kernel in kernels]
    flat, _ = directions_of(so.scale_by_shampoo(**settings), matrices)
    np.testing.assert_array_equal(merged[-1].reshape(12, 4), flat[-1])
    assert [m.shape for m in jax.tree.leaves(state.roots)] == [(1, 12, 12), (1, 4, 4)]


def test_blocks_are_parameters_of_their_own():
    gradients = [jnp.float32(g) for g in gradients_of((6, 5))]
    tx = so.scale_by_shampoo(**PLAIN, block_size=3, precondition_every=1)
    whole, _ = directions_of(tx, gradients)
    parts = [{"a": g[:3, :3], "b": g[:3, 3:], "c": g[3:, :3], "d": g[3:, 3:]} for g in gradients]
    apart, _ = directions_of(so.scale_by_shampoo(**PLAIN, precondition_every=1), parts)
    joined = [jnp.block([[d["a"], d["b"]], [d["c"], d["d"]]]) for d in apart]
    np.testing.assert_allclose(jnp.stack(whole), jnp.stack(joined), rtol=1e-5, atol=1e-6)


def test_a_block_as_long_as_the_axes_is_all():
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    programs = []
    for block_size in (4, 1000):
        tx = so.scale_by_shampoo(block_size=block_size, merge_dims=False)
        programs.append(str(jax.make_jaxpr(tx.update)(params, tx.init(params), params)))
    assert programs[0] == programs[1]


# Grafting.

GRAFTED = {
    "sgd": optax.sgd,
    "adagrad": optax.adagrad,
    "rmsprop": optax.rmsprop,
    "adam": optax.adam,
}


@pytest.mark.parametrize("name", GRAFTED)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_before_the_start_it_is_the_grafted_method(name, momentum):
    """Step for step; with momentum behind the direction, as that of SGD is."""
    tx = so.shampoo(
        0.1, grafting=name, momentum=momentum, nesterov=True, start_preconditioning_step=STEPS
    )
    other = GRAFTED[name](0.1)
    if momentum:
        undo = optax.scale(-10.0)
        other = optax.chain(other, undo, optax.trace(momentum, nesterov=True), optax.scale(-0.1))
    if name == "sgd" and momentum:
        other = optax.sgd(0.1, momentum=momentum, nesterov=True)
    found, _ = directions_of(tx, tree_of())
    expected, _ = directions_of(other, tree_of())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


@pytest.mark.parametrize("name", GRAFTED)
def test_then_it_has_the_length_of_the_grafted_method(name):
    """And the direction that it has without grafting."""
    given = {"precondition_every": 1, "start_preconditioning_step": 2, "gradient_decay": 0.3}
    gradients = tree_of({"matrix": (3, 4)})
    found, _ = directions_of(so.scale_by_shampoo(grafting=name, **given), gradients)
    plain, _ = directions_of(so.scale_by_shampoo(grafting="none", **given), gradients)
    lengths, _ = directions_of(GRAFTED[name](-1.0), gradients)
    for t in range(2, STEPS):
        direction, length = plain[t]["matrix"], jnp.linalg.norm(lengths[t]["matrix"])
        expected = direction / jnp.linalg.norm(direction) * length
        np.testing.assert_allclose(found[t]["matrix"], expected, rtol=1e-4, atol=1e-6)


def test_grafting_of_any_transform_and_vectors_left_to_it():
    given = optax.scale_by_adam(b2=0.7)
    tx = so.scale_by_shampoo(grafting=given, precondition_vectors=False, precondition_every=1)
    found, _ = directions_of(tx, tree_of())
    expected, _ = directions_of(given, tree_of())
    for t in range(STEPS):
        np.testing.assert_allclose(found[t]["vector"], expected[t]["vector"], rtol=1e-5)
        lengths = [jnp.linalg.norm(d[t]["matrix"]) for d in (found, expected)]
        np.testing.assert_allclose(*lengths, rtol=1e-5)
    assert not np.allclose(found[-1]["matrix"], expected[-1]["matrix"], rtol=0.1)


# Weight decay.


def test_forms_of_weight_decay():
    gradients = [jnp.float32(g) for g in gradients_of((3,), 3)]
    params = jnp.ones(3)
    direction = so.scale_by_shampoo(precondition_every=2)
    decay, rate = optax.add_decayed_weights(0.1), optax.scale(-0.3)
    chains = {"l2": (decay, direction, rate), "decoupled": (direction, decay, rate)}
    for form, links in chains.items():
        tx = so.shampoo(0.3, precondition_every=2, weight_decay=0.1, weight_decay_form=form)
        found, _ = directions_of(tx, gradients, params)
        expected, _ = directions_of(optax.chain(*links), gradients, params)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


# The schedule.


def test_moments_and_roots_are_refreshed_when_they_are_due():
    tx = so.scale_by_shampoo(update_every=2, precondition_every=3, start_preconditioning_step=1)
    gradients = [jnp.float32(g) for g in gradients_of((3, 4), steps=8)]
    state, moments, roots = tx.init(gradients[0]), [], []
    update = jax.jit(tx.update)
    for gradient in gradients:
        previous = state
        _, state = update(gradient, state, gradient)
        changed = [
            not np.array_equal(old[0][0], new[0][0])
            for old, new in ((previous.statistics, state.statistics), (previous.roots, state.roots))
        ]
        moments.append(changed[0])
        roots.append(changed[1])
    assert moments == [True, False] * 4
    assert roots == [False, True, False, False, True, False, False, True]
    assert so.metrics(state)["shampoo/root_updates"] == 3
    expected = gradients[::2]
    weights = 0.99 ** np.arange(4)[::-1]
    average = sum(w * g @ g.T for w, g in zip(weights, expected, strict=True)) / weights.sum()
    np.testing.assert_allclose(state.statistics[0][0][0], average, rtol=1e-5, atol=1e-6)


# What is not finite.


def test_roots_that_are_not_found_stay_and_are_counted():
    gradients = tree_of()
    tx = so.scale_by_shampoo(precondition_every=1)
    _, state = directions_of(tx, gradients)
    groups = [list(group) for group in state.statistics]
    broken = next(i for i, group in enumerate(groups) if group[0].shape[-1] == 3)
    groups[broken][0] = groups[broken][0] * jnp.nan
    state = state._replace(statistics=tuple(map(tuple, groups)))
    updates, new = jax.jit(tx.update)(gradients[0], state, gradients[0])
    assert so.metrics(new)["shampoo/failed_roots"] == 1
    np.testing.assert_array_equal(new.roots[broken][0], state.roots[broken][0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, new.roots)))


def test_roots_that_take_more_damping_are_counted():
    """Of a moment that rounding has made indefinite."""
    gradient = jnp.ones((3, 3))
    tx = so.scale_by_shampoo(
        root_solver="newton",
        precondition_every=1,
        moment_decay=None,
        start_preconditioning_step=0,
    )
    state = tx.init(gradient)
    moment = jnp.diag(jnp.array([1.0, 0.5, -1e-4]))[None]
    state = state._replace(statistics=((moment, 1e6 * jnp.eye(3)[None]),))
    _, new = jax.jit(tx.update)(1e-6 * gradient, state, gradient)
    assert (new.metrics.failed_roots, new.metrics.retried_roots) == (0, 1)


@pytest.mark.parametrize("method", [so.scale_by_shampoo, so.scale_by_soap])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25])
def test_gradients_that_are_not_finite_change_a_counter(method, bad):
    """Nor those whose square is not."""
    gradients, tx = tree_of(), method(precondition_every=1)
    _, state = directions_of(tx, gradients)
    spoiled = gradients[0] | {"matrix": gradients[0]["matrix"].at[1, 1].set(bad)}
    updates, new = jax.jit(tx.update)(spoiled, state, gradients[0])
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert new.metrics.nonfinite_steps == 1
    kept = new._replace(metrics=state.metrics)
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_a_parameter_without_gradient_stays():
    gradients = [g | {"matrix": jnp.zeros((3, 4))} for g in tree_of()]
    found, state = directions_of(so.scale_by_shampoo(precondition_every=1), gradients)
    assert not any(d["matrix"].any() for d in found)
    assert state.metrics.failed_roots == 0


# What it compiles to.


@pytest.mark.parametrize(
    ("tx", "names"),
    [
        (so.scale_by_shampoo(grafting="none"), {"eigh", "dot_general"}),
        (so.scale_by_shampoo(root_solver="newton"), {"while", "dot_general"}),
        (so.scale_by_soap(), {"eigh", "geqrf", "qr", "householder_product", "dot_general"}),
    ],
)
def test_equal_layers_are_not_compiled_one_by_one(tx, names):
    counts = []
    for layers in (1, 2, 12):
        params = {i: {"w": jnp.ones((4, 6)), "b": jnp.ones(6)} for i in range(layers)}
        traced = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
        counts.append(count_primitives(traced.jaxpr, names))
    assert counts[0] == counts[1] == counts[2] > 0


# With others.


def test_as_the_direction_of_a_quadratic_model():
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.standard_normal((32, 5)) * 4.0 ** -np.arange(5))
    y = jnp.tanh(x @ jnp.float32(rng.standard_normal((5, 3)) * 4))
    objective = so.Objective(lambda w: jnp.tanh(x @ w), lambda z: jnp.mean((z - y) ** 2))
    tx = so.scale_by_quadratic_model(so.scale_by_shampoo(grafting="none"), damping=1e-3)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    params = jnp.zeros((5, 3))
    start, state = objective(params), tx.init(params)
    for _ in range(20):
        params, state = step(params, state)
    assert objective(params) < 0.2 * start
    assert so.metrics(state)["shampoo/root_updates"] == 2


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    "tx",
    [so.shampoo(0.1, precondition_every=2, block_size=4), so.soap(0.1, block_size=4)],
    ids=["shampoo", "soap"],
)
def test_sharded_rows_on_an_explicit_mesh(tx):
    """Blocks are spread over the devices, and the direction is that of one device."""
    gradients = [jnp.float32(g) for g in gradients_of((16, 4), steps=4)]
    params = jnp.ones((16, 4))
    expected, _ = directions_of(tx, gradients, params)
    mesh = make_mesh(4, 2)
    with use_mesh(mesh):
        sharded = place(mesh, params, "data", None)
        state, update = jax.jit(tx.init)(sharded), jax.jit(tx.update)
        for gradient, other in zip(gradients, expected, strict=True):
            updates, state = update(place(mesh, gradient, "data", None), state, sharded)
            assert jax.typeof(updates).sharding.spec == jax.typeof(sharded).sharding.spec
            np.testing.assert_allclose(updates, other, rtol=1e-4, atol=1e-5)
        shardings = [
            jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(state[0].statistics)
        ]
        assert all(spec[0] for spec in shardings)


# Wrong arguments.


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (so.scale_by_shampoo, {"grafting": "adamax"}, "one of 'none', 'sgd'"),
        (so.scale_by_shampoo, {"grafting": 3}, "a transform such as optax.scale_by_adam"),
        (so.scale_by_shampoo, {"eps": 0.0}, "`eps` must be in"),
        (so.scale_by_shampoo, {"gradient_decay": 1.0}, "`gradient_decay` must be in"),
        (so.scale_by_shampoo, {"moment_decay": -0.1}, "`moment_decay` must be in"),
        (so.scale_by_shampoo, {"root_order": 0}, "positive Python number"),
        (so.scale_by_shampoo, {"root_order": 1.5, "root_solver": "newton"}, "Python integer"),
        (so.scale_by_shampoo, {"root_solver": "qr"}, "one of 'eigh', 'newton'"),
        (so.scale_by_shampoo, {"start_preconditioning_step": -1}, "start_preconditioning_step"),
        (so.scale_by_shampoo, {"precondition_every": 0}, "precondition_every"),
        (so.scale_by_shampoo, {"update_every": 1.5}, "update_every"),
        (so.scale_by_shampoo, {"block_size": 0}, "block_size"),
        (so.scale_by_soap, {"one_sided": 1}, "one_sided"),
        (so.scale_by_soap, {"b1": 1.0}, "`b1` must be in"),
        (so.scale_by_soap, {"b2": 1.0}, "`b2` must be in"),
        (so.scale_by_soap, {"eps": 0.0}, "`eps` must be in"),
        (so.scale_by_soap, {"precondition_every": 0}, "precondition_every"),
    ],
)
def test_wrong_hyperparameters(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(**settings)


@pytest.mark.parametrize("method", [so.shampoo, so.soap])
def test_wrong_hyperparameters_of_the_optimizer(method):
    with pytest.raises(ValueError, match="weight_decay"):
        method(0.1, weight_decay=-1.0)
    with pytest.raises(ValueError, match="weight_decay_form"):
        method(0.1, weight_decay_form="L2")
    with pytest.raises(TypeError):
        method(0.1, unknown=1)
    tx = method(0.1)
    state = tx.init(jnp.ones(3))
    with pytest.raises(ValueError, match="needs the current `params`"):
        tx.update(jnp.ones(3), state)
