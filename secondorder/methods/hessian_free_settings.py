"""The hyperparameters of Hessian-free optimization, and their check."""

from typing import NamedTuple, get_args

import chex
import optax

from secondorder.checks import (
    check_choice,
    check_flag,
    check_range,
    check_static_count,
    is_number,
    is_zero,
)
from secondorder.control import DampingRule
from secondorder.methods.hessian_free_model import CurvatureKind, Distance, PreconditionerKind


class Settings(NamedTuple):
    """The hyperparameters, but for the first damping; see `hessian_free`."""

    learning_rate: optax.ScalarOrSchedule
    curvature: CurvatureKind
    damping_rule: DampingRule | None
    max_iterations: int
    progress: chex.Numeric
    warm_start: optax.ScalarOrSchedule
    backtracking: bool
    preconditioner: PreconditionerKind | None
    preconditioner_power: chex.Numeric
    preconditioner_probes: int
    preconditioner_decay: chex.Numeric
    structural_damping: chex.Numeric
    distance: Distance | None
    sufficient: chex.Numeric
    shrink: chex.Numeric
    max_trials: int
    weight_decay: chex.Numeric
    seed: int


def check_settings(settings: Settings) -> None:
    """Raises where a hyperparameter is out of range.

    Args:
      settings: All of them.

    Raises:
      ValueError: If one is.
    """
    check_choice("curvature", settings.curvature, get_args(CurvatureKind))
    check_static_count("max_iterations", settings.max_iterations)
    check_static_count("max_trials", settings.max_trials)
    check_static_count("preconditioner_probes", settings.preconditioner_probes)
    check_flag("backtracking", settings.backtracking)
    if settings.preconditioner is not None:
        check_choice("preconditioner", settings.preconditioner, get_args(PreconditionerKind))
    for name in ("learning_rate", "warm_start"):
        if not callable(getattr(settings, name)):
            check_range(name, getattr(settings, name), low=0)
    for name in ("progress", "preconditioner_power", "structural_damping", "weight_decay"):
        check_range(name, getattr(settings, name), low=0)
    for name in ("preconditioner_decay", "sufficient", "shrink"):
        check_range(name, getattr(settings, name), low=0, high=1)
    mu = settings.structural_damping
    if settings.distance is None and is_number(mu) and not is_zero(mu):
        raise ValueError(
            "`structural_damping` needs `distance`, a function of two outputs of the model, such "
            "as lambda z, reference: jnp.mean((z['hidden'] - reference['hidden']) ** 2)."
        )
