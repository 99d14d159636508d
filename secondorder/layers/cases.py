"""Which axis of every layer's output counts the cases, and whether a model keeps cases apart.

The outputs of a model are one row per case (example). Curvature of a single case needs to know
which of a layer's positions belong to it, and that no case has a part in the outputs of another.
Both are read off the jaxpr, from its results back: each equation says on which axis of its operands
the cases lie if they lie on a given axis of its result. What all cases use alike is *shared*; a
value that is shared and also cut into cases mixes them, as the mean of a batch normalization does.

Equations that do not depend on the parameters are not looked at, nor are results that derivatives
do not pass: the Jacobian has no part in them. An equation that is not known ends the reading.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from secondorder import jaxprs
from secondorder.layers.discovery import Discovery, FoundUse, Plan, Site


class CaseAxis(NamedTuple):
    """Where the cases lie in an array.

    Attributes:
      axis: The axis.
      outer: Into how many runs of all cases the axis is divided; more than one if the cases were
        merged with an axis before them.
    """

    axis: int
    outer: int = 1


SHARED: Final = "shared"

# Where the cases lie in a value; None for a value that nothing asks for.
Place: TypeAlias = CaseAxis | Literal["shared"] | None


class MixedCasesError(ValueError):
    """The cases of a model cannot be told apart; the message says why, as the end of a sentence."""


class CaseUse(NamedTuple):
    """One use of a weight, with its positions divided by case.

    Attributes:
      found: The use, its leaf and its bias.
      outer: The positions of the use are, in order, ``(outer, cases, inner)``.
    """

    found: FoundUse
    outer: int


_ELEMENTWISE = jaxprs.IDENTITY | frozenset(
    {
        *("abs", "acos", "acosh", "add", "add_any", "asin", "asinh", "atan", "atan2", "atanh"),
        *("cbrt", "ceil", "clamp", "cos", "cosh", "digamma", "div", "erf", "erf_inv", "erfc"),
        *("exp", "exp2", "expm1", "floor", "integer_pow", "lgamma", "log", "log1p", "logistic"),
        *("max", "min", "mul", "neg", "nextafter", "pow", "rem", "round", "rsqrt", "select_n"),
        *("sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh"),
    }
)
_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"})
_CUMULATIVE = frozenset({"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"})
_WINDOWS = frozenset({"reduce_window_max", "reduce_window_min", "reduce_window_sum"})
_CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _require(condition: bool, equation: Any) -> None:
    if not condition:
        raise MixedCasesError(f"`{equation.primitive.name}` acts along the axis of the cases")


def _elementwise(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    """Operands have the axes of the result, of the same size or of one, or have none at all."""
    shape = _shape(equation.outvars[0])
    _require(all(len(_shape(atom)) in (len(shape), 0) for atom in equation.invars), equation)
    return [
        place if _shape(atom)[place.axis : place.axis + 1] == shape[place.axis :][:1] else SHARED
        for atom in equation.invars
    ]


def _all_operands(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    """The first operand keeps its axes; further ones are settings that all cases share."""
    return [place, *[SHARED] * (len(equation.invars) - 1)]  # type: ignore[list-item]


def _restored(axis: int, removed: Sequence[int]) -> int:
    """The axis before others were removed."""
    for other in sorted(removed):
        axis += other <= axis
    return axis


def _reduction(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    axis = _restored(place.axis, equation.params["axes"])
    return [CaseAxis(axis, place.outer)]


def _squeeze(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    ndim = len(_shape(equation.invars[0]))
    removed = [axis % ndim for axis in equation.params["dimensions"]]
    return [CaseAxis(_restored(place.axis, removed), place.outer)]


def _unstack(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    return [CaseAxis(_restored(place.axis, [equation.params["axis"]]), place.outer)]


def _transpose(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    return [CaseAxis(equation.params["permutation"][place.axis], place.outer)]


def _broadcast(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    dims = tuple(equation.params["broadcast_dimensions"])
    if place.axis not in dims:
        return [SHARED]
    axis = dims.index(place.axis)
    whole = _shape(equation.invars[0])[axis] == _shape(equation.outvars[0])[place.axis]
    return [CaseAxis(axis, place.outer) if whole else SHARED]


def _reshape(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    """Follows the cases by how many elements lie before and behind them."""
    _require(equation.params.get("dimensions") is None, equation)
    before = math.prod(_shape(equation.outvars[0])[: place.axis]) * place.outer
    start = 1
    for axis, size in enumerate(_shape(equation.invars[0])):
        if size >= cases and before % start == 0 and (start * size) % (before * cases) == 0:
            return [CaseAxis(axis, before // start)]
        start *= size
    raise MixedCasesError("`reshape` splits the axis of the cases")


def _dot_general(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    contract, batch = equation.params["dimension_numbers"]
    free = [
        [axis for axis in range(len(_shape(atom))) if axis not in (*contract[i], *batch[i])]
        for i, atom in enumerate(equation.invars)
    ]
    shared = len(batch[0])
    if place.axis < shared:
        return [CaseAxis(batch[i][place.axis], place.outer) for i in range(2)]
    index = place.axis - shared
    if index < len(free[0]):
        return [CaseAxis(free[0][index], place.outer), SHARED]
    return [SHARED, CaseAxis(free[1][index - len(free[0])], place.outer)]


def _convolution(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    numbers = equation.params["dimension_numbers"]
    independent = place.axis == numbers.out_spec[0] and equation.params["batch_group_count"] == 1
    _require(independent, equation)
    return [CaseAxis(numbers.lhs_spec[0], place.outer), SHARED]


def _gather(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    """Cases lie in what is looked up, or in the indices, or in a batch axis of both."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    operand = _shape(equation.invars[0])
    if place.axis in numbers.offset_dims:
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        kept = [axis for axis in range(len(operand)) if axis not in gone]
        axis = kept[tuple(numbers.offset_dims).index(place.axis)]
        _require(sizes[axis] == operand[axis], equation)
        return [CaseAxis(axis, place.outer), SHARED]
    ndim = len(_shape(equation.outvars[0]))
    batch = [axis for axis in range(ndim) if axis not in numbers.offset_dims]
    index = batch.index(place.axis)
    looked_up: Place = SHARED
    if index in numbers.start_indices_batching_dims:
        pair = tuple(numbers.start_indices_batching_dims).index(index)
        looked_up = CaseAxis(numbers.operand_batching_dims[pair], place.outer)
    return [looked_up, CaseAxis(index, place.outer)]


