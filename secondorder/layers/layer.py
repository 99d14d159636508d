"""Layers: what is known of a model's linear layers before any batch is seen.

A `Layer` is a weight leaf, with its bias, seen as a stack of matrices; `Layers` is all of them
with the parameters that are in none. Both are static: plain Python values that can be compared,
hashed and closed over, from which an optimizer's state is built.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from secondorder.layers.discovery import Discovery, FoundUse, discover
from secondorder.layers.uses import EMBEDDING, Use
from secondorder.layers.views import View
from secondorder.objective import Microbatches
from secondorder.sharding import replicate
from secondorder.tree import leaf_paths


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer ``h = a W + b``, or a stack of independent ones.

    Attributes:
      kind: ``"dense"``, ``"conv"`` or ``"embedding"``.
      weight: Index of the weight among the parameter leaves.
      bias: Index of the bias, or None.
      weight_view: From the weight leaf to ``(stack, inputs, outputs)``.
      bias_view: From the bias leaf to ``(stack, outputs)``, or None.
    """

    kind: str
    weight: int
    bias: int | None
    weight_view: View
    bias_view: View | None

    @property
    def stack(self) -> int:
        """Number of independent blocks."""
        return self.weight_view.shape[0]

    @property
    def outputs(self) -> int:
        """Columns of a block."""
        return self.weight_view.shape[2]

    @property
    def inputs(self) -> int:
        """Rows of a block, the homogeneous one of the bias included."""
        return self.weight_view.shape[1] + (self.bias is not None)

    @property
    def diagonal_input(self) -> bool:
        """Whether inputs are one-hot vectors, so that their second moment is diagonal."""
        return self.kind == EMBEDDING

    @property
    def leaves(self) -> tuple[int, ...]:
        """The parameter leaves of the layer."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def to_matrix(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """Collects the layer's part of a pytree like the parameters.

        Args:
          leaves: All leaves of the pytree.

        Returns:
          ``(stack, inputs, outputs)``, replicated on an Explicit mesh; the bias, if any, is the
          last row.
        """
        weight = self.weight_view.apply(replicate(leaves[self.weight]))
        if self.bias is None or self.bias_view is None:
            return weight
        bias = self.bias_view.apply(replicate(leaves[self.bias]))
        return jnp.concatenate([weight, bias[:, None].astype(weight.dtype)], axis=1)

    def from_matrix(self, matrix: jax.Array) -> dict[int, jax.Array]:
        """Takes a matrix back to the parameter leaves; the inverse of `to_matrix`.

        Args:
          matrix: ``(stack, inputs, outputs)``.

        Returns:
          The array for each leaf of the layer, by index.
        """
        if self.bias is None or self.bias_view is None:
            return {self.weight: self.weight_view.invert(matrix)}
        return {
            self.weight: self.weight_view.invert(matrix[:, :-1]),
            self.bias: self.bias_view.invert(matrix[:, -1]),
        }


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter leaf: its path in words, its shape and dtype."""

    path: str
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Usage:
    """How often and at how many positions a layer was used in the traced batch."""

    uses: int
    tied: int
    positions: float


@dataclasses.dataclass(frozen=True)
class Layers:
    """The linear layers of a model; printed, a table.

    Attributes:
      layers: The layers, in the order of the first use.
      usages: For each layer how it was used when it was found; for the report only.
      leaves: All parameter leaves.
      unassigned: The leaves in no layer, each with the reason.
      batch_size: The batch size given to `find_layers`, or None to read it off each trace.
    """

    layers: tuple[Layer, ...]
    usages: tuple[Usage, ...] = dataclasses.field(compare=False)
    leaves: tuple[Leaf, ...]
    unassigned: tuple[tuple[int, str], ...] = dataclasses.field(compare=False)
    batch_size: int | None = None

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        from secondorder.layers.report import format_report

        return format_report(self)


@dataclasses.dataclass(frozen=True)
class TracedLayer:
    """A layer with its uses in one traced objective.

    Attributes:
      layer: The layer.
      uses: The uses that see the weight as the layer's matrix.
      tied: Uses that see it as another matrix, such as the transposed one.
    """

    layer: Layer
    uses: tuple[Use, ...]
    tied: tuple[FoundUse, ...] = ()

    @property
    def positions(self) -> int:
        """Number of input vectors per block, over all uses."""
        return sum(use.positions for use in self.uses)


