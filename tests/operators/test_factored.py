"""The pre-factored Gauss-Newton matrix: the dense matrix, its price, and where it is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder.objective import Microbatches
from secondorder.operators.block_diagonal import block_gauss_newton
from secondorder.operators.factored import factor_gauss_newton, why_not_factored
from secondorder.operators.gauss_newton import gauss_newton
from secondorder.tree.blocks import label_blocks, one_block
from tests.jaxprs.orders import CANONICAL, orders
from tests.operators.factored_models import (
    CASES,
    MODELS,
    block_mask,
    build,
    cut,
    deep_mlp,
    each_leaf,
    loss,
    product_cost,
)
from tests.operators.operator_models import assert_close, dense_gauss_newton, normal


def matrices(name):
    """The dense matrix, and three partitions with the matrices from the factors."""
    objective, params = build(name)
    partitions = [one_block(params), cut(params), each_leaf(params)]

    def evaluate(p):
        factors = factor_gauss_newton(objective, p)
        return [factors.operator(blocks).as_matrix() for blocks in partitions]

    expected = dense_gauss_newton(objective, params)
    masks = [block_mask(params, blocks) for blocks in partitions]
    return zip(jax.jit(evaluate)(params), [expected * mask for mask in masks], strict=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("x64")
def test_is_the_masked_dense_matrix(name):
    for matrix, expected in matrices(name):
        assert np.any(expected)
        assert_close(matrix, expected, 1e-12)


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_in_single_precision(name):
    for matrix, expected in matrices(name):
        assert_close(matrix, expected, 1e-5)


def test_vectors_of_narrow_parameters_are_wide():
    x = normal(CASES, 3).astype(jnp.bfloat16)
    objective = so.Objective(lambda p: jnp.tanh(x @ p["w"]) @ p["v"], loss)
    wide = {"w": normal(3, 2), "v": normal(2, 3)}
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), wide)
    factors = factor_gauss_newton(objective, params)
    product = factors.operator(one_block(params))(wide)
    assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {jnp.dtype("float32")}
    expected = block_gauss_newton(objective, params, one_block(params))(wide)
    assert_close(product["w"], expected["w"], 0.1)


def test_is_finite_at_two_layers_and_512_cases():
    objective, params = deep_mlp(2, 64, 512, 10, inputs=784)
    params = jax.tree.map(lambda p: 0.05 * normal(*p.shape), params)
    blocks = label_blocks(None, params)
    vector = jax.tree.map(lambda p: normal(*p.shape, seed=1), params)
    product = jax.jit(lambda p: factor_gauss_newton(objective, p).operator(blocks)(vector))(params)
    expected = jax.jit(lambda p: block_gauss_newton(objective, p, blocks)(vector))(params)
    for part, other in zip(jax.tree.leaves(product), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(part))
        assert_close(part, other, 1e-4)


@pytest.mark.usefixtures("x64")
def test_a_diagonal_output_hessian_gives_the_same_matrix():
    model, params = MODELS["mlp"]()
    objective = so.Objective(model, lambda z: jnp.mean(jnp.sum(jnp.cosh(z), axis=-1)))

    @jax.jit
    def evaluate(p):
        factors = factor_gauss_newton(objective, p, structure="diagonal")
        return factors.operator(one_block(p)).as_matrix()

    matrix = evaluate(params)
    assert_close(matrix, dense_gauss_newton(objective, params), 1e-12)


@pytest.mark.usefixtures("x64")
def test_sampled_columns_are_right_in_the_mean():
    objective, params = build("mlp")

    @jax.jit
    def sampled(key):
        factors = factor_gauss_newton(objective, params, columns=2, key=key)
        assert factors.columns == 2
        return factors.operator(one_block(params)).as_matrix()

    samples = jax.lax.map(sampled, jax.random.split(jax.random.key(0), 2000))
    expected = dense_gauss_newton(objective, params)
    assert np.linalg.eigvalsh(samples[0])[0] > -1e-12
    assert_close(jnp.mean(samples, axis=0), expected, 0.05)
    assert np.max(np.abs(samples[:10] - expected)) > 0.1 * np.max(np.abs(expected))


@pytest.mark.usefixtures("x64")
def test_a_parameter_without_effect_has_no_curvature():
    model, params = MODELS["mlp"]()
    objective = so.Objective(lambda p: model(p["net"]), loss)
    params = {"net": params, "unused": normal(2)}

    @jax.jit
    def evaluate(p):
        return factor_gauss_newton(objective, p).operator(one_block(p)).as_matrix()

    matrix = evaluate(params)
    assert_close(matrix, dense_gauss_newton(objective, params), 1e-12)


@pytest.mark.parametrize("depth", [3, 8, 16])
def test_a_product_costs_two_passes_at_any_depth(depth):
    objective, params = deep_mlp(depth, 512, 4, 10)
    for blocks in (label_blocks(None, params), one_block(params))[: 2 if depth == 3 else 1]:
        product, setup = product_cost(
            lambda p, blocks=blocks: factor_gauss_newton(objective, p).operator(blocks),
            objective,
            params,
        )
        assert product <= 2.2
        assert setup <= 1.05 + 10


@pytest.mark.parametrize("engine", ["full", "linearized", "factored"])
def test_convolutions_of_a_product_are_in_one_order(engine):
    """In loops XLA leaves them as they are, which on CPUs can be ten times slower."""
    objective, params = build("conv")
    make = {
        "full": lambda blocks: gauss_newton(objective, params),
        "linearized": lambda blocks: block_gauss_newton(objective, params, blocks),
        "factored": lambda blocks: factor_gauss_newton(objective, params).operator(blocks),
    }
    operator = make[engine](each_leaf(params))
    found = orders(jax.make_jaxpr(operator)(params).jaxpr)
    assert found == {tuple(CANONICAL)}


# Where it is not applicable.

W = normal(3, 3)


def batch_norm(p, x):
    h = x @ p
    return (h - jnp.mean(h, axis=0)) @ p


def mixing_scan(p, x):
    """Each case goes on where the one before it ended."""

    def step(h, x):
        h = jnp.tanh(x @ p + h)
        return h, h

    return jax.lax.scan(step, jnp.zeros(3), x)[1]


REFUSED = {
    "scaled": (lambda p, x: x * p[0], "goes into"),
    "one_number": (lambda p, x: jnp.sum(x @ p, axis=1), "not one array"),
    "two_arrays": (lambda p, x: (x @ p, x @ p), "not one array"),
    "time_first": (lambda p, x: jnp.tanh(jnp.stack([x, x]) @ p)[::-1], "`rev` acts along"),
    "batch_norm": (batch_norm, "depends on several cases"),
    "carry_over": (mixing_scan, "a `scan` goes over the cases"),
    "cumulative": (lambda p, x: jnp.cumsum(jnp.tanh(x @ p), axis=0), "`cumsum` acts along"),
    "reversed": (lambda p, x: (x @ p)[::-1], "`rev` acts along"),
    "shared": (lambda p, x: x @ p + jnp.ones(3) @ p, "what all cases share"),
    "parameter_out": (lambda p, x: p, "goes into the result"),
    "parameter_out_of_a_scan": (
        lambda p, x: jax.lax.scan(lambda c, _: (c, p), x @ p, length=2)[1][0],
        "goes into the result of a `scan`",
    ),
    "sorted_by_case": (lambda p, x: jnp.sort(x @ p, axis=0), "`sort` acts along"),
    "unknown": (lambda p, x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x @ p), "not known"),
    "features_as_cases": (lambda p, x: (x @ p).T, "of its own for each case"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_says_why_it_is_not_applicable(name):
    model, words = REFUSED[name]
    objective = so.Objective(lambda p: model(p, normal(CASES, 3)), loss)
    reason = why_not_factored(objective, W)
    assert words in reason
    with pytest.raises(ValueError, match="use block_gauss_newton instead"):
        factor_gauss_newton(objective, W)


def test_refuses_other_objectives_and_wrong_settings():
    pieces = Microbatches(lambda x: so.Objective(lambda p: x @ p, jnp.sum), jnp.ones((2, 3, 3)))
    assert "Microbatches" in why_not_factored(pieces, W)
    assert "function" in why_not_factored(lambda p: jnp.sum(p), W)
    objective = so.Objective(lambda p: jnp.ones((2, 3)) @ p, jnp.sum)
    with pytest.raises(ValueError, match="random `key`"):
        factor_gauss_newton(objective, W, columns=2)
    with pytest.raises(ValueError, match="columns"):
        factor_gauss_newton(objective, W, columns=0, key=jax.random.key(0))
