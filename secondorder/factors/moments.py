"""Second moments of layer inputs, their running averages and damped inverses."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jax.typing import ArrayLike

from secondorder.factors.bfgs import symmetrize
from secondorder.factors.products import matmul

Tree = TypeVar("Tree")


def second_moment(inputs: jax.Array, batch_size: ArrayLike) -> jax.Array:
    """Returns ``A = (1/m) Σ a aᵀ``, the sum over all rows and the mean over examples.

    A layer used at several positions (a convolution, a sequence) has more rows than examples: the
    sum over its positions is meant.

    Args:
      inputs: layer inputs ``a`` as rows (C, i), ``C`` examples times positions, any float dtype.
      batch_size: number of examples ``m``, positive.

    Returns:
      Matrix (i, i), float32 or wider.

    Example:
      >>> second_moment(jnp.array([[1.0, 0.0], [1.0, 2.0]]), batch_size=2).tolist()
      [[1.0, 1.0], [1.0, 2.0]]

    Source: Ren, Bahamou, Goldfarb (2021), arXiv 2102.06737; one position per example is the dense
    case of Goldfarb, Ren, Bahamou (2020), arXiv 2006.08877.
    """
    rows = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    return jnp.divide(matmul(rows.T, rows), batch_size)


def append_one(inputs: jax.Array) -> jax.Array:
    """Appends the homogeneous coordinate 1 that carries a bias.

    Args:
      inputs: layer inputs (..., i).

    Returns:
      Array (..., i + 1) of the same dtype.

    Example:
      >>> append_one(jnp.array([[2.0, 3.0]])).tolist()
      [[2.0, 3.0, 1.0]]
    """
    return jnp.concatenate([inputs, jnp.ones_like(inputs[..., :1])], axis=-1)


def damped_inverse(matrix: jax.Array, damping: ArrayLike) -> jax.Array:
    """Returns ``(M + λI)⁻¹`` by Cholesky factorization.

    Args:
      matrix: symmetric positive semidefinite matrix (n, n), float32 or wider.
      damping: ``λ``, positive.

    Returns:
      Matrix (n, n), exactly symmetric; NaN if ``M + λI`` is not positive definite to rounding.

    Example:
      >>> damped_inverse(jnp.diag(jnp.array([3.0, 15.0])), damping=1.0).tolist()
      [[0.25, 0.0], [0.0, 0.0625]]
    """
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    return symmetrize(cho_solve(cho_factor(matrix + damping * identity), identity))


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
