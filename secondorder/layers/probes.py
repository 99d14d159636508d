"""Evaluating an objective with probes: the input and the output cotangent of every layer.

A probe is a zero added to a layer's output; the gradient with respect to it is the cotangent of
that output. Inside one `jit` XLA merges this evaluation with the caller's own gradient, so the
interface ``value_fn(params)`` costs nothing over a model that hands its activations out.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from secondorder import jaxprs
from secondorder.layers.discovery import Discovery, Plan, Site
from secondorder.sharding import enter_context, leave_context, reshard


class Tape(NamedTuple):
    """What one probed pass saw.

    Attributes:
      value: The objective's value.
      operands: For every site the operand the weights were applied to.
      outputs: For every site its result, before a bias is added.
      cotangents: For every site the cotangent of its result. Inside a scan all of these have the
        scan's length as leading axis.
    """

    value: jax.Array
    operands: dict[int, jax.Array]
    outputs: dict[int, jax.Array]
    cotangents: dict[int, jax.Array]


# What is recorded during an evaluation: for every site its operand and its result.
Recorded: TypeAlias = dict[int, tuple[jax.Array, jax.Array]]


def make_probe(site: Site) -> jax.Array:
    """A zero shaped, typed and sharded like a site's result, with the axes of the scans around.

    Args:
      site: The site.

    Returns:
      The probe.
    """
    aval = site.aval
    probe = jnp.zeros((*site.lengths, *aval.shape), aval.dtype)
    sharding: Any = getattr(aval, "sharding", None)
    spec = getattr(sharding, "spec", ())
    if not any(axis is not None for axis in spec):
        return probe
    spec = jax.sharding.PartitionSpec(*(None for _ in site.lengths), *spec)
    return reshard(probe, jax.sharding.NamedSharding(sharding.mesh, spec))


def _evaluate_body(
    equation: Any, plan: Plan, operands: Sequence[Any], probes: dict[int, jax.Array]
) -> tuple[Sequence[Any], Recorded]:
    """Evaluates a higher-order equation whose body holds sites."""
    body = jaxprs.body_of(equation)
    assert body is not None
    if equation.primitive.name == jaxprs.SCAN:
        return _evaluate_scan(equation, body, plan, operands, probes)

    def inlined(operands: Sequence[Any], probes: dict[int, jax.Array]) -> Any:
        return evaluate(body.jaxpr, body.consts, operands, plan, probes)

    if equation.primitive.name in jaxprs.REMAT:
        inlined = jaxprs.rematerialized(equation, inlined)
    return inlined(operands, probes)


def _evaluate_scan(
    equation: Any,
    body: jaxprs.Body,
    plan: Plan,
    operands: Sequence[Any],
    probes: dict[int, jax.Array],
) -> tuple[Sequence[Any], Recorded]:
    """Scans with the probes as scanned inputs and the recorded operands as scanned outputs."""
    consts, carry, scanned = jaxprs.divide_operands(equation, body.jaxpr, operands)

    def step(present: Any, inputs: Any) -> Any:
        scanned, probes = inputs
        outputs, recorded = evaluate(
            body.jaxpr, body.consts, [*consts, *present, *scanned], plan, probes
        )
        return list(outputs[: len(carry)]), (list(outputs[len(carry) :]), recorded)

    last, (stacked, recorded) = jaxprs.rescan(equation, step, list(carry), (list(scanned), probes))
    return [*last, *stacked], recorded


def evaluate(
    jaxpr: Any,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    plan: Plan,
    probes: dict[int, jax.Array],
) -> tuple[list[Any], Recorded]:
    """Evaluates a jaxpr, adding probes at its sites.

    Args:
      jaxpr: An open jaxpr.
      consts: Values of its constants.
      arguments: Values of its arguments.
      plan: Where its sites are.
      probes: The probe of every site.

    Returns:
      The results, and the operand and result of every site.
    """
    recorded: Recorded = {}

    def run(position: int, equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
        entry = plan.entries.get(position)
        if isinstance(entry, Plan):
            inside = {site.index: probes[site.index] for site in entry.sites()}
            results, seen = _evaluate_body(equation, entry, operands, inside)
            recorded.update(seen)
            return results
        results = jaxprs.run_equation(equation, operands)
        if not isinstance(entry, Site):
            return results
        output = enter_context(results[0]) + probes[entry.index]
        recorded[entry.index] = enter_context(operands[entry.operand]), output
        return [leave_context(output, results[0])]

    return jaxprs.evaluate(jaxpr, consts, arguments, run), recorded


def record(discovery: Discovery, params: Any, *args: Any) -> Tape:
    """Evaluates a traced objective and its gradient with respect to every layer's output.

    Args:
      discovery: The traced objective.
      params: The point; a pytree like the one it was traced with.
      *args: Further arguments, as it was traced with.

    Returns:
      The value, the operands, the outputs and the cotangents.
    """
    arguments = jax.tree.leaves((params, *args))

    def probed(probes: dict[int, jax.Array]) -> tuple[jax.Array, Recorded]:
        outputs, recorded = evaluate(
            discovery.jaxpr.jaxpr, discovery.jaxpr.consts, arguments, discovery.plan, probes
        )
        return outputs[0], recorded

    probes = {site.index: make_probe(site) for site in discovery.plan.sites()}
    with jax.named_scope("layer_probes"):
        (value, recorded), cotangents = jax.value_and_grad(probed, has_aux=True)(probes)
    operands = {index: operand for index, (operand, _) in recorded.items()}
    outputs = {index: output for index, (_, output) in recorded.items()}
    return Tape(value, operands, outputs, cotangents)


class ModelPass(NamedTuple):
    """One probed pass through a model whose outputs may be given cotangents of any kind.

    Attributes:
      outputs: The outputs, a list of arrays.
      operands: For every site its operand.
      pull_back: From cotangents of the outputs, in a list, to those of the results of all sites,
        and to the gradients of the chosen parameters, both by index.
    """

    outputs: list[jax.Array]
    operands: dict[int, jax.Array]
    pull_back: Callable[[list[jax.Array]], tuple[dict[int, jax.Array], dict[int, jax.Array]]]


def record_model(discovery: Discovery, params: Any, leaves: Sequence[int] = ()) -> ModelPass:
    """Evaluates a traced model, ready to pass cotangents of its outputs back to every layer.

    Args:
      discovery: The traced model.
      params: The point; a pytree like the one it was traced with.
      leaves: Indices of parameters whose gradients are asked for too.

    Returns:
      The pass.
    """
    jaxpr, consts = discovery.jaxpr.jaxpr, discovery.jaxpr.consts
    arguments = dict(enumerate(jax.tree.leaves(params)))

    def probed(
        probes: dict[int, jax.Array], moving: dict[int, jax.Array]
    ) -> tuple[list[jax.Array], dict[int, jax.Array]]:
        given = list({**arguments, **moving}.values())
        outputs, recorded = evaluate(jaxpr, consts, given, discovery.plan, probes)
        return outputs, {index: operand for index, (operand, _) in recorded.items()}

    probes = {site.index: make_probe(site) for site in discovery.plan.sites()}
    moving = {leaf: arguments[leaf] for leaf in leaves}
    with jax.named_scope("layer_probes"):
        outputs, pull_back, operands = jax.vjp(probed, probes, moving, has_aux=True)
    return ModelPass(outputs, operands, pull_back)
