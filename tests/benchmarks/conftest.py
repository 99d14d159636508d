"""Isolation from the user's data and cache, and small data in the real file formats."""

import os
from pathlib import Path

import numpy as np
import pooch
import pytest

from benchmarks.data import DataOptions
from tests.benchmarks.data_files import (
    write_a9a,
    write_cifar,
    write_faces,
    write_idx,
    write_shakespeare,
)


@pytest.fixture(autouse=True)
def _isolated(request, tmp_path, monkeypatch):
    """No test sees the user's data folder (unless marked) or writes into the user's cache."""
    if "data" not in request.keywords:
        monkeypatch.delenv("SECONDORDER_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)


@pytest.fixture
def real_data() -> DataOptions:
    """The options for the real data sets; the test is skipped without them."""
    if not os.environ.get("SECONDORDER_DATA"):
        pytest.skip("$SECONDORDER_DATA does not name a folder with the data sets")
    return DataOptions.from_environment()


@pytest.fixture
def data_folder(tmp_path) -> Path:
    """A data folder with a few random samples of every data set."""
    folder = tmp_path / "data"
    rng = np.random.default_rng(1)
    for name in ("mnist", "fashion_mnist"):
        for prefix, count in (("train", 24), ("t10k", 12)):
            images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            labels = rng.integers(0, 10, (count,), dtype=np.uint8)
            write_idx(folder / name / f"{prefix}-images-idx3-ubyte.gz", images)
            write_idx(folder / name / f"{prefix}-labels-idx1-ubyte.gz", labels)
    write_faces(folder)
    write_a9a(folder)
    write_cifar(folder)
    write_shakespeare(folder)
    return folder
