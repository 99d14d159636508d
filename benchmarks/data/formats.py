"""Readers of the original file formats: gzipped IDX, MATLAB 5 and LIBSVM text."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import scipy.io
from numpy.typing import NDArray

from benchmarks.data.sources import DataError

# An IDX file begins with two zero bytes, a type code and the number of dimensions.
_UNSIGNED_BYTE = 0x08


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
