"""K-BFGS in other precisions, and on batches that are not finite, empty of signal, or extreme."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from tests.methods.comparisons import all_finite, all_zero, identical


def mlp(params, x):
    (w, b), (v, c) = params
    return jax.nn.relu(x @ w + b) @ v + c


def start(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = [
        (rng.standard_normal((3, 4)), 0.1 * rng.standard_normal(4)),
        (rng.standard_normal((4, 2)), rng.standard_normal(2)),
    ]
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), params)


def batch(seed=1, size=8, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((size, 3))
    return jnp.asarray(x, dtype), jnp.asarray(np.sin(x[:, :2]), dtype)


class Given(NamedTuple):
    """What one step is told, apart from the batch."""

    scale: float = 1.0  # of the loss
    value: float = 0.0  # added to the value that is passed on
    gradient: float = 0.0  # added to one entry of the gradient
    curvature: float = 0.0  # added to one entry of the curvature batch


def make_step(tx):
    @jax.jit
    def step(params, state, batch, given):
        x, y = batch

        def objective_on(x):
            return so.Objective(
                lambda p: mlp(p, x), lambda z: given.scale * jnp.mean(jnp.sum((z - y) ** 2, -1))
            )

        objective = objective_on(x)
        value, grads = jax.value_and_grad(objective)(params)
        grads[0] = (grads[0][0].at[1, 1].add(given.gradient), grads[0][1])
        updates, state = tx.update(
            grads, state, params,
            value=value + given.value, grad=grads, value_fn=objective,
            curvature_fn=objective_on(x.at[0, 0].add(given.curvature)),
        )  # fmt: skip
        return updates, state, value

    return step


def optimizer(params, **settings):
    x, y = batch()
    layers = so.find_layers(lambda p: jnp.mean((mlp(p, x.astype(p[0][0].dtype)) - y) ** 2), params)
    return so.scale_by_kbfgs(layers, **settings)


class Run:
    """A compiled step and a state after a few steps."""

    def __init__(self, **settings):
        self.tx = optimizer(start(), **settings)
        self.step = make_step(self.tx)
        self.params, self.state = start(), self.tx.init(start())
        for seed in range(4):
            updates, self.state, _ = self.step(self.params, self.state, batch(seed), Given())
            self.params = move(self.params, updates)


def move(params, updates, learning_rate=0.1):
    return jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)


@pytest.fixture(scope="module", params=["dense", "limited"])
def run(request):
    return Run(memory_size=3 if request.param == "limited" else None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["value", "gradient", "batch"])
def test_a_batch_that_is_not_finite_changes_only_its_counter(run, where, bad):
    x, y = batch(9)
    given = Given()
    if where == "batch":
        x = x.at[2, 1].set(bad)
    else:
        given = given._replace(**{where: bad})
    updates, state, _ = run.step(run.params, run.state, (x, y), given)
    assert all_zero(updates)
    counted = run.state.metrics._replace(nonfinite_steps=run.state.metrics.nonfinite_steps + 1)
    assert identical(state, run.state._replace(metrics=counted))
    # Training goes on as if nothing had happened.
    one = run.step(run.params, state, batch(10), Given())
    other = run.step(run.params, run.state, batch(10), Given())
    assert identical(one[0], other[0])
    assert not all_zero(one[0])
    assert identical(one[1].factors, other[1].factors)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_curvature_that_is_not_finite_leaves_the_factors(run, bad):
    """The gradient is finite, so the step is made, with the factors of before."""
    updates, state, _ = run.step(run.params, run.state, batch(9), Given(curvature=bad))
    assert identical(state.factors, run.state.factors)
    assert state.count == run.state.count + 1
    for name in ("curvature_updates", "input_pairs_accepted", "output_pairs_rejected"):
        assert getattr(state.metrics, name) == getattr(run.state.metrics, name)
    assert all_finite(updates)
    assert not all_zero(updates)
    _, after, _ = run.step(move(run.params, updates), state, batch(10), Given())
    assert after.metrics.curvature_updates == run.state.metrics.curvature_updates + 1


def test_metrics_count_what_they_say(run):
    metrics = run.state.metrics
    assert metrics.nonfinite_steps == 0
    assert metrics.curvature_updates == 4
    assert metrics.input_pairs_accepted + metrics.input_pairs_rejected == 2 * 4
    assert metrics.output_pairs_accepted + metrics.output_pairs_rejected == 2 * 4
    assert metrics.output_pairs_rejected >= 2  # at the first step nothing has moved
    assert all(m.dtype == jnp.int32 for m in metrics)


def test_a_first_batch_that_is_not_finite_is_not_the_first(run):
    """The exact inverse is made of the first batch that is finite."""
    fresh = run.tx.init(start())
    x, y = batch(0)
    _, state, _ = run.step(start(), fresh, (x * np.nan, y), Given())
    assert state.metrics.nonfinite_steps == 1
    _, expected, _ = run.step(start(), fresh, (x, y), Given())
    _, late, _ = run.step(start(), state, (x, y), Given())
    assert identical(late.factors, expected.factors)
    # The same if only its curvature was not.
    _, state, _ = run.step(start(), fresh, (x, y), Given(curvature=np.nan))
    _, late, _ = run.step(start(), state, (x, y), Given())
    assert identical(late.factors, expected.factors)


def test_zero_gradient(run):
    """At loss zero: nothing is divided by it."""
    params, state = start(), run.tx.init(start())
    for _ in range(3):
        updates, state, _ = run.step(params, state, batch(), Given(scale=0.0))
        assert all_zero(updates)
        assert all_finite(state)
    assert state.metrics.nonfinite_steps == 0
    updates, state, _ = run.step(params, state, batch(), Given())
    assert all_finite((updates, state))
    assert not all_zero(updates)


def test_dead_layer(run):
    """All units are off, so neither the second layer's inputs nor the first's cotangents exist."""
    params = start()
    params[0] = (params[0][0], jnp.full(4, -1e3, jnp.float32))
    state = run.tx.init(params)
    for seed in range(4):
        updates, state, _ = run.step(params, state, batch(seed), Given())
        assert all_finite((updates, state))
        assert all_zero(updates[0])
        assert np.abs(updates[1][1]).max() > 0
        params = move(params, updates)


@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1e5, 1e10])
def test_losses_of_any_scale_are_finite_and_descend(run, scale):
    params, state = start(), run.tx.init(start())
    values = []
    for _ in range(12):
        updates, state, value = run.step(params, state, batch(), Given(scale=scale))
        assert all_finite((updates, state))
        values.append(value)
        # Inverses start from the identity, so that the first steps are the gradient's.
        params = move(params, updates, 0.03 / scale)
    assert state.metrics.nonfinite_steps == 0
    assert values[-1] < values[0]


def test_batch_of_one(run):
    params, state = start(), run.tx.init(start())
    values = []
    for _ in range(8):
        updates, state, value = run.step(params, state, batch(size=1), Given())
        params = move(params, updates)
        values.append(value)
    assert all_finite((params, state))
    assert values[-1] < 0.7 * values[0]


# Precisions.


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


def test_bfloat16_parameters_keep_float32_curvature():
    params = start(jnp.bfloat16)
    tx = optimizer(params)
    step, state = make_step(tx), tx.init(params)
    assert dtypes(state.factors) == {jnp.dtype(jnp.float32)}
    values = []
    for _ in range(20):
        updates, new, value = step(params, state, batch(dtype=jnp.bfloat16), Given())
        assert dtypes(updates) == {jnp.dtype(jnp.bfloat16)}
        assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
        params, state = optax.apply_updates(params, jax.tree.map(lambda u: -0.2 * u, updates)), new
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    assert all_finite(state)


def test_double_precision_is_kept(x64):
    params = start(jnp.float64)
    tx = optimizer(params, input_factor="moving_average")
    state = tx.init(params)
    updates, new, _ = make_step(tx)(params, state, batch(dtype=jnp.float64), Given())
    assert dtypes((updates, new.factors, new.momentum)) == {jnp.dtype(jnp.float64)}
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)


def test_double_precision_is_not_needed_for_float32_parameters(x64):
    params = start(jnp.float32)
    tx = optimizer(params)
    state = tx.init(params)
    updates, new, _ = make_step(tx)(params, state, batch(dtype=jnp.float32), Given())
    assert dtypes((updates, new.factors, new.momentum)) == {jnp.dtype(jnp.float32)}
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
