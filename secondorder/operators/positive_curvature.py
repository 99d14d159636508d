r"""The positive-curvature Hessian of a chain of dense layers.

The Hessian of a layered model is its Gauss-Newton matrix and, for every function between layers,
the curvature of that function times the derivative of the objective in its value:

.. math:: J^\top H J + \sum_l J_l^\top \mathrm{diag}(\varphi_l''\, \partial f / \partial a_l) J_l,
   \qquad J_l = \partial s_l / \partial\theta,

within each layer's block. The positive-curvature Hessian keeps these terms and makes them positive
semidefinite, element by element. So it is the Gauss-Newton matrix of another objective: the
model returns the arguments :math:`s_l` of those functions too, and the loss has the diagonal as its
curvature there.

Reference:
  Chen, Chou, Chang (2018), BDA-PCH: Block-diagonal approximation of positive-curvature Hessian for
  training neural networks, arXiv 1802.06502.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from secondorder.factors.positive_curvature import CurvatureTransform, make_positive
from secondorder.layers import Layers
from secondorder.layers.chains import layer_sums, read_units, trace_chain
from secondorder.objective import Microbatches, Objective
from secondorder.operators.block_diagonal import block_gauss_newton
from secondorder.operators.expectation import LayerLeaves, layer_leaves
from secondorder.operators.gauss_newton import gauss_newton
from secondorder.operators.linear_operator import LinearOperator
from secondorder.operators.pieces import over_pieces
from secondorder.tree import label_blocks


def positive_curvature_objective(
    objective: Objective[Any],
    params: chex.ArrayTree,
    layers: Layers,
    transform: CurvatureTransform = "abs",
) -> Objective[Any]:
    """The objective whose Gauss-Newton matrix, layer by layer, is the positive-curvature Hessian.

    What stands between the last layer and the model's outputs counts by its Gauss-Newton matrix.

    Args:
      objective: The split objective, in one piece; its model is a chain of dense layers.
      params: The parameters.
      layers: Its layers.
      transform: What makes the curvature of the functions between them positive.

    Returns:
      An objective of the same parameters, for its curvature at ``params`` only: its value and its
      gradient mean nothing.

    Raises:
      ValueError: If the model is no chain of dense layers with elementwise functions between.

    Example:
      >>> import secondorder as so
      >>> x = jnp.ones((4, 1))
      >>> objective = so.Objective(lambda p: (x @ p[0]) ** 2 @ p[1], jnp.mean)
      >>> params = (jnp.ones((1, 1)), -jnp.ones((1, 1)))
      >>> layers = so.find_layers(objective, params)
      >>> positive = positive_curvature_objective(objective, params, layers)
      >>> gauss_newton(positive, params).as_matrix().tolist()
      [[2.0, 0.0], [0.0, 0.0]]
    """
    chain = trace_chain(objective, params, layers)
    units = read_units(chain, params)
    diagonals = [make_positive(jax.lax.stop_gradient(unit.bend), transform) for unit in units]

    def model(point: chex.ArrayTree) -> tuple[Any, tuple[jax.Array, ...]]:
        seen = chain.run(point)
        return seen.outputs, layer_sums(chain, seen, point)[:-1]

    def loss(outputs: tuple[Any, tuple[jax.Array, ...]]) -> jax.Array:
        terms = zip(diagonals, outputs[1], strict=True)
        return sum((jnp.sum(d * s**2) / 2 for d, s in terms), start=objective.loss(outputs[0]))

    return Objective(model, loss)


def positive_curvature(
    objective: Objective[Any] | Microbatches[Any],
    params: chex.ArrayTree,
    layers: Layers,
    transform: CurvatureTransform = "abs",
) -> LinearOperator:
    """The positive-curvature Hessian, with its blocks between layers.

    Args:
      objective: The split objective; its model is a chain of dense layers.
      params: The parameters.
      layers: Its layers.
      transform: What makes the curvature of the functions between them positive.

    Returns:
      The operator, positive semidefinite if the loss is convex in the outputs.

    Raises:
      ValueError: If the model is no chain of dense layers with elementwise functions between.

    Example:
      >>> import secondorder as so
      >>> x, y = jnp.ones((4, 1)), jnp.full((4, 1), 2.0)
      >>> objective = so.Objective(
      ...     lambda p: jnp.tanh(x @ p["a"]) @ p["b"], lambda z: jnp.mean((z - y) ** 2))
      >>> params = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}
      >>> layers = so.find_layers(objective, params)
      >>> matrix = positive_curvature(objective, params, layers).as_matrix()
      >>> [[round(element, 3) for element in row] for row in matrix.tolist()]
      [[1.937, 0.64], [0.64, 1.16]]

    Source: Chen, Chou, Chang (2018), section 3.
    """
    return over_pieces(
        lambda piece, _: gauss_newton(
            positive_curvature_objective(piece, params, layers, transform), params
        ),
        objective,
        params,
    )


def block_positive_curvature(
    objective: Objective[Any] | Microbatches[Any],
    params: chex.ArrayTree,
    layers: Layers,
    transform: CurvatureTransform = "abs",
) -> LinearOperator:
    """The blocks of the positive-curvature Hessian, one for each weight and each bias.

    Args:
      objective: The split objective; its model is a chain of dense layers.
      params: The parameters.
      layers: Its layers.
      transform: What makes the curvature of the functions between them positive.

    Returns:
      The operator on vectors like those of `layer_leaves`, a pytree of the leaves in layers by
      index.

    Raises:
      ValueError: If the model is no chain of dense layers with elementwise functions between.

    Example:
      >>> import secondorder as so
      >>> x = jnp.ones((4, 1))
      >>> objective = so.Objective(lambda p: (x @ p[0]) ** 2 @ p[1], lambda z: jnp.mean(z**2))
      >>> params = (jnp.ones((1, 1)), -jnp.ones((1, 1)))
      >>> layers = so.find_layers(objective, params)
      >>> block_positive_curvature(objective, params, layers).as_matrix().tolist()
      [[12.0, 0.0], [0.0, 2.0]]

    Source: Chen, Chou, Chang (2018), section 3.
    """
    leaves, structure = jax.tree.flatten(params)
    part = layer_leaves(params, layers)
    blocks = label_blocks(lambda path: path, part)

    def make(piece: Objective[Any], _: chex.Numeric) -> LinearOperator:
        whole = positive_curvature_objective(piece, params, layers, transform)

        def model(point: LayerLeaves) -> Any:
            moved = [point.get(index, leaf) for index, leaf in enumerate(leaves)]
            return whole.model(jax.tree.unflatten(structure, moved))

        return block_gauss_newton(Objective(model, whole.loss), part, blocks)

    return over_pieces(make, objective, part)
