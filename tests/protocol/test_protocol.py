"""What every optimizer of the package must do as an optax transform.

After optax's own tests of contributed optimizers, with the extra arguments that these need. The
optimizers are those of `registry.py`. Not part of the protocol yet: `optax.masked` with a mask that
leaves parameters out, as the objective then sees other parameters than the optimizer.
"""

import contextlib
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from tests.meshes import make_mesh, place, use_mesh
from tests.protocol.registry import LAYERS, REGISTRY

RATE = 0.1
STEPS = 3


# The problem: a layer with a bias, and a parameter in no layer.


def params_of(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.standard_normal((3, 2)), dtype),
        "b": jnp.asarray(rng.standard_normal(2), dtype),
        "scale": jnp.asarray(1.25, dtype),
    }


def batch_of(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6, 3))
    return jnp.asarray(x, dtype), jnp.asarray(np.sin(x[:, :2]), dtype)


def objective_on(batch):
    x, y = batch
    return so.Objective(
        lambda p: p["scale"] * jnp.tanh(x @ p["w"] + p["b"]),
        lambda z: jnp.mean(jnp.sum((z - y) ** 2, axis=-1)),
    )


def arguments(entry, dtype=jnp.float32):
    """What the factory is called with, apart from a learning rate."""
    needed = {}
    if LAYERS in entry.needs:
        needed["layers"] = so.find_layers(objective_on(batch_of(0, dtype)), params_of(dtype))
    return {**entry.settings, **needed}


def make(entry, dtype=jnp.float32, learning_rate=RATE):
    """The optimizer; one that only gives a direction is followed by the learning rate.

    One that is terminal gives the step itself, and has no learning rate.
    """
    if entry.learning_rate:
        return entry.factory(learning_rate=learning_rate, **arguments(entry, dtype))
    direction = entry.factory(**arguments(entry, dtype))
    if entry.terminal:
        return direction
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


def make_step(tx, **extra):
    """The training step of the README, which works with `optax.lbfgs` as well."""

    def step(params, state, batch):
        objective = objective_on(batch)
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective, **extra
        )
        return optax.apply_updates(params, updates), state, updates

    return step


def train(tx, step=None, steps=STEPS):
    """The updates of a few steps and the last state."""
    step = step or jax.jit(make_step(tx))
    params, state, history = params_of(), tx.init(params_of()), []
    for seed in range(steps):
        params, state, updates = step(params, state, batch_of(seed))
        history.append(jax.tree.map(np.asarray, updates))
    return history, params, state


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


class Reference:
    """The bare optimizer, compiled once with both its arguments donated."""

    def __init__(self, entry):
        self.entry = entry
        self.tx = make(entry)
        self.donating = jax.jit(make_step(self.tx), donate_argnums=(0, 1))
        self.history, self.params, self.state = train(self.tx, self.donating)

    def step(self, params, state, batch):
        return self.donating(copy(params), copy(state), batch)


@functools.cache
def reference_of(name):
    return Reference(next(entry for entry in REGISTRY if entry.name == name))


@pytest.fixture(params=[entry.name for entry in REGISTRY])
def reference(request):
    return reference_of(request.param)


def assert_same(found, expected, rtol=1e-4):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), found, expected
    )


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def describe(tree):
    """Shape, dtype, weak type and sharding of every leaf."""
    return jax.tree.map(jax.typeof, tree)


# The reference itself.


def test_it_trains(reference):
    for updates in reference.history:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
        assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))
    batch = batch_of(0)
    params, state = params_of(), reference.tx.init(params_of())
    for _ in range(20):
        params, state, _ = reference.step(params, state, batch)
    assert objective_on(batch)(params) < 0.8 * objective_on(batch)(params_of())


def test_it_compiles_once(reference):
    assert reference.donating._cache_size() == 1


def test_no_buffer_is_in_the_state_twice(reference):
    """Otherwise donation would give one buffer away two times."""
    fresh = params_of()
    for tree in (
        (fresh, reference.tx.init(fresh)),
        reference.step(reference.params, reference.state, batch_of(0)),
        # Without compilation too.
        make_step(reference.tx)(reference.params, reference.state, batch_of(0))[:2],
    ):
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]
        assert len(set(pointers)) == len(pointers)


def test_init_takes_abstract_parameters(reference):
    abstract = jax.eval_shape(reference.tx.init, jax.eval_shape(params_of))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract)
    assert shapes == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), reference.tx.init(params_of())
    )


