"""Hook of mkdocs: files from outside of `docs/`, links, formulas and the summaries of the index."""

import re
from pathlib import Path
from typing import Any

import griffe
from docstrings import ReadDocstrings
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from reading import DOCS, ROOT, links_of, render_formulas, repository_path, site_links, site_path

# Markdown files of the repository that are pages of the site too.
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/RESULTS.md",
    "examples/README.md",
)
_ENTRY = re.compile(r"^\* \[`[\w.]+`\]\[(?P<name>secondorder\.[\w.]+)\]$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages above, and whatever file of the repository a page links to."""
    pages = [f"{DOCS}/{page.src_uri}" for page in files.documentation_pages()]
    paths = dict.fromkeys(PAGES)
    for page in [*pages, *PAGES]:
        for link in links_of((ROOT / page).read_text(encoding="utf-8")):
            path = repository_path(page, link)
            if (ROOT / path).is_file() and not path.startswith(f"{DOCS}/"):
                paths[path] = None
    for path in paths:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Turns links between files of the repository to links between pages; adds summaries."""
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    text = site_links(source, markdown)
    return _ENTRY.sub(_with_summary, text) if "reference/" in site_path(source) else text


def _with_summary(match: re.Match[str]) -> str:
    """An entry of the reference's index with the first line of its docstring."""
    docstring = _package()[match["name"].removeprefix("secondorder.")].docstring
    return f"{match[0]}: {docstring.value.splitlines()[0]}"


_EXTENSIONS = griffe.load_extensions(ReadDocstrings)
_loaded: list[Any] = []


def _package() -> Any:
    if not _loaded:
        _loaded.append(griffe.load("secondorder", search_paths=[ROOT], extensions=_EXTENSIONS))
    return _loaded[0]


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Draws the formulas, those of docstrings too."""
    try:
        return render_formulas(html)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error
