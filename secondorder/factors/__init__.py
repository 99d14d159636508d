"""Kronecker factors: the small dense curvature of one layer side, and its inverse.

Every function is for one factor and is pure; a method maps them over a stack of equal shapes with
`jax.vmap`. Nothing branches on values: a rejected or non-finite update leaves the factor exactly as
it was.

* `pairs`: damping, acceptance and scaling of curvature pairs ``(s, y)``.
* `bfgs`: the inverse as a dense matrix.
* `lbfgs`: the inverse as its last ``p`` pairs.
* `moments`: second moments of inputs, running averages, damped inverses.
* `eigen`: eigenvectors, and inverses in stacks of nearly equal sizes.
* `modes`: second moments of tensors along one axis, and products along it.
* `roots`: inverse roots.
* `bases`: bases of eigenvectors that follow their matrices.
* `damping`: the shares of the two factors of a layer in its damping.
"""

from secondorder.factors.bases import eigenbases, follow_bases
from secondorder.factors.bfgs import (
    Change,
    apply_change,
    bfgs_change,
    inverse_bfgs_update,
)
from secondorder.factors.damping import DampingSplit, split_damping
from secondorder.factors.eigen import (
    map_by_size,
    rotate,
    stacked_eigenvectors,
    stacked_inverses,
)
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
from secondorder.factors.modes import mode_moment, mode_product
from secondorder.factors.moments import damped_inverse, damped_inverses, ema, warm_decay
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
from secondorder.factors.roots import (
    RootSolver,
    eigh_roots,
    finite_matrices,
    inverse_roots,
    newton_roots,
)
from secondorder.factors.shrinkage import effective_samples, shrink_to_mean

__all__ = [
    "Bookkeeping",
    "Change",
    "DampingSplit",
    "Forget",
    "InnerProduct",
    "InverseMemory",
    "Pair",
    "PairDamping",
    "RootSolver",
    "accept_pair",
    "apply_change",
    "bfgs_change",
    "damp_pair",
    "damped_inverse",
    "damped_inverses",
    "effective_samples",
    "eigenbases",
    "eigh_roots",
    "ema",
    "extend_triangle",
    "finite_matrices",
    "follow_bases",
    "forget_scores",
    "gram_product",
    "identity_damping",
    "init_memory",
    "inverse_bfgs_update",
    "inverse_matrix",
    "inverse_product",
    "inverse_roots",
    "levenberg_marquardt_damping",
    "map_by_size",
    "mode_moment",
    "mode_product",
    "newton_roots",
    "normalize_pair",
    "powell_damping",
    "push_pair",
    "rotate",
    "shrink_to_mean",
    "split_damping",
    "stacked_eigenvectors",
    "stacked_inverses",
    "warm_decay",
    "write_pair",
]
