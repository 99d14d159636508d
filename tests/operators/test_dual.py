"""Exact solutions in the space of the rows, against dense solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import secondorder as so
from secondorder.operators.block_diagonal import block_gauss_newton
from secondorder.operators.dual import dual_gram, dual_solve
from secondorder.operators.factored import factor_gauss_newton
from secondorder.tree.blocks import label_blocks, one_block
from tests.operators.factored_models import MODELS, block_mask, build, cut, each_leaf
from tests.operators.operator_models import assert_close, dense_gauss_newton, normal


def random_like(params, seed=7):
    return jax.tree.map(lambda p: normal(*p.shape, seed=seed), params)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("x64")
def test_is_the_dense_solution(name):
    """The right-hand side is no gradient of this batch, so that it has parts in no row."""
    objective, params = build(name)
    blocks, b = cut(params), random_like(params)
    damping = jnp.array([0.1, 0.3])

    def solve(p, refinements):
        return dual_solve(
            factor_gauss_newton(objective, p), b, damping, blocks, refinements=refinements
        )

    plain, refined = jax.jit(lambda p: (solve(p, 0), solve(p, 1)))(params)
    matrix = dense_gauss_newton(objective, params) * block_mask(params, blocks)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    diagonal = np.repeat(np.asarray(damping)[np.array(blocks.labels)], sizes)
    expected = np.linalg.solve(matrix + np.diag(diagonal), ravel_pytree(b)[0])
    assert_close(ravel_pytree(plain)[0], expected, 1e-11)
    assert_close(ravel_pytree(refined)[0], expected, 1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("x64")
def test_gram_matrix_has_the_eigenvalues_of_the_block(name):
    objective, params = build(name)
    blocks = one_block(params)
    gram = jax.jit(lambda p: dual_gram(factor_gauss_newton(objective, p), blocks, 0))(params)
    matrix = dense_gauss_newton(objective, params)
    assert_close(np.trace(gram), np.trace(matrix), 1e-12)
    assert_close(np.linalg.norm(gram), np.linalg.norm(matrix), 1e-12)


@pytest.mark.parametrize("damping", [0.1, 1e-2, 1e-3, 1e-4])
def test_residual_in_single_precision(damping):
    x = normal(64, 20, seed=3)
    targets = jax.nn.softmax(4 * normal(64, 5, seed=4))
    params = {"in": {"w": normal(20, 30), "b": normal(30)}, "out": {"w": normal(30, 5)}}

    def model(p):
        return jnp.tanh(x @ p["in"]["w"] + p["in"]["b"]) @ p["out"]["w"]

    objective = so.Objective(
        model, lambda z: -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(z), axis=-1))
    )
    blocks, b = label_blocks(None, params), jax.grad(objective)(params)

    @jax.jit
    def solve(p):
        factors = factor_gauss_newton(objective, p)
        return [dual_solve(factors, b, damping, blocks, refinements=k) for k in (0, 1)]

    plain, refined = (np.asarray(ravel_pytree(d)[0], np.float64) for d in solve(params))
    matrix = np.asarray(jax.jit(lambda p: dense_gauss_newton(objective, p))(params), np.float64)
    matrix = matrix * block_mask(params, blocks) + damping * np.eye(len(matrix))
    b = np.asarray(ravel_pytree(b)[0], np.float64)

    def residual(d):
        return np.linalg.norm(matrix @ d - b) / np.linalg.norm(b)

    assert residual(plain) <= 1e-6 / damping
    assert residual(refined) <= 1e-6 / damping**0.5


@pytest.mark.usefixtures("x64")
def test_one_case_with_one_output_has_a_closed_form():
    """Incremental Gauss-Newton: a matrix of rank one."""
    x, target, q, damping = normal(1, 4), 0.3, 2.0, 0.05
    params = {"w": normal(4, 3), "v": normal(3, 1)}
    model = lambda p: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    objective = so.Objective(model, lambda z: q / 2 * jnp.sum((z - target) ** 2))
    grads = jax.grad(objective)(params)
    descent = jax.tree.map(jnp.negative, grads)

    @jax.jit
    def solve(p):
        return dual_solve(factor_gauss_newton(objective, p), descent, damping, one_block(p))

    d, _ = ravel_pytree(solve(params))
    jacobian, _ = ravel_pytree(jax.grad(lambda p: model(p)[0, 0])(params))
    r = q * (model(params)[0, 0] - target)
    assert_close(d, -r * jacobian / (damping + q * jnp.sum(jacobian**2)), 1e-12)


@pytest.mark.usefixtures("x64")
def test_the_engines_agree():
    objective, params = build("conv")
    blocks, v = each_leaf(params), random_like(params)

    @jax.jit
    def products(p):
        factors = factor_gauss_newton(objective, p)
        linearized = block_gauss_newton(objective, p, blocks).damped(0.2)
        factored = factors.operator(blocks).damped(0.2)
        return linearized(v), factored(v), dual_solve(factors, linearized(v), 0.2, blocks)

    linearized, factored, recovered = (ravel_pytree(u)[0] for u in products(params))
    assert_close(factored, linearized, 1e-12)
    assert_close(recovered, ravel_pytree(v)[0], 1e-11)


@pytest.mark.usefixtures("x64")
def test_a_block_without_effect_is_only_damped():
    model, params = MODELS["mlp"]()
    objective, _ = build("mlp")
    objective = so.Objective(lambda p: model(p["net"]), objective.loss)
    params = {"net": params, "unused": {"w": normal(2)}}
    b = random_like(params)

    @jax.jit
    def solve(p):
        return dual_solve(factor_gauss_newton(objective, p), b, 0.5, label_blocks(None, p))

    d = solve(params)
    assert_close(d["unused"]["w"], 2 * b["unused"]["w"], 1e-14)


def test_refuses_what_cannot_be_solved():
    objective, params = build("mlp")
    factors = factor_gauss_newton(objective, params)
    with pytest.raises(ValueError, match="damping"):
        dual_solve(factors, params, 0.0, one_block(params))
    with pytest.raises(ValueError, match="refinements"):
        dual_solve(factors, params, 0.1, one_block(params), refinements=-1)