def test_state_is_made_of_arrays_and_has_metrics(reference):
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(reference.state))
    metrics = so.metrics(reference.state)
    assert all(leaf.shape == () for leaf in metrics.values())
    nonfinite = [value for name, value in metrics.items() if name.endswith("/nonfinite_steps")]
    assert nonfinite
    assert not any(nonfinite)


def test_map_params_finds_the_parameters_in_the_state(reference):
    map_params = optax.tree_utils.tree_map_params
    assert_identical(map_params(reference.tx, lambda leaf: leaf, reference.state), reference.state)
    shapes = []
    map_params(reference.tx, lambda leaf: shapes.append(leaf.shape), reference.state)
    per_copy = len(jax.tree.leaves(reference.params))
    assert bool(shapes) == reference.entry.remembers
    assert len(shapes) % per_copy == 0
    own = {leaf.shape for leaf in jax.tree.leaves(reference.params)}
    stacks = {shape[1:] for shape in shapes if shape not in own}  # of several of their vectors
    assert stacks <= own


def test_pickled_and_serialized_states_go_on_bit_for_bit(reference):
    expected = reference.step(reference.params, reference.state, batch_of(7))
    restored = [pickle.loads(pickle.dumps(reference.state))]
    with contextlib.suppress(ImportError):
        from flax import serialization

        blank = reference.tx.init(params_of())
        restored.append(serialization.from_bytes(blank, serialization.to_bytes(reference.state)))
    for state in restored:
        assert_identical(reference.step(reference.params, state, batch_of(7)), expected)


# Fixed points.


DTYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.fixture
def dtype(request):
    """A dtype, with 64-bit types on if it needs them."""
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield jnp.dtype(request.param)
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("dtype", DTYPES, indirect=True)
@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.name)
def test_state_is_a_fixed_point_in_every_dtype(entry, dtype):
    """Under cond and scan, which insist on it; judged by tracing alone."""
    tx = make(entry, dtype)
    step, batch = make_step(tx), batch_of(0, dtype)

    def conditionally(params, state):
        def stepped(operands):
            return step(*operands, batch)

        def idle(operands):
            return (*operands, jax.tree.map(jnp.zeros_like, params))

        return jax.lax.cond(params["scale"] > 0, stepped, idle, (params, state))

    def scanned(params, state):
        return jax.lax.scan(lambda c, _: (step(*c, batch)[:2], None), (params, state), length=2)[0]

    params = params_of(dtype)
    state = tx.init(params)
    expected = describe((params, state))
    for run in (conditionally, scanned):
        new = jax.eval_shape(run, params, state)
        assert jax.tree.structure(new[:2]) == jax.tree.structure((params, state))
        for a, b in zip(jax.tree.leaves(new[:2]), jax.tree.leaves(expected), strict=True):
            assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
    updates = jax.eval_shape(step, params, state, batch)[2]
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {dtype}
    if LAYERS in entry.needs:  # curvature is float32 or wider
        factors = optax.tree_utils.tree_get(state, "factors")
        assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(factors)} <= {4, 8}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"], indirect=True)
@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.name)
def test_half_precision_trains(entry, dtype):
    tx = make(entry, dtype)
    step, batch = jax.jit(make_step(tx)), batch_of(0, dtype)
    params = params_of(dtype)
    state = tx.init(params)
    for _ in range(15):
        params, state, _ = step(params, state, batch)
    first, last = (float(objective_on(batch)(p)) for p in (params_of(dtype), params))
    assert last < 0.9 * first
    assert step._cache_size() == 1


def test_sharding_is_a_fixed_point_on_an_explicit_mesh(reference):
    """Nothing is run; what is asked here is that no operation has to guess a sharding."""
    # With one device JAX 0.6 forgets the axes of what `init` returns.
    mesh = make_mesh(2, 2)
    spec = jax.sharding.PartitionSpec

    with use_mesh(mesh):
        fresh, batch = params_of(), batch_of(0)
        params = {
            "w": place(mesh, fresh["w"], None, "model"),
            "b": place(mesh, fresh["b"], "model"),
            "scale": place(mesh, fresh["scale"]),
        }
        batch = tuple(place(mesh, array, "data", None) for array in batch)
        state = jax.jit(reference.tx.init)(params)
        new = jax.eval_shape(make_step(reference.tx), params, state, batch)

        for a, b in zip(jax.tree.leaves(new[:2]), jax.tree.leaves((params, state)), strict=True):
            assert a.sharding.spec == jax.typeof(b).sharding.spec
        assert new[2]["w"].sharding.spec == spec(None, "model")


# Combined with other transforms.


