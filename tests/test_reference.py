"""The reference has every public name once; the hooks read what docstrings are written in."""

import inspect
import sys
from collections import Counter

import pytest

import secondorder as so
import secondorder.flax
import secondorder.operators
from tests.pages import DOCUMENTED, ROOT, SITE, docs_pages, read

sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import reading

INDEX = "docs/reference/index.md"


def own(module, names):
    """The functions and classes among the names, as the reference calls them."""
    return [
        f"{module.__name__}.{name}"
        for name in names
        if inspect.isroutine(getattr(module, name)) or inspect.isclass(getattr(module, name))
    ]


def defined_in(module):
    """The public names of a module that it does not import."""
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
    ]


PUBLIC = sorted(
    [f"secondorder.{name}" for name in so.__all__ if name != "__version__"]
    + own(so.operators, so.operators.__all__)
    + own(so.flax, defined_in(so.flax))
)


def test_every_public_name_is_documented_once():
    found = Counter(name for page in docs_pages() for name in DOCUMENTED.findall(read(page)))
    assert found == Counter(PUBLIC)


def test_the_index_has_every_public_name():
    listed = [line.rsplit("][")[-1][:-1] for line in read(INDEX).splitlines() if line[:1] == "*"]
    assert Counter(listed) == Counter(PUBLIC)


def test_every_page_is_in_the_navigation():
    pages = [f"docs/{page}" for _, pages in sections() for page in pages]
    assert set(docs_pages()) <= set(pages)
    assert len(pages) == len(set(pages))


def sections():
    return [item for section in SITE["nav"] for item in section.items()]


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        (r"With :math:`a_1`, ``b``.", "With $a_1$, ``b``."),
        (".. math:: x\n    = 1\n\nwhere", "$$ x = 1 $$\n\nwhere"),
        ("so\n\n.. math::\n  x\n  = 1\n\nwhere", "so\n\n$$ x = 1 $$\n\nwhere"),
        ("  .. math:: x\n\n  y", "  $$ x $$\n\n  y"),
        ("They are::\n\n    so.lsr1()", "They are:\n\n    so.lsr1()"),
        ("Example:\n  >>> 1\n  1", "Examples:\n  >>> 1\n  1"),
        ("See `lsr1` and `other`.", "See [`lsr1`][secondorder.lsr1] and `other`."),
        (
            "===  ====\na    b c\n===  ====\n`x`  1\n===  ====",
            "| a | b c |\n|---|---|\n| `x` | 1 |",
        ),
    ],
)
def test_docstrings_become_markdown(docstring, markdown):
    assert reading.docstring_to_markdown(docstring, {"lsr1"}) == markdown


def test_no_role_or_directive_is_left():
    for path in sorted((ROOT / "secondorder").rglob("*.py")):
        text = reading.docstring_to_markdown(inspect.cleandoc(path.read_text(encoding="utf-8")))
        assert ":math:" not in text, path
        assert ".. math::" not in text, path


def test_links_between_files_become_links_between_pages():
    def moved(page, link):
        return reading.site_links(page, f"[a]({link})")

    assert moved("docs/sharding.md", "../benchmarks/RESULTS.md") == "[a](benchmarks/RESULTS.md)"
    assert moved("CONTRIBUTING.md", "docs/architecture.md#x") == "[a](architecture.md#x)"
    assert moved("docs/methods/lsr1.md", "kbfgs.md") == "[a](kbfgs.md)"
    assert moved("docs/index.md", "https://docs.jax.dev") == "[a](https://docs.jax.dev)"
