"""Peers from packages that need not be there, or that need another JAX: they say so, and why."""

import functools
import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import optax

from benchmarks import networks
from benchmarks.baselines import with_penalty
from benchmarks.problems import Batch, Params, Problem
from benchmarks.settings import SettingError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Steps between two changes of kfac_jax's damping, its default.
ADAPT_EVERY = 5


class KfacJaxState(NamedTuple):
    """The state of kfac_jax between two steps.

    Attributes:
        inner: Its own.
        key: Of the targets that it samples.
    """

    inner: Any
    key: jax.Array


def sophia(
    learning_rate: float,
    b1: float = 0.965,
    b2: float = 0.99,
    gamma: float = 0.01,
    update_every: int = 10,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Sophia-H of optax, whose Hutchinson probes take one product with the Hessian each."""
    inner = optax.contrib.sophia(
        learning_rate, b1=b1, b2=b2, gamma=gamma, weight_decay=0.0, update_interval=update_every
    )

    def update(
        grads: Params, state: optax.OptState, params: Params, *, value_fn: Any, **extra: Any
    ) -> tuple[Params, optax.OptState]:
        del extra
        return inner.update(grads, state, params, obj_fn=value_fn)

    transform = optax.GradientTransformationExtraArgs(inner.init, update)
    return with_penalty(transform, weight_decay)


def package_shampoo(
    learning_rate: float,
    block_size: int = 1024,
    update_every: int = 10,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Distributed Shampoo of the package optax-shampoo, grafted on to RMSprop."""
    package = import_peer("optax_shampoo", "distributed_shampoo")
    transform = explain("optax_shampoo", package.distributed_shampoo)(
        learning_rate,
        block_size,
        graft_type=package.GraftingType.RMSPROP_NORMALIZED,
        preconditioning_compute_steps=update_every,
    )
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.GradientTransformation(
            explain("optax_shampoo", transform.init), explain("optax_shampoo", transform.update)
        ),
    )


def kfac_jax(
    context: Any, damping: float = 150.0, seed: int = 0, weight_decay: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """kfac_jax with its rules for learning rate, momentum and damping, as an optax transform.

    The package takes the whole step; the updates are the change of the parameters. It is told the
    loss of the problem, finds the layers itself, and gets no steps to burn in: like all others, it
    sees each batch once.
    """
    package = import_peer("kfac_jax")
    optimizer = package.Optimizer(
        jax.value_and_grad(functools.partial(_registered_loss, package, context.problem)),
        l2_reg=weight_decay,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=damping,
        damping_adaptation_interval=ADAPT_EVERY,
        num_burnin_steps=0,
        batch_size_extractor=lambda batch: len(batch.inputs),
    )

    @functools.partial(explain, "kfac_jax")
    def init(params: Params) -> KfacJaxState:
        key = jax.random.PRNGKey(seed)  # it does not take typed keys
        return KfacJaxState(optimizer.init(params, key, context.batch), key)

    @functools.partial(explain, "kfac_jax")
    def update(
        grads: Params, state: KfacJaxState, params: Params, *, batch: Batch, **extra: Any
    ) -> tuple[Params, KfacJaxState]:
        del grads, extra
        key, own = jax.random.split(state.key)

        # Whether the damping changes is decided in Python: there are two programs.
        def step(number: int) -> tuple[Params, Any]:
            moved, inner, _ = optimizer.step(
                params, state.inner, own, batch=batch, global_step_int=number
            )
            return moved, inner

        is_last = (state.inner.step_counter + 1) % ADAPT_EVERY == 0
        moved, inner = jax.lax.cond(is_last, lambda: step(ADAPT_EVERY - 1), lambda: step(0))
        return jax.tree.map(jnp.subtract, moved, params), KfacJaxState(inner, key)

    return optax.GradientTransformationExtraArgs(init, update)


def _registered_loss(package: Any, problem: Problem, params: Params, batch: Batch) -> jax.Array:
    """The loss with the L2 term, after its kind was registered with kfac_jax."""
    outputs, targets = problem.model(params, batch.inputs), batch.targets
    if problem.loss is networks.softmax_cross_entropy:
        # All positions of a sequence are predictions of their own.
        logits = outputs.reshape(-1, outputs.shape[-1])
        weight = len(outputs) / len(logits)
        package.register_softmax_cross_entropy_loss(logits, targets.reshape(-1), weight=weight)
    elif problem.loss is networks.binary_cross_entropy:
        package.register_sigmoid_cross_entropy_loss(outputs, targets)
    elif problem.loss in (networks.squared_error, networks.half_squared_error):
        weight = 0.5 if problem.loss is networks.half_squared_error else 1.0
        package.register_squared_error_loss(outputs, targets, weight=weight)
    else:
        raise SettingError(f"kfac_jax is not told the loss of {problem.name}: add it to peers.py.")
    return problem.loss(outputs, targets) + problem.penalty(params)


def import_peer(name: str, module: str | None = None) -> Any:
    """The package of a peer.

    Args:
        name: Of the package.
        module: Of a module in it, if that is wanted.

    Returns:
        The package or the module.

    Raises:
        SettingError: It is not installed, or cannot be imported with this JAX.
    """
    try:
        return importlib.import_module(f"{name}.{module}" if module else name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise _failure(name, "import", error) from error
        raise SettingError(f"{name} is not installed: pip install '.[bench-peers]'") from None
    except Exception as error:
        raise _failure(name, "import", error) from error


def needing(name: str, factory: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A factory, if the package that it needs can be imported."""
    import_peer(name)
    return factory


def explain(name: str, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function of a package whose errors name the versions that do not go together."""

    @functools.wraps(function)
    def explained(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except SettingError:
            raise
        except Exception as error:
            raise _failure(name, "run", error) from error

    return explained


def _failure(name: str, verb: str, error: Exception) -> SettingError:
    message = str(error).splitlines() or [""]
    return SettingError(
        f"{name} {_version(name)} does not {verb} on JAX {jax.__version__}: "
        f"{type(error).__name__}: {message[0]}"
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of no version"
