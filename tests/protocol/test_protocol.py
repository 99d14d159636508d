"""What every optimizer of the package must do as an optax transform.

After optax's own tests of contributed optimizers, with the extra arguments that these need. The
optimizers are those of `registry.py`. What is seen without running a step is in `test_tracing.py`.
"""

import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import secondorder as so
from tests.meshes import make_mesh, place, use_mesh
from tests.protocol.problem import (
    RATE,
    STEPS,
    arguments,
    assert_identical,
    assert_same,
    batch_of,
    describe,
    make,
    make_step,
    objective_on,
    params_of,
    reference_of,
    train,
)
from tests.protocol.registry import LAYERS, REGISTRY, VARIANTS

RUN = [
    pytest.param(entry.name, marks=pytest.mark.slow if entry.name in VARIANTS else ())
    for entry in REGISTRY
]


@pytest.fixture(params=RUN)
def reference(request):
    return reference_of(request.param)


# The reference itself.


def test_it_trains(reference):
    for number, updates in enumerate(reference.history):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
        moves = number >= reference.entry.idle
        assert all(np.asarray(leaf).any() == moves for leaf in jax.tree.leaves(updates))
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
    assert_apart((fresh, reference.tx.init(fresh)))
    assert_apart(reference.step(reference.params, reference.state, batch_of(0)))


@pytest.mark.slow  # every operation is compiled on its own
def test_no_buffer_is_in_the_state_twice_without_compilation(reference):
    assert_apart(make_step(reference.tx)(reference.params, reference.state, batch_of(0))[:2])


def assert_apart(tree):
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


def restored_states(states, blank, folder):
    """States after a round trip through each kind of checkpoint."""
    yield [pickle.loads(pickle.dumps(state)) for state in states]
    yield [serialization.from_bytes(blank, serialization.to_bytes(state)) for state in states]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "states", dict(enumerate(states)))
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: dict.fromkeys(range(len(states)), blank))
        yield list(checkpointer.restore(folder / "states", target).values())


def test_restored_states_go_on_bit_for_bit(reference, tmp_path):
    """From every phase of a schedule of up to three steps."""
    params, state = params_of(), reference.tx.init(params_of())
    points = [(params, state)]
    for seed in range(STEPS + 1):
        params, state, _ = reference.step(params, state, batch_of(seed))
        points.append((params, state))
    blank, states = reference.tx.init(params_of()), [state for _, state in points[:-1]]
    for restored in restored_states(states, blank, tmp_path):
        for seed, state in enumerate(restored):
            assert describe(state) == describe(blank)
            new = reference.step(points[seed][0], state, batch_of(seed))
            assert_identical(new[:2], points[seed + 1])


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
    """Under cond within scan, which insist on it; judged by tracing alone, and once."""
    tx = make(entry, dtype)
    step, batch = make_step(tx), batch_of(0, dtype)

    def maybe(carry, go):
        def stepped(carry):
            params, state, updates = step(*carry, batch)
            return (params, state), updates

        def idle(carry):
            return carry, jax.tree.map(jnp.zeros_like, carry[0])

        return jax.lax.cond(go, stepped, idle, carry)

    params = params_of(dtype)
    state = tx.init(params)
    expected = describe((params, state))
    new, updates = jax.eval_shape(
        lambda *carry: jax.lax.scan(maybe, carry, jnp.ones(2, bool)), params, state
    )
    assert jax.tree.structure(new) == jax.tree.structure((params, state))
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {dtype}
    if LAYERS in entry.needs:  # curvature is float32 or wider
        factors = optax.tree_utils.tree_get(state, "factors")
        assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(factors)} <= {4, 8}


@pytest.mark.parametrize(
    "dtype", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"], indirect=True
)
@pytest.mark.parametrize("name", RUN)
def test_half_precision_trains(name, dtype):
    tx = make(next(entry for entry in REGISTRY if entry.name == name), dtype)
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
    with use_mesh(mesh):
        fresh, batch = params_of(), batch_of(0)
        params = {
            "w": place(mesh, fresh["w"], None, "model"),
            "b": place(mesh, fresh["b"], "model"),
            "scale": place(mesh, fresh["scale"]),
        }
        batch = tuple(place(mesh, array, "data", None) for array in batch)
        state = jax.jit(reference.tx.init)(params)
        step = make_step(reference.tx)

        def maybe(carry, go):
            stepped = jax.lax.cond(go, lambda c: step(*c, batch)[:2], lambda c: c, carry)
            return stepped, None

        # Loops and branches insist on equal types, of which shardings are a part.
        new = jax.eval_shape(lambda *c: jax.lax.scan(maybe, c, jnp.ones(2, bool))[0], params, state)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves((params, state)), strict=True):
            assert a.sharding.spec == jax.typeof(b).sharding.spec


# Parameters of every form.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A pytree that is a class and can be called, with what may be in one beside matrices."""

    w: Any
    b: Any
    scale: Any
    empty: Any
    nothing: Any
    no_leaves: Any

    def __call__(self, x):
        return self.scale * jnp.tanh(x @ self.w + self.b) + jnp.sum(self.empty)


RUN_WITH_MODULES = ("kbfgs", "kbfgs-l", "lsr1", "hessian_free", "newton_cg", "lrsfn")


def test_callable_modules_with_empty_and_missing_leaves(reference):
    entry, batch = reference.entry, batch_of(0)
    x, y = batch
    objective = so.Objective(lambda module: module(x), lambda z: jnp.mean((z - y) ** 2))
    params = Module(**params_of(), empty=jnp.zeros((0, 3)), nothing=None, no_leaves=({}, []))
    layers = {"layers": so.find_layers(objective, params)} if LAYERS in entry.needs else {}
    tx = make(entry, **layers)

    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    start = params, tx.init(params)
    assert describe(jax.eval_shape(step, *start)) == describe(start)
    if entry.name not in RUN_WITH_MODULES:  # what is left to show takes long to compile
        return
    (params, state), compiled = start, jax.jit(step)
    for _ in range(8):
        params, state = compiled(params, state)
    assert compiled._cache_size() == 1
    assert objective(params) < 0.95 * objective(start[0])


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


def test_a_batch_that_is_not_finite_spoils_nothing(reference):
    """Without `apply_if_finite`, and behind whatever momentum the method has."""
    x, y = batch_of(0)
    params, state, updates = reference.step(reference.params, reference.state, (x * np.nan, y))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, params)))
    for old, new in zip(jax.tree.leaves(reference.state), jax.tree.leaves(state), strict=True):
        assert (np.isfinite(new) | ~np.isfinite(old)).all()
    counted = [v for name, v in so.metrics(state).items() if name.endswith("/nonfinite_steps")]
    assert 1 in counted
    moved, _, updates = reference.step(params, state, batch_of(1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))


def test_multi_steps(reference):
    multi = optax.MultiSteps(reference.tx, every_k_schedule=2)
    idle = reference.entry.idle
    history, *_ = train(multi, steps=2 * (idle + 1))
    for updates in history[:-1]:
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    assert all(leaf.any() for leaf in jax.tree.leaves(history[-1]))


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
