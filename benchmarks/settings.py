"""Settings of a method as written on the command line: ``key=value``."""

import ast
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

Settings = dict[str, Any]
Item = TypeVar("Item")

_WORDS = {"true": True, "false": False, "none": None, "null": None}


class SettingError(ValueError):
    """Something that the user set cannot be: the message says what can."""


def parse_settings(items: Iterable[str]) -> Settings:
    """Parses ``key=value`` items; the last of equal keys counts.

    Args:
        items: For example ``["learning_rate=0.3", "memory_size=None"]``.

    Returns:
        Values as int, float, bool, None or string.

    Raises:
        SettingError: An item without ``=`` or without a key.
    """
    return {key: parse_value(text) for key, text in map(_split, items)}


def parse_grid(items: Iterable[str]) -> Iterator[Settings]:
    """All combinations of ``key=value,value,...`` items, the last key varying fastest."""
    axes = {key: [*map(parse_value, texts.split(","))] for key, texts in map(_split, items)}
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def parse_value(text: str) -> Any:
    """An int, float, bool or None if ``text`` reads as one, else the string itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, int | float) else text


def parse_variant(text: str) -> tuple[str, Settings]:
    """Splits ``method:key=value:key=value`` into the method and its settings."""
    name, *items = text.split(":")
    return name, parse_settings(items)


def choose_problems(names: str | None, table: Mapping[str, Item]) -> list[Item]:
    """The problems of a list with commas; all of them without a list.

    Args:
        names: For example ``"beale,wood"``, or None.
        table: The problems by name.

    Returns:
        The problems.

    Raises:
        SettingError: The table has no such name.
    """
    chosen = list(table) if names is None else names.split(",")
    unknown = [name for name in chosen if name not in table]
    if unknown:
        raise SettingError(
            f"There is no problem {', '.join(unknown)}; there are: {', '.join(table)}."
        )
    return [table[name] for name in chosen]


def check_keys(settings: Mapping[str, Any], valid: Iterable[str], method: str) -> None:
    """Raises if a setting is not one of the valid ones.

    Args:
        settings: The settings.
        valid: Names that the method has.
        method: Name of the method, for the message.

    Raises:
        SettingError: Names the unknown ones and lists the valid ones.
    """
    valid = sorted(valid)
    unknown = sorted(set(settings) - set(valid))
    if unknown:
        raise SettingError(
            f"{method} has no setting {', '.join(unknown)}. It has: {', '.join(valid)}."
        )


def _split(item: str) -> tuple[str, str]:
    key, separator, text = item.partition("=")
    if not separator or not key.strip() or not text.strip():
        raise SettingError(f"Settings are written key=value, got {item!r}.")
    return key.strip(), text.strip()
