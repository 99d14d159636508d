r"""Losses whose curvature is that of a softmax cross entropy, recognized by what they compute.

The log-partition function of a row of logits is :math:`\log \sum_j e^{z_j}`. A loss that is linear
in the logits and in the log-partition functions of their rows has the Hessian of these, times a
number for each row, whatever the targets are: integers, probabilities, smoothed or masked.
"""

import enum
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from secondorder.jaxprs.equations import IDENTITY, SCAN, body_of, is_literal


class _Kind(enum.Enum):
    """What a value is as a function of the logits."""

    CONSTANT = enum.auto()  # does not depend on them
    DETACHED = enum.auto()  # depends on them, but has no derivative
    LINEAR = enum.auto()  # in the logits and their log-partition functions
    LOGITS = enum.auto()  # the rows themselves, each less a constant
    EXPONENTIALS = enum.auto()  # of these rows
    PARTITIONS = enum.auto()  # the sums of the exponentials, one for each row
    OTHER = enum.auto()


_Rule: TypeAlias = Callable[[Any, Sequence[_Kind], int], _Kind]
_LINEAR = frozenset({_Kind.LINEAR, _Kind.LOGITS})
_UNMOVED = frozenset({_Kind.CONSTANT, _Kind.DETACHED})
_REARRANGED = frozenset({"broadcast_in_dim", "reshape", "squeeze", "transpose"})
_LINEAR_MAPS = frozenset(
    {
        *("concatenate", "cumsum", "dynamic_slice", "gather", "neg", "pad", "rev", "select_n"),
        *("slice", "split"),
    }
)


def is_log_partition_loss(loss: Callable[[Any], jax.Array], outputs: Any) -> bool:
    r"""Whether a loss is linear in its arguments and the log-partition functions of their rows.

    .. math:: \ell(z) = \sum_n \Big(w_n \log \sum_j e^{z_{nj}} - t_n^\top z_n\Big) + \text{const},

    so that :math:`\nabla^2 \ell` is :math:`w_n (\mathrm{diag}(p_n) - p_n p_n^\top)` for each row,
    with :math:`p_n = \mathrm{softmax}(z_n)`. It is read off the jaxpr: where an equation is not
    known to keep that form, the answer is no.

    Args:
      loss: Maps the outputs to a scalar.
      outputs: One array ``(..., C)`` of logits, or its abstract form.

    Returns:
      A plain boolean.

    Example:
      >>> z = jnp.ones((4, 3))
      >>> is_log_partition_loss(lambda z: -jnp.mean(jax.nn.log_softmax(z)[:, 0]), z)
      True
      >>> is_log_partition_loss(lambda z: jnp.mean(z**2), z)
      False
    """
    if outputs.shape[-1] == 1:
        return False
    closed = jax.make_jaxpr(loss)(outputs)
    (kind,) = _read(closed.jaxpr, [_Kind.LOGITS], outputs.shape[-1])
    return kind in _LINEAR


def _read(jaxpr: Any, arguments: Sequence[_Kind], classes: int) -> list[_Kind]:
    """The kinds of a jaxpr's results."""
    kinds = dict(zip(jaxpr.invars, arguments, strict=True))

    def kind_of(atom: Any) -> _Kind:
        return _Kind.CONSTANT if is_literal(atom) else kinds.get(atom, _Kind.CONSTANT)

    for equation in jaxpr.eqns:
        found = _read_equation(equation, [kind_of(atom) for atom in equation.invars], classes)
        kinds.update(zip(equation.outvars, found, strict=True))
    return [kind_of(atom) for atom in jaxpr.outvars]


def _read_equation(equation: Any, operands: Sequence[_Kind], classes: int) -> list[_Kind]:
    """The kinds of an equation's results."""
    name, count = equation.primitive.name, len(equation.outvars)
    if all(kind is _Kind.CONSTANT for kind in operands):
        return [_Kind.CONSTANT] * count
    differentiable = any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.outvars)
    if name == "stop_gradient" or not differentiable or _UNMOVED.issuperset(operands):
        return [_Kind.DETACHED] * count
    body = body_of(equation)
    if body is not None and name != SCAN:
        return _read(body.jaxpr, operands, classes)
    return [_RULES.get(name, _other)(equation, operands, classes)] * count


