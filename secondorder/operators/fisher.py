r"""Curvature from outer products: sampled and empirical Fisher matrices, and diagonals.

With :math:`J_n` the Jacobian of case ``n``, one row of outputs ``(C,)``, all are of the form

.. math:: F = \sum_n J_n^\top u_n u_n^\top J_n.

A product goes forward through the linearized model, takes one inner product per case, and goes
back. The rows :math:`u_n` are drawn or computed once, so that an operator is one fixed matrix.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder.checks import check_choice, check_static_count
from secondorder.objective import Microbatches, Objective
from secondorder.operators.gauss_newton import Linearization, linearize_model
from secondorder.operators.linear_operator import LinearOperator, vectors_like
from secondorder.operators.output_factor import (
    OutputFactor,
    OutputStructure,
    apply_factor,
    check_outputs,
    output_factor,
    widen_outputs,
)
from secondorder.operators.pieces import mean_over_pieces, over_pieces
from secondorder.sharding import check_sees_batch, shard_like
from secondorder.tree import zeros_vector

SplitObjective: TypeAlias = Objective[Any] | Microbatches[Any]
Noise: TypeAlias = Literal["rademacher", "normal"]
Draw: TypeAlias = Callable[[jax.Array], jax.Array]

_NOISES = {"rademacher": jax.random.rademacher, "normal": jax.random.normal}


def fisher(
    objective: SplitObjective,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    samples: int = 1,
    structure: OutputStructure = "auto",
    noise: Noise = "rademacher",
) -> LinearOperator:
    r"""A sampled Fisher matrix, whose expectation is the Gauss-Newton matrix.

    .. math:: F = \sum_n J_n^\top \Big(\frac1M \sum_{m=1}^M u_{nm} u_{nm}^\top\Big) J_n, \qquad
        u_{nm} = S_n \epsilon_{nm}, \quad S_n S_n^\top = H_n

    For the negative log-likelihood of an exponential family in its natural parameters, such as
    softmax cross entropy and squared error, ``G`` is the Fisher information matrix. Its rank is at
    most ``M`` per case.

    Args:
      objective: The split objective. The outputs are one array ``(N..., C)``, and the loss
        couples them within a case only; see `output_factor`.
      params: The point, a pytree of arrays.
      key: PRNG key of the noise.
      samples: ``M``, at least 1, static.
      structure: Of the Hessian of the loss within a case, see `output_factor`; by default as it is
        seen to be.
      noise: Distribution of ``ε``: random signs, or ``"normal"``. Signs vary less, and are exact
        for ``C = 1``.

    Returns:
      The operator on vectors like the parameters, float32 or wider; positive semidefinite.

    Raises:
      TypeError: If the objective is not split, or its outputs are not one array.
      ValueError: If one of the settings is out of range.

    Example:
      >>> import secondorder as so
      >>> x = jnp.ones((2, 1))
      >>> objective = so.Objective(lambda w: x * w, lambda z: 2 * jnp.sum(z**2))
      >>> fisher(objective, jnp.ones(1), jax.random.key(0)).as_matrix().tolist()
      [[8.0]]

    Source: Martens (2020), New insights and perspectives on the natural gradient method, JMLR 21.
    """
    check_static_count("samples", samples)
    check_choice("noise", noise, tuple(_NOISES))

    def make(piece: Objective[Any], index: chex.Numeric) -> LinearOperator:
        at = _linearize(piece, params)
        factor = output_factor(piece.loss, at.outputs, structure)
        keys = jax.random.split(jax.random.fold_in(key, index), samples)
        rows = jax.vmap(lambda k: sample_row(factor, at.outputs, k, noise))(keys)
        return _outer_products(at, rows, 1 / samples, params)

    return over_pieces(make, objective, params)


def empirical_fisher(
    objective: SplitObjective, params: chex.ArrayTree, cases: int | None = None
) -> LinearOperator:
    r"""The empirical Fisher matrix, the second moment of the gradients of the cases.

    .. math:: F = \frac1N \sum_n g_n g_n^\top, \qquad g_n = N J_n^\top \partial\ell / \partial z_n,

    so that their mean is the gradient of the objective.

    Args:
      objective: The split objective. The outputs are one array ``(N..., C)``, and the loss is a
        mean over cases.
      params: The point, a pytree of arrays.
      cases: ``N``, the number of cases that the loss averages over, in one piece of
        `Microbatches`. By default the product of all axes of the outputs but the last: every
        position of a sequence is a case.

    Returns:
      The operator on vectors like the parameters, float32 or wider; positive semidefinite.

    Raises:
      TypeError: If the objective is not split, or its outputs are not one array.
      ValueError: If ``cases`` is not a positive integer.

    Example:
      >>> import secondorder as so
      >>> x = jnp.array([[1.0], [3.0]])
      >>> objective = so.Objective(lambda w: x * w, jnp.mean)  # gradients 1 and 3
      >>> empirical_fisher(objective, jnp.ones(1)).as_matrix().tolist()
      [[5.0]]
    """

    def make(piece: Objective[Any], _: chex.Numeric) -> LinearOperator:
        at = _linearize(piece, params)
        rows, count = _case_gradients(piece, at, cases)
        return _outer_products(at, rows[None], count, params)

    return over_pieces(make, objective, params)


def gauss_newton_diagonal(
    objective: SplitObjective,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    probes: int = 1,
    structure: OutputStructure = "auto",
) -> chex.ArrayTree:
    r"""An unbiased estimate of the diagonal of the Gauss-Newton matrix.

    .. math:: \frac1K \sum_{k=1}^K (J^\top S \epsilon_k)^2, \qquad \epsilon_k \in \{-1, 1\}^{N C}

    Not negative, unlike estimates from products with ``G``.

    Args:
      objective: The split objective. The outputs are one array ``(N..., C)``, and the loss
        couples them within a case only; see `output_factor`.
      params: The point, a pytree of arrays.
      key: PRNG key of the signs.
      probes: ``K``, the number of backward passes, at least 1, static.
      structure: Of the Hessian of the loss within a case, see `output_factor`; by default as it is
        seen to be.

    Returns:
      A pytree like the vectors, float32 or wider, not negative.

    Raises:
      TypeError: If the objective is not split, or its outputs are not one array.
      ValueError: If one of the settings is out of range.

    Example:
      >>> import secondorder as so
      >>> objective = so.Objective(lambda w: jnp.array([1.0, 3.0]) * w, lambda z: jnp.sum(z**2) / 2)
      >>> gauss_newton_diagonal(objective, jnp.ones(2), jax.random.key(0)).tolist()
      [1.0, 9.0]

    Source: Chapelle, Erhan (2011), Improved preconditioner for Hessian free optimization.
    """
    check_static_count("probes", probes)

    def measure(piece: Objective[Any], index: chex.Numeric) -> chex.ArrayTree:
        at = _linearize(piece, params)
        factor = output_factor(piece.loss, at.outputs, structure)

        def draw(probe_key: chex.PRNGKey) -> jax.Array:
            return sample_row(factor, at.outputs, probe_key, "rademacher")

        keys = jax.random.split(jax.random.fold_in(key, index), probes)
        return _sum_of_squares(at, draw, keys, 1 / probes, params)

    return mean_over_pieces(measure, objective, params)


def empirical_fisher_diagonal(
    objective: SplitObjective,
    params: chex.ArrayTree,
    key: chex.PRNGKey,
    probes: int = 1,
    cases: int | None = None,
) -> chex.ArrayTree:
    r"""An unbiased estimate of the mean of the squared gradients of the cases.

    .. math:: \frac1K \sum_{k=1}^K \frac1N \Big(\sum_n \sigma_{kn} g_n\Big)^2, \qquad
        \sigma_{kn} \in \{-1, 1\}

    Its expectation is the diagonal of `empirical_fisher`: no gradient of a single case is formed.

    Args:
      objective: The split objective. The outputs are one array ``(N..., C)``, and the loss is a
        mean over cases.
      params: The point, a pytree of arrays.
      key: PRNG key of the signs.
      probes: ``K``, the number of backward passes, at least 1, static.
      cases: ``N``; see `empirical_fisher`.

    Returns:
      A pytree like the vectors, float32 or wider, not negative.

    Raises:
      TypeError: If the objective is not split, or its outputs are not one array.
      ValueError: If one of the settings is out of range.

    Example:
      >>> import secondorder as so
      >>> objective = so.Objective(lambda w: (jnp.array([1.0, 3.0]) * w)[None], jnp.sum)
      >>> empirical_fisher_diagonal(objective, jnp.ones(2), jax.random.key(0)).tolist()
      [1.0, 9.0]
    """
    check_static_count("probes", probes)

    def measure(piece: Objective[Any], index: chex.Numeric) -> chex.ArrayTree:
        at = _linearize(piece, params)
        rows, count = _case_gradients(piece, at, cases)

        def draw(probe_key: chex.PRNGKey) -> jax.Array:
            return rows * jax.random.rademacher(probe_key, rows.shape[:-1], rows.dtype)[..., None]

        keys = jax.random.split(jax.random.fold_in(key, index), probes)
        return _sum_of_squares(at, draw, keys, count / probes, params)

    return mean_over_pieces(measure, objective, params)


def _linearize(piece: Objective[Any], params: chex.ArrayTree) -> Linearization:
    """The model at a point; its cases must all be there, as squares do not add up over devices."""
    check_sees_batch("A Fisher matrix or a diagonal", params)
    return linearize_model(piece, params)


def sample_row(
    factor: OutputFactor, outputs: jax.Array, key: chex.PRNGKey, noise: Noise = "rademacher"
) -> jax.Array:
    r"""One sample of :math:`u = S \epsilon` for every case, whose second moment is the Hessian.

    Args:
      factor: ``S``, as `output_factor` makes it.
      outputs: The outputs, array ``(N..., C)``.
      key: PRNG key of the noise.
      noise: Its distribution.

    Returns:
      Array like the outputs, float32 or wider.

    Example:
      >>> row = sample_row(2 * jnp.ones((3, 1)), jnp.ones((3, 1)), jax.random.key(0))
      >>> jnp.abs(row).tolist()
      [[2.0], [2.0], [2.0]]
    """
    row = apply_factor(factor, _NOISES[noise](key, outputs.shape, factor.dtype))
    return shard_like(row, outputs)


def _case_gradients(
    objective: Objective[Any], at: Linearization, cases: int | None
) -> tuple[jax.Array, int]:
    """The rows ``g_n / N`` in the outputs, array ``(N..., C)``, float32 or wider; and ``N``."""
    if cases is not None:
        check_static_count("cases", cases)
    check_outputs(at.outputs)
    rows = jax.grad(objective.loss)(widen_outputs(at.outputs))
    return rows, rows.size // rows.shape[-1] if cases is None else cases


def _outer_products(
    at: Linearization, rows: jax.Array, weight: float, params: chex.ArrayTree
) -> LinearOperator:
    """A weight times the outer products of rows ``(M, N..., C)``, each pulled back by itself."""

    def product(vector: chex.ArrayTree) -> chex.ArrayTree:
        tangents = at.forward(vector).astype(rows.dtype)
        along = jnp.sum(rows * tangents, axis=-1, keepdims=True)
        cotangents = weight * jnp.sum(rows * along, axis=0)
        return at.backward(cotangents.astype(at.outputs.dtype))

    return LinearOperator(product, vectors_like(params))


def _sum_of_squares(
    at: Linearization, draw: Draw, keys: jax.Array, weight: float, params: chex.ArrayTree
) -> chex.ArrayTree:
    """A weight times the squares of drawn rows ``(N..., C)``, each pulled back all at once."""

    def add(total: chex.ArrayTree, key: jax.Array) -> tuple[chex.ArrayTree, None]:
        pulled = at.backward(draw(key).astype(at.outputs.dtype))
        return jax.tree.map(lambda t, v: t + weight * v**2, total, pulled), None

    return jax.lax.scan(add, zeros_vector(params), keys)[0]
