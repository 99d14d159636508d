"""Loaders: from files or recipes to training and test arrays."""

import functools

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import generated
from benchmarks.data.formats import read_cifar, read_idx, read_libsvm, read_olivetti
from benchmarks.data.sources import (
    A9A,
    CIFAR10,
    FASHION_MNIST,
    MNIST,
    OLIVETTI,
    TINY_SHAKESPEARE,
    DataError,
    DataOptions,
    FileSet,
)
from benchmarks.data.splits import BinarySamples, FloatArray, Split, Splits

# Of the 1797 digits that scikit-learn ships.
_DIGITS_TRAIN = 1500
# The last one is zero in every row of the test part of a9a.
_A9A_FEATURES = 123
# Samples in each of the files of CIFAR-10.
_CIFAR_BATCH = 10_000
# Distinct characters of Tiny Shakespeare, share of its text to train on, characters of a sample.
SHAKESPEARE_CHARACTERS = 65
_SHAKESPEARE_TRAIN = 0.9
SHAKESPEARE_CONTEXT = 64


def mnist(options: DataOptions) -> Splits:
    """MNIST: 60000 and 10000 images ``(28, 28, 1)`` in [0, 1], classes 0-9."""
    return _idx_data_set(MNIST, options)


def fashion_mnist(options: DataOptions) -> Splits:
    """Fashion-MNIST: 60000 and 10000 images ``(28, 28, 1)`` in [0, 1], classes 0-9."""
    return _idx_data_set(FASHION_MNIST, options)


