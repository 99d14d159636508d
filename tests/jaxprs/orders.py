"""The orders of axes of the convolutions in a jaxpr."""

import jax

CANONICAL = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def orders(jaxpr):
    """The dimension numbers of all convolutions in a jaxpr, those inside equations included."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            found.add(tuple(equation.params["dimension_numbers"]))
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            found |= orders(inner) if hasattr(inner, "eqns") else set()
    return found
