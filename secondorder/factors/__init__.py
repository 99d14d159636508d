"""Kronecker factors: the small dense curvature of one layer side, and its inverse.

Every function is for one factor and is pure; a method maps them over a stack of equal shapes with
`jax.vmap`. Nothing branches on values: a rejected or non-finite update leaves the factor exactly as
it was.

* `pairs`: damping, acceptance and scaling of curvature pairs ``(s, y)``.
* `bfgs`: the inverse as a dense matrix.
* `lbfgs`: the inverse as its last ``p`` pairs.
* `moments`: second moments of inputs, running averages, damped inverses.
* `eigen`: eigenvectors, and inverses in stacks of nearly equal sizes.
* `damping`: the shares of the two factors of a layer in its damping.
"""

from secondorder.factors.bfgs import (
    Change,
    apply_change,
    bfgs_change,
    inverse_bfgs_update,
)
from secondorder.factors.damping import DampingSplit, split_damping
from secondorder.factors.eigen import rotate, stacked_eigenvectors, stacked_inverses
from secondorder.factors.lbfgs import (
    Bookkeeping,
    Forget,
    InverseMemory,
    extend_triangle,
    forget_scores,
    init_memory,
    inverse_matrix,
    inverse_product,
    push_pair,
    write_pair,
)
from secondorder.factors.moments import damped_inverse, damped_inverses, ema
from secondorder.factors.pairs import (
    InnerProduct,
    Pair,
    PairDamping,
    accept_pair,
    damp_pair,
    gram_product,
    identity_damping,
    levenberg_marquardt_damping,
    normalize_pair,
    powell_damping,
)

__all__ = [
    "Bookkeeping",
    "Change",
    "DampingSplit",
    "Forget",
    "InnerProduct",
    "InverseMemory",
    "Pair",
    "PairDamping",
    "accept_pair",
    "apply_change",
    "bfgs_change",
    "damp_pair",
    "damped_inverse",
    "damped_inverses",
    "ema",
    "extend_triangle",
    "forget_scores",
    "gram_product",
    "identity_damping",
    "init_memory",
    "inverse_bfgs_update",
    "inverse_matrix",
    "inverse_product",
    "levenberg_marquardt_damping",
    "normalize_pair",
    "powell_damping",
    "push_pair",
    "rotate",
    "split_damping",
    "stacked_eigenvectors",
    "stacked_inverses",
    "write_pair",
]
