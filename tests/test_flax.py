"""Training steps of Flax models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import secondorder as so
from secondorder.flax import TrainState, find_nnx_layers, make_nnx_train_step, make_train_step
from tests.marks import with_slow

X = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
BATCH = (X, np.sin(X[:, :1]))
OPTIMIZERS = {
    "lsr1": lambda: so.lsr1(memory_size=2),
    "chain": lambda: optax.chain(so.scale_by_lsr1(memory_size=2), optax.scale(-0.1)),
    "adam": lambda: optax.adam(1e-2),
    "lbfgs": lambda: optax.lbfgs(memory_size=2),
}


def loss(outputs, batch):
    return jnp.mean((outputs - batch[1]) ** 2)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        hidden = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        hidden = nn.Dropout(0.2, deterministic=not train)(jnp.tanh(hidden))
        return nn.Dense(1)(hidden)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(5, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def linen_state(tx):
    model = Linen()
    variables = model.init(jax.random.key(0), X, train=False)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        model_state={"batch_stats": variables["batch_stats"]},
    )


@pytest.mark.parametrize("optimizer", with_slow(OPTIMIZERS, "chain", "lbfgs"))
def test_linen(optimizer):
    state = linen_state(OPTIMIZERS[optimizer]())
    step = jax.jit(make_train_step(loss, rngs=("dropout",), train=True))
    losses = []
    for key in jax.random.split(jax.random.key(1), 12):
        old = state
        state, metrics = step(state, BATCH, key)
        losses.append(metrics["loss"])
        assert jax.tree.structure(state) == jax.tree.structure(old)
    assert min(losses[-3:]) < losses[0]
    assert int(state.step) == 12
    before, after = (s.model_state["batch_stats"]["BatchNorm_0"]["mean"] for s in (old, state))
    assert bool(jnp.all(before != after))
    # The state of optax's line search changes its types at the first step.
    assert step._cache_size() == (2 if optimizer == "lbfgs" else 1)
    assert ("lsr1/ratio" in metrics) == (optimizer in {"lsr1", "chain"})


def test_linen_without_other_collections():
    model = nn.Dense(1)
    params = model.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=so.hessian_free())
    state, metrics = jax.jit(make_train_step(loss))(state, BATCH)
    assert loss(model.apply({"params": state.params}, X), BATCH) < metrics["loss"]


def test_linen_curvature_on_another_batch():
    state = linen_state(so.newton_cg(max_iterations=3))
    key = {"dropout": jax.random.key(2)}
    whole, part = (
        state.objective(lambda z, n=n: loss(z, (None, BATCH[1][:n])), X[:n], rngs=key)
        for n in (16, 8)
    )

    @jax.jit
    def step(state):
        (value, aux), grads = jax.value_and_grad(whole, has_aux=True)(state.params)
        new = state.apply_gradients(
            grads=grads, value=value, value_fn=whole, curvature_fn=part, model_state=aux
        )
        return new, value

    new, value = step(state)
    assert whole(new.params)[0] < value


def test_missing_key_says_which_and_how():
    step = make_train_step(loss, rngs=("dropout",))
    with pytest.raises(ValueError, match=r"dropout: call step\(state, batch, key\)"):
        step(linen_state(so.lsr1()), BATCH)


@pytest.mark.parametrize("optimizer", with_slow(OPTIMIZERS, "lbfgs", "lsr1"))
def test_nnx(optimizer):
    model = NNX(nnx.Rngs(0))
    state = nnx.Optimizer(model, OPTIMIZERS[optimizer](), wrt=nnx.Param)
    step = nnx.jit(make_nnx_train_step(loss))
    first, counts, means = None, [], []
    for _ in range(12):
        metrics = step(model, state, BATCH)
        first = metrics["loss"] if first is None else first
        means.append(np.array(model.norm.mean[...]))
        counts.append(int(state.step[...]))
    assert metrics["loss"] < first
    assert counts == list(range(1, 13))
    assert all((a != b).all() for a, b in zip(means[1:], means[:-1], strict=True))
    assert ("lsr1/ratio" in metrics) == (optimizer in {"lsr1", "chain"})


@pytest.mark.parametrize(
    "make",
    [lambda layers: so.kbfgs(0.1, layers), lambda layers: so.block_hessian_free(max_iterations=3)],
    ids=["kbfgs", "block_hessian_free"],
)
def test_nnx_layers_and_blocks(make):
    model = NNX(nnx.Rngs(0))
    layers = find_nnx_layers(model, loss, BATCH)
    assert [leaf.path for leaf in layers.leaves][:2] == ["first/bias", "first/kernel"]
    assert len(layers) == 2
    state = nnx.Optimizer(model, make(layers), wrt=nnx.Param)
    step = nnx.jit(make_nnx_train_step(loss))
    first = step(model, state, BATCH)["loss"]
    for _ in range(10):
        metrics = step(model, state, BATCH)
    assert metrics["loss"] < 0.8 * first
