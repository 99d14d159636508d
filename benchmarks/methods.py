"""The methods: optimizers with their settings, by problem where they were tuned.

A method is one entry of `METHODS`. Its settings are the arguments of its factory, so that
``--set`` knows every option that a method of the package gains without a second list.
"""

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

import secondorder as so
from benchmarks import baselines, peers, variants
from benchmarks.blocks import block_labels
from benchmarks.evaluations import (
    HESSIAN_PRODUCT,
    Site,
    Work,
    block_hessian_free_work,
    hessian_free_work,
    kfac_jax_work,
    kfac_work,
    layer_statistics_work,
    levenberg_marquardt_work,
    linesearch_work,
    low_rank_work,
    lsr1_work,
    quadratic_model_work,
    sophia_work,
)
from benchmarks.problems import Batch, Params, Problem
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
        batch: The batch of the objective.
    """

    problem: Problem
    objective: Objective[Params]
    params: Params
    batch: Batch | None = None


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
        takes_batch: Whether updates are given the batch itself, as ``batch``.
        is_second_order: Whether the demo shows it as a method of this package.
        extra_gradients: Gradients that an update evaluates itself wherever the cost of a step
            repeats, beside what its state counts.
        work: What the last update evaluated beside those, from the state that it returned.
    """

    name: str
    description: str
    factory: Callable[[], Factory]
    forwards_to: Callable[[], Factory] | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by_problem: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    takes_batch: bool = False
    is_second_order: bool = False
    extra_gradients: int = 0
    work: Callable[[optax.OptState, Site], Work] = linesearch_work

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
        problem's L2 weight: so all methods minimize the same loss.

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
        """Steps after which the cost of a step repeats, by the settings that are periods."""
        complete = self.complete(settings)
        return math.lcm(*(int(v) for name, v in complete.items() if name.endswith("_every")))

    def complete(self, settings: Mapping[str, Any]) -> Settings:
        """The settings, and the factory's defaults of all others."""
        defaults = {
            name: parameter.default
            for name, parameter in self._parameters().items()
            if parameter.default is not parameter.empty
        }
        return {**defaults, **settings}

    def gradients(self, settings: Mapping[str, Any], steps: int) -> int:
        """Gradients of one batch that so many steps evaluate, without what the state counts.

        Each step evaluates one, and each refresh ``extra_gradients`` more: the first step
        refreshes, and so does every one that comes ``update_every`` steps later.
        """
        every = int(self.complete(settings).get("update_every", 1))
        return steps + self.extra_gradients * -(-steps // every)

    def build(self, context: Context, settings: Settings) -> optax.GradientTransformationExtraArgs:
        """Makes the transform, in the one interface of this package and of optax.

        A factory that takes ``layers`` is given those of the model, and one that takes ``context``
        all that there is; a setting ``blocks`` is the
        name of a partition of its parameters, see `benchmarks.blocks.block_labels`.
        """
        arguments = dict(settings)
        if "blocks" in arguments:
            arguments["blocks"] = block_labels(arguments["blocks"], context.params)
        if "layers" in self._arguments():
            find_layers = so.find_layers
            arguments["layers"] = find_layers(context.objective, context.params)
        if "context" in self._arguments():
            arguments["context"] = context
        try:
            return optax.with_extra_args_support(self.factory()(**arguments))
        except SettingError:
            raise
        except (TypeError, ValueError) as error:
            raise SettingError(f"{self.name}: {error}") from error

    def _parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments that are settings."""
        return {
            name: parameter
            for name, parameter in self._arguments().items()
            if parameter.kind is not parameter.VAR_KEYWORD and name not in ("layers", "context")
        }

    def _arguments(self) -> dict[str, inspect.Parameter]:
        """The arguments of the factory, then of what it forwards to; its own come first."""
        functions = [self.factory()]
        if self.forwards_to is not None:
            functions.insert(0, self.forwards_to())
        parameters = [inspect.signature(function).parameters for function in functions]
        return dict(itertools.chain(*(found.items() for found in parameters)))


def _package_method(attribute: str, name: str, description: str, **fields: Any) -> Method:
    """A method of the package under a name of ours, all of whose arguments are settings."""
    return Method(
        name=name,
        description=description,
        factory=lambda: getattr(so, attribute),
        **{"work": hessian_free_work, **fields},
    )


def _low_rank(name: str, description: str, **fixed: Any) -> Method:
    """Low-rank saddle-free Newton, or an ablation of it."""
    return Method(
        name=name,
        description=description,
        factory=lambda: functools.partial(so.low_rank_saddle_free_newton, **fixed),
        defaults={"learning_rate": 0.3},
        work=low_rank_work,
    )


def lsr1(
    shrink: float | None = None,
    grow: float | None = None,
    slope_rate: float | None = None,
    slope_target: float | None = None,
    smallest: float | None = None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """`secondorder.lsr1` with the numbers of its radius rule as settings of their own."""
    factors = {
        "shrink": shrink,
        "grow": grow,
        "slope_rate": slope_rate,
        "slope_target": slope_target,
        "smallest": smallest,
    }
    given = {name: factor for name, factor in factors.items() if factor is not None}
    if given:
        settings["radius_rule"] = so.RadiusRule(**given)
    return so.lsr1(**settings)


# A mean cross entropy is hundreds of times smaller than the autoencoders' sums over pixels.
_KBFGS_CLASSIFIERS: Mapping[str, Mapping[str, Any]] = {
    name: {"damping": 0.03}
    for name in ("digits-cnn", "mnist-lenet5", "mnist-lenet5-bn", "fashion-lenet5")
}

_ADAPTIVE_KFAC = {"damping": 0.1, "update_every": 2, "plane_every": 5, "moment_decay": 0.9}

_ALL = (
    Method(
        name="sgd",
        description="SGD with momentum, moving-average form",
        factory=lambda: baselines.sgd,
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
        factory=lambda: baselines.adam,
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
        name="adamw",
        description="optax.adamw",
        factory=lambda: baselines.adamw,
        defaults={"learning_rate": 1e-3},
    ),
    Method(
        name="muon",
        description="optax.contrib.muon for hidden matrices, optax.adamw for the rest",
        factory=lambda: baselines.muon,
        defaults={"learning_rate": 0.02},
    ),
    Method(
        name="nag",
        description="Nesterov's accelerated gradient, optax.sgd(nesterov=True)",
        factory=lambda: baselines.nag,
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
        factory=lambda: baselines.adadelta,
        defaults={"learning_rate": 1.0},
    ),
    Method(
        name="lbfgs",
        description="optax.lbfgs with its zoom line search on each batch",
        factory=lambda: baselines.lbfgs,
    ),
    Method(
        name="lbfgs-nols",
        description="optax.scale_by_lbfgs at a fixed learning rate",
        factory=lambda: baselines.lbfgs_without_linesearch,
        defaults={"learning_rate": 0.1},
    ),
    Method(
        name="sophia",
        description="optax.contrib.sophia with Hutchinson's probes",
        factory=lambda: peers.sophia,
        defaults={"learning_rate": 1e-3},
        work=sophia_work,
    ),
    Method(
        name="kfac-jax",
        description="K-FAC of the package kfac_jax with its rules for steps and damping",
        factory=lambda: peers.needing("kfac_jax", peers.kfac_jax),
        takes_batch=True,
        work=kfac_jax_work,
    ),
    Method(
        name="optax-shampoo",
        description="distributed Shampoo of the package optax-shampoo",
        factory=lambda: peers.needing("optax_shampoo", peers.package_shampoo),
        defaults={"learning_rate": 1e-3},
    ),
    Method(
        name="kbfgs",
        description="K-BFGS (Goldfarb, Ren, Bahamou 2020)",
        factory=lambda: so.kbfgs,
        forwards_to=lambda: so.scale_by_kbfgs,
        defaults={"learning_rate": 0.3, "damping": 0.3},
        by_problem=_KBFGS_CLASSIFIERS,
        is_second_order=True,
        extra_gradients=1,
    ),
    Method(
        name="kbfgs-l",
        description="K-BFGS(L): limited-memory output factor",
        factory=lambda: so.kbfgs,
        forwards_to=lambda: so.scale_by_kbfgs,
        defaults={"learning_rate": 0.3, "damping": 0.3, "memory_size": 100},
        by_problem=_KBFGS_CLASSIFIERS,
        is_second_order=True,
        extra_gradients=1,
    ),
    Method(
        name="kbfgs-warm",
        description="K-BFGS whose output factors start as K-FAC's inverses",
        factory=lambda: variants.warm_kbfgs,
        forwards_to=lambda: so.scale_by_kbfgs,
        defaults={"learning_rate": 0.3, "damping": 0.3},
        by_problem=_KBFGS_CLASSIFIERS,
        extra_gradients=1,
    ),
    Method(
        name="kbfgs-model",
        description="K-BFGS with steps and damping from a quadratic model",
        factory=lambda: variants.modeled_kbfgs,
        forwards_to=lambda: so.scale_by_quadratic_model,
        defaults={"plane_every": 5},
        extra_gradients=1,
        work=quadratic_model_work,
    ),
    Method(
        name="kfac",
        description="K-FAC at a learning rate (Martens, Grosse 2015)",
        factory=lambda: so.kfac,
        forwards_to=lambda: so.scale_by_kfac,
        defaults={"learning_rate": 0.03, "damping": 1.0},
        work=kfac_work,
    ),
    Method(
        name="kfac-adaptive",
        description="K-FAC with steps and damping from a quadratic model (Martens, Grosse 2015)",
        factory=lambda: functools.partial(so.kfac, None),
        forwards_to=lambda: so.scale_by_kfac,
        defaults=_ADAPTIVE_KFAC,
        is_second_order=True,
        work=kfac_work,
    ),
    Method(
        name="kfac-layerwise",
        description="kfac-adaptive with a rate for each layer, from the quadratic model",
        factory=lambda: functools.partial(so.kfac, None, layer_rates=True),
        forwards_to=lambda: so.scale_by_kfac,
        defaults={**_ADAPTIVE_KFAC, "update_every": 5},
        is_second_order=True,
        work=kfac_work,
    ),
    Method(
        name="kfac-averaged",
        description="kfac-adaptive along averages of its directions",
        factory=lambda: variants.averaged_kfac,
        forwards_to=lambda: so.scale_by_quadratic_model,
        defaults=_ADAPTIVE_KFAC,
        work=kfac_work,
    ),
    Method(
        name="shampoo",
        description="Shampoo, grafted with Adam (Gupta, Koren, Singer 2018; Anil et al. 2020)",
        factory=lambda: so.shampoo,
        forwards_to=lambda: so.scale_by_shampoo,
        defaults={"learning_rate": 3e-3},
    ),
    Method(
        name="soap",
        description="SOAP: Adam in Shampoo's eigenbasis (Vyas et al. 2024)",
        factory=lambda: so.soap,
        forwards_to=lambda: so.scale_by_soap,
        defaults={"learning_rate": 3e-3, "weight_decay_form": "l2"},
    ),
    Method(
        name="lsr1",
        description="trust-region L-SR1",
        factory=lambda: lsr1,
        forwards_to=lambda: so.lsr1,
        is_second_order=True,
        work=lsr1_work,
    ),
    _package_method(
        "hessian_free", "hf", "Hessian-free optimization (Martens 2010)", is_second_order=True
    ),
    _package_method(
        "block_hessian_free",
        "bhf",
        "block-diagonal Hessian-free (Zhang et al. 2017); blocks=layers|halves|modules|leaves",
        work=block_hessian_free_work,
        is_second_order=True,
    ),
    _package_method(
        "stochastic_hessian_free",
        "shf",
        "stochastic Hessian-free (Kiros 2013)",
        work=functools.partial(hessian_free_work, preconditioner="empirical_fisher"),
    ),
    _package_method(
        "gauss_newton",
        "sgn",
        "stochastic Gauss-Newton (Gargiani et al. 2020)",
    ),
    _package_method(
        "levenberg_marquardt",
        "lm",
        "Levenberg-Marquardt; blocks=layers|halves|modules|leaves",
        work=levenberg_marquardt_work,
    ),
    _package_method(
        "positive_curvature_hessian",
        "pch",
        "positive-curvature Hessian, block diagonal (Chen et al. 2019)",
        work=layer_statistics_work,
    ),
    _package_method(
        "krylov_subspace_descent",
        "ksd",
        "Krylov subspace descent (Vinyals, Povey 2012)",
        work=functools.partial(hessian_free_work, counted="dimension", evaluation=1.0),
    ),
    _package_method(
        "newton_cg",
        "newton-cg",
        "inexact Newton, with products with the Hessian",
        work=functools.partial(hessian_free_work, product=HESSIAN_PRODUCT),
    ),
    _package_method(
        "saddle_free_newton",
        "sfn",
        "saddle-free Newton in a Krylov space (Dauphin et al. 2014)",
        work=functools.partial(hessian_free_work, product=HESSIAN_PRODUCT),
    ),
    _low_rank("lrsfn", "low-rank saddle-free Newton (O'Leary-Roseberry et al. 2020)"),
    # What the eigenvalues, and what the subspace, have to do with it.
    _low_rank(
        "lrsfn-zero",
        "lrsfn with eigenvalues of zero: SGD at learning rate / damping",
        spectrum=jnp.zeros_like,
    ),
    _low_rank(
        "lrsfn-inf",
        "lrsfn with infinite eigenvalues: the eigenvectors are projected out",
        spectrum=lambda values: jnp.full_like(values, jnp.inf),
    ),
    _low_rank("lrsfn-random", "lrsfn on a random subspace", warm_start=False, passes=1),
)

# What a user would take instead of a method of the package.
_PEERS = "sgd nag adam adamw adadelta muon sophia lbfgs lbfgs-nols kfac-jax optax-shampoo"
PEERS = frozenset(_PEERS.split())
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