def _other(equation: Any, operands: Sequence[_Kind], classes: int) -> _Kind:
    return _Kind.OTHER


def _linear(equation: Any, operands: Sequence[_Kind], classes: int) -> _Kind:
    """Linear, with coefficients that must be constant, in all operands at once."""
    known = all(kind in _LINEAR or kind is _Kind.CONSTANT for kind in operands)
    return _Kind.LINEAR if known else _Kind.OTHER


def _rearranged(equation: Any, operands: Sequence[_Kind], classes: int) -> _Kind:
    """Rows stay rows where the last axis does, and their sums are one by one what they are."""
    if len(operands) > 1:
        return _linear(equation, operands, classes)
    (kind,) = operands
    if kind is _Kind.PARTITIONS or (kind is not _Kind.LINEAR and _keeps_rows(equation, classes)):
        return kind
    return _linear(equation, operands, classes)


def _keeps_rows(equation: Any, classes: int) -> bool:
    """Whether the last axis of the operand is also that of the result."""
    before, after = (v.aval.shape for v in (equation.invars[0], equation.outvars[0]))
    if before[-1:] != (classes,) or after[-1:] != (classes,):
        return False
    if equation.primitive.name == "transpose":
        return bool(equation.params["permutation"][-1] == len(before) - 1)
    if equation.primitive.name == "broadcast_in_dim":
        return bool(equation.params["broadcast_dimensions"][-1] == len(after) - 1)
    return True


def _sum(equation: Any, operands: Sequence[_Kind], classes: int) -> _Kind:
    """Of two terms; what has no derivative changes nothing, and leaves rows if it is one number."""
    moved = [kind for kind in operands if kind not in _UNMOVED]
    if operands[0] is _Kind.LOGITS and len(moved) == 1 and _is_per_row(equation.invars[1]):
        return _Kind.LOGITS
    return _linear(equation, moved, classes)


def _is_per_row(atom: Any) -> bool:
    """Whether an operand has one number for a row, or one for all."""
    return atom.aval.shape[-1:] in ((), (1,))


def _product(equation: Any, operands: Sequence[_Kind], classes: int) -> _Kind:
    """Linear in one operand; all others must be constant."""
    factor, *others = [kind for kind in operands if kind is not _Kind.CONSTANT]
    return _Kind.OTHER if others else _linear(equation, [factor], classes)


def _quotient(equation: Any, operands: Sequence[_Kind], classes: int) -> _Kind:
    numerator, denominator = operands
    if denominator is not _Kind.CONSTANT:
        return _Kind.OTHER
    return _linear(equation, [numerator], classes)


def _exponential(equation: Any, operands: Sequence[_Kind], classes: int) -> _Kind:
    return _Kind.EXPONENTIALS if operands[0] is _Kind.LOGITS else _Kind.OTHER


def _absolute(equation: Any, operands: Sequence[_Kind], classes: int) -> _Kind:
    """Of a sum of exponentials, as `jax.nn.logsumexp` takes it, nothing happens."""
    return _Kind.PARTITIONS if operands[0] is _Kind.PARTITIONS else _Kind.OTHER


def _logarithm(equation: Any, operands: Sequence[_Kind], classes: int) -> _Kind:
    return _Kind.LINEAR if operands[0] is _Kind.PARTITIONS else _Kind.OTHER


def _reduced(equation: Any, operands: Sequence[_Kind], classes: int) -> _Kind:
    last = len(equation.invars[0].aval.shape) - 1
    if operands[0] is _Kind.EXPONENTIALS and tuple(equation.params["axes"]) == (last,):
        return _Kind.PARTITIONS
    return _linear(equation, operands, classes)


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_LINEAR_MAPS, _linear),
    **dict.fromkeys(_REARRANGED | IDENTITY, _rearranged),
    "abs": _absolute,
    "add": _sum,
    "div": _quotient,
    "dot_general": _product,
    "exp": _exponential,
    "log": _logarithm,
    "mul": _product,
    "reduce_sum": _reduced,
    "sub": _sum,
}
