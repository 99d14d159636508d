"""The optimizers, one file per method."""

from secondorder.methods.kbfgs import ScaleByKBFGSState, kbfgs, scale_by_kbfgs
from secondorder.methods.kbfgs_update import KBFGSMetrics
from secondorder.methods.lsr1 import LSR1Metrics, LSR1State, lsr1
from secondorder.methods.lsr1_direction import ScaleByLSR1Metrics, ScaleByLSR1State, scale_by_lsr1

__all__ = [
    "KBFGSMetrics",
    "LSR1Metrics",
    "LSR1State",
    "ScaleByKBFGSState",
    "ScaleByLSR1Metrics",
    "ScaleByLSR1State",
    "kbfgs",
    "lsr1",
    "scale_by_kbfgs",
    "scale_by_lsr1",
]
