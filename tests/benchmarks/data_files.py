"""Writers of the data sets' file formats."""

import gzip
import io
import pickle
import struct
import tarfile
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


def write_cifar(folder: Path, count: int = 6) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Writes random batches in the archive of CIFAR-10; returns their images and labels."""
    rng = np.random.default_rng(3)
    path = folder / "cifar10" / "cifar-10-python.tar.gz"
    path.parent.mkdir(parents=True)
    written = {}
    with tarfile.open(path, "w:gz") as archive:
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
            pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            labels = rng.integers(0, 10, count).tolist()
            content = pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
            written[name] = (pixels.reshape(count, 3, 32, 32).transpose(0, 2, 3, 1), labels)
    return written


def write_shakespeare(folder: Path) -> str:
    """Writes a text with a few characters, long enough for windows in both parts."""
    text = "".join(np.random.default_rng(4).choice(list("abc de\n"), 2100))
    path = folder / "tinyshakespeare" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    return text
