"""Every Python block of README and of the site's pages runs, and links lead somewhere.

Blocks in other languages are not run: ``py`` is code of other libraries, which are not installed.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.pages import LINK, ROOT, docs_pages, python_blocks, read, run_blocks

QUICKSTART = "docs/quickstart.md"
# `tests/test_checkpoints.py` runs these, and compares what they restore.
ELSEWHERE = {"docs/checkpoints.md"}
# These say how a method is called. They are traced, as without `jit` every operation is compiled.
TRACED = {"docs/index.md", "docs/architecture.md", "docs/metrics.md"}
ALONE = {"README.md", "docs/install.md", QUICKSTART}
OTHERS = [page for page in docs_pages() if python_blocks(page) and page not in ALONE | ELSEWHERE]
ALL = ["README.md", "CONTRIBUTING.md", *docs_pages()]


def run_all(page, namespace):
    for _ in run_blocks(page, namespace):
        pass


@functools.cache
def quickstart():
    namespace = {}
    run_all(QUICKSTART, namespace)
    return namespace


def test_readme_runs_and_trains():
    namespace = {}
    for number in run_blocks("README.md", namespace):
        if number == 0:
            assert float(namespace["value"]) < 1.5, "the training step does not train"


def test_install_runs():
    assert list(run_blocks("docs/install.md", {})) == [0]


@pytest.mark.pages
def test_quickstart_runs():
    assert float(quickstart()["value"]) < 1


@pytest.mark.pages
@pytest.mark.parametrize("page", OTHERS)
def test_page_runs_behind_the_quickstart(page):
    """A block that makes another `tx` has one for the quickstart's training step, too."""
    namespace = dict(quickstart())
    namespace["params"] = jax.tree.map(jnp.copy, namespace["params"])  # a page may donate them
    if page in TRACED:
        jax.eval_shape(lambda: run_all(page, namespace))
        return
    tx = namespace["tx"]
    for _ in run_blocks(page, namespace):
        if namespace["tx"] is not tx:
            tx = namespace["tx"]
            batch = namespace["params"], namespace["x"], namespace["y"]
            jax.eval_shape(lambda p, x, y: train(namespace, p, x, y), *batch)


def train(namespace, params, x, y):
    """The quickstart's step with the optimizer of a page, and without its `jit`."""
    tx = namespace["tx"]
    return namespace["make_step"](tx).__wrapped__(params, tx.init(params), x, y)


def test_the_training_step_stands_before_everything_else():
    text = read("README.md")
    assert text.index("```python") < text.index("make demo") < text.index("\n## ")


@pytest.mark.parametrize("page", ALL)
def test_links_lead_to_files(page):
    targets = {(ROOT / page).parent / target for target in LINK.findall(read(page))}
    assert not {target for target in targets if not target.exists()}
