"""Comparisons of whole pytrees, shared by the tests of the methods."""

import jax
import numpy as np


def identical(one, other):
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def all_zero(tree):
    return all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))


def all_finite(tree):
    """Of any dtype, half precision too, for which NumPy has no such test."""
    return all(np.isfinite(np.asarray(leaf, float)).all() for leaf in jax.tree.leaves(tree))
