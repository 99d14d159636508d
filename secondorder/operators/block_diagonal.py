r"""Block-diagonal curvature of any function, by one linearization per block of the parameters.

.. math:: B = \mathrm{diag}(J_1^\top H J_1, \dots, J_L^\top H J_L), \qquad
    J_b = \partial z / \partial\theta_b

Tangents start at the block and cotangents stop at it, so that for ``L`` layers of equal cost a
product of all blocks costs ``L + 1`` forward passes instead of ``4 L``. The ``L`` traces of the
model's forward pass are one and the same, and are computed once when all is in one `jax.jit`.

The other parameters are closed over, so that their tangents are zeros that are never formed. Dense
zero tangents would cost a product each, and XLA is known to have miscompiled them on CPUs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder.jaxprs import canonical_convolutions
from secondorder.objective import Microbatches, Objective, reparametrize, value_and_aux
from secondorder.operators.gauss_newton import (
    Linearization,
    LinearizationMode,
    linearize_model,
    output_hessian,
)
from secondorder.operators.linear_operator import LinearOperator, vectors_like
from secondorder.operators.pieces import over_pieces
from secondorder.sharding import replicate, replicated_zeros, sum_of_parts
from secondorder.tree import accumulation_dtype, gram
from secondorder.tree.blocks import Blocks, embedding

Part: TypeAlias = list[jax.Array]  # the leaves of one block
PartProduct: TypeAlias = Callable[[Part], Part]


def _assemble(
    products: Sequence[PartProduct], blocks: Blocks, params: chex.ArrayTree
) -> LinearOperator:
    """The operator with the given diagonal blocks."""
    like = vectors_like(params)

    def product(vector: chex.ArrayTree) -> chex.ArrayTree:
        leaves, structure = jax.tree.flatten(vector)
        result = list(leaves)
        for block, block_product in enumerate(products):
            indices = blocks.leaves_of(block)
            part = block_product([leaves[index] for index in indices])
            for index, leaf in zip(indices, part, strict=True):
                result[index] = leaf.astype(leaves[index].dtype)
        return jax.tree.unflatten(structure, result)

    return LinearOperator(product, like)


def block_gauss_newton(
    objective: Any, params: chex.ArrayTree, blocks: Blocks, mode: LinearizationMode = "forward"
) -> LinearOperator:
    r"""The block-diagonal part of the generalized Gauss-Newton matrix.

    Works for every model and every partition of its leaves. A block early in the model costs more
    than a late one, because its tangents pass all that follows; a leaf that stacks the layers of a
    scan costs as much as a full product.

    Args:
      objective: The split objective, or `Microbatches` of it.
      params: The point, a pytree of arrays.
      blocks: The partition of the leaves of ``params``, of ``L`` blocks.
      mode: How the model is linearized, as in `gauss_newton`.

    Returns:
      The operator on vectors like the parameters, float32 or wider. Positive semidefinite if the
      loss is convex in the outputs.

    Example:
      >>> import jax.numpy as jnp
      >>> import secondorder as so
      >>> from secondorder.tree.blocks import label_blocks
      >>> objective = so.Objective(lambda p: p["a"] + 2 * p["b"], lambda z: jnp.sum(z**2) / 2)
      >>> params = {"a": jnp.ones(1), "b": jnp.ones(1)}
      >>> blocks = label_blocks(lambda path: path, params)
      >>> block_gauss_newton(objective, params, blocks).as_matrix().tolist()
      [[1.0, 0.0], [0.0, 4.0]]

    Source: Zhang, Xiong, Bradbury, Socher (2017), Block-diagonal Hessian-free optimization for
    training neural networks, arXiv 1712.07296.
    """
    return over_pieces(
        lambda piece, _: _gauss_newton_of_piece(piece, params, blocks, mode), objective, params
    )


def _gauss_newton_of_piece(
    objective: Objective[Any], params: chex.ArrayTree, blocks: Blocks, mode: LinearizationMode
) -> LinearOperator:
    """The operator of one split objective."""
    products, hessian = [], None
    for at in _linearize_blocks(objective, params, blocks, mode):
        hessian = hessian or output_hessian(objective.loss, at.outputs, mode)
        products.append(_sandwich(at.forward, hessian, at.backward))
    return _assemble(products, blocks, params)


def _linearize_blocks(
    objective: Objective[Any], params: chex.ArrayTree, blocks: Blocks, mode: LinearizationMode
) -> Iterator[Linearization]:
    """The model as a function of each block, linearized, with the others held."""
    leaves = jax.tree.leaves(params)
    for block in range(len(blocks)):
        indices = blocks.leaves_of(block)
        of_block = reparametrize(objective, embedding(params, indices))
        yield linearize_model(of_block, [leaves[index] for index in indices], mode)


def _sandwich(
    forward: Callable[[Part], Any], middle: Callable[[Any], Any], backward: Callable[[Any], Any]
) -> PartProduct:
    return lambda part: backward(middle(forward(part)))


def block_gauss_newton_forms(
    objective: Objective[Any] | Microbatches[Any], params: chex.ArrayTree, blocks: Blocks
) -> Callable[[chex.ArrayTree], jax.Array]:
    r"""The values :math:`v_k^\top G v_l` of the Gauss-Newton matrix on the blocks of one vector.

    With :math:`v_k` the vector in block ``k`` and zero elsewhere, all blocks are on: the matrix is
    not block diagonal. Nothing is passed back, and tangents start at the block, so that ``L``
    layers of equal cost take about ``(L + 3) / 2`` forward passes.

    Args:
      objective: The split objective.
      params: The point, a pytree of arrays.
      blocks: The partition of the leaves of ``params``, of ``L`` blocks.

    Returns:
      A function from a vector like the parameters to the symmetric matrix ``(L, L)``, float32 or
      wider. The sum of its entries is the value for the whole vector.

    Raises:
      TypeError: If the objective is not split.

    Example:
      >>> import jax.numpy as jnp
      >>> import secondorder as so
      >>> from secondorder.tree.blocks import label_blocks
      >>> objective = so.Objective(lambda p: p["a"] + 2 * p["b"], lambda z: jnp.sum(z**2) / 2)
      >>> params = {"a": jnp.ones(1), "b": jnp.ones(1)}
      >>> blocks = label_blocks(lambda path: path, params)
      >>> block_gauss_newton_forms(objective, params, blocks)(params).tolist()
      [[1.0, 2.0], [2.0, 4.0]]

    Source: as `gauss_newton_forms`, by the linearizations of `block_gauss_newton`.
    """

    def forms(vector: chex.ArrayTree) -> jax.Array:
        def of_piece(piece: Objective[Any]) -> jax.Array:
            images, curved = _images_of_blocks(piece, params, blocks, vector)
            matrix = replicate(gram(images, curved))
            return sum_of_parts((matrix + matrix.T) / 2, params)

        if not isinstance(objective, Microbatches):
            return of_piece(objective)
        zeros = replicated_zeros((len(blocks), len(blocks)), accumulation_dtype(params))
        result: jax.Array = objective.mean(lambda piece, _: of_piece(piece), zeros)
        return result

    return forms


def _images_of_blocks(
    objective: Objective[Any], params: chex.ArrayTree, blocks: Blocks, vector: chex.ArrayTree
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """The stack of ``J v_k`` of all blocks of a vector, and the Hessian of the loss times it."""
    leaves, images, at = jax.tree.leaves(vector), [], None
    for block, at in enumerate(_linearize_blocks(objective, params, blocks, "forward")):
        images.append(at.forward([leaves[index] for index in blocks.leaves_of(block)]))
    if at is None:
        raise ValueError("There are no blocks.")
    stack = jax.tree.map(lambda *rows: jnp.stack(rows), *images)
    return stack, jax.vmap(output_hessian(objective.loss, at.outputs))(stack)


def block_hessian(
    value_fn: Callable[[Any], Any], params: chex.ArrayTree, blocks: Blocks
) -> LinearOperator:
    r"""The block-diagonal part of the Hessian, :math:`\mathrm{diag}(\nabla^2_{bb} f)`.

    Args:
      value_fn: Maps the parameters to the scalar value, or to ``(value, aux)``.
      params: The point, a pytree of arrays.
      blocks: The partition of the leaves of ``params``, of ``L`` blocks.

    Returns:
      The operator on vectors like the parameters, float32 or wider; indefinite in general.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder.tree.blocks import label_blocks
      >>> params = {"a": jnp.ones(1), "b": jnp.ones(1)}
      >>> blocks = label_blocks(lambda path: path, params)
      >>> operator = block_hessian(lambda p: jnp.sum(p["a"] ** 2 * p["b"]), params, blocks)
      >>> operator.as_matrix().tolist()
      [[2.0, 0.0], [0.0, 0.0]]

    Source: Pearlmutter (1994), Fast exact multiplication by the Hessian, Neural Computation 6.
    """
    return over_pieces(lambda piece, _: _hessian_of_piece(piece, params, blocks), value_fn, params)


def _hessian_of_piece(
    value_fn: Callable[[Any], Any], params: chex.ArrayTree, blocks: Blocks
) -> LinearOperator:
    """The operator of one objective: the gradient of each block, linearized in that block."""
    leaves, dtype = jax.tree.leaves(params), accumulation_dtype(params)
    products = []
    for block in range(len(blocks)):
        indices = blocks.leaves_of(block)
        value = reparametrize(value_and_aux(value_fn), embedding(params, indices))
        gradient = canonical_convolutions(jax.grad(value, has_aux=True))
        products.append(_linearized(gradient, [leaves[index] for index in indices], dtype))
    return _assemble(products, blocks, params)


def _linearized(gradient: Callable[[Part], Any], point: Part, dtype: Any) -> PartProduct:
    """The products with the derivative of a gradient, its aux dropped."""
    _, tangents = jax.linearize(lambda part: gradient(part)[0], point)

    def product(part: Part) -> Part:
        moved = [v.astype(p.dtype) for v, p in zip(part, point, strict=True)]
        return [leaf.astype(dtype) for leaf in tangents(moved)]

    return product
