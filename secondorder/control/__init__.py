"""Rules that steer a method by what its steps achieve."""

from secondorder.control.radius import RadiusRule, next_radius, reduction_ratio

__all__ = ["RadiusRule", "next_radius", "reduction_ratio"]
