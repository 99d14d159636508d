"""Second moments of stacked tensors along one axis, and products along it."""

import string

import jax
import jax.numpy as jnp

from secondorder.products import HIGHEST

_STACK, _NEW = "Z", "Y"  # letters of an einsum that no axis of a tensor has


def _letters(stack: jax.Array) -> str:
    return string.ascii_lowercase[: stack.ndim - 1]


def mode_moment(stack: jax.Array, axis: int) -> jax.Array:
    r"""The second moments :math:`X_{(i)} X_{(i)}^\top` of tensors unfolded along one axis.

    Args:
      stack: Tensors (S, ...), float32 or wider.
      axis: Which axis ``i`` of each, of length ``n``.

    Returns:
      Matrices (S, n, n), at full precision.

    Example:
      >>> mode_moment(jnp.array([[[1.0, 2.0]]]), 1).tolist()
      [[[1.0, 2.0], [2.0, 4.0]]]

    Source: Gupta, Koren, Singer (2018), arXiv 1802.09568, section 4.
    """
    letters = _letters(stack)
    other = letters.replace(letters[axis], _NEW)
    result = _STACK + letters[axis] + _NEW
    return jnp.einsum(
        f"{_STACK}{letters},{_STACK}{other}->{result}", stack, stack, precision=HIGHEST
    )


def mode_product(stack: jax.Array, matrices: jax.Array, axis: int) -> jax.Array:
    r"""The products of tensors with matrices along one axis, :math:`(M^\top X)_{(i)}`.

    Args:
      stack: Tensors (S, ...), whose axis ``i`` has the length ``n``.
      matrices: (S, n, m).
      axis: Which axis ``i``.

    Returns:
      Tensors (S, ...), whose axis ``i`` has the length ``m``, at full precision.

    Example:
      >>> mode_product(jnp.array([[[1.0, 2.0]]]), jnp.array([[[3.0], [4.0]]]), 1).tolist()
      [[[11.0]]]

    Source: Gupta, Koren, Singer (2018), arXiv 1802.09568, section 4.
    """
    letters = _letters(stack)
    result = letters.replace(letters[axis], _NEW)
    matrix = _STACK + letters[axis] + _NEW
    return jnp.einsum(
        f"{_STACK}{letters},{matrix}->{_STACK}{result}", stack, matrices, precision=HIGHEST
    )
