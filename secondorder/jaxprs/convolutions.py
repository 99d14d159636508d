"""Convolutions whose axes are in the one order that every part of a compiled program runs fast.

XLA has fast convolutions on CPUs for one order, ``NHWC`` with kernels ``HWIO``. It brings others to
it, but only where they stand in the program itself: inside a loop or a branch they run about ten
times slower. Derivatives of convolutions have other orders, and methods evaluate them in loops and
branches. So the order is made here.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from secondorder.jaxprs.equations import (
    REMAT,
    SCAN,
    Body,
    body_of,
    divide_operands,
    evaluate,
    rematerialized,
    rescan,
    run_equation,
)

Result = TypeVar("Result")

_CONVOLUTION = "conv_general_dilated"
_KEPT = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "feature_group_count",
    "batch_group_count",
    "precision",
    "preferred_element_type",
)


def canonical_convolutions(function: Callable[..., Result]) -> Callable[..., Result]:
    """The same function, with all its convolutions from ``NHWC`` and ``HWIO`` to ``NHWC``.

    Operands are transposed before and results after; on accelerators, where the compiler chooses
    layouts itself, that costs nothing. Those in calls, rematerialized calls and scans are found;
    loops, branches and functions with derivative rules of their own stay as they are.

    Args:
      function: Of pytrees of arrays, to a pytree of arrays.

    Returns:
      A function of the same arguments.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> convolve = lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME")  # NCHW
      >>> canonical = canonical_convolutions(convolve)
      >>> jaxpr = jax.make_jaxpr(canonical)(jnp.ones((1, 3, 5, 5)), jnp.ones((2, 3, 3, 3))).jaxpr
      >>> [equation.primitive.name for equation in jaxpr.eqns]
      ['transpose', 'transpose', 'conv_general_dilated', 'transpose']
    """

    def canonical(*args: Any) -> Result:
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        if _has_others(jaxpr.jaxpr):
            outputs = _evaluate(Body(jaxpr.jaxpr, jaxpr.consts), leaves)
        else:
            outputs = jex_core.jaxpr_as_fun(jaxpr)(*leaves)
        result: Result = jax.tree.unflatten(jax.tree.structure(shape), outputs)
        return result

    return canonical


def _has_others(jaxpr: Any) -> bool:
    """Whether a convolution of another order can be reached."""
    return any(_is_other(equation) or _holds_others(equation) for equation in jaxpr.eqns)


def _is_other(equation: Any) -> bool:
    """Whether an equation is a convolution of another order."""
    if equation.primitive.name != _CONVOLUTION:
        return False
    given = tuple(equation.params["dimension_numbers"])
    return given != tuple(_canonical_numbers(equation.invars[0].aval.ndim))


def _holds_others(equation: Any) -> bool:
    """Whether the body of an equation has convolutions of another order."""
    body = body_of(equation)
    return body is not None and _has_others(body.jaxpr)


def _evaluate(body: Body, arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr equation by equation, convolutions in their canonical order."""
    return evaluate(body.jaxpr, body.consts, arguments, lambda _, *equation: _run(*equation))


def _run(equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """Evaluates one equation."""
    if _is_other(equation):
        return [_convolve(equation, *operands)]
    if not _holds_others(equation):
        return run_equation(equation, operands)
    body = body_of(equation)
    assert body is not None
    if equation.primitive.name == SCAN:
        return _scan(equation, body, operands)

    def inlined(*operands: Any) -> list[Any]:
        return _evaluate(body, operands)

    run = rematerialized(equation, inlined) if equation.primitive.name in REMAT else inlined
    outputs: Sequence[Any] = run(*operands)
    return outputs


def _scan(equation: Any, body: Body, operands: Sequence[Any]) -> Sequence[Any]:
    consts, carry, scanned = divide_operands(equation, body.jaxpr, operands)

    def step(present: Any, scanned: Any) -> Any:
        outputs = _evaluate(body, [*consts, *present, *scanned])
        return outputs[: len(carry)], outputs[len(carry) :]

    last, stacked = rescan(equation, step, list(carry), list(scanned))
    return [*last, *stacked]


def _convolve(equation: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A convolution between transpositions."""
    given, canonical = equation.params["dimension_numbers"], _canonical_numbers(lhs.ndim)
    result = jax.lax.conv_general_dilated(
        _reorder(lhs, given.lhs_spec, canonical.lhs_spec),
        _reorder(rhs, given.rhs_spec, canonical.rhs_spec),
        dimension_numbers=canonical,
        **{name: equation.params[name] for name in _KEPT},
    )
    return _reorder(result, canonical.out_spec, given.out_spec)


def _canonical_numbers(ndim: int) -> jax.lax.ConvDimensionNumbers:
    """Batch, space, features; kernels are space, features in, features out."""
    space = tuple(range(1, ndim - 1))
    features_last = (0, ndim - 1, *space)
    kernel = (ndim - 1, ndim - 2, *(axis - 1 for axis in space))
    return jax.lax.ConvDimensionNumbers(features_last, kernel, features_last)


def _reorder(array: jax.Array, given: Sequence[int], wanted: Sequence[int]) -> jax.Array:
    """Moves the axes with the meanings of one order to where another has them."""
    order = [0] * array.ndim
    for source, target in zip(given, wanted, strict=True):
        order[target] = source
    return jnp.transpose(array, order)
