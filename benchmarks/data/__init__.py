"""Data sets of the benchmarks, read in their original file formats or generated."""

from benchmarks.data.loaders import (
    a9a,
    breast_cancer,
    cifar10,
    curves,
    digits,
    faces,
    fashion_mnist,
    mnist,
    shakespeare,
)
from benchmarks.data.sources import DataError, DataOptions
from benchmarks.data.splits import BinarySamples, Split, Splits

__all__ = [
    "BinarySamples",
    "DataError",
    "DataOptions",
    "Split",
    "Splits",
    "a9a",
    "breast_cancer",
    "cifar10",
    "curves",
    "digits",
    "faces",
    "fashion_mnist",
    "mnist",
    "shakespeare",
]
