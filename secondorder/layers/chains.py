r"""Chains of dense layers with elementwise functions between them.

.. math:: s_l = a_{l-1} W_l + b_l, \qquad a_l = \varphi_l(s_l)

Second-order information can be passed back through such a chain layer by layer. Whether a model is
one is read off its jaxpr: every layer's input must come from the output of the layer before, by
elementwise operations alone. What stands before the first layer and after the last is free.

What the recursions need of the functions, their first and second derivatives at each unit, comes
from the traced objective too: the input of a layer as a function of a probe at the one before.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder import jaxprs
from secondorder.layers.discovery import Discovery, Plan, Site
from secondorder.layers.layer import Layers, TracedLayer, trace_layers
from secondorder.layers.probes import evaluate, make_probe, record
from secondorder.layers.uses import DENSE, Use, input_matrix, output_matrix, sum_outputs
from secondorder.objective import Objective
from secondorder.products import HIGHEST

# A transpose moves units without mixing them; matrices of positions and units undo it.
_ELEMENTWISE = jaxprs.IDENTITY | frozenset(
    {
        *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2"),
        *("atanh", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos", "cosh", "div"),
        *("eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt"),
        *("integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul"),
        *("ne", "neg", "nextafter", "not", "or", "pow", "rem", "round", "rsqrt", "select_n"),
        *("sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "transpose"),
    }
)
_CALLS = jaxprs.INLINED | jaxprs.REMAT | {"custom_jvp_call", "custom_vjp_call"}


class Unit(NamedTuple):
    """The function between two layers, at each unit of each case.

    Attributes:
      slope: First derivative ``(cases, units)``, float32 or wider.
      bend: Second derivative times the derivative of the objective in the function's value,
        ``(cases, units)``.
    """

    slope: jax.Array
    bend: jax.Array


class ChainPass(NamedTuple):
    """What one evaluation of a chain saw; layers in their order.

    Attributes:
      operands: The input of each layer, as the model had it.
      products: The result of each before its bias is added, likewise.
      outputs: The outputs of the model, a pytree of arrays.
    """

    operands: tuple[jax.Array, ...]
    products: tuple[jax.Array, ...]
    outputs: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """The trace of an objective whose model is a chain.

    Attributes:
      discovery: The trace; its results are the value and the leaves of the model's outputs.
      layers: The layers, first to last.
      structure: The tree structure of the model's outputs.
    """

    discovery: Discovery
    layers: tuple[TracedLayer, ...]
    structure: Any

    @property
    def uses(self) -> tuple[Use, ...]:
        """The one use of each layer."""
        return tuple(layer.uses[0] for layer in self.layers)

    def probes(self) -> dict[int, jax.Array]:
        """A zero for every traced layer, by site."""
        return {site.index: make_probe(site) for site in self.discovery.plan.sites()}

    def run(self, params: Any, probes: Mapping[int, jax.Array] | None = None) -> ChainPass:
        """Evaluates the objective.

        Args:
          params: The parameters.
          probes: What to add to the results of some layers, by site.

        Returns:
          What was seen.
        """
        results, recorded = evaluate(
            self.discovery.jaxpr.jaxpr,
            self.discovery.jaxpr.consts,
            jax.tree.leaves(params),
            self.discovery.plan,
            {**self.probes(), **(probes or {})},
        )
        seen = [recorded[use.site] for use in self.uses]
        return ChainPass(
            tuple(operand for operand, _ in seen),
            tuple(product for _, product in seen),
            jax.tree.unflatten(self.structure, results[1:]),
        )


def trace_chain(objective: Objective[Any], params: Any, layers: Layers) -> Chain:
    """Traces an objective and checks that its model is a chain.

    Args:
      objective: The split objective.
      params: The parameters.
      layers: The layers of the model, in the order of their use.

    Returns:
      The chain.

    Raises:
      ValueError: If the layers are no chain of dense layers with elementwise functions between.

    Example:
      >>> x = jnp.ones((4, 3))
      >>> objective = Objective(lambda p: jnp.tanh(x @ p[0]) @ p[1], jnp.sum)
      >>> params = (jnp.ones((3, 2)), jnp.ones((2, 1)))
      >>> from secondorder.layers import find_layers
      >>> len(trace_chain(objective, params, find_layers(objective, params)).layers)
      2
    """

    def model(point: Any) -> Any:
        return objective.model(point)[0] if objective.has_aux else objective.model(point)

    def with_outputs(point: Any) -> tuple[jax.Array, Any]:
        outputs = model(point)
        return objective.loss(outputs), outputs

    discovery, traced, batch_size = trace_layers(layers, with_outputs, params)
    names = [layers.leaves[layer.layer.weight].path for layer in traced]
    for layer, name in zip(traced, names, strict=True):
        _check_dense(layer, name, batch_size)
    _check_order(discovery, [layer.uses[0].site for layer in traced], names)
    return Chain(discovery, traced, jax.tree.structure(jax.eval_shape(model, params)))


def layer_inputs(chain: Chain, seen: ChainPass) -> tuple[jax.Array, ...]:
    """The input vectors of every layer.

    Args:
      chain: The chain.
      seen: A pass over it.

    Returns:
      For each layer ``(cases, inputs)``, float32 or wider.
    """
    pairs = zip(chain.uses, seen.operands, strict=True)
    return tuple(input_matrix(use, operand)[0] for use, operand in pairs)


def layer_sums(chain: Chain, seen: ChainPass, params: Any) -> tuple[jax.Array, ...]:
    """The outputs ``s`` of every layer, with its bias.

    Args:
      chain: The chain.
      seen: A pass over it.
      params: The parameters it was at.

    Returns:
      For each layer ``(cases, outputs)``, float32 or wider.
    """
    leaves, sums = jax.tree.leaves(params), []
    for traced, product in zip(chain.layers, seen.products, strict=True):
        layer, output = traced.layer, output_matrix(traced.uses[0], product)[0]
        if layer.bias is not None and layer.bias_view is not None:
            output = output + layer.bias_view.apply(leaves[layer.bias])
        sums.append(output)
    return tuple(sums)


def read_units(chain: Chain, params: Any) -> tuple[Unit, ...]:
    """The functions after all layers but the last.

    Args:
      chain: The chain.
      params: The point.

    Returns:
      Their derivatives.

    Example:
      >>> from secondorder.layers import find_layers
      >>> x = jnp.ones((1, 1))
      >>> objective = Objective(lambda p: (x @ p[0]) ** 2 @ p[1], jnp.sum)
      >>> params = (jnp.full((1, 1), 3.0), jnp.full((1, 1), 5.0))
      >>> chain = trace_chain(objective, params, find_layers(objective, params))
      >>> [(unit.slope.tolist(), unit.bend.tolist()) for unit in read_units(chain, params)]
      [([[6.0]], [[10.0]])]
    """
    cotangents = record(chain.discovery, params).cotangents
    leaves = jax.tree.leaves(params)
    units = []
    for index, target in enumerate(chain.layers[1:]):
        first, second = _derivatives(chain, params, index)
        use, layer = target.uses[0], target.layer
        weight = layer.weight_view.apply(leaves[layer.weight])[0].astype(first.dtype)
        outward = output_matrix(use, cotangents[use.site])[0]
        units.append(Unit(first, second * jnp.matmul(outward, weight.T, precision=HIGHEST)))
    return tuple(units)


def _derivatives(chain: Chain, params: Any, index: int) -> tuple[jax.Array, jax.Array]:
    """First and second derivatives of the function after a layer, ``(cases, units)``."""
    source, target = chain.uses[index], chain.uses[index + 1]
    at = chain.probes()[source.site]
    ones = at + 1  # in this way it is sharded like the probe

    def transfer(probe: jax.Array) -> jax.Array:
        return chain.run(params, {source.site: probe}).operands[index + 1]

    def slope(probe: jax.Array) -> jax.Array:
        # Elementwise, so that one tangent of ones holds all derivatives.
        return jax.jvp(transfer, (probe,), (ones,))[1]

    first, second = jax.jvp(slope, (at,), (ones,))
    return input_matrix(target, first)[0], input_matrix(target, second)[0]


def sum_over_cases(use: Use, product: jax.Array) -> jax.Array:
    """What a layer's results, or anything shaped like them, add up to.

    Args:
      use: The use.
      product: The result of the layer, as the model had it.

    Returns:
      Array ``(outputs,)``, float32 or wider.
    """
    return sum_outputs(use, product)[0]


def _check_dense(traced: TracedLayer, name: str, batch_size: int) -> None:
    """Raises unless a layer is a dense matrix that every case meets once."""
    use, kind = traced.uses[0], traced.layer.kind
    if len(traced.uses) > 1 or traced.tied:
        problem = f"is used {len(traced.uses) + len(traced.tied)} times"
    elif kind != DENSE:
        problem = f"is a layer of kind {kind!r}"
    elif use.scanned or use.stack != 1:
        problem = "stands in a scan, or is a stack of blocks"
    elif use.positions != batch_size:
        problem = f"is applied at {use.positions} positions to a batch of {batch_size}"
    elif use.input_window is not None or use.output_window is not None:
        problem = "is applied together with another"
    else:
        return
    raise ValueError(
        f"The model is no chain of dense layers, each used once per case: {name!r} {problem}."
    )


class _Origin(NamedTuple):
    """Where a value in a trace comes from.

    Attributes:
      sites: The layers whose results reach it without passing another layer.
      mixed: Operations on the way that are not elementwise.
    """

    sites: frozenset[int] = frozenset()
    mixed: frozenset[str] = frozenset()


def _join(origins: Sequence[_Origin]) -> _Origin:
    return _Origin(
        frozenset().union(*(origin.sites for origin in origins)),
        frozenset().union(*(origin.mixed for origin in origins)),
    )


def _check_order(discovery: Discovery, sites: Sequence[int], names: Sequence[str]) -> None:
    """Raises unless each layer reads the one before alone, and results the last alone."""
    reader = _OriginReader(frozenset(sites))
    jaxpr = discovery.jaxpr.jaxpr
    results = reader.read(jaxpr, [_Origin()] * len(jaxpr.invars), discovery.plan)
    known = dict(zip(sites, names, strict=True))
    before: frozenset[int] = frozenset()
    for site, name in known.items():
        origin = reader.operands[site]
        if origin.sites != before:
            raise ValueError(_no_chain(f"the input of {name!r}", origin.sites, before, known))
        if origin.mixed:
            raise ValueError(
                "The model is no chain of dense layers with elementwise functions between them: "
                f"{', '.join(f'`{word}`' for word in sorted(origin.mixed))} stands before {name!r}."
            )
        before = frozenset({site})
    end = _join(results).sites
    if not end <= before:
        raise ValueError(_no_chain("the result", end, before, known))


def _no_chain(
    what: str, found: frozenset[int], expected: frozenset[int], names: Mapping[int, str]
) -> str:
    """The message about a value that does not come from the layer before it alone."""

    def listed(sites: frozenset[int]) -> str:
        return ", ".join(repr(names[site]) for site in sorted(sites)) or "no layer"

    return (
        f"The model is no chain of dense layers: {what} comes from {listed(found)}, and should "
        f"come from {listed(expected)}."
    )


class _OriginReader:
    """Follows the results of layers through a jaxpr."""

    def __init__(self, sites: frozenset[int]) -> None:
        self.sites = sites
        self.operands: dict[int, _Origin] = {}  # by site

    def read(
        self, jaxpr: Any, arguments: Sequence[_Origin], plan: Plan | None
    ) -> Sequence[_Origin]:
        """Reads a jaxpr, given the origins of its arguments and its plan, if it holds sites."""
        known: dict[Any, _Origin] = dict(zip(jaxpr.invars, arguments, strict=True))

        def look_up(atom: Any) -> _Origin:
            return _Origin() if jaxprs.is_literal(atom) else known.get(atom, _Origin())

        for position, equation in enumerate(jaxpr.eqns):
            entry = None if plan is None else plan.entries.get(position)
            results = self.read_equation(equation, [look_up(a) for a in equation.invars], entry)
            known.update(zip(equation.outvars, results, strict=True))
        return [look_up(atom) for atom in jaxpr.outvars]

    def read_equation(
        self, equation: Any, operands: Sequence[_Origin], entry: Site | Plan | None
    ) -> Sequence[_Origin]:
        """The origins of the results of one equation."""
        origin, name = _join(operands), equation.primitive.name
        if isinstance(entry, Site) and entry.index in self.sites:
            self.operands[entry.index] = origin
            return [_Origin(frozenset({entry.index}))]
        body = _called(equation)
        if body is not None:
            return self.read(body, operands, entry if isinstance(entry, Plan) else None)
        if origin.sites and name not in _ELEMENTWISE:
            origin = origin._replace(mixed=origin.mixed | {name})
        return [origin] * len(equation.outvars)


def _called(equation: Any) -> Any:
    """The body of a call whose arguments are those of the equation, or None."""
    if equation.primitive.name not in _CALLS:
        return None
    for value in equation.params.values():
        body = getattr(value, "jaxpr", value)
        if hasattr(body, "eqns") and len(body.invars) == len(equation.invars):
            return body
    return None
