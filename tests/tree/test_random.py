"""Random numbers by hashing: their moments, and that nothing about them repeats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.tree.random import draw, random_bits
from secondorder.tree.vectors import random_vector

SHAPE = (64, 1024)
DISTRIBUTIONS = ("normal", "uniform", "rademacher")
# Mean, variance and fourth moment.
MOMENTS = {"normal": (0, 1, 3), "uniform": (0, 1 / 3, 1 / 5), "rademacher": (0, 1, 1)}


def key(seed=0):
    return jax.random.key(seed)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_moments_within_five_standard_errors(distribution, seed):
    drawn = np.asarray(draw(distribution, key(seed), SHAPE, jnp.float32), np.float64)
    for power, expected in zip((1, 2, 4), MOMENTS[distribution], strict=True):
        powers = drawn.ravel() ** power
        error = max(powers.std(), 1e-12) / len(powers) ** 0.5
        assert abs(powers.mean() - expected) < 5 * error + 1e-6


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_rows_columns_streams_and_keys_are_uncorrelated(distribution):
    arrays = [
        draw(distribution, key(seed), SHAPE, jnp.float32, stream)
        for seed in (0, 1, 2)
        for stream in (0, 1)
    ]
    rows = np.concatenate([np.asarray(array) for array in arrays])
    correlations = np.corrcoef(rows)
    np.fill_diagonal(correlations, 0)
    # Of 70,000 correlations of samples of 1024 the largest is about 4.6 / sqrt(1024).
    assert np.abs(correlations).max() < 6 / 1024**0.5
    columns = np.corrcoef(np.concatenate([np.asarray(array).T for array in arrays[:1]]))
    np.fill_diagonal(columns, 0)
    assert np.abs(columns).max() < 7 / 64**0.5


def test_bits_are_uniform_and_each_is_fair():
    bits = np.asarray(random_bits(key(), (2**16,)))
    counts = np.bincount(bits >> 24, minlength=256)
    chi_square = ((counts - 256) ** 2 / 256).sum()
    assert 140 < chi_square < 380  # 255 degrees of freedom, within 5.5 standard deviations
    for bit in range(32):
        share = (bits >> bit & 1).mean()
        assert abs(share - 0.5) < 5 * 0.5 / 2**8
    assert len(np.unique(bits)) > 2**16 - 10  # half a collision is expected


def test_uniform_numbers_stay_inside():
    drawn = draw("uniform", key(), (2**18,), jnp.float32)
    assert -1 < float(drawn.min()) < -0.9999
    assert 0.9999 < float(drawn.max()) < 1
    assert bool(jnp.all(jnp.isfinite(draw("normal", key(), (2**18,), jnp.float32))))


def test_same_key_same_numbers_and_leaves_differ():
    tree = {"a": jnp.zeros((8, 8)), "b": jnp.zeros((8, 8)), "c": jnp.zeros(())}
    one, other = (
        random_vector("normal", key(), tree),
        jax.jit(lambda k: random_vector("normal", k, tree))(key()),
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), one, other)
    assert not np.allclose(one["a"], one["b"])
    assert one["c"].shape == ()


def test_it_compiles_to_few_operations():
    """What `jax.random` makes of one shape alone."""
    lowered = jax.jit(lambda k: draw("normal", k, (8,), jnp.float32)).lower(key())
    assert "while" not in lowered.compile().as_text()


def test_unknown_distribution():
    with pytest.raises(ValueError, match="distribution"):
        draw("cauchy", key(), (2,), jnp.float32)
