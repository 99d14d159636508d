"""The quadratic model with a rate for each part of a direction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from tests.methods.test_quadratic_model import (
    DAMPING,
    DECAY,
    dense_gauss_newton,
    flat,
    objective_on,
    params_of,
    take_steps,
)

STRETCH = {"w": 3.0, "b": 0.01, "v": 1.0}  # what a direction has wrong, layer by layer


def stretched(stretch):
    """The gradient with a factor for each leaf."""
    return optax.stateless(lambda updates, _: {k: stretch[k] * u for k, u in updates.items()})


def masks(labels):
    """For each part the entries of a flat vector that are in it."""
    sizes = {name: leaf.size for name, leaf in sorted(params_of().items())}
    owner = np.concatenate([[labels[name]] * size for name, size in sizes.items()])
    return np.stack([owner == label for label in dict.fromkeys(labels[name] for name in sizes)])


@pytest.mark.parametrize("parts", ["layers", "leaves", "labels"])
def test_step_is_that_of_dense_algebra(x64, parts):
    """Rates from the damped matrix on the parts, then the length along the direction with them."""
    params, objective = params_of(), objective_on(0)
    labels = {"layers": {"w": 0, "b": 0, "v": 1}, "labels": {"w": 0, "b": 1, "v": 0}}
    labels = labels.get(parts, {"w": 0, "b": 1, "v": 2})
    setting = {"layers": so.find_layers(objective, params), "leaves": str, "labels": labels}[parts]
    tx = so.scale_by_quadratic_model(
        stretched(STRETCH), damping=DAMPING, weight_decay=DECAY, parts=setting, confirmation=None
    )
    ((_, step, state, _),) = take_steps(tx, 1, objective, params)

    gradient = flat(jax.grad(objective)(params)) + DECAY * flat(params)
    damped = dense_gauss_newton(objective, params) + (DECAY + DAMPING) * np.eye(len(gradient))
    direction = gradient * flat(
        jax.tree.map(lambda leaf, c: np.full(leaf.shape, c), params, STRETCH)
    )
    basis = masks(labels) * direction
    matrix = basis @ damped @ basis.T
    rates = np.linalg.solve(matrix + np.diag(np.diag(matrix)), basis @ gradient)
    rates = np.maximum(rates, 0)
    np.testing.assert_allclose(state.rates, rates / np.sqrt(np.mean(rates**2)), rtol=1e-9)
    line = rates @ basis
    expected = -(gradient @ line) / (line @ damped @ line) * line
    np.testing.assert_allclose(flat(step), expected, rtol=1e-8)


def test_factors_of_the_parts_do_not_matter(x64):
    steps = [
        take_steps(so.scale_by_quadratic_model(stretched(stretch), parts=str, rates_every=1), 3)
        for stretch in (STRETCH, {"w": 1.0, "b": 1.0, "v": 50.0})
    ]
    for (_, first, _, _), (_, second, _, _) in zip(*steps, strict=True):
        np.testing.assert_allclose(flat(first), flat(second), rtol=1e-7)


def test_rates_are_chosen_in_every_so_many_steps():
    tx = so.scale_by_quadratic_model(stretched(STRETCH), parts=str, rates_every=2)
    rates = [np.asarray(state.rates) for _, _, state, _ in take_steps(tx, 4)]
    np.testing.assert_array_equal(rates[0], rates[1])
    np.testing.assert_array_equal(rates[2], rates[3])
    assert np.any(rates[1] != rates[2])


def test_without_parts_there_are_no_rates():
    ((_, _, state, _),) = take_steps(so.scale_by_quadratic_model(), 1)
    assert state.rates == ()


def test_of_kfac_they_are_those_of_its_layers(x64):
    """What `kfac` is short for."""
    params, objective = params_of(), objective_on(0)
    layers = so.find_layers(objective, params)
    short = so.kfac(None, layers, damping=DAMPING, layer_rates=True, rates_every=2)
    long = so.scale_by_quadratic_model(
        so.scale_by_kfac(layers, damping=DAMPING), damping=DAMPING, parts=layers, rates_every=2
    )
    steps = [take_steps(tx, 3, objective, params)[-1] for tx in (short, long)]
    jax.tree.map(np.testing.assert_array_equal, steps[0][1], steps[1][1])
    assert steps[0][2].rates.shape == (2,)


def test_a_batch_that_is_not_finite_keeps_the_rates():
    params, objective = params_of(), objective_on(0)
    tx = so.scale_by_quadratic_model(stretched(STRETCH), parts=str, rates_every=1)
    ((_, _, state, _),) = take_steps(tx, 1, objective, params)
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    step, after = tx.update(bad, state, params, value_fn=objective)
    assert not np.any(flat(step))
    np.testing.assert_array_equal(after.rates, state.rates)


def test_layers_of_other_parameters_are_refused():
    params, objective = params_of(), objective_on(0)
    tx = so.scale_by_quadratic_model(parts=so.find_layers(objective, params))
    with pytest.raises(ValueError, match="do not match the parameters"):
        tx.init({**params, "w": jnp.ones((2, 4))})


@pytest.mark.parametrize(
    ("setting", "error"), [({"layer_rates": True}, "layer_rates"), ({"rates_every": 3}, "rates_")]
)
def test_at_a_learning_rate_they_are_refused(setting, error):
    layers = so.find_layers(objective_on(0), params_of())
    with pytest.raises(ValueError, match=error):
        so.kfac(0.1, layers, **setting)
