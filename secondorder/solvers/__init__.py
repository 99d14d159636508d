"""Minimizers of quadratic models.

One kind knows the matrix of the model by its products only:

* `conjugate_gradient`: on vectors that are pytrees, for all blocks of the matrix in lockstep.
* `progress`: when that has stalled, and which of its iterates to keep.
* `krylov_basis`: an orthonormal basis of what they would search, and the matrix restricted to it.
* `lanczos`: the same in three terms, as a tridiagonal matrix; its eigenpairs.
* `orthonormal`: orthonormal bases of the span of several vectors.
* `eigenpairs`: eigenpairs of largest magnitude, from random or kept subspaces.
* `growing_basis`: the same from bases that grow block by block.

For the other the matrix is an identity plus a term of low rank. In the eigenbasis of that term a
step is ``k + 1`` numbers. Solvers see these and nothing else: no vectors of parameters, no
objective.

* `compact_sr1`: limited-memory SR1, its eigenbasis, and the pairs that are safe to use.
* `initial_scale`: the multiple of the identity that SR1 starts from.
* `quadratic`: the model, steps, norms, the decrease that a step promises.
* `secular`: the scalar equation behind a bound or a penalty on the Euclidean norm.
* `trust_region`: a bound on the Euclidean norm.
* `shape_changing`: bounds that follow the eigenbasis.
* `cubic`: cubic penalties.
* `regularized`: a shift of the spectrum.
* `curvilinear`: descent and negative curvature on one curve.
"""

from secondorder.solvers.compact_sr1 import (
    CompactSR1,
    PairGram,
    SR1Eigenbasis,
    compact_sr1,
    middle_matrix,
    orthonormal_combinations,
    pair_gram,
    sr1_eigenbasis,
)
from secondorder.solvers.conjugate_gradient import (
    CGResult,
    conjugate_gradient,
    predicted_decrease,
)
from secondorder.solvers.cubic import (
    cubic_decrease,
    cubic_step,
    separable_cubic_decrease,
    separable_cubic_step,
)
from secondorder.solvers.curvilinear import (
    CurvilinearResult,
    curvilinear_decrease,
    curvilinear_search,
    curvilinear_steps,
)
from secondorder.solvers.eigenpairs import (
    BlockProduct,
    Eigenpairs,
    Images,
    Solution,
    signal_to_noise,
    single_pass,
    subspace_iteration,
    without_samples,
)
from secondorder.solvers.growing_basis import adaptive_rank, block_krylov
from secondorder.solvers.initial_scale import (
    ScaleRule,
    barzilai_borwein,
    curvature_range,
    initial_scale,
    least_rayleigh,
)
from secondorder.solvers.krylov_basis import KrylovBasis, krylov_basis, whitening
from secondorder.solvers.lanczos import LanczosResult, RitzPairs, lanczos, ritz_pairs
from secondorder.solvers.orthonormal import complete_basis, orthonormalize, project_out
from secondorder.solvers.progress import stored_iterations
from secondorder.solvers.quadratic import (
    ModelStep,
    QuadraticModel,
    clip_step,
    model_decrease,
    step_norm,
)
from secondorder.solvers.regularized import raised_shift, regularized_step
from secondorder.solvers.shape_changing import ShapeNorm, shape_changing_step, shape_norm
from secondorder.solvers.trust_region import trust_region_step

__all__ = [
    "BlockProduct",
    "CGResult",
    "CompactSR1",
    "CurvilinearResult",
    "Eigenpairs",
    "Images",
    "KrylovBasis",
    "LanczosResult",
    "ModelStep",
    "PairGram",
    "QuadraticModel",
    "RitzPairs",
    "SR1Eigenbasis",
    "ScaleRule",
    "ShapeNorm",
    "Solution",
    "adaptive_rank",
    "barzilai_borwein",
    "block_krylov",
    "clip_step",
    "compact_sr1",
    "complete_basis",
    "conjugate_gradient",
    "cubic_decrease",
    "cubic_step",
    "curvature_range",
    "curvilinear_decrease",
    "curvilinear_search",
    "curvilinear_steps",
    "initial_scale",
    "krylov_basis",
    "lanczos",
    "least_rayleigh",
    "middle_matrix",
    "model_decrease",
    "orthonormal_combinations",
    "orthonormalize",
    "pair_gram",
    "predicted_decrease",
    "project_out",
    "raised_shift",
    "regularized_step",
    "ritz_pairs",
    "separable_cubic_decrease",
    "separable_cubic_step",
    "shape_changing_step",
    "shape_norm",
    "signal_to_noise",
    "single_pass",
    "sr1_eigenbasis",
    "step_norm",
    "stored_iterations",
    "subspace_iteration",
    "trust_region_step",
    "whitening",
    "without_samples",
]
