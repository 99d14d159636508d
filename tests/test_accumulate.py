"""Accumulation: a round of micro-batches does what one batch of all of them does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType

import secondorder as so
from tests.marks import with_slow
from tests.meshes import make_mesh, place, use_mesh

EVERY, SIZE, ROUNDS = 3, 4, 2


def params_of():
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.standard_normal((3, 2))), "b": jnp.zeros(2), "scale": jnp.ones(())}


def batches_of(rounds=ROUNDS):
    """Micro-batches ``(rounds, EVERY, SIZE, ...)``."""
    x = np.random.default_rng(1).standard_normal((rounds, EVERY, SIZE, 3))
    dtype = jnp.result_type(float)
    return jnp.asarray(x, dtype), jnp.asarray(np.sin(x[..., :2]), dtype)


def objective_on(batch):
    x, y = batch
    return so.Objective(
        lambda p: p["scale"] * jnp.tanh(x @ p["w"] + p["b"]),
        lambda z: jnp.mean(jnp.sum((z - y) ** 2, axis=-1)),
    )


def first(batches):
    return jax.tree.map(lambda leaf: leaf[0, 0], batches)


def layers():
    return so.find_layers(objective_on(first(batches_of())), params_of())


METHODS = {
    "kbfgs": lambda: so.kbfgs(0.1, layers(), fallback=optax.scale_by_adam()),
    "kbfgs-average": lambda: so.kbfgs(
        0.1, layers(), input_factor="moving_average", memory_size=2, damping_split="trace"
    ),
    "kbfgs-every-second": lambda: so.kbfgs(0.1, layers(), update_every=2, weight_decay=1e-3),
    "pch": lambda: so.positive_curvature_hessian(0.1, layers(), input_moment="full"),
    "lsr1": lambda: so.lsr1(memory_size=2),
    "hessian_free": lambda: so.hessian_free(max_iterations=5),
    "levenberg_marquardt": lambda: so.levenberg_marquardt(damping=0.1),
    "lrsfn": lambda: so.low_rank_saddle_free_newton(0.5, rank=3, damping=0.3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.1), so.lsr1(memory_size=2)),
    "partition": lambda: so.partition(
        {"second": so.lsr1(memory_size=2), "first": optax.adam(0.1)},
        {"w": "second", "b": "second", "scale": "first"},
    ),
    "adam": lambda: optax.adam(0.1),
}


def make_step(tx, micro=False, objective_on=objective_on):
    """A training step, which works with and without accumulation."""

    def step(carry, batch):
        params, state = carry
        objective = objective_on(batch)
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = optax.with_extra_args_support(tx).update(
            grads,
            state,
            params,
            value=value,
            grad=grads,
            value_fn=objective,
            **({"batch": batch} if micro else {}),
        )
        return (optax.apply_updates(params, updates), state), params

    return step


def accumulated(method, every=EVERY):
    return so.accumulate(METHODS[method](), every, objective_on, first(batches_of()))


def assert_close(found, expected, rtol):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def merge(leaf, *axes):
    return jnp.reshape(leaf, (*axes, *leaf.shape[3:]))


@pytest.mark.parametrize("method", with_slow(METHODS, "lrsfn", "partition"))
@pytest.mark.usefixtures("x64")
def test_a_round_is_one_step_on_all_of_its_micro_batches(method):
    """Under scan, which also insists on a state that is a fixed point."""
    params, batches = params_of(), batches_of()
    tx, bare = accumulated(method), METHODS[method]()

    @jax.jit
    def run(params):
        micro = jax.tree.map(lambda leaf: merge(leaf, ROUNDS * EVERY, SIZE), batches)
        large = jax.tree.map(lambda leaf: merge(leaf, ROUNDS, EVERY * SIZE), batches)
        found = jax.lax.scan(make_step(tx, micro=True), (params, tx.init(params)), micro)
        expected = jax.lax.scan(make_step(bare), (params, bare.init(params)), large)
        return found, expected

    ((found, state), path), ((expected, inner), _) = run(params)
    assert_close(found, expected, 1e-9)
    assert_close(so.metrics(state.inner), so.metrics(inner), 1e-8)
    if method != "lrsfn":  # whose basis of a subspace is one of many
        assert_close(state.inner, inner, 1e-8)
    for k in range(EVERY):  # within the first round nothing moves
        assert_close(jax.tree.map(lambda leaf, k=k: leaf[k], path), params, 0)
    moved = jax.tree.map(lambda leaf, p: bool(jnp.any(leaf[EVERY] != p)), path, params)
    assert any(jax.tree.leaves(moved))


def conditionals(jaxpr):
    """The conditionals of a jaxpr, and the names of all primitives outside of them."""
    conds, others = [], set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            conds.append([branch.jaxpr for branch in equation.params["branches"]])
            continue
        others.add(equation.primitive.name)
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                inner = conditionals(value.jaxpr)
                conds, others = conds + inner[0], others | inner[1]
    return conds, others


@pytest.mark.parametrize("method", ["kbfgs", "lsr1", "hessian_free"])
def test_the_method_runs_at_the_end_of_a_round_only(method):
    tx, params, batch = accumulated(method), params_of(), first(batches_of())
    update = functools.partial(tx.update, params, tx.init(params), params, batch=batch)
    [(wait, step)], outside = conditionals(jax.make_jaxpr(lambda: update(value=1.0))().jaxpr)
    assert "dot_general" in str(step)
    assert "dot_general" not in str(wait)
    assert not outside & {"dot_general", "while", "scan"}


@pytest.fixture(scope="module")
def compiled():
    """L-SR1 with rounds of three, both arguments donated."""
    tx = accumulated("lsr1")
    step = make_step(tx, micro=True)
    return tx, jax.jit(lambda p, s, b: step((p, s), b)[0], donate_argnums=(0, 1))


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def test_a_micro_batch_that_is_not_finite_is_skipped(compiled):
    tx, step = compiled
    params, micro = params_of(), [first(batches_of())] * EVERY
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    bad = (micro[0][0] * jnp.nan, micro[0][1])
    ends = []
    for batches in (micro, [micro[0], bad, *micro[1:]]):
        params, state = copy(start), tx.init(start)
        for batch in batches:
            before = copy(state)
            params, state = step(params, state, batch)
            if batch is bad:
                counted = before.metrics._replace(skipped_batches=jnp.int32(1))
                assert_close(state, before._replace(metrics=counted), 0)
        ends.append((params, state))
    assert_close(ends[1][0], ends[0][0], 0)
    assert_close(ends[1][1].inner, ends[0][1].inner, 0)
    assert step._cache_size() == 1


def test_metrics_of_both(compiled):
    tx, step = compiled
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params_of())
    _, state = step(copy(params), tx.init(params), first(batches_of()))
    found = so.metrics(state)
    assert found["accumulate/micro_batches"] == 1
    assert found["accumulate/skipped_batches"] == 0
    assert "lsr1/ratio" in found


def test_a_round_can_be_interrupted(compiled):
    tx, step = compiled
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params_of())
    params, state = step(copy(start), tx.init(start), first(batches_of()))
    blank = tx.init(start)
    restored = serialization.from_bytes(blank, serialization.to_bytes(state))
    mapped = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.map(jax.typeof, restored) == jax.tree.map(jax.typeof, mapped)
    ends = []
    for state in (mapped, restored):
        carry = copy(params), copy(state)
        for _ in range(EVERY - 1):
            carry = step(*carry, first(batches_of()))
        ends.append(carry)
    assert_close(ends[1], ends[0], 0)
    assert bool(jnp.any(ends[0][0]["w"] != start["w"]))


def seen_by(gradient, **extra_args):
    """The extra arguments that the inner transform gets, in a round of one."""
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    batch = first(batches_of())
    tx = so.accumulate(inner, 1, objective_on, batch)
    tx.update(gradient, tx.init(gradient), gradient, batch=batch, **extra_args)
    return seen


def test_what_is_handed_on():
    params = params_of()
    curvature = objective_on(first(batches_of()))
    seen = seen_by(
        params, value=2.0, grad=params, value_fn="replaced", curvature_fn=curvature, word=1
    )
    assert set(seen) == {"value", "grad", "value_fn", "curvature_fn", "word"}
    assert isinstance(seen["value_fn"], so.Microbatches)
    assert seen["curvature_fn"] is curvature
    # The gradient of the objective is not known if links before have changed it.
    assert set(seen_by(params, grad=copy(params))) == {"value_fn"}


def test_callables_and_batches_of_any_form():
    """No split; numbers and integers in a batch; parameters in half precision."""

    def objective_on(batch):
        return lambda p: jnp.mean((batch["x"] * p) ** 2) * batch["weight"]

    batch = {"x": np.arange(4), "weight": 2.0}
    params = jnp.ones(4, jnp.bfloat16)
    tx = so.accumulate(so.lsr1(memory_size=1), 2, objective_on, batch)
    run = jax.jit(lambda c: make_step(tx, True, objective_on)(c, batch)[0])
    carry = (params, tx.init(params))
    for _ in range(2):
        new = run(carry)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, carry)
        carry = new
    assert objective_on(batch)(carry[0]) < objective_on(batch)(params)


def placed(mesh):
    fresh = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params_of())
    params = {
        "w": place(mesh, fresh["w"], None, "model"),
        "b": place(mesh, fresh["b"], "model"),
        "scale": place(mesh, fresh["scale"]),
    }
    return params, tuple(place(mesh, leaf, "data", None) for leaf in first(batches_of()))


def test_under_auto_axes_micro_batches_stay_where_they_are():
    mesh = make_mesh(4, 2, kind=AxisType.Auto)
    params, batch = placed(mesh)
    tx = so.accumulate(optax.adam(0.1), EVERY, objective_on, batch)
    state = jax.jit(tx.init)(params)
    assert state.batches[0].sharding.spec[1] == "data"
    (_, new), _ = jax.jit(make_step(tx, micro=True))((params, state), batch)
    assert new.batches[0].sharding.spec[1] == "data"


@pytest.mark.parametrize("method", ["kbfgs-average", "pch", "lsr1", "hessian_free"])
def test_shardings_are_fixed_points_on_an_explicit_mesh(method):
    mesh = make_mesh(4, 2)
    inner = METHODS[method]()
    with use_mesh(mesh):
        params, batch = placed(mesh)
        tx = so.accumulate(inner, EVERY, objective_on, batch)
        state = jax.jit(tx.init)(params)
        new, _ = jax.eval_shape(make_step(tx, micro=True), (params, state), batch)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves((params, state)), strict=True):
            assert a.sharding.spec == jax.typeof(b).sharding.spec
        assert new[1].batches[0].sharding.spec[1] == "data"


# Bad input.


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (None, "`batch`, the micro-batch"),
        ((jnp.ones((3, 3)), jnp.ones((3, 2))), r"\[0\]: float32\[3, 3\], first float32\[4, 3\]"),
        ((jnp.ones((4, 3)),), r"\[1\]: missing, first float32\[4, 2\]"),
        ((jnp.ones((4, 3), int), jnp.ones((4, 2))), "int32"),
    ],
    ids=["missing", "another size", "another structure", "another dtype"],
)
def test_micro_batches_of_another_form_are_refused(batch, message):
    tx, params = accumulated("adam"), params_of()
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, batch=batch)


def test_wrong_arguments_are_refused():
    batch = first(batches_of())
    with pytest.raises(ValueError, match="every"):
        so.accumulate(so.lsr1(), 0, objective_on, batch)
    with pytest.raises(TypeError, match="objective_on"):
        so.accumulate(so.lsr1(), 2, batch, batch)
    with pytest.raises(ValueError, match="key_data"):
        so.accumulate(so.lsr1(), 2, objective_on, (batch, jax.random.key(0)))
    with pytest.raises(ValueError, match="no arrays"):
        so.accumulate(so.lsr1(), 2, objective_on, ())
    tx = accumulated("adam")
    with pytest.raises(ValueError, match="params"):
        tx.update(params_of(), tx.init(params_of()), batch=batch)


def test_methods_that_need_the_split_say_so():
    tx = so.accumulate(so.gauss_newton(), 1, lambda batch: jnp.sum, jnp.ones(2))
    with pytest.raises(TypeError, match=r"so\.Objective"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), batch=jnp.ones(2))


def test_kbfgs_holds_the_layers_of_one_micro_batch():
    cases, width = 2048, 16
    params = {"w": jnp.ones((width, width)), "v": jnp.ones((width, width))}
    batch = jnp.ones((cases, width))

    def objective_on(x):
        return so.Objective(lambda p: jnp.tanh(x @ p["w"]) @ p["v"], lambda z: jnp.mean(z**2))

    layers = so.find_layers(objective_on(batch), params)
    pieces = so.Microbatches.split(objective_on, batch, 64)
    assert str(so.find_layers(pieces, params)) == str(layers)
    tx = so.kbfgs(0.1, layers)

    def temporaries(objective):
        def update(state):
            return tx.update(params, state, params, value_fn=objective)

        analysis = jax.jit(update).lower(tx.init(params)).compile().memory_analysis()
        return getattr(analysis, "temp_size_in_bytes", 0)

    whole = temporaries(objective_on(batch))
    if not whole:
        pytest.skip("no memory analysis on this device")
    assert temporaries(pieces) < whole / 4
