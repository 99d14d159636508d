"""Rules that steer a method by what its steps achieve."""

from secondorder.control.confirmation import (
    Confirmation,
    confirm,
    confirmed_length,
    init_confirmation,
)
from secondorder.control.damping import (
    DampingRule,
    NielsenState,
    damping_bound,
    next_damping,
    nielsen_damping,
    raised_damping,
)
from secondorder.control.line_search import (
    SearchResult,
    StoredResult,
    backtrack,
    best_stored,
    optimal_rate,
)
from secondorder.control.plane import minimize_on_plane
from secondorder.control.radius import RadiusRule, follow_slope, next_radius, reduction_ratio
from secondorder.control.rates import part_rates

__all__ = [
    "Confirmation",
    "DampingRule",
    "NielsenState",
    "RadiusRule",
    "SearchResult",
    "StoredResult",
    "backtrack",
    "best_stored",
    "confirm",
    "confirmed_length",
    "damping_bound",
    "follow_slope",
    "init_confirmation",
    "minimize_on_plane",
    "next_damping",
    "next_radius",
    "nielsen_damping",
    "optimal_rate",
    "part_rates",
    "raised_damping",
    "reduction_ratio",
]
