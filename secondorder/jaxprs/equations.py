"""Reading and re-evaluating jaxprs through public JAX names only.

The rest of the room never touches an equation's parameters directly where their spelling differs
between JAX versions; those differences end here.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex_core

# Higher-order primitives whose body computes, and differentiates to, just what an inlined body
# would; not so functions with derivative rules of their own.
INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
REMAT = frozenset({"checkpoint", "remat", "remat2"})
SCAN = "scan"
# Primitives that return their first operand's elements where they were.
IDENTITY = frozenset(
    {
        "convert_element_type",
        "copy",
        "copy_p",
        "device_put",
        "name",
        "optimization_barrier",
        "pcast",
        "pvary",
        "reduce_precision",
        "reshard",
        "sharding_constraint",
        "mesh_cast",
    }
)


@dataclasses.dataclass(frozen=True)
class Body:
    """The jaxpr inside a higher-order equation, with its captured constants."""

    jaxpr: jex_core.Jaxpr
    consts: Sequence[Any]


def body_of(equation: Any) -> Body | None:
    """The body of a call, rematerialized call or scan; None for every other equation."""
    name = equation.primitive.name
    if name != SCAN and name not in INLINED and name not in REMAT:
        return None
    inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
    if inner is None or not hasattr(inner, "consts"):
        return None if inner is None else Body(inner, ())
    return Body(getattr(inner, "jaxpr", inner), tuple(inner.consts))


@dataclasses.dataclass(frozen=True)
class ScanArity:
    """How the operands of a scan divide: constants, carry, and (the rest) scanned operands."""

    consts: int
    carry: int


def scan_arity(equation: Any, body: Any) -> ScanArity:
    """Divides a scan's operands by rank.

    The equation's parameters name this division differently in each JAX version, ranks do not: a
    scanned operand has one axis more outside than inside, a carry has the same shape.
    """
    carry = sum(
        outer.aval.ndim == inner.aval.ndim
        for outer, inner in zip(equation.outvars, body.outvars, strict=True)
    )
    scanned = sum(
        outer.aval.ndim == inner.aval.ndim + 1
        for outer, inner in zip(equation.invars, body.invars, strict=True)
    )
    return ScanArity(len(equation.invars) - carry - scanned, carry)


def divide_operands(
    equation: Any, body: Any, operands: Sequence[Any]
) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """The operands of a scan: constants, carry, and scanned ones."""
    arity = scan_arity(equation, body)
    end = arity.consts + arity.carry
    return operands[: arity.consts], operands[arity.consts : end], operands[end:]


def is_literal(atom: Any) -> bool:
    """Whether an operand is written into the equation instead of being a variable."""
    return isinstance(atom, jex_core.Literal)


def run_equation(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on the given operands, keeping its differentiation rules.

    A one-equation jaxpr is evaluated, so no calling convention of a primitive is touched.
    """
    values = {
        atom: value
        for atom, value in zip(equation.invars, operands, strict=True)
        if not is_literal(atom)
    }
    names = _debug_info(len(values), len(equation.outvars))
    jaxpr = jex_core.Jaxpr((), list(values), equation.outvars, [equation], equation.effects, names)
    closed = jex_core.ClosedJaxpr(jaxpr, ())  # type: ignore[attr-defined]
    return list(jex_core.jaxpr_as_fun(closed)(*values.values()))


def evaluate(
    jaxpr: Any,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    run: Callable[[int, Any, Sequence[Any]], Sequence[Any]],
) -> list[Any]:
    """Evaluates a jaxpr, its equations by a function of their position, themselves and operands."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else values[atom]

    for position, equation in enumerate(jaxpr.eqns):
        operands = [read(atom) for atom in equation.invars]
        values.update(zip(equation.outvars, run(position, equation, operands), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


@functools.cache
def _debug_info(arguments: int, results: int) -> Any:
    """What JAX wants to know of a jaxpr's arguments and results, copied from one with as many."""
    return jax.make_jaxpr(lambda *_: [0.0] * results)(*[0.0] * arguments).jaxpr.debug_info


def rematerialized(equation: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function in `jax.checkpoint` with the settings of a rematerialized call."""
    return jax.checkpoint(
        function,
        policy=equation.params.get("policy"),
        prevent_cse=equation.params.get("prevent_cse", True),
    )


def rescan(
    equation: Any, body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, scanned: Any
) -> tuple[Any, Any]:
    """Runs `jax.lax.scan` over another body with the settings of a scan equation."""
    return jax.lax.scan(
        body,
        carry,
        scanned,
        length=equation.params["length"],
        reverse=equation.params["reverse"],
        unroll=equation.params["unroll"],
    )
