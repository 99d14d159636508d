"""Methods on a part of the parameters."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from secondorder.tree import label_blocks
from tests.marks import with_slow

X = np.random.default_rng(0).normal(size=(12, 3)).astype("float32")
Y = np.sin(X[:, :1])
MASK = {"body": True, "head": False}


def params_of():
    rng = np.random.default_rng(1)
    return {
        "body": {"w": jnp.asarray(rng.normal(size=(3, 4)), "float32"), "b": jnp.zeros(4)},
        "head": {"w": jnp.asarray(rng.normal(size=(4, 1)), "float32"), "b": jnp.zeros(1)},
    }


def model(params, x):
    hidden = jnp.tanh(x @ params["body"]["w"] + params["body"]["b"])
    return hidden @ params["head"]["w"] + params["head"]["b"]


def objective_on(batch):
    x, y = batch
    return so.Objective(lambda p: model(p, x), lambda z: jnp.mean((z - y) ** 2))


OBJECTIVE = objective_on((X, Y))


def train(tx, params, objective=OBJECTIVE, steps=4):
    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, updates

    state = tx.init(params)
    for _ in range(steps):
        params, new, updates = step(params, state)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        state = new
    assert step._cache_size() == 1
    return params, updates


def assert_close(found, expected, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), found, expected
    )


METHODS = {
    "lsr1": lambda: so.lsr1(memory_size=2),
    "block_hessian_free": lambda: so.block_hessian_free(max_iterations=4),
}


@pytest.mark.parametrize("method", with_slow(METHODS, "lsr1"))
def test_a_method_does_with_a_part_what_it_does_with_it_alone(method):
    """Where the rest stays: an optimizer of the rest that does nothing."""
    params = params_of()
    rest = params["head"]
    alone = so.Objective(lambda part: model({**part, "head": rest}, X), OBJECTIVE.loss)
    expected, _ = train(METHODS[method](), {"body": params["body"]}, alone)
    tx = so.partition({"on": METHODS[method](), "off": optax.set_to_zero()}, labels())
    found, _ = train(tx, params)
    assert_close(found, {**expected, "head": rest}, rtol=1e-4)


def labels():
    return {"body": "on", "head": "off"}


def test_a_prefix_a_full_tree_and_a_function_label_alike():
    full = jax.tree.map(lambda _: "on", params_of()["body"]), "off"
    full = {"body": full[0], "head": {"w": "off", "b": "off"}}
    results = [
        train(so.partition({"on": so.lsr1(), "off": optax.sgd(0.1)}, given), params_of())[0]
        for given in (labels(), full, lambda params: labels())
    ]
    assert_close(results[1:], [results[0]] * 2, rtol=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A pytree that can be called, as modules of Equinox are."""

    body: Any
    head: Any

    def __call__(self, x):
        raise AssertionError("neither a mask nor labels are to be called")


def test_masks_and_labels_may_be_callable_modules():
    params = Module(**params_of())
    objective = so.Objective(lambda p: model(vars(p), X), OBJECTIVE.loss)
    masked = so.masked(so.newton_cg(), Module(body=True, head=False))
    parts = {"on": so.newton_cg(), "off": optax.identity()}
    labeled = so.partition(parts, Module(**labels()))
    for tx in (masked, labeled):
        state = tx.init(params)
        updates, _ = jax.eval_shape(
            lambda p, s, tx=tx: tx.update(p, s, p, value_fn=objective), params, state
        )
        assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert so.mask_params(params, Module(body=True, head=False)).body is not None
    named = label_blocks(Module(body="a", head="b"), params)
    assert named.names == ("a", "b")


def test_updates_of_the_rest_pass_through_a_mask():
    params = params_of()
    tx = so.masked(so.lsr1(), MASK)
    value, grads = jax.value_and_grad(OBJECTIVE)(params)
    updates, _ = tx.update(
        grads, tx.init(params), params, value=value, grad=grads, value_fn=OBJECTIVE
    )
    assert_close(updates["head"], grads["head"], rtol=0)
    # What is tried is a step of the part alone.
    moved = optax.apply_updates(params["body"], updates["body"])
    assert OBJECTIVE({"body": moved, "head": params["head"]}) < value


def test_curvature_of_another_batch_and_in_pieces():
    pieces = so.Microbatches.split(objective_on, (X, Y), size=4)
    whole, _ = train(so.partition({"on": so.hessian_free(), "off": optax.sgd(0.1)}, labels()),
                     params_of(), steps=2)  # fmt: skip
    found, _ = train(so.partition({"on": so.hessian_free(), "off": optax.sgd(0.1)}, labels()),
                     params_of(), pieces, steps=2)  # fmt: skip
    assert_close(found, whole, rtol=1e-3)


WITHOUT_BIAS = {"body": {"w": True, "b": False}, "head": True}
WITHOUT_WEIGHT = {"body": {"w": False, "b": True}, "head": True}
LAYERWISE = {
    "kbfgs": so.kbfgs,
    "pch": functools.partial(so.positive_curvature_hessian, input_moment="full"),
}


@pytest.mark.parametrize(
    ("method", "mask", "count"),
    [
        ("kbfgs", MASK, 1),
        ("kbfgs", WITHOUT_BIAS, 2),
        ("kbfgs", WITHOUT_WEIGHT, 1),
        ("pch", WITHOUT_BIAS, 2),
        ("pch", WITHOUT_WEIGHT, 1),
    ],
)
def test_layers_of_a_part(method, mask, count):
    """A weight whose bias another optimizer moves is a layer; a bias alone is in none."""
    params = params_of()
    part = so.mask_params(params, mask)
    layers = so.find_layers(so.hold_rest(OBJECTIVE, params), part)
    assert len(layers) == count
    named = jax.tree.map(lambda on: "on" if on else "adam", mask)
    tx = so.partition({"on": LAYERWISE[method](0.3, layers), "adam": optax.adam(1e-2)}, named)
    trained, _ = train(tx, params, steps=12)
    assert OBJECTIVE(trained) < 0.7 * OBJECTIVE(params)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), trained, params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("method", LAYERWISE)
@pytest.mark.parametrize("mask", [MASK, WITHOUT_BIAS], ids=["layers", "half a layer"])
def test_layers_of_all_parameters_are_refused_on_a_part(method, mask):
    layers = so.find_layers(OBJECTIVE, params_of())
    with pytest.raises(ValueError, match="find_layers"):
        so.masked(LAYERWISE[method](0.3, layers), mask).init(params_of())


def test_missing_parameters_name_the_argument():
    tx = so.masked(so.lsr1(), MASK)
    with pytest.raises(ValueError, match="params"):
        tx.update(params_of(), tx.init(params_of()), value_fn=OBJECTIVE)
