"""Optax's line searches behind methods of this package."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder.objective import check_given, check_value_fn, value_and_aux, value_and_grad


def line_search(search: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Makes one of optax's line searches a link behind a method of this package.

    .. math:: \theta_{k+1} = \theta_k + \eta_k d_k, \qquad \eta_k \text{ found by the search}

    The searches take extra arguments for those of ``value_fn`` and raise where it has no such
    arguments. Here they are given ``value``, ``grad`` and ``value_fn`` alone: ``curvature_fn`` and
    whatever else other links want stays with those, and aux is dropped. They expect a direction of
    descent: `optax.scale` by -1 stands before. Methods that try their step themselves need none.

    Args:
      search: `optax.scale_by_backtracking_linesearch` or `optax.scale_by_zoom_linesearch`, with
        their settings.

    Returns:
      A transform whose ``update`` needs ``params`` and ``value_fn``; ``value`` and ``grad`` are
      evaluated if they are not given.

    Raises:
      ValueError: In ``update``, if ``params`` or ``value_fn`` is missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> value_fn = lambda p: p[0] ** 2 + 10 * p[1] ** 2
      >>> tx = optax.chain(so.scale_by_lsr1(memory_size=2), optax.scale(-1.0),
      ...     so.line_search(optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)))
      >>> @jax.jit
      ... def step(params, state):
      ...     value, grad = jax.value_and_grad(value_fn)(params)
      ...     updates, state = tx.update(grad, state, params, value=value, grad=grad,
      ...         value_fn=value_fn, curvature_fn=value_fn)
      ...     return optax.apply_updates(params, updates), state
      >>> params = jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> for _ in range(8):
      ...     params, state = step(params, state)
      >>> bool(value_fn(params) < 1e-3 * value_fn(jnp.array([1.0, -2.0])))
      True
    """
    inner = optax.with_extra_args_support(search)

    def init(params: chex.ArrayTree) -> optax.OptState:
        # Those of optax are of Python numbers, whose weak types an update does not keep.
        return jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), inner.init(params)
        )

    def update(
        updates: chex.ArrayTree,
        state: optax.OptState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        grad: chex.ArrayTree | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, optax.OptState]:
        del extra_args
        check_given(params, "line_search")
        check_value_fn(value_fn, "line_search")
        assert value_fn is not None
        evaluate = value_and_aux(value_fn)
        if grad is None:
            value, grad = value_and_grad(value_fn, params)
        elif value is None:
            value = evaluate(params)[0]
        updates, new = inner.update(
            updates, state, params, value=value, grad=grad, value_fn=lambda p: evaluate(p)[0]
        )
        return updates, jax.tree.map(lambda n, o: n.astype(o.dtype), new, state)

    return optax.GradientTransformationExtraArgs(init, update)
