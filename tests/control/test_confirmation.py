"""The share of a step that the next batch confirms, against what it estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.control import confirm, confirmed_length, init_confirmation

DECAY = 0.9


def test_the_share_is_that_of_the_true_slope(x64):
    """On a quadratic: the gradient behind the step, less what the step changed, is the true one."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5))
    matrix, true, noise = root @ root.T, rng.normal(size=5), rng.normal(size=5)
    noisy = true + noise
    step = -np.linalg.solve(matrix + np.eye(5), noisy)
    known = init_confirmation(jnp.float64)._replace(
        slope=jnp.asarray(step @ noisy), curvature=jnp.asarray(step @ matrix @ step)
    )
    found = confirm(known, jnp.asarray(step @ (true + matrix @ step)))
    share = (step @ true) / (step @ noisy)
    np.testing.assert_allclose(found.share, DECAY + (1 - DECAY) * share, rtol=1e-12)
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


@pytest.mark.parametrize(
    ("share", "multiple", "wanted"), [(1.2, 1, 1), (0.6, 1, 0.6), (0.6, 1.5, 0.9), (-1, 1, 0.1)]
)
def test_lengths(share, multiple, wanted):
    np.testing.assert_allclose(confirmed_length(jnp.float32(share), multiple), wanted, rtol=1e-6)


def test_dtypes_stay():
    known = init_confirmation(jnp.float32)
    found = jax.eval_shape(confirm, known, jnp.float32(1))
    assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(lambda a: a.dtype, known)
