"""Every Python block of the README runs, in order, and prints what the README says it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")


def python_blocks():
    """Each Python block with the text block after it, if that is the next one."""
    blocks = BLOCK.findall(README)
    following = [*blocks[1:], ("", "")]
    return [
        (code, text if kind == "text" else None)
        for (language, code), (kind, text) in zip(blocks, following, strict=True)
        if language == "python"
    ]


def test_python_blocks_run_and_print_what_they_say():
    namespace = {}  # shared by the blocks, as in a session
    for number, (code, expected) in enumerate(python_blocks()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"<block {number} of README.md>", "exec"), namespace)
        if expected is not None:
            assert printed.getvalue() == expected
        if number == 0:
            assert float(namespace["value"]) < 1.5, "the training step does not train"


def test_the_training_step_stands_before_everything_else():
    assert README.index("```python") < README.index("make demo") < README.index("\n## ")


@pytest.mark.parametrize("target", sorted(set(LINK.findall(README))))
def test_links_lead_to_files(target):
    assert (ROOT / target).exists()
