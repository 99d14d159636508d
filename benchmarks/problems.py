"""The problems: a data set, a network, a loss, and how the papers train it.

A problem is one entry of `PROBLEMS`. Loading its data is left to `Problem.load`, so that the
table can be read and tested without any file.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks import data, networks, sequences
from benchmarks.data import DataOptions, Split, Splits
from benchmarks.data.generated import GENERATED_NOTE
from benchmarks.data.loaders import SHAKESPEARE_CHARACTERS, SHAKESPEARE_CONTEXT
from secondorder.objective import Objective

Params = Any


class Batch(NamedTuple):
    """Samples on the device: a mini-batch, or a whole split.

    Attributes:
        inputs: ``(samples, ...)``.
        labels: ``(samples,)`` classes, ``(samples, length)`` for sequences, or None where
            the inputs are their own targets.
    """

    inputs: jax.Array
    labels: jax.Array | None = None

    @classmethod
    def put(cls, split: Split) -> "Batch":
        """The samples of a split, moved to the default device."""
        labels = None if split.labels is None else jnp.asarray(split.labels)
        return cls(jnp.asarray(split.inputs), labels)

    @property
    def targets(self) -> jax.Array:
        """What the outputs of the model are compared with."""
        return self.inputs if self.labels is None else self.labels

    def take(self, indices: jax.Array) -> "Batch":
        """The samples with the given numbers."""
        labels = None if self.labels is None else self.labels[indices]
        return Batch(self.inputs[indices], labels)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A training problem.

    Attributes:
        name: What the command line calls it.
        description: One line about data, network and loss.
        load: Reads or generates the data.
        init: PRNG key to initial parameters.
        model: ``(params, inputs) -> outputs``.
        loss: ``(outputs, targets) -> scalar``, a mean over the batch.
        batch_size: Samples per step.
        l2: Weight of ``0.5 |params|^2``. Reported losses include that term, as the papers' figures
            do; the objective given to a method does not, and the method adds ``l2 * params``
            to the gradient.
        is_classifier: Whether outputs are logits of classes, so that accuracy makes sense.
    """

    name: str
    description: str
    load: Callable[[DataOptions], Splits]
    init: Callable[[jax.Array], Params]
    model: Callable[[Params, jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    batch_size: int
    l2: float
    is_classifier: bool = False

    def objective(self, batch: Batch) -> Objective[Params]:
        """The mean loss on a batch as a function of the parameters, without the L2 term."""
        return Objective(
            lambda params: self.model(params, batch.inputs),
            lambda outputs: self.loss(outputs, batch.targets),
        )

    def penalty(self, params: Params) -> jax.Array:
        """The L2 term that is part of every reported loss."""
        squares = [jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(params)]
        return 0.5 * self.l2 * jnp.sum(jnp.stack(squares))


def _autoencoder(
    name: str,
    description: str,
    load: Callable[[DataOptions], Splits],
    sizes: Sequence[int],
    loss: Callable[[jax.Array, jax.Array], jax.Array] = networks.binary_cross_entropy,
    batch_size: int = 1000,
) -> Problem:
    """A problem with an autoencoder of the given encoder sizes, from input to code."""
    layers = (*sizes, *reversed(sizes[:-1]))
    shape = "-".join(map(str, layers))
    return Problem(
        name=name,
        description=f"{description}; {shape}, ReLU, linear code and output",
        load=lambda options: load(options).as_vectors(),
        init=functools.partial(networks.init_dense_stack, sizes=layers),
        model=networks.apply_autoencoder,
        loss=loss,
        batch_size=batch_size,
        l2=1e-5,
    )


def _tanh_autoencoder(
    name: str,
    description: str,
    load: Callable[[DataOptions], Splits],
    sizes: Sequence[int],
    batch_size: int,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = networks.squared_error,
    error: str = "squared error",
) -> Problem:
    """The autoencoder of the block-diagonal Hessian-free paper (Zhang et al. 2017).

    The paper leaves the initialization open. Adam trains Glorot's a little faster than Martens'
    sparse one with weights a quarter as large, and much faster than with weights half as large.
    """
    layers = (*sizes, *reversed(sizes[:-1]))
    shape = "-".join(map(str, layers))
    return Problem(
        name=name,
        description=f"{description}, {error}; {shape}, tanh, linear code and output",
        load=lambda options: load(options).as_vectors(),
        init=functools.partial(networks.init_glorot_stack, sizes=layers),
        model=functools.partial(networks.apply_autoencoder, activation=jnp.tanh),
        loss=loss,
        batch_size=batch_size,
        l2=0.0,
    )


def _classifier(
    name: str,
    description: str,
    load: Callable[[DataOptions], Splits],
    network: nn.Module,
    image_shape: tuple[int, int, int],
    batch_size: int,
    l2: float = 1e-5,
) -> Problem:
    """A problem with a Flax Linen network and softmax cross entropy.

    Running statistics of the network, if it keeps any, are dropped: it is applied to each batch
    with the statistics of that batch.
    """

    def init(key: jax.Array) -> Params:
        return {"params": network.init(key, jnp.zeros((1, *image_shape)))["params"]}

    def model(params: Params, images: jax.Array) -> jax.Array:
        outputs, _ = network.apply(params, images, mutable=["batch_stats"])
        return jnp.asarray(outputs)

    return Problem(
        name=name,
        description=description,
        load=load,
        init=init,
        model=model,
        loss=networks.softmax_cross_entropy,
        batch_size=batch_size,
        l2=l2,
        is_classifier=True,
    )


def _small_cifar10(options: DataOptions) -> Splits:
    """CIFAR-10 with its first 5000 images to train on, if no number is given."""
    return data.cifar10(dataclasses.replace(options, train_size=options.train_size or 5000))


_LSTM = Problem(
    name="mnist-lstm",
    description="MNIST averaged to 7x7 as 7 steps of 7 pixels, three LSTM layers of 10 units",
    load=lambda options: data.mnist(options).average_pooled(4),
    init=functools.partial(sequences.init_lstm_stack, inputs=7, hidden=(10, 10, 10), classes=10),
    model=sequences.apply_lstm_stack,
    loss=networks.softmax_cross_entropy,
    batch_size=1000,
    l2=0.0,
    is_classifier=True,
)

_TRANSFORMER = Problem(
    name="shakespeare-transformer",
    description=(
        "Tiny Shakespeare, next of 65 characters after up to 64; two blocks of width 64, 4 heads"
    ),
    load=data.shakespeare,
    init=functools.partial(
        sequences.init_transformer,
        characters=SHAKESPEARE_CHARACTERS,
        context=SHAKESPEARE_CONTEXT,
        width=64,
        depth=2,
    ),
    model=functools.partial(sequences.apply_transformer, heads=4),
    loss=networks.softmax_cross_entropy,
    batch_size=32,
    l2=0.0,
    is_classifier=True,
)


_ALL = (
    _autoencoder(
        "mnist-autoencoder",
        "MNIST, cross entropy summed over pixels",
        data.mnist,
        sizes=(784, 1000, 500, 250, 30),
    ),
    _autoencoder(
        "faces-autoencoder",
        f"FACES-like patches of the Olivetti faces ({GENERATED_NOTE}), half squared error",
        data.faces,
        sizes=(625, 2000, 1000, 500, 30),
        loss=networks.half_squared_error,
    ),
    _autoencoder(
        "curves-autoencoder",
        f"CURVES-like images ({GENERATED_NOTE}), cross entropy summed over pixels",
        data.curves,
        sizes=(784, 400, 200, 100, 50, 25, 6),
    ),
    _autoencoder(
        "digits-autoencoder",
        "scikit-learn's 8x8 digits, cross entropy summed over pixels",
        data.digits,
        sizes=(64, 128, 64, 12),
        batch_size=100,
    ),
    _classifier(
        "digits-cnn",
        "scikit-learn's 8x8 digits, two convolutions and two dense layers",
        data.digits,
        networks.DigitsCNN(),
        image_shape=(8, 8, 1),
        batch_size=100,
    ),
    _classifier(
        "mnist-lenet5",
        "MNIST, LeNet-5 with ReLU and max-pooling",
        data.mnist,
        networks.LeNet5(),
        image_shape=(28, 28, 1),
        batch_size=128,
    ),
    _classifier(
        "mnist-lenet5-bn",
        "MNIST, LeNet-5 with batch normalization, evaluated with statistics of 1000 samples",
        data.mnist,
        networks.LeNet5(normalize=True),
        image_shape=(28, 28, 1),
        batch_size=128,
    ),
    _classifier(
        "fashion-lenet5",
        "Fashion-MNIST, LeNet-5 with ReLU and max-pooling",
        data.fashion_mnist,
        networks.LeNet5(),
        image_shape=(28, 28, 1),
        batch_size=128,
    ),
    _tanh_autoencoder(
        "mnist-autoencoder-tanh",
        "MNIST",
        data.mnist,
        sizes=(784, 1000, 500, 250, 30),
        batch_size=1000,
    ),
    _tanh_autoencoder(
        "mnist-autoencoder-tanh-bce",
        "MNIST",
        data.mnist,
        sizes=(784, 1000, 500, 250, 30),
        batch_size=1000,
        loss=networks.binary_cross_entropy,
        error="cross entropy summed over pixels",
    ),
    _tanh_autoencoder(
        "digits-autoencoder-tanh",
        "scikit-learn's 8x8 digits",
        data.digits,
        sizes=(64, 128, 64, 12),
        batch_size=100,
    ),
    _LSTM,
    _classifier(
        "fashion-resnet",
        "Fashion-MNIST, one convolution and three residual blocks without normalization",
        data.fashion_mnist,
        networks.ResNet(),
        image_shape=(28, 28, 1),
        batch_size=256,
        l2=0.0,
    ),
    _classifier(
        "cifar-resnet",
        "CIFAR-10, 5000 images, one convolution and three residual blocks without normalization",
        _small_cifar10,
        networks.ResNet(),
        image_shape=(32, 32, 3),
        batch_size=256,
        l2=0.0,
    ),
    _TRANSFORMER,
)

PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in _ALL}
