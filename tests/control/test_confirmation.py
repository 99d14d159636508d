"""The share of a step that the next batch confirms, against what it estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.control import confirm, confirmed_length, init_confirmation

DECAY = 0.8


@pytest.mark.parametrize("length", [1.0, 0.1])
def test_the_share_is_that_of_the_true_slope(x64, length):
    """On a quadratic: the gradient behind a step, less what the step changed, is the true one.

    Whatever its length, and though the step's own batch has another curvature.
    """
    rng = np.random.default_rng(0)
    matrix, own = ((root := rng.normal(size=(5, 5))) @ root.T for _ in range(2))
    true, noise = rng.normal(size=5), rng.normal(size=5)
    noisy = true + noise
    step = -length * np.linalg.solve(own + np.eye(5), noisy)
    known = init_confirmation(jnp.float64)._replace(
        slope=jnp.asarray(step @ noisy), curvature=jnp.asarray(step @ own @ step)
    )
    behind = jnp.asarray(step @ (true + matrix @ step))
    found = confirm(known, behind, jnp.asarray(step @ matrix @ step))
    share = (step @ true) / (step @ noisy)
    np.testing.assert_allclose(found.share, DECAY + (1 - DECAY) * share, rtol=1e-12)
    assert found.slope == 0


def test_the_own_curvature_stands_for_that_of_the_next_batch():
    known = init_confirmation(jnp.float32)._replace(slope=jnp.float32(-4), curvature=jnp.float32(2))
    same = confirm(known, jnp.float32(0), jnp.float32(2))
    assert confirm(known, jnp.float32(0)).share == same.share < 1


def test_a_curvature_that_was_not_computed_changes_nothing_but_ends_the_wait():
    known = init_confirmation(jnp.float32)._replace(slope=jnp.float32(-4))
    found = confirm(known, jnp.float32(0), jnp.float32(jnp.nan))
    assert found.share == 1
    assert found.slope == 0


@pytest.mark.parametrize("slope", [0.0, 1.0, jnp.nan])
def test_without_a_step_nothing_changes(slope):
    known = init_confirmation(jnp.float32)._replace(
        share=jnp.float32(0.4), slope=jnp.float32(slope)
    )
    assert confirm(known, jnp.float32(2)).share == known.share


def test_a_gradient_that_is_not_finite_changes_nothing():
    known = init_confirmation(jnp.float32)._replace(slope=jnp.float32(-1))
    assert confirm(known, jnp.float32(jnp.nan)).share == 1


@pytest.mark.parametrize(("slope", "wanted"), [(1e30, -1.0), (-1e30, 3.0)])
def test_single_shares_are_bounded(slope, wanted):
    known = init_confirmation(jnp.float32)._replace(slope=jnp.float32(-1))
    found = confirm(known, jnp.float32(slope)).share
    np.testing.assert_allclose(found, DECAY + (1 - DECAY) * wanted, rtol=1e-6)


def test_shares_are_weighted_by_what_their_steps_promised(x64):
    """Their average is the multiple of all steps that would have changed the objective most."""
    promises, shares = np.array([2.0, 5.0, 0.01, 3.0]), np.array([0.9, 0.2, -0.9, 0.3])
    weights = (1 - DECAY) * DECAY ** np.arange(4)[::-1] * promises
    known = init_confirmation(jnp.float64)._replace(promise=jnp.asarray(2.0))
    for promise, share in zip(promises, shares, strict=True):
        known = known._replace(slope=jnp.asarray(-promise))
        known = confirm(known, jnp.asarray(-share * promise), jnp.asarray(0.0))
    start = DECAY**4 * 2.0
    np.testing.assert_allclose(known.promise, start + weights.sum(), rtol=1e-12)
    np.testing.assert_allclose(
        known.share, (start + weights @ shares) / (start + weights.sum()), rtol=1e-12
    )


def test_no_step_decides_alone():
    """One that promises a thousand times as much as the others counts as three of them."""
    known = init_confirmation(jnp.float32)._replace(promise=jnp.float32(1), slope=jnp.float32(-1e3))
    found = confirm(known, jnp.float32(0), jnp.float32(0))
    np.testing.assert_allclose(found.share, DECAY / (DECAY + 3 * (1 - DECAY)), rtol=1e-6)


@pytest.mark.parametrize(
    ("share", "multiple", "wanted"), [(1.2, 1, 1), (0.6, 1, 0.6), (0.6, 1.5, 0.9), (-1, 1, 0.1)]
)
def test_lengths(share, multiple, wanted):
    np.testing.assert_allclose(confirmed_length(jnp.float32(share), multiple), wanted, rtol=1e-6)


def test_dtypes_stay():
    known = init_confirmation(jnp.float32)
    found = jax.eval_shape(confirm, known, jnp.float32(1))
    assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(lambda a: a.dtype, known)
