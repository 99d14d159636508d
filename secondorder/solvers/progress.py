r"""How far an iteration has come: when it has stalled, and which iterates to keep on the way.

Both rules are Martens' for conjugate gradients. The model decreases in every iteration, and is
therefore measured against what it was about a tenth of the iterations ago; iterates are kept
ever more rarely, as the later ones are ever more alike.

Source: Martens (2010), Deep learning via Hessian-free optimization, sections 4.4 and 4.6.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# A decrease is measured over this part of the iterations, and at least over so many.
_SHARE, _SHORTEST = 10, 10
_FIRST, _RATIO = 5, 1.3  # of the iterates that are kept


def init_model_ring(model: jax.Array, max_iterations: int) -> jax.Array | None:
    """Makes room for the values of the model that `has_stalled` looks back at.

    Args:
      model: Values of the L models (L,) at the start.
      max_iterations: Bound on the number of iterations, at least 1; static.

    Returns:
      A ring (R, L) of zeros with R - 1 the longest look back, or None if all iterations are too
      few for the rule ever to hold.

    Example:
      >>> init_model_ring(jnp.zeros(2), 250).shape, init_model_ring(jnp.zeros(2), 10)
      ((26, 2), None)
    """
    if max_iterations <= _SHORTEST:
        return None
    longest = max(-(-max_iterations // _SHARE), _SHORTEST)
    # Derived from an array, zeros are on its mesh.
    return jax.lax.broadcast(jnp.zeros_like(model), (longest + 1,))


def record_model(ring: jax.Array, iteration: jax.Array, model: jax.Array) -> jax.Array:
    """Writes the values of the model after an iteration over the oldest ones.

    Args:
      ring: Values of recent iterations (R, L).
      iteration: Number of the iteration, from 1.
      model: Values after it (L,).

    Returns:
      The new ring.

    Example:
      >>> record_model(jnp.zeros((2, 1)), jnp.int32(3), jnp.array([-1.0])).tolist()
      [[0.0], [-1.0]]
    """
    return jax.lax.dynamic_update_index_in_dim(ring, model, iteration % len(ring), 0)


def has_stalled(
    ring: jax.Array, iteration: jax.Array, model: jax.Array, progress: ArrayLike
) -> jax.Array:
    r"""Whether the model has decreased relatively little in the last iterations.

    With :math:`k = \max(10, \lceil i / 10 \rceil)`, iteration :math:`i` is the last one if

    .. math::
      i > k, \qquad \phi_{i-k} < 0, \qquad \frac{\phi_i - \phi_{i-k}}{\phi_i} < k \epsilon

    Args:
      ring: Values of recent iterations (R, L), those before iteration ``i``.
      iteration: Number ``i`` of the iteration, from 1.
      model: Values after it (L,).
      progress: The relative decrease per iteration :math:`\epsilon`, nonnegative.

    Returns:
      Booleans (L,).

    Example:
      >>> ring = jnp.full((11, 2), -1.0)
      >>> has_stalled(ring, jnp.int32(11), jnp.array([-1.004, -1.006]), 5e-4).tolist()
      [True, False]

    Source: Martens (2010), section 4.4; the condition on the sign is that of his program.
    """
    count = _look_back(iteration)
    before = jax.lax.dynamic_index_in_dim(ring, (iteration - count) % len(ring), keepdims=False)
    # Multiplied out: the present value is as negative as the one before, or there is no stop.
    small = model - before > count * progress * model
    return (iteration > count) & (before < 0) & (model < 0) & small


def stored_iterations(max_iterations: int) -> tuple[int, ...]:
    r"""The iterations whose iterates are kept, in exponentially growing distances.

    Args:
      max_iterations: Bound on the number of iterations; static.

    Returns:
      The numbers :math:`\lceil 5 \cdot 1.3^j \rceil` below the bound.

    Example:
      >>> stored_iterations(60)
      (5, 7, 9, 11, 15, 19, 25, 32, 41, 54)

    Source: Martens (2010), section 4.6, and his program.
    """
    grid, position = [], float(_FIRST)
    while math.ceil(position) < max_iterations:
        grid.append(math.ceil(position))
        position *= _RATIO
    return tuple(grid)


def storage_row(iteration: jax.Array, max_iterations: int) -> jax.Array:
    """Where to keep an iterate: in one row until its iteration is one of `stored_iterations`.

    Written there after every iteration, an iterate is replaced by the next one unless it is to be
    kept. So the last one is kept too, whichever it is.

    Args:
      iteration: Number of the iteration, from 0.
      max_iterations: Bound on it; static.

    Returns:
      The row, at most ``len(stored_iterations(max_iterations))``.

    Example:
      >>> [int(storage_row(jnp.int32(i), 9)) for i in (0, 4, 5, 6, 7, 8, 9)]
      [0, 0, 0, 1, 1, 2, 2]
    """
    grid = jnp.asarray(stored_iterations(max_iterations), jnp.int32)
    return jnp.sum(grid < iteration, dtype=jnp.int32)


def stored_at(last: jax.Array, max_iterations: int) -> jax.Array:
    """Which iterates there are in the rows of `storage_row`.

    Args:
      last: Number of the last iteration.
      max_iterations: Bound on it; static.

    Returns:
      Numbers of iterations (S,), int32, the last one in the last row in use; -1 in empty rows.

    Example:
      >>> stored_at(jnp.int32(6), 9).tolist()
      [5, 6, -1]
    """
    grid = jnp.asarray((*stored_iterations(max_iterations), max_iterations), jnp.int32)
    row, rows = storage_row(last, max_iterations), jnp.arange(len(grid))
    return jnp.where(rows < row, grid, jnp.where(rows == row, last, -1))


def _look_back(iteration: jax.Array) -> jax.Array:
    """Iterations that a decrease is measured over."""
    return jnp.maximum(-(-iteration // _SHARE), _SHORTEST)
