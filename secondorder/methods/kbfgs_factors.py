r"""The Kronecker factors of K-BFGS: their state, their update and their use.

For a layer ``h = W a`` with ``A`` the second moment of the inputs and ``G`` the Hessian with
respect to the outputs, ``H_a`` follows ``(A + \lambda_A I)^{-1}`` and ``H_g`` follows the damped
``G^{-1}``, each by BFGS. Everything here is for groups of layers of equal shape.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder import factors as kf
from secondorder.layers import statistics
from secondorder.layers.groups import Group
from secondorder.layers.layer import TracedLayer
from secondorder.layers.probes import Tape
from secondorder.objective import all_finite
from secondorder.sharding import replicate

InputFactor: TypeAlias = Literal["minibatch", "moving_average"]

_HIGHEST = jax.lax.Precision.HIGHEST


class FactorState(NamedTuple):
    """The factors of a group of layers of equal shape, stacked along the leading axis.

    Attributes:
      input_inverse: ``H_a``, ``(stack, inputs, inputs)``; ``(stack, inputs)`` for embeddings.
      input_moment: The moving average of ``A``, shaped like ``input_inverse``; None where the
        minibatch's is used.
      output_inverse: ``H_g``, ``(stack, outputs, outputs)``, or a memory of pairs.
      pair: The averaged differences of mean outputs and mean cotangents, ``(stack, outputs)``.
    """

    input_inverse: jax.Array
    input_moment: jax.Array | None
    output_inverse: jax.Array | kf.InverseMemory
    pair: kf.Pair


@dataclasses.dataclass(frozen=True)
class Settings:
    """The hyperparameters that the curvature update reads."""

    damping: Any
    pair_decay: Any
    moment_decay: Any
    powell_fraction: Any
    acceptance: Any
    input_factor: InputFactor
    memory_size: int | None
    pair_damping: kf.PairDamping
    damping_split: kf.DampingSplit


class Pass(NamedTuple):
    """One probed pass over the layers: the trace and what it recorded."""

    traced: tuple[TracedLayer, ...]
    tape: Tape
    batch_size: int


# --------------------------------------------------------------------------------------------
# Direction


def _output_product(inverse: jax.Array | kf.InverseMemory, matrix: jax.Array) -> jax.Array:
    """``H_g V`` for one block, by whichever form of the memory costs less."""
    if not isinstance(inverse, kf.InverseMemory):
        return jnp.matmul(inverse, matrix, precision=_HIGHEST)
    (pairs, outputs), columns = inverse.s.shape, matrix.shape[1]
    dense = 4 * pairs * outputs**2 + 2 * outputs**3 + 2 * outputs**2 * columns
    if dense < 8 * pairs * outputs * columns + 4 * pairs**2 * columns:
        return jnp.matmul(kf.inverse_matrix(inverse), matrix, precision=_HIGHEST)
    return kf.inverse_product(inverse, matrix)


def precondition(factor: FactorState, matrix: jax.Array) -> jax.Array:
    """``H_g M H_a`` for one block."""
    if factor.input_inverse.ndim == 1:
        matrix = matrix * factor.input_inverse
    else:
        matrix = jnp.matmul(matrix, factor.input_inverse, precision=_HIGHEST)
    return _output_product(factor.output_inverse, matrix)


# --------------------------------------------------------------------------------------------
# Curvature


class Measurement(NamedTuple):
    """What a refresh measures for a group: means at both points and the split of the damping."""

    mean_input: jax.Array  # (stack, inputs)
    mean_cotangent: jax.Array  # (stack, outputs)
    raw_pair: kf.Pair  # (stack, outputs)
    input_damping: jax.Array  # (stack,)
    output_damping: jax.Array  # (stack,)


def _mean_output(matrix: jax.Array, mean_input: jax.Array) -> jax.Array:
    """The mean of ``h = W a``, which is ``W`` times the mean of ``a``."""
    product = jnp.einsum("soi,si->so", matrix, mean_input, precision=_HIGHEST)
    return product.astype(mean_input.dtype)


def _means(
    point: Pass, params: chex.ArrayTree
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Mean inputs, outputs and cotangents of every layer at one point."""
    leaves = jax.tree.leaves(params)
    inputs, outputs, cotangents = [], [], []
    for traced in point.traced:
        mean_input = replicate(statistics.mean_input(traced, point.tape))
        weights = replicate(traced.layer.to_matrix(leaves)).astype(mean_input.dtype)
        cotangent = statistics.mean_cotangent(traced, point.tape, point.batch_size)
        inputs.append(mean_input)
        outputs.append(_mean_output(weights, mean_input))
        cotangents.append(replicate(cotangent))
    return inputs, outputs, cotangents


