"""Peers of other packages: what they say where they cannot run, and what they do where they can."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import networks, peers
from benchmarks.data import DataOptions
from benchmarks.evaluations import Site, kfac_jax_work, sophia_work
from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS, Batch
from benchmarks.settings import SettingError
from benchmarks.training import Run, RunOptions

PROBLEM = PROBLEMS["digits-autoencoder"]


@pytest.fixture(scope="module")
def splits():
    return PROBLEM.load(DataOptions(train_size=100, test_size=50))


def test_packages_that_are_not_there():
    with pytest.raises(SettingError, match="no_such_package is not installed: pip install"):
        peers.import_peer("no_such_package")


def test_packages_that_do_not_import(tmp_path, monkeypatch):
    (tmp_path / "broken_peer.py").write_text("import no_such_module_of_jax")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = f"broken_peer of no version does not import on JAX {jax.__version__}: ModuleNotFound"
    with pytest.raises(SettingError, match=message):
        peers.import_peer("broken_peer")


def test_packages_that_do_not_run():
    def fail():
        raise AttributeError("jax has no tree_map\nmore")

    with pytest.raises(SettingError, match=r"x of no version does not run on JAX .*: jax has no"):
        peers.explain("x", fail)()


def test_sophia_is_that_of_optax(splits):
    """Two steps of the trainer equal two of optax, with the penalty in the objective."""
    overrides = {"learning_rate": 0.01, "update_every": 1}
    run = Run(RunOptions(PROBLEM, METHODS["sophia"], overrides, epochs=1, batch_size=50), splits)
    (record,) = run.epochs()
    params = jax.jit(PROBLEM.init)(jax.random.key(0))
    transform = optax.contrib.sophia(0.01, weight_decay=0.0, update_interval=1)
    state = transform.init(params)

    @jax.jit
    def step(params, state, inputs):
        def loss(p):
            return PROBLEM.loss(PROBLEM.model(p, inputs), inputs) + PROBLEM.penalty(p)

        updates, state = transform.update(jax.grad(loss)(params), state, params, obj_fn=loss)
        return optax.apply_updates(params, updates), state

    for inputs in splits.train.inputs.reshape(2, 50, 64):
        params, state = step(params, state, inputs)
    inputs = splits.train.inputs
    expected = PROBLEM.loss(PROBLEM.model(params, inputs), inputs) + PROBLEM.penalty(params)
    assert record.train_loss == pytest.approx(float(expected), rel=1e-3)
    assert record.gradients == 2 + 2 * 2


class FakeOptimizer:
    """Gradient descent behind the interface of `kfac_jax.Optimizer`, which notes its numbers."""

    def __init__(self, value_and_grad, **settings):
        self.value_and_grad, self.settings, self.numbers = value_and_grad, settings, []

    def init(self, params, key, batch):
        assert len(batch.inputs) == 50
        return types.SimpleNamespace(step_counter=jnp.zeros((), jnp.int32))

    def step(self, params, state, key, batch, global_step_int):
        _, grads = self.value_and_grad(params, batch)
        rate = 0.2 if global_step_int % 5 == 4 else 0.1
        moved = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        return moved, types.SimpleNamespace(step_counter=state.step_counter + 1), {}


jax.tree_util.register_pytree_node(
    types.SimpleNamespace,
    lambda node: ((node.step_counter,), None),
    lambda _, children: types.SimpleNamespace(step_counter=children[0]),
)


def test_adapter_of_kfac_jax(splits, monkeypatch):
    """Every fifth step is the one that changes the damping; the loss is registered."""
    registered = []
    package = types.ModuleType("kfac_jax")
    package.Optimizer = FakeOptimizer
    package.register_sigmoid_cross_entropy_loss = lambda out, targets: registered.append(out.shape)
    monkeypatch.setitem(sys.modules, "kfac_jax", package)
    options = RunOptions(PROBLEM, METHODS["kfac-jax"], epochs=3, batch_size=50)
    first, *_, record = Run(options, splits).epochs()
    params = jax.jit(PROBLEM.init)(jax.random.key(0))
    batches = [splits.train.inputs[:50], splits.train.inputs[50:]]
    assert set(registered) == {(50, 64)}
    assert record.step == 6
    assert record.gradients == pytest.approx(6 * (1 + 2 / 3 + 4 / 3 + 1 / 15), rel=1e-3)
    assert np.isfinite(record.train_loss)

    def loss(p, inputs):
        return PROBLEM.loss(PROBLEM.model(p, inputs), inputs) + PROBLEM.penalty(p)

    for inputs in batches:
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, inputs))
    assert first.train_loss == pytest.approx(float(loss(params, splits.train.inputs)), rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "shape", "labels"),
    [
        (networks.softmax_cross_entropy, (3, 4), (3,)),
        (networks.softmax_cross_entropy, (3, 5, 4), (3, 5)),
        (networks.half_squared_error, (3, 4), None),
        (networks.squared_error, (3, 4), None),
    ],
)
def test_losses_are_registered(loss, shape, labels):
    """What a fake package is told, over the size of the batch, is the loss of the problem."""
    seen = []

    def softmax(logits, labels, weight):
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        seen.append(weight * jnp.sum(entropy))

    def squares(outputs, targets, weight):
        seen.append(weight * jnp.sum((outputs - targets) ** 2))

    package = types.SimpleNamespace(
        register_softmax_cross_entropy_loss=softmax, register_squared_error_loss=squares
    )
    problem = dataclasses.replace(PROBLEM, loss=loss, model=lambda params, inputs: params * inputs)
    inputs = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    batch = Batch(inputs, None if labels is None else np.ones(labels, np.int32))
    params = jnp.asarray(2.0)
    value = peers._registered_loss(package, problem, params, batch)
    assert float(seen[0] / 3 + problem.penalty(params)) == pytest.approx(float(value), rel=1e-5)


def test_unknown_losses_are_not_guessed():
    problem = dataclasses.replace(PROBLEM, loss=lambda outputs, targets: jnp.sum(outputs))
    batch = Batch(jnp.ones((2, 64)))
    with pytest.raises(SettingError, match="not told the loss"):
        peers._registered_loss(None, problem, problem.init(jax.random.key(0)), batch)


def test_work_of_peers():
    site = Site({"update_every": 10}, PROBLEM.objective(Batch(jnp.ones((2, 64)))), None)
    assert sophia_work(None, site).in_gradients(1.0) == pytest.approx(0.2)
    site = site._replace(params=jax.jit(PROBLEM.init)(jax.random.key(0)))
    assert kfac_jax_work(None, site).in_gradients(1.0) == pytest.approx(2 / 3 + 4 / 3 + 1 / 15)
