"""What a batch says about the curvature of every layer: inputs, and cotangents of three kinds.

Cotangents are drawn so that the sum of their outer products is the Gauss-Newton matrix of the
outputs (``"sampled"``), are the columns of its square root (``"exact"``), or are the gradient's own
(``"empirical"``).
"""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder import factors as kf
from secondorder.layers.cases import CaseUse, MixedCasesError, divide_by_case
from secondorder.layers.discovery import discover_outputs
from secondorder.layers.layer import Layers, check_leaves, match_layers, trace_layers
from secondorder.layers.probes import ModelPass, Tape, record, record_model
from secondorder.layers.rows import LayerRows, WeightSharing, case_rows, position_rows
from secondorder.objective import Objective, check_split
from secondorder.operators import apply_factor, output_factor, sample_row
from secondorder.operators.factored import model_outputs
from secondorder.operators.output_factor import check_outputs
from secondorder.sharding import gather_axes, replicate, shard_like

Curvature: TypeAlias = Literal["sampled", "empirical", "exact"]
Inverse: TypeAlias = Literal["cholesky", "eigen", "corrected"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The hyperparameters of the factors; see `secondorder.scale_by_kfac`.

    ``diagonals`` are the parameters in no layer whose diagonal is kept, by index.
    """

    damping: Any
    curvature: Curvature
    weight_sharing: WeightSharing
    inverse: Inverse
    update_every: int
    inverse_every: int
    moment_decay: Any
    damping_split: kf.DampingSplit
    diagonals: tuple[int, ...]

    @property
    def needs_model(self) -> bool:
        """Whether cotangents start from the outputs of the model, and not from the value."""
        plain = self.curvature == "empirical" and self.weight_sharing == "expand"
        return not plain or bool(self.diagonals)


class Sample(NamedTuple):
    """What one batch says.

    Attributes:
      rows: For each layer its inputs and cotangents.
      squares: For each parameter whose diagonal is kept an unbiased estimate of it.
      batch_size: Number of cases.
    """

    rows: list[LayerRows]
    squares: list[jax.Array]
    batch_size: int


class LayerPass:
    """A traced batch: what can be shared with the caller's gradient, and what is drawn of it."""

    def __init__(
        self, method: str, settings: Settings, layers: Layers, objective: Any, params: Any
    ) -> None:
        self.settings, self.params, self.objective = settings, params, objective
        self.uses: tuple[CaseUse, ...] = ()
        if not settings.needs_model:
            self.discovery, self.traced, self.batch_size = trace_layers(layers, objective, params)
            return
        check_single_split(objective, method, settings)
        check_leaves(layers, params)
        discovery = discover_outputs(model_outputs(objective), params)
        self.discovery, self.traced, self.batch_size = match_layers(layers, discovery)
        if not self.traced and layers.batch_size is None:
            self.batch_size = discovery.jaxpr.out_avals[0].shape[0]
        if settings.weight_sharing == "reduce" or settings.curvature == "exact":
            self.uses = self._divide(method)

    @property
    def merges(self) -> bool:
        """Whether XLA merges `look` with the caller's gradient at the same point."""
        return self.discovery.plan.merges

    def _divide(self, method: str) -> tuple[CaseUse, ...]:
        """Divides the positions of all uses by case."""
        try:
            count = len(jax.tree.leaves(self.params))
            return divide_by_case(self.discovery, self.batch_size, count)
        except MixedCasesError as error:
            raise ValueError(
                f"{method}: weight_sharing='reduce' and curvature='exact' need cases that the "
                f"model keeps apart, and {error}; take weight_sharing='expand' and "
                "curvature='sampled'."
            ) from None

    def look(self) -> Tape | ModelPass:
        """The pass forward, and for the plain empirical Fisher matrix also the one back."""
        if self.settings.needs_model:
            return record_model(self.discovery, self.params, self.settings.diagonals)
        return record(self.discovery, self.params)

    def sample(self, seen: Tape | ModelPass, key: chex.PRNGKey) -> Sample:
        """The rows of all layers, and squares of the other parameters' gradients.

        Args:
          seen: What `look` returned.
          key: PRNG key.

        Returns:
          The sample.
        """
        weight = float(self.batch_size) if self.settings.curvature == "empirical" else 1.0
        squares: list[jax.Array] = []
        if isinstance(seen, Tape):
            cotangents = {site: array[None] for site, array in seen.cotangents.items()}
        else:
            cotangents, squares = self._pull_back(seen, key, weight)
        rows = [self._rows(i, seen.operands, cotangents) for i in range(len(self.traced))]
        weighted = [row._replace(weight=weight) for row in rows]
        return Sample(weighted, squares, self.batch_size)

    def _rows(self, index: int, operands: Any, cotangents: Any) -> LayerRows:
        traced = self.traced[index]
        if self.settings.weight_sharing == "expand":
            return position_rows(traced, operands, cotangents, self.batch_size)
        return case_rows(traced, self.uses, operands, cotangents, self.batch_size)

    def _pull_back(
        self, seen: ModelPass, key: chex.PRNGKey, weight: float
    ) -> tuple[dict[int, jax.Array], list[jax.Array]]:
        """Cotangents of all sites, ``M`` each, and the squares of one drawn gradient."""
        (outputs,) = seen.outputs
        check_outputs(outputs)
        draw = {"sampled": _sampled, "exact": _exact, "empirical": _empirical}
        columns, signed = draw[self.settings.curvature](self.objective, outputs, key)

        def pull(row: jax.Array) -> Any:
            return seen.pull_back([shard_like(row.astype(outputs.dtype), outputs)])

        if columns is signed:
            cotangents, gradients = pull(signed)
            cotangents = {site: array[None] for site, array in cotangents.items()}
        else:
            cotangents, _ = jax.vmap(pull)(columns)
            _, gradients = pull(signed)
        wide = [replicate(leaf) for leaf in gradients.values()]
        wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in wide]
        return cotangents, [weight * leaf**2 for leaf in wide]


