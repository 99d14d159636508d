r"""Curvature that is passed back from layer to layer, and the solves with its Kronecker products.

For a layer ``s = a W + b`` with the curvature ``S`` of the objective in ``s``, the block of the
bias is ``S``, and that of the weight is :math:`A \otimes S` with a moment ``A`` of the inputs.
All systems are those of a mixture with the identity, :math:`(1 - \alpha) B + \alpha I`.

Source: Chen, Chou, Chang (2018), BDA-PCH: Block-diagonal approximation of positive-curvature
Hessian for training neural networks, arXiv 1802.06502.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve
from jax.typing import ArrayLike

from secondorder.products import inner, matmul
from secondorder.spread import ALONE, Devices

CurvatureTransform: TypeAlias = Literal["abs", "clip", "zero"]


def make_positive(curvature: jax.Array, transform: CurvatureTransform) -> jax.Array:
    """What is done to the curvature of functions between layers, element by element.

    Args:
      curvature: Any array.
      transform: ``"abs"``: the absolute value; ``"clip"``: zero in place of what is negative;
        ``"zero"``: zero, which leaves the Gauss-Newton matrix.

    Returns:
      An array like it, not negative.

    Example:
      >>> make_positive(jnp.array([-1.0, 2.0]), "clip").tolist()
      [0.0, 2.0]
    """
    if transform == "zero":
        return jnp.zeros_like(curvature)
    return jnp.abs(curvature) if transform == "abs" else jnp.maximum(curvature, 0)


def pass_back(
    curvature: jax.Array,
    weight: jax.Array,
    slopes: jax.Array,
    bend: jax.Array,
    transform: CurvatureTransform,
    devices: Devices = ALONE,
) -> jax.Array:
    r"""The curvature in the argument of a function, from that in the output of the next layer.

    .. math:: (W S W^\top) \circ M + \mathrm{diag}(T(c))

    Args:
      curvature: ``S``, symmetric (outputs, outputs).
      weight: ``W``, (inputs, outputs).
      slopes: ``M``, moment of the first derivatives of the function: symmetric (inputs, inputs), or
        their mean (inputs,) in place of its outer product.
      bend: ``c``, mean curvature of the function (inputs,).
      transform: ``T``, what makes it positive.
      devices: What shares the product with the weight.

    Returns:
      Matrix (inputs, inputs), positive semidefinite if ``S`` and ``M`` are.

    Example:
      >>> pass_back(jnp.ones((1, 1)), jnp.full((1, 1), 2.0), jnp.full(1, 0.5), -jnp.ones(1), "abs")
      Array([[2.]], dtype=float32)
    """

    def rows_inward(rows: jax.Array, curvature: jax.Array, weight: jax.Array) -> jax.Array:
        return matmul(matmul(rows, curvature), weight.T)

    whole = weight, curvature, weight
    inward = devices.gather(devices.spread(rows_inward, *whole, in_axes=(0, None, None)))
    moment = slopes if slopes.ndim == 2 else jnp.outer(slopes, slopes)
    passed = inward * moment + jnp.diag(make_positive(bend, transform))
    return (passed + passed.T) / 2


def kronecker_product(inputs: jax.Array, outputs: jax.Array, matrix: jax.Array) -> jax.Array:
    r"""The product of a weight's block with a matrix, :math:`A V S`.

    Args:
      inputs: ``A``, symmetric (i, i), or a vector ``m`` (i,) for :math:`A = m m^\top`.
      outputs: ``S``, symmetric (o, o).
      matrix: ``V``, (i, o).

    Returns:
      Matrix (i, o).

    Example:
      >>> kronecker_product(jnp.array([1.0, 2.0]), 3 * jnp.eye(1), jnp.ones((2, 1))).tolist()
      [[9.0], [18.0]]
    """
    if inputs.ndim == 1:
        return jnp.outer(inputs, matmul(matmul(inputs, matrix), outputs))
    return matmul(matmul(inputs, matrix), outputs)


def solve_mixed(curvature: jax.Array, vector: jax.Array, mixing: ArrayLike) -> jax.Array:
    r"""Solves :math:`((1 - \alpha) S + \alpha I) x = v` by Cholesky factorization.

    Args:
      curvature: ``S``, symmetric positive semidefinite (n, n).
      vector: ``v``, (n,).
      mixing: :math:`\alpha` in (0, 1].

    Returns:
      Vector (n,); not finite if the matrix is indefinite.

    Example:
      >>> solve_mixed(jnp.diag(jnp.array([1.0, 3.0])), jnp.array([1.0, 2.0]), 0.5).round(3).tolist()
      [1.0, 1.0]
    """
    return _solve_shifted(curvature, vector, 1 - mixing, mixing)


def solve_mixed_kronecker(
    inputs: jax.Array, outputs: jax.Array, matrix: jax.Array, mixing: ArrayLike
) -> jax.Array:
    r"""Solves :math:`(1 - \alpha) A X S + \alpha X = V`.

    For :math:`A = m m^\top` the vector :math:`u = m^\top X` solves a system of the size of ``S``,

    .. math:: ((1 - \alpha) |m|^2 S + \alpha I)\, u = V^\top m, \qquad
        X = (V - (1 - \alpha)\, m (S u)^\top) / \alpha

    and for any other ``A`` the eigenvectors of both matrices make the system diagonal.

    Args:
      inputs: ``A``, symmetric positive semidefinite (i, i), or ``m`` (i,).
      outputs: ``S``, symmetric positive semidefinite (o, o).
      matrix: ``V``, (i, o).
      mixing: :math:`\alpha` in (0, 1].

    Returns:
      ``X``, matrix (i, o).

    Example:
      >>> x = solve_mixed_kronecker(jnp.ones(1), 3 * jnp.eye(1), 4 * jnp.ones((1, 1)), 0.5)
      >>> x.round(3).tolist()
      [[2.0]]
    """
    if inputs.ndim == 2:
        left, rows = jnp.linalg.eigh(inputs)
        right, columns = jnp.linalg.eigh(outputs)
        return solve_mixed_eigenpairs(left, rows, right, columns, matrix, mixing)
    weight = (1 - mixing) * inner(inputs, inputs)
    along = _solve_shifted(outputs, matmul(inputs, matrix), weight, mixing)
    return (matrix - (1 - mixing) * jnp.outer(inputs, matmul(outputs, along))) / mixing


def _solve_shifted(
    matrix: jax.Array, vector: jax.Array, weight: ArrayLike, shift: ArrayLike
) -> jax.Array:
    """Solves ``(weight * matrix + shift * I) x = vector``."""
    scaled = weight * matrix
    # What is positive semidefinite but for rounding must not fail where the shift is smaller.
    precision = float(np.finfo(matrix.dtype).eps)
    rounding = len(matrix) * precision * jnp.max(jnp.abs(jnp.diag(scaled)))
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    root = jnp.linalg.cholesky(scaled + (shift + rounding) * identity, symmetrize_input=False)
    return cho_solve((root, True), vector)


def solve_mixed_eigenpairs(
    left: jax.Array,
    rows: jax.Array,
    right: jax.Array,
    columns: jax.Array,
    matrix: jax.Array,
    mixing: ArrayLike,
) -> jax.Array:
    r"""`solve_mixed_kronecker` where the bases of eigenvectors make the system diagonal.

    Args:
      left: Eigenvalues of ``A``, (i,).
      rows: Its eigenvectors as columns, (i, i).
      right: Eigenvalues of ``S``, (o,).
      columns: Its eigenvectors, (o, o).
      matrix: ``V``, (i, o).
      mixing: :math:`\alpha` in (0, 1].

    Returns:
      ``X``, matrix (i, o).

    Example:
      >>> one = jnp.ones(1), jnp.eye(1)
      >>> solve_mixed_eigenpairs(*one, 3 * one[0], one[1], 4 * jnp.ones((1, 1)), 0.5).tolist()
      [[2.0]]
    """
    rotated = matmul(matmul(rows.T, matrix), columns)
    # Negative eigenvalues are rounding errors.
    curvature = jnp.outer(jnp.maximum(left, 0), jnp.maximum(right, 0))
    solved = rotated / ((1 - mixing) * curvature + mixing)
    return matmul(matmul(rows, solved), columns.T)
