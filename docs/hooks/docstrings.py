"""Extension of griffe: docstrings of this package, which are partly reST, become Markdown."""

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))

from reading import docstring_to_markdown, exports


class ReadDocstrings(griffe.Extension):
    """Rewrites every docstring that is loaded, and finds what the package exports."""

    def __init__(self) -> None:
        super().__init__()
        self.names = frozenset(exports())

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object, if it has one."""
        if obj.docstring:
            linked = self.names - {obj.name}
            obj.docstring.value = docstring_to_markdown(obj.docstring.value, linked)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Lets exported names be what they are, where a module has the same name."""
        rooms = {pkg: exports(), pkg["operators"]: exports("operators")}
        found = [
            (room, name, _definition(pkg, room, name)) for room in rooms for name in rooms[room]
        ]
        for room, name, target in found:
            room.set_member(name, griffe.Alias(name, target, parent=room))


def _definition(package: griffe.Module, module: Any, name: str) -> griffe.Object | griffe.Alias:
    """Follows the imports of a name to where it is defined."""
    if name not in module.imports:
        member: griffe.Object | griffe.Alias = module.members[name]
        return member
    parent, _, leaf = module.imports[name].rpartition(".")
    inner = parent.removeprefix(package.name).removeprefix(".")
    return _definition(package, package[inner], leaf)
