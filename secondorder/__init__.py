"""Second-order optimizers for JAX as pure-functional optax transformations."""

from secondorder._version import __version__
from secondorder.layers import Layer, Layers, find_layers
from secondorder.methods import (
    KBFGSMetrics,
    ScaleByKBFGSState,
    kbfgs,
    scale_by_kbfgs,
)
from secondorder.objective import Objective

__all__ = [
    "KBFGSMetrics",
    "Layer",
    "Layers",
    "Objective",
    "ScaleByKBFGSState",
    "__version__",
    "find_layers",
    "kbfgs",
    "scale_by_kbfgs",
]
