"""Factors of the output Hessian, Fisher matrices and diagonals, against dense matrices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import secondorder as so
from secondorder.operators import (
    apply_factor,
    empirical_fisher,
    empirical_fisher_diagonal,
    fisher,
    gauss_newton_diagonal,
    output_factor,
)
from secondorder.operators.output_factor import SoftmaxFactor
from tests.operators.operator_models import (
    LOSSES,
    MODELS,
    assert_close,
    build,
    case_gradients,
    dense_gauss_newton,
    dense_jacobian,
    dense_output_hessian,
    matrix_of,
    normal,
)

KEY = jax.random.key(0)


def block_diagonal(blocks):
    """Matrices ``(n, c, c)`` along the diagonal of one."""
    count, size, _ = blocks.shape
    return jnp.einsum("nij,nm->nimj", blocks, jnp.eye(count)).reshape(count * size, -1)


def square_of(factor, outputs):
    """``S Sᵀ`` of all cases, dense."""
    units = jnp.eye(outputs.shape[-1])
    columns = [apply_factor(factor, jnp.broadcast_to(unit, outputs.shape)) for unit in units]
    blocks = jnp.stack(columns, -1).reshape(-1, *units.shape)
    return block_diagonal(blocks @ jnp.swapaxes(blocks, -1, -2))


@pytest.mark.parametrize("structure", ["dense", "auto"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", ["mlp", "lstm"])
@pytest.mark.usefixtures("x64")
def test_factors_are_square_roots_of_the_output_hessian(model, loss, structure):
    """That of the whole batch: so these losses do couple nothing across cases."""
    objective, params = build(model, loss)
    outputs = objective.model(params)
    factor = output_factor(objective.loss, outputs, structure)
    if structure == "dense":
        assert factor.shape == (*outputs.shape, outputs.shape[-1])
    else:
        assert isinstance(factor, SoftmaxFactor) == (loss == "softmax")
    assert_close(square_of(factor, outputs), dense_output_hessian(objective, params), 1e-13)


@pytest.mark.usefixtures("x64")
def test_diagonal_factors():
    outputs, targets = normal(2, 3, 4), normal(2, 3, 4, seed=1) > 0

    def pixelwise(z):
        return jnp.mean(jnp.logaddexp(0, z) - z * targets)

    factor = output_factor(pixelwise, outputs, "diagonal")
    objective = so.Objective(lambda z: z, pixelwise)
    assert factor.shape == outputs.shape
    assert_close(square_of(factor, outputs), dense_output_hessian(objective, outputs), 1e-13)
    dense = output_factor(pixelwise, outputs, "dense")
    assert_close(square_of(dense, outputs), square_of(factor, outputs), 1e-13)
    assert output_factor(pixelwise, outputs).shape == outputs.shape


def test_apply_factor():
    matrices, vectors = normal(2, 3, 4, 4), normal(2, 3, 4)
    expected = np.einsum("abij,abj->abi", matrices, vectors)
    assert_close(apply_factor(matrices, vectors), expected, 1e-6)
    assert_close(apply_factor(vectors, vectors), vectors**2, 1e-7)


def test_negative_curvature_is_cut_off():
    outputs = jnp.ones((3, 2))
    for structure in ("dense", "diagonal"):
        factor = output_factor(lambda z: jnp.sum(z[:, 0] ** 2 - z[:, 1] ** 2), outputs, structure)
        expected = np.kron(np.eye(3), np.diag([2.0, 0.0]))
        assert_close(square_of(factor, outputs), expected, 1e-6)


def test_saturated_and_large_batches_have_finite_factors():
    outputs = jnp.concatenate([100 * normal(256, 10), jnp.zeros((256, 10))])
    for structure in ("dense", "softmax"):
        made = jax.jit(lambda z, s=structure: output_factor(_uniform_targets, z, s))(outputs)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(made))


def _uniform_targets(logits):
    return -jnp.mean(jax.nn.log_softmax(logits))


@pytest.mark.usefixtures("x64")
def test_factors_of_weighted_softmax_cross_entropies():
    """Of masked cases, class weights, smoothed labels; and of confident predictions."""
    outputs = 5 * normal(3, 2, 4)
    labels, weights = jnp.array([[0, 1], [2, 3], [1, 1]]), jnp.array([1.0, 0.5, 2.0, 3.0])
    mask = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])

    def loss(z):
        plain = optax.softmax_cross_entropy_with_integer_labels(z, labels)
        smooth = optax.softmax_cross_entropy(z, 0.9 * jax.nn.one_hot(labels, 4) + 0.025)
        return jnp.sum(mask * (weights[labels] * plain + smooth)) / jnp.sum(mask)

    factor = output_factor(loss, outputs)
    assert isinstance(factor, SoftmaxFactor)
    expected = dense_output_hessian(so.Objective(lambda z: z, loss), outputs)
    assert_close(square_of(factor, outputs), expected, 1e-13)


def test_factors_of_many_classes_have_no_squares_of_their_number():
    """A vocabulary of a language model: ``(C, C)`` for each position would be 2.5e9 numbers."""
    outputs = jax.ShapeDtypeStruct((8, 50_000), jnp.float32)
    factor = jax.eval_shape(lambda z: output_factor(_uniform_targets, z), outputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(factor)) == 8 * 50_001


def test_factors_of_half_precision_outputs_are_wide():
    outputs = normal(4, 3).astype(jnp.bfloat16)
    factor = output_factor(lambda z: jnp.sum(z**2), outputs)
    assert factor.dtype == jnp.float32
    assert_close(square_of(factor, outputs), 2 * np.eye(12), 1e-6)


@pytest.mark.parametrize("outputs", [{"z": jnp.ones((2, 3))}, jnp.ones(()), jnp.ones((2, 3), int)])
def test_outputs_that_have_no_cases_are_refused(outputs):
    with pytest.raises(TypeError, match="one floating-point array"):
        output_factor(lambda z: jnp.sum(z["z"] if isinstance(z, dict) else z), outputs)


def test_unknown_structures_are_refused():
    with pytest.raises(ValueError, match="`structure` must be one of 'auto', 'dense', 'diagonal'"):
        output_factor(jnp.sum, jnp.ones(2), "sparse")


@pytest.mark.parametrize(
    ("model", "loss", "noise"),
    [
        ("mlp", "softmax", "normal"),
        ("conv", "squared", "rademacher"),
        ("attention", "softmax", "rademacher"),
    ],
)
def test_fisher_is_the_gauss_newton_matrix_on_average(model, loss, noise):
    objective, params = build(model, loss)
    matrix = matrix_of(fisher, objective, params, KEY, 4000, "dense", noise)
    assert_close(matrix, matrix.T, 1e-5)
    expected = dense_gauss_newton(objective, params)
    error = np.linalg.norm(matrix - expected) / np.linalg.norm(expected)
    assert error < 0.1  # 4 cases and 4000 samples leave a few hundredths


@pytest.mark.usefixtures("x64")
def test_sampled_rows_have_the_right_second_moment():
    """The mean over all sign vectors, each taken once, is ``G`` to rounding."""
    objective, params = build("mlp", "softmax", 1)
    outputs = objective.model(params)
    factor = output_factor(objective.loss, outputs)
    signs = jnp.array([*itertools.product((-1.0, 1.0), repeat=outputs.size)])
    rows = jnp.stack([apply_factor(factor, s[None]).ravel() for s in signs])
    jacobian = dense_jacobian(objective, params)
    matrix = jacobian.T @ (rows.T @ rows / len(rows)) @ jacobian
    assert_close(matrix, dense_gauss_newton(objective, params), 1e-12)


@pytest.mark.usefixtures("x64")
def test_fisher_is_one_fixed_matrix_of_low_rank():
    objective, params = build("mlp", "softmax", 3)
    matrix = matrix_of(fisher, objective, params, KEY, 2)
    values = np.linalg.eigvalsh(matrix)
    assert values[0] > -1e-14 * values[-1]
    assert np.sum(values > 1e-12 * values[-1]) <= 3 * 2
    other = matrix_of(fisher, objective, params, jax.random.key(1), 2)
    assert np.linalg.norm(matrix - other) > 1e-2 * np.linalg.norm(matrix)


@pytest.mark.usefixtures("x64")
def test_fisher_of_one_output_is_exact():
    """A sign squared is one."""
    x = normal(4, 3)
    objective = so.Objective(
        lambda w: (x @ w)[:, None], lambda z: jnp.mean(jnp.logaddexp(0, z) - 0.3 * z)
    )
    for structure in ("dense", "diagonal"):
        matrix = matrix_of(fisher, objective, normal(3), KEY, 1, structure)
        assert_close(matrix, dense_gauss_newton(objective, normal(3)), 1e-13)


@pytest.mark.parametrize(
    ("model", "loss"), [(model, "softmax") for model in MODELS] + [("mlp", "squared")]
)
@pytest.mark.usefixtures("x64")
def test_empirical_fisher(model, loss):
    objective, params = build(model, loss)
    gradients = case_gradients(objective, params)
    assert_close(jnp.mean(gradients, 0), ravel_pytree(jax.grad(objective)(params))[0], 1e-12)
    matrix = matrix_of(empirical_fisher, objective, params)
    assert_close(matrix, gradients.T @ gradients / len(gradients), 1e-12)
    halved = matrix_of(empirical_fisher, objective, params, len(gradients) // 2)
    assert_close(halved, matrix / 2, 1e-12)


@pytest.mark.parametrize("model", ["mlp", "lstm"])
def test_fishers_are_finite_on_large_batches(model):
    objective, params = build(model, "softmax", 512)
    for make in (empirical_fisher, lambda o, p: fisher(o, p, KEY)):
        product = jax.jit(lambda p, make=make: make(objective, p)(p))(params)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(product))


@pytest.mark.parametrize(("model", "loss"), [("mlp", "squared"), ("lstm", "softmax")])
def test_diagonals_are_those_of_the_matrices_on_average(model, loss):
    objective, params = build(model, loss)
    gradients = case_gradients(objective, params)
    pairs = (
        (gauss_newton_diagonal, jnp.diag(dense_gauss_newton(objective, params))),
        (empirical_fisher_diagonal, jnp.mean(gradients**2, 0)),
    )
    for estimate, expected in pairs:
        tree = jax.jit(lambda p, e=estimate: e(objective, p, KEY, 4000))(params)
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        diagonal = ravel_pytree(tree)[0]
        assert np.all(np.asarray(diagonal) >= 0)
        assert_close(diagonal, expected, 0.1)


@pytest.mark.parametrize("estimate", [gauss_newton_diagonal, empirical_fisher_diagonal])
def test_diagonals_of_one_output_of_one_case_are_exact(estimate):
    objective = so.Objective(lambda w: jnp.sum(jnp.sin(w))[None, None], lambda z: jnp.sum(z**2) / 2)
    params = normal(3)
    slope = jnp.cos(params)
    scale = 1 if estimate is gauss_newton_diagonal else jnp.sum(jnp.sin(params)) ** 2
    assert_close(estimate(objective, params, KEY), scale * slope**2, 1e-6)


def test_half_precision_parameters():
    objective, params = build("mlp", "softmax")
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    @jax.jit
    def evaluate(half, vector):
        return (
            fisher(objective, half, KEY)(vector),
            empirical_fisher(objective, half)(vector),
            gauss_newton_diagonal(objective, half, KEY),
            empirical_fisher_diagonal(objective, half, KEY),
        )

    results = jax.eval_shape(evaluate, half, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, p: fisher(o, p, KEY, samples=0), "`samples` must be"),
        (lambda o, p: fisher(o, p, KEY, noise="uniform"), "`noise` must be one of"),
        (lambda o, p: empirical_fisher(o, p, cases=0), "`cases` must be"),
        (lambda o, p: gauss_newton_diagonal(o, p, KEY, probes=0), "`probes` must be"),
        (lambda o, p: empirical_fisher_diagonal(o, p, KEY, probes=0), "`probes` must be"),
    ],
)
def test_wrong_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*build("mlp", "softmax"))
