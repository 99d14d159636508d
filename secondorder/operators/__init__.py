"""Curvature as linear operators that are known by their products, at a point.

* `linear_operator`: the operator; sums, damping, masks, dense and lineax forms.
* `pieces`: operators of an objective as a whole, or of `Microbatches`.
* `gauss_newton`: the generalized Gauss-Newton matrix, and its values on a few vectors.
* `hessian`: the Hessian of any objective.
* `output_factor`: square roots of the Hessian of the loss, case by case.
* `fisher`: sampled and empirical Fisher matrices; estimates of diagonals.
* `positive_curvature`: the positive-curvature Hessian of a chain of dense layers.
* `expectation`: the same, with products of expectations for expectations of products.
* `block_diagonal`: block-diagonal parts of any model, linearized once per block, and
  the values of the whole between blocks.
* `factored`: the Gauss-Newton matrix of a model of linear layers by its factors; any blocks.
* `dual`: exact solves with these factors, in the space of the outputs.
* `engine`: which of the last three needs the least work.
"""

from secondorder.operators.block_diagonal import (
    block_gauss_newton,
    block_gauss_newton_forms,
    block_hessian,
)
from secondorder.operators.dual import dual_gram, dual_solve
from secondorder.operators.engine import (
    ENGINES,
    Engine,
    EngineChoice,
    EngineCosts,
    choose_engine,
)
from secondorder.operators.expectation import (
    LayerCurvature,
    Moment,
    expected_curvature,
    expected_operator,
    layer_leaves,
    solve_expected,
)
from secondorder.operators.factored import (
    Columns,
    GaussNewtonFactors,
    factor_gauss_newton,
    why_not_factored,
)
from secondorder.operators.fisher import (
    empirical_fisher,
    empirical_fisher_diagonal,
    fisher,
    gauss_newton_diagonal,
    sample_row,
)
from secondorder.operators.gauss_newton import (
    Linearization,
    gauss_newton,
    gauss_newton_forms,
    linearize_model,
    output_hessian,
)
from secondorder.operators.hessian import HessianMode, hessian, hessian_on_stacks
from secondorder.operators.linear_operator import LinearOperator, vectors_like
from secondorder.operators.output_factor import apply_factor, output_factor
from secondorder.operators.pieces import mean_over_pieces, over_pieces
from secondorder.operators.positive_curvature import (
    block_positive_curvature,
    positive_curvature,
    positive_curvature_objective,
)

__all__ = [
    "ENGINES",
    "Columns",
    "Engine",
    "EngineChoice",
    "EngineCosts",
    "GaussNewtonFactors",
    "HessianMode",
    "LayerCurvature",
    "LinearOperator",
    "Linearization",
    "Moment",
    "apply_factor",
    "block_gauss_newton",
    "block_gauss_newton_forms",
    "block_hessian",
    "block_positive_curvature",
    "choose_engine",
    "dual_gram",
    "dual_solve",
    "empirical_fisher",
    "empirical_fisher_diagonal",
    "expected_curvature",
    "expected_operator",
    "factor_gauss_newton",
    "fisher",
    "gauss_newton",
    "gauss_newton_diagonal",
    "gauss_newton_forms",
    "hessian",
    "hessian_on_stacks",
    "layer_leaves",
    "linearize_model",
    "mean_over_pieces",
    "output_factor",
    "output_hessian",
    "over_pieces",
    "positive_curvature",
    "positive_curvature_objective",
    "sample_row",
    "solve_expected",
    "vectors_like",
    "why_not_factored",
]
