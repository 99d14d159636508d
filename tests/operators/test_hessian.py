"""The Hessian in its three modes, against `jax.hessian`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder.operators import hessian, hessian_on_stacks
from tests.operators.operator_models import (
    MODELS,
    assert_close,
    build,
    dense_hessian,
    matrix_of,
    normal,
    reverse_only_tanh,
)

MODES = {"forward_over_reverse": 1e-12, "reverse_over_reverse": 1e-12, "central_difference": 1e-6}


@pytest.mark.parametrize(
    ("model", "loss", "mode"),
    [(model, "softmax", mode) for model in MODELS for mode in MODES]
    + [("mlp", "squared", "forward_over_reverse")],
)
@pytest.mark.usefixtures("x64")
def test_is_the_dense_matrix(model, loss, mode):
    objective, params = build(model, loss)
    matrix = matrix_of(hessian, objective, params, mode)
    assert_close(matrix, dense_hessian(objective, params), MODES[mode])
    assert_close(matrix, matrix.T, MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_is_finite_on_large_batches(mode):
    objective, params = build("mlp", "softmax", 512)
    matrix = matrix_of(hessian, objective, params, mode)
    assert_close(matrix, dense_hessian(objective, params), 2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_plain_callables_and_aux(mode):
    def value_fn(p):
        return jnp.sum(p["a"] ** 2 * p["b"]), {"aux": jnp.arange(2)}

    params = {"a": normal(3), "b": normal(3, seed=1)}
    matrix = matrix_of(hessian, value_fn, params, mode)
    expected = dense_hessian(lambda p: value_fn(p)[0], params)
    assert_close(matrix, expected, 1e-3)
    plain = matrix_of(hessian, lambda p: value_fn(p)[0], params, mode)
    assert_close(plain, expected, 1e-3)


@pytest.mark.usefixtures("x64")
def test_reverse_over_reverse_needs_no_forward_rule():
    x, params = normal(4, 3), normal(3, 2)

    def objective(tanh):
        return so.Objective(lambda p: tanh(x @ p), lambda z: jnp.mean(z**2))

    matrix = matrix_of(hessian, objective(reverse_only_tanh), params, "reverse_over_reverse")
    assert_close(matrix, dense_hessian(objective(jnp.tanh), params), 1e-12)
    with pytest.raises(TypeError, match="forward-mode"):
        hessian(objective(reverse_only_tanh), params)(params)


@jax.custom_vjp
def opaque_cosh(x):
    """A function whose derivative is computed where JAX cannot see it."""
    return jnp.cosh(x)


def _opaque_bwd(x, cotangent):
    slope = jax.pure_callback(
        lambda x: np.sinh(np.asarray(x)),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        x,
        vmap_method="sequential",
    )
    return (cotangent * slope,)


opaque_cosh.defvjp(lambda x: (jnp.cosh(x), x), _opaque_bwd)


@pytest.mark.usefixtures("x64")
def test_central_difference_needs_no_second_derivative():
    params = normal(4)
    operator = hessian(lambda p: jnp.sum(opaque_cosh(p)), params, "central_difference")
    assert_close(operator.as_matrix(), np.diag(np.cosh(params)), 1e-8)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.usefixtures("x64")
def test_central_difference_has_no_scale(scale):
    """Its step is relative to the vector, so that the product is as linear as its digits allow."""
    objective, params = build("mlp", "softmax")

    @jax.jit
    def product(vector):
        return jax.tree.leaves(hessian(objective, params, "central_difference")(vector))

    scaled = product(jax.tree.map(lambda p: scale * p, params))
    for got, expected in zip(scaled, product(params), strict=True):
        assert_close(got / scale, expected, 1e-12 if scale == 1 else 1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_zero_vector(mode):
    objective, params = build("mlp", "softmax")
    zeros = jax.tree.map(jnp.zeros_like, params)
    product = jax.jit(lambda p, v: hessian(objective, p, mode)(v))(params, zeros)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(product))


@pytest.mark.parametrize(("mode", "tolerance"), [*zip(MODES, (0.05, 0.05, 0.3), strict=True)])
def test_half_precision_parameters(mode, tolerance):
    objective, params = build("mlp", "softmax")
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    matrix = matrix_of(hessian, objective, half, mode)
    assert matrix.dtype == jnp.float32
    assert_close(matrix, dense_hessian(objective, params), tolerance)


def test_wrong_values_and_modes_are_refused():
    with pytest.raises(TypeError, match="one real scalar"):
        hessian(lambda p: p, jnp.ones(2))
    with pytest.raises(ValueError, match="`mode` must be one of 'forward_over_reverse'"):
        hessian(jnp.sum, jnp.ones(2), "forward")


# Several products at once.


@pytest.mark.parametrize("mode", MODES)
def test_chunks_change_nothing(x64, mode):
    objective, params = build("mlp", "softmax")
    stack = jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(0).normal(size=(7, *p.shape))),
                         params)  # fmt: skip

    def run(chunk_size):
        return hessian_on_stacks(objective, params, mode, chunk_size=chunk_size)(stack).vectors

    expected = jax.jit(run, static_argnums=0)(None)
    for chunk_size in (1, 3, 7, 20):
        got = jax.jit(run, static_argnums=0)(chunk_size)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
