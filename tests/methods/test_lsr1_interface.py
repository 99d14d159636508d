"""What L-SR1 accepts and returns: its arguments, objectives, state, and place in a chain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so

SETTINGS = {
    "memory_size": 3,
    "scale": "bb",
    "radius": 0.3,
    "radius_rule": so.RadiusRule(),
    "skip": 1e-8,
    "acceptance": 1e-4,
    "momentum": 0.0,
    "diagonal": False,
}
X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).standard_normal((6, 2)), jnp.float32)
PARAMS = {"w": jnp.full((3, 2), 0.3), "b": jnp.array([0.1, -0.1])}


def model(params):
    return jnp.tanh(X @ params["w"] + params["b"])


def mse(outputs):
    return jnp.mean(jnp.sum((outputs - Y) ** 2, axis=-1))


OBJECTIVE = so.Objective(model, mse)


@functools.cache
def start():
    """Parameters and state after some steps, the last of which was accepted."""
    tx = so.lsr1(**SETTINGS)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(OBJECTIVE)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=OBJECTIVE
        )
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        params, state = step(params, state)
    assert state.last_step > 0
    assert OBJECTIVE(params) < OBJECTIVE(PARAMS)
    return params, state


def update(tx, state=None, *, objective=OBJECTIVE, given=("value", "grad"), **extra):
    """One update from there; not compiled, so that nothing else is tested here."""
    params, state = start()[0], state or start()[1]
    value, grads = jax.value_and_grad(OBJECTIVE)(params)
    known = {name: {"value": value, "grad": grads}[name] for name in given}
    return tx.update(grads, state, params, value_fn=objective, **known, **extra)


@functools.cache
def reference():
    updates, state = update(so.lsr1(**SETTINGS))
    assert state.last_step > 0
    return updates, state


def assert_same(found, expected, rtol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), found, expected
    )


# Hyperparameters.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_size", 0), ("memory_size", 2.0), ("memory_size", True),
        ("model", "line_search"), ("model", None),
        ("scale", "hessian"), ("scale", np.inf), ("scale", np.nan),
        ("radius", 0.0), ("radius", -1.0), ("radius", np.nan),
        ("radius_rule", 0.5),
        ("acceptance", -0.1), ("acceptance", 1.0),
        ("skip", -1e-8), ("skip", 1.0),
        ("momentum", -0.1), ("momentum", 1.0),
        ("diagonal_decay", -0.1), ("diagonal", 1), ("full_batch", 1), ("diagonal_decay", 1.0),
        ("restart_after", 0), ("restart_after", -1),
        ("storage_dtype", jnp.int32), ("storage_dtype", jnp.complex64),
        ("weight_decay", -0.1), ("seed", 0.5),
    ],
)  # fmt: skip
def test_bad_hyperparameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        so.lsr1(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"memory_size": 1, "radius": 1e-3, "momentum": 0.0, "acceptance": 0.0, "skip": 0.0},
        {"scale": 0}, {"scale": -1.5}, {"scale": np.float32(2.0)}, {"diagonal_decay": 0.0},
        {"restart_after": 1}, {"restart_after": np.inf}, {"storage_dtype": "bfloat16"},
        {"scale": "pencil_below"}, {"scale": "pencil_above"}, {"seed": 7},
    ],
)  # fmt: skip
def test_hyperparameters_at_their_bounds_are_accepted(settings):
    so.lsr1(**settings).init(PARAMS)


@pytest.mark.parametrize("name", ["memory_size", "full_batch"])
def test_structural_hyperparameters_may_not_be_traced(name):
    tx = optax.inject_hyperparams(so.lsr1)(**{name: jnp.asarray(2)})
    with pytest.raises((ValueError, jax.errors.JAXTypeError)):
        jax.jit(tx.init)(PARAMS)


def test_both_spellings_are_one_model():
    found = update(so.lsr1(**SETTINGS, model="regularised"))
    assert_same(found, update(so.lsr1(**SETTINGS, model="regularized")), 0)
    with pytest.raises(AssertionError):
        assert_same(found[0], reference()[0])


# Arguments of update.


def test_missing_arguments_name_the_call():
    tx = so.lsr1(**SETTINGS)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"lsr1 needs the current `params`(.|\n)*value_fn="):
        tx.update(PARAMS, state, value_fn=OBJECTIVE)
    with pytest.raises(ValueError, match="lsr1 needs the current `params`"):
        tx.init(None)
    with pytest.raises(ValueError, match=r"lsr1 needs `value_fn`(.|\n)*tx.update\("):
        tx.update(PARAMS, state, PARAMS)
    with pytest.raises(TypeError, match="`value_fn` must be callable"):
        tx.update(PARAMS, state, PARAMS, value_fn=3.0)
    with pytest.raises(TypeError, match="`curvature_fn` must be callable"):
        tx.update(PARAMS, state, PARAMS, value_fn=OBJECTIVE, curvature_fn=3.0)
    with pytest.raises(TypeError, match="one real scalar"):
        tx.update(PARAMS, state, PARAMS, value_fn=model)


def test_unknown_arguments_are_ignored():
    found = update(so.lsr1(**SETTINGS), unknown=jnp.ones(3), another="word")
    assert_same(found, reference(), 0)


@pytest.mark.parametrize("given", [(), ("value",), ("grad",)])
def test_value_and_gradient_are_not_required(given):
    assert_same(update(so.lsr1(**SETTINGS), given=given), reference())


def test_value_may_be_a_plain_number():
    tx = so.lsr1(**SETTINGS, full_batch=True)
    state, grads = tx.init(PARAMS), jax.grad(OBJECTIVE)(PARAMS)
    _, new = tx.update(grads, state, PARAMS, value=2.0, grad=grads, value_fn=OBJECTIVE)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize("kind", ["plain", "tuple", "objective"])
def test_every_form_of_an_objective_is_the_same(kind):
    objective = {
        "plain": lambda p: mse(model(p)),
        "tuple": lambda p: (mse(model(p)), {"outputs": model(p)}),
        "objective": so.Objective(lambda p: (model(p), {"norm": p["b"]}), mse, has_aux=True),
    }[kind]
    assert_same(update(so.lsr1(**SETTINGS), objective=objective, given=()), reference())


def test_curvature_fn_gives_the_pairs_and_nothing_else():
    """The step and its acceptance are those without it; the pair is of the other batch."""

    def other(params):
        return 3 * OBJECTIVE(params) + jnp.sum(params["w"] ** 2)

    updates, state = update(so.lsr1(**SETTINGS), curvature_fn=other)
    expected, plain = reference()
    assert_same(updates, expected)
    assert_same(state.metrics, plain.metrics)
    before = start()[0]
    after = optax.apply_updates(before, updates)
    y = jax.tree.map(jnp.subtract, jax.grad(other)(after), jax.grad(other)(before))
    slot = jnp.argmax(state.memory.numbers)
    stored = jax.tree.map(lambda rows: rows[slot], state.memory.vectors[1])
    assert_same(stored, jax.tree.map(lambda v: v / state.metrics.step_norm, y), 1e-3)


# In a chain.


def test_it_models_the_gradient_that_it_is_given_and_not_the_updates():
    """What comes before it in a chain has no say where ``grad`` is passed: the step is its own."""
    clip = optax.clip_by_global_norm(1e-3)
    chain = optax.chain(clip, so.lsr1(**SETTINGS))
    updates, (_, state) = update(chain, (clip.init(PARAMS), start()[1]))
    assert_same((updates, state), reference())
    # Without it the updates are taken for the gradient.
    found, _ = update(chain, (clip.init(PARAMS), start()[1]), given=())
    clipped, _ = clip.update(jax.grad(OBJECTIVE)(start()[0]), clip.init(PARAMS))
    expected, _ = so.lsr1(**SETTINGS).update(clipped, start()[1], start()[0], value_fn=OBJECTIVE)
    assert_same(found, expected)
    with pytest.raises(AssertionError):
        assert_same(found, updates)


def test_the_radius_of_the_state_is_a_copy():
    """The state may be donated, with injected hyperparameters next to it."""
    radius = jnp.float32(0.3)
    injected = optax.inject_hyperparams(
        so.lsr1, static_args=("memory_size", "full_batch", "update_every")
    )
    for tx in (so.lsr1(radius=radius), injected(radius=radius)):
        state = tx.init(PARAMS)
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)
        own = optax.tree_utils.tree_get(state, "inner_state", state).radius
        assert own.unsafe_buffer_pointer() != radius.unsafe_buffer_pointer()


@pytest.mark.parametrize("kind", ["trust_region", "shape_changing", "cubic"])
def test_momentum_of_zero_is_none_if_it_is_traced_too(kind):
    """With a shape-changing region steps are longer than the radius, and not to be clipped."""
    small = jnp.float32(0.02)
    state = start()[1]._replace(radius=small, last_step=small)
    updates, new = update(so.lsr1(**SETTINGS | {"momentum": jnp.float32(0)}, model=kind), state)
    expected, plain = update(so.lsr1(**SETTINGS, model=kind), state)
    assert_same(updates, expected)
    assert_same((new.radius, new.metrics), (plain.radius, plain.metrics), 1e-4)
    changed, _ = update(so.lsr1(**SETTINGS | {"momentum": jnp.float32(0.5)}, model=kind), state)
    with pytest.raises(AssertionError):
        assert_same(changed, updates, 1e-3)


# Full batches.


def test_full_batch_evaluates_once_per_update():
    """After rejected steps too; the very first value and gradient come on top.

    What is kept is without the weight decay, which is added anew at every update.
    """
    evaluations = []

    def objective(params):
        jax.debug.callback(lambda: evaluations.append(1))
        return mse(model(params))

    settings = {**SETTINGS, "full_batch": True, "weight_decay": 0.5}
    tx = so.lsr1(**settings)
    value_and_grad = optax.value_and_grad_from_state(objective)

    @jax.jit
    def step(params, state):
        value, grads = value_and_grad(params, state=state)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    outcomes = set()
    for radius in (0.3, 100.0):
        params, state = PARAMS, so.lsr1(**settings | {"radius": radius}).init(PARAMS)
        evaluations.clear()
        for count in range(1, 6):
            params, state = jax.block_until_ready(step(params, state))
            jax.effects_barrier()
            assert len(evaluations) == count + 1
            known = jax.value_and_grad(lambda p: mse(model(p)))(params)
            assert_same((state.value, state.grad), known)
            outcomes.add(bool(state.last_step > 0))
    assert outcomes == {True, False}


def test_full_batch_takes_the_same_step():
    tx = so.lsr1(**SETTINGS, full_batch=True)
    params, state = start()
    value, grad = jax.value_and_grad(OBJECTIVE)(params)
    updates, state = update(tx, state._replace(value=value, grad=grad))
    assert_same((updates, state._replace(value=None, grad=None)), reference())


def test_weight_decay_is_part_of_the_objective():
    def decayed(params):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return OBJECTIVE(params) + 0.25 * squares

    found = update(so.lsr1(**SETTINGS, weight_decay=0.5))
    params, state = start()
    expected = so.lsr1(**SETTINGS).update(
        jax.grad(decayed)(params), state, params, value_fn=decayed
    )
    assert_same(found, expected, 1e-4)
    with pytest.raises(AssertionError):
        assert_same(found, reference())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_full_batch_state_has_the_dtype_of_the_objective(x64, dtype):
    """As `optax.value_and_grad_from_state` compares it with what it would compute."""

    def objective(params):
        return jnp.sum(params**2)

    params = jnp.ones(3, dtype)
    tx = so.lsr1(**SETTINGS, full_batch=True)
    state = tx.init(params)
    value_and_grad = optax.value_and_grad_from_state(objective)
    given = jax.eval_shape(lambda p, s: value_and_grad(p, state=s), params, state)
    kept = jax.eval_shape(lambda p, s: tx.update(p, s, p, value_fn=objective), params, state)[1]
    assert [leaf.dtype for leaf in (*given, kept.value, kept.grad)] == 4 * [dtype]


# Defaults.


@pytest.mark.parametrize("full_batch", [False, True])
def test_what_is_not_given_depends_on_the_mode_as_documented(full_batch):
    documented = {
        False: {
            "memory_size": 5, "scale": "pencil_below", "radius": 1.0, "momentum": 0.5,
            "diagonal": True, "radius_rule": so.RadiusRule(),
        },
        True: {
            "memory_size": 20, "scale": "least_rayleigh", "radius": 3.0, "momentum": 0.0,
            "diagonal": False, "radius_rule": so.RadiusRule(shrink_below=0.25, grow_above=0.3),
        },
    }[full_batch]  # fmt: skip
    found, expected = (so.lsr1(full_batch=full_batch, **settings) for settings in ({}, documented))
    assert_same(found.init(PARAMS), expected.init(PARAMS), 0)
    state = expected.init(PARAMS)
    for _ in range(3):
        (one, _), (other, state) = update(found, state), update(expected, state)
        assert_same(one, other, 0)
