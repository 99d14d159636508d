"""Convolutions in one order: the same values and derivatives, and no other order is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.jaxprs import canonical_convolutions
from tests.jaxprs.orders import CANONICAL, orders


def convolve(x, w, **settings):
    given = {"window_strides": (1, 1), "padding": "SAME"} | settings
    return jax.lax.conv_general_dilated(x, w, **given)


# NCHW with OIHW is what no fast convolution takes.
FORMS = {
    "plain": ({}, (2, 3, 6, 5), (4, 3, 3, 2)),
    "strides": ({"window_strides": (2, 1), "padding": "VALID"}, (2, 3, 6, 5), (4, 3, 3, 2)),
    "dilated": (
        {"rhs_dilation": (2, 1), "lhs_dilation": (1, 2), "padding": ((1, 0), (0, 2))},
        (2, 3, 6, 5),
        (4, 3, 2, 2),
    ),
    "groups": ({"feature_group_count": 2}, (2, 4, 6, 5), (6, 2, 3, 2)),
    "batch groups": ({"batch_group_count": 2}, (2, 4, 6, 5), (6, 4, 3, 2)),
    "one axis": ({"window_strides": (1,)}, (2, 3, 6), (4, 3, 2)),
}


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    settings, *shapes = FORMS[form]
    x, w = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes))
    gradient = jax.value_and_grad(
        lambda x, w: jnp.sum(jnp.sin(convolve(x, w, **settings))), argnums=(0, 1)
    )
    canonical = canonical_convolutions(gradient)
    for mine, his in zip(
        jax.tree.leaves(canonical(x, w)), jax.tree.leaves(gradient(x, w)), strict=True
    ):
        np.testing.assert_allclose(mine, his, rtol=2e-5, atol=2e-5)
    left = orders(jax.make_jaxpr(canonical)(x, w).jaxpr)
    assert len(left) == 1
    if x.ndim == 4:
        assert left == {tuple(CANONICAL)} != orders(jax.make_jaxpr(gradient)(x, w).jaxpr)


@pytest.mark.parametrize("call", ["jit", "checkpoint", "scan"])
def test_inside_calls(call):
    def layer(x, w):
        return jnp.tanh(convolve(x, w))

    def model(x, ws):
        if call == "scan":
            return jax.lax.scan(lambda x, w: (layer(x, w), jnp.sum(x)), x, ws)
        wrapped = jax.jit(layer) if call == "jit" else jax.checkpoint(layer)
        for w in ws:
            x = wrapped(x, w)
        return x, jnp.sum(x)

    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 4))
    ws = jax.random.normal(jax.random.key(1), (2, 3, 3, 3, 3))
    gradient = jax.grad(lambda ws: jnp.sum(model(x, ws)[0] ** 2))
    canonical = canonical_convolutions(gradient)
    np.testing.assert_allclose(canonical(ws), gradient(ws), rtol=2e-5, atol=2e-5)
    assert orders(jax.make_jaxpr(canonical)(ws).jaxpr) == {tuple(CANONICAL)}


def test_functions_without_convolutions_keep_their_structure():
    function = canonical_convolutions(lambda p: ({"a": p["a"] @ p["b"]}, None, jnp.sum(p["b"])))
    out, nothing, total = function({"a": jnp.ones((2, 2)), "b": 2 * jnp.ones((2, 2))})
    assert out["a"].tolist() == [[4, 4], [4, 4]]
    assert nothing is None
    assert float(total) == 8


def test_it_can_be_differentiated_and_mapped():
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 3))
    function = canonical_convolutions(lambda x: jnp.sum(convolve(x[None], w) ** 2))
    plain = lambda x: jnp.sum(convolve(x[None], w) ** 2)  # noqa: E731
    xs = jax.random.normal(jax.random.key(0), (4, 3, 5, 5))
    mine, his = (jax.vmap(jax.grad(f))(xs) for f in (function, plain))
    np.testing.assert_allclose(mine, his, rtol=2e-5, atol=2e-5)
