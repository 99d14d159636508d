"""Running averages of second moments, and their damped inverses."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from secondorder.products import map_matrices, matmul

Tree = TypeVar("Tree")


def damped_inverse(matrix: jax.Array, damping: ArrayLike) -> jax.Array:
    """Returns ``(M + λI)⁻¹`` by Cholesky factorization.

    Args:
      matrix: symmetric positive semidefinite matrix (n, n), float32 or wider.
      damping: ``λ``, positive.

    Returns:
      Matrix (n, n), symmetric to rounding; NaN if ``M + λI`` is not positive definite to rounding.

    Example:
      >>> damped_inverse(jnp.diag(jnp.array([3.0, 15.0])), damping=1.0).tolist()
      [[0.25, 0.0], [0.0, 0.0625]]
    """
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    root = jnp.linalg.cholesky(matrix + damping * identity, symmetrize_input=False)
    inverse_root = solve_triangular(root, identity, lower=True)
    return matmul(inverse_root.T, inverse_root)


def apply_all(function: Callable[..., Any], *stacks: jax.Array) -> Any:
    """Applies a function to stacks as they are: what shares work where there is one device."""
    return function(*stacks)


def damped_inverses(
    matrices: Sequence[jax.Array],
    dampings: Sequence[jax.Array],
    divisor: ArrayLike = 1,
    spread: Callable[..., Any] = apply_all,
) -> list[jax.Array]:
    """Returns ``(M/m + λI)⁻¹`` for stacks of matrices of different sizes.

    The matrices are padded to the largest and inverted as one batch: one factorization to compile
    instead of one for each size.

    Args:
      matrices: stacks (S, n, n) of symmetric positive semidefinite matrices; ``n`` may differ.
      dampings: ``λ`` for each matrix of each stack, (S,), positive.
      divisor: ``m``, such as the number of examples that the matrices are sums over.
      spread: Applies a function to stacks, as `secondorder.spread.Devices.spread` does.

    Returns:
      Stacks like ``matrices``; the identity in place of an inverse that is not finite.

    Example:
      >>> small, large = damped_inverses(
      ...     [15 * jnp.ones((1, 1, 1)), 3 * jnp.eye(2)[None]], [jnp.ones(1), jnp.ones(1)])
      >>> small.tolist(), large.tolist()
      ([[[0.0625]]], [[[0.25, 0.0], [0.0, 0.25]]])
    """
    width = max(matrix.shape[-1] for matrix in matrices)

    def padded(matrix: jax.Array) -> jax.Array:
        margin = (0, width - matrix.shape[-1])
        return jnp.pad(matrix, ((0, 0), margin, margin))

    inverses = spread(
        functools.partial(map_matrices, damped_inverse),
        jnp.concatenate([padded(matrix) for matrix in matrices]) / divisor,
        jnp.concatenate(list(dampings)).astype(matrices[0].dtype),
    )
    finite = jnp.isfinite(jnp.sum(inverses, axis=(1, 2), keepdims=True))
    inverses = jnp.where(finite, inverses, jnp.eye(width, dtype=inverses.dtype))
    result, start = [], 0
    for stack, size, _ in (matrix.shape for matrix in matrices):
        result.append(inverses[start : start + stack, :size, :size])
        start += stack
    return result


def warm_decay(decay: chex.Numeric, count: jax.Array) -> jax.Array:
    r"""The decay that makes an average one of exponential weights that sum to one.

    .. math:: \beta_k = \beta\, \frac{1 - \beta^k}{1 - \beta^{k + 1}}

    Args:
      decay: :math:`\beta` in [0, 1).
      count: What the average already holds, ``k``; with none it holds nothing.

    Returns:
      :math:`\beta_k`.

    Example:
      >>> warm_decay(0.5, jnp.int32(0)).item(), round(warm_decay(0.5, jnp.int32(1)).item(), 4)
      (0.0, 0.3333)
    """
    power = jnp.asarray(decay, jnp.float32) ** count
    return decay * (1 - power) / (1 - decay * power)


def ema(old: Tree, new: Tree, decay: ArrayLike) -> Tree:
    """Returns the exponential moving average ``β old + (1 - β) new``, leaf by leaf.

    There is no correction for a start from zero.

    Args:
      old: pytree of arrays, the average so far.
      new: pytree of the same structure and shapes.
      decay: weight ``β`` of the old value, in [0, 1].

    Returns:
      Pytree with the dtypes of ``old``.

    Example:
      >>> ema({"a": jnp.array(1.0)}, {"a": jnp.array(3.0)}, decay=0.5)["a"].item()
      2.0
    """

    def average(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.add(decay * a, (1 - decay) * b).astype(a.dtype)

    result: Tree = jax.tree.map(average, old, new)
    return result
