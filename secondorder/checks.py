"""Checks of hyperparameters that factories make before anything is traced.

Numbers that may be traced, as `optax.inject_hyperparams` does, are not compared in Python.
"""

from collections.abc import Sequence
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a hyperparameter is a plain Python number that can be judged now.

    Args:
      value: The hyperparameter.

    Returns:
      False for arrays, tracers, booleans and schedules.

    Example:
      >>> is_number(0.3), is_number(True)
      (True, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is known to be zero, so that what it weighs can be left out.

    Args:
      value: The hyperparameter.

    Returns:
      False for arrays and tracers, which are not compared.

    Example:
      >>> is_zero(0.0), is_zero(0.1)
      (True, False)
    """
    return is_number(value) and bool(value == 0)


def check_range(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
) -> None:
    """Raises unless a plain number is at least ``low`` (above it if open) and below ``high``.

    Args:
      name: Name of the hyperparameter.
      value: Its value; anything but a plain number passes.
      low: Lower bound, or None.
      high: Upper bound, excluded, or None.
      open_low: Whether the lower bound is excluded too.

    Raises:
      ValueError: If the number is out of range.

    Example:
      >>> check_range("momentum", 1.5, low=0, high=1)
      Traceback (most recent call last):
      ValueError: `momentum` must be in [0, 1), got 1.5.
    """
    if not is_number(value):
        return
    above = low is None or (value > low if open_low else value >= low)
    if above and (high is None or value < high):
        return
    left = "(-inf" if low is None else f"{'(' if open_low else '['}{low:g}"
    right = "inf)" if high is None else f"{high:g})"
    raise ValueError(f"`{name}` must be in {left}, {right}, got {value}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless a hyperparameter is one of some names.

    Args:
      name: Name of the hyperparameter.
      value: Its value.
      choices: The names.

    Raises:
      ValueError: If it is none of them.

    Example:
      >>> check_choice("mode", "c", ("a", "b"))
      Traceback (most recent call last):
      ValueError: `mode` must be one of 'a', 'b', got 'c'.
    """
    if value not in choices:
        names = ", ".join(map(repr, choices))
        raise ValueError(f"`{name}` must be one of {names}, got {value!r}.")


def check_static_count(name: str, value: Any) -> None:
    """Raises unless a structural hyperparameter is a Python integer of at least one.

    Args:
      name: Name of the hyperparameter.
      value: Its value.

    Raises:
      ValueError: If it is traced, not an integer, or less than one.

    Example:
      >>> check_static_count("update_every", 0)
      Traceback (most recent call last):
      ValueError: `update_every` must be a Python integer of at least 1, got 0.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return
    hint = "" if is_number(value) else "; with optax.inject_hyperparams name it in static_args"
    raise ValueError(f"`{name}` must be a Python integer of at least 1, got {value}{hint}.")


def check_flag(name: str, value: Any) -> None:
    """Raises unless a structural hyperparameter is a Python bool.

    Args:
      name: Name of the hyperparameter.
      value: Its value.

    Raises:
      ValueError: If it is anything else, such as a traced array.

    Example:
      >>> check_flag("full_batch", 1)
      Traceback (most recent call last):
      ValueError: `full_batch` must be True or False, got 1.
    """
    if not isinstance(value, bool):
        hint = "" if is_number(value) else "; with optax.inject_hyperparams name it in static_args"
        raise ValueError(f"`{name}` must be True or False, got {value}{hint}.")
