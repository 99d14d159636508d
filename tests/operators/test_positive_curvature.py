"""The positive-curvature Hessian, exact and approximate, against dense oracles in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder.objective import Microbatches
from secondorder.operators import gauss_newton
from secondorder.operators.expectation import (
    expected_curvature,
    expected_operator,
    layer_leaves,
    solve_expected,
)
from secondorder.operators.positive_curvature import (
    block_positive_curvature,
    positive_curvature,
)
from tests.operators.chain_models import (
    approximate,
    approximate_matrix,
    exact,
    leaf_blocks,
    loss_of,
    normal,
    objective_of,
    params_of,
    run,
)

pytestmark = pytest.mark.usefixtures("x64")
MOMENTS = ["mean", "full"]


def setup(name="tanh", batch=6, loss="softmax"):
    objective, x = objective_of(name, batch, loss)
    params = params_of()
    return objective, params, so.find_layers(objective, params), x


def close(found, expected, rtol=1e-10):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)


# The oracle itself.


@pytest.mark.parametrize("loss", ["softmax", "squared"])
def test_the_oracle_without_a_transform_has_the_blocks_of_the_hessian(loss):
    objective, params, _, x = setup("sigmoid", loss=loss)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = np.asarray(jax.hessian(lambda v: objective(unravel(v)))(flat))
    oracle = exact("sigmoid", objective, params, x, "none")
    close(leaf_blocks(oracle, params), leaf_blocks(hessian, params))


# Exact expectation.


@pytest.mark.parametrize(("name", "loss"), [("tanh", "softmax"), ("sigmoid", "squared")])
@pytest.mark.parametrize("transform", ["abs", "clip", "zero"])
def test_exact_operators_equal_the_dense_oracle(name, loss, transform):
    objective, params, layers, x = setup(name, loss=loss)
    expected = exact(name, objective, params, x, transform)
    close(positive_curvature(objective, params, layers, transform).as_matrix(), expected)
    blocks = block_positive_curvature(objective, params, layers, transform).as_matrix()
    close(blocks, leaf_blocks(expected, params))
    assert np.linalg.eigvalsh(expected).min() > -1e-12


def test_without_curvature_of_units_it_is_the_gauss_newton_matrix():
    objective, params, layers, _ = setup()
    expected = gauss_newton(objective, params).as_matrix()
    close(positive_curvature(objective, params, layers, "zero").as_matrix(), expected)
    relu, params, layers, _ = setup("relu")
    expected = gauss_newton(relu, params).as_matrix()
    close(positive_curvature(relu, params, layers, "abs").as_matrix(), expected)


# Approximate expectation.


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
@pytest.mark.parametrize("transform", ["abs", "clip", "zero"])
@pytest.mark.parametrize(("input_moment", "slope_moment"), [("mean", "full"), ("full", "mean")])
def test_approximate_curvature_equals_the_recursion_of_the_paper(
    name, transform, input_moment, slope_moment
):
    objective, params, layers, x = setup(name)
    settings = (transform, input_moment, slope_moment)
    expected = approximate(name, objective, params, x, *settings)
    found = expected_curvature(
        objective,
        params,
        layers,
        transform=transform,
        input_moment=input_moment,
        slope_moment=slope_moment,
    )
    for one, (inputs, outputs) in zip(found, expected, strict=True):
        close(one.inputs, inputs)
        close(one.outputs, outputs)
    close(expected_operator(found, params, layers).as_matrix(), approximate_matrix(expected))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("transform", ["abs", "clip", "zero"])
def test_of_one_case_both_expectations_are_equal(moment, transform):
    objective, params, layers, _ = setup("sigmoid", batch=1)
    found = expected_curvature(
        objective, params, layers, transform=transform, input_moment=moment, slope_moment=moment
    )
    expected = block_positive_curvature(objective, params, layers, transform).as_matrix()
    close(expected_operator(found, params, layers).as_matrix(), expected)


@pytest.mark.parametrize("moment", MOMENTS)
def test_direct_solution_solves_the_dense_system(moment):
    objective, params, layers, _ = setup("sigmoid")
    curvatures = expected_curvature(objective, params, layers, input_moment=moment)
    gradient = layer_leaves(jax.grad(objective)(params), layers)
    matrix = expected_operator(curvatures, params, layers).as_matrix()
    flat, unravel = jax.flatten_util.ravel_pytree(gradient)
    expected = np.linalg.solve(0.98 * matrix + 0.02 * np.eye(len(matrix)), flat)
    found = solve_expected(curvatures, gradient, layers, 0.02)
    jax.tree.map(lambda a, b: close(a, b, 1e-9), found, unravel(jnp.asarray(expected)))


# Models and objectives of other forms.


def test_a_head_counts_by_its_gauss_newton_matrix():
    """A function between the last layer and the outputs, and outputs that are a pytree."""
    x, params = normal(6, 4, seed=8), params_of()

    def model(p):
        z = jnp.tanh(run(jnp.tanh, p, x)[1])
        return {"first": z[:, 0], "rest": z[:, 1:]}

    objective = so.Objective(
        model, lambda z: jnp.mean(z["first"] ** 2) + jnp.mean(jnp.sum(z["rest"] ** 4, axis=-1))
    )
    layers = so.find_layers(objective, params)
    expected = gauss_newton(objective, params).as_matrix()
    close(positive_curvature(objective, params, layers, "zero").as_matrix(), expected)
    # The curvature in the last layer's outputs is that of its bias.
    last = expected_curvature(objective, params, layers)[-1].outputs
    bias = slice(-3 - 9, -9)
    close(last, expected[bias, bias])


def test_aux_outputs_are_left_out():
    objective, params, layers, _ = setup()
    with_aux = so.Objective(lambda p: (objective.model(p), {"n": 1.0}), objective.loss, True)
    expected = positive_curvature(objective, params, layers).as_matrix()
    close(positive_curvature(with_aux, params, layers).as_matrix(), expected)
    found = expected_curvature(with_aux, params, layers)
    jax.tree.map(close, found, expected_curvature(objective, params, layers))


def test_microbatches_have_the_curvature_of_the_whole_batch():
    whole, params, layers, x = setup("sigmoid", loss="squared")

    def objective_on(rows):
        return so.Objective(
            lambda p: run(jax.nn.sigmoid, p, rows)[1],
            lambda z: jnp.mean(jnp.sum((z - 0.3) ** 2, axis=-1)),
        )

    whole, pieces = objective_on(x), Microbatches.split(objective_on, x, 2)
    settings = {"input_moment": "full", "slope_moment": "full"}
    found = expected_curvature(pieces, params, layers, **settings)
    jax.tree.map(close, found, expected_curvature(whole, params, layers, **settings))
    for make in (positive_curvature, block_positive_curvature):
        expected = make(whole, params, layers).as_matrix()
        close(make(pieces, params, layers).as_matrix(), expected)


def test_many_outputs_are_taken_in_groups():
    params, x = {"w": normal(3, 37)}, normal(4, 3, seed=2)
    objective = so.Objective(lambda p: x @ p["w"], lambda z: jnp.mean(jax.nn.logsumexp(z, axis=-1)))
    (found,) = expected_curvature(objective, params, so.find_layers(objective, params))
    hessian = jax.hessian(objective.loss)(x @ params["w"])
    close(found.outputs, sum(hessian[n, :, n] for n in range(4)))


def test_parameters_in_no_layer_have_no_part():
    x, params = normal(6, 4, seed=8), {"layers": params_of(), "scale": jnp.asarray(1.5)}
    objective = so.Objective(
        lambda p: p["scale"] * run(jnp.tanh, p["layers"], x)[1], loss_of("softmax", 6)
    )
    layers = so.find_layers(objective, params)
    operator = block_positive_curvature(objective, params, layers)
    assert len(jax.tree.leaves(operator.like)) == len(jax.tree.leaves(params)) - 1
    plain = so.Objective(lambda p: 1.5 * run(jnp.tanh, p, x)[1], objective.loss)
    inner = params["layers"]
    expected = block_positive_curvature(plain, inner, so.find_layers(plain, inner)).as_matrix()
    close(operator.as_matrix(), expected)


@pytest.mark.parametrize("make", [positive_curvature, expected_curvature])
def test_a_model_that_is_no_chain_is_refused(make):
    x, params = normal(6, 4, seed=8), params_of()
    objective = so.Objective(lambda p: run(jax.nn.softmax, p, x)[1], loss_of("softmax", 6))
    with pytest.raises(ValueError, match="no chain of dense layers"):
        make(objective, params, so.find_layers(objective, params))


def test_half_precision_gives_float32():
    objective, params, layers, _ = setup()
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    x = normal(6, 4, seed=8).astype(jnp.bfloat16)
    objective = so.Objective(lambda p: run(jnp.tanh, p, x)[1], objective.loss)
    layers = so.find_layers(objective, params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    reference = so.Objective(lambda p: run(jnp.tanh, p, x.astype(jnp.float32))[1], objective.loss)
    expected = expected_curvature(reference, wide, so.find_layers(reference, wide))
    for one, other in zip(expected_curvature(objective, params, layers), expected, strict=True):
        assert one.inputs.dtype == one.outputs.dtype == jnp.float32
        np.testing.assert_allclose(one.outputs, other.outputs, rtol=0.1, atol=0.03)
    operator = block_positive_curvature(objective, params, layers)
    assert {leaf.dtype for leaf in jax.tree.leaves(operator.like)} == {jnp.dtype("float32")}
    vector = jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), operator.like)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(operator(vector)))
