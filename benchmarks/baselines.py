"""The peers: factories of first-order methods and of L-BFGS, all made by optax."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from benchmarks.problems import Params


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
    """Adam with L2 regularization in the gradient (not AdamW)."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.adam(learning_rate, b1=b1, b2=b2, eps=eps),
    )


def adamw(
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    decoupled_decay: float = 1e-2,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay, beside the L2 regularization in the gradient."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=decoupled_decay),
    )


def muon(
    learning_rate: float,
    adam_learning_rate: float = 3e-3,
    beta: float = 0.95,
    ns_steps: int = 5,
    decoupled_decay: float = 0.0,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Muon for the matrices of hidden layers, AdamW for all other parameters.

    Embeddings, what reads the logits out, vectors, and kernels of convolutions are the others.
    """
    transforms = {
        "muon": optax.contrib.muon(
            learning_rate, beta=beta, ns_steps=ns_steps, weight_decay=decoupled_decay
        ),
        "adamw": optax.adamw(adam_learning_rate, weight_decay=decoupled_decay),
    }
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.multi_transform(transforms, _muon_labels),
    )


def _muon_labels(params: Params) -> Any:
    """Which of the two steps each parameter takes; ``embedding`` and ``head`` are names of ours."""

    def label(path: tuple[Any, ...], leaf: jax.Array) -> str:
        names = jax.tree_util.keystr(path)
        is_hidden = leaf.ndim == 2 and not any(name in names for name in ("embedding", "head"))
        return "muon" if is_hidden else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


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
    """Adadelta with L2 regularization in the gradient."""
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
