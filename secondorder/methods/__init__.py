"""The optimizers, one file per method."""

from secondorder.methods.kbfgs import ScaleByKBFGSState, kbfgs, scale_by_kbfgs
from secondorder.methods.kbfgs_update import KBFGSMetrics

__all__ = ["KBFGSMetrics", "ScaleByKBFGSState", "kbfgs", "scale_by_kbfgs"]
