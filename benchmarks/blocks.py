"""Blocks of parameters by name, for methods whose curvature is block diagonal."""

from collections.abc import Callable
from typing import Any

from benchmarks.settings import SettingError

Labels = Any
# Flax Linen puts all parameters below this name.
_LINEN = "params/"


def block_labels(name: str | None, params: Any) -> Labels:
    """The labels that a name stands for.

    Args:
        name: ``layers``: parameters side by side, such as a kernel and its bias, are a block.
            ``modules``: so is each entry of the model, such as a block of a transformer or a
            residual block. ``halves``: the first and the second half of the entries, such as
            encoder and decoder. ``leaves``: each array. None: what the method takes by itself.
        params: The parameters.

    Returns:
        A function of the path of a leaf, a pytree of labels, or None.

    Raises:
        SettingError: There is no such name, or the model has no order in which to halve it.
    """
    if name is None:
        return None
    if name not in _LABELS:
        raise SettingError(f"blocks must be one of: {', '.join(_LABELS)}; got {name!r}.")
    return _LABELS[name](params)


def _module(path: str) -> str:
    return path.removeprefix(_LINEN).split("/")[0]


def _halves(params: Any) -> Labels:
    if not isinstance(params, list):
        raise SettingError("blocks=halves needs a model that is a list of layers.")
    return [f"half {2 * number // len(params)}" for number in range(len(params))]


_LABELS: dict[str, Callable[[Any], Labels]] = {
    "layers": lambda params: lambda path: path.rpartition("/")[0],
    "modules": lambda params: _module,
    "halves": _halves,
    "leaves": lambda params: lambda path: path,
}
