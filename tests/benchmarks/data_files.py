"""Writers of the data sets' file formats."""

import gzip
import struct
from pathlib import Path

import numpy as np
import scipy.io


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_faces(folder: Path) -> np.ndarray:
    """Writes random faces in the original layout; returns them as ``(40, 10, 64, 64)``."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 243, (400, 64, 64), dtype=np.uint8)
    columns = np.stack([image.flatten(order="F") for image in images], axis=1)
    path = folder / "olivetti" / "olivettifaces.mat"
    path.parent.mkdir(parents=True)
    scipy.io.savemat(path, {"faces": columns})
    return images.reshape(40, 10, 64, 64)


def write_a9a(folder: Path) -> None:
    """Writes 40 random rows like those of a9a."""
    rng = np.random.default_rng(2)
    path = folder / "libsvm" / "a9a"
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        for sign in rng.choice(["-1", "+1"], 40):
            columns = np.sort(rng.choice(np.arange(1, 124), 14, replace=False))
            print(sign, *(f"{column}:1" for column in columns), "", file=file)
