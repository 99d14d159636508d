"""`Microbatches`: the numbers of the whole batch, in the memory of a piece."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import secondorder as so
from secondorder.objective import Microbatches, check_split, value_and_grad
from secondorder.operators import (
    empirical_fisher,
    empirical_fisher_diagonal,
    fisher,
    gauss_newton,
    gauss_newton_diagonal,
    hessian,
    hessian_on_stacks,
    linearize_model,
)
from tests.operators.operator_models import (
    MODELS,
    assert_close,
    case_gradients,
    dense_gauss_newton,
    dense_hessian,
    make_batch,
    matrix_of,
    objective_on,
)

KEY = jax.random.key(0)


def both(model, loss, size=8, piece=2):
    """Parameters, the objective on the whole batch, and on pieces."""
    params, batch = make_batch(model, loss, size)
    make = functools.partial(objective_on, model, loss)
    return params, make(batch), Microbatches.split(make, batch, piece)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.usefixtures("x64")
def test_value_gradient_and_products_are_those_of_the_whole_batch(model):
    params, whole, pieces = both(model, "softmax")

    def evaluate(objective, params):
        value, gradient = jax.value_and_grad(objective)(params)
        operators = [make(objective, params) for make in (gauss_newton, hessian, empirical_fisher)]
        return value, gradient, [operator(params) for operator in operators]

    results = [jax.jit(functools.partial(evaluate, o))(params) for o in (pieces, whole)]
    for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(got, expected, 1e-12)


@pytest.mark.usefixtures("x64")
def test_products_with_stacks_and_their_samples():
    """Samples are what each piece says, which plain objectives cannot."""
    params, whole, pieces = both("mlp", "softmax")
    rng = np.random.default_rng(0)
    stack = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal((3, *p.shape))), params)
    product = functools.partial(hessian_on_stacks, chunk_size=2)
    images = jax.jit(lambda p: product(pieces, p, with_samples=True)(stack))(params)
    expected = jax.jit(lambda p: product(whole, p)(stack))(params)
    assert_close(ravel_pytree(images.vectors)[0], ravel_pytree(expected.vectors)[0], 1e-12)
    assert expected.samples.shape == (0, 3, 3)
    rows = jax.vmap(lambda vector: ravel_pytree(vector)[0])(stack)
    piece = pieces.objective_on(jax.tree.map(lambda leaf: leaf[1], pieces.batches))
    assert_close(images.samples[1], rows @ dense_hessian(piece, params) @ rows.T, 1e-12)
    with pytest.raises(TypeError, match=r"Microbatches\.split"):
        product(whole, params, with_samples=True)


@pytest.mark.parametrize("mode", ["reverse_over_reverse", "central_difference"])
@pytest.mark.usefixtures("x64")
def test_other_modes(mode):
    params, whole, pieces = both("mlp", "softmax")
    matrix = matrix_of(hessian, pieces, params, mode)
    assert_close(matrix, dense_hessian(whole, params), 1e-7)
    matrix = matrix_of(gauss_newton, pieces, params, "reverse")
    assert_close(matrix, dense_gauss_newton(whole, params), 1e-12)


def test_sampled_matrices_are_those_of_the_whole_batch_on_average():
    params, whole, pieces = both("mlp", "softmax")
    dense, gradients = dense_gauss_newton(whole, params), case_gradients(whole, params)
    sampled = matrix_of(fisher, pieces, params, KEY, 2000)
    assert_close(sampled, dense, 0.1)
    for estimate, expected in (
        (gauss_newton_diagonal, jnp.diag(dense)),
        (empirical_fisher_diagonal, jnp.mean(gradients**2, 0)),
    ):
        diagonal = jax.jit(lambda p, e=estimate: e(pieces, p, KEY, 2000))(params)
        assert_close(ravel_pytree(diagonal)[0], expected, 0.1)


def test_noise_differs_between_pieces_and_not_between_products():
    """Two pieces with the same cases get different signs, and keep them."""
    params, (x, y) = make_batch("mlp", "softmax", 2)
    make = functools.partial(objective_on, "mlp", "softmax")
    twice = Microbatches(make, (jnp.stack([x, x]), jnp.stack([y, y])))
    matrix = matrix_of(fisher, twice, params, KEY)
    assert_close(matrix, matrix.T, 1e-6)
    single = matrix_of(fisher, Microbatches(make, (x[None], y[None])), params, KEY)
    assert np.linalg.norm(matrix - single) > 1e-2 * np.linalg.norm(single)


def test_half_precision_parameters():
    params, _, pieces = both("mlp", "softmax")
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    matrix = matrix_of(gauss_newton, pieces, half)
    assert matrix.dtype == jnp.float32
    assert_close(matrix, matrix_of(gauss_newton, pieces, params), 0.05)


def test_aux_of_all_pieces():
    params, (x, y) = make_batch("mlp", "softmax", 4)

    def with_aux(batch):
        objective = objective_on("mlp", "softmax", batch)
        return so.Objective(
            lambda p: (objective.model(p), {"mean": jnp.mean(batch[0])}), objective.loss, True
        )

    pieces = Microbatches.split(with_aux, (x, y), 2)
    (value, aux), gradient = jax.jit(jax.value_and_grad(pieces, has_aux=True))(params)
    assert aux["mean"].shape == (2,)
    assert_close(jnp.mean(aux["mean"]), jnp.mean(x), 1e-6)
    whole_value, whole_gradient = value_and_grad(objective_on("mlp", "softmax", (x, y)), params)
    assert_close(value, whole_value, 1e-6)
    assert_close(ravel_pytree(gradient)[0], ravel_pytree(whole_gradient)[0], 1e-5)
    products = jax.jit(lambda p: (hessian(pieces, p)(p), gauss_newton(pieces, p)(p)))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(products))


def test_with_loss():
    params, whole, pieces = both("mlp", "softmax")

    def square(z):
        return jnp.mean(z**2)

    for objective in (whole, pieces):
        other = objective.with_loss(square)
        assert type(other) is type(objective)
        assert_close(other(params), square(whole.model(params)), 1e-6)


@pytest.mark.parametrize("what", ["gradient", "product"])
def test_memory_is_that_of_a_piece(what):
    params, whole, pieces = both("mlp", "softmax", 4096, 64)

    def temporaries(objective):
        def evaluate(p):
            return jax.grad(objective)(p) if what == "gradient" else gauss_newton(objective, p)(p)

        analysis = jax.jit(evaluate).lower(params).compile().memory_analysis()
        return getattr(analysis, "temp_size_in_bytes", 0)

    if not temporaries(whole):
        pytest.skip("no memory analysis on this device")
    assert temporaries(pieces) < temporaries(whole) / 8


def test_pieces_are_found_by_split():
    batch = {"x": jnp.arange(12).reshape(6, 2), "y": np.arange(6)}
    pieces = Microbatches.split(lambda b: so.Objective(lambda p: p, jnp.sum), batch, 3)
    assert pieces.pieces == 2
    assert pieces.batches["x"].shape == (2, 3, 2)
    assert np.asarray(pieces.batches["y"]).tolist() == [[0, 2, 4], [1, 3, 5]]
    assert pieces.batches["x"][1, :, 0].tolist() == [2, 6, 10]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches_stay_sharded(kind):
    """Every device has its share of every piece: no piece is gathered."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    params, batch = make_batch("mlp", "squared", 16)
    make = functools.partial(objective_on, "mlp", "squared")
    placed = (
        jax.device_put(params, NamedSharding(mesh, PartitionSpec())),
        jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))),
    )

    @jax.jit
    def product(params, batch):
        return gauss_newton(Microbatches.split(make, batch, 8), params)(params)

    got, expected = product(*placed), gauss_newton(make(batch), params)(params)
    for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(leaf, other, 1e-5)
    text = product.lower(*placed).compile().as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text


def test_is_split_but_not_one_model():
    params, _, pieces = both("mlp", "softmax")
    check_split(pieces, "method")
    with pytest.raises(TypeError, match="Microbatches"):
        linearize_model(pieces, params)


@pytest.mark.parametrize("size", [0, 4, 7])
def test_batches_that_do_not_divide_are_refused(size):
    _, batch = make_batch("mlp", "softmax", 6)
    with pytest.raises(ValueError, match=r"pieces of|`size` must be"):
        Microbatches.split(functools.partial(objective_on, "mlp", "softmax"), batch, size)


@pytest.mark.parametrize("batches", [(jnp.ones((2, 1)), jnp.ones((3, 1))), jnp.ones(()), ()])
def test_pieces_must_be_as_many_everywhere(batches):
    with pytest.raises(ValueError, match="same first axis"):
        Microbatches(lambda batch: batch, batches)


def test_needs_a_callable():
    with pytest.raises(TypeError, match="`objective_on` must be callable"):
        Microbatches(jnp.ones(2), jnp.ones(2))
