"""The Gauss-Newton matrix against dense ``Jᵀ H J``, and what a product costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder.operators import gauss_newton, linearize_model, output_hessian
from tests.operators.operator_models import (
    LOSSES,
    MODELS,
    assert_close,
    build,
    dense_gauss_newton,
    matrix_of,
    normal,
    reverse_only_tanh,
)

NONLINEAR = {"tanh", "exp", "exp2", "logistic", "log", "log1p", "erf"}
MODES = ("forward", "reverse")


@pytest.mark.parametrize(
    ("model", "loss", "mode"),
    [(model, loss, "forward") for model in MODELS for loss in LOSSES]
    + [(model, "softmax", "reverse") for model in MODELS],
)
@pytest.mark.usefixtures("x64")
def test_is_the_dense_matrix(model, loss, mode):
    objective, params = build(model, loss)
    matrix = matrix_of(gauss_newton, objective, params, mode)
    assert_close(matrix, dense_gauss_newton(objective, params), 1e-12)
    assert_close(matrix, matrix.T, 1e-12)
    values = np.linalg.eigvalsh(matrix)
    assert values[0] > -1e-12 * values[-1]


@pytest.mark.parametrize("model", MODELS)
def test_is_finite_on_large_batches(model):
    """The compiler of CPUs has computed NaN from constant zero tangents from this size on."""
    objective, params = build(model, "softmax", 512)
    matrix = matrix_of(gauss_newton, objective, params)
    assert np.all(np.isfinite(matrix))
    assert_close(matrix, matrix.T, 1e-4)


@pytest.mark.usefixtures("x64")
def test_outputs_may_be_a_pytree():
    x = normal(4, 3)

    def model(p):
        hidden = jnp.tanh(x @ p["w"])
        return {"hidden": hidden, "score": (hidden @ p["v"],)}

    def loss(z):
        return jnp.mean(z["score"][0] ** 2) + 0.1 * jnp.sum(jnp.cosh(z["hidden"]))

    objective, params = so.Objective(model, loss), {"w": normal(3, 2), "v": normal(2)}
    matrix = matrix_of(gauss_newton, objective, params)
    assert_close(matrix, dense_gauss_newton(objective, params), 1e-12)


def test_aux_is_dropped():
    objective, params = build("mlp", "softmax")
    with_aux = so.Objective(
        lambda p: (objective.model(p), {"count": jnp.arange(3)}), objective.loss, has_aux=True
    )
    expected = matrix_of(gauss_newton, objective, params)
    assert_close(matrix_of(gauss_newton, with_aux, params), expected, 1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_parameters(mode):
    objective, params = build("mlp", "softmax")
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    matrix = matrix_of(gauss_newton, objective, half, mode)
    assert matrix.dtype == jnp.float32
    assert_close(matrix, matrix_of(gauss_newton, objective, params), 0.05)


def primitives(jaxpr, inside=False):
    """The names of all primitives inside loops, and of those outside."""
    within, outside = set(), set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        (within if inside else outside).add(name)
        parts = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        )
        for part in parts:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                more = primitives(part, inside or (name in {"while", "scan"}))
                within, outside = within | more[0], outside | more[1]
    return within, outside


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["mlp", "conv", "attention"])
def test_products_in_a_loop_repeat_no_forward_pass(model, mode):
    objective, params = build(model, "softmax")

    def iterate(params, vector):
        operator = gauss_newton(objective, params, mode)
        return jax.lax.fori_loop(0, jnp.asarray(3), lambda _, v: operator(v), vector)

    within, outside = primitives(jax.make_jaxpr(iterate)(params, params).jaxpr)
    assert "exp" in outside
    assert "dot_general" in within
    assert not within & NONLINEAR


def test_products_in_a_loop_repeat_no_scan():
    """The scan of a recurrent net is nonlinear outside of the loop and linear inside."""
    objective, params = build("lstm", "squared")

    def iterate(params, vector):
        operator = gauss_newton(objective, params)
        return jax.lax.fori_loop(0, jnp.asarray(3), lambda _, v: operator(v), vector)

    jaxpr = jax.make_jaxpr(iterate)(params, params).jaxpr
    (loop,) = (e for e in jaxpr.eqns if e.primitive.name == "while")
    within, outside = primitives(loop.params["body_jaxpr"].jaxpr)
    assert "dot_general" in within
    assert not (within | outside) & NONLINEAR
    assert set.union(*primitives(jaxpr)) & NONLINEAR


def reverse_only():
    """A model and a loss that forward mode cannot differentiate, and the same for oracles."""
    x, params = normal(4, 3), {"w": normal(3, 5), "v": normal(5, 2)}

    def objective(tanh):
        return so.Objective(
            lambda p: tanh(x @ p["w"]) @ p["v"], lambda z: jnp.mean((tanh(z) - 0.1) ** 2)
        )

    return objective(reverse_only_tanh), objective(jnp.tanh), params


@pytest.mark.usefixtures("x64")
def test_reverse_mode_needs_no_forward_rule():
    objective, plain, params = reverse_only()
    matrix = matrix_of(gauss_newton, objective, params, "reverse")
    assert_close(matrix, dense_gauss_newton(plain, params), 1e-12)
    with pytest.raises(TypeError, match="forward-mode"):
        gauss_newton(objective, params)(params)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("x64")
def test_linearization_is_the_model(mode):
    objective, params = build("attention", "softmax")
    at = linearize_model(objective, params, mode)
    outputs, tangents = jax.jvp(objective.model, (params,), (params,))
    assert_close(at.outputs, outputs, 1e-14)
    assert_close(at.forward(params), tangents, 1e-13)
    gradient = at.backward(jax.grad(objective.loss)(at.outputs))
    for got, expected in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(jax.grad(objective)(params)), strict=True
    ):
        assert_close(got, expected, 1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_output_hessian(mode):
    product = output_hessian(lambda z: jnp.sum(z**3), jnp.array([1.0, 2.0]), mode)
    assert product(jnp.array([1.0, 1.0])).tolist() == [6.0, 12.0]


def test_plain_callables_and_unknown_modes_are_refused():
    objective, params = build("mlp", "softmax")
    with pytest.raises(TypeError, match=r"so\.Objective"):
        gauss_newton(lambda p: objective(p), params)
    with pytest.raises(ValueError, match="`mode` must be one of 'forward', 'reverse'"):
        gauss_newton(objective, params, mode="backward")
