r"""Methods on a part of the parameters, whose objectives take all of them.

`optax.masked` and `optax.partition` hand a transform the parameters of its part, and leave the
extra arguments as they are. A method that evaluates the objective would call it without the others.
Here objectives are closed over them first: the part moves, the rest is held where it is. Gradients
among the extra arguments are cut as the updates are.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

import chex
import jax
import optax

from secondorder.objective import check_given, reparametrize
from secondorder.tree import is_function

Mask: TypeAlias = chex.ArrayTree | Callable[[chex.ArrayTree], chex.ArrayTree]

# What carries all parameters from the outer to the inner transform.
_WHOLE = "parameters_of_all_parts"
_OBJECTIVES = ("value_fn", "curvature_fn")


def masked(
    inner: optax.GradientTransformation, mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """Applies a transform to a part of the parameters; other updates pass through it.

    Args:
      inner: The transform, for instance a method of this package.
      mask: A pytree of booleans like the parameters or a prefix of them, or a function that maps
        them to one. True where ``inner`` acts. Static.

    Returns:
      A transform with the extra arguments of ``inner``; objectives are those of all parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> params = {"head": jnp.ones(2), "body": jnp.ones(3)}
      >>> value_fn = lambda p: jnp.sum(p["head"] ** 2) * jnp.sum(p["body"] ** 2)
      >>> tx = so.masked(so.lsr1(), {"head": True, "body": False})
      >>> value, grad = jax.value_and_grad(value_fn)(params)
      >>> updates, state = tx.update(
      ...     grad, tx.init(params), params, value=value, grad=grad, value_fn=value_fn)
      >>> bool(jnp.all(updates["body"] == grad["body"]))
      True
    """
    return _with_whole(optax.masked(_on_part(inner), _as_function(mask)), "masked")


def partition(
    transforms: Mapping[Hashable, optax.GradientTransformation],
    labels: chex.ArrayTree | Callable[[chex.ArrayTree], chex.ArrayTree],
) -> optax.GradientTransformationExtraArgs:
    """Applies a transform of its own to each part of the parameters.

    Args:
      transforms: By label: methods of this package and any others.
      labels: A pytree of labels like the parameters or a prefix of them, or a function that maps
        them to one. Static.

    Returns:
      A transform with the extra arguments of all; objectives are those of all parameters. Methods
      that try their step do so with the other parts where they are before the update.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> params = {"head": jnp.ones(2), "body": jnp.ones(3)}
      >>> value_fn = lambda p: jnp.sum(p["head"] ** 2) + jnp.sum(p["body"] ** 2)
      >>> tx = so.partition(
      ...     {"a": so.lsr1(), "b": optax.adam(1e-3)}, {"head": "a", "body": "b"})
      >>> state = tx.init(params)
      >>> for _ in range(8):
      ...     value, grad = jax.value_and_grad(value_fn)(params)
      ...     updates, state = tx.update(
      ...         grad, state, params, value=value, grad=grad, value_fn=value_fn)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.linalg.norm(params["head"]) < 1e-3)
      True
    """
    parts = {label: _on_part(tx) for label, tx in transforms.items()}
    return _with_whole(optax.partition(parts, _as_function(labels)), "partition")


def mask_params(params: chex.ArrayTree, mask: Mask) -> chex.ArrayTree:
    """The part of the parameters that a masked transform sees.

    Args:
      params: All parameters.
      mask: As `masked` takes it.

    Returns:
      A pytree like ``params`` with `optax.MaskedNode` in place of the others.

    Example:
      >>> mask_params({"head": 1.0, "body": 2.0}, {"head": True, "body": False})
      {'body': MaskedNode(), 'head': 1.0}
    """
    tree = _as_function(mask)(params)
    return jax.tree.map(
        lambda chosen, part: part if chosen else jax.tree.map(lambda _: optax.MaskedNode(), part),
        tree,
        params,
    )


def hold_rest(objective: Any, params: chex.ArrayTree) -> Any:
    """An objective of all parameters as one of a part of them, with the others held.

    The layers of the part, which K-BFGS and its like need, are those of this objective::

        part = so.mask_params(params, mask)
        layers = so.find_layers(so.hold_rest(objective, params), part)
        tx = so.masked(so.kbfgs(0.3, layers), mask)

    Args:
      objective: A callable, an `Objective` or `Microbatches`.
      params: All parameters.

    Returns:
      An objective of the same kind, which takes a part as `mask_params` makes it.

    Example:
      >>> params = {"head": 2.0, "body": 3.0}
      >>> held = hold_rest(lambda p: p["head"] * p["body"], params)
      >>> held(mask_params({"head": 5.0, "body": 7.0}, {"head": True, "body": False}))
      15.0
    """
    return reparametrize(objective, lambda moved: _merge(moved, params))


def _as_function(tree: Any) -> Callable[[Any], Any]:
    """What makes a mask or labels; trees may be callable too, as modules of Equinox are."""
    return tree if is_function(tree) else lambda _: tree


def _merge(part: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
    """All parameters, those of the part as they are there."""
    return jax.tree.map(
        lambda own, other: other if _is_masked(own) else own, part, params, is_leaf=_is_masked
    )


def _cut(tree: chex.ArrayTree, part: chex.ArrayTree) -> chex.ArrayTree:
    """What belongs to the part of a pytree like all parameters."""
    return jax.tree.map(
        lambda own, other: own if _is_masked(own) else other, part, tree, is_leaf=_is_masked
    )


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _with_whole(
    tx: optax.GradientTransformationExtraArgs, name: str
) -> optax.GradientTransformationExtraArgs:
    """Hands all parameters to the parts, past the masks of optax."""

    def update(
        updates: chex.ArrayTree,
        state: Any,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, Any]:
        check_given(params, name)
        return tx.update(updates, state, params, **extra_args, **{_WHOLE: params})

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _on_part(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transform of a part, with extra arguments that are those of the part."""
    inner = optax.with_extra_args_support(tx)

    def update(
        updates: chex.ArrayTree,
        state: Any,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, Any]:
        whole = extra_args.pop(_WHOLE)
        for name in _OBJECTIVES:
            if callable(extra_args.get(name)):
                extra_args[name] = hold_rest(extra_args[name], whole)
        if extra_args.get("grad") is not None:
            extra_args["grad"] = _cut(extra_args["grad"], params)
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)
