"""The package uses only public names of JAX, and exports what it documents."""

import ast
import pathlib

import pytest

import secondorder as so

PACKAGE = pathlib.Path(so.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def dotted_names(tree: ast.AST) -> set[str]:
    """Every name that is imported, and every chain of attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def is_private(name: str) -> bool:
    """Whether a name is one of JAX that its API does not promise."""
    parts = name.split(".")
    if parts[0] not in {"jax", "jaxlib", "optax", "chex"}:
        return False
    hidden = any(part.startswith("_") for part in parts[1:])
    internal = parts[1:2] in (["core"], ["interpreters"], ["lib"]) or parts[0] == "jaxlib"
    return hidden or internal


def test_has_sources():
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_public_names(path):
    source = path.read_text()
    assert "jax._src" not in source
    assert not {name for name in dotted_names(ast.parse(source)) if is_private(name)}


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("import jax.core", True),
        ("from jax._src import core", True),
        ("from jax import core", True),
        ("import jax\njax.core.eval_jaxpr", True),
        ("from jax.interpreters import ad", True),
        ("from jax.extend import core as jex_core\njex_core.Jaxpr", False),
        ("import jax\njax.lax.dot_general", False),
        ("self._layers", False),
    ],
)
def test_recognizes_private_names(source, private):
    assert any(map(is_private, dotted_names(ast.parse(source)))) == private


def test_exports():
    assert list(so.__all__) == sorted(so.__all__)
    assert all(hasattr(so, name) for name in so.__all__)
