r"""Which engine makes block-diagonal Gauss-Newton steps with the least work; known before running.

All costs are in forward passes ``F`` of the model on the curvature batch, read off the shapes of
its layers; ``N`` cases with ``M`` columns each, ``L`` blocks, ``K`` products with the matrix.

* ``"linearized"``, `block_gauss_newton`: ``1 + K (L + 1)`` for layers of equal cost. In general a
  block pays ``2 f`` for each layer of its own and ``2 f`` for each layer behind its first one.
* ``"factored"``, `factor_gauss_newton`: ``1 + M (1 - f_1 / F)`` once, with the eigenvectors of one
  matrix ``(C, C)`` for each case, and ``2 + 2 M / width`` for each product. Outputs at ``T``
  positions count as ``T C``.
* ``"dual"``, `dual_solve`: the same factors, their Gram matrices, a Cholesky decomposition
  ``(N M)^3 / 3`` for each block, and three products; ``K`` does not matter.

Counts of operations, not seconds: small products and decompositions reach less of a machine's
speed than the layers do.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax.numpy as jnp

from secondorder.checks import check_choice, check_static_count
from secondorder.layers.cases import CaseUse
from secondorder.layers.columns import ModelTrace
from secondorder.operators.factored import Columns, trace_or_reason
from secondorder.tree import accumulation_dtype
from secondorder.tree.blocks import Blocks

Engine: TypeAlias = Literal["linearized", "factored", "dual"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
_EIGENVECTORS = 9  # operations per cube of the size of a symmetric matrix


class UseSize(NamedTuple):
    """The size of one use of a weight.

    Attributes:
      block: The block of the weight.
      bias_block: The block of the bias, or of the weight where there is none.
      stack: Number of independent matrices.
      inputs: Rows of a matrix.
      outputs: Columns of a matrix.
      positions: Vectors per case and matrix, ``T``.
      recurs: Whether tangents of the weight pass this use itself, as they do in a scan.
      alone: Whether it is the only use of the weight.
    """

    block: int
    bias_block: int
    stack: int
    inputs: int
    outputs: int
    positions: int
    recurs: bool = False
    alone: bool = True

    @property
    def parameters(self) -> int:
        """Numbers in the weight."""
        return self.stack * self.inputs * self.outputs

    @property
    def units(self) -> int:
        """Numbers in the outputs of a case."""
        return self.stack * self.positions * self.outputs


class Workload(NamedTuple):
    """What the costs of all engines depend on.

    Attributes:
      uses: All uses of weights, in the order of the forward pass.
      blocks: Number of blocks ``L``.
      cases: Number of cases ``N``.
      columns: Number of columns ``M`` of a case.
      outputs: Number of outputs ``C`` of a case, over all its positions.
    """

    uses: tuple[UseSize, ...]
    blocks: int
    cases: int
    columns: int
    outputs: int


class EngineCosts(NamedTuple):
    """A number for each engine; infinite where it is not applicable."""

    linearized: float
    factored: float = math.inf
    dual: float = math.inf


class EngineChoice(NamedTuple):
    """The engine taken, and why.

    Attributes:
      engine: Its name.
      costs: Predicted cost of one step with each engine, in forward passes.
      memory: Predicted memory beyond a linearization, in bytes.
      reason: Why an engine was left out, or an empty string.
      trace: The trace that `factor_gauss_newton` needs, or None where it is not applicable.
    """

    engine: Engine
    costs: EngineCosts
    memory: EngineCosts
    reason: str
    trace: ModelTrace | None = None

    @property
    def code(self) -> int:
        """The engine as a number for metrics: its index in `ENGINES`."""
        return ENGINES.index(self.engine)


def measure_workload(trace: ModelTrace, blocks: Blocks, columns: Columns = "exact") -> Workload:
    """Reads the workload off a trace.

    Args:
      trace: The traced model.
      blocks: The partition of its parameters.
      columns: As in `factor_gauss_newton`.

    Returns:
      The workload.
    """
    leaves = [use.found.leaf for use in trace.uses]
    ordered = sorted(trace.uses, key=lambda use: use.found.use.site)
    sizes = tuple(
        _use_size(use, blocks, trace.cases, leaves.count(use.found.leaf) == 1) for use in ordered
    )
    count = trace.outputs if columns == "exact" else columns
    return Workload(sizes, len(blocks), trace.cases, count, trace.outputs)


def _use_size(use: CaseUse, blocks: Blocks, cases: int, alone: bool) -> UseSize:
    found, form = use.found, use.found.use
    return UseSize(
        block=blocks.labels[found.leaf],
        bias_block=blocks.labels[found.leaf if found.bias is None else found.bias],
        stack=form.stack,
        inputs=form.inputs,
        outputs=form.outputs,
        positions=form.positions // cases,
        recurs=bool(form.scanned),
        alone=alone,
    )


def engine_costs(load: Workload, iterations: int) -> EngineCosts:
    """Predicts the cost of one step with each engine.

    Args:
      load: The workload.
      iterations: Planned products with the matrix ``K >= 1``, for the engines that iterate.

    Returns:
      Costs in forward passes.
    """
    # Multiply-adds count as two operations.
    forward = [2 * load.cases * use.positions * use.parameters for use in load.uses]
    total = max(sum(forward), 1)
    linearized = sum(_linearized_product(load, forward, b) for b in range(load.blocks)) / total
    recorded = sum(forward[1:]) + sum(forward[:1]) * any(use.recurs for use in load.uses[:1])
    setup = 1 + (load.columns * recorded + _EIGENVECTORS * load.cases * load.outputs**3) / total
    inner = 4 * load.cases * load.columns * sum(use.units for use in load.uses)
    product = 2 + inner / total
    return EngineCosts(
        linearized=1 + iterations * linearized,
        factored=setup + iterations * product,
        dual=setup + 3 * product + _gram_and_cholesky(load) / total,
    )


def _linearized_product(load: Workload, forward: Sequence[int], block: int) -> int:
    """Operations of one product with a block, linearized by itself."""
    touched = [i for i, u in enumerate(load.uses) if block in (u.block, u.bias_block)]
    if not touched:
        return 0
    first = touched[0]
    own = sum(2 * f for f, use in zip(forward, load.uses, strict=True) if use.block == block)
    behind = 2 * sum(forward[first + 1 :])
    return own + behind + (2 * forward[first] if load.uses[first].recurs else 0)


def _gram_and_cholesky(load: Workload) -> int:
    """Operations of the Gram matrices and their decompositions."""
    rows = load.cases * load.columns
    total = load.blocks * rows**3 // 3
    for use in load.uses:
        if use.alone and use.positions == 1:
            total += use.stack * (2 * load.cases**2 * use.inputs + 2 * rows**2 * use.outputs)
        else:
            total += 2 * rows * use.positions * use.parameters + 2 * rows**2 * use.parameters
    return total


def engine_memory(load: Workload, itemsize: int = 4) -> EngineCosts:
    """Predicts what each engine holds beyond a linearization of the model.

    Args:
      load: The workload.
      itemsize: Bytes of a number.

    Returns:
      Bytes: nothing for the linearized engine; the columns for the factored one; for the dual one
      also a Gram matrix for each block, two more, and the largest rows that are formed.
    """
    rows = load.cases * load.columns
    factors = rows * sum(use.units for use in load.uses)
    formed = [rows * u.parameters for u in load.uses if not (u.alone and u.positions == 1)]
    dual = factors + (load.blocks + 2) * rows**2 + max(formed, default=0)
    return EngineCosts(0.0, float(itemsize * factors), float(itemsize * dual))


def choose_engine(
    objective: Any,
    params: chex.ArrayTree,
    blocks: Blocks,
    *,
    iterations: int,
    columns: Columns = "exact",
    memory_limit: int = 2**30,
    among: Sequence[Engine] = ENGINES,
) -> EngineChoice:
    """Chooses the engine that makes a step with the least predicted work.

    Static: it reads shapes alone, so that it can be called while tracing.

    Args:
      objective: The split objective on the curvature batch.
      params: The parameters, arrays or abstract ones.
      blocks: The partition of their leaves.
      iterations: Planned products with the matrix, at least 1.
      columns: As in `factor_gauss_newton`.
      memory_limit: Bytes that factors and Gram matrices may take beyond a linearization.
      among: The engines to choose from. ``"linearized"`` is taken where no other can be.

    Returns:
      The choice, with the costs and the reason why an engine was left out.

    Raises:
      ValueError: If ``iterations`` is not positive or ``among`` names an unknown engine.

    Example:
      >>> import secondorder as so
      >>> from secondorder.tree.blocks import one_block
      >>> x = jnp.ones((4, 30))
      >>> objective = so.Objective(lambda w: x @ w, lambda z: jnp.mean(z**2))
      >>> params = jnp.ones((30, 2))
      >>> choose_engine(objective, params, one_block(params), iterations=30).engine
      'dual'
    """
    check_static_count("iterations", iterations)
    for engine in among:
        check_choice("among", engine, ENGINES)
    trace, reason = trace_or_reason(objective, params)
    if trace is None:
        costs = EngineCosts(1.0 + iterations * max(len(blocks) + 1, 4 if len(blocks) == 1 else 0))
        return EngineChoice("linearized", costs, EngineCosts(0.0), reason or "")
    load = measure_workload(trace, blocks, columns)
    costs = engine_costs(load, iterations)
    itemsize = jnp.dtype(accumulation_dtype(params)).itemsize
    memory = engine_memory(load, itemsize)
    fitting = [engine for engine in among if getattr(memory, engine) <= memory_limit]
    engine = min(fitting, key=lambda name: getattr(costs, name), default="linearized")
    return EngineChoice(engine, costs, memory, _over_limit(among, memory, memory_limit), trace)


def _over_limit(among: Sequence[Engine], memory: EngineCosts, limit: int) -> str:
    """Says which engines need more memory than they may take."""
    return "; ".join(
        f"{name!r} would hold {getattr(memory, name) / 2**20:.0f} MiB, over the limit"
        for name in among
        if getattr(memory, name) > limit
    )
