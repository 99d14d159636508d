r"""The Gauss-Newton matrix from stored factors: products of all blocks in two forward passes.

With :math:`H_n = S_n S_n^\top` the Hessian of the loss in the outputs of case ``n``, pass the
columns of ``S`` back to the outputs ``h`` of every layer once,

.. math:: s_{nc} = \Big(\frac{\partial z_n}{\partial h_n}\Big)^{\!\top} S_n e_c .

Every row of :math:`\tilde J = S^\top J` is then known by its factors, the inputs ``a`` of the layer
and ``s``: for a vector ``V`` in the shape of the weight

.. math:: (\tilde J V)_{nc} = \sum_t a_{nt}^\top V s_{nct}, \qquad
    \tilde J^\top \alpha = \sum_{nct} \alpha_{nc}\, a_{nt} s_{nct}^\top ,

summed over the positions ``t`` of the case and over all uses of the weight. Neither leaves the
layer, so that a product of all blocks costs two forward passes at any depth, instead of ``L + 1``.
Storing takes about ``1 + C`` forward passes, once, and ``N C`` numbers for every unit.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder.checks import check_static_count
from secondorder.jaxprs import canonical_convolutions
from secondorder.layers.cases import MixedCasesError
from secondorder.layers.columns import ModelTrace, UseColumns, record_columns, trace_model
from secondorder.objective import Objective
from secondorder.operators.linear_operator import LinearOperator, vectors_like
from secondorder.operators.output_factor import (
    OutputStructure,
    apply_factor,
    output_factor,
)
from secondorder.products import HIGHEST
from secondorder.sharding import gather_axes, replicate
from secondorder.tree import zeros_vector
from secondorder.tree.blocks import Blocks

# All columns of a square root of the outputs' Hessian, or this many random combinations of them.
Columns: TypeAlias = Literal["exact"] | int


@dataclasses.dataclass(frozen=True)
class GaussNewtonFactors:
    r"""The factors of :math:`\tilde J = S^\top J` at a point; see `factor_gauss_newton`.

    Attributes:
      uses: For every use of a weight its inputs and the columns passed back to its outputs.
      like: A pytree of `jax.ShapeDtypeStruct` like the vectors.
      origin: The zero vector, sharded as the parameters.
      cases: Number of cases ``N``.
      columns: Number of columns ``M`` of each case.
    """

    uses: tuple[UseColumns, ...]
    like: chex.ArrayTree
    origin: chex.ArrayTree
    cases: int
    columns: int

    def rows(self, blocks: Blocks, vector: chex.ArrayTree) -> jax.Array:
        r"""The products :math:`\tilde J_b v_b` of all blocks.

        Args:
          blocks: The partition, of ``L`` blocks.
          vector: A pytree like ``like``.

        Returns:
          Array ``(L, N, M)``.
        """
        leaves = [replicate(leaf) for leaf in jax.tree.leaves(vector)]
        dtype = jnp.result_type(*leaves, *(use.cotangents for use in self.uses))
        totals = [jnp.zeros((self.cases, self.columns), dtype)] * len(blocks)
        for use in self.uses:
            for block, outputs in _outputs_by_block(use, blocks, leaves).items():
                inner = jnp.einsum("nk,nmk->nm", outputs, use.cotangents, precision=HIGHEST)
                totals[block] = totals[block] + inner.astype(dtype)
        return jnp.stack(totals)

    def combination(self, blocks: Blocks, coefficients: jax.Array) -> chex.ArrayTree:
        r"""The combinations :math:`\tilde J_b^\top \alpha_b` of the rows of all blocks.

        Args:
          blocks: The partition, of ``L`` blocks.
          coefficients: Array ``(L, N, M)``.

        Returns:
          A pytree like ``like``.
        """
        template = jax.eval_shape(lambda v: self.rows(blocks, v), self.origin)
        transposed = jax.linear_transpose(lambda v: self.rows(blocks, v), self.origin)
        (vector,) = transposed(coefficients.astype(template.dtype))
        return vector

    def operator(self, blocks: Blocks) -> LinearOperator:
        """The block-diagonal part of the Gauss-Newton matrix.

        Args:
          blocks: The partition; with `one_block` the operator is the full matrix.

        Returns:
          The operator on vectors like the parameters, float32 or wider.
        """

        @canonical_convolutions  # as products are made in loops
        def product(vector: chex.ArrayTree) -> chex.ArrayTree:
            return self.combination(blocks, self.rows(blocks, vector))

        return LinearOperator(product, self.like)


def _outputs_by_block(
    use: UseColumns, blocks: Blocks, leaves: Sequence[jax.Array]
) -> dict[int, jax.Array]:
    """What a vector adds to the outputs of a use, ``(N, k)``, for each block that has a part."""
    found = use.use.found
    outputs = {}
    weight = found.use.weight_view.apply(leaves[found.leaf])
    outputs[blocks.labels[found.leaf]] = use.outputs(weight)
    if found.bias is not None and found.bias_view is not None:
        bias = found.bias_view.apply(leaves[found.bias])[:, None]  # (stack, 1, outputs)
        shift = jnp.broadcast_to(bias, (bias.shape[0], use.positions, bias.shape[2])).reshape(-1)
        block = blocks.labels[found.bias]
        cases = use.cotangents.shape[0]
        shared = outputs.get(block)
        outputs[block] = jnp.tile(shift, (cases, 1)) if shared is None else shared + shift
    return outputs


def model_outputs(objective: Objective[Any]) -> Callable[[Any], Any]:
    """The model of an objective without its aux.

    Args:
      objective: The split objective.

    Returns:
      The function from the parameters to the outputs.
    """
    return lambda p: objective.model(p)[0] if objective.has_aux else objective.model(p)


def why_not_factored(objective: Any, params: chex.ArrayTree) -> str | None:
    """Says why the Gauss-Newton matrix of an objective has no factors.

    Args:
      objective: The objective.
      params: The parameters, arrays or abstract ones.

    Returns:
      None if `factor_gauss_newton` is applicable; otherwise the reason: the outputs are not one
      array with an axis of cases, cases are mixed, or a parameter is used outside linear layers.

    Example:
      >>> import secondorder as so
      >>> objective = so.Objective(lambda p: p * jnp.ones((3, 2)), jnp.sum)
      >>> why_not_factored(objective, jnp.ones(2))
      "the parameter '(params)' goes into `mul`"
    """
    return trace_or_reason(objective, params)[1]


def trace_or_reason(
    objective: Any, params: chex.ArrayTree
) -> tuple[ModelTrace, None] | tuple[None, str]:
    """The trace that `factor_gauss_newton` needs, or why there is none.

    Args:
      objective: The objective.
      params: The parameters, arrays or abstract ones.

    Returns:
      The trace and None, or None and the reason.
    """
    if not isinstance(objective, Objective):
        return None, f"the objective is a {type(objective).__name__}, not one so.Objective"
    try:
        return trace_model(model_outputs(objective), params), None
    except MixedCasesError as error:
        return None, str(error)


def factor_gauss_newton(
    objective: Objective[Any],
    params: chex.ArrayTree,
    *,
    columns: Columns = "exact",
    structure: OutputStructure = "auto",
    key: chex.PRNGKey | None = None,
    trace: ModelTrace | None = None,
) -> GaussNewtonFactors:
    r"""Factors the Gauss-Newton matrix of a model made of linear layers, case by case.

    Any partition of the leaves can be read off the factors: blocks, layers, or the full matrix.
    A weight may be used several times, transposed too, at many positions of a case, in scans over
    time or over layers. Cases must be independent: no batch normalization over the batch.

    Args:
      objective: The split objective. The outputs of its model are one array ``(N, C)``, a row for
        each case, or ``(N, T..., C)`` with positions; the loss is a sum or mean over cases, convex
        in the outputs. Where ``C`` is said here or of columns, ``T C`` is meant then: a model may
        mix positions, as attention does, so that each of them needs columns of its own.
      params: The point, a pytree of arrays, each of them a weight or bias of linear layers.
      columns: ``"exact"``: all ``C`` columns of the square root ``S``. An integer ``M >= 1``:
        that many random combinations :math:`S_n \epsilon / \sqrt M` with random signs
        :math:`\epsilon`, whose matrix is positive semidefinite and right in the mean; for many
        outputs.
      structure: Of the outputs' Hessian, see `output_factor`; by default as it is seen to be.
      key: Random key, needed with an integer ``columns``.
      trace: What `trace_or_reason` returned for this objective, if known.

    Returns:
      The factors, ``N M`` numbers for each unit and position beside the layers' inputs.

    Raises:
      ValueError: If the objective cannot be factored, with the reason; if ``columns`` is not
        positive; if it is an integer and ``key`` is missing.

    Example:
      >>> import secondorder as so
      >>> from secondorder.tree.blocks import one_block
      >>> x = jnp.array([[1.0, 2.0], [0.0, 1.0]])
      >>> objective = so.Objective(lambda w: x @ w, lambda z: jnp.sum(z**2) / 2)
      >>> params = jnp.zeros((2, 1))
      >>> factors = factor_gauss_newton(objective, params)
      >>> factors.operator(one_block(params)).as_matrix().tolist()
      [[1.0, 2.0], [2.0, 5.0]]

    Source: the factors are those of Botev, Ritter, Barber (2017), Practical Gauss-Newton
    optimisation for deep learning, before their Kronecker approximation.
    """
    reason = None
    if trace is None:
        trace, reason = trace_or_reason(objective, params)
    if trace is None:
        raise ValueError(f"factor_gauss_newton: {reason}; use block_gauss_newton instead.")
    draw = _column_maker(columns, key)

    def make_columns(outputs: jax.Array) -> jax.Array:
        shape = outputs.shape
        # All positions of a case are one row, as a loss may couple them, and so may the model.
        rows = jnp.reshape(gather_axes(outputs, range(1, outputs.ndim)), (shape[0], -1))
        root = output_factor(lambda z: objective.loss(jnp.reshape(z, shape)), rows, structure)
        made = jax.vmap(lambda vector: apply_factor(root, vector))(draw(rows.shape, root.dtype))
        return jnp.reshape(made, (-1, *shape))

    _, uses = record_columns(trace, params, make_columns)
    count = trace.outputs if columns == "exact" else columns
    origin = zeros_vector(params)
    return GaussNewtonFactors(uses, vectors_like(params), origin, trace.cases, count)


def _column_maker(
    columns: Columns, key: chex.PRNGKey | None
) -> Callable[[tuple[int, ...], Any], jax.Array]:
    """Makes what the square roots are multiplied with, ``(M, N, C)``: unit vectors or signs."""
    if columns == "exact":
        return lambda shape, dtype: jnp.tile(
            jnp.eye(shape[-1], dtype=dtype)[:, None], (1, shape[0], 1)
        )
    check_static_count("columns", columns)
    if key is None:
        raise ValueError("factor_gauss_newton: sampled `columns` need a random `key`.")
    random_key, count = key, columns

    def signs(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.rademacher(random_key, (count, *shape), dtype) / count**0.5

    return signs
