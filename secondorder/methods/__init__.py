"""The optimizers, one file per method."""

from secondorder.methods.kbfgs import ScaleByKBFGSState, kbfgs, scale_by_kbfgs
from secondorder.methods.kbfgs_update import KBFGSMetrics
from secondorder.methods.lsr1 import LSR1Metrics, LSR1State, lsr1

__all__ = [
    "KBFGSMetrics",
    "LSR1Metrics",
    "LSR1State",
    "ScaleByKBFGSState",
    "kbfgs",
    "lsr1",
    "scale_by_kbfgs",
]
