r"""Products of the layers' gradients with both of their factors, shared by devices.

Of a stack of equal layers each device takes some. A layer that has no like is cut by rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from secondorder import factors as kf
from secondorder.products import matmul
from secondorder.sharding import replicate
from secondorder.spread import Devices


def _rows_times(right: jax.Array, rows: jax.Array) -> jax.Array:
    return matmul(rows, right)


def spread_product(
    devices: Devices,
    left: jax.Array,
    matrices: jax.Array,
    right: Any,
    multiply: Callable[[Any, jax.Array], jax.Array] = _rows_times,
) -> jax.Array:
    """``L V R`` for every layer of a stack.

    Args:
      devices: What shares the work.
      left: ``L``, ``(stack, inputs, inputs)``, or ``(stack, inputs)`` if it is diagonal.
      matrices: ``V``, ``(stack, inputs, outputs)``.
      right: ``R``, ``(stack, outputs, outputs)``, or what else there is of it.
      multiply: Maps ``R`` and stacked rows to the products of the rows with it.

    Returns:
      ``(stack, inputs, outputs)``, on every device of an Explicit mesh.

    Example:
      >>> from secondorder.spread import ALONE
      >>> ones = jnp.ones((1, 1, 1))
      >>> spread_product(ALONE, 2 * ones, ones, 3 * ones).tolist()
      [[[6.0]]]
    """

    def product(left: jax.Array, matrices: jax.Array, right: Any) -> jax.Array:
        matrices = matrices.astype(left.dtype)
        scaled = left[:, :, None] * matrices if left.ndim == 2 else matmul(left, matrices)
        return multiply(right, scaled)

    axes = (1, 1 if left.ndim == 2 else None, None) if _by_rows(devices, matrices) else (0, 0, 0)
    return replicate(devices.spread(product, left, matrices, right, in_axes=axes, out_axes=axes[0]))


def spread_solution(
    devices: Devices, left: jax.Array, matrices: jax.Array, right: jax.Array, spectrum: jax.Array
) -> jax.Array:
    r"""``L ((Lᵀ V R) / S) Rᵀ`` for every layer of a stack: what is diagonal in a basis, inverted.

    Args:
      devices: What shares the work.
      left: ``L``, orthogonal ``(stack, inputs, inputs)``; or ``(stack, inputs)`` for an embedding,
        whose basis is the identity.
      matrices: ``V``, ``(stack, inputs, outputs)``.
      right: ``R``, orthogonal ``(stack, outputs, outputs)``.
      spectrum: ``S`` in the shape of ``V``, positive.

    Returns:
      ``(stack, inputs, outputs)``, on every device of an Explicit mesh.

    Example:
      >>> from secondorder.spread import ALONE
      >>> ones = jnp.ones((1, 1, 1))
      >>> spread_solution(ALONE, ones, 6 * ones, ones, 3 * ones).tolist()
      [[[2.0]]]
    """

    def divide(
        left: jax.Array, matrices: jax.Array, right: jax.Array, spectrum: jax.Array
    ) -> jax.Array:
        return kf.rotate(left, matrices, right) / spectrum

    def back(left: jax.Array, matrices: jax.Array, right: jax.Array) -> jax.Array:
        left = left if left.ndim == 2 else jnp.swapaxes(left, 1, 2)
        return kf.rotate(left, matrices, jnp.swapaxes(right, 1, 2))

    def solve(
        left: jax.Array, matrices: jax.Array, right: jax.Array, spectrum: jax.Array
    ) -> jax.Array:
        return back(left, divide(left, matrices, right, spectrum), right)

    whole = (left, matrices, right, spectrum)
    if not _by_rows(devices, matrices):
        return replicate(devices.spread(solve, *whole))
    if left.ndim == 2:
        return replicate(devices.spread(solve, *whole, in_axes=(1, 1, None, 1), out_axes=1))
    # The way back mixes all rows.
    divided = devices.spread(divide, *whole, in_axes=(2, None, None, 1), out_axes=1)
    turned = devices.spread(back, left, divided, right, in_axes=(1, None, None), out_axes=1)
    return replicate(turned)


def _by_rows(devices: Devices, matrices: jax.Array) -> bool:
    """Whether rows leave less for each device than layers do."""
    stack, rows = matrices.shape[:2]
    return devices.share(rows) / rows < devices.share(stack) / stack
