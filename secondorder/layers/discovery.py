"""Finding the linear layers of an objective in its jaxpr.

The objective is traced and its equations are read once, in order. Knowledge of where values come
from (`provenance`) flows forward through calls, rematerialized calls and scans; equations that
apply a parameter (`matching`) become *sites*, whose results a later evaluation probes.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from secondorder import jaxprs
from secondorder.layers.matching import (
    Application,
    bias_views,
    match_application,
    output_value,
)
from secondorder.layers.provenance import (
    OutputValue,
    ParamValue,
    Provenance,
    enter_scan,
    leaf_value,
    rearranged_output,
    rearranged_param,
)
from secondorder.layers.uses import Use
from secondorder.layers.views import View
from secondorder.objective import check_value


@dataclasses.dataclass(frozen=True)
class Site:
    """A probed equation: which operand to record, and the abstract value of its probe."""

    index: int
    operand: int
    lengths: tuple[int, ...]
    aval: Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sites of one jaxpr, by position of the equation; a nested plan for each body.

    Attributes:
      entries: The sites and nested plans.
      inlined: Whether XLA sees the body as part of what is around it; not so for scans and for
        rematerialized calls.
    """

    entries: dict[int, "Site | Plan"]
    inlined: bool = True

    @property
    def merges(self) -> bool:
        """Whether XLA can merge an evaluation with another one at the same point."""
        nested = [entry for entry in self.entries.values() if isinstance(entry, Plan)]
        return self.inlined and all(plan.merges for plan in nested)

    def sites(self) -> list[Site]:
        """All sites, nested ones included."""
        return [
            site
            for entry in self.entries.values()
            for site in (entry.sites() if isinstance(entry, Plan) else [entry])
        ]


@dataclasses.dataclass(frozen=True)
class FoundUse:
    """A use of a weight, with the bias added to its result."""

    leaf: int
    use: Use
    bias: int | None = None
    bias_view: View | None = None


@dataclasses.dataclass(frozen=True)
class Discovery:
    """A traced objective and the linear layers in it.

    Attributes:
      jaxpr: The closed jaxpr of the objective; its first output is the value.
      plan: Where its sites are.
      uses: Every use of a weight.
      consumers: For each parameter leaf what else it goes into, in words.
    """

    jaxpr: Any
    plan: Plan
    uses: tuple[FoundUse, ...]
    consumers: dict[int, list[str]]


class _Reader:
    """Reads equations in order and collects what it recognizes."""

    def __init__(self) -> None:
        self.applications: list[Application] = []
        self.biases: dict[int, tuple[tuple[int, View], ...]] = {}  # by site
        self.consumers: dict[int, list[str]] = collections.defaultdict(list)

    def consume(self, values: Sequence[Provenance], how: str) -> None:
        """Notes that parameters end in something that is not a layer."""
        for value in values:
            if isinstance(value, ParamValue):
                for piece in value.pieces:
                    self.consumers[piece.leaf].append(how)

    def read(
        self,
        jaxpr: Any,
        values: Sequence[Provenance],
        lengths: tuple[int, ...],
        needed: Sequence[bool],
    ) -> tuple[Plan, list[Provenance]]:
        """Reads one jaxpr.

        Args:
          jaxpr: An open jaxpr.
          values: The provenance of its arguments.
          lengths: Lengths of the scans around it, outermost first.
          needed: Which of its results the value depends on; equations that make only others, such
            as auxiliary outputs, hold no layers.

        Returns:
          Its plan, and the provenance of its results.
        """
        known: dict[Any, Provenance] = dict(zip(jaxpr.invars, values, strict=True))
        times_read = collections.Counter(
            atom
            for atoms in (*(e.invars for e in jaxpr.eqns), jaxpr.outvars)
            for atom in atoms
            if not jaxprs.is_literal(atom)
        )

        def look_up(atom: Any) -> Provenance:
            value = None if jaxprs.is_literal(atom) else known.get(atom)
            # An output that is also needed before its bias is not the output with the bias.
            return None if isinstance(value, OutputValue) and times_read[atom] > 1 else value

        entries: dict[int, Site | Plan] = {}
        live = _live_variables(jaxpr, needed)
        for position, equation in enumerate(jaxpr.eqns):
            needed = [atom in live for atom in equation.outvars]
            if not any(needed):
                continue
            entry, results = self.read_equation(
                equation, [look_up(atom) for atom in equation.invars], lengths, needed
            )
            known.update(zip(equation.outvars, results, strict=True))
            if isinstance(entry, Site) or (entry is not None and entry.entries):
                entries[position] = entry
        return Plan(entries), [look_up(atom) for atom in jaxpr.outvars]

    def read_equation(
        self,
        equation: Any,
        values: Sequence[Provenance],
        lengths: tuple[int, ...],
        needed: Sequence[bool],
    ) -> tuple[Site | Plan | None, list[Provenance]]:
        """Reads one equation: a body, a layer, a bias, a rearrangement, or something else."""
        unknown: list[Provenance] = [None] * len(equation.outvars)
        if not any(values):
            return None, unknown
        body = jaxprs.body_of(equation)
        if body is not None and equation.primitive.name == jaxprs.SCAN:
            return self.read_scan(equation, body.jaxpr, values, lengths, needed), unknown
        if body is not None:
            plan, results = self.read(body.jaxpr, values, lengths, needed)
            inlined = equation.primitive.name not in jaxprs.REMAT
            return dataclasses.replace(plan, inlined=inlined), results
        application = match_application(equation, values, lengths, len(self.applications))
        if application is not None:
            self.consume([values[application.operand]], "the input of a layer")
            return self.add_site(equation, application, lengths)
        if equation.primitive.name == "add":
            return None, [self.read_add(values)]
        result: Provenance = None
        if len(equation.outvars) == 1:
            first = values[0]
            result = rearranged_param(equation, values)
            if isinstance(first, OutputValue):
                result = rearranged_output(equation, first)
        if result is None:
            self.consume(values, f"`{equation.primitive.name}`")
            return None, unknown
        return None, [result]

    def add_site(
        self, equation: Any, application: Application, lengths: tuple[int, ...]
    ) -> tuple[Site, list[Provenance]]:
        """Makes a site of an equation that applies weights."""
        index = len(self.applications)
        self.applications.append(application)
        site = Site(index, application.operand, lengths, equation.outvars[0].aval)
        return site, [output_value(application, index)]

    def read_scan(
        self,
        equation: Any,
        body: Any,
        values: Sequence[Provenance],
        lengths: tuple[int, ...],
        needed: Sequence[bool],
    ) -> Plan:
        """Reads the body of a scan; nothing is known of what leaves it."""
        arity = jaxprs.scan_arity(equation, body)
        end = arity.consts + arity.carry
        self.consume(values[arity.consts : end], "the carry of a `scan`")
        inside: list[Provenance] = []
        for i, value in enumerate(values):
            known = isinstance(value, ParamValue) and not arity.consts <= i < end
            inside.append(enter_scan(value, i >= end) if known else None)  # type: ignore[arg-type]
        everything = [True] * len(body.outvars)
        plan, results = self.read(body, inside, (*lengths, equation.params["length"]), everything)
        leaving = [value for value, wanted in zip(results, needed, strict=True) if wanted]
        self.consume(leaving, "the result of a `scan`")
        return dataclasses.replace(plan, inlined=False)

    def read_add(self, values: Sequence[Provenance]) -> Provenance:
        """Reads an addition: a bias if one term is a layer's output and the other a parameter."""
        output = next((v for v in values if isinstance(v, OutputValue)), None)
        bias = next((v for v in values if isinstance(v, ParamValue)), None)
        if output is None or bias is None:
            self.consume(values, "`add` to something that is not a layer's output")
            return output
        site = output.sites[0]
        views = bias_views(self.applications[site], output, bias)
        if views is None or site in self.biases:
            self.consume(values, "`add` to a layer's output, but not as its bias")
        else:
            leaves = (piece.leaf for piece in bias.pieces)
            self.biases[site] = tuple(zip(leaves, views, strict=True))
        return output

    def found_uses(self) -> tuple[FoundUse, ...]:
        """All uses, joined with the biases found later."""
        found = []
        for site, application in enumerate(self.applications):
            biases = self.biases.get(site, ((None, None),) * len(application.uses))
            for leaf, use, (bias, view) in zip(
                application.leaves, application.uses, biases, strict=True
            ):
                found.append(FoundUse(leaf, use, bias, view))
        return tuple(found)