def _split_damping(
    settings: Settings, traced: TracedLayer, point: Pass
) -> tuple[jax.Array, jax.Array]:
    """The shares of a layer's factors in the damping, each ``(stack,)``."""
    eigenvalues: tuple[Any, Any] = (None, None)
    if settings.damping_split == "trace":
        eigenvalues = statistics.mean_eigenvalues(traced, point.tape, point.batch_size)
    shares = kf.split_damping(
        settings.damping,
        settings.damping_split,
        positions=traced.positions / point.batch_size,
        input_mean_eigenvalue=eigenvalues[0],
        output_mean_eigenvalue=eigenvalues[1],
    )
    return tuple(  # type: ignore[return-value]
        jnp.broadcast_to(share.astype(jnp.float32), (traced.layer.stack,)) for share in shares
    )


def measure(
    settings: Settings,
    groups: Sequence[Group],
    here: Pass,
    params: chex.ArrayTree,
    before: Pass,
    previous_params: chex.ArrayTree,
) -> list[Measurement]:
    """Measures every layer at the present and the previous point, on one batch."""
    inputs, outputs, cotangents = _means(here, params)
    _, old_outputs, old_cotangents = _means(before, previous_params)
    shares = [_split_damping(settings, traced, here) for traced in here.traced]
    steps = [new - old for new, old in zip(outputs, old_outputs, strict=True)]
    changes = [new - old for new, old in zip(cotangents, old_cotangents, strict=True)]
    return [
        Measurement(
            mean_input=group.join(inputs),
            mean_cotangent=group.join(cotangents),
            raw_pair=kf.Pair(group.join(steps), group.join(changes)),
            input_damping=group.join([share[0] for share in shares]),
            output_damping=group.join([share[1] for share in shares]),
        )
        for group in groups
    ]


def _update_output_inverse(
    settings: Settings,
    inverse: jax.Array | kf.InverseMemory,
    average: kf.Pair,
    measured: Measurement,
    allow: jax.Array,
) -> tuple[jax.Array | kf.InverseMemory, kf.Pair, jax.Array]:
    """One block's averaged, damped and gated pair, and the inverse updated with it."""
    raw = measured.raw_pair
    use = allow & all_finite(raw)
    averaged = kf.ema(average, raw, settings.pair_decay)
    average = jax.tree.map(functools.partial(jnp.where, use), averaged, average)
    damped = kf.damp_pair(
        average,
        lambda v: _output_product(inverse, v[:, None])[:, 0],
        damping=measured.output_damping,
        mu=settings.powell_fraction,
        rule=settings.pair_damping,
    )
    reference = jnp.linalg.norm(measured.mean_cotangent)
    accept = use & kf.accept_pair(damped, reference, settings.acceptance)
    if isinstance(inverse, kf.InverseMemory):
        return kf.push_pair(inverse, damped, accept), average, accept
    return kf.inverse_bfgs_update(inverse, damped, accept), average, accept


def _update_diagonal_input(
    settings: Settings,
    factor: FactorState,
    frequencies: jax.Array,
    measured: Measurement,
    first: jax.Array,
    allow: jax.Array,
) -> tuple[FactorState, jax.Array]:
    """The input factor of embeddings: diagonal, so that its inverse is exact."""
    old = factor.input_moment
    averaged = jnp.where(first, frequencies, kf.ema(old, frequencies, settings.moment_decay))
    moment = jnp.where(allow, averaged, old)
    inverse = jnp.where(allow, 1 / (moment + measured.input_damping[:, None]), factor.input_inverse)
    accept = jnp.broadcast_to(allow, inverse.shape[:1])
    return factor._replace(input_inverse=inverse, input_moment=moment), accept