def _common_bias(uses: Sequence[FoundUse]) -> tuple[int | None, View | None]:
    """The bias that all uses share; a bias added in only some of them is none."""
    biases = {(use.bias, use.bias_view) for use in uses}
    return biases.pop() if len(biases) == 1 else (None, None)


def _primary(uses: Sequence[FoundUse]) -> FoundUse:
    """The use whose view of the weight is the layer's: an embedding's before a dense one's."""
    return next((found for found in uses if found.use.kind == EMBEDDING), uses[0])


def group_uses(discovery: Discovery) -> tuple[TracedLayer, ...]:
    """Joins the uses of each weight into a layer.

    Args:
      discovery: A traced objective.

    Returns:
      The layers, in the order of the first use.
    """
    by_weight: dict[int, list[FoundUse]] = collections.defaultdict(list)
    for found in discovery.uses:
        by_weight[found.leaf].append(found)
    claims = collections.Counter(
        bias
        for weight, uses in by_weight.items()
        for bias in {found.bias for found in uses}
        if bias is not None and bias != weight
    )
    traced = []
    for weight, uses in by_weight.items():
        first = _primary(uses)
        same = [found for found in uses if found.use.same_weight_map(first.use)]
        bias, bias_view = _common_bias(same)
        if bias is not None and (claims[bias] != 1 or bias in by_weight):
            bias, bias_view = None, None
        layer = Layer(first.use.kind, weight, bias, first.use.weight_view, bias_view)
        tied = tuple(found for found in uses if found not in same)
        traced.append(TracedLayer(layer, tuple(found.use for found in same), tied))
    return tuple(traced)


def infer_batch_size(traced: Iterable[TracedLayer]) -> int:
    """The batch size of a trace: the most common length of the layers' leading axis."""
    sizes = collections.Counter(use.batch_size for layer in traced for use in layer.uses)
    return sizes.most_common(1)[0][0] if sizes else 1


def describe_leaves(params: Any) -> tuple[Leaf, ...]:
    """The leaves of a parameter pytree, in words."""
    return tuple(
        Leaf(path or "(params)", tuple(leaf.shape), jnp.dtype(leaf.dtype))
        for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True)
    )


def _reason(leaf: int, discovery: Discovery, consumers: Mapping[int, Sequence[str]]) -> str:
    """Why a leaf is in no layer."""
    if any(found.bias == leaf for found in discovery.uses):
        return "a bias that its layer's uses do not share, or that several layers share"
    seen = list(dict.fromkeys(consumers.get(leaf, ())))
    return "goes into " + ", ".join(seen) if seen else "the objective does not depend on it"