def _live_variables(jaxpr: Any, needed: Sequence[bool]) -> set[Any]:
    """The variables of a jaxpr that its needed results depend on."""
    outputs = zip(jaxpr.outvars, needed, strict=True)
    live = {atom for atom, wanted in outputs if wanted and not jaxprs.is_literal(atom)}
    for equation in reversed(jaxpr.eqns):
        if any(atom in live for atom in equation.outvars):
            live.update(atom for atom in equation.invars if not jaxprs.is_literal(atom))
    return live


def discover(value_fn: Callable[..., Any], params: Any, *args: Any) -> Discovery:
    """Traces an objective and finds the linear layers in it.

    Args:
      value_fn: Maps ``(params, *args)`` to the value or ``(value, aux)``.
      params: The parameters, arrays or abstract ones.
      *args: Further arguments, such as an abstract batch.

    Returns:
      The trace and its layers.

    Raises:
      TypeError: If the value is not one real scalar.
    """
    closed, outputs = jax.make_jaxpr(value_fn, return_shape=True)(params, *args)
    check_value(jax.tree.leaves(outputs)[0], "value_fn")
    return _read_trace(closed, params, [True] + [False] * (len(closed.jaxpr.outvars) - 1))


def discover_outputs(model: Callable[..., Any], params: Any, *args: Any) -> Discovery:
    """Traces a model and finds the linear layers that any of its outputs depends on.

    Args:
      model: Maps ``(params, *args)`` to a pytree of arrays.
      params: The parameters, arrays or abstract ones.
      *args: Further arguments, such as an abstract batch.

    Returns:
      The trace and its layers; the results of the jaxpr are the leaves of the outputs.
    """
    closed = jax.make_jaxpr(model)(params, *args)
    return _read_trace(closed, params, [True] * len(closed.jaxpr.outvars))


def _read_trace(closed: Any, params: Any, needed: Sequence[bool]) -> Discovery:
    """Finds the layers of a closed jaxpr whose first arguments are the parameters."""
    leaves = jax.tree.leaves(params)
    values: list[Provenance] = [leaf_value(i, leaf.shape) for i, leaf in enumerate(leaves)]
    values += [None] * (len(closed.jaxpr.invars) - len(leaves))
    reader = _Reader()
    plan, results = reader.read(closed.jaxpr, values, (), needed)
    leaving = [value for value, wanted in zip(results, needed, strict=True) if wanted]
    reader.consume(leaving, "the result")
    return Discovery(closed, plan, reader.found_uses(), dict(reader.consumers))