def test_unknown_extra_arguments_are_ignored(reference):
    step = jax.jit(make_step(reference.tx, unknown=jnp.ones(3), another="word"))
    history, *_ = train(reference.tx, step)
    assert_same(history, reference.history)
    assert step._cache_size() == 1


def test_as_a_link_of_a_chain(reference):
    """Behind clipping and weight decay, before a schedule."""
    before = optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1))
    after = optax.scale_by_schedule(lambda count: 1 / (1.0 + count))
    chain = optax.chain(before, reference.tx, after)

    def by_hand(grads, params, state, objective, count):
        grads, _ = before.update(grads, before.init(params), params)
        updates, state = reference.tx.update(grads, state, params, value_fn=objective)
        return jax.tree.map(lambda u: u / (1.0 + count), updates), state

    @jax.jit
    def step(params, state, bare, batch, count):
        objective = objective_on(batch)
        grads = jax.grad(objective)(params)
        updates, state = chain.update(grads, state, params, value_fn=objective)
        expected, bare = by_hand(grads, params, bare, objective, count)
        return optax.apply_updates(params, updates), state, bare, updates, expected

    params = params_of()
    state, bare = chain.init(params), reference.tx.init(params)
    for seed in range(STEPS):
        params, state, bare, updates, expected = step(
            params, state, bare, batch_of(seed), jnp.float32(seed)
        )
        assert_same(updates, expected)
    assert_same(state[1], bare)


def test_injected_hyperparameters(reference):
    """Numbers are traced; structural integers are named as static."""
    entry = reference.entry
    given = arguments(entry) | ({"learning_rate": RATE} if entry.learning_rate else {})
    tx = optax.inject_hyperparams(entry.factory, static_args=entry.static)(**given)
    is_direction = not (entry.learning_rate or entry.terminal)
    if is_direction:
        tx = optax.chain(tx, optax.scale(-RATE))
    history, _, state = train(tx)
    assert_same(history, reference.history)
    injected = state[0] if is_direction else state
    assert not set(injected.hyperparams) & set(entry.static)
    assert injected.hyperparams


def test_schedules_equal_numbers(reference):
    """Of the step that is taken: the first is number zero."""
    if reference.entry.terminal:
        pytest.skip("it has no learning rate")
    numbers = jnp.array([RATE, 2 * RATE, 3 * RATE])
    history, *_ = train(make(reference.entry, learning_rate=lambda count: numbers[count]))
    assert_same(history[0], reference.history[0])
    # The second step starts where the first would have led, and is twice as long.
    assert_same(jax.tree.map(lambda leaf: leaf / 2, history[1]), reference.history[1])


def test_masked_by_a_mask_that_leaves_nothing_out(reference):
    history, *_ = train(optax.masked(reference.tx, jax.tree.map(lambda _: True, params_of())))
    assert_same(history, reference.history)


def test_apply_if_finite(reference):
    tx = optax.apply_if_finite(reference.tx, max_consecutive_errors=5)
    step = jax.jit(make_step(tx))
    history, params, state = train(tx, step)
    assert_same(history, reference.history)
    x, y = batch_of(0)
    _, new, updates = step(params, state, (x * np.nan, y))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    assert new.total_notfinite == 1
    assert_identical(new.inner_state, state.inner_state)


def test_multi_steps(reference):
    multi = optax.MultiSteps(reference.tx, every_k_schedule=2)
    history, *_ = train(multi, steps=2)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(history[0]))
    assert all(leaf.any() for leaf in jax.tree.leaves(history[1]))


def test_vmap_over_seeds(reference):
    tx = reference.tx

    def run(params):
        def body(carry, batch):
            params, state, updates = make_step(tx)(*carry, batch)
            return (params, state), updates

        batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(batch_of, range(STEPS)))
        return jax.lax.scan(body, (params, tx.init(params)), batches)

    seeds = [jax.tree.map(lambda leaf, k=k: leaf * (1 + 0.5 * k), params_of()) for k in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    (params, _), updates = jax.jit(jax.vmap(run))(stacked)
    for k in range(STEPS):
        assert_same(jax.tree.map(lambda leaf, k=k: leaf[0, k], updates), reference.history[k], 1e-3)
    other, state = seeds[1], tx.init(seeds[1])
    for seed in range(STEPS):
        other, state, _ = reference.step(other, state, batch_of(seed))
    assert_same(jax.tree.map(lambda leaf: leaf[1], params), other, 1e-3)


def test_the_same_step_serves_optax_lbfgs():
    history, params, _ = train(optax.lbfgs())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(history))
    assert objective_on(batch_of(0))(params) < objective_on(batch_of(0))(params_of())