# From the outputs to their cotangents: one or several (M, N, ..., C) to be passed back to layers,
# and one whose gradients' squares are the diagonal in the mean.
_Drawn: TypeAlias = tuple[jax.Array, jax.Array]


def _sampled(objective: Objective[Any], outputs: jax.Array, key: chex.PRNGKey) -> _Drawn:
    row = sample_row(output_factor(objective.loss, outputs), outputs, key)
    return row, row


def _exact(objective: Objective[Any], outputs: jax.Array, key: chex.PRNGKey) -> _Drawn:
    """All columns of the square root; a case has as many as outputs, over all its positions."""
    shape = outputs.shape
    flat = jnp.reshape(gather_axes(outputs, range(1, len(shape))), (shape[0], -1))
    factor = output_factor(lambda z: objective.loss(jnp.reshape(z, shape)), flat)
    units = jnp.eye(flat.shape[1], dtype=factor.dtype)
    columns = jax.vmap(lambda e: apply_factor(factor, jnp.broadcast_to(e, flat.shape)))(units)
    signed = jnp.reshape(sample_row(factor, flat, key), shape)
    return jnp.reshape(columns, (-1, *shape)), signed


def _empirical(objective: Objective[Any], outputs: jax.Array, key: chex.PRNGKey) -> _Drawn:
    """The gradient of the loss; with a random sign for each case to take cases apart."""
    row = jax.grad(objective.loss)(outputs)
    signs = jax.random.rademacher(key, (outputs.shape[0],), row.dtype)
    signs = jnp.reshape(signs, (-1, *[1] * (outputs.ndim - 1)))
    return row[None], row * shard_like(jnp.broadcast_to(signs, row.shape), row)


def check_single_split(objective: Any, method: str, settings: Settings) -> None:
    """Raises unless the objective is split into model and loss, and is in one piece.

    Args:
      objective: The objective.
      method: Name of the method, for the message.
      settings: The hyperparameters.

    Raises:
      TypeError: If it is a plain callable or `Microbatches`.
    """
    check_split(objective, method)
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{method}: curvature={settings.curvature!r}, weight_sharing="
            f"{settings.weight_sharing!r} and diagonals of parameters in no layer need one "
            f"so.Objective, got {type(objective).__name__}; curvature='empirical' with "
            "weight_sharing='expand' and a transform as `fallback` takes any objective."
        )
