"""The optimizers, one file per method."""

from secondorder.methods.block_hessian_free import (
    BlockHessianFreeMetrics,
    BlockHessianFreeState,
    block_hessian_free,
)
from secondorder.methods.gauss_newton import GaussNewtonState, gauss_newton
from secondorder.methods.hessian_free import (
    HessianFreeState,
    hessian_free,
    stochastic_hessian_free,
)
from secondorder.methods.hessian_free_model import HessianFreeMetrics
from secondorder.methods.kbfgs import ScaleByKBFGSState, kbfgs, scale_by_kbfgs
from secondorder.methods.kbfgs_update import KBFGSMetrics
from secondorder.methods.kfac import KFACMetrics, ScaleByKFACState, scale_by_kfac
from secondorder.methods.kfac_optimizer import kfac
from secondorder.methods.krylov_descent import (
    KrylovDescentMetrics,
    KrylovDescentState,
    krylov_subspace_descent,
)
from secondorder.methods.levenberg_marquardt import (
    LevenbergMarquardtMetrics,
    LevenbergMarquardtState,
    levenberg_marquardt,
)
from secondorder.methods.low_rank_saddle_free_newton import (
    LowRankSaddleFreeNewtonMetrics,
    ScaleByLowRankSaddleFreeNewtonState,
    low_rank_saddle_free_newton,
    scale_by_low_rank_saddle_free_newton,
)
from secondorder.methods.lsr1 import lsr1
from secondorder.methods.lsr1_direction import ScaleByLSR1Metrics, ScaleByLSR1State, scale_by_lsr1
from secondorder.methods.lsr1_state import LSR1Metrics, LSR1State
from secondorder.methods.newton_cg import NewtonCGMetrics, NewtonCGState, newton_cg
from secondorder.methods.positive_curvature import (
    PositiveCurvatureMetrics,
    ScaleByPositiveCurvatureState,
    positive_curvature_hessian,
    scale_by_positive_curvature,
)
from secondorder.methods.quadratic_model import scale_by_quadratic_model
from secondorder.methods.quadratic_model_state import (
    QuadraticModelMetrics,
    ScaleByQuadraticModelState,
)
from secondorder.methods.saddle_free_newton import (
    SaddleFreeNewtonMetrics,
    SaddleFreeNewtonState,
    saddle_free_newton,
)
from secondorder.methods.shampoo import (
    ScaleByShampooState,
    ShampooMetrics,
    scale_by_shampoo,
    shampoo,
)
from secondorder.methods.soap import ScaleBySOAPState, SOAPMetrics, scale_by_soap, soap

__all__ = [
    "BlockHessianFreeMetrics",
    "BlockHessianFreeState",
    "GaussNewtonState",
    "HessianFreeMetrics",
    "HessianFreeState",
    "KBFGSMetrics",
    "KFACMetrics",
    "KrylovDescentMetrics",
    "KrylovDescentState",
    "LSR1Metrics",
    "LSR1State",
    "LevenbergMarquardtMetrics",
    "LevenbergMarquardtState",
    "LowRankSaddleFreeNewtonMetrics",
    "NewtonCGMetrics",
    "NewtonCGState",
    "PositiveCurvatureMetrics",
    "QuadraticModelMetrics",
    "SOAPMetrics",
    "SaddleFreeNewtonMetrics",
    "SaddleFreeNewtonState",
    "ScaleByKBFGSState",
    "ScaleByKFACState",
    "ScaleByLSR1Metrics",
    "ScaleByLSR1State",
    "ScaleByLowRankSaddleFreeNewtonState",
    "ScaleByPositiveCurvatureState",
    "ScaleByQuadraticModelState",
    "ScaleBySOAPState",
    "ScaleByShampooState",
    "ShampooMetrics",
    "block_hessian_free",
    "gauss_newton",
    "hessian_free",
    "kbfgs",
    "kfac",
    "krylov_subspace_descent",
    "levenberg_marquardt",
    "low_rank_saddle_free_newton",
    "lsr1",
    "newton_cg",
    "positive_curvature_hessian",
    "saddle_free_newton",
    "scale_by_kbfgs",
    "scale_by_kfac",
    "scale_by_low_rank_saddle_free_newton",
    "scale_by_lsr1",
    "scale_by_positive_curvature",
    "scale_by_quadratic_model",
    "scale_by_shampoo",
    "scale_by_soap",
    "shampoo",
    "soap",
    "stochastic_hessian_free",
]
