"""The methods: optimizers with their settings, by problem where they were tuned.

A method is one entry of `METHODS`. Its settings are the arguments of its factory, so that
``--set`` knows every option that a method of the package gains without a second list.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
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
        extra_gradients: Gradients that an update evaluates itself wherever the cost of a step
            repeats, beside those of a line search, which its state counts.
    """

    name: str
    description: str
    factory: Callable[[], Factory]
    forwards_to: Callable[[], Factory] | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by_problem: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    is_second_order: bool = False
    needs_layers: bool = False
    extra_gradients: int = 0

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

    def gradients(self, settings: Mapping[str, Any], steps: int) -> int:
        """Gradients of one batch that so many steps evaluate, without those of line searches.

        Each step evaluates one, and each refresh ``extra_gradients`` more: the first step
        refreshes, and so does every one that comes a `period` later.
        """
        return steps + self.extra_gradients * -(-steps // self.period(settings))

    def build(self, context: Context, settings: Settings) -> optax.GradientTransformationExtraArgs:
        """Makes the transform, in the one interface of this package and of optax."""
        arguments = dict(settings)
        if self.needs_layers:
            find_layers = of_package("find_layers")
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


def nag(
    learning_rate: float, momentum: float = 0.9, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Nesterov's accelerated gradient, in the heavy-ball form of `optax.sgd`."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum, nesterov=True),
    )


def adadelta(
    learning_rate: float = 1.0, rho: float = 0.9, eps: float = 1e-6, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adadelta with L2 regularisation in the gradient."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.adadelta(learning_rate, rho=rho, eps=eps),
    )


def optax_lbfgs(
    memory_size: int = 10, max_linesearch_steps: int = 20
) -> optax.GradientTransformationExtraArgs:
    """`optax.lbfgs` with its default line search, whose number of steps can be set."""
    linesearch = optax.scale_by_zoom_linesearch(
        max_linesearch_steps=max_linesearch_steps, initial_guess_strategy="one"
    )
    return optax.lbfgs(memory_size=memory_size, linesearch=linesearch)


def lbfgs(
    memory_size: int = 10, max_linesearch_steps: int = 20, weight_decay: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """`optax.lbfgs` on minibatches: the line search sees one batch, with the L2 term.

    Pairs of curvature are made of the gradients of successive batches, as optax does.
    """
    return with_penalty(optax_lbfgs(memory_size, max_linesearch_steps), weight_decay)


def lbfgs_without_linesearch(
    learning_rate: float, memory_size: int = 10, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """L-BFGS directions at a fixed learning rate."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_lbfgs(memory_size=memory_size),
        optax.scale_by_learning_rate(learning_rate),
    )


def lsr1(
    shrink: float | None = None, grow: float | None = None, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """`secondorder.lsr1` with the factors of its radius as settings of their own."""
    factors = {"shrink": shrink, "grow": grow}
    given = {name: factor for name, factor in factors.items() if factor is not None}
    if given:
        settings["radius_rule"] = of_package("RadiusRule")(**given)
    return of_package("lsr1")(**settings)


def lsr1_factory() -> Factory:
    """`lsr1`, if this version of the package has the method."""
    of_package("lsr1")
    return lsr1


def with_penalty(
    transform: optax.GradientTransformation, weight_decay: float
) -> optax.GradientTransformationExtraArgs:
    """Adds ``0.5 weight_decay |params|^2`` to all that a method is told about the objective.

    A method that evaluates the objective itself must not meet the term in the gradient only.

    Args:
        transform: The method.
        weight_decay: Weight of the term.

    Returns:
        The method on the objective with the term, with the state of ``transform``.
    """
    inner = optax.with_extra_args_support(transform)

    def penalty(params: Params) -> jax.Array:
        squares = [jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(params)]
        return 0.5 * weight_decay * jnp.sum(jnp.stack(squares))

    def update(
        grads: chex.ArrayTree,
        state: optax.OptState,
        params: Params,
        *,
        value: jax.Array,
        value_fn: Callable[[Params], jax.Array],
        **extra: Any,
    ) -> tuple[chex.ArrayTree, optax.OptState]:
        grads = jax.tree.map(lambda g, p: g + weight_decay * p, grads, params)
        extra.update(
            value=value + penalty(params),
            grad=grads,
            value_fn=lambda point: value_fn(point) + penalty(point),
        )
        return inner.update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def of_package(attribute: str) -> Any:
    """An attribute of the package, which may not have it yet."""
    try:
        return getattr(so, attribute)
    except AttributeError:
        raise SettingError(f"This version of secondorder has no `{attribute}`.") from None


# A mean cross entropy is hundreds of times smaller than the autoencoders' sums over pixels.
_KBFGS_CLASSIFIERS: Mapping[str, Mapping[str, Any]] = {
    name: {"damping": 0.03}
    for name in ("digits-cnn", "mnist-lenet5", "mnist-lenet5-bn", "fashion-lenet5")
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
            "mnist-lenet5-bn": {"learning_rate": 0.3},
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
        name="nag",
        description="Nesterov's accelerated gradient, optax.sgd(nesterov=True)",
        factory=lambda: nag,
        defaults={"learning_rate": 3e-3},
        # A tenth of the rates of SGD, whose moving average makes its steps as much smaller.
        by_problem={
            "faces-autoencoder": {"learning_rate": 1e-3},
            "curves-autoencoder": {"learning_rate": 1e-2},
            "digits-autoencoder": {"learning_rate": 3e-2},
            "digits-cnn": {"learning_rate": 0.1},
            "mnist-lenet5": {"learning_rate": 3e-2},
            "mnist-lenet5-bn": {"learning_rate": 3e-2},
            "fashion-lenet5": {"learning_rate": 3e-2},
        },
    ),
    Method(
        name="adadelta",
        description="optax.adadelta",
        factory=lambda: adadelta,
        defaults={"learning_rate": 1.0},
    ),
    Method(
        name="lbfgs",
        description="optax.lbfgs with its zoom line search on each batch",
        factory=lambda: lbfgs,
    ),
    Method(
        name="lbfgs-nols",
        description="optax.scale_by_lbfgs at a fixed learning rate",
        factory=lambda: lbfgs_without_linesearch,
        defaults={"learning_rate": 0.1},
    ),
    Method(
        name="kbfgs",
        description="K-BFGS (Goldfarb, Ren, Bahamou 2020)",
        factory=lambda: of_package("kbfgs"),
        forwards_to=lambda: of_package("scale_by_kbfgs"),
        defaults={"learning_rate": 0.3, "damping": 0.3},
        by_problem=_KBFGS_CLASSIFIERS,
        is_second_order=True,
        needs_layers=True,
        extra_gradients=1,
    ),
    Method(
        name="kbfgs-l",
        description="K-BFGS(L): limited-memory output factor",
        factory=lambda: of_package("kbfgs"),
        forwards_to=lambda: of_package("scale_by_kbfgs"),
        defaults={"learning_rate": 0.3, "damping": 0.3, "memory_size": 100},
        by_problem=_KBFGS_CLASSIFIERS,
        is_second_order=True,
        needs_layers=True,
        extra_gradients=1,
    ),
    Method(
        name="lsr1",
        description="trust-region L-SR1",
        factory=lsr1_factory,
        forwards_to=lambda: of_package("lsr1"),
        is_second_order=True,
        extra_gradients=1,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
