"""Comparisons of whole pytrees and counts in jaxprs, shared by the tests of the methods."""

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


def count_primitives(jaxpr, names):
    """How often primitives are in a jaxpr, with all that is inside of others."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name in names
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda node: hasattr(node, "jaxpr")
        ):
            found += count_primitives(inner.jaxpr, names) if hasattr(inner, "jaxpr") else 0
    return found
