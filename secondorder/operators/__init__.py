"""Curvature as linear operators that are known by their products, at a point.

* `linear_operator`: the operator; sums, damping, masks, dense and lineax forms.
* `gauss_newton`: the generalized Gauss-Newton matrix.
"""

from secondorder.operators.gauss_newton import (
    Linearization,
    gauss_newton,
    linearize_model,
    output_hessian,
    vectors_like,
)
from secondorder.operators.linear_operator import LinearOperator

__all__ = [
    "LinearOperator",
    "Linearization",
    "gauss_newton",
    "linearize_model",
    "output_hessian",
    "vectors_like",
]
