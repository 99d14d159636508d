r"""Orthonormal bases of the span of a stack of vectors.

Cholesky factors of a Gram matrix fail in float32 as soon as the vectors have a condition number of
some thousands. SVQB takes the eigenvectors of the scaled Gram matrix instead, with a floor under
its eigenvalues, and repeats: each pass divides the condition number by about a thousand, and
exchanges nothing between devices but a matrix of the size of the number of vectors.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from secondorder.products import matmul
from secondorder.sharding import replicate
from secondorder.tree import gram, mix, random_stack, stack_size

_ROUNDINGS = 10  # the floor under the eigenvalues of a scaled Gram matrix


def orthonormalize(
    stack: chex.ArrayTree, *, passes: int = 3, rotation: jax.Array | None = None
) -> chex.ArrayTree:
    r"""An orthonormal basis of the span of some vectors.

    With :math:`G = V V^\top`, :math:`D = \mathrm{diag}(G)^{-1/2}` and
    :math:`D G D = Q \Lambda Q^\top` a pass is

    .. math:: V \gets \max(\Lambda, \phi \max_i \lambda_i)^{-1/2}\, Q^\top D\, V.

    In float32 three passes are enough up to condition numbers of a million, and two of any, if the
    vectors are nearly orthogonal and differ in their lengths only. Of vectors that are dependent,
    their rounding errors are taken for new directions; where these are zero, so is the result, see
    `complete_basis`.

    Args:
      stack: The vectors ``V``, a pytree of arrays ``(k, *shape)``, float32 or wider.
      passes: How often, at least 1; static.
      rotation: An orthogonal matrix ``R``, array ``(k, k)``, if the rows of ``R V`` are nearer to
        orthogonal than those of ``V``, or None.

    Returns:
      A stack like it, of orthonormal vectors and of zero vectors.

    Example:
      >>> basis = orthonormalize(jnp.array([[3.0, 0.0], [3.0, 1e-4]]))
      >>> jnp.allclose(basis @ basis.T, jnp.eye(2), atol=1e-6).item()
      True

    Source: Stathopoulos, Wu (2002), A block orthogonalization procedure with constant
    synchronization requirements, SIAM J. Sci. Comput. 23.
    """
    for _ in range(passes):
        products = replicate(gram(stack, stack))
        if rotation is None:
            whitener = _whitener(products)
        else:
            turned = matmul(matmul(rotation, products), rotation.T)
            whitener, rotation = matmul(_whitener(turned), rotation), None
        stack = mix(whitener, stack)
    return stack


def complete_basis(basis: chex.ArrayTree, key: jax.Array) -> chex.ArrayTree:
    """Replaces what is missing in a basis by random directions, orthogonal to the others.

    Args:
      basis: Orthonormal vectors and zero vectors, a pytree of arrays ``(k, *shape)``, ``k`` not
        above the dimension.
      key: A PRNG key; unused if no vector is zero.

    Returns:
      An orthonormal stack like it.

    Example:
      >>> basis = complete_basis(jnp.array([[1.0, 0.0], [0.0, 0.0]]), jax.random.key(0))
      >>> sorted(jnp.round(jnp.abs(basis), 5).tolist())
      [[0.0, 1.0], [1.0, 0.0]]
    """
    squares = [jnp.sum(leaf**2, axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(basis)]
    is_missing = replicate(jnp.sum(jnp.stack(squares), axis=0) < 0.5)  # of zeros and ones

    def keep_missing(rows: jax.Array) -> jax.Array:
        return jnp.where(jnp.reshape(is_missing, (-1,) + (1,) * (rows.ndim - 1)), rows, 0)

    def fill(basis: chex.ArrayTree) -> chex.ArrayTree:
        one = jax.tree.map(lambda rows: rows[0], basis)
        drawn = jax.tree.map(keep_missing, random_stack(key, one, stack_size(basis)))
        return orthonormalize(jax.tree.map(jnp.add, basis, project_out(basis, drawn)))

    return jax.lax.cond(jnp.any(is_missing), fill, lambda basis: basis, basis)


def project_out(basis: chex.ArrayTree, stack: chex.ArrayTree) -> chex.ArrayTree:
    r"""What some vectors add to the span of a basis, :math:`(I - Q^\top Q)^2` of each.

    Args:
      basis: Orthonormal and zero vectors ``Q``, a pytree of arrays ``(k, *shape)``.
      stack: The vectors, a pytree of arrays ``(j, *shape)``.

    Returns:
      A stack like the second.

    Example:
      >>> project_out(jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0]])).tolist()
      [[0.0, 4.0]]
    """
    for _ in range(2):  # which is enough for full accuracy
        inside = mix(gram(stack, basis), basis)
        stack = jax.tree.map(lambda v, w: v - w.astype(v.dtype), stack, inside)
    return stack


def _whitener(products: jax.Array) -> jax.Array:
    """The matrix of a pass from the Gram matrix."""
    squares = jnp.diagonal(products)
    scales = jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
    # Rows of zeros get an eigenvalue of their own, far from those of the others.
    scaled = scales[:, None] * products * scales - jnp.diag((scales == 0).astype(scales.dtype))
    values, basis = jnp.linalg.eigh(scaled)
    floor = _ROUNDINGS * float(np.finfo(values.dtype).eps) * jnp.abs(values[-1])
    lengths = jnp.where(values > -0.5, jax.lax.rsqrt(jnp.maximum(values, floor)), 0)
    return (lengths[:, None] * basis.T) * scales
