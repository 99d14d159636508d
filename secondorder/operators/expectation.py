r"""The approximate expectation of the positive-curvature Hessian of a chain of dense layers.

The curvature in the outputs of the layers is passed back from the last to the first,

.. math::
  S_L = \sum_n H_n, \qquad
  S_l = (W_{l+1} S_{l+1} W_{l+1}^\top) \circ E[\varphi'] E[\varphi']^\top
      + \mathrm{diag}\big(T\big(\textstyle\sum_n \varphi''_n\, \partial f / \partial a_n\big)\big)

with means over the cases of a batch in place of means of products. The block of a layer's bias is
:math:`S_l`, that of its weight :math:`m m^\top \otimes S_l` with the mean input ``m``.

Source: Chen, Chou, Chang (2018), BDA-PCH: Block-diagonal approximation of positive-curvature
Hessian for training neural networks, arXiv 1802.06502, sections 3 and 4.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder.factors.positive_curvature import (
    CurvatureTransform,
    kronecker_product,
    pass_back,
    solve_mixed,
    solve_mixed_eigenpairs,
    solve_mixed_kronecker,
)
from secondorder.layers import Layers
from secondorder.layers.chains import (
    Chain,
    layer_inputs,
    read_units,
    sum_over_cases,
    trace_chain,
)
from secondorder.layers.views import View
from secondorder.objective import Microbatches, Objective
from secondorder.operators.gauss_newton import output_hessian
from secondorder.operators.linear_operator import LinearOperator, vectors_like
from secondorder.products import matmul
from secondorder.sharding import contract, replicate, shard_like
from secondorder.spread import ALONE, Devices, map_by_shape

Moment: TypeAlias = Literal["mean", "full"]

# The parameters in layers, or a vector like them, by the index of the leaf.
LayerLeaves: TypeAlias = Mapping[int, jax.Array]

# Columns of the loss's Hessian that are computed at a time.
_COLUMNS = 16


class LayerCurvature(NamedTuple):
    r"""The curvature of a dense layer.

    Attributes:
      inputs: Mean of the inputs (i,), or their second moment (i, i).
      outputs: ``S``, curvature in the layer's outputs (o, o).
    """

    inputs: jax.Array
    outputs: jax.Array


class _Moments(NamedTuple):
    """What the recursion needs of a batch; all are means over its cases.

    Attributes:
      inputs: For each layer the mean or the second moment of its inputs.
      slopes: For each function between layers the same of its first derivatives.
      bends: For each its curvature (units,).
      head: Curvature in the outputs of the last layer (o, o).
    """

    inputs: tuple[jax.Array, ...]
    slopes: tuple[jax.Array, ...]
    bends: tuple[jax.Array, ...]
    head: jax.Array


def layer_leaves(tree: chex.ArrayTree, layers: Layers) -> dict[int, jax.Array]:
    """The part of a pytree that belongs to layers.

    Args:
      tree: A pytree like the parameters.
      layers: The layers.

    Returns:
      Its leaves by index, for those in a layer.

    Example:
      >>> import secondorder as so
      >>> params = {"scale": jnp.ones(()), "w": jnp.ones((1, 1))}
      >>> layers = so.find_layers(lambda p: jnp.sum(jnp.ones((4, 1)) @ p["w"]) * p["scale"], params)
      >>> list(layer_leaves(params, layers))
      [1]
    """
    leaves = jax.tree.leaves(tree)
    return {index: leaves[index] for layer in layers.layers for index in layer.leaves}


def expected_curvature(
    objective: Objective[Any] | Microbatches[Any],
    params: chex.ArrayTree,
    layers: Layers,
    *,
    transform: CurvatureTransform = "abs",
    input_moment: Moment = "mean",
    slope_moment: Moment = "mean",
    devices: Devices = ALONE,
) -> tuple[LayerCurvature, ...]:
    r"""The approximate expectation of the positive-curvature Hessian.

    What stands between the last layer and the model's outputs counts by its Gauss-Newton matrix.

    Args:
      objective: The split objective; its model is a chain of dense layers.
      params: The parameters.
      layers: Its layers.
      transform: What makes the curvature of the functions between them positive, after it has been
        averaged over cases.
      input_moment: ``"mean"``: :math:`E[x] E[x]^\top`; ``"full"``: :math:`E[x x^\top]`.
      slope_moment: The same of the first derivatives of the functions.
      devices: What shares the products with the weights.

    Returns:
      For each layer its curvature, float32 or wider.

    Raises:
      ValueError: If the model is no chain of dense layers with elementwise functions between.

    Example:
      >>> import secondorder as so
      >>> x = jnp.array([[1.0], [3.0]])
      >>> objective = so.Objective(lambda w: x @ w, lambda z: jnp.mean(z**2))
      >>> params = jnp.ones((1, 1))
      >>> expected_curvature(objective, params, so.find_layers(objective, params))
      (LayerCurvature(inputs=Array([2.], dtype=float32), outputs=Array([[2.]], dtype=float32)),)
    """

    def measure(piece: Objective[Any], _: chex.Numeric) -> _Moments:
        chain = trace_chain(piece, params, layers)
        return _measure(chain, piece, params, input_moment, slope_moment)

    if isinstance(objective, Microbatches):
        like = jax.eval_shape(lambda: measure(objective.first(), 0))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        moments: Any = objective.mean(measure, zeros)
    else:
        moments = measure(objective, 0)
    return _recurse(moments, params, layers, transform, devices)


def expected_operator(
    curvatures: Sequence[LayerCurvature], params: chex.ArrayTree, layers: Layers
) -> LinearOperator:
    """The block-diagonal matrix of given curvatures, a block for each weight and each bias.

    Args:
      curvatures: For each layer its curvature.
      params: The parameters.
      layers: The layers.

    Returns:
      The operator on vectors like those of `layer_leaves`.
    """

    def product(vector: LayerLeaves) -> dict[int, jax.Array]:
        result = {}
        for layer, (inputs, outputs) in zip(layers.layers, curvatures, strict=True):
            matrix = _as_matrix(layer.weight_view, vector[layer.weight])
            image = kronecker_product(inputs, outputs, matrix)
            result[layer.weight] = _as_leaf(layer.weight_view, image, vector[layer.weight])
            if layer.bias is not None and layer.bias_view is not None:
                row = matmul(_as_matrix(layer.bias_view, vector[layer.bias]), outputs)
                result[layer.bias] = _as_leaf(layer.bias_view, row, vector[layer.bias])
        return result

    return LinearOperator(product, vectors_like(layer_leaves(params, layers)))


def solve_expected(
    curvatures: Sequence[LayerCurvature],
    gradient: LayerLeaves,
    layers: Layers,
    mixing: chex.Numeric,
    devices: Devices = ALONE,
) -> dict[int, jax.Array]:
    r"""Solves :math:`((1 - \alpha) B + \alpha I) x = g` for every weight and every bias, exactly.

    Args:
      curvatures: For each layer its curvature.
      gradient: ``g``, as `layer_leaves` gives it, float32 or wider.
      layers: The layers.
      mixing: :math:`\alpha` in (0, 1].
      devices: What shares the systems of equal shape.

    Returns:
      ``x``, like the gradient.
    """
    systems = list(zip(layers.layers, curvatures, strict=True))
    weights = [
        (layer.weight, layer.weight_view, known)
        for layer, known in zip(layers.layers, _decompose(curvatures, devices), strict=True)
    ]
    biases = [
        (layer.bias, layer.bias_view, (curvature.outputs,))
        for layer, curvature in systems
        if layer.bias is not None and layer.bias_view is not None
    ]

    def solve_weight(*known: jax.Array) -> jax.Array:
        solver: Any = solve_mixed_kronecker if len(known) == 3 else solve_mixed_eigenpairs
        return solver(*known, jnp.asarray(mixing, known[-1].dtype))

    def solve_bias(outputs: jax.Array, row: jax.Array) -> jax.Array:
        return solve_mixed(outputs, row, jnp.asarray(mixing, outputs.dtype))

    result = {}
    for solve, parts in ((solve_weight, weights), (solve_bias, biases)):
        cases = [(*known, _as_matrix(view, gradient[leaf])) for leaf, view, known in parts]
        solutions = map_by_shape(solve, cases, devices)
        for (leaf, view, _), solution in zip(parts, solutions, strict=True):
            result[leaf] = _as_leaf(view, solution, gradient[leaf])
    return result


def _decompose(
    curvatures: Sequence[LayerCurvature], devices: Devices
) -> list[tuple[jax.Array, ...]]:
    """The curvatures; or where inputs have a second moment the eigenpairs of both matrices.

    All matrices of one size are decomposed together, whichever side of a layer they are of.
    """
    if any(curvature.inputs.ndim == 1 for curvature in curvatures):
        return list(curvatures)
    matrices = [(matrix,) for curvature in curvatures for matrix in curvature]
    pairs = map_by_shape(jnp.linalg.eigh, matrices, devices)
    return [(*pairs[i], *pairs[i + 1]) for i in range(0, len(pairs), 2)]


def _as_matrix(view: View, leaf: jax.Array) -> jax.Array:
    """A weight as a matrix, or a bias as a vector, replicated on an Explicit mesh."""
    return view.apply(replicate(leaf))[0]


def _as_leaf(view: View, matrix: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_as_matrix`."""
    return shard_like(view.invert(matrix[None]).astype(like.dtype), like)


