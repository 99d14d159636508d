"""Training runs: order of samples, limits, divergence, and what is recorded."""

import jax
import numpy as np
import optax
import pytest

from benchmarks.baselines import sgd
from benchmarks.data import DataOptions
from benchmarks.methods import METHODS, Method
from benchmarks.problems import PROBLEMS
from benchmarks.settings import SettingError
from benchmarks.steps import epoch_orders
from benchmarks.training import Run, RunOptions

PROBLEM = PROBLEMS["digits-autoencoder"]
OPTIONS = DataOptions(train_size=250, test_size=50)


@pytest.fixture(scope="module")
def splits():
    return PROBLEM.load(OPTIONS)


def run(splits, method=METHODS["sgd"], **options):
    return Run(RunOptions(PROBLEM, method, **options), splits)


def test_orders():
    orders = epoch_orders(samples=11, batch_size=3, seed=0)
    first, second, third = (next(orders) for _ in range(3))
    np.testing.assert_array_equal(first, np.arange(9).reshape(3, 3))
    assert len(np.unique(second)) == 9
    assert not np.array_equal(second, third)
    again = epoch_orders(samples=11, batch_size=3, seed=0)
    next(again)
    np.testing.assert_array_equal(next(again), second)


def test_batch_larger_than_the_data():
    with pytest.raises(SettingError, match="A batch of 5 needs"):
        next(epoch_orders(samples=4, batch_size=5, seed=0))


def test_records_of_epochs(splits):
    training = run(splits, epochs=3, batch_size=50)
    seen = []
    records = list(training.epochs(lambda step, loss: seen.append((step, loss))))
    assert [record.epoch for record in records] == [1, 2, 3]
    assert [record.step for record in records] == [5, 10, 15]
    assert [record.gradients for record in records] == [5, 10, 15]
    assert [step for step, _ in seen] == list(range(1, 16))
    assert 0 < records[0].seconds < records[1].seconds
    assert training.initial.loss > records[0].train_loss > records[2].train_loss
    assert "test_accuracy" not in records[0].as_json()
    assert training.header()["settings"]["learning_rate"] == 0.3


def test_same_seed_same_run(splits):
    losses = [
        [record.train_loss for record in run(splits, epochs=2, seed=seed).epochs()]
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_step_is_that_of_a_loop_written_by_hand(splits):
    """One epoch equals optax used as its documentation says."""
    training = run(splits, epochs=1, batch_size=125)
    (record,) = training.epochs()
    params = jax.jit(PROBLEM.init)(jax.random.key(0))
    transform = sgd(0.3, weight_decay=1e-5)
    state = transform.init(params)
    for inputs in splits.train.inputs.reshape(2, 125, 64):

        def loss(p, inputs=inputs):
            return PROBLEM.loss(PROBLEM.model(p, inputs), inputs)

        updates, state = transform.update(jax.jit(jax.grad(loss))(params), state, params)
        params = optax.apply_updates(params, updates)
    inputs = splits.test.inputs
    expected = PROBLEM.loss(PROBLEM.model(params, inputs), inputs) + PROBLEM.penalty(params)
    assert record.test_loss == pytest.approx(float(expected), rel=1e-4)


def test_stops_when_the_time_is_up(splits):
    (record,) = run(splits, seconds=1e-9, batch_size=50).epochs()
    assert record.step == 1
    assert record.epoch == 0.2
    assert not record.diverged


def test_stops_when_the_loss_is_not_finite(splits):
    records = list(run(splits, epochs=50, batch_size=50, overrides={"learning_rate": 1e6}).epochs())
    assert records[-1].diverged
    assert len(records) < 50
    assert not any(record.diverged for record in records[:-1])


def test_extra_arguments_reach_the_method(splits):
    seen = []

    def spy(weight_decay):
        def update(grads, state, params, **extra):
            value, slope = extra["value_fn"](params), extra["grad"]
            seen.append((set(extra), value.shape, slope is grads))
            return grads, state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    list(run(splits, Method("spy", "", factory=lambda: spy), epochs=1).epochs())
    assert seen == [({"value", "grad", "value_fn"}, (), True)]  # traced once


def test_method_that_keeps_the_parameters_can_be_donated(splits):
    def keeper(weight_decay):
        return optax.GradientTransformation(
            lambda params: params, lambda grads, state, params: (grads, params)
        )

    list(run(splits, Method("keeper", "", factory=lambda: keeper), epochs=1).epochs())


@pytest.mark.parametrize(
    "limits", [{}, {"epochs": 0}, {"epochs": 1, "batch_size": 0}, {"seconds": -1.0}]
)
def test_impossible_limits(limits):
    with pytest.raises(SettingError):
        RunOptions(PROBLEM, METHODS["sgd"], **limits)


@pytest.mark.parametrize(
    ("settings", "gradients"),
    [
        ({}, 5 + 5),
        # Pairs at the steps 0, 1 and 3; at the other two a third of a gradient each.
        ({"memory_size": 2, "update_every": 3}, 5 + 3 + 2 / 3),
    ],
)
def test_gradients_at_trial_points_are_counted(splits, settings, gradients):
    overrides = {"update_every": 1, **settings}
    (record,) = run(splits, METHODS["lsr1"], epochs=1, batch_size=50, overrides=overrides).epochs()
    assert record.gradients == pytest.approx(gradients, rel=1e-4)


def test_gradients_of_line_searches_are_counted(splits):
    """As many as a loop written by hand reads from the state of `optax.lbfgs`."""
    (record,) = run(splits, METHODS["lbfgs"], epochs=1, batch_size=50).epochs()
    params = jax.jit(PROBLEM.init)(jax.random.key(0))
    transform = optax.lbfgs(memory_size=10)
    state, gradients = transform.init(params), 0

    @jax.jit
    def step(params, state, inputs):
        def loss(p):
            return PROBLEM.loss(PROBLEM.model(p, inputs), inputs) + PROBLEM.penalty(p)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = transform.update(
            grads, state, params, value=value, grad=grads, value_fn=loss
        )
        return optax.apply_updates(params, updates), state

    for inputs in splits.train.inputs.reshape(5, 50, 64):
        params, state = step(params, state, inputs)
        gradients += 1 + int(state[-1].info.num_linesearch_steps)
    assert record.gradients == gradients > 10


def test_work_ends_a_run(splits):
    """L-BFGS takes several gradients in a step: it gets the fewer steps."""
    first, *_, last = run(splits, gradients=20, records=4, batch_size=50).epochs()
    assert (first.gradients, last.gradients, last.step) == (1, 20, 20)
    *_, last = run(splits, METHODS["lbfgs"], gradients=20, batch_size=50).epochs()
    assert 20 <= last.gradients < 45
    assert last.step < 20


def test_number_of_records_needs_work_to_divide():
    with pytest.raises(SettingError, match="divides a number of gradients"):
        RunOptions(PROBLEM, METHODS["sgd"], epochs=1, records=2)
