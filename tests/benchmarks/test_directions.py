"""How the parts of a direction are judged, and the command that does it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import secondorder as so
from benchmarks.cli import main
from benchmarks.directions import Model, judge, measure
from benchmarks.problems import PROBLEMS, Batch


def test_two_parts_that_do_the_same():
    """Each alone is right; both together go twice as far as they should."""
    own = Model(np.array([1.0, 1.0]), np.ones((2, 2)))
    other = Model(np.array([0.5, 0.5]), np.ones((2, 2)))
    first, second, both, each = judge(["a", "b"], own, other, np.zeros((2, 2)))
    for row in (first, second):
        assert (row.rate, row.share, row.own, row.others) == (1.0, 0.5, 0.5, 0.125)
    assert (both.rate, both.own) == (0.5, 0.5)
    assert each.rate is None
    np.testing.assert_allclose([each.own, each.others], [0.5, 0.125])


def test_rates_of_their_own_make_up_for_wrong_lengths():
    own = Model(np.array([1.0, 10.0]), np.diag([1.0, 1000.0]))
    *_, one, each = judge(["a", "b"], own, own, np.zeros((2, 2)))
    np.testing.assert_allclose(one.rate, 11 / 1001)
    np.testing.assert_allclose([one.own, each.own], [11**2 / 2002, 1 / 2 + 1 / 20])


def test_the_damping_shortens():
    model = Model(np.ones(1), np.ones((1, 1)))
    first, *_ = judge(["a"], model, model, 3 * np.ones((1, 1)))
    assert first.rate == 0.25


def test_what_leads_up_promises_nothing():
    assert Model(-np.ones(1), np.ones((1, 1))).promise(np.ones(1)) == 0
    assert Model(np.ones(1), np.zeros((1, 1))).promise(np.ones(1)) == 0


def test_the_direction_is_judged_by_its_own_batch():
    """With the dense Gauss-Newton matrix of the batch, from the Jacobian."""
    problem = PROBLEMS["digits-cnn"]
    rng = np.random.default_rng(0)
    images = rng.normal(size=(24, 8, 8, 1)).astype(np.float32)
    data = Batch(jnp.asarray(images), jnp.asarray(rng.integers(0, 10, 24)))
    params, batch = problem.init(jax.random.key(0)), jnp.arange(8)
    rows = measure(problem, params, data, [batch], jnp.arange(8, 24), {"damping": 0.1})

    objective = problem.objective(data.take(batch))
    value, grads = jax.value_and_grad(objective)(params)
    tx = so.scale_by_kfac(so.find_layers(objective, params), damping=0.1)
    direction, _ = tx.update(grads, tx.init(params), params, value=value, value_fn=objective)
    step, gradient = ravel_pytree(direction)[0], ravel_pytree(grads)[0]
    outputs, moved = jax.jvp(objective.model, (params,), (direction,))
    hessian = jax.hessian(objective.loss)(outputs).reshape(outputs.size, -1)
    curvature, slope = moved.ravel() @ hessian @ moved.ravel(), step @ gradient
    np.testing.assert_allclose(rows[-2].own, slope**2 / (2 * curvature), rtol=1e-3)
    np.testing.assert_allclose(rows[-2].rate, slope / (curvature + 0.1 * step @ step), rtol=1e-3)
    assert len({row.name for row in rows[:-2]}) == len(rows) - 2 > 2


def test_the_command(tmp_path, capsys):
    file = tmp_path / "directions.jsonl"
    command = ["directions", "--problem", "digits-cnn", "--train-size", "600", "--batch-size", "50"]
    short = ["--steps", "3", "--batches", "2", "--set", "damping=0.1", "--json", str(file)]
    assert main([*command, *short]) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["name"] for record in records][-2:] == ["all", "a rate each"]
    assert records[0]["settings"] == {"damping": 0.1}
    assert {"rate", "share", "own", "others", "versions"} <= set(records[0])
    assert "a rate each" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--set", "rank=3"]])
def test_mistakes_are_told(wrong, capsys):
    command = ["directions", "--problem", "digits-cnn", "--train-size", "600", "--batch-size", "50"]
    assert main([*command, "--steps", "1", "--batches", "1", *wrong]) == 2
    assert capsys.readouterr().err
