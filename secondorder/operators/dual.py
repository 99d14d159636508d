r"""Exact solutions with the damped block-diagonal Gauss-Newton matrix, in the space of its rows.

With the rows :math:`\tilde J_b` of `GaussNewtonFactors`, one for each case and output, and
:math:`B_b = \tilde J_b^\top \tilde J_b`,

.. math:: (B_b + \lambda_b I)^{-1} b
    = \frac1{\lambda_b} \Big( b - \tilde J_b^\top
      (\tilde J_b \tilde J_b^\top + \lambda_b I)^{-1} \tilde J_b b \Big),

a Cholesky decomposition of the size of cases times outputs, whatever the number of parameters.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from secondorder.checks import check_range
from secondorder.layers.columns import UseColumns
from secondorder.operators.factored import GaussNewtonFactors
from secondorder.products import HIGHEST
from secondorder.tree.blocks import Blocks, block_scale


def dual_gram(factors: GaussNewtonFactors, blocks: Blocks, block: int) -> jax.Array:
    r"""The Gram matrix :math:`K_b = \tilde J_b \tilde J_b^\top` of the rows of one block.

    A weight that each case meets at one position takes the elementwise product of two small Gram
    matrices, of inputs and of columns. Rows with respect to other weights are formed, ``N M``
    numbers for each parameter of the leaf.

    Args:
      factors: The factors.
      blocks: The partition.
      block: Which block.

    Returns:
      Array ``(N M, N M)``.
    """
    size = factors.cases * factors.columns
    dtype = jnp.result_type(*jax.tree.leaves(factors.like))
    gram = jnp.zeros((size, size), dtype)
    for leaf in blocks.leaves_of(block):
        weights = [use for use in factors.uses if use.use.found.leaf == leaf]
        biases = [use for use in factors.uses if use.use.found.bias == leaf]
        if len(weights) == 1 and not biases and weights[0].positions == 1:
            gram = gram + _elementwise_gram(weights[0])
        elif weights or biases:
            rows = _leaf_rows(weights, biases).reshape(size, -1)
            gram = gram + jnp.matmul(rows, rows.T, precision=HIGHEST)
    return gram


def _elementwise_gram(use: UseColumns) -> jax.Array:
    """The Gram matrix of the rows of a weight with one use and one position for each case."""
    inputs = jnp.moveaxis(use.input_rows()[:, :, 0], 1, 0)  # (stack, N, inputs)
    columns = jnp.moveaxis(use.cotangent_rows()[:, :, :, 0], 2, 0)  # (stack, N, M, outputs)
    _, cases, count, _ = columns.shape

    def one_block(inputs: jax.Array, columns: jax.Array) -> jax.Array:
        flat = columns.reshape(cases * count, -1)
        outer = jnp.matmul(flat, flat.T, precision=HIGHEST)
        inner = jnp.matmul(inputs, inputs.T, precision=HIGHEST)
        product = outer.reshape(cases, count, cases, count) * inner[:, None, :, None]
        return product.reshape(cases * count, cases * count)

    # One after the other, so that one matrix of this size is held besides their sum.
    total = one_block(inputs[0], columns[0])
    if len(inputs) == 1:
        return total
    rest = (inputs[1:], columns[1:])
    return jax.lax.scan(lambda sum_, part: (sum_ + one_block(*part), None), total, rest)[0]


def _leaf_rows(weights: Sequence[UseColumns], biases: Sequence[UseColumns]) -> jax.Array:
    """The rows of the Jacobian with respect to one leaf, ``(N, M, *leaf)``, over all its uses."""
    parts = []
    for use in weights:
        rows = jnp.einsum(
            "nsti,nmsto->nmsio", use.input_rows(), use.cotangent_rows(), precision=HIGHEST
        )
        parts.append(jax.vmap(jax.vmap(use.use.found.use.weight_view.invert))(rows))
    for use in biases:
        view = use.use.found.bias_view
        assert view is not None
        parts.append(jax.vmap(jax.vmap(view.invert))(jnp.sum(use.cotangent_rows(), axis=3)))
    return sum(parts[1:], start=parts[0])


def dual_solve(
    factors: GaussNewtonFactors,
    b: chex.ArrayTree,
    damping: chex.Numeric,
    blocks: Blocks,
    *,
    refinements: int = 1,
) -> chex.ArrayTree:
    r"""Solves :math:`(B_b + \lambda_b I)\, d_b = b_b` for every block, exactly.

    Costs one Gram matrix and one Cholesky decomposition of ``N M`` rows for each block. In float32
    the relative residual is about :math:`2 \cdot 10^{-7} / \lambda` without refinement, for ``B``
    of order one, because the difference cancels; a refinement, at the cost of two products, gains
    one or two digits at small damping.

    Args:
      factors: The factors, from `factor_gauss_newton`.
      b: The right-hand side, a pytree like the parameters; may come from another batch.
      damping: :math:`\lambda > 0`, a scalar, or an array ``(L,)`` with one for each block.
      blocks: The partition, of ``L`` blocks.
      refinements: Steps of iterative refinement, at least 0.

    Returns:
      The solution ``d``, a pytree like ``b``.

    Raises:
      ValueError: If ``damping`` is a number that is not positive, or ``refinements`` is negative.

    Example:
      >>> import secondorder as so
      >>> from secondorder.operators.factored import factor_gauss_newton
      >>> from secondorder.tree.blocks import one_block
      >>> objective = so.Objective(lambda w: jnp.ones((1, 2)) @ w, lambda z: jnp.sum(z**2) / 2)
      >>> params = jnp.zeros((2, 1))
      >>> factors = factor_gauss_newton(objective, params)
      >>> dual_solve(factors, jnp.ones((2, 1)), 0.5, one_block(params)).ravel().tolist()
      [0.4000000059604645, 0.4000000059604645]

    Source: Ren, Goldfarb (2019), Efficient subsampled Gauss-Newton and natural gradient methods
    for training neural networks, arXiv 1906.02353; Korbit et al. (2024), Exact Gauss-Newton
    optimization for training deep neural networks, arXiv 2405.14402.
    """
    check_range("damping", damping, low=0, open_low=True)
    check_range("refinements", refinements, low=0)
    dtype = jnp.result_type(*jax.tree.leaves(factors.like))
    lambdas = jnp.broadcast_to(jnp.asarray(damping, dtype), (len(blocks),))
    decompositions = [
        _decompose(dual_gram(factors, blocks, block), lambdas[block])
        for block in range(len(blocks))
    ]
    operator = factors.operator(blocks)

    def solve(b: chex.ArrayTree) -> chex.ArrayTree:
        rows = factors.rows(blocks, b).reshape(len(blocks), -1)
        solved = [
            jax.scipy.linalg.cho_solve((lower, True), row)
            for lower, row in zip(decompositions, rows, strict=True)
        ]
        shape = (len(blocks), factors.cases, factors.columns)
        along = factors.combination(blocks, jnp.stack(solved).reshape(shape))
        across = jax.tree.map(lambda v, a: v - a.astype(v.dtype), b, along)
        return block_scale(blocks, 1 / lambdas, across)

    solution = solve(b)
    for _ in range(refinements):
        damped = block_scale(blocks, lambdas, solution)
        residual = jax.tree.map(lambda v, p, q: v - p - q, b, operator(solution), damped)
        solution = jax.tree.map(jnp.add, solution, solve(residual))
    return solution


def _decompose(gram: jax.Array, damping: jax.Array) -> jax.Array:
    """The Cholesky factor of a damped Gram matrix."""
    return jnp.linalg.cholesky(gram + damping * jnp.eye(len(gram), dtype=gram.dtype))
