"""Counts in compiled programs, and the command that tabulates them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from benchmarks.cli import main
from benchmarks.programs import Work, batched_sizes, read_work
from tests.meshes import make_mesh, place

P = PartitionSpec
pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="fewer than eight host devices")


def program(function, *arrays):
    return jax.jit(function).lower(*arrays).compile().as_text()


def test_products_on_each_device():
    """``(16, 8) @ (8, 4)`` on eight devices; then in a loop that runs five times."""
    mesh = make_mesh(8, names=("data",), kind=AxisType.Auto)
    x, w = place(mesh, np.ones((16, 8), np.float32), "data"), np.ones((8, 4), np.float32)
    assert read_work(program(lambda x, w: x @ w, x, w)).products == 2 * 2 * 8 * 4
    square = np.ones((8, 8), np.float32)
    loop = program(lambda x, w: jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x), x, square)
    assert read_work(loop).products == 5 * 2 * 2 * 8 * 8


def test_factorizations():
    text = program(jnp.linalg.cholesky, np.eye(4, dtype=np.float32)[None].repeat(3, 0))
    assert read_work(text).factorizations == pytest.approx(3 * 4**3 / 3)
    assert batched_sizes(text, "potrf") == [(3, 4, 4)]


def test_factorizations_in_a_loop():
    matrices = np.eye(4, dtype=np.float32)[None].repeat(3, 0)
    text = program(lambda m: jax.lax.map(jnp.linalg.cholesky, m), matrices)
    assert read_work(text).factorizations == pytest.approx(3 * 4**3 / 3)
    assert batched_sizes(text, "potrf") == [(3, 4, 4)]


def test_collectives_in_a_branch_of_a_loop():
    mesh = make_mesh(8, names=("data",), kind=AxisType.Auto)
    x = place(mesh, np.ones((16, 4), np.float32), "data")

    def loop(x):
        def body(carry, _):
            total = jax.lax.cond(carry[0] > 0, lambda: jnp.sum(x * carry, axis=0), lambda: carry)
            return total, None

        return jax.lax.scan(body, jnp.ones(4), None, length=3)[0]

    work = read_work(program(loop, x))
    assert work.collectives == {"all-reduce": 3}
    assert work.exchanged == {"all-reduce": 3 * 4 * 4}
    assert work.bytes == 48


def test_work_adds_up():
    one = Work(1.0, 2.0, {"all-reduce": 1}, {"all-reduce": 8})
    other = Work(collectives={"all-gather": 2}, exchanged={"all-gather": 4})
    total = (one + other).times(2)
    assert total.flops == 6
    assert total.collectives == {"all-gather": 4, "all-reduce": 2}
    assert total.bytes == 24


def test_scaling(tmp_path):
    file = tmp_path / "scaling.jsonl"
    command = ["scaling", "--models", "scanned-mlp", "--methods", "adam,pch", "--devices", "1,8"]
    assert main([*command, "--json", str(file)]) == 0
    one, eight = (json.loads(line) for line in file.read_text().splitlines())
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert eight["work_ratio"] == pytest.approx(1, abs=0.02)
    assert eight["state_bytes"] == pytest.approx(one["state_bytes"] / 8, rel=0.01)
    assert eight["collectives"] > 0
    assert one["collectives"] == 0


def test_mistakes(capsys):
    assert main(["scaling", "--methods", "sgd"]) == 2
    assert "There is no 'sgd'; there are: adam, kbfgs" in capsys.readouterr().err
    assert main(["scaling", "--devices", "2,4"]) == 2
    assert "begins with 1" in capsys.readouterr().err
