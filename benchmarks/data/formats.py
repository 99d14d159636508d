"""Readers of the original file formats: gzipped IDX, CIFAR's pickles, MATLAB 5, LIBSVM text."""

import gzip
import math
import pickle
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from numpy.typing import NDArray

from benchmarks.data.sources import DataError

# An IDX file begins with two zero bytes, a type code and the number of dimensions.
_UNSIGNED_BYTE = 0x08
# What the pickles of CIFAR-10 are made of, beside Python's own containers.
_PICKLED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """Reads a gzipped IDX file of unsigned bytes.

    Args:
        path: The file.
        ndim: The number of dimensions that it must have (3 for images, 1 for labels).

    Returns:
        The array, read-only.

    Raises:
        DataError: Not gzip, cut short, too long, or another type or number of dimensions.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not an intact gzip file: {error}") from error
    header_size = 4 + 4 * ndim
    if len(content) < header_size or content[:4] != bytes([0, 0, _UNSIGNED_BYTE, ndim]):
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes with {ndim} dimensions: "
            f"it begins with {content[:4].hex(' ') or 'nothing'}."
        )
    shape = struct.unpack(f">{ndim}I", content[4:header_size])
    if len(content) - header_size != math.prod(shape):
        raise DataError(
            f"{path} promises shape {shape}, {math.prod(shape)} bytes, "
            f"but holds {len(content) - header_size}."
        )
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def read_cifar(path: Path, batches: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Reads batches of the Python version of CIFAR-10 from its archive.

    Args:
        path: The file ``cifar-10-python.tar.gz``.
        batches: Names of the batches, such as ``data_batch_1``.

    Returns:
        ``(samples, 32, 32, 3)`` images and ``(samples,)`` labels.

    Raises:
        DataError: Not such an archive, or one without such a batch.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            parts = [_read_cifar_batch(archive, name) for name in batches]
    # Damage shows as errors of tar, gzip, pickle and of what is looked up in the batch.
    except Exception as error:
        raise DataError(f"{path} is not an intact archive of CIFAR-10: {error}") from error
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return images, labels


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and nothing else: a pickle could otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        """Finds what the pickle names, if arrays are made of it."""
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _read_cifar_batch(
    archive: tarfile.TarFile, name: str
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    file = archive.extractfile(f"cifar-10-batches-py/{name}")
    if file is None:
        raise KeyError(name)
    # Written by Python 2, whose strings are bytes.
    batch = _ArrayUnpickler(file, encoding="bytes").load()
    pixels: NDArray[np.uint8] = batch[b"data"].reshape(-1, 3, 32, 32)
    return pixels.transpose(0, 2, 3, 1), np.asarray(batch[b"labels"], np.int32)


def read_olivetti(path: Path) -> NDArray[np.uint8]:
    """Reads the Olivetti faces from their MATLAB file.

    The file has one 64x64 image per column, itself in column-major order; ten consecutive
    images show one of forty people.

    Args:
        path: The file ``olivettifaces.mat``.

    Returns:
        ``(40, 10, 64, 64)`` upright images by person.

    Raises:
        DataError: Not a MATLAB file, or without a 4096 x 400 byte array ``faces``.
    """
    try:
        faces = scipy.io.loadmat(path).get("faces")
    # loadmat meets damage in many ways, from ValueError to zlib.error and struct.error.
    except Exception as error:
        raise DataError(f"{path} is not an intact MATLAB file: {error}") from error
    if faces is None or faces.shape != (4096, 400) or faces.dtype != np.uint8:
        found = "nothing" if faces is None else f"{faces.dtype}{faces.shape}"
        raise DataError(f"{path} must hold a uint8 (4096, 400) array 'faces', found {found}.")
    images: NDArray[np.uint8] = faces.T.reshape(40, 10, 64, 64).transpose(0, 1, 3, 2)
    return np.ascontiguousarray(images)


def read_libsvm(path: Path, features: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Reads a LIBSVM text file, whose columns count from 1, as a dense matrix.

    Args:
        path: The file.
        features: Number of columns; the last ones may be zero in every row.

    Returns:
        ``(samples, features)`` values and ``(samples,)`` labels.

    Raises:
        DataError: Not such a file, empty, or with more columns.
    """
    from sklearn.datasets import load_svmlight_file  # slow to import, and needed here only

    try:
        rows, labels = load_svmlight_file(str(path), n_features=features, zero_based=False)
    # Bytes that are not text and columns out of range are ValueErrors too.
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{path} is not a LIBSVM file with columns 1 to {features}: {error}"
        ) from error
    if not len(labels):
        raise DataError(f"{path} is not a LIBSVM file: it has no rows.")
    return rows.toarray(), labels
