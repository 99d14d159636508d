"""Every problem: sizes of the spec, losses, and the L2 term."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import networks
from benchmarks.data import DataOptions
from benchmarks.evaluation import Evaluator
from benchmarks.problems import PROBLEMS, Batch

PARAMETERS = {
    "mnist-autoencoder": 2_837_314,
    "faces-autoencoder": 7_537_655,
    "curves-autoencoder": 842_340,
    "digits-autoencoder": 34_764,
    "digits-cnn": 13_706,
    "mnist-lenet5": 61_706,
    "mnist-lenet5-bn": 61_932,
    "fashion-lenet5": 61_706,
    "mnist-autoencoder-tanh": 2_837_314,
    "mnist-autoencoder-tanh-bce": 2_837_314,
    "digits-autoencoder-tanh": 34_764,
    "mnist-lstm": 2_510,
    "fashion-resnet": 77_322,
    "cifar-resnet": 77_610,
    "shakespeare-transformer": 111_040,
}


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", PROBLEMS)
def test_number_of_parameters(name):
    assert count(jax.eval_shape(PROBLEMS[name].init, jax.random.key(0))) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mnist-autoencoder", [784, 1000, 500, 250, 30, 250, 500, 1000, 784]),
        ("faces-autoencoder", [625, 2000, 1000, 500, 30, 500, 1000, 2000, 625]),
        (
            "curves-autoencoder",
            [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784],
        ),
    ],
)
def test_layer_sizes(name, sizes):
    params = jax.eval_shape(PROBLEMS[name].init, jax.random.key(0))
    shapes = [layer["kernel"].shape for layer in params]
    assert shapes == list(itertools.pairwise(sizes))


@pytest.mark.parametrize("name", PROBLEMS)
def test_loss_and_gradient_are_finite(name, data_folder):
    problem = PROBLEMS[name]
    splits = problem.load(DataOptions(data_folder, train_size=20, test_size=10))
    shapes = jax.eval_shape(problem.init, jax.random.key(1))
    rng = np.random.default_rng(0)  # Compiling the initialization would be most of the test.
    params = jax.tree.map(lambda leaf: rng.uniform(-0.05, 0.05, leaf.shape), shapes)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    batch = Batch.put(splits.train).take(jnp.arange(4))
    value, grads = jax.jit(lambda p, b: jax.value_and_grad(problem.objective(b))(p))(params, batch)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    metrics = Evaluator(problem)(params, Batch.put(splits.test))
    assert metrics.is_finite()
    assert (metrics.accuracy is not None) == problem.is_classifier


def test_initial_loss_is_that_of_gray_images():
    """Small initial outputs: log 2 per pixel."""
    problem = PROBLEMS["digits-autoencoder"]
    batch = Batch.put(problem.load(DataOptions(train_size=20)).train)
    loss = jax.jit(lambda key: problem.objective(batch)(problem.init(key)))(jax.random.key(0))
    assert float(loss) == pytest.approx(64 * np.log(2), rel=0.02)


def test_evaluation_includes_the_penalty_and_weighs_chunks():
    problem = PROBLEMS["digits-cnn"]
    splits = problem.load(DataOptions())
    params = jax.jit(problem.init)(jax.random.key(0))
    data = Batch.put(splits.train)  # 1500 samples: a whole chunk and half a chunk
    metrics = Evaluator(problem)(params, data)
    plain = float(jax.jit(problem.objective(data))(params))
    squares = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(params))
    assert metrics.loss == pytest.approx(plain + 0.5 * 1e-5 * squares, rel=1e-5)
    outputs = jax.jit(problem.model)(params, data.inputs)
    right = np.mean(np.argmax(outputs, axis=-1) == splits.train.labels)
    assert metrics.accuracy == pytest.approx(right)


def test_initialization_is_that_of_torch_linear():
    (layer,) = networks.init_dense_stack(jax.random.key(0), (400, 300))
    for leaf in (layer["kernel"], layer["bias"]):
        assert np.max(np.abs(leaf)) <= 0.05
        assert np.max(np.abs(leaf)) > 0.049
        assert np.std(leaf) == pytest.approx(0.05 / np.sqrt(3), rel=0.1)
    assert layer["kernel"].shape == (400, 300)


def test_code_and_output_are_linear():
    """With identity weights a negative input passes the code and the output unchanged."""
    identity = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    code_then_output = networks.apply_autoencoder([identity, identity], -jnp.ones((1, 2)))
    np.testing.assert_array_equal(code_then_output, -np.ones((1, 2)))
    deep = networks.apply_autoencoder([identity] * 4, -jnp.ones((1, 2)))
    np.testing.assert_array_equal(deep, np.zeros((1, 2)))


def test_losses_sum_over_pixels_and_average_over_the_batch():
    outputs, pixels = jnp.zeros((4, 3)), jnp.ones((4, 3))
    assert float(networks.half_squared_error(outputs, pixels)) == pytest.approx(1.5)
    assert float(networks.binary_cross_entropy(outputs, pixels)) == pytest.approx(3 * np.log(2))
    labels = jnp.zeros(4, int)
    assert float(networks.softmax_cross_entropy(outputs, labels)) == pytest.approx(np.log(3))


def test_batch_normalization_uses_the_batch():
    """Scaling all images changes next to nothing; taking others into the batch does."""
    problem = PROBLEMS["mnist-lenet5-bn"]
    params = jax.jit(problem.init)(jax.random.key(0))
    assert set(params) == {"params"}
    images = jax.random.uniform(jax.random.key(1), (6, 28, 28, 1))
    model = jax.jit(problem.model)
    np.testing.assert_allclose(model(params, 3 * images), model(params, images), atol=2e-3)
    assert not np.allclose(model(params, images[:3]), model(params, images)[:3], atol=0.02)
    norm = params["params"]["BatchNorm_0"]
    assert {name: leaf.shape for name, leaf in norm.items()} == {"scale": (6,), "bias": (6,)}