def _recurse(
    moments: _Moments,
    params: chex.ArrayTree,
    layers: Layers,
    transform: CurvatureTransform,
    devices: Devices,
) -> tuple[LayerCurvature, ...]:
    """Passes the curvature back from the last layer to the first."""
    leaves, outputs = jax.tree.leaves(params), [moments.head]
    steps = zip(layers.layers[1:], moments.slopes, moments.bends, strict=True)
    for layer, slopes, bend in reversed(list(steps)):
        weight = _as_matrix(layer.weight_view, leaves[layer.weight]).astype(bend.dtype)
        outputs.append(pass_back(outputs[-1], weight, slopes, bend, transform, devices))
    pairs = zip(moments.inputs, reversed(outputs), strict=True)
    return tuple(LayerCurvature(*pair) for pair in pairs)


def _measure(
    chain: Chain,
    objective: Objective[Any],
    params: chex.ArrayTree,
    input_moment: Moment,
    slope_moment: Moment,
) -> _Moments:
    """The moments of one batch."""
    inputs = layer_inputs(chain, chain.run(params))
    units = read_units(chain, params)
    return _Moments(
        inputs=tuple(_moment(rows, input_moment) for rows in inputs),
        slopes=tuple(_moment(unit.slope, slope_moment) for unit in units),
        # The objective's derivatives are of a mean already.
        bends=tuple(replicate(jnp.sum(unit.bend, axis=0)) for unit in units),
        head=_head_curvature(chain, objective, params),
    )


