"""Least-squares problems and the command ``regression``."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from benchmarks.cli import main
from benchmarks.least_squares import REGRESSIONS
from benchmarks.precision import double_precision


def newton(full_batch=True, weight_decay=0.0):
    """Undamped Gauss-Newton that keeps value and gradient, in place of Levenberg-Marquardt."""

    def update(grads, state, params, *, value_fn, **extra):
        jacobian = jax.jacobian(value_fn.model)(params)
        step = -jnp.linalg.lstsq(jacobian, value_fn.model(params))[0]
        value, grad = jax.value_and_grad(value_fn)(params + step)
        return step, {"value": value, "grad": grad}

    return optax.GradientTransformationExtraArgs(
        lambda params: {"value": jnp.array(jnp.inf), "grad": jnp.zeros_like(params)}, update
    )


@pytest.mark.parametrize("name", REGRESSIONS)
def test_residuals_and_starts(name):
    with double_precision():
        residuals, start = REGRESSIONS[name].load()
        values = residuals(start)
        assert values.dtype == jnp.float64
        assert values.ndim == 1
        assert len(values) >= sum(leaf.size for leaf in jax.tree.leaves(start))
        assert 0 < float(jnp.sum(values**2)) < 1e4


def test_known_minimum():
    """Osborne's first function, with the minimum of Moré, Garbow and Hillstrom."""
    with double_precision():
        residuals, _ = REGRESSIONS["osborne-1"].load()
        best = jnp.array([0.37541005, 1.93584691, -1.46468714, 0.01286753, 0.02212270])
        assert float(jnp.sum(residuals(best) ** 2)) == pytest.approx(5.46489e-5, rel=1e-4)


def test_command_with_a_method_of_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(so, "levenberg_marquardt", newton, raising=False)
    file = tmp_path / "r.jsonl"
    command = ["regression", "--problems", "rosenbrock", "--methods", "lm", "--json", str(file)]
    assert main(command) == 0
    (record,) = map(json.loads, file.read_text().splitlines())
    assert record["converged"] is True
    assert record["sum_of_squares"] < 1e-20
    # The start, and twice in each step; steps: two to the minimum, one that is small.
    assert record["residuals"] == 1 + 2 * record["steps"]
    assert record["steps"] <= 4
    assert "Rosenbrock" in capsys.readouterr().out


def test_same_minimum_as_optimistix(tmp_path):
    pytest.importorskip("optimistix")
    if not hasattr(so, "levenberg_marquardt"):
        pytest.skip("the package has no levenberg_marquardt")
    file = tmp_path / "r.jsonl"
    assert main(["regression", "--problems", "rosenbrock,gauss-peaks", "--json", str(file)]) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for ours, peer in (records[:2], records[2:]):
        assert ours["converged"]
        assert peer["converged"]
        np.testing.assert_allclose(ours["sum_of_squares"], peer["sum_of_squares"], atol=1e-10)


def test_without_optimistix(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optimistix", None)
    assert main(["regression", "--methods", "optimistix"]) == 2
    assert "pip install optimistix" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "newton"], "no method 'newton'"),
        (["--problems", "x"], "no problem x"),
        (["--max-steps", "0"], "must be positive"),
    ],
)
def test_mistakes(options, message, capsys):
    assert main(["regression", *options]) == 2
    assert message in capsys.readouterr().err
