r"""The Kronecker factors of K-BFGS: their state, their use, and what a batch says about them.

For a layer ``h = a W`` with ``A`` the second moment of the inputs and ``G`` the Hessian with
respect to the outputs, ``H_a`` follows ``(A + \lambda_A I)^{-1}`` and ``H_g`` follows the damped
``G^{-1}``, each by BFGS.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder import factors as kf
from secondorder.layers import statistics
from secondorder.layers.groups import Group, Layout, concatenate
from secondorder.layers.layer import TracedLayer
from secondorder.methods.kbfgs_pass import AnyPass
from secondorder.methods.kronecker import spread_product
from secondorder.products import HIGHEST, matmul
from secondorder.sharding import replicate
from secondorder.spread import Devices

InputFactor: TypeAlias = Literal["minibatch", "moving_average"]
OutputInverse: TypeAlias = jax.Array | kf.InverseMemory


class KBFGSFactors(NamedTuple):
    """The factors of all layers, by group of equal shape.

    Attributes:
      input_inverses: ``H_a``, ``(stack, inputs, inputs)``; of embeddings the diagonal,
        ``(stack, inputs)``.
      input_moments: The moving average of ``A`` in the same shape, or None where the minibatch's
        is used.
      output_inverses: ``H_g``, ``(stack, outputs, outputs)``, or a stacked memory of pairs.
      pairs: The averaged pair ``(s, y)`` of the output side as two rows, ``(stack, 2, outputs)``.
    """

    input_inverses: tuple[jax.Array, ...]
    input_moments: tuple[jax.Array | None, ...]
    output_inverses: tuple[OutputInverse, ...]
    pairs: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The hyperparameters of the factors; see `secondorder.scale_by_kbfgs`."""

    damping: Any
    pair_decay: Any
    moment_decay: Any
    powell_fraction: Any
    acceptance: Any
    input_factor: InputFactor
    memory_size: int | None
    forget: kf.Forget
    pair_damping: kf.PairDamping
    damping_split: kf.DampingSplit


def init_factors(settings: Settings, layout: Layout, dtype: Any) -> KBFGSFactors:
    """The factors before the first batch: identities and empty averages.

    Args:
      settings: The hyperparameters.
      layout: The layers.
      dtype: float32 or wider.

    Returns:
      The factors. Input inverses are replaced by exact ones at the first refresh.
    """
    keep = layout.devices.keep

    def input_inverse(group: Group) -> jax.Array:
        if group.diagonal_input:
            return keep(jnp.ones((group.stack, group.inputs), dtype))
        return keep(_repeat(jnp.eye(group.inputs, dtype=dtype), group.stack))

    def output_inverse(group: Group) -> OutputInverse:
        if settings.memory_size is None:
            return keep(_repeat(jnp.eye(group.outputs, dtype=dtype), group.stack))
        memory = kf.init_memory(settings.memory_size, group.outputs, dtype)
        return keep_memory(
            kf.InverseMemory(*(_repeat(array, group.stack) for array in memory)), layout.devices
        )

    inverses = tuple(input_inverse(group) for group in layout.groups)
    return KBFGSFactors(
        input_inverses=inverses,
        input_moments=tuple(
            jnp.zeros_like(inverse) if _keeps_moment(settings, group) else None
            for group, inverse in zip(layout.groups, inverses, strict=True)
        ),
        output_inverses=tuple(output_inverse(group) for group in layout.groups),
        pairs=tuple(jnp.zeros((group.stack, 2, group.outputs), dtype) for group in layout.groups),
    )


def _repeat(array: jax.Array, times: int) -> jax.Array:
    return jnp.tile(array[None], (times, *([1] * array.ndim)))


def _keeps_moment(settings: Settings, group: Group) -> bool:
    """Whether a group keeps a moving average of ``A``; a diagonal one is always kept."""
    return group.diagonal_input or settings.input_factor == "moving_average"


def keep_memory(memory: kf.InverseMemory, devices: Devices) -> kf.InverseMemory:
    """Splits the pairs of a stacked memory over devices; its bookkeeping is everywhere.

    Args:
      memory: The memory of a group.
      devices: The devices.

    Returns:
      The same memory.
    """
    return memory._replace(s=devices.keep(memory.s), y=devices.keep(memory.y))


# Products with the factors.


def matmul_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """``A B^T`` for each block, without transposing anything."""
    return jax.lax.dot_general(a, b, (((2,), (2,)), ((0,), (0,))), precision=HIGHEST)


