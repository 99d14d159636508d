"""L-SR1 in other precisions, on meshes, and where something is not finite, empty or stationary."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import secondorder as so
from tests.meshes import make_mesh, use_mesh
from tests.methods.comparisons import all_finite, all_zero, identical

SETTINGS = {
    "memory_size": 3,
    "scale": "bb",
    "radius": 0.3,
    "skip": 1e-8,
    "acceptance": 1e-4,
    "momentum": 0.0,
    "diagonal": False,
    "restart_after": 4,
}
RULE = so.RadiusRule(shrink=0.5, grow=2.0, shrink_below=0.1, grow_above=0.75, reach=0.8)


def lsr1(**settings):
    return so.lsr1(**SETTINGS | {"radius_rule": RULE} | settings)


def start(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((3, 2)), "b": rng.standard_normal(2), "scale": 1.2}
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), params)


def batch(seed=1, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8, 3))
    return jnp.asarray(x, dtype), jnp.asarray(np.sin(x[:, :2]), dtype)


def loss(params, batch):
    x, y = batch
    outputs = params["scale"] * jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1))


class Given(NamedTuple):
    """What one step is told, apart from the batch."""

    scale: float = 1.0  # of the objective
    value: float = 0.0  # added to the value that is passed on
    gradient: float = 0.0  # added to one entry of the gradient
    trial: float = 0.0  # added to the objective at the trial point
    trial_gradient: bool = False  # whether it is not finite there, though the value is
    curvature: float = 0.0  # added to the objective for curvature


def make_step(tx, with_curvature=False):
    @jax.jit
    def step(params, state, batch, given):
        def objective(p):
            moved = jnp.any(p["w"] != params["w"]) | jnp.any(p["b"] != params["b"])
            value = given.scale * loss(p, batch) + jnp.where(moved, given.trial, 0)
            return value + jax.lax.cond(
                moved & given.trial_gradient,
                lambda b: jnp.sum(jnp.sqrt(0 * b)),  # zero, without a derivative
                lambda b: jnp.sum(0 * b),
                p["b"],
            ).astype(value.dtype)

        def other(p):
            return loss(p, batch) * (1 + given.curvature)

        value, grads = jax.value_and_grad(loss)(params, batch)
        value, grads = jax.tree.map(lambda leaf: given.scale * leaf, (value, grads))
        grads["w"] = grads["w"].at[1, 1].add(given.gradient)
        extra = {"curvature_fn": other} if with_curvature else {}
        return tx.update(
            grads, state, params,
            value=value + given.value, grad=grads, value_fn=objective, **extra,
        )  # fmt: skip

    return step


class Run:
    """A compiled step, and a state after a few steps of which the last was accepted."""

    def __init__(self, with_curvature=False, **settings):
        self.tx = lsr1(**settings)
        self.step = make_step(self.tx, with_curvature)
        self.params, self.state = start(), self.tx.init(start())
        self.history = []
        for _ in range(4):
            updates, self.state = self.step(self.params, self.state, batch(), Given())
            self.params = optax.apply_updates(self.params, updates)
            self.history.append(self.params)
        assert self.state.last_step > 0


@functools.cache
def plain_run():
    return Run()


@pytest.fixture
def run():
    return plain_run()


def without_gram(state):
    """The Gram matrix may be completed at any look at the memory."""
    return state._replace(memory=state.memory._replace(gram=None))


# Rejection.


def test_first_step_goes_down_the_gradient_to_the_boundary(run):
    state = run.tx.init(start())
    updates, new = run.step(start(), state, batch(), Given())
    grads = jax.grad(loss)(start(), batch())
    length = optax.tree_utils.tree_norm(grads)
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(u, -SETTINGS["radius"] * g / length, rtol=1e-5, atol=1e-7)
    assert new.metrics.scale == new.metrics.pairs_kept == new.metrics.smallest_eigenvalue == 0
    np.testing.assert_allclose(new.metrics.step_norm, SETTINGS["radius"], rtol=1e-6)


def test_a_rejected_step_is_zero_and_a_pair(run):
    updates, state = run.step(run.params, run.state, batch(), Given(trial=10.0))
    assert all_zero(updates)
    assert identical(optax.apply_updates(run.params, updates), run.params)
    bound = RULE.shrink * min(run.state.radius, state.metrics.step_norm)
    np.testing.assert_allclose(state.radius, bound, rtol=1e-5)
    assert state.metrics.ratio < 0
    assert state.metrics.rejections == run.state.metrics.rejections + 1
    assert state.rejected_in_a_row == 1
    assert state.last_step == 0
    assert state.memory.numbers.max() == run.state.memory.numbers.max() + 1
    slot = jnp.argmax(state.memory.numbers)
    step = jax.tree.map(lambda rows: rows[slot], state.memory.vectors[0])
    np.testing.assert_allclose(optax.tree_utils.tree_norm(step), 1, rtol=1e-3)


BAD_TRIALS = [
    *(Given(trial=bad) for bad in (np.nan, np.inf, -np.inf)),
    Given(trial_gradient=True),
]


@pytest.mark.parametrize("given", BAD_TRIALS, ids=["nan", "inf", "-inf", "gradient"])
def test_a_trial_that_is_not_finite_is_rejected_without_a_pair(run, given):
    """And shrinks the radius, also if only its gradient is not finite."""
    updates, state = run.step(run.params, run.state, batch(), given)
    assert all_zero(updates)
    assert state.radius < 0.51 * run.state.radius
    assert state.metrics.ratio == -np.inf
    assert state.metrics.rejections == run.state.metrics.rejections + 1
    assert state.metrics.nonfinite_steps == run.state.metrics.nonfinite_steps
    assert state.last_step == 0
    assert identical(without_gram(state).memory, without_gram(run.state).memory)
    assert all_finite(state.memory)
    _, after = run.step(run.params, state, batch(), Given())
    assert after.metrics.pairs_kept == state.metrics.pairs_kept
    assert all_finite(after)


def test_the_memory_is_emptied_after_enough_rejections(run):
    """The next step is that of a fresh memory, and its slots are used again."""
    state = run.state
    for _ in range(SETTINGS["restart_after"]):
        assert state.metrics.restarts == run.state.metrics.restarts
        updates, state = run.step(run.params, state, batch(), Given(trial=100.0))
        assert all_zero(updates)
    assert state.metrics.restarts == run.state.metrics.restarts + 1
    assert state.rejected_in_a_row == 0
    assert (state.memory.numbers == -1).all()
    updates, after = run.step(run.params, state, batch(), Given())
    fresh = run.tx.init(run.params)._replace(radius=state.radius)
    expected, fresh = run.step(run.params, fresh, batch(), Given())
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)
    assert after.metrics.pairs_kept == after.metrics.pairs_skipped == 0
    params = optax.apply_updates(run.params, updates)
    second, _ = run.step(params, after, batch(), Given())
    also, _ = run.step(params, fresh, batch(), Given())
    np.testing.assert_allclose(second["w"], also["w"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["value", "gradient", "batch"])
def test_a_batch_that_is_not_finite_changes_only_its_counter(run, where, bad):
    x, y = batch(9)
    given = Given()
    if where == "batch":
        x = x.at[2, 1].set(bad)
    else:
        given = given._replace(**{where: bad})
    updates, state = run.step(run.params, run.state, (x, y), given)
    assert all_zero(updates)
    counted = run.state.metrics._replace(nonfinite_steps=run.state.metrics.nonfinite_steps + 1)
    assert identical(without_gram(state), without_gram(run.state._replace(metrics=counted)))
    assert all_finite(state.memory)
    # Training goes on as if nothing had happened.
    updates, one = run.step(run.params, state, batch(10), Given())
    expected, other = run.step(run.params, run.state, batch(10), Given())
    assert identical(updates, expected)
    assert identical(one.memory, other.memory)
    assert all_finite(one)


def test_curvature_that_is_not_finite_gives_no_pair_and_no_momentum():
    """The step is taken, but the newest pair is not that of the last step."""
    run = Run(with_curvature=True, momentum=0.5)
    updates, state = run.step(run.params, run.state, batch(), Given(curvature=np.nan))
    assert not all_zero(updates)
    assert identical(without_gram(state).memory, without_gram(run.state).memory)
    assert state.last_step == 0
    params = optax.apply_updates(run.params, updates)
    after = [
        run.step(params, state._replace(last_step=jnp.float32(length)), batch(), Given())[0]
        for length in (0.0, 0.3)
    ]
    assert all_finite(after)
    assert np.abs(after[0]["w"] - after[1]["w"]).max() > 1e-3  # what an old pair would do


@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1e5, 1e10])
def test_objectives_of_any_scale_take_the_same_path(run, scale):
    """Nothing in the method has a unit."""
    params, state = start(), run.tx.init(start())
    for expected in run.history:
        updates, state = run.step(params, state, batch(), Given(scale=scale))
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], expected["w"], rtol=1e-2, atol=1e-3)
        assert all_finite((params, state))


def make_extreme_step(tx):
    @jax.jit
    def step(params, state, scale):
        def objective(p):
            return scale * jnp.sum((p - 1) ** 2)

        value, grad = jax.value_and_grad(objective)(params)
        updates, state = tx.update(grad, state, params, value=value, value_fn=objective)
        return updates, state, value, objective(params + updates)

    return step


@pytest.mark.parametrize("diagonal", [False, True])
def test_gradients_whose_squares_overflow_change_only_a_counter(diagonal):
    """They are finite, but no model can be made of them."""
    tx, params = lsr1(diagonal=diagonal), jnp.zeros(3)
    step, state = make_extreme_step(tx), tx.init(params)
    updates, state, value, _ = step(params, state, 1.0)
    params += updates
    assert updates.all()
    assert np.isfinite(value)
    updates, after, value, _ = step(params, state, 1e25)
    assert np.isfinite(value)
    assert not updates.any()
    counted = state.metrics._replace(nonfinite_steps=state.metrics.nonfinite_steps + 1)
    assert identical(without_gram(after), without_gram(state._replace(metrics=counted)))
    updates, after, value, new = step(params, after, 1.0)
    assert new < value
    assert all_finite(after)


@pytest.mark.parametrize("scale", [1e-25, 1e-30])
@pytest.mark.parametrize("diagonal", [False, True])
def test_gradients_whose_squares_underflow_never_lead_up(diagonal, scale):
    """They count as zero: the steps are random ones, of which those that lead down are taken."""
    tx, params = lsr1(diagonal=diagonal), jnp.zeros(3)
    step, state = make_extreme_step(tx), tx.init(params)
    for _ in range(12):
        updates, state, value, new = step(params, state, scale)
        assert new <= value
        params += updates
    assert all_finite((params, state))
    assert state.metrics.probes > 0
    # It goes on where the scale is one again, but for the region that those steps tell nothing of.
    before = float(jnp.sum((params - 1) ** 2))
    for _ in range(6):
        updates, state, _, new = step(params, state, 1.0)
        params += updates
    assert new < 0.1 * before


def test_a_value_in_half_precision_has_its_own_noise():
    """What it cannot resolve is no failure of the model, whatever the dtype of the parameters."""

    def objective(p):
        return (1 + jnp.sum(p**2)).astype(value_dtype)

    tx, params, found = lsr1(radius=1e-3), jnp.array([0.02, 0.01]), {}
    for value_dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        value, grad = jax.value_and_grad(objective)(params)
        updates, state = tx.update(grad, tx.init(params), params, value=value, value_fn=objective)
        found[value_dtype] = float(state.metrics.ratio)
        assert updates.all()
        assert state.radius >= 1e-3
    assert found[jnp.bfloat16] == pytest.approx(1, abs=0.01)
    assert found[jnp.float32] == pytest.approx(found[jnp.float16], abs=0.2)


# Stationary points.


@functools.cache
def toy_step():
    tx = lsr1(radius=0.5)

    @jax.jit
    def step(params, state, bend):
        def objective(p):
            return p[0] ** 2 + bend * p[1] ** 2 + (bend < 0) * p[1] ** 4 / 4

        updates, state = tx.update(jax.grad(objective)(params), state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state

    return tx, step


def test_a_random_step_leaves_a_saddle_point():
    tx, step = toy_step()
    params = jnp.zeros(2)
    state = tx.init(params)
    for _ in range(30):
        params, state = step(params, state, -1.0)
    assert state.metrics.probes >= 1
    np.testing.assert_allclose(jnp.abs(params), [0, np.sqrt(2)], atol=1e-3)


@pytest.mark.parametrize("bend", [1.0, 0.0])
def test_random_steps_at_a_minimum_are_rejected_and_keep_the_radius(bend):
    tx, step = toy_step()
    params = jnp.zeros(2)
    state = tx.init(params)
    for count in range(1, 10):
        params, state = step(params, state, bend)
        assert not params.any()
        assert state.radius == 0.5
        assert state.metrics.rejections == count
    assert state.metrics.probes > 1
    # It still moves when there is a reason to.
    params, state = step(jnp.array([1.0, 1.0]), state, bend)
    assert params[0] < 1


# Shapes.


@pytest.mark.parametrize("make", [so.lsr1, so.scale_by_lsr1])
@pytest.mark.parametrize("empty", [{}, (), {"a": None, "b": []}])
def test_parameters_without_arrays_are_an_error(make, empty):
    tx = make()
    with pytest.raises(ValueError, match="`params` has no arrays"):
        tx.update(empty, tx.init(empty), empty, value_fn=lambda p: jnp.float32(0))


@pytest.mark.parametrize(
    "params",
    [
        jnp.array([2.0]),
        jnp.float32(2.0),
        {"empty": jnp.ones((0, 3)), "none": None, "tree": {}, "w": [jnp.ones((2, 1))]},
    ],
    ids=["one element", "scalar", "empty leaves"],
)
def test_parameters_of_any_shape(params):
    tx = lsr1(memory_size=5)

    def objective(params):
        return sum(jnp.sum((leaf - 0.5) ** 2) for leaf in jax.tree.leaves(params)) + 1.0

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=objective)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(10):
        params, state = step(params, state)
    assert objective(params) < 1 + 1e-6
    assert all_finite(state.memory)


# Precisions.


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def assert_fixed_types(tx, params, batch):
    """What `update` makes of a state has its types; judged by tracing alone."""
    state = tx.init(params)

    def step(params, state):
        return tx.update(
            jax.grad(loss)(params, batch), state, params, value_fn=lambda p: loss(p, batch)
        )

    updates, new = jax.eval_shape(step, params, state)
    assert types(new) == types(jax.eval_shape(lambda: state))
    assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    return state


@pytest.mark.parametrize("storage", [None, "bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_any_storage_dtype_serves_any_parameters(x64, dtype, storage):
    tx = lsr1(
        storage_dtype=storage, momentum=0.1, diagonal=True, diagonal_decay=0.9, full_batch=True
    )
    state = assert_fixed_types(tx, start(dtype), batch(dtype=dtype))
    wide = jnp.result_type(dtype, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.memory.vectors)} == {
        jnp.dtype(storage or wide)
    }
    assert state.radius.dtype == state.memory.gram.dtype == wide


@pytest.mark.parametrize("kind", [np.float64, jnp.float64])
def test_hyperparameters_of_another_dtype_leave_the_types_of_the_state(x64, kind):
    names = ("radius", "acceptance", "skip", "momentum", "diagonal_decay", "weight_decay", "scale")
    tx = lsr1(**{name: kind(0.1) for name in names}, diagonal=True, full_batch=True)
    assert_fixed_types(tx, start(), batch())


def test_a_value_in_double_precision_leaves_the_types_of_the_state(x64):
    assert_fixed_types(lsr1(full_batch=True), start(), batch(dtype=jnp.float64))


def test_weakly_typed_parameters_have_a_state_that_is_not():
    params = {"w": jnp.full((3, 2), 0.1), "b": jnp.full(2, 0.1), "scale": jnp.asarray(1.0)}
    assert params["w"].weak_type
    tx = lsr1(full_batch=True, diagonal=True, diagonal_decay=0.9)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(tx.init(params)))


def test_bfloat16_parameters_train_and_keep_a_float32_state():
    params, data = start(jnp.bfloat16), batch(dtype=jnp.bfloat16)
    tx = lsr1()
    step, state = make_step(tx), tx.init(params)
    for _ in range(20):
        updates, state = step(params, state, data, Given())
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
        params = optax.apply_updates(params, updates)
    assert all_finite((params, state))
    assert state.radius.dtype == jnp.float32
    assert loss(params, data) < 0.5 * loss(start(jnp.bfloat16), data)
    # A step that the parameters do not resolve is no pair: it would say that nothing curves.
    fresh = tx.init(params)._replace(radius=jnp.float32(1e-6))
    large = jax.tree.map(lambda p: 0 * p + 4, params)
    _, state = step(large, fresh, data, Given())
    assert state.metrics.step_norm > 0
    assert (state.memory.numbers == -1).all()


def test_bfloat16_storage_is_close_to_float32(run):
    found = Run(storage_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.state.memory.vectors)} == {
        jnp.dtype(jnp.bfloat16)
    }
    for one, other in zip(found.history, run.history, strict=True):
        np.testing.assert_allclose(one["w"], other["w"], rtol=2e-2, atol=1e-2)
    assert not identical(found.history[-1], run.history[-1])


def test_pairs_that_overflow_their_storage_are_not_stored():
    """They would stay in the memory as infinities that no empty slot can mask."""
    run = Run(storage_dtype=jnp.float16)
    params, state = start(), run.tx.init(start())
    for _ in range(10):
        updates, state = run.step(params, state, batch(), Given(scale=1e7))
        params = optax.apply_updates(params, updates)
        assert all_finite((params, state.memory))
    assert loss(params, batch()) < 0.9 * loss(start(), batch())


# Metrics.


@functools.cache
def quadratic_metrics(size, **settings):
    """Metrics at the minimum of a quadratic with curvatures 2 .. size + 1, and these."""
    curvatures = jnp.arange(2.0, size + 2)
    tx = lsr1(**settings)

    @jax.jit
    def step(params, state):
        def objective(p):
            return jnp.sum(curvatures * p**2) / 2

        updates, state = tx.update(jax.grad(objective)(params), state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state

    params = jnp.linspace(1.0, 2.0, size)
    state = tx.init(params)
    for _ in range(size + 2):
        params, state = step(params, state)
    return state.metrics


def test_extreme_eigenvalues_are_those_of_the_matrix(x64):
    """Where pairs span everything the scale is no eigenvalue, and elsewhere it is one."""
    metrics = quadratic_metrics(3, memory_size=6, scale="pencil_below")
    assert metrics.pairs_kept == 3
    np.testing.assert_allclose(metrics.smallest_eigenvalue, 2, rtol=1e-3)
    np.testing.assert_allclose(metrics.largest_eigenvalue, 4, rtol=1e-3)
    assert metrics.scale < 1.5
    metrics = quadratic_metrics(8, memory_size=2, scale=100.0)
    assert metrics.pairs_kept == 2
    assert metrics.largest_eigenvalue == metrics.scale == 100


# Compilation.


def test_seeds_are_mapped_steps_scanned_and_the_state_donated():
    """Also over rejected steps and batches that are not finite."""
    tx = lsr1(momentum=0.2)
    inner = make_step(tx)
    scales = jnp.array([1.0, 1.0, np.nan, 1.0, 1.0, 1.0])
    trials = jnp.array([0.0, 0.0, 0.0, 100.0, 0.0, 0.0])

    def run(params, state):
        def body(carry, given):
            params, state = carry
            updates, state = inner(params, state, batch(), Given(*given[:1], trial=given[1]))
            return (optax.apply_updates(params, updates), state), state.radius

        return jax.lax.scan(body, (params, state), (scales, trials))

    seeds = [jax.tree.map(lambda leaf, k=k: leaf * (1 + 0.3 * k), start()) for k in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    mapped = jax.jit(jax.vmap(run), donate_argnums=(0, 1))
    (params, state), radii = mapped(stacked, jax.vmap(tx.init)(stacked))
    assert (state.metrics.nonfinite_steps == 1).all()
    assert (state.metrics.rejections >= 1).all()
    for k, (one, expected) in enumerate(zip(params["w"], seeds, strict=True)):
        own = tx.init(expected)
        for scale, trial in zip(scales, trials, strict=True):
            updates, own = inner(expected, own, batch(), Given(scale, trial=trial))
            expected = optax.apply_updates(expected, updates)
        np.testing.assert_allclose(one, expected["w"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(radii[k, -1], own.radius, rtol=1e-3)


def test_it_compiles_once(run):
    assert run.step._cache_size() == 1


# Meshes.


P = PartitionSpec
PLACES = {"w": P(None, "model"), "v": P(None, "model"), "b": P("model"), "scale": P()}


def wide_params():
    rng = np.random.default_rng(5)
    shapes = {"w": (4, 8), "v": (8, 2), "b": (8,), "scale": ()}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def train_wide(params, data, tx, steps=8):
    traces = []

    @jax.jit
    def step(params, state, x, y):
        traces.append(1)

        def objective(p):
            outputs = jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
            return jnp.mean(jnp.sum((p["scale"] * outputs - y) ** 2, axis=-1))

        grads = jax.grad(objective)(params)
        updates, state = tx.update(grads, state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state, updates

    state = jax.jit(tx.init)(params)
    states = [state]
    for _ in range(steps):
        params, state, updates = step(params, state, *data)
        states.append(state)
    return params, states, updates, len(traces)


@functools.cache
def mesh_problem():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((16, 4))
    tx = lsr1(momentum=0.1, radius=2.0, memory_size=4, diagonal=True, diagonal_decay=0.9)
    data = x, np.sin(x[:, :2])
    params, states, *_ = train_wide(jax.tree.map(jnp.asarray, wide_params()), data, tx)
    assert states[-1].metrics.rejections > 0
    return tx, data, params, states[-1]


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight host devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sharded_parameters_take_the_same_path(x64, kind):
    tx, data, expected, expected_state = mesh_problem()
    mesh = make_mesh(4, 2, kind=kind)
    with use_mesh(mesh):
        params = {
            name: jax.device_put(leaf, NamedSharding(mesh, PLACES[name]))
            for name, leaf in wide_params().items()
        }
        data = [jax.device_put(array, NamedSharding(mesh, P("data", None))) for array in data]
        params, states, updates, traces = train_wide(params, data, tx)
        for name, leaf in params.items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(states[-1].radius, expected_state.radius, rtol=1e-5)
        assert states[-1].metrics.rejections == expected_state.metrics.rejections
        if kind == AxisType.Explicit:
            assert traces == 1
            for name, leaf in updates.items():
                assert leaf.sharding.spec == jax.typeof(params[name]).sharding.spec
            for state in states[1:]:
                for one, other in zip(
                    jax.tree.leaves(state), jax.tree.leaves(states[0]), strict=True
                ):
                    assert jax.typeof(one) == jax.typeof(other)


def test_a_random_step_works_on_an_explicit_mesh():
    """On which the branches of the choice must agree in their shardings."""
    mesh = make_mesh(1, 1)
    with use_mesh(mesh):
        params = jax.device_put(jnp.zeros((2, 4)), NamedSharding(mesh, P(None, "model")))
        tx = lsr1(storage_dtype=jnp.bfloat16)

        def step(params):
            state = tx.init(params)
            updates, _ = tx.update(params, state, params, value_fn=lambda p: jnp.sum(p**2))
            assert jax.typeof(updates).sharding.spec == P(None, "model")

        jax.eval_shape(step, params)
