"""The methods that minimize without batches, for the commands ``deterministic`` and ``saddles``.

A solver is one entry of `SOLVERS`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import secondorder as so
from benchmarks.baselines import optax_lbfgs
from benchmarks.evaluations import HESSIAN_PRODUCT, linesearch_gradients, reported_count
from benchmarks.methods import lsr1
from benchmarks.settings import SettingError, Settings, check_keys, parse_variant

Factory = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Solver:
    """An optimizer of a deterministic function.

    Attributes:
        name: What the command line calls it.
        description: One line.
        factory: Returns the function that makes the transform. It is called only when the
            solver is used, so that entries may precede the methods that they name.
        defaults: Settings over the factory's own defaults.
        candidates: Settings that are all tried where the best is to be reported.
        extra_gradients: Gradients that an update evaluates itself, from the state that it returns.
    """

    name: str
    description: str
    factory: Callable[[], Factory]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    candidates: tuple[Mapping[str, Any], ...] = ({},)
    extra_gradients: Callable[[optax.OptState], jax.Array | int] = lambda state: 0

    def is_available(self) -> bool:
        """Whether this version of the package has the method."""
        try:
            self.factory()
        except SettingError:
            return False
        return True

    def trials(self, overrides: Mapping[str, Any]) -> list[Settings]:
        """All settings to try; a setting that the user gives is not varied."""
        trials: list[Settings] = []
        for candidate in self.candidates:
            settings = {**candidate, **overrides}
            if settings not in trials:
                trials.append(settings)
        return trials

    def build(self, settings: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        """Makes the transform.

        Args:
            settings: Settings over ``defaults``.

        Returns:
            The transform, in the one interface of this package and of optax.

        Raises:
            SettingError: The package lacks the method, or the method such a setting or value.
        """
        factory = self.factory()
        parameters = inspect.signature(factory).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            check_keys(settings, parameters, self.name)
        try:
            return optax.with_extra_args_support(factory(**{**self.defaults, **settings}))
        except (TypeError, ValueError) as error:
            raise SettingError(f"{self.name}: {error}") from error


def sgd(learning_rate: float, momentum: float = 0.0) -> optax.GradientTransformation:
    """Gradient descent with heavy-ball momentum."""
    return optax.sgd(learning_rate, momentum=momentum)


def low_rank(
    learning_rate: float, rank: int = 8, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """`secondorder.low_rank_saddle_free_newton`, at full rank where there are few parameters."""

    def of_size(params: Any) -> optax.GradientTransformationExtraArgs:
        most = sum(leaf.size for leaf in jax.tree.leaves(params))
        make = so.low_rank_saddle_free_newton
        return make(learning_rate, min(rank, most), **settings)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return of_size(params).update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(
        lambda params: of_size(params).init(params), update
    )


def product_gradients(state: optax.OptState) -> jax.Array:
    """What products with the Hessian and trial values cost, in gradients, rounded up."""
    products = reported_count(state, "products")
    work = HESSIAN_PRODUCT * products + reported_count(state, "evaluations") / 3
    return jnp.ceil(work).astype(jnp.int32)


_RATES = tuple({"learning_rate": rate} for rate in (1e-3, 1e-2, 1e-1, 1.0))

_ALL = (
    Solver(
        name="lsr1",
        description="trust-region L-SR1",
        factory=lambda: lsr1,
        defaults={"full_batch": True},
        # At the trial point.
        extra_gradients=lambda state: 1,
    ),
    Solver(
        name="lrsfn",
        description="low-rank saddle-free Newton, products counted as gradients",
        factory=lambda: low_rank,
        defaults={
            "learning_rate": 1.0,
            "damping": 1e-3,
            "escape_length": 1.0,
            "max_norm": 2.0,
        },
        candidates=tuple(
            {"rank": rank, "refresh_every": period, "damping_share": share}
            for rank, period, share in ((2, 1, 0.0), (2, 4, 0.0), (2, 4, 1.0), (2, 8, 1.0))
        ),
        extra_gradients=product_gradients,
    ),
    Solver(
        name="sfn",
        description="saddle-free Newton in a Krylov space, products counted as gradients",
        factory=lambda: so.saddle_free_newton,
        candidates=tuple({"subspace_size": size} for size in (1, 2, 4, 8)),
        extra_gradients=product_gradients,
    ),
    Solver(
        name="lbfgs",
        description="optax.lbfgs with its zoom line search",
        factory=lambda: optax_lbfgs,
        extra_gradients=linesearch_gradients,
    ),
    Solver(
        name="adam",
        description="optax.adam",
        factory=lambda: optax.adam,
        candidates=_RATES,
    ),
    Solver(
        name="sgd",
        description="gradient descent",
        factory=lambda: sgd,
        candidates=_RATES,
    ),
)

SOLVERS: dict[str, Solver] = {solver.name: solver for solver in _ALL}


class Variant(NamedTuple):
    """A solver as the user wrote it.

    Attributes:
        label: What the user wrote: ``lbfgs:memory_size=5``.
        solver: The solver.
        overrides: The settings in the label.
    """

    label: str
    solver: Solver
    overrides: Settings

    @classmethod
    def parse(cls, text: str, others: Iterable[str] = ()) -> "Variant":
        """Finds the solver.

        Args:
            text: A name, with settings of its own if wanted.
            others: Further names that the command has, for the message.

        Raises:
            SettingError: There is no such solver.
        """
        name, overrides = parse_variant(text)
        if name not in SOLVERS:
            names = ", ".join([*SOLVERS, *others])
            raise SettingError(f"There is no method {name!r}; there are: {names}.")
        return cls(text, SOLVERS[name], overrides)


def available(names: Iterable[str]) -> list[str]:
    """Those of the names whose solver this version of the package has."""
    return [name for name in names if SOLVERS[name].is_available()]


def solver_catalogue() -> list[str]:
    """Lines with the solvers and their descriptions."""
    lines = [f"  {name:24} {solver.description}" for name, solver in SOLVERS.items()]
    return ["methods:", *lines]
