"""The metrics of every method, wherever its state is."""

import inspect
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

import secondorder as so

PARAMS = {"a": jnp.ones(2), "b": jnp.ones(3)}
TABLE = pathlib.Path(__file__).parents[1] / "docs" / "metrics.md"
RADIUS = so.lsr1().init(PARAMS).metrics._fields


def value_fn(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


STATIC = ("memory_size", "update_every")
WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "masked": lambda tx: so.masked(tx, {"a": True, "b": False}),
    "partition": lambda tx: so.partition({"x": tx, "y": optax.adam(0.1)}, {"a": "x", "b": "y"}),
    "multi steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "if finite": lambda tx: optax.apply_if_finite(tx, 3),
    "injected": lambda tx: optax.inject_hyperparams(so.lsr1, static_args=STATIC)(memory_size=2),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_metrics_are_found_in_any_nesting(wrapper):
    found = so.metrics(WRAPPERS[wrapper](so.lsr1(memory_size=2)).init(PARAMS))
    assert list(found) == [f"lsr1/{name}" for name in RADIUS]
    assert all(value.shape == () for value in found.values())


def test_metrics_under_jit_are_those_of_the_step():
    tx = so.lsr1(memory_size=2)

    @jax.jit
    def step(params, state):
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state, so.metrics(state)

    _, state, found = step(PARAMS, tx.init(PARAMS))
    assert found["lsr1/step_norm"] == state.metrics.step_norm > 0


def test_several_states_of_a_method_are_told_apart_by_their_places():
    tx = optax.chain(so.lsr1(memory_size=1), so.newton_cg(), so.lsr1(memory_size=2))
    found = so.metrics(tx.init(PARAMS))
    assert {"lsr1[0]/ratio", "newton_cg/ratio", "lsr1[2]/ratio"} <= set(found)
    assert len(found) == 2 * len(RADIUS) + len(so.NewtonCGMetrics._fields)


def test_states_without_metrics_have_none():
    assert so.metrics(optax.adam(0.1).init(PARAMS)) == {}
    assert so.metrics(()) == {}


def test_every_metric_is_in_the_table():
    """The table is the one place where a user looks a name up."""
    kinds = [kind for name, kind in vars(so).items() if name.endswith("Metrics")]
    assert len(kinds) >= 8
    table = TABLE.read_text(encoding="utf-8")
    for kind in kinds:
        assert inspect.isclass(kind)
        assert not [name for name in kind._fields if f"`{name}`" not in table], kind.__name__
