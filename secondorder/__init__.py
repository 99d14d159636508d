"""Second-order optimizers for JAX as pure-functional optax transformations."""

from secondorder._version import __version__
from secondorder.control import RadiusRule
from secondorder.layers import Layer, Layers, find_layers
from secondorder.methods import (
    KBFGSMetrics,
    LSR1Metrics,
    LSR1State,
    ScaleByKBFGSState,
    ScaleByLSR1Metrics,
    ScaleByLSR1State,
    kbfgs,
    lsr1,
    scale_by_kbfgs,
    scale_by_lsr1,
)
from secondorder.objective import Objective

__all__ = [
    "KBFGSMetrics",
    "LSR1Metrics",
    "LSR1State",
    "Layer",
    "Layers",
    "Objective",
    "RadiusRule",
    "ScaleByKBFGSState",
    "ScaleByLSR1Metrics",
    "ScaleByLSR1State",
    "__version__",
    "find_layers",
    "kbfgs",
    "lsr1",
    "scale_by_kbfgs",
    "scale_by_lsr1",
]
