"""JSON Lines records, and what belongs in every one of them."""

import contextlib
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

Record = dict[str, Any]
Writer = Callable[[Mapping[str, Any]], None]

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "secondorder")


def versions() -> Record:
    """Versions of the packages and a description of the machine."""
    found: Record = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    device = jax.devices()[0]
    found["platform"] = platform.platform()
    found["device"] = f"{device.platform}: {device.device_kind}"
    return found


@contextlib.contextmanager
def open_writer(path: str | None) -> Iterator[Writer]:
    """A function that appends records to a file, one JSON object per line.

    Args:
        path: The file; None drops the records.

    Yields:
        The function. Each record is flushed, so that an interrupted run keeps what it had.
    """
    if path is None:
        yield lambda record: None
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            yield lambda record: print(to_json(record), file=file, flush=True)


def read_records(path: Path) -> list[Record]:
    """What `open_writer` has written to a file.

    Args:
        path: The file.

    Returns:
        Its records, in their order.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is not JSON.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def to_json(record: Mapping[str, Any]) -> str:
    """One line of JSON; numbers that are not finite, which JSON lacks, become null."""
    return json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fail(message: str) -> int:
    """Prints an error for a person and returns the exit status that goes with it."""
    print(f"error: {message}", file=sys.stderr)
    return 2