def _update_dense_input(
    settings: Settings,
    factor: FactorState,
    moment: Callable[[], jax.Array],
    batch_product: Callable[[jax.Array], jax.Array],
    measured: Measurement,
    first: jax.Array,
    allow: jax.Array,
) -> tuple[FactorState, jax.Array]:
    """The input factor of a group: Hessian-action BFGS from an exact inverse at the start."""
    damping = measured.input_damping
    average = factor.input_moment
    if average is not None:
        present = moment()
        averaged = jnp.where(first, present, kf.ema(average, present, settings.moment_decay))
        average = jnp.where(allow & jnp.isfinite(jnp.max(present)), averaged, average)

    def exact(_: jax.Array) -> jax.Array:
        start = moment() if average is None else average
        return jax.vmap(kf.damped_inverse)(start, damping)

    inverse = jax.lax.cond(first & allow, exact, lambda old: old, factor.input_inverse)
    steps = jnp.einsum("sij,sj->si", inverse, measured.mean_input, precision=_HIGHEST)
    if average is None:
        products = batch_product(steps)
    else:
        products = jnp.einsum("sij,sj->si", average, steps, precision=_HIGHEST)
    pairs = kf.Pair(steps, products + damping[:, None] * steps)
    references = jnp.linalg.norm(measured.mean_input, axis=1)
    accept = allow & jax.vmap(kf.accept_pair, (0, 0, None))(pairs, references, settings.acceptance)
    inverse = jax.vmap(kf.inverse_bfgs_update)(inverse, pairs, accept)
    return factor._replace(input_inverse=inverse, input_moment=average), accept


def refresh_group(
    settings: Settings,
    group: Group,
    factor: FactorState,
    measured: Measurement,
    here: Pass,
    first: jax.Array,
    allow: jax.Array,
) -> tuple[FactorState, jax.Array, jax.Array]:
    """Updates both inverses of a group; also says which pairs were accepted."""
    members = {member: here.traced[member] for member in group.members}

    def join(function: Callable[..., jax.Array], *stacked: jax.Array) -> jax.Array:
        parts = [group.split(array) for array in stacked]
        results = [
            function(traced, here.tape, *(part[member] for part in parts), here.batch_size)
            for member, traced in members.items()
        ]
        return replicate(results[0] if len(results) == 1 else jnp.concatenate(results))

    if group.diagonal_input:
        frequencies = join(statistics.input_frequencies)
        factor, input_accept = _update_diagonal_input(
            settings, factor, frequencies, measured, first, allow
        )
    else:
        factor, input_accept = _update_dense_input(
            settings,
            factor,
            lambda: join(statistics.second_moment),
            lambda vectors: join(statistics.moment_product, vectors),
            measured,
            first,
            allow,
        )
    update = functools.partial(_update_output_inverse, settings)
    inverse, pair, output_accept = jax.vmap(update, (0, 0, 0, None))(
        factor.output_inverse, factor.pair, measured, allow
    )
    return factor._replace(output_inverse=inverse, pair=pair), input_accept, output_accept


def init_factors(settings: Settings, group: Group, dtype: Any) -> FactorState:
    """The factors before the first batch: identities and empty averages.

    Args:
      settings: The hyperparameters.
      group: Layers of equal shape.
      dtype: float32 or wider.

    Returns:
      The factors. The input inverse is replaced by an exact one at the first refresh.
    """

    def stacked(array: jax.Array) -> jax.Array:
        return jnp.tile(array[None], (group.stack, *([1] * array.ndim)))

    if group.diagonal_input:
        inverse = jnp.ones((group.stack, group.inputs), dtype)
    else:
        inverse = stacked(jnp.eye(group.inputs, dtype=dtype))
    averaged = group.diagonal_input or settings.input_factor == "moving_average"
    if settings.memory_size is None:
        output: jax.Array | kf.InverseMemory = stacked(jnp.eye(group.outputs, dtype=dtype))
    else:
        memory = kf.init_memory(settings.memory_size, group.outputs, dtype)
        output = jax.tree.map(stacked, memory)
    return FactorState(
        input_inverse=inverse,
        input_moment=jnp.zeros_like(inverse) if averaged else None,
        output_inverse=output,
        pair=kf.Pair(
            jnp.zeros((group.stack, group.outputs), dtype),
            jnp.zeros((group.stack, group.outputs), dtype),
        ),
    )
