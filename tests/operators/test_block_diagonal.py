"""Block-diagonal curvature by linearization against masked dense matrices, and its cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder.objective import Microbatches
from secondorder.operators.block_diagonal import (
    block_gauss_newton,
    block_gauss_newton_forms,
    block_hessian,
)
from secondorder.tree.blocks import label_blocks, one_block
from tests.operators.factored_models import block_mask, deep_mlp, each_leaf, product_cost
from tests.operators.operator_models import (
    MODELS,
    assert_close,
    build,
    dense_gauss_newton,
    dense_hessian,
    normal,
)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.usefixtures("x64")
def test_gauss_newton_is_the_masked_dense_matrix(model):
    objective, params = build(model, "softmax")
    blocks = each_leaf(params)
    matrix = jax.jit(lambda p: block_gauss_newton(objective, p, blocks).as_matrix())(params)
    assert_close(matrix, dense_gauss_newton(objective, params) * block_mask(params, blocks), 1e-12)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.usefixtures("x64")
def test_hessian_is_the_masked_dense_matrix(model):
    objective, params = build(model, "squared")
    blocks = each_leaf(params)
    matrix = jax.jit(lambda p: block_hessian(objective, p, blocks).as_matrix())(params)
    assert_close(matrix, dense_hessian(objective, params) * block_mask(params, blocks), 1e-12)


@pytest.mark.usefixtures("x64")
def test_one_block_is_the_full_matrix_and_reverse_mode_the_same():
    objective, params = build("mlp", "softmax")
    expected = dense_gauss_newton(objective, params)
    blocks = label_blocks(None, params)
    full, matrix = jax.jit(
        lambda p: (
            block_gauss_newton(objective, p, one_block(p)).as_matrix(),
            block_gauss_newton(objective, p, blocks, "reverse").as_matrix(),
        )
    )(params)
    assert_close(full, expected, 1e-12)
    assert_close(matrix, expected * block_mask(params, blocks), 1e-12)


def test_in_single_precision():
    objective, params = build("conv", "softmax")
    blocks = each_leaf(params)
    matrix = jax.jit(lambda p: block_gauss_newton(objective, p, blocks).as_matrix())(params)
    assert_close(matrix, dense_gauss_newton(objective, params) * block_mask(params, blocks), 1e-5)


def test_vectors_of_narrow_parameters_are_wide():
    x = normal(4, 3).astype(jnp.bfloat16)
    objective = so.Objective(
        lambda p: jnp.tanh(x @ p["w"]) @ p["v"], lambda z: jnp.mean(z.astype(jnp.float32) ** 2)
    )
    params = {"w": normal(3, 2).astype(jnp.bfloat16), "v": normal(2, 1).astype(jnp.bfloat16)}
    blocks = each_leaf(params)
    vector = {"w": jnp.ones((3, 2)), "v": jnp.ones((2, 1))}
    for operator in (
        block_gauss_newton(objective, params, blocks),
        block_hessian(objective, params, blocks),
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(operator(vector))} == {jnp.dtype("float32")}


def test_is_finite_at_two_layers_and_512_cases():
    """Where dense zero tangents were miscompiled on CPUs."""
    objective, params = deep_mlp(2, 512, 512, 10, inputs=784)
    params = jax.tree.map(lambda p: 0.05 * normal(*p.shape), params)
    blocks = label_blocks(None, params)
    vector = jax.tree.map(jnp.ones_like, params)
    for make in (block_gauss_newton, block_hessian):
        product = jax.jit(lambda p, v, make=make: make(objective, p, blocks)(v))(params, vector)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(product))


@pytest.mark.usefixtures("x64")
def test_aux_and_microbatches():
    x, y = normal(6, 3), normal(6, 2, seed=1)

    def objective_on(batch):
        x, targets = batch
        return so.Objective(
            lambda p: (jnp.tanh(x @ p["w"]) @ p["v"], {"aux": x}),
            lambda z: jnp.mean((z - targets) ** 2),
            has_aux=True,
        )

    params = {"w": normal(3, 4), "v": normal(4, 2)}
    blocks, whole = each_leaf(params), objective_on((x, y))
    pieces = Microbatches.split(objective_on, (x, y), size=2)
    for make in (block_gauss_newton, block_hessian):
        both = jax.jit(
            lambda p, make=make: [make(f, p, blocks).as_matrix() for f in (whole, pieces)]
        )
        expected, matrix = both(params)
        assert np.any(expected)
        assert_close(matrix, expected, 1e-12)
    expected, forms = (block_gauss_newton_forms(f, params, blocks)(params) for f in (whole, pieces))
    assert_close(forms, expected, 1e-12)


@pytest.mark.parametrize("depth", [3, 8])
def test_a_product_costs_one_pass_more_than_there_are_blocks(depth):
    objective, params = deep_mlp(depth, 256, 8, 10)
    blocks = label_blocks(None, params)
    product, setup = product_cost(
        lambda p: block_gauss_newton(objective, p, blocks), objective, params
    )
    # The forward passes of all blocks are one; the little above is elementwise.
    assert product <= (depth + 1) * 1.02
    assert setup <= 1.05


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.usefixtures("x64")
def test_forms_are_those_of_the_dense_matrix(model):
    objective, params = build(model, "softmax")
    blocks = each_leaf(params)
    vector = jax.tree.map(lambda p: jnp.cos(3 * p), params)
    forms = jax.jit(lambda p, v: block_gauss_newton_forms(objective, p, blocks)(v))(params, vector)
    leaves = jax.tree.leaves(vector)
    parts = [
        np.concatenate([np.ravel(x) * (i == k) for i, x in enumerate(leaves)])
        for k in range(len(leaves))
    ]
    expected = np.stack(parts) @ dense_gauss_newton(objective, params) @ np.stack(parts).T
    assert_close(forms, expected, 1e-12)


def test_forms_cost_one_half_of_a_pass_for_each_block():
    """Tangents start at their block: of the passes through all blocks, half are needed."""
    objective, params = deep_mlp(8, 256, 8, 10)
    blocks = label_blocks(None, params)

    def work(evaluate):
        return jax.jit(evaluate).lower(params).compile().cost_analysis()["flops"]

    forms = work(lambda p: block_gauss_newton_forms(objective, p, blocks)(p))
    # The pass itself, the change of each weight, and half of eight passes.
    assert forms / work(objective) <= 1 + 1 + 4 * 1.02
