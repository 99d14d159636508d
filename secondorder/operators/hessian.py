r"""The Hessian of any scalar objective, :math:`\nabla^2 f(\theta)`, by three ways to a product."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder.checks import check_choice
from secondorder.jaxprs import canonical_convolutions
from secondorder.objective import Microbatches, value_and_aux
from secondorder.operators.linear_operator import LinearOperator, narrow, vectors_like, widen
from secondorder.operators.pieces import columns_with_samples, over_pieces
from secondorder.solvers import BlockProduct, Images, without_samples
from secondorder.tree import inner

HessianMode: TypeAlias = Literal[
    "forward_over_reverse", "reverse_over_reverse", "central_difference"
]
Gradient: TypeAlias = Callable[[chex.ArrayTree], chex.ArrayTree]


def hessian(
    value_fn: Callable[[Any], Any],
    params: chex.ArrayTree,
    mode: HessianMode = "forward_over_reverse",
) -> LinearOperator:
    r"""The Hessian of an objective; indefinite in general.

    The gradient is differentiated once, outside of the product: a product repeats nothing of the
    forward pass. Only differences evaluate two gradients each time.

    Args:
      value_fn: Maps parameters to a scalar, or to ``(scalar, aux)``; an `Objective`, `Microbatches`
        or any callable.
      params: The point, a pytree of arrays.
      mode: ``"forward_over_reverse"`` linearizes the gradient, the cheapest.
        ``"reverse_over_reverse"`` pulls back through it, for gradients of operations that have only
        a `jax.custom_vjp`. ``"central_difference"`` is for gradients that cannot be differentiated
        at all. It has about two thirds of the digits of the parameters' dtype.

    Returns:
      The operator on vectors like the parameters, float32 or wider.

    Raises:
      TypeError: If the value is not one real scalar.
      ValueError: If ``mode`` is none of the three.

    Example:
      >>> hessian(lambda p: p[0] ** 2 * p[1], jnp.array([1.0, 3.0])).as_matrix().tolist()
      [[6.0, 2.0], [2.0, 0.0]]

    Source: Pearlmutter (1994), Fast exact multiplication by the Hessian, Neural Computation 6.
    """
    return over_pieces(_maker(params, mode), value_fn, params)


def hessian_on_stacks(
    value_fn: Callable[[Any], Any],
    params: chex.ArrayTree,
    mode: HessianMode = "forward_over_reverse",
    *,
    chunk_size: int | None = None,
    with_samples: bool = False,
) -> BlockProduct:
    r"""The Hessian as it multiplies several vectors at once, for eigensolvers.

    Args:
      value_fn: Maps parameters to a scalar, or to ``(scalar, aux)``.
      params: The point, a pytree of arrays.
      mode: See `hessian`.
      chunk_size: How many vectors are multiplied at a time; see `LinearOperator.columns`.
      with_samples: Whether the pieces of `Microbatches` are the samples of the images.

    Returns:
      The product, linearized once for all vectors; of `Microbatches` once in each call.

    Raises:
      TypeError: If samples are wanted and the objective has no pieces.

    Example:
      >>> product = hessian_on_stacks(lambda p: p[0] ** 2 * p[1], jnp.array([1.0, 3.0]))
      >>> product(jnp.eye(2)).vectors.tolist()
      [[6.0, 2.0], [2.0, 0.0]]
    """
    if not with_samples:
        operator = hessian(value_fn, params, mode)
        return without_samples(lambda stack: operator.columns(stack, chunk_size))
    if not isinstance(value_fn, Microbatches):
        raise TypeError(
            "Samples of the Hessian are those on the pieces of an objective; write "
            "Microbatches.split(objective_on, batch, size)."
        )
    make = _maker(params, mode)
    return lambda stack: Images(*columns_with_samples(make, value_fn, params, stack, chunk_size))


def _maker(params: chex.ArrayTree, mode: HessianMode) -> Callable[[Any, Any], LinearOperator]:
    """From an objective without pieces to its Hessian."""
    check_choice("mode", mode, tuple(_PRODUCTS))

    def make(piece: Callable[[Any], Any], _: chex.Numeric) -> LinearOperator:
        gradient = canonical_convolutions(jax.grad(lambda at: value_and_aux(piece)(at)[0]))
        return LinearOperator(_PRODUCTS[mode](gradient, params), vectors_like(params))

    return make


def _forward_over_reverse(gradient: Gradient, params: chex.ArrayTree) -> Gradient:
    """The product from the linearized gradient."""
    push = jax.linearize(gradient, params)[1]
    return lambda vector: widen(push(narrow(vector, params)))


def _reverse_over_reverse(gradient: Gradient, params: chex.ArrayTree) -> Gradient:
    """The product from the transpose of the linearized gradient, which is symmetric."""
    pull = canonical_convolutions(jax.vjp(gradient, params)[1])
    return lambda vector: widen(pull(narrow(vector, params))[0])


def _central_difference(gradient: Gradient, params: chex.ArrayTree) -> Gradient:
    r"""The product :math:`(\nabla f(\theta + h v) - \nabla f(\theta - h v)) / 2 h`.

    Rounding errs by :math:`\epsilon / h` and truncation by :math:`h^2`, so the relative step is the
    cube root of the machine precision.
    """
    relative = max(_precision(p.dtype) for p in jax.tree.leaves(params)) ** (1 / 3)
    wide = widen(params)
    reach = relative * (1 + jnp.sqrt(inner(wide, wide)))

    def product(vector: chex.ArrayTree) -> chex.ArrayTree:
        norm = jnp.sqrt(inner(vector, vector))
        # The product with the zero vector is exactly zero: both gradients are the same.
        step = reach / jnp.where(norm > 0, norm, 1)

        def gradient_at(signed: jax.Array) -> chex.ArrayTree:
            moved = jax.tree.map(lambda p, v: p + (signed * v).astype(p.dtype), wide, vector)
            return widen(gradient(narrow(moved, params)))

        ahead, behind = gradient_at(step), gradient_at(-step)
        return jax.tree.map(lambda a, b: ((a - b) / (2 * step)).astype(a.dtype), ahead, behind)

    return product


def _precision(dtype: jnp.dtype) -> float:
    """The machine precision of a dtype, bfloat16 included."""
    return float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]


_PRODUCTS: dict[str, Callable[[Gradient, chex.ArrayTree], Gradient]] = {
    "forward_over_reverse": _forward_over_reverse,
    "reverse_over_reverse": _reverse_over_reverse,
    "central_difference": _central_difference,
}
