"""What loaders return: plain numpy arrays, mostly in a training and a test part."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
LabelArray = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Split:
    """Samples of one part of a data set.

    Attributes:
        inputs: ``(samples, ...)`` float32, or int32 where they are characters.
        labels: ``(samples,)`` int32 classes, ``(samples, length)`` for sequences, or None where
            the inputs are their own targets (autoencoders): keeping no second copy keeps the
            device memory free.
    """

    inputs: FloatArray | LabelArray
    labels: LabelArray | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.inputs):
            raise ValueError(f"{len(self.inputs)} inputs but {len(self.labels)} labels.")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.inputs)

    def first(self, count: int | None) -> "Split":
        """The first ``count`` samples; all of them for None or a larger count."""
        labels = None if self.labels is None else self.labels[:count]
        return Split(self.inputs[:count], labels)


@dataclasses.dataclass(frozen=True)
class BinarySamples:
    """Samples of two classes in double precision, for deterministic minimization.

    Attributes:
        features: ``(samples, features)`` float64.
        signs: ``(samples,)`` float64, the classes as -1 and 1.
    """

    features: NDArray[np.float64]
    signs: NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Splits:
    """A data set: the part that is trained on and the part that is only looked at."""

    train: Split
    test: Split

    def as_vectors(self) -> "Splits":
        """The same inputs as vectors and without labels, as an autoencoder wants them."""
        parts = (self.train, self.test)
        return Splits(*(Split(part.inputs.reshape(len(part), -1)) for part in parts))

    def average_pooled(self, size: int) -> "Splits":
        """The same images ``(height, width, 1)``, averaged over squares, as ``(rows, columns)``."""
        parts = (self.train, self.test)
        return Splits(*(Split(_average(part.inputs, size), part.labels) for part in parts))


def _average(images: FloatArray | LabelArray, size: int) -> FloatArray:
    count, height, width, _ = images.shape
    squares = images.reshape(count, height // size, size, width // size, size)
    averages: FloatArray = squares.mean(axis=(2, 4), dtype=np.float32)
    return averages
