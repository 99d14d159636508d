"""What is not a layer and why; the report; batches and parameters that do not match."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder.layers.layer import check_leaves, trace_layers
from tests.layers.layer_models import fill, normal

X = normal(4, 3)


def found_and_rest(objective, params, **options) -> tuple[list[str], dict[str, str]]:
    layers = so.find_layers(objective, params, **options)
    paths = [leaf.path for leaf in layers.leaves]
    rest = {paths[leaf]: reason for leaf, reason in layers.unassigned}
    return [paths[layer.weight] for layer in layers.layers], rest


@jax.custom_vjp
def backward_rule(w, x):
    return x @ w


backward_rule.defvjp(lambda w, x: (x @ w, x), lambda x, g: (2 * x.T @ g, g))


@jax.custom_jvp
def forward_rule(w, x):
    return x @ w


forward_rule.defjvp(
    lambda primals, tangents: (forward_rule(*primals), 2 * primals[1] @ tangents[0])
)


def weight_norm(p):
    direction = p["v"] / jnp.linalg.norm(p["v"], axis=0)
    return X @ (p["g"] * direction)


def branches(p):
    first, second = (lambda x, w=w: x @ w for w in (p["w"], p["u"]))
    return jax.lax.cond(p["s"] > 0, first, second, X)


def while_loop(p):
    # Its gradient does not exist, but discovery needs none.
    return jax.lax.fori_loop(0, jnp.int32(p["n"]), lambda _, h: h @ p["w"], X)


def layer_norm(p):
    h = X @ p["w"]
    normalized = (h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True)
    return normalized * p["scale"] + p["bias"]


def looped_weight(p):
    return jax.lax.scan(lambda w, _: (jnp.tanh(w), X @ w), p["w"], None, length=2)[1]


SQUARE = normal(3, 3)
NOT_LAYERS = {
    "elementwise": (lambda p: X @ jnp.tanh(p["w"]), {"w": SQUARE}, [], {"w": "goes into `tanh`"}),
    "weight_norm": (
        weight_norm,
        {"v": SQUARE, "g": normal(3)},
        [],
        {"v": "goes into `mul`, `div`", "g": "goes into `mul`"},
    ),
    "slice": (lambda p: X @ p["w"][:, :2], {"w": SQUARE}, [], {"w": "goes into `slice`"}),
    "flip": (lambda p: X @ p["w"][::-1], {"w": SQUARE}, [], {"w": "goes into `rev`"}),
    "both_operands": (
        lambda p: p["a"] @ p["b"],
        {"a": SQUARE, "b": SQUARE},
        [],
        {"a": "goes into `dot_general`", "b": "goes into `dot_general`"},
    ),
    "input": (
        lambda p: jnp.broadcast_to(p["start"], (4, 3)) @ p["w"],
        {"start": normal(3), "w": SQUARE},
        ["w"],
        {"start": "goes into the input of a layer"},
    ),
    "outer_product": (
        lambda p: jnp.einsum("bi,o->bio", X, p["w"]),
        {"w": normal(2)},
        [],
        {"w": "goes into `dot_general`"},
    ),
    "cond": (
        branches,
        {"w": SQUARE, "u": SQUARE, "s": normal()},
        [],
        {"w": "goes into `cond`", "u": "goes into `cond`", "s": "goes into `gt`"},
    ),
    "while_loop": (
        while_loop,
        {"w": SQUARE, "n": normal()},
        [],
        {"w": "goes into `while`", "n": "goes into `while`"},
    ),
    "carry_of_scan": (looped_weight, {"w": SQUARE}, [], {"w": "goes into the carry of a `scan`"}),
    "custom_vjp": (
        lambda p: backward_rule(p["w"], X),
        {"w": SQUARE},
        [],
        {"w": "goes into `custom_vjp_call`"},
    ),
    "custom_jvp": (
        lambda p: forward_rule(p["w"], X),
        {"w": SQUARE},
        [],
        {"w": "goes into `custom_jvp_call`"},
    ),
    "layer_norm": (
        layer_norm,
        {"w": SQUARE, "scale": normal(3), "bias": normal(3)},
        ["w"],
        {
            "scale": "goes into `mul`",
            "bias": "goes into `add` to something that is not a layer's output",
        },
    ),
    "unused": (
        lambda p: X @ p["w"],
        {"w": SQUARE, "other": normal(2)},
        ["w"],
        {"other": "the objective does not depend on it"},
    ),
    "shared_bias": (
        lambda p: jnp.tanh(X @ p["u"] + p["b"]) @ p["w"] + p["b"],
        {"u": SQUARE, "w": SQUARE, "b": normal(3)},
        ["u", "w"],
        {"b": "a bias that its layer's uses do not share, or that several layers share"},
    ),
    "second_bias": (
        lambda p: X @ p["w"] + p["b"] + p["c"],
        {"w": SQUARE, "b": normal(3), "c": normal(3)},
        ["w"],
        {"c": "goes into `add` to a layer's output, but not as its bias"},
    ),
    "bias_per_example": (
        lambda p: X @ p["w"] + p["b"],
        {"w": SQUARE, "b": normal(4, 3)},
        ["w"],
        {"b": "goes into `add` to a layer's output, but not as its bias"},
    ),
    "kernel_as_image": (
        lambda p: jax.lax.conv(p["image"], jnp.ones((1, 1, 2, 2)), (1, 1), "VALID"),
        {"image": normal(1, 1, 4, 4)},
        [],
        {"image": "goes into `conv_general_dilated`"},
    ),
    "lookup_of_elements": (
        lambda p: p["table"][jnp.array([0, 1]), jnp.array([1, 2])],
        {"table": SQUARE},
        [],
        {"table": "goes into `gather`"},
    ),
}


@pytest.mark.parametrize("name", NOT_LAYERS)
def test_reasons(name):
    model, params, expected, reasons = NOT_LAYERS[name]
    found, rest = found_and_rest(lambda p: jnp.sum(model(p)), params)
    assert sorted(found) == expected
    assert rest == reasons


def test_weight_also_penalized_is_a_layer():
    found, rest = found_and_rest(lambda p: jnp.mean(X @ p) + jnp.sum(p**2), SQUARE)
    assert (found, rest) == (["(params)"], {})


def test_exclude():
    params = {"head": {"w": SQUARE, "b": normal(3)}, "body": {"w": SQUARE}}

    def objective(p):
        return jnp.mean(X @ p["body"]["w"] @ p["head"]["w"] + p["head"]["b"])

    seen = []
    found, rest = found_and_rest(
        objective, params, exclude=lambda path: seen.append(path) or path.startswith("head")
    )
    assert found == ["body/w"]
    assert rest == {"head/w": "excluded", "head/b": "excluded"}
    assert sorted(seen) == ["body/w", "head/w"]


def test_report():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.relu(nn.Conv(4, (3, 3), padding="VALID", feature_group_count=2)(images))
            x = nn.LayerNorm(use_bias=False)(x.reshape(x.shape[0], -1))
            dense = nn.Dense(16, name="twice")
            return nn.Dense(1, use_bias=False)(dense(dense(x)))

    model, images = Model(), normal(8, 4, 4, 2)
    params = fill(jax.eval_shape(model.init, jax.random.key(0), images))["params"]
    layers = so.find_layers(lambda p: jnp.mean(model.apply({"params": p}, images)), params)
    assert str(layers) == repr(layers)
    assert str(layers) == (
        "weight          kind   in  out  bias         blocks  positions  uses\n"
        "--------------  -----  --  ---  -----------  ------  ---------  ----\n"
        "Conv_0/kernel   conv    9    2  Conv_0/bias       2          4     1\n"
        "twice/kernel    dense  16   16  twice/bias        1          2     2\n"
        "Dense_0/kernel  dense  16    1  -                 1          1     1\n"
        "\n"
        "in no layer        shape  reason\n"
        "-----------------  -----  ---------------\n"
        "LayerNorm_0/scale  (16,)  goes into `mul`"
    )
    assert len(layers) == 3


def test_report_of_tied_weights_and_of_nothing():
    table, words = normal(5, 3), jnp.zeros((4, 2), int)
    tied = so.find_layers(lambda t: jnp.mean(jnp.tanh(t[words]) @ t.T), table)
    assert str(tied).splitlines()[-1].split() == (
        ["(params)", "embedding", "5", "3", "-", "1", "2", "1", "+", "1", "tied"]
    )
    nothing = so.find_layers(lambda _: jnp.zeros(()), {})
    assert str(nothing) == "No linear layers."
    assert len(nothing) == 0


def objective_of_batch(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean((hidden @ params["v"] - y) ** 2)


PARAMS = {"w": normal(3, 5), "b": normal(5), "v": normal(5)}


def test_abstract_form_finds_the_same():
    shapes = jax.eval_shape(lambda p: p, PARAMS)
    batch = (jax.ShapeDtypeStruct((4, 3), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float32))
    abstract = so.find_layers(objective_of_batch, shapes, batch)
    concrete = so.find_layers(lambda p: objective_of_batch(p, (X, X[:, 0])), PARAMS)
    assert abstract == concrete
    assert hash(abstract) == hash(concrete)
    assert str(abstract) == str(concrete)


@pytest.mark.parametrize("size", [0, -1])
def test_batch_size_is_positive(size):
    with pytest.raises(ValueError, match=f"`batch_size` must be at least 1, got {size}"):
        so.find_layers(jnp.sum, X, batch_size=size)


def test_given_batch_size():
    """Frames stacked on the batch axis: two positions per example."""
    layers = so.find_layers(lambda p: jnp.mean(X @ p), SQUARE, batch_size=2)
    assert layers.usages[0].positions == 2
    _, _, batch_size = trace_layers(layers, lambda p: jnp.mean(X @ p), SQUARE)
    assert batch_size == 2
    assert layers != so.find_layers(lambda p: jnp.mean(X @ p), SQUARE)


@pytest.mark.parametrize(
    "objective",
    [lambda p: X @ p, lambda p: jnp.sum(p).astype(int), lambda p: (jnp.sum(p, 0), 1)],
    ids=["vector", "integer", "aux"],
)
def test_objective_must_be_a_real_scalar(objective):
    with pytest.raises(TypeError, match=r"one real scalar, got shape .* jnp\.mean"):
        so.find_layers(objective, SQUARE)


# Another batch, another model.


def batched_objective(size):
    """Biases added in every way, so that their views could depend on the batch."""
    x = normal(size, 3)

    def objective(p):
        h = jnp.einsum("bi,ijk->bjk", x, p["w"])
        h = h + jnp.broadcast_to(p["b"], h.shape)

        def head(h):
            return jnp.tanh((p["v"] @ h.reshape(-1)).reshape(2, 2) + p["c"].T)

        return jnp.mean(jax.vmap(head)(h) @ p["u"] + p["d"])

    return objective


BATCHED = {
    "w": normal(3, 2, 3),
    "b": normal(2, 3),
    "v": normal(4, 6),
    "c": normal(2, 2),
    "u": normal(2, 1),
    "d": normal(1),
}


@pytest.mark.parametrize("size", [1, 2, 9])
def test_other_batch_sizes_match(size):
    layers = so.find_layers(batched_objective(4), BATCHED)
    assert [layers.leaves[layer.bias].path for layer in layers.layers] == ["b", "c", "d"]
    _, traced, batch_size = trace_layers(layers, batched_objective(size), BATCHED)
    assert batch_size == size
    assert [t.layer for t in traced] == list(layers.layers)
    positions = [t.positions for t in traced]
    assert positions == [size, size, 2 * size]


def test_other_use_of_a_weight_is_an_error():
    layers = so.find_layers(lambda p: jnp.mean(X @ p["w"]), {"w": SQUARE})
    for other in (lambda p: jnp.mean(X @ p["w"].T), lambda p: jnp.sum(p["w"] ** 2)):
        with pytest.raises(ValueError, match=r"'w' as the layer .*\n.*\n.*\n.*so\.find_layers\("):
            trace_layers(layers, other, {"w": SQUARE})


def test_lost_bias_is_an_error():
    params = {"w": SQUARE, "b": normal(3)}
    layers = so.find_layers(lambda p: jnp.mean(X @ p["w"] + p["b"]), params)
    with pytest.raises(ValueError, match="bias=None"):
        trace_layers(layers, lambda p: jnp.mean(X @ p["w"]), params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"w": normal(3, 6), "b": normal(5), "v": normal(5)},
            r"w: layers have \(3, 5\), .*\(3, 6\)",
        ),
        ({"w": normal(3, 5), "v": normal(5)}, r"b: layers have \(5,\), params have no such leaf"),
        ({**PARAMS, "extra": normal()}, r"extra: layers have no such leaf, params have \(\)"),
    ],
    ids=["shape", "missing", "new"],
)
def test_other_parameters_are_an_error(params, message):
    layers = so.find_layers(lambda p: objective_of_batch(p, (X, X[:, 0])), PARAMS)
    check_leaves(layers, PARAMS)
    with pytest.raises(ValueError, match=message) as caught:
        check_leaves(layers, params)
    assert "so.find_layers(objective, params)" in str(caught.value)


def test_other_order_of_parameters_is_an_error():
    layers = so.find_layers(lambda p: jnp.mean(X @ p["w"]), {"v": SQUARE, "w": SQUARE})
    leaves = tuple(reversed(layers.leaves))
    with pytest.raises(ValueError, match="the same leaves in another order"):
        check_leaves(dataclasses.replace(layers, leaves=leaves), {"v": SQUARE, "w": SQUARE})


def test_paths_are_those_of_the_tree():
    params = {"blocks": [{"w": SQUARE}, {"w": SQUARE}]}
    found, _ = found_and_rest(
        lambda p: jnp.mean(X @ p["blocks"][0]["w"] @ p["blocks"][1]["w"]), params
    )
    assert found == ["blocks/0/w", "blocks/1/w"]
    assert np.all([leaf.dtype == jnp.float32 for leaf in so.find_layers(jnp.sum, SQUARE).leaves])


def test_uses_that_only_auxiliary_outputs_need_do_not_count():
    x = jnp.ones((4, 3))
    params = {"w": jnp.ones((3, 2)), "head": jnp.ones((2, 5))}

    def objective(p):
        hidden = x @ p["w"]
        return jnp.mean(hidden**2), jax.jit(lambda q: (2 * x) @ q["w"] @ q["head"])(p)

    layers = so.find_layers(objective, params)
    assert [layers.leaves[layer.weight].path for layer in layers.layers] == ["w"]
    assert [usage.uses for usage in layers.usages] == [1]
    assert "does not depend" in dict(layers.unassigned)[0]
