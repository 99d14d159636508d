"""What one batch says about the layers at a point: from one probed pass, or piece by piece."""

from typing import Any, NamedTuple, TypeAlias

import chex
import jax

from secondorder.layers import statistics
from secondorder.layers.layer import Layers, TracedLayer, trace_layers
from secondorder.layers.probes import Tape, record
from secondorder.objective import Microbatches
from secondorder.products import matmul
from secondorder.sharding import replicate, replicated_zeros


class Pass(NamedTuple):
    """One probed pass over a batch, which holds the inputs and outputs of every layer.

    Attributes:
      traced: The layers, as found in the trace.
      batch_size: Number of examples.
      tape: What was recorded.
      inputs: For each layer the homogeneous inputs where they are formed.
    """

    traced: tuple[TracedLayer, ...]
    batch_size: int
    tape: Tape
    inputs: tuple[statistics.Rows, ...] = ()

    def form_inputs(self) -> "Pass":
        """The same pass, with the inputs formed that are used many times."""
        rows = (statistics.dense_rows(traced, self.tape) for traced in self.traced)
        return self._replace(inputs=tuple(rows))

    @property
    def value(self) -> jax.Array:
        """The objective."""
        return self.tape.value

    def checked(self) -> chex.ArrayTree:
        """What is not finite if an input of a layer is not."""
        return self.tape.operands

    def input_gram(self, index: int) -> jax.Array:
        """``m A`` of a layer, ``(stack, inputs, inputs)``; of an embedding its diagonal."""
        traced = self.traced[index]
        if traced.layer.diagonal_input:
            return statistics.input_counts(traced, self.tape)
        return statistics.input_gram(traced, self.tape, self.inputs[index])

    def gram_product(self, index: int, rows: jax.Array) -> jax.Array:
        """``m V A`` of a layer for rows ``(stack, k, inputs)``, without forming ``A``."""
        return statistics.gram_product(self.traced[index], self.tape, rows, self.inputs[index])

    def mean_input(self, index: int) -> jax.Array:
        """The mean input of a layer, twice, ``(stack, 2, inputs)``."""
        inputs = self.inputs[index]
        return statistics.mean_input(self.traced[index], self.tape, 2, inputs)

    def output_sums(self, index: int) -> jax.Array:
        """The outputs of a layer and their cotangents, ``(stack, 2, outputs)``."""
        return statistics.output_sums(self.traced[index], self.tape)

    def mean_eigenvalues(self, index: int) -> tuple[jax.Array, jax.Array]:
        """Those of the second moments of a layer's inputs and cotangents, ``(stack,)`` each."""
        return statistics.mean_eigenvalues(self.traced[index], self.tape, self.batch_size)


class _Means(NamedTuple):
    """What is averaged over pieces, for each layer; nothing where it is not asked for."""

    value: jax.Array
    sums: tuple[jax.Array, ...]
    grams: tuple[jax.Array, ...] = ()
    inputs: tuple[jax.Array, ...] = ()
    eigenvalues: tuple[tuple[jax.Array, jax.Array], ...] = ()


class PieceMeans(NamedTuple):
    """A batch in pieces: the means over pieces of what a `Pass` over one says.

    Attributes:
      traced: The layers, as found in the trace of a piece.
      batch_size: Number of examples in a piece.
      means: The means.
    """

    traced: tuple[TracedLayer, ...]
    batch_size: int
    means: _Means

    def form_inputs(self) -> "PieceMeans":
        """The same: the inputs are no more."""
        return self

    @property
    def value(self) -> jax.Array:
        """The objective."""
        return self.means.value

    def checked(self) -> chex.ArrayTree:
        """See `Pass.checked`; a mean is not finite if an input is not."""
        return self.means.inputs

    def input_gram(self, index: int) -> jax.Array:
        """See `Pass.input_gram`."""
        return self.means.grams[index]

    def gram_product(self, index: int, rows: jax.Array) -> jax.Array:
        """See `Pass.gram_product`."""
        return input_product(self.means.grams[index], rows)

    def mean_input(self, index: int) -> jax.Array:
        """See `Pass.mean_input`."""
        return self.means.inputs[index]

    def output_sums(self, index: int) -> jax.Array:
        """See `Pass.output_sums`."""
        return self.means.sums[index]

    def mean_eigenvalues(self, index: int) -> tuple[jax.Array, jax.Array]:
        """See `Pass.mean_eigenvalues`."""
        return self.means.eigenvalues[index]


AnyPass: TypeAlias = Pass | PieceMeans


class LayerPass:
    """Probed passes over one batch: the objective is traced once, and evaluated at any point.

    Args:
      layers: The layers that the optimizer was built with.
      objective: The objective on the batch, which may be in pieces.
      params: The parameters.
    """

    def __init__(self, layers: Layers, objective: Any, params: chex.ArrayTree) -> None:
        self.layers, self.objective = layers, objective
        if isinstance(objective, Microbatches):
            objective = objective.first()
        self.discovery, self.traced, self.batch_size = trace_layers(layers, objective, params)

    @property
    def merges(self) -> bool:
        """Whether XLA merges a pass with the caller's gradient at the same point."""
        return not isinstance(self.objective, Microbatches) and self.discovery.plan.merges

    def __call__(self, params: chex.ArrayTree, outputs_only: bool = False) -> AnyPass:
        """A pass at some parameters.

        Args:
          params: The parameters.
          outputs_only: Whether nothing is asked of it but `Pass.output_sums`. Static.

        Returns:
          The pass.
        """
        if not isinstance(self.objective, Microbatches):
            return Pass(self.traced, self.batch_size, record(self.discovery, params))

        def measure(piece: Any, _: Any) -> _Means:
            discovery, traced, batch_size = trace_layers(self.layers, piece, params)
            return _means_of(Pass(traced, batch_size, record(discovery, params)), outputs_only)

        shapes = jax.eval_shape(lambda: measure(self.objective.first(), 0))
        zeros = jax.tree.map(lambda leaf: replicated_zeros(leaf.shape, leaf.dtype), shapes)
        means: Any = self.objective.mean(measure, zeros)
        return PieceMeans(self.traced, self.batch_size, means)


def _means_of(piece: Pass, outputs_only: bool) -> _Means:
    """What is averaged, of one piece."""
    indices = range(len(piece.traced))
    sums = tuple(replicate(piece.output_sums(i)) for i in indices)
    if outputs_only:
        return _Means(piece.value, sums)
    formed = piece.form_inputs()
    return _Means(
        value=piece.value,
        sums=sums,
        grams=tuple(replicate(formed.input_gram(i)) for i in indices),
        inputs=tuple(replicate(formed.mean_input(i)) for i in indices),
        eigenvalues=tuple(formed.mean_eigenvalues(i) for i in indices),
    )


def input_product(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """``V A`` for the rows ``(stack, k, inputs)`` of a group, whose ``A`` may be diagonal."""
    return rows * matrix[:, None, :] if matrix.ndim == 2 else matmul(rows, matrix)