def _moment(rows: jax.Array, moment: Moment) -> jax.Array:
    """The mean of the rows, or of their outer products."""
    if moment == "mean":
        return replicate(jnp.mean(rows, axis=0))
    return replicate(contract(rows, rows, ((0,), (0,)), rows.dtype)) / len(rows)


def _head_curvature(chain: Chain, objective: Objective[Any], params: chex.ArrayTree) -> jax.Array:
    """The Gauss-Newton matrix of the loss in the last layer's outputs, summed over cases."""
    use = chain.uses[-1]
    at = chain.probes()[use.site]
    outputs, push = jax.linearize(lambda probe: chain.run(params, {use.site: probe}).outputs, at)
    pull = jax.linear_transpose(push, at)
    wide = jax.tree.map(lambda z: z.astype(jnp.promote_types(z.dtype, jnp.float32)), outputs)
    hessian = output_hessian(objective.loss, wide)

    def total(product: jax.Array) -> jax.Array:
        return sum_over_cases(use, product)

    spread = jax.linear_transpose(total, at)  # the same vector for every case

    def column(unit: jax.Array) -> jax.Array:
        tangents = push(*spread(unit))
        image = hessian(jax.tree.map(lambda t, z: t.astype(z.dtype), tangents, wide))
        return total(*pull(jax.tree.map(lambda t, z: t.astype(z.dtype), image, outputs)))

    dtype = jax.eval_shape(total, at).dtype
    identity = jnp.eye(use.outputs, dtype=dtype)
    columns = jax.lax.map(column, identity, batch_size=min(_COLUMNS, use.outputs))
    return (columns + columns.T) / 2
