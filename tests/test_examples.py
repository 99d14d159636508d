"""The examples run as they are, in one process and in two."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = "examples/train_sharded.py"
SMALL = ("--data", "synthetic", "--batch-size", "64", "--width", "16", "--depth", "8")
pytest.importorskip("orbax.checkpoint")


def start(*arguments, devices):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return subprocess.Popen(
        [sys.executable, SCRIPT, *SMALL, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(process):
    """The losses by step, as printed."""
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    found = re.findall(r"step (\d+) loss ([\d.]+)", output)
    return {int(step): float(loss) for step, loss in found}


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_processes_do_what_one_does(tmp_path):
    """And one goes on from what two have written."""
    checkpoint = str(tmp_path / "checkpoint")
    alone = start("--steps", "4", devices=8)
    coordinator = f"localhost:{free_port()}"
    pair = [
        start(
            *("--steps", "3", "--save", checkpoint, "--coordinator", coordinator),
            *("--processes", "2", "--process-id", str(number)),
            devices=4,
        )
        for number in range(2)
    ]
    together, silent = (losses(process) for process in pair)
    expected = losses(alone)
    assert silent == {}
    assert list(together) == [0, 1, 2]
    assert together == pytest.approx({step: expected[step] for step in range(3)}, rel=1e-5)
    restored = losses(start("--steps", "4", "--restore", checkpoint, devices=8))
    assert restored == pytest.approx({3: expected[3]}, rel=1e-5)