def cifar10(options: DataOptions) -> Splits:
    """CIFAR-10: 50000 and 10000 images ``(32, 32, 3)`` in [0, 1], classes 0-9."""
    path = CIFAR10.locate("cifar-10-python.tar.gz", options)
    train = [f"data_batch_{number}" for number in range(1, 6)]
    if options.train_size is not None:
        train = train[: -(-options.train_size // _CIFAR_BATCH)]
    parts = ((train, options.train_size), (["test_batch"], options.test_size))
    splits = []
    for batches, count in parts:
        images, labels = read_cifar(path, batches)
        splits.append(Split(_unit_interval(images[:count]), labels[:count]))
    return Splits(*splits)


def shakespeare(options: DataOptions) -> Splits:
    """Tiny Shakespeare, cut into windows of 64 characters, numbered by the 65 that occur.

    The label of each character is the next one. The first 90 % of the text are trained on, the
    rest is the test. Windows do not overlap; they are shuffled once with a fixed seed, so that the
    first ones are a fair sample.
    """
    path = TINY_SHAKESPEARE.locate("input.txt", options)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text: {error}") from error
    characters, numbers = np.unique(list(text), return_inverse=True)
    cut = int(_SHAKESPEARE_TRAIN * len(text))
    if len(characters) > SHAKESPEARE_CHARACTERS or len(text) - cut <= SHAKESPEARE_CONTEXT:
        raise DataError(
            f"{path} is not Tiny Shakespeare: {len(text)} characters, {len(characters)} distinct."
        )
    return Splits(
        _windows(numbers[:cut]).first(options.train_size),
        _windows(numbers[cut:]).first(options.test_size),
    )


def _windows(numbers: NDArray[np.integer]) -> Split:
    """Windows that do not overlap, in random order; labels are the inputs one later."""
    count = (len(numbers) - 1) // SHAKESPEARE_CONTEXT
    order = np.random.default_rng(0).permutation(count)
    starts = SHAKESPEARE_CONTEXT * order[:, None] + np.arange(SHAKESPEARE_CONTEXT)
    return Split(numbers[starts].astype(np.int32), numbers[starts + 1].astype(np.int32))


def digits(options: DataOptions) -> Splits:
    """The handwritten digits that scikit-learn ships, ``(8, 8, 1)`` in [0, 1], classes 0-9.

    The 1797 images are shuffled once with a fixed seed, because they are in the order of their
    writers, and split into 1500 for training and 297 for testing.
    """
    from sklearn.datasets import load_digits  # slow to import, and needed here only

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = (bunch.images[order] / 16.0).astype(np.float32)[..., None]
    labels = bunch.target[order].astype(np.int32)
    return Splits(
        Split(images[:_DIGITS_TRAIN], labels[:_DIGITS_TRAIN]).first(options.train_size),
        Split(images[_DIGITS_TRAIN:], labels[_DIGITS_TRAIN:]).first(options.test_size),
    )


def curves(options: DataOptions) -> Splits:
    """CURVES-like images ``(28, 28)`` in [0, 1]: see `generated.CurvesRecipe`."""
    recipe = generated.CurvesRecipe()
    recipe = recipe.with_counts(options.train_size, options.test_size)
    train, test = generated.cached(recipe, lambda: generated.draw_curves(recipe))
    return Splits(Split(_unit_interval(train)), Split(_unit_interval(test)))


def faces(options: DataOptions) -> Splits:
    """FACES-like patches ``(25, 25)``, standardised: see `generated.FacesRecipe`.

    Each pixel is shifted to mean 0 over the training patches and all are divided by one number
    that makes the average variance of a pixel 1, as Hinton and Salakhutdinov (Science 313, 2006,
    supporting material) did with theirs. The papers' loss, half the squared error, asks for it.
    """
    recipe = generated.FacesRecipe()
    recipe = recipe.with_counts(options.train_size, options.test_size)
    # Located first, so that a missing file is reported whether or not patches are cached.
    path = OLIVETTI.locate("olivettifaces.mat", options)
    patches = generated.cached(recipe, lambda: generated.crop_faces(recipe, read_olivetti(path)))
    train, test = (_unit_interval(part) for part in patches)
    # In double precision: float32 sums over 100000 patches lose three digits.
    mean = train.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = np.sqrt(np.mean(np.var(train, axis=0, dtype=np.float64))).astype(np.float32)
    return Splits(Split((train - mean) / scale), Split((test - mean) / scale))


def a9a(options: DataOptions) -> BinarySamples:
    """a9a, the training part: 32561 rows of 123 features that are 0 or 1, dense."""
    features, signs = read_libsvm(A9A.locate("a9a", options), _A9A_FEATURES)
    if not np.isin(signs, (-1, 1)).all():
        raise DataError(f"{A9A.folder}/a9a: labels must be -1 or 1.")
    return BinarySamples(features[: options.train_size], signs[: options.train_size])


def breast_cancer(options: DataOptions) -> BinarySamples:
    """scikit-learn's breast cancer set: 569 rows of 30 features with mean 0 and variance 1."""
    from sklearn.datasets import load_breast_cancer  # slow to import, and needed here only

    bunch = load_breast_cancer()
    features = bunch.data[: options.train_size]
    standardized = (features - features.mean(axis=0)) / features.std(axis=0)
    return BinarySamples(standardized, 2.0 * bunch.target[: options.train_size] - 1)


def _idx_data_set(files: FileSet, options: DataOptions) -> Splits:
    read = functools.partial(_idx_split, files, options)
    return Splits(
        read("train", options.train_size),
        read("t10k", options.test_size),
    )


def _idx_split(files: FileSet, options: DataOptions, prefix: str, count: int | None) -> Split:
    images = read_idx(files.locate(f"{prefix}-images-idx3-ubyte.gz", options), ndim=3)
    labels = read_idx(files.locate(f"{prefix}-labels-idx1-ubyte.gz", options), ndim=1)
    if len(images) != len(labels) or images.shape[1:] != (28, 28):
        raise DataError(
            f"{files.folder}/{prefix}: images {images.shape} and labels {labels.shape} "
            "are not N images of 28x28 with N labels."
        )
    pixels = _unit_interval(images[:count])[..., None]
    return Split(pixels, labels[:count].astype(np.int32))


def _unit_interval(pixels: NDArray[np.uint8]) -> FloatArray:
    return pixels.astype(np.float32) / np.float32(255)
