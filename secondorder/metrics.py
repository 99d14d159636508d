"""What the methods of an optimizer report, read from its state."""

import re
from collections.abc import Iterator
from typing import Any

import jax


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """The metrics of every method of this package in a state, wherever it is nested.

    They are found inside chains, masks, partitions, accumulators and injected hyperparameters, and
    under `jax.jit`: what is returned is part of the state, nothing is computed.

    Args:
      opt_state: The state of any optax transform.

    Returns:
      Scalars by ``"method/name"``, such as ``"lsr1/ratio"``, in the order of the state. Where
      several states of a method report, the place in ``opt_state`` tells them apart:
      ``"lsr1[0].inner_state/ratio"``. Under `jax.vmap` they are arrays. Empty if nothing reports.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> tx = optax.chain(so.lsr1(), optax.scale(1.0))
      >>> sorted(so.metrics(tx.init(jnp.ones(3))))[:2]
      ['lsr1/largest_eigenvalue', 'lsr1/nonfinite_steps']
    """
    found = list(_reporting(opt_state, ""))
    names = [_method_name(type(state)) for _, state in found]
    return {
        f"{name}{place if names.count(name) > 1 else ''}/{field}": value
        for name, (place, state) in zip(names, found, strict=True)
        for field, value in state.metrics._asdict().items()
    }


def _reporting(tree: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The states that have metrics, outer ones first, with their places."""
    if _reports(tree):
        yield place, tree
        tree = tree._replace(metrics=None)
    nested = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: node is not tree and _reports(node)
    )
    for path, node in nested:
        if _reports(node):
            yield from _reporting(node, place + jax.tree_util.keystr(path))


def _reports(node: Any) -> bool:
    return "metrics" in getattr(node, "_fields", ())


def _method_name(kind: type) -> str:
    """``ScaleByKBFGSState``: ``kbfgs``; ``HessianFreeState``: ``hessian_free``."""
    stem = kind.__name__.removeprefix("ScaleBy").removesuffix("State")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).lower()
