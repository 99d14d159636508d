"""Shared fixtures: eight virtual devices, and double precision where an oracle needs it."""

import os
from collections.abc import Iterator
from importlib.metadata import version

# Fixed when JAX starts, for all tests: the number of devices; and how much the backend optimizes,
# as tests compile much and compute little.
_FLAGS = {"--xla_force_host_platform_device_count": "8", "--xla_backend_optimization_level": "0"}
# The older emitters compile in half of the time. XLA ends the process if it does not know a flag;
# this one it forgot between jaxlib 0.10 and 0.12.
if tuple(map(int, version("jaxlib").split(".")[:2])) <= (0, 10):
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
_given = os.environ.get("XLA_FLAGS", "")
_missing = [f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_missing]).strip()
# Virtual devices that wait for each other hold a thread each, of which there is one per core.
for _name in ("PJRT_NPROC", "NPROC"):
    os.environ.setdefault(_name, "16")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps tests that share what they compiled in one process, with ``--dist loadgroup``.

    Those of a file do; in the protocol, which is one file for all methods, those of a method.
    """
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        method = next((params[key] for key in ("reference", "entry", "name") if key in params), "")
        group = f"{item.path.name}:{getattr(method, 'name', method)}"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Drops the compiled programs of a file after its tests.

    Each of them holds memory maps, of which a process has a limited number (65530 on Linux); a
    process that ran thousands of tests was aborted in the compiler.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """Turns on 64-bit types for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