def _concatenate(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    _require(equation.params["dimension"] != place.axis, equation)
    return [place] * len(equation.invars)


def _sort(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    _require(equation.params["dimension"] != place.axis, equation)
    return [place] * len(equation.invars)


def _slice(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    whole = _shape(equation.invars[0])[place.axis] == _shape(equation.outvars[0])[place.axis]
    _require(whole, equation)
    return _all_operands(equation, place, cases)


def _pad(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    _require(tuple(equation.params["padding_config"][place.axis]) == (0, 0, 0), equation)
    return _all_operands(equation, place, cases)


def _reverse(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    _require(place.axis not in equation.params["dimensions"], equation)
    return [place]


def _along_axis(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    """Equations that act along the one axis they name."""
    _require(equation.params["axis"] != place.axis, equation)
    return [place]


def _window(equation: Any, place: CaseAxis, cases: int) -> list[Place]:
    params, axis = equation.params, place.axis
    single = params["window_dimensions"][axis] == params["window_strides"][axis] == 1
    _require(single and tuple(params["padding"][axis]) == (0, 0), equation)
    return [place]


_Rule: TypeAlias = Callable[[Any, CaseAxis, int], list[Place]]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_CUMULATIVE, _along_axis),
    **dict.fromkeys(_WINDOWS, _window),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _slice,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "sort": _sort,
    "split": _along_axis,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "unstack": _unstack,
}


def _joined(first: Place, second: Place) -> Place:
    """The place of a value that is asked for twice."""
    if first is None or second is None or first == second:
        return second if first is None else first
    raise MixedCasesError("some value depends on several cases, such as a mean over the batch")


def _differentiable(atom: Any) -> bool:
    return bool(jnp.issubdtype(atom.aval.dtype, jnp.inexact))


class _CaseReader:
    """Reads a jaxpr from its results back, and notes where the cases lie at its sites."""

    def __init__(self, cases: int) -> None:
        self.cases = cases
        self.sites: dict[int, Place] = {}

    def read(
        self, jaxpr: Any, plan: Plan | None, results: Sequence[Place], depends: Sequence[bool]
    ) -> list[Place]:
        """Reads one jaxpr.

        Args:
          jaxpr: An open jaxpr.
          plan: Where its sites are, if it has any.
          results: Where the cases lie in its results.
          depends: Which of its arguments depend on the parameters.

        Returns:
          Where the cases lie in its arguments.
        """
        dependent = _dependent_variables(jaxpr, depends)
        places: dict[Any, Place] = {}

        def note(atom: Any, place: Place) -> None:
            if not jaxprs.is_literal(atom) and atom in dependent and _differentiable(atom):
                places[atom] = _joined(places.get(atom), place)

        for atom, place in zip(jaxpr.outvars, results, strict=True):
            note(atom, place)
        for position, equation in reversed(list(enumerate(jaxpr.eqns))):
            wanted = [places.get(atom) for atom in equation.outvars]
            if all(place is None for place in wanted):
                continue
            entry = plan.entries.get(position) if plan is not None else None
            if isinstance(entry, Site):
                self.sites[entry.index] = wanted[0]
            flags = [not jaxprs.is_literal(a) and a in dependent for a in equation.invars]
            nested = entry if isinstance(entry, Plan) else None
            operands = self.read_equation(equation, nested, wanted, flags)
            for atom, place in zip(equation.invars, operands, strict=True):
                note(atom, place)
        return [places.get(atom) for atom in jaxpr.invars]

    def read_equation(
        self, equation: Any, plan: Plan | None, wanted: Sequence[Place], depends: Sequence[bool]
    ) -> list[Place]:
        """Where the cases lie in the operands of an equation."""
        name = equation.primitive.name
        body = _body_of(equation)
        if body is not None and name == jaxprs.SCAN:
            return self.read_scan(equation, body, plan, wanted, depends)
        if body is not None and len(body.invars) == len(equation.invars):
            return self.read(body, plan, wanted, depends)
        if name == "stop_gradient":
            return [None] * len(equation.invars)
        place: Place = None
        for other in wanted:
            place = _joined(place, other)
        if not isinstance(place, CaseAxis):
            return [place] * len(equation.invars)
        rule = _RULES.get(name)
        if rule is None:
            raise MixedCasesError(f"`{name}` is not known to keep cases apart")
        return rule(equation, place, self.cases)

    def read_scan(
        self,
        equation: Any,
        body: Any,
        plan: Plan | None,
        wanted: Sequence[Place],
        depends: Sequence[bool],
    ) -> list[Place]:
        """Reads the body of a scan until the places in its carry are the same in and out."""
        arity = jaxprs.scan_arity(equation, body)
        end = arity.consts + arity.carry
        flags = [d or arity.consts <= i < end for i, d in enumerate(depends)]
        carry, stacked = list(wanted[: arity.carry]), [_inside(p) for p in wanted[arity.carry :]]
        while True:
            arguments = self.read(body, plan, [*carry, *stacked], flags)
            before = arguments[arity.consts : end]
            joined = [_joined(a, b) for a, b in zip(carry, before, strict=True)]
            if joined == carry:
                scanned = [_outside(place) for place in arguments[end:]]
                return [*arguments[: arity.consts], *carry, *scanned]
            carry = joined


def _dependent_variables(jaxpr: Any, depends: Sequence[bool]) -> set[Any]:
    """The variables of a jaxpr that depend on the parameters."""
    found = {atom for atom, flag in zip(jaxpr.invars, depends, strict=True) if flag}
    for equation in jaxpr.eqns:
        if any(not jaxprs.is_literal(atom) and atom in found for atom in equation.invars):
            found.update(equation.outvars)
    return found


def _body_of(equation: Any) -> Any:
    """The open jaxpr inside an equation, those with derivative rules of their own included."""
    body = jaxprs.body_of(equation)
    if body is not None:
        return body.jaxpr
    if equation.primitive.name not in _CUSTOM_RULES:
        return None
    inner = equation.params.get("call_jaxpr") or equation.params.get("fun_jaxpr")
    return getattr(inner, "jaxpr", inner)


def _inside(place: Place) -> Place:
    """The place in one step of a scan of what it stacks."""
    if not isinstance(place, CaseAxis):
        return place
    if place.axis == 0:
        raise MixedCasesError("a `scan` goes over the cases")
    return CaseAxis(place.axis - 1, place.outer)


def _outside(place: Place) -> Place:
    """The place outside a scan of what it takes apart."""
    return CaseAxis(place.axis + 1, place.outer) if isinstance(place, CaseAxis) else place


def divide_by_case(discovery: Discovery, cases: int, arguments: int) -> tuple[CaseUse, ...]:
    """Divides the positions of all uses of weights by case.

    Args:
      discovery: A traced model, whose only result has the cases on its first axis.
      cases: Their number.
      arguments: How many of the first arguments of the trace are parameters.

    Returns:
      The uses that the result depends on.

    Raises:
      MixedCasesError: If the outputs of some case depend on others, or that cannot be excluded.
    """
    if cases == 1:
        return tuple(CaseUse(found, 1) for found in discovery.uses)
    jaxpr = discovery.jaxpr.jaxpr
    reader = _CaseReader(cases)
    depends = [i < arguments for i in range(len(jaxpr.invars))]
    reader.read(jaxpr, discovery.plan, [CaseAxis(0)], depends)
    shapes = {site.index: (*site.lengths, *site.aval.shape) for site in discovery.plan.sites()}
    return tuple(
        CaseUse(found, _outer(found, place, shapes[found.use.site]))
        for found in discovery.uses
        if (place := reader.sites.get(found.use.site)) is not None
    )


def _outer(found: FoundUse, place: CaseAxis | str, shape: Sequence[int]) -> int:
    """The number of runs of all cases in the positions of a use."""
    axes = found.use.output_axes
    if not isinstance(place, CaseAxis):
        raise MixedCasesError("a layer is applied to what all cases share")
    axis = place.axis + len(found.use.scanned)
    if axis not in axes.positions:
        raise MixedCasesError("a layer has a weight of its own for each case")
    before = axes.positions[: axes.positions.index(axis)]
    return math.prod(shape[other] for other in before) * place.outer


def keeps_classes_apart(loss: Any, outputs: Any) -> bool:
    """Whether each derivative of a loss depends on outputs at the same place of the last axis.

    The Hessian of the loss within a case is diagonal then, as that of a squared error, or of a
    cross entropy for each pixel. It is read off the jaxpr of the gradient: where that holds an
    equation that is not known, the answer is no.

    Args:
      loss: Maps the outputs to a scalar.
      outputs: One array ``(..., C)``, or its abstract form.

    Returns:
      A plain boolean.

    Example:
      >>> import jax
      >>> z = jnp.ones((4, 3))
      >>> keeps_classes_apart(lambda z: jnp.mean(z**2), z)
      True
      >>> keeps_classes_apart(lambda z: -jnp.mean(jax.nn.log_softmax(z)[:, 0]), z)
      False
    """
    if outputs.shape[-1] == 1:
        return True
    jaxpr = jax.make_jaxpr(jax.grad(loss))(outputs).jaxpr
    reader = _CaseReader(outputs.shape[-1])
    try:
        reader.read(jaxpr, None, [CaseAxis(len(outputs.shape) - 1)], [True])
    except MixedCasesError:
        return False
    return True