def output_product(inverse: OutputInverse, rows: jax.Array) -> jax.Array:
    """``V H_g`` for the rows ``(stack, k, outputs)``, by whichever form of a memory costs less."""
    if not isinstance(inverse, kf.InverseMemory):
        return matmul(rows, inverse)
    (_, pairs, outputs), k = inverse.s.shape, rows.shape[1]
    dense = 4 * pairs * outputs**2 + 2 * outputs**3 + 2 * outputs**2 * k
    if dense < 8 * pairs * outputs * k + 4 * pairs**2 * k:
        return matmul(rows, jax.vmap(kf.inverse_matrix)(inverse))
    return jax.vmap(kf.inverse_product)(inverse, rows)


def precondition(
    factors: KBFGSFactors, layout: Layout, matrices: Sequence[jax.Array]
) -> list[jax.Array]:
    """``H_a M H_g`` for every layer.

    Args:
      factors: The factors.
      layout: The layers.
      matrices: For each layer ``M``, ``(blocks, inputs, outputs)``.

    Returns:
      For each layer the product.
    """
    products = [
        spread_product(layout.devices, *operands, output_product)
        for operands in zip(
            factors.input_inverses, layout.join(matrices), factors.output_inverses, strict=True
        )
    ]
    return layout.split(products)


# Measurement of a batch, by group.


class Measurement(NamedTuple):
    """What a batch says about the layers.

    Attributes:
      differences: For each group the differences of the mean outputs and of the mean cotangents
        between the two points, as two rows, ``(stack, 2, outputs)``.
      mean_cotangents: For each group ``(stack, outputs)``.
      input_damping: The input factors' shares, for all blocks.
      output_damping: The output factors' shares, for all blocks.
    """

    differences: list[jax.Array]
    mean_cotangents: list[jax.Array]
    input_damping: jax.Array
    output_damping: jax.Array


def measure(
    settings: Settings,
    layout: Layout,
    here: AnyPass,
    params: chex.ArrayTree,
    before: AnyPass,
    previous_params: chex.ArrayTree,
) -> Measurement:
    """Measures every layer at the present and the previous parameters, on one batch.

    Args:
      settings: The hyperparameters.
      layout: The layers.
      here: A pass at ``params``.
      params: The present parameters.
      before: A pass at ``previous_params``.
      previous_params: The parameters before the last step.

    Returns:
      The measurement.
    """
    leaves, old_leaves = jax.tree.leaves(params), jax.tree.leaves(previous_params)
    differences, cotangents = [], []
    for index, traced in enumerate(here.traced):
        present, past = here.output_sums(index), before.output_sums(index)
        weights = statistics.output_weights(traced, here.batch_size)[:, None]
        weights = weights.astype(present.dtype)
        differences.append((present - past) * weights + _bias_step(traced, leaves, old_leaves))
        cotangents.append(present[:, 1] * weights[1])
    shares = [_split_damping(settings, index, here) for index in range(len(here.traced))]
    return Measurement(
        differences=layout.join(differences),
        mean_cotangents=layout.join(cotangents),
        input_damping=concatenate(layout.join([share[0] for share in shares])),
        output_damping=concatenate(layout.join([share[1] for share in shares])),
    )


def _bias_step(
    traced: TracedLayer, leaves: Sequence[jax.Array], old_leaves: Sequence[jax.Array]
) -> jax.Array | float:
    """What the step of the bias adds to the difference, ``(stack, 2, outputs)``."""
    layer = traced.layer
    if layer.bias is None or layer.bias_view is None:
        return 0.0
    step = layer.bias_view.apply(replicate(leaves[layer.bias] - old_leaves[layer.bias]))
    return jnp.pad(step[:, None], ((0, 0), (0, 1), (0, 0)))


def _split_damping(settings: Settings, index: int, point: AnyPass) -> tuple[jax.Array, jax.Array]:
    """The shares of a layer's factors in the damping, each ``(blocks,)``."""
    traced = point.traced[index]
    eigenvalues: tuple[Any, Any] = (None, None)
    if settings.damping_split == "trace":
        eigenvalues = point.mean_eigenvalues(index)
    shares = kf.split_damping(
        settings.damping,
        settings.damping_split,
        positions=traced.positions / point.batch_size,
        input_mean_eigenvalue=eigenvalues[0],
        output_mean_eigenvalue=eigenvalues[1],
    )
    first, second = (jnp.broadcast_to(share, (traced.layer.stack,)) for share in shares)
    return first, second
