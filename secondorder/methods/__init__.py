"""The optimizers, one file per method."""

from secondorder.methods.kbfgs import (
    KBFGSMetrics,
    ScaleByKBFGSState,
    kbfgs,
    scale_by_kbfgs,
)

__all__ = ["KBFGSMetrics", "ScaleByKBFGSState", "kbfgs", "scale_by_kbfgs"]
