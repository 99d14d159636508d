"""Data sets of the benchmarks, read in their original file formats or generated."""

from benchmarks.data.loaders import curves, digits, faces, fashion_mnist, mnist
from benchmarks.data.sources import DataError, DataOptions
from benchmarks.data.splits import Split, Splits

__all__ = [
    "DataError",
    "DataOptions",
    "Split",
    "Splits",
    "curves",
    "digits",
    "faces",
    "fashion_mnist",
    "mnist",
]
