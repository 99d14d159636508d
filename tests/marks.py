"""Marks of parameters of tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def with_slow(values: Iterable[Any], *slow: Any) -> list[Any]:
    """The values, of which some are run by the slow tests only.

    What they check of a part of the package, the others check too; they take long to compile.
    """
    values = list(values)
    assert set(slow) <= set(values), set(slow) - set(values)
    return [
        pytest.param(value, marks=pytest.mark.slow) if value in slow else value for value in values
    ]
