"""What the hooks read and rewrite: docstrings in reST, links to files, LaTeX. No mkdocs in here."""

import ast
import html
import posixpath
import re
from collections.abc import Collection, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs"

_MATH_ROLE = re.compile(r":math:`([^`]+)`")
_DIRECTIVE = re.compile(r"^([ ]*)\.\. math::[ ]*(.*)\n((?:\n*\1[ ]+\S.*\n?)*)", re.MULTILINE)
_LITERAL = re.compile(r"::[ ]*$", re.MULTILINE)
_REFERENCE = re.compile(r"(?<![`\w])`([A-Za-z_]\w*)`(?![`\w])")
_TABLE = re.compile(r"^([ ]*)=+(?:[ ]+=+)+\n(.*)\n\1=+(?:[ ]+=+)+\n((?:.*\n)*?)\1=+[ =]+$", re.M)
_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
# Names that LaTeX has and the converter has not.
_OPERATORS = re.compile(r"\\(arg)(?![A-Za-z])")


def exports(room: str = "") -> list[str]:
    """What the package, or a room of it, exports, without importing it."""
    face = ast.parse((ROOT / "secondorder" / room / "__init__.py").read_text(encoding="utf-8"))
    values = [
        node.value
        for node in face.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    names: list[str] = ast.literal_eval(values[0])
    return [name for name in names if not name.startswith("_")]


def docstring_to_markdown(text: str, linked: Collection[str] = ()) -> str:
    """A docstring of this package, whose mathematics and tables are reST, as Markdown.

    Args:
      text: The docstring, without common indentation.
      linked: Names in single backticks that become links to their documentation.

    Returns:
      The text, in which formulas stand between dollars and doctests in a section of their own.
    """
    text = _DIRECTIVE.sub(_display, text + "\n")
    text = _MATH_ROLE.sub(lambda match: f"${_one_line(match[1])}$", text)
    text = _TABLE.sub(_pipes, text)
    text = _LITERAL.sub(":", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = _REFERENCE.sub(
        lambda match: f"[`{match[1]}`][secondorder.{match[1]}]" if match[1] in linked else match[0],
        text,
    )
    return text.rstrip("\n")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _display(match: re.Match[str]) -> str:
    """A ``.. math::`` block as a formula of its own."""
    indent, first, rest = match.groups()
    return f"{indent}$$ {_one_line(f'{first} {rest}')} $$\n"


def _pipes(match: re.Match[str]) -> str:
    """A simple table of reST as one of Markdown."""
    indent, head, body = match.groups()
    rows = [head, *body.splitlines()]
    cells = [re.split(r"[ ]{2,}", row.strip()) for row in rows]
    lines = [f"{indent}| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], indent + "|---" * len(cells[0]) + "|", *lines[1:]])


def links_of(text: str) -> Iterator[str]:
    """The relative links of a Markdown text, without their anchors."""
    return (match[1] for match in _LINK.finditer(text))


def repository_path(page: str, target: str) -> str:
    """The path in the repository to which a link in a file of it leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def site_path(path: str) -> str:
    """Where a file of the repository is on the site: `docs/` is its root."""
    return path.removeprefix(f"{DOCS}/")


def site_links(page: str, text: str) -> str:
    """A Markdown file of the repository with the links that hold on the site.

    Args:
      page: Its path in the repository.
      text: Its text.

    Returns:
      The text. Links to what is not in the repository are left alone.
    """
    here = posixpath.dirname(site_path(page)) or "."

    def relative(match: re.Match[str]) -> str:
        path = repository_path(page, match[1])
        if not (ROOT / path).is_file():
            return match[1]
        return posixpath.relpath(site_path(path), here)

    return _LINK.sub(relative, text)


def render_formulas(page: str) -> str:
    """A page in HTML with its formulas as MathML, which browsers draw without a script.

    Args:
      page: The HTML, with formulas as `pymdownx.arithmatex` marks them.

    Returns:
      The HTML.

    Raises:
      ValueError: If a formula has a command that the converter does not know.
    """
    from latex2mathml.converter import convert

    def render(match: re.Match[str]) -> str:
        latex = _OPERATORS.sub(r"\\operatorname{\1}", html.unescape(match[3]).strip())
        mathml: str = convert(latex, display="inline" if match[2] == "(" else "block")
        if "\\" in mathml:
            raise ValueError(f"The formula {latex} has an unknown command: {mathml}")
        return mathml

    return _FORMULA.sub(render, page)
