"""The table that `find_layers` prints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secondorder.layers.layer import Layers

_LAYER_HEADER = ("weight", "kind", "in", "out", "bias", "blocks", "positions", "uses")
_REST_HEADER = ("in no layer", "shape", "reason")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Aligns rows of text in columns.

    Args:
      header: The names of the columns.
      rows: One entry per column each.
      right: ``r`` or ``l`` for each column; the columns marked ``r`` align right.

    Returns:
      The table, without trailing spaces.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    aligns = right.ljust(len(header), "l")

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if align == "r" else cell.ljust(width)
            for cell, width, align in zip(cells, widths, aligns, strict=True)
        ).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def format_report(layers: "Layers") -> str:
    """The report on the layers of a model, and on the parameters in none.

    Args:
      layers: What `find_layers` found.

    Returns:
      One table, or two.
    """
    paths = [leaf.path for leaf in layers.leaves]
    rows = [
        (
            paths[layer.weight],
            layer.kind,
            str(layer.weight_view.shape[1]),
            str(layer.outputs),
            "-" if layer.bias is None else paths[layer.bias],
            str(layer.stack),
            f"{usage.positions:g}",
            f"{usage.uses}" + (f" + {usage.tied} tied" if usage.tied else ""),
        )
        for layer, usage in zip(layers.layers, layers.usages, strict=True)
    ]
    tables = [format_table(_LAYER_HEADER, rows, "llrrlrrr")] if rows else ["No linear layers."]
    if layers.unassigned:
        rest = [
            (paths[leaf], str(layers.leaves[leaf].shape), reason)
            for leaf, reason in layers.unassigned
        ]
        tables.append(format_table(_REST_HEADER, rest))
    return "\n\n".join(tables)
