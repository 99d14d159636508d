"""What the terminal methods share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder.control import SearchResult
from secondorder.methods import terminal

SPLIT = so.Objective(lambda p: p, jnp.sum)


class Report(NamedTuple):
    ratio: jax.Array
    steps: jax.Array


def test_zero_metrics_have_the_dtypes_of_their_kind():
    metrics = terminal.zero_metrics(Report, jnp.float32, ("ratio",))
    assert (metrics.ratio.dtype, metrics.steps.dtype) == (jnp.float32, jnp.int32)
    assert (float(metrics.ratio), int(metrics.steps)) == (0.0, 0)
    assert metrics.ratio.unsafe_buffer_pointer() != metrics.steps.unsafe_buffer_pointer()


@pytest.mark.parametrize(("accepted", "expected"), [(True, 0.5), (False, -np.inf)])
def test_a_rejected_search_has_the_worst_ratio(accepted, expected):
    search = SearchResult(jnp.float32(1), jnp.float32(2), jnp.int32(1), jnp.array(accepted))
    point = terminal.look("m", jnp.sum, jnp.float32(3), jnp.float32(3), jnp.float32(1), 0.0)
    ratio = terminal.judge(point, search, jnp.float32(-2))
    np.testing.assert_allclose(ratio, expected, rtol=1e-5)  # up to the noise of the values


def test_decay_is_added_to_value_and_gradient():
    params = {"a": jnp.asarray([1.0, 2.0], jnp.bfloat16), "b": jnp.float32(3)}
    value, gradient = terminal.add_decay(jnp.bfloat16(1), params, params, 0.5)
    assert (float(value), value.dtype) == (1 + 0.25 * 14, jnp.float32)
    np.testing.assert_allclose(gradient["a"], [1.5, 3.0])
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_the_curvature_has_an_objective_of_its_own_or_shares_one():
    assert terminal.curvature_objective("m", SPLIT, None) is SPLIT
    assert terminal.curvature_objective("m", jnp.sum, SPLIT) is SPLIT
    assert terminal.curvature_objective("m", jnp.sum, None, splits=False) is jnp.sum


@pytest.mark.parametrize(
    ("value_fn", "curvature_fn", "name"),
    [(None, SPLIT, "value_fn"), (jnp.sum, None, "value_fn"), (SPLIT, jnp.sum, "curvature_fn")],
)
def test_an_objective_that_does_not_fit_is_named(value_fn, curvature_fn, name):
    with pytest.raises((TypeError, ValueError), match=name):
        terminal.curvature_objective("m", value_fn, curvature_fn)


def test_schedules_and_numbers():
    assert terminal.at(0.5, jnp.int32(3)) == 0.5
    assert terminal.at(lambda count: 2 * count, jnp.int32(3)) == 6
