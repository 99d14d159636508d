"""Splits the damping of a layer between its two Kronecker factors."""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

DampingSplit: TypeAlias = Literal["sqrtT", "plain", "trace"]


def split_damping(
    damping: ArrayLike,
    rule: DampingSplit = "sqrtT",
    *,
    positions: ArrayLike = 1,
    input_mean_eigenvalue: ArrayLike | None = None,
    output_mean_eigenvalue: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns ``λ_A, λ_G`` with ``λ_A λ_G = λ``, for ``(A + λ_A I) ⊗ (G + λ_G I)``.

    With a balance ``π``: ``λ_A = π √λ`` and ``λ_G = √λ / π``, where

    * ``"plain"``: ``π = 1``;
    * ``"sqrtT"``: ``π = √T``, as ``A`` is a sum over the ``T`` positions of a layer and ``G`` a
      mean; the same as ``"plain"`` for a dense layer;
    * ``"trace"``: ``π² = (tr A / i) / (tr G / o)``, which damps both factors alike relative to
      their mean eigenvalues; ``π = 1`` where either is not positive and finite.

    Args:
      damping: ``λ``, positive.
      rule: how to choose the balance, static.
      positions: ``T``, number of positions at which the layer is applied to one example, at least
        1; used by ``"sqrtT"``.
      input_mean_eigenvalue: ``tr A / i``; used by ``"trace"``.
      output_mean_eigenvalue: ``tr G / o``; used by ``"trace"``.

    Returns:
      Scalars ``λ_A`` and ``λ_G``.

    Raises:
      ValueError: if ``rule`` is not one of the names, or is ``"trace"`` without both eigenvalues.

    Example:
      >>> [float(x) for x in split_damping(0.25, positions=16)]
      [2.0, 0.125]
      >>> [float(x) for x in split_damping(0.25, "plain", positions=16)]
      [0.5, 0.5]

    Source: ``"plain"``: Goldfarb, Ren, Bahamou (2020), arXiv 2006.08877. ``"sqrtT"``: Ren, Bahamou,
    Goldfarb (2021), arXiv 2102.06737. ``"trace"``: Martens, Grosse (2015), arXiv 1503.05671,
    section 6.3.
    """
    if rule not in get_args(DampingSplit):
        raise ValueError(f"rule must be one of {get_args(DampingSplit)}, got {rule!r}")
    balance: ArrayLike = 1.0
    if rule == "sqrtT":
        balance = jnp.sqrt(positions)
    elif rule == "trace":
        if input_mean_eigenvalue is None or output_mean_eigenvalue is None:
            raise ValueError("rule='trace' needs input_mean_eigenvalue and output_mean_eigenvalue")
        balance = _trace_balance(input_mean_eigenvalue, output_mean_eigenvalue)
    root = jnp.sqrt(damping)
    return root * balance, root / balance


def _trace_balance(input_eigenvalue: ArrayLike, output_eigenvalue: ArrayLike) -> jax.Array:
    """Returns the square root of the ratio, or 1 where the ratio means nothing."""
    balance = jnp.sqrt(input_eigenvalue) / jnp.sqrt(output_eigenvalue)  # NaN for a negative trace
    return jnp.where(jnp.isfinite(balance) & (balance > 0), balance, 1)
