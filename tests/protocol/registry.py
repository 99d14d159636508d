"""Every optimizer of the package, one line each; the protocol suite runs over all of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax

import secondorder as so

LAYERS = "layers"  # a factory that takes `layers=so.find_layers(objective, params)`


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimizer.

    Attributes:
      name: Shown in test names.
      factory: Called with keywords only.
      settings: Its hyperparameters.
      needs: What else the factory is given: any of `LAYERS`.
      static: Structural hyperparameters, which `optax.inject_hyperparams` must not trace.
      learning_rate: Whether the factory takes one; otherwise it only gives a direction.
    """

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    needs: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    learning_rate: bool = True


KBFGS_STATIC = ("update_every", "memory_size")

REGISTRY = [
    Entry("kbfgs", so.kbfgs, {}, (LAYERS,), KBFGS_STATIC),
    Entry("kbfgs-l", so.kbfgs, {"memory_size": 2}, (LAYERS,), KBFGS_STATIC),
    Entry("kbfgs-average", so.kbfgs, {"input_factor": "moving_average"}, (LAYERS,), KBFGS_STATIC),
    Entry("scale_by_kbfgs", so.scale_by_kbfgs, {"update_every": 2}, (LAYERS,), KBFGS_STATIC, False),
]
