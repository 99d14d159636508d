"""The split of the damping between the factors."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondorder.factors import split_damping

positive = st.floats(1e-6, 1e6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    damping=positive,
    rule=st.sampled_from(["sqrtT", "plain", "trace"]),
    positions=st.integers(1, 10_000),
    a=st.one_of(positive, st.just(0.0)),
    g=st.one_of(positive, st.just(0.0)),
)
def test_the_product_is_the_damping(damping, rule, positions, a, g):
    lam_a, lam_g = split_damping(
        damping, rule, positions=positions, input_mean_eigenvalue=a, output_mean_eigenvalue=g
    )
    np.testing.assert_allclose(lam_a * lam_g, damping, rtol=1e-5)


def test_square_root_of_the_positions_is_the_default():
    np.testing.assert_allclose(split_damping(0.04, positions=9), (0.6, 0.2 / 3), rtol=1e-6)
    np.testing.assert_allclose(split_damping(0.04), (0.2, 0.2), rtol=1e-6)


def test_plain_ignores_positions():
    np.testing.assert_allclose(split_damping(0.04, "plain", positions=9), (0.2, 0.2), rtol=1e-6)


def test_trace_damps_both_factors_alike_relative_to_their_size():
    lam_a, lam_g = split_damping(
        0.04, "trace", input_mean_eigenvalue=8.0, output_mean_eigenvalue=0.5
    )
    np.testing.assert_allclose(lam_a / 8.0, lam_g / 0.5, rtol=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("side", ["input", "output"])
def test_trace_without_meaning_is_plain(bad, side):
    a, g = (bad, 2.0) if side == "input" else (2.0, bad)
    split = split_damping(0.04, "trace", input_mean_eigenvalue=a, output_mean_eigenvalue=g)
    np.testing.assert_allclose(split, (0.2, 0.2), rtol=1e-6)


def test_dtype_of_the_damping_is_kept(x64):
    for rule in ("sqrtT", "plain"):
        split = split_damping(jnp.float32(0.1), rule, positions=4)
        assert [v.dtype for v in split] == [jnp.float32] * 2


def test_errors():
    with pytest.raises(ValueError, match="sqrtT"):
        split_damping(0.1, "root")
    with pytest.raises(ValueError, match="output_mean_eigenvalue"):
        split_damping(0.1, "trace", input_mean_eigenvalue=1.0)