def find_layers(
    objective: Callable[..., Any],
    params: Any,
    *args: Any,
    batch_size: int | None = None,
    exclude: Callable[[str], bool] | None = None,
) -> Layers:
    r"""Finds the linear layers of a model in the trace of its objective.

    A layer is every :math:`h = a W + b` whose ``W`` derives from one parameter by reshapes,
    transposes and casts alone, whatever library built the model: dense layers and ``einsum``
    projections, convolutions in one to three dimensions with strides, padding, dilation and
    groups, embeddings, tied weights, and all of these inside `jit`, `jax.checkpoint` and
    `jax.lax.scan` (over layers: a stack of blocks; over time: one block at many positions).

    Args:
      objective: Maps ``(params, *args)`` to the scalar value, or to ``(value, aux)``; an
        `Objective`, `Microbatches` or any callable.
      params: The parameters: a pytree of arrays or of `jax.ShapeDtypeStruct`.
      *args: Further arguments of ``objective``, such as a batch; abstract ones do.
      batch_size: Number of examples in a batch, or in one piece of `Microbatches`. Default: the
        most common length of the leading axis of the layers' inputs, at every trace anew.
      exclude: Called with the path of each weight, such as ``"encoder/kernel"``; layers for which
        it is true are left to the fallback of the method.

    Returns:
      The layers. Printing them shows a table: for each layer the parameter's path, kind,
      dimensions, bias, blocks, positions per example and uses, with those counted as tied that see
      the weight as another matrix, such as the transposed one, and have no part in its factors;
      for every other parameter why it is in no layer.

    Raises:
      TypeError: If the objective does not return one real scalar.
      ValueError: If ``batch_size`` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import secondorder as so
      >>> x = jnp.ones((8, 3))
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2), "scale": jnp.ones(())}
      >>> layers = so.find_layers(
      ...     lambda p: jnp.mean(p["scale"] * jnp.tanh(x @ p["w"] + p["b"])), params)
      >>> print(layers)
      weight  kind   in  out  bias  blocks  positions  uses
      ------  -----  --  ---  ----  ------  ---------  ----
      w       dense   3    2  b          1          1     1
      <BLANKLINE>
      in no layer  shape  reason
      -----------  -----  ---------------
      scale        ()     goes into `mul`
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"find_layers: `batch_size` must be at least 1, got {batch_size}.")
    if isinstance(objective, Microbatches):
        objective = objective.first()
    discovery = discover(objective, params, *args)
    leaves = describe_leaves(params)
    traced = group_uses(discovery)
    left_out = [t for t in traced if exclude is not None and exclude(leaves[t.layer.weight].path)]
    excluded = {leaf for t in left_out for leaf in t.layer.leaves}
    traced = tuple(t for t in traced if t.layer.weight not in excluded)
    examples = batch_size or infer_batch_size(traced)
    assigned = {leaf for t in traced for leaf in t.layer.leaves}
    return Layers(
        layers=tuple(t.layer for t in traced),
        usages=tuple(Usage(len(t.uses), len(t.tied), t.positions / examples) for t in traced),
        leaves=leaves,
        unassigned=tuple(
            (i, "excluded" if i in excluded else _reason(i, discovery, discovery.consumers))
            for i in range(len(leaves))
            if i not in assigned
        ),
        batch_size=batch_size,
    )


def trace_layers(
    layers: Layers, value_fn: Callable[..., Any], params: Any
) -> tuple[Discovery, tuple[TracedLayer, ...], int]:
    """Finds the given layers again in an objective on another batch.

    Args:
      layers: The layers an optimizer was built with.
      value_fn: The objective to trace.
      params: The parameters.

    Returns:
      The trace, its layers in the order of ``layers``, and the batch size.

    Raises:
      ValueError: If the parameters or the layers in the objective are not the given ones.
    """
    check_leaves(layers, params)
    return match_layers(layers, discover(value_fn, params))


def match_layers(
    layers: Layers, discovery: Discovery
) -> tuple[Discovery, tuple[TracedLayer, ...], int]:
    """Finds the given layers again in a trace of an objective, or of its model.

    Args:
      layers: The layers an optimizer was built with.
      discovery: The trace.

    Returns:
      The trace, its layers in the order of ``layers``, and the batch size.

    Raises:
      ValueError: If the layers in the trace are not the given ones.
    """
    traced = {t.layer.weight: t for t in group_uses(discovery)}
    for layer in layers.layers:
        match = traced.get(layer.weight)
        if match is None or match.layer != layer:
            raise ValueError(
                f"The objective does not use {layers.leaves[layer.weight].path!r} as the layer "
                f"that the optimizer was built with:\n  built with {layer}\n  found      "
                f"{match.layer if match else 'no layer'}\nBuild the optimizer with "
                "layers=so.find_layers(objective, params) for this model and parameters."
            )
    chosen = tuple(traced[layer.weight] for layer in layers.layers)
    return discovery, chosen, layers.batch_size or infer_batch_size(chosen)


def check_leaves(layers: Layers, params: Any) -> None:
    """Raises unless parameters have the paths and shapes the layers were found with.

    Args:
      layers: The layers an optimizer was built with.
      params: The parameters.

    Raises:
      ValueError: If a leaf is missing, new, or of another shape.
    """
    given = {leaf.path: leaf.shape for leaf in describe_leaves(params)}
    expected = {leaf.path: leaf.shape for leaf in layers.leaves}
    if list(given.items()) == list(expected.items()):
        return
    wrong = [
        f"{path}: layers have {expected.get(path, 'no such leaf')}, "
        f"params have {given.get(path, 'no such leaf')}"
        for path in dict.fromkeys([*expected, *given])
        if expected.get(path) != given.get(path)
    ]
    raise ValueError(
        "`layers` do not match the parameters:\n  "
        + "\n  ".join(wrong[:8] or ["the same leaves in another order"])
        + "\nBuild them for these parameters with so.find_layers(objective, params)."
    )
