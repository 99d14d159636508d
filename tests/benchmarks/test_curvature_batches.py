"""Curvature batches, the work that methods report, and blocks by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from benchmarks.blocks import block_labels
from benchmarks.data import DataOptions
from benchmarks.evaluations import Site, Work, hessian_free_work, levenberg_marquardt_work
from benchmarks.methods import METHODS, Method
from benchmarks.problems import PROBLEMS
from benchmarks.settings import SettingError
from benchmarks.steps import epoch_orders
from benchmarks.training import Run, RunOptions

PROBLEM = PROBLEMS["digits-autoencoder-tanh"]


@pytest.fixture(scope="module")
def splits():
    return PROBLEM.load(DataOptions(train_size=100, test_size=20))


def spy_method(seen, work=None):
    """Gradient descent with small steps that notes the shapes which it is given."""

    def spy(weight_decay):
        def update(grads, state, params, *, value_fn, curvature_fn=None, **extra):
            outputs = [f and f.model(params).shape[0] for f in (value_fn, curvature_fn)]
            difference = 0 if curvature_fn is None else value_fn(params) - curvature_fn(params)
            seen.append(outputs)
            return jax.tree.map(lambda g: 0 * g, grads), {"difference": jnp.float32(difference)}

        return optax.GradientTransformationExtraArgs(
            lambda params: {"difference": jnp.float32(0)}, update
        )

    fields = {} if work is None else {"work": work}
    return Method("spy", "", factory=lambda: spy, **fields)


@pytest.mark.parametrize("size", [None, 5, 20, 50, 100])
def test_method_is_given_the_curvature_batch(splits, size):
    seen = []
    options = RunOptions(
        PROBLEM, spy_method(seen), epochs=1, batch_size=20, curvature_batch_size=size
    )
    run = Run(options, splits)
    (record,) = run.epochs()
    assert seen == [[20, size]]
    assert record.gradients == 5
    assert run.header()["curvature_batch_size"] == size
    if size == 20:  # The same samples.
        assert float(run._state.opt_state["difference"]) == 0


def test_curvature_batch_larger_than_the_data(splits):
    options = RunOptions(PROBLEM, METHODS["sgd"], epochs=1, curvature_batch_size=101)
    with pytest.raises(SettingError, match="A batch of 101 needs"):
        Run(options, splits)


def test_wider_batches_go_on_in_the_order():
    orders = epoch_orders(samples=7, batch_size=3, seed=0, width=5)
    np.testing.assert_array_equal(next(orders), [[0, 1, 2, 3, 4], [3, 4, 5, 6, 0]])
    second = next(orders)
    assert all(len(set(row)) == 5 for row in second)
    np.testing.assert_array_equal(second[0][3:], second[1][:2])


def test_work_is_added_up_in_gradients_of_a_batch(splits):
    method = spy_method([], work=lambda state, site: Work(batch=1 / 3, curvature=2.0))
    options = RunOptions(PROBLEM, method, epochs=2, batch_size=20, curvature_batch_size=5)
    first, second = Run(options, splits).epochs()
    assert first.gradients == pytest.approx(5 * (1 + 1 / 3 + 2 / 4), abs=1e-3)
    assert second.gradients == pytest.approx(2 * first.gradients, abs=1e-3)


def site(**settings):
    return Site(settings, None, None)


def test_work_of_hessian_free_methods():
    state = {"metrics": {"iterations": jnp.int32(6), "evaluations": jnp.int32(3)}}
    work = hessian_free_work(state, site())
    assert float(work.in_gradients(0.5)) == pytest.approx(1 + 0.5 * (1 / 3 + 6 * 4 / 3))
    warm = hessian_free_work(
        state, site(warm_start=0.5, preconditioner="x", preconditioner_probes=3)
    )
    assert float(warm.curvature - work.curvature) == pytest.approx(4 / 3 + 2)
    newton = hessian_free_work(state, site(), product=2.0, evaluation=1.0)
    assert float(newton.in_gradients(1.0)) == pytest.approx(3 + 1 / 3 + 12)
    krylov = hessian_free_work({**state, "dimension": jnp.int32(4)}, site(), counted="dimension")
    assert float(krylov.curvature) == pytest.approx(1 / 3 + 4 * 4 / 3)
    trial = levenberg_marquardt_work({"iterations": jnp.int32(0)}, site(full_batch=True))
    assert float(trial.batch) == 1


@pytest.mark.parametrize(
    ("name", "settings", "least"),
    [
        ("hf", {"max_iterations": 4}, 2.0),
        ("bhf", {"max_iterations": 4, "blocks": "halves", "damping": 1.0}, 2.0),
    ],
)
def test_methods_of_the_package_train(name, settings, least, splits):
    if not METHODS[name].is_available():
        pytest.skip(f"the package has no {name}")
    options = RunOptions(
        PROBLEM, METHODS[name], settings, epochs=1, batch_size=50, curvature_batch_size=25
    )
    run = Run(options, splits)
    (record,) = run.epochs()
    assert record.train_loss < run.initial.loss
    assert least * record.step < record.gradients < 60 * record.step


def test_records_within_an_epoch(splits):
    options = RunOptions(PROBLEM, METHODS["sgd"], epochs=2, batch_size=20, record_every=2)
    records = list(Run(options, splits).epochs())
    assert [record.step for record in records] == [2, 4, 5, 7, 9, 10]
    assert [record.epoch for record in records] == [0.4, 0.8, 1, 1.4, 1.8, 2]


def test_records_of_averaged_parameters(splits):
    shared = {"epochs": 1, "batch_size": 10, "record_every": 1}
    plain, none, half = (
        [r.train_loss for r in Run(options, splits).epochs()]
        for options in (
            RunOptions(PROBLEM, METHODS["sgd"], {"learning_rate": 1e-3}, **shared, average=average)
            for average in (None, 0.0, 0.5)
        )
    )
    assert none == plain
    # One parameter vector is its own mean; of a falling loss the mean of two lies between.
    assert half[0] == plain[0]
    assert plain[1] < half[1] < plain[0]
    with pytest.raises(SettingError, match="decay of an average"):
        RunOptions(PROBLEM, METHODS["sgd"], epochs=1, average=1.0)


def test_own_defaults_come_before_those_that_are_passed_on():
    def factory(probes=2, **settings): ...

    def inner(probes=0, other=1): ...

    method = Method("m", "", factory=lambda: factory, forwards_to=lambda: inner)
    assert method.complete({}) == {"probes": 2, "other": 1}


LAYERS = [{"bias": 0.0, "kernel": 0.0}] * 4
LINEN = {
    "params": {"Block_0": {"Conv_0": {"kernel": 0.0}, "Conv_1": {"kernel": 0.0}}, "Dense": 0.0}
}


@pytest.mark.parametrize(
    ("name", "params", "labels"),
    [
        ("layers", LAYERS, (0, 0, 1, 1, 2, 2, 3, 3)),
        ("modules", LAYERS, (0, 0, 1, 1, 2, 2, 3, 3)),
        ("halves", LAYERS, (0, 0, 0, 0, 1, 1, 1, 1)),
        ("leaves", LAYERS, tuple(range(8))),
        ("layers", LINEN, (0, 1, 2)),
        ("modules", LINEN, (0, 0, 1)),
    ],
)
def test_blocks(name, params, labels):
    from secondorder.tree.blocks import label_blocks

    assert label_blocks(block_labels(name, params), params).labels == labels


@pytest.mark.parametrize(
    ("name", "message"), [("thirds", "must be one of: layers"), ("halves", "list of layers")]
)
def test_blocks_that_cannot_be(name, message):
    with pytest.raises(SettingError, match=message):
        block_labels(name, LINEN)


def test_names_of_blocks_reach_the_factory(monkeypatch):
    seen = []
    monkeypatch.setattr(
        so,
        "block_hessian_free",
        lambda blocks=None, weight_decay=0.0: seen.append(blocks) or optax.identity(),
        raising=False,
    )
    from benchmarks.methods import Context

    method = METHODS["bhf"]
    settings = method.settings(PROBLEM, {"blocks": "halves"})
    method.build(Context(PROBLEM, None, LAYERS), settings)
    method.build(Context(PROBLEM, None, LAYERS), {})
    assert seen == [["half 0", "half 0", "half 1", "half 1"], None]


def test_muon_leaves_embeddings_and_vectors_to_adamw():
    params = [
        {"embedding": jnp.ones((4, 3))},
        {"enter": jnp.ones((3, 3)), "scale": jnp.ones(3)},
        {"head": jnp.ones((3, 4))},
    ]
    transform = METHODS["muon"].factory()(0.5, adam_learning_rate=1e-3)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = transform.update(grads, transform.init(params), params)
    for leaf in (updates[0]["embedding"], updates[1]["scale"], updates[2]["head"]):
        np.testing.assert_allclose(leaf, -1e-3, rtol=1e-3)
    assert np.abs(updates[1]["enter"]).max() > 0.05


def test_adamw_decays_apart_from_the_gradient():
    transform = METHODS["adamw"].factory()(0.1, decoupled_decay=0.5)
    params = jnp.array([2.0])
    updates, _ = transform.update(jnp.zeros(1), transform.init(params), params)
    np.testing.assert_allclose(updates, [-0.1], rtol=1e-5)
