"""What every optimizer of the package must do that is seen without running a step.

Parts of the parameters, parameters that are none, and what stands behind a direction.
"""

import collections

import jax
import jax.numpy as jnp
import optax
import pytest

import secondorder as so
from tests.protocol.problem import arguments, batch_of, describe, make, objective_on, params_of
from tests.protocol.registry import LAYERS, REGISTRY

every_entry = pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.name)
OBJECTIVE = objective_on(batch_of(0))


def step_of(tx, objective=OBJECTIVE):
    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    return step


def assert_fixed_point(tx, params, objective=OBJECTIVE):
    """In structure, shapes, dtypes and weak types."""
    state = tx.init(params)
    new = jax.eval_shape(step_of(tx, objective), params, state)
    assert jax.tree.structure(new) == jax.tree.structure((params, state))
    for a, b in zip(*map(jax.tree.leaves, (new, describe((params, state)))), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


# A part of the parameters.

PART = {"w": True, "b": True, "scale": False}


def on_part(entry):
    """The optimizer of the layer, without the parameter that is in none."""
    held, part = so.hold_rest(OBJECTIVE, params_of()), so.mask_params(params_of(), PART)
    layers = {"layers": so.find_layers(held, part)} if LAYERS in entry.needs else {}
    return make(entry, **layers)


def primitives(jaxpr, found=None):
    """How often each primitive is in a jaxpr, with all that is inside of others."""
    found = collections.Counter() if found is None else found
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda node: hasattr(node, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                primitives(inner.jaxpr, found)
    return found


@every_entry
def test_a_part_costs_what_it_costs_alone(entry):
    """With the rest left alone, masked or as a partition; what it gives is tested elsewhere."""
    tx, params = on_part(entry), params_of()
    rest = params["scale"]
    alone = so.Objective(lambda p: OBJECTIVE.model(p | {"scale": rest}), OBJECTIVE.loss)
    part = {"w": params["w"], "b": params["b"]}
    wrapped = {
        "masked": so.masked(tx, PART),
        "partition": so.partition(
            {True: tx, False: optax.set_to_zero()}, lambda params: jax.tree.map(bool, PART)
        ),
    }
    bare = make(entry, **({"layers": so.find_layers(alone, part)} if entry.needs else {}))
    count = {
        name: primitives(jax.make_jaxpr(step_of(tx))(params, tx.init(params)).jaxpr)
        for name, tx in wrapped.items()
    }
    expected = primitives(jax.make_jaxpr(step_of(bare, alone))(part, bare.init(part)).jaxpr)
    for primitive in ("dot_general", "tanh", "while", "scan", "cond"):
        assert {found[primitive] for found in count.values()} == {expected[primitive]}, primitive
    for tx in wrapped.values():
        assert_fixed_point(tx, params)
        assert so.metrics(tx.init(params))


# Parameters that are none.


@every_entry
def test_complex_parameters_are_refused(entry):
    params = params_of() | {"w": params_of()["w"].astype(complex)}
    with pytest.raises(TypeError, match=r"must be real, got complex64 at \['w'\]"):
        make(entry).init(params)


@every_entry
def test_nothing_to_optimize_is_refused(entry):
    tx = make(entry)
    state = tx.init({})
    with pytest.raises(ValueError, match="no arrays"):
        tx.update({}, state, {}, value=0.0, grad={}, value_fn=OBJECTIVE)


@pytest.mark.parametrize(
    "entry", [e for e in REGISTRY if LAYERS not in e.needs], ids=lambda entry: entry.name
)
def test_a_scalar_is_a_tree_of_parameters(entry):
    objective = so.Objective(lambda p: p * batch_of(0)[0], lambda z: jnp.mean((z - 1) ** 2))
    tx = make(entry, **({"rank": 1} if "rank" in entry.settings else {}))
    assert_fixed_point(tx, jnp.ones(()), objective)


# Before others.


@pytest.mark.parametrize(
    "entry", [e for e in REGISTRY if not e.terminal], ids=lambda entry: entry.name
)
def test_line_searches_of_optax_follow_a_direction(entry):
    direction = entry.factory(
        **arguments(entry), **({"learning_rate": 1.0} if entry.learning_rate else {})
    )
    sign = optax.identity() if entry.learning_rate else optax.scale(-1.0)
    for search in (
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=5),
        optax.scale_by_zoom_linesearch(max_linesearch_steps=5),
    ):
        assert_fixed_point(optax.chain(direction, sign, so.line_search(search)), params_of())
