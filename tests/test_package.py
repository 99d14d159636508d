"""The package as a whole: its face, its packaging, and the order of its rooms."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import secondorder as so

PACKAGE = Path(so.__file__).parent
ROOT = Path(__file__).parents[1]
FILES = sorted(PACKAGE.rglob("*.py"))
PUBLIC = sorted(set(so.__all__) - {"__version__"})

# The rooms, lowest first. A room may import itself and the floors below it, not its neighbors.
# `docs/architecture.md` says what each is for; a new room gets its place here.
FLOORS = (
    ("_version", "checks", "jaxprs", "products", "sharding"),
    ("objective", "spread", "tree"),
    ("layers", "factors", "solvers", "control"),
    ("operators",),
    ("accumulate", "line_search", "methods", "metrics", "partition", "spectra"),
    ("flax",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def path_id(path):
    return path.relative_to(ROOT).as_posix()


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    """The rooms that a file imports from, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("secondorder.")}


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", so.__version__)
    assert so.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {so.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_runtime_requirements():
    requirements = importlib.metadata.requires("secondorder")
    names = {re.match(r"[\w-]+", line)[0] for line in requirements if "extra ==" not in line}
    assert names == {"jax", "optax", "chex"}


def test_all_is_what_the_face_imports():
    """Everything that `__init__` imports is public; rooms are not, but reachable."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = [
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert so.__all__ == sorted(imported)
    assert all(isinstance(node, ast.ImportFrom | ast.Assign | ast.Expr) for node in tree.body)


def documented_parameters(doc):
    """The names under Args, with those of the function that `**` arguments are passed on to."""
    names = set(re.findall(r"^  \*{0,2}(\w+):", doc, re.MULTILINE))
    for name in re.findall(r"^  \*\*\w+: Hyperparameters of `(\w+)`", doc, re.MULTILINE):
        names |= documented_parameters(inspect.getdoc(getattr(so, name)))
    return names


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    """Functions have arguments, result and example; classes have what they are made of."""
    thing = getattr(so, name)
    doc = inspect.getdoc(thing)
    assert doc, name
    assert doc.splitlines()[0].endswith(".")
    sections = set(re.findall(r"^(\w+):$", doc, re.MULTILINE))
    if inspect.isclass(thing):
        assert sections & {"Attributes", "Args"}
        return
    assert {"Args", "Returns", "Example"} <= sections
    assert set(inspect.signature(thing).parameters) <= documented_parameters(doc)


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_modules_have_docstrings(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.name != "__init__.py" or path.parent != PACKAGE],
    ids=path_id,
)
def test_rooms_import_only_lower_rooms(path):
    room = room_of(path)
    assert room in FLOOR, f"give `{room}` a place in FLOORS"
    for imported in imported_rooms(path) - {room}:
        assert FLOOR[imported] < FLOOR[room], f"{room} imports {imported}"


@pytest.mark.parametrize("folder", ["secondorder", "benchmarks"])
def test_files_are_short(folder):
    lengths = {
        path_id(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_import_needs_no_extra():
    """In a fresh interpreter, where nothing else has imported the extras."""
    code = "import secondorder, sys; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert {"secondorder", "jax", "optax"} <= loaded
    assert not loaded & {
        "benchmarks",
        "equinox",
        "flax",
        "haiku",
        "hypothesis",
        "matplotlib",
        "orbax",
        "pooch",
        "pytest",
        "rich",
        "sklearn",
    }


def test_import_starts_no_backend():
    """Importing computes nothing, so that a program can still configure JAX."""
    code = (
        "import secondorder, jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "print(len(jax.devices('cpu')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "3"
