"""Kronecker factors: the small dense curvature of one layer side, and its inverse.

Every function is for one factor and is pure; a method maps them over a stack of equal shapes with
`jax.vmap`. Nothing branches on values: a rejected or non-finite update leaves the factor exactly as
it was.

* `pairs`: damping, acceptance and scaling of curvature pairs ``(s, y)``.
* `bfgs`: the inverse as a dense matrix.
* `lbfgs`: the inverse as its last ``p`` pairs.
* `moments`: second moments of inputs, running averages, damped inverses.
* `damping`: the shares of the two factors of a layer in its damping.
"""

from secondorder.factors.bfgs import hessian_action_pair, inverse_bfgs_update, symmetrize
from secondorder.factors.damping import DampingSplit, split_damping
from secondorder.factors.lbfgs import (
    InverseMemory,
    init_memory,
    inverse_matrix,
    inverse_product,
    push_pair,
)
from secondorder.factors.moments import append_one, damped_inverse, ema, second_moment
from secondorder.factors.pairs import (
    Pair,
    PairDamping,
    accept_pair,
    curvature_ratio_ok,
    damp_pair,
    identity_damping,
    levenberg_marquardt_damping,
    normalize_pair,
    powell_damping,
)

__all__ = [
    "DampingSplit",
    "InverseMemory",
    "Pair",
    "PairDamping",
    "accept_pair",
    "append_one",
    "curvature_ratio_ok",
    "damp_pair",
    "damped_inverse",
    "ema",
    "hessian_action_pair",
    "identity_damping",
    "init_memory",
    "inverse_bfgs_update",
    "inverse_matrix",
    "inverse_product",
    "levenberg_marquardt_damping",
    "normalize_pair",
    "powell_damping",
    "push_pair",
    "second_moment",
    "split_damping",
    "symmetrize",
]
