"""The Markdown pages of the repository, and the Python blocks in them."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:\s]+)[)#]")
DOCUMENTED = re.compile(r"^::: (secondorder[\w.]*)$", re.MULTILINE)


def read(page: str) -> str:
    """The text of a page, by its path in the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def docs_pages() -> list[str]:
    """The pages in docs/ that are on the site."""
    left_out = tuple(f"docs/{line}" for line in SITE["exclude_docs"].split())
    found = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return [page for page in found if not page.startswith(left_out)]


def python_blocks(page: str) -> list[tuple[str, str | None]]:
    """Each Python block of a page with the text block after it, if that is the next one."""
    blocks = BLOCK.findall(read(page))
    following = [*blocks, ("", "")][1:]
    return [
        (code, text if kind == "text" else None)
        for (language, code), (kind, text) in zip(blocks, following, strict=True)
        if language == "python"
    ]


def run_blocks(page: str, namespace: dict[str, Any]) -> Iterator[int]:
    """Runs the Python blocks of a page one by one, in one namespace, as in a session.

    Raises `AssertionError` where a block does not print what the text block after it says.
    """
    for number, (code, expected) in enumerate(python_blocks(page)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"<block {number} of {page}>", "exec"), namespace)
        if expected is not None:
            assert printed.getvalue() == expected
        yield number
