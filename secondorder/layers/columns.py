r"""One probed pass with many cotangents: the Jacobian of a model's outputs, layer by layer.

Cases are independent, so that one pass back with a cotangent for every case gives for all cases at
once :math:`s_{nc} = (\partial z_n / \partial h_n)^\top u_{nc}`, with ``h`` the output of a layer. A
row of the Jacobian with respect to its weight is then :math:`\sum_t a_{nt} s_{nct}^\top`, summed
over the positions ``t`` of the case.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from secondorder.layers import uses as use_forms
from secondorder.layers.cases import CaseUse, MixedCasesError, divide_by_case
from secondorder.layers.discovery import Discovery, discover_outputs
from secondorder.layers.layer import describe_leaves
from secondorder.layers.probes import record_model
from secondorder.sharding import replicate, shard_like


@dataclasses.dataclass(frozen=True)
class ModelTrace:
    """A traced model whose outputs have the cases on their first axis.

    Attributes:
      discovery: The trace.
      uses: All uses of weights, their positions divided by case.
      cases: Number of cases ``N``.
      outputs: Number of outputs ``C`` of a case, over all its positions.
    """

    discovery: Discovery
    uses: tuple[CaseUse, ...]
    cases: int
    outputs: int


def trace_model(model: Callable[[Any], Any], params: chex.ArrayTree) -> ModelTrace:
    """Traces a model all of whose parameters are in linear layers.

    Args:
      model: Maps the parameters to the outputs.
      params: The parameters, arrays or abstract ones.

    Returns:
      The trace.

    Raises:
      MixedCasesError: If the outputs are not one array ``(N, ..., C)`` with one case in each part
        of its first axis, or if a parameter is used outside linear layers.
    """
    discovery = discover_outputs(model, params)
    for leaf, described in enumerate(describe_leaves(params)):
        if discovery.consumers.get(leaf):
            how = discovery.consumers[leaf][0]
            raise MixedCasesError(f"the parameter {described.path!r} goes into {how}")
    results = [tuple(aval.shape) for aval in discovery.jaxpr.out_avals]
    if len(results) != 1 or len(results[0]) < 2:
        raise MixedCasesError(
            f"the outputs are not one array (cases, ..., outputs) but have shapes {results}"
        )
    cases, *rest = results[0]
    uses = divide_by_case(discovery, cases, len(jax.tree.leaves(params)))
    return ModelTrace(discovery, uses, cases, math.prod(rest))


@dataclasses.dataclass(frozen=True)
class UseColumns:
    """One use of a weight at a point: its inputs, and the cotangents of its outputs.

    Attributes:
      use: The use.
      operand: The inputs: of a dense layer ``(stack, positions, inputs)``, of others the operand
        as it was recorded.
      cotangents: ``(N, M, k)``, where ``M`` counts columns and ``k`` the outputs of a case: stack,
        positions and features.
    """

    use: CaseUse
    operand: jax.Array
    cotangents: jax.Array

    @property
    def positions(self) -> int:
        """Positions per case."""
        return self.use.found.use.positions // self.cotangents.shape[0]

    def outputs(self, matrix: jax.Array) -> jax.Array:
        """The outputs of the layer with another weight.

        Args:
          matrix: The weight, ``(stack, inputs, outputs)``.

        Returns:
          ``(N, k)``.
        """
        use = self.use.found.use
        if use.kind == use_forms.DENSE:
            product = jnp.matmul(self.operand, matrix, precision=jax.lax.Precision.HIGHEST)
        else:
            projected = use_forms.project(use, self.operand, jnp.swapaxes(matrix, 1, 2))
            product = jnp.swapaxes(projected, 1, 2)
        return self.by_case(product).reshape(self.cotangents.shape[0], -1)

    def by_case(self, rows: jax.Array) -> jax.Array:
        """Divides ``(stack, positions, features)`` by case: ``(N, stack, T, features)``."""
        return rows_by_case(self.use, rows, self.cotangents.shape[0])

    def input_rows(self) -> jax.Array:
        """The explicit inputs ``(N, stack, T, inputs)``."""
        use = self.use.found.use
        dense = use.kind == use_forms.DENSE
        return self.by_case(self.operand if dense else use_forms.input_matrix(use, self.operand))

    def cotangent_rows(self) -> jax.Array:
        """The cotangents ``(N, M, stack, T, outputs)``."""
        use, (cases, columns, _) = self.use.found.use, self.cotangents.shape
        return self.cotangents.reshape(cases, columns, use.stack, -1, use.outputs)


def rows_by_case(use: CaseUse, rows: jax.Array, cases: int) -> jax.Array:
    """Divides the positions of a use by case.

    Args:
      use: The use.
      rows: ``(stack, positions, features)``.
      cases: Number of cases ``N``.

    Returns:
      ``(N, stack, T, features)``.
    """
    stack, _, features = rows.shape
    divided = jnp.moveaxis(rows.reshape(stack, use.outer, cases, -1, features), 2, 0)
    return divided.reshape(cases, stack, -1, features)


def record_columns(
    trace: ModelTrace,
    params: chex.ArrayTree,
    make_columns: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, tuple[UseColumns, ...]]:
    """Evaluates a model, and passes several cotangents of its outputs back to all layers.

    Args:
      trace: The traced model.
      params: The point; a pytree like the one it was traced with.
      make_columns: From the outputs ``(N, ..., C)`` to the cotangents ``(M, N, ..., C)``.

    Returns:
      The outputs, and for each use its inputs and cotangents.
    """
    at = record_model(trace.discovery, params)
    (outputs,) = at.outputs
    with jax.named_scope("layer_columns"):
        rows = make_columns(outputs).astype(outputs.dtype)
        cotangents, _ = jax.vmap(lambda row: at.pull_back([shard_like(row, outputs)]))(rows)
    columns = tuple(
        _use_columns(use, at.operands[site], cotangents[site], trace.cases)
        for use in trace.uses
        for site in [use.found.use.site]
    )
    return outputs, columns


def _use_columns(use: CaseUse, operand: jax.Array, cotangents: jax.Array, cases: int) -> UseColumns:
    """Arranges what was recorded of one use."""
    form = use.found.use

    def arrange(cotangent: jax.Array) -> jax.Array:
        return rows_by_case(use, use_forms.output_matrix(form, cotangent), cases)

    rows = jax.vmap(arrange, out_axes=1)(cotangents)  # (N, M, stack, T, outputs)
    if form.kind == use_forms.DENSE:
        operand = use_forms.input_matrix(form, operand)
    # On an Explicit mesh inputs are on every device, as all cotangents of layers are.
    return UseColumns(use, replicate(operand), rows.reshape(*rows.shape[:2], -1))
