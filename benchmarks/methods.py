"""The methods: optimizers with their settings, by problem where they were tuned.

A method is one entry of `METHODS`. Its settings are the arguments of its factory, so that
``--set`` knows every option that a method of the package gains without a second list.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import optax

import secondorder as so
from benchmarks.problems import Params, Problem
from benchmarks.settings import SettingError, Settings, check_keys
from secondorder.objective import Objective

Factory = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Context:
    """What an optimizer may have to be told when it is made.

    Attributes:
        problem: The problem.
        objective: Its objective on a batch of the size that is trained with.
        params: Its initial parameters.
    """

    problem: Problem
    objective: Objective[Params]
    params: Params


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer with its settings.

    Attributes:
        name: What the command line calls it.
        description: One line.
        factory: Returns the function that makes the transform. It is called only when the
            method is used, so that entries may precede the methods that they name.
        forwards_to: Returns the function that the factory's ``**`` arguments are passed on to, so
            that they are settings too; None where it has no such arguments.
        defaults: Settings for every problem, over the factory's own defaults.
        by_problem: Settings for one problem, over ``defaults``.
        is_second_order: Whether the demo shows it as a method of this package.
        needs_layers: Whether the factory takes ``layers``, as Kronecker methods do.
    """

    name: str
    description: str
    factory: Callable[[], Factory]
    forwards_to: Callable[[], Factory] | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by_problem: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    is_second_order: bool = False
    needs_layers: bool = False

    def is_available(self) -> bool:
        """Whether this version of the package has the method."""
        try:
            self.factory()
        except SettingError:
            return False
        return True

    def settings(self, problem: Problem, overrides: Mapping[str, Any]) -> Settings:
        """The settings of a run on a problem.

        Every method adds ``weight_decay * params`` to the gradient, and that is by default the
        problem's L2 weight: so all methods minimise the same loss.

        Args:
            problem: The problem.
            overrides: Settings that take precedence.

        Returns:
            All settings that are not left to the factory's defaults.

        Raises:
            SettingError: An override that the method does not have.
        """
        check_keys(overrides, self._parameters(), self.name)
        return {
            "weight_decay": problem.l2,
            **self.defaults,
            **self.by_problem.get(problem.name, {}),
            **overrides,
        }

    def period(self, settings: Mapping[str, Any]) -> int:
        """Steps after which the cost of a step repeats: ``update_every``, 1 without it."""
        parameter = self._parameters().get("update_every")
        default = 1 if parameter is None else parameter.default
        return int(settings.get("update_every", default))

    def build(self, context: Context, settings: Settings) -> optax.GradientTransformationExtraArgs:
        """Makes the transform, in the one interface of this package and of optax."""
        arguments = dict(settings)
        if self.needs_layers:
            find_layers = _of_package("find_layers")
            arguments["layers"] = find_layers(context.objective, context.params)
        try:
            return optax.with_extra_args_support(self.factory()(**arguments))
        except (TypeError, ValueError) as error:
            raise SettingError(f"{self.name}: {error}") from error

    def _parameters(self) -> dict[str, inspect.Parameter]:
        functions = [self.factory()]
        if self.forwards_to is not None:
            functions.append(self.forwards_to())
        parameters = [inspect.signature(function).parameters.values() for function in functions]
        return {
            parameter.name: parameter
            for parameter in itertools.chain(*parameters)
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "layers"
        }


def sgd(
    learning_rate: float, momentum: float = 0.9, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Gradient descent along an exponential moving average of the gradients.

    This is the papers' form, ``m <- momentum m + (1 - momentum) g`` without bias correction. The
    heavy-ball form of `optax.sgd` has the same steps at ``1 - momentum`` times the rate.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.ema(momentum, debias=False),
        optax.scale_by_learning_rate(learning_rate),
    )


def adam(
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam with L2 regularisation in the gradient (not AdamW)."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.adam(learning_rate, b1=b1, b2=b2, eps=eps),
    )


def _of_package(attribute: str) -> Any:
    """An attribute of the package, which may not have it yet."""
    try:
        return getattr(so, attribute)
    except AttributeError:
        raise SettingError(f"This version of secondorder has no `{attribute}`.") from None


# A mean cross entropy is hundreds of times smaller than the autoencoders' sums over pixels.
_KBFGS_CLASSIFIERS: Mapping[str, Mapping[str, Any]] = {
    name: {"damping": 0.03} for name in ("digits-cnn", "mnist-lenet5", "fashion-lenet5")
}

_ALL = (
    Method(
        name="sgd",
        description="SGD with momentum, moving-average form",
        factory=lambda: sgd,
        defaults={"learning_rate": 0.03},
        # The papers' tuned rates; those for the digits were found with `tune`.
        by_problem={
            "faces-autoencoder": {"learning_rate": 0.01},
            "curves-autoencoder": {"learning_rate": 0.1},
            "digits-autoencoder": {"learning_rate": 0.3},
            "digits-cnn": {"learning_rate": 1.0},
            "mnist-lenet5": {"learning_rate": 0.3},
            "fashion-lenet5": {"learning_rate": 0.3},
        },
    ),
    Method(
        name="adam",
        description="optax.adam",
        factory=lambda: adam,
        defaults={"learning_rate": 1e-3},
        # The papers tune epsilon as a damping along with the rate.
        by_problem={
            "mnist-autoencoder": {"learning_rate": 1e-4, "eps": 1e-4},
            "faces-autoencoder": {"learning_rate": 1e-4, "eps": 1e-4},
            "curves-autoencoder": {"learning_rate": 1e-3, "eps": 1e-3},
            "digits-autoencoder": {"learning_rate": 1e-2, "eps": 1e-4},
            "digits-cnn": {"learning_rate": 1e-2},
        },
    ),
    Method(
        name="kbfgs",
        description="K-BFGS (Goldfarb, Ren, Bahamou 2020)",
        factory=lambda: _of_package("kbfgs"),
        forwards_to=lambda: _of_package("scale_by_kbfgs"),
        defaults={"learning_rate": 0.3, "damping": 0.3},
        by_problem=_KBFGS_CLASSIFIERS,
        is_second_order=True,
        needs_layers=True,
    ),
    Method(
        name="kbfgs-l",
        description="K-BFGS(L): limited-memory output factor",
        factory=lambda: _of_package("kbfgs"),
        forwards_to=lambda: _of_package("scale_by_kbfgs"),
        defaults={"learning_rate": 0.3, "damping": 0.3, "memory_size": 100},
        by_problem=_KBFGS_CLASSIFIERS,
        is_second_order=True,
        needs_layers=True,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
