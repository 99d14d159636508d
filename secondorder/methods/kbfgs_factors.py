r"""The Kronecker factors of K-BFGS: their state, their update and their use.

For a layer ``h = a W`` with ``A`` the second moment of the inputs and ``G`` the Hessian with
respect to the outputs, ``H_a`` follows ``(A + \lambda_A I)^{-1}`` and ``H_g`` follows the damped
``G^{-1}``, each by BFGS.

A refresh touches each factor with products of matrices and one elementwise pass only. All vectors
that a pair can become (``s``, ``y``, ``H s``, ``H y``, ...) are the rows of one small matrix, the
*basis*; damping, acceptance and the BFGS formula work on coefficients with respect to it, for all
blocks of the model at once, with inner products read off the Gram matrix of the rows. This is what
keeps the compiled program, and the time to compile it, small.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder import factors as kf
from secondorder.checks import is_number
from secondorder.layers import statistics
from secondorder.layers.groups import Group, Layout, concatenate
from secondorder.layers.layer import TracedLayer
from secondorder.layers.probes import Tape
from secondorder.sharding import replicate

InputFactor: TypeAlias = Literal["minibatch", "moving_average"]
OutputInverse: TypeAlias = jax.Array | kf.InverseMemory

_HIGHEST = jax.lax.Precision.HIGHEST


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
    pair_damping: kf.PairDamping
    damping_split: kf.DampingSplit


class Pass(NamedTuple):
    """One probed pass over a batch.

    Attributes:
      traced: The layers, as found in the trace.
      tape: What was recorded.
      batch_size: Number of examples.
      inputs: For each layer the homogeneous inputs where they are formed.
    """

    traced: tuple[TracedLayer, ...]
    tape: Tape
    batch_size: int
    inputs: tuple[statistics.Rows, ...] = ()


class Refreshed(NamedTuple):
    """The result of a refresh: the factors, and for each block which pairs were accepted."""

    factors: KBFGSFactors
    input_accepted: jax.Array
    output_accepted: jax.Array


def init_factors(settings: Settings, layout: Layout, dtype: Any) -> KBFGSFactors:
    """The factors before the first batch: identities and empty averages.

    Args:
      settings: The hyperparameters.
      layout: The layers.
      dtype: float32 or wider.

    Returns:
      The factors. Input inverses are replaced by exact ones at the first refresh.
    """

    def input_inverse(group: Group) -> jax.Array:
        if group.diagonal_input:
            return jnp.ones((group.stack, group.inputs), dtype)
        return _repeat(jnp.eye(group.inputs, dtype=dtype), group.stack)

    def output_inverse(group: Group) -> OutputInverse:
        if settings.memory_size is None:
            return _repeat(jnp.eye(group.outputs, dtype=dtype), group.stack)
        memory = kf.init_memory(settings.memory_size, group.outputs, dtype)
        return kf.InverseMemory(*(_repeat(array, group.stack) for array in memory))

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


# Products with the factors.


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_HIGHEST)


def _matmul_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """``A B^T`` for each block, without transposing anything."""
    return jax.lax.dot_general(a, b, (((2,), (2,)), ((0,), (0,))), precision=_HIGHEST)


def _input_product(inverse: jax.Array, rows: jax.Array) -> jax.Array:
    """``V H_a`` for the rows ``(stack, k, inputs)`` of a group."""
    return rows * inverse[:, None, :] if inverse.ndim == 2 else _matmul(rows, inverse)


def _output_product(inverse: OutputInverse, rows: jax.Array) -> jax.Array:
    """``V H_g`` for the rows ``(stack, k, outputs)``, by whichever form of a memory costs less."""
    if not isinstance(inverse, kf.InverseMemory):
        return _matmul(rows, inverse)
    (_, pairs, outputs), k = inverse.s.shape, rows.shape[1]
    dense = 4 * pairs * outputs**2 + 2 * outputs**3 + 2 * outputs**2 * k
    if dense < 8 * pairs * outputs * k + 4 * pairs**2 * k:
        return _matmul(rows, jax.vmap(kf.inverse_matrix)(inverse))
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
    products = []
    for index, stacked in enumerate(layout.join(matrices)):
        inverse = factors.input_inverses[index]
        stacked = stacked.astype(inverse.dtype)
        scaled = inverse[:, :, None] * stacked if inverse.ndim == 2 else _matmul(inverse, stacked)
        products.append(_output_product(factors.output_inverses[index], scaled))
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
    here: Pass,
    params: chex.ArrayTree,
    before: Pass,
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
    sums = [replicate(statistics.output_sums(traced, here.tape)) for traced in here.traced]
    differences, cotangents = [], []
    for traced, present in zip(here.traced, sums, strict=True):
        past = replicate(statistics.output_sums(traced, before.tape))
        weights = statistics.output_weights(traced, here.batch_size)[:, None]
        differences.append((present - past) * weights + _bias_step(traced, leaves, old_leaves))
        cotangents.append(present[:, 1] * weights[1])
    shares = [_split_damping(settings, traced, here) for traced in here.traced]
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
    step = layer.bias_view.apply(leaves[layer.bias] - old_leaves[layer.bias])
    return jnp.pad(replicate(step)[:, None], ((0, 0), (0, 1), (0, 0)))


def _split_damping(
    settings: Settings, traced: TracedLayer, point: Pass
) -> tuple[jax.Array, jax.Array]:
    """The shares of a layer's factors in the damping, each ``(blocks,)``."""
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
    first, second = (jnp.broadcast_to(share, (traced.layer.stack,)) for share in shares)
    return first, second


# Update of the factors.


def refresh(
    settings: Settings,
    layout: Layout,
    factors: KBFGSFactors,
    measured: Measurement,
    here: Pass,
    first: jax.Array,
) -> Refreshed:
    """Updates both inverses of every layer with one pair each.

    Args:
      settings: The hyperparameters.
      layout: The layers.
      factors: The factors.
      measured: The measurement of the batch.
      here: The pass at the present parameters.
      first: Whether this is the first refresh, a boolean scalar.

    Returns:
      The new factors.
    """
    # Input side: the second moment, an exact inverse at the start, then Hessian-action BFGS.
    moments = _update_moments(settings, layout, factors, here, first)
    inverses = _start_inputs(layout, factors, moments, measured, here, first)
    inverses, input_accepted = _update_inputs(
        settings, layout, inverses, moments, measured, here
    )
    # Output side: the pair along the step, averaged and damped, then BFGS or L-BFGS.
    pairs = tuple(
        kf.ema(old, new, settings.pair_decay)
        for old, new in zip(factors.pairs, measured.differences, strict=True)
    )
    output_inverses, output_accepted = _update_outputs(
        settings, layout, factors.output_inverses, pairs, measured
    )
    return Refreshed(
        KBFGSFactors(inverses, moments, output_inverses, pairs), input_accepted, output_accepted
    )


def _update_moments(
    settings: Settings,
    layout: Layout,
    factors: KBFGSFactors,
    here: Pass,
    first: jax.Array,
) -> tuple[jax.Array | None, ...]:
    """The moving averages of ``A``, which start from the first batch's."""
    result: list[jax.Array | None] = []
    for group, old in zip(layout.groups, factors.input_moments, strict=True):
        if old is None:
            result.append(None)
            continue
        present = _gram_of_inputs(group, here) / here.batch_size
        result.append(kf.ema(old, present, jnp.where(first, 0, settings.moment_decay)))
    return tuple(result)


def _gram_of_inputs(group: Group, here: Pass) -> jax.Array:
    """The current batch's ``m A`` of a group, or its diagonal for embeddings."""
    if group.diagonal_input:
        counts = [statistics.input_counts(here.traced[m], here.tape) for m in group.members]
        return replicate(concatenate(counts))
    form = statistics.input_gram
    return replicate(concatenate([form(here.traced[m], here.tape, inputs=here.inputs[m]) for m in group.members]))


def _start_inputs(
    layout: Layout,
    factors: KBFGSFactors,
    moments: Sequence[jax.Array | None],
    measured: Measurement,
    here: Pass,
    first: jax.Array,
) -> list[jax.Array]:
    """The input inverses to update: exact ones at the start and where ``A`` is diagonal."""
    dense = [i for i, group in enumerate(layout.groups) if not group.diagonal_input]
    dampings = layout.cut(measured.input_damping)

    def exact(_: Any) -> list[jax.Array]:
        known = [moments[i] for i in dense]
        scale = 1 if known[0] is not None else here.batch_size
        matrices = [
            _gram_of_inputs(layout.groups[i], here) if moment is None else moment
            for i, moment in zip(dense, known, strict=True)
        ]
        return kf.damped_inverses(matrices, [dampings[i] for i in dense], scale)

    old = [factors.input_inverses[i] for i in dense]
    started = jax.lax.cond(first, exact, lambda inverses: inverses, old) if dense else []
    inverses = dict(zip(dense, started, strict=True))
    for i, moment in enumerate(moments):
        if i not in inverses and moment is not None:
            inverses[i] = 1 / (moment + dampings[i][:, None])
    return [inverses[i] for i in range(len(layout.groups))]


def _update_inputs(
    settings: Settings,
    layout: Layout,
    inverses: Sequence[jax.Array],
    moments: Sequence[jax.Array | None],
    measured: Measurement,
    here: Pass,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    r"""BFGS with ``s = H_a \bar a`` and ``y = (A + \lambda_A I) s``."""
    mean_inputs = layout.join(
        [
            replicate(statistics.mean_input(traced, here.tape, 2, inputs))
            for traced, inputs in zip(here.traced, here.inputs, strict=True)
        ]
    )
    bases = []
    for i, group in enumerate(layout.groups):
        # Rows, each twice: s, A s, H s, H A s.
        step = _input_product(inverses[i], mean_inputs[i])
        product = _moment_product(group, moments[i], step, here)
        again = [_input_product(inverses[i], rows) for rows in (step, product)]
        bases.append(jnp.concatenate([step, product, *again], axis=1))

    def change(
        gram: jax.Array, scale: jax.Array, damping: jax.Array, reference: jax.Array
    ) -> tuple[kf.Change, jax.Array]:
        inner = kf.gram_product(gram)
        s, a_s, hs, h_a_s = jnp.eye(8, dtype=gram.dtype)[::2]
        a_s, h_a_s = scale * a_s, scale * h_a_s
        pair = kf.Pair(s, a_s + damping * s)
        accept = kf.accept_pair(pair, reference, settings.acceptance, inner)
        norm = jnp.sqrt(jnp.where(accept, inner(*pair), 1))
        hy = (h_a_s + damping * hs) / norm
        return kf.bfgs_change(kf.normalize_pair(pair, accept, inner), hy, inner), accept

    references = _norms(settings, [rows[:, 0] for rows in mean_inputs])
    summed = 1 / here.batch_size  # what turns the minibatch's sum into the moment
    scales = [
        jnp.full(group.stack, summed if moment is None else 1.0, rows.dtype)
        for group, moment, rows in zip(layout.groups, moments, bases, strict=True)
    ]
    changes, accept = _map_blocks(
        change, _grams(bases), concatenate(scales), measured.input_damping, references
    )
    return _apply_changes(layout, inverses, bases, changes), accept


def _moment_product(
    group: Group, moment: jax.Array | None, rows: jax.Array, here: Pass
) -> jax.Array:
    """``V A`` with the average of ``A`` of a group, or ``m V A`` with the current batch's."""
    if moment is not None:
        return _input_product(moment, rows)
    start, products = 0, []
    for member, size in zip(group.members, group.sizes, strict=True):
        products.append(
            statistics.gram_product(
                here.traced[member],
                here.tape,
                rows[start : start + size],
                here.inputs[member],
            )
        )
        start += size
    return replicate(concatenate(products))


def _update_outputs(
    settings: Settings,
    layout: Layout,
    inverses: Sequence[OutputInverse],
    pairs: Sequence[jax.Array],
    measured: Measurement,
) -> tuple[tuple[OutputInverse, ...], jax.Array]:
    """BFGS or L-BFGS with the averaged pairs, damped and gated."""
    bases = []
    for inverse, rows in zip(inverses, pairs, strict=True):
        # Rows: s, y, H s, H y, H H s, H H y.
        once = _output_product(inverse, rows)
        twice = _output_product(inverse, once)
        bases.append(jnp.concatenate([rows, once, twice], axis=1))

    def damp(
        gram: jax.Array, damping: jax.Array, reference: jax.Array
    ) -> tuple[kf.Pair, kf.Change, jax.Array]:
        inner = kf.gram_product(gram)
        s, y, _, hy, _, _ = jnp.eye(6, dtype=gram.dtype)
        pair = kf.damp_pair(
            kf.Pair(s, y),
            hy,
            damping=damping,
            mu=settings.powell_fraction,
            rule=settings.pair_damping,
            inner=inner,
        )
        accept = kf.accept_pair(pair, reference, settings.acceptance, inner)
        pair = kf.normalize_pair(pair, accept, inner)
        # Multiplying by H moves every coefficient to the next power of H.
        return pair, kf.bfgs_change(pair, jnp.roll(pair.y, 2), inner), accept

    references = _norms(settings, measured.mean_cotangents)
    damped, changes, accept = _map_blocks(
        damp, _grams(bases), measured.output_damping, references
    )
    dense = [inverse for inverse in inverses if not isinstance(inverse, kf.InverseMemory)]
    if dense:
        return _apply_changes(layout, dense, bases, changes), accept
    memories = [inverse for inverse in inverses if isinstance(inverse, kf.InverseMemory)]
    return _push_pairs(layout, memories, bases, damped, accept), accept


def _map_blocks(function: Any, grams: jax.Array, *arguments: jax.Array) -> Any:
    """Maps the algebra of a pair over all blocks.

    In a branch that is taken whenever anything is finite: XLA would otherwise repeat these scalar
    operations inside each of the many kernels that use one of their results.
    """
    mapped = jax.vmap(function)
    shapes = jax.eval_shape(mapped, grams, *arguments)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    any_finite = jnp.any(jnp.isfinite(grams[:, 0, 0]))
    return jax.lax.cond(any_finite, mapped, lambda *_: zeros, grams, *arguments)


def _grams(bases: Sequence[jax.Array]) -> jax.Array:
    """The Gram matrices of the rows of all blocks."""
    return concatenate([_matmul_transposed(rows, rows) for rows in bases])


def _norms(settings: Settings, vectors: Sequence[jax.Array]) -> jax.Array:
    """The norms that acceptance is relative to, of all blocks; not needed without a threshold."""
    if is_number(settings.acceptance) and settings.acceptance == 0:
        return jnp.zeros(sum(len(rows) for rows in vectors), vectors[0].dtype)
    return concatenate([jnp.linalg.norm(rows, axis=1) for rows in vectors])


def _combine(
    layout: Layout, bases: Sequence[jax.Array], first: jax.Array, second: jax.Array
) -> list[jax.Array]:
    """Two combinations of the rows of every block, ``(stack, 2, n)`` for each group."""
    coefficients = layout.cut(jnp.stack([first, second], axis=1))
    return [_matmul(c, rows) for c, rows in zip(coefficients, bases, strict=True)]


def _apply_changes(
    layout: Layout,
    inverses: Sequence[jax.Array],
    bases: Sequence[jax.Array],
    changes: kf.Change,
) -> tuple[jax.Array, ...]:
    """Changes the dense inverses by rank two each; diagonal ones stay."""
    vectors = _combine(layout, bases, changes.grow, changes.drop)
    return tuple(
        jax.vmap(kf.apply_change)(inverse, kf.Change(rows[:, 0], rows[:, 1]))
        if inverse.ndim == 3
        else inverse
        for inverse, rows in zip(inverses, vectors, strict=True)
    )


def _push_pairs(
    layout: Layout,
    memories: Sequence[kf.InverseMemory],
    bases: Sequence[jax.Array],
    pairs: kf.Pair,
    accept: jax.Array,
) -> tuple[kf.InverseMemory, ...]:
    """Appends a pair to the memory of every block."""
    vectors = _combine(layout, bases, pairs.s, pairs.y)
    projections = [
        _matmul_transposed(memory.s, rows)
        for memory, rows in zip(memories, vectors, strict=True)
    ]
    books, slots = jax.vmap(kf.extend_triangle)(
        kf.Bookkeeping(
            concatenate([memory.triangle_inverse for memory in memories]),
            concatenate([memory.accepted for memory in memories]),
        ),
        concatenate(projections)[:, :, 1],
        accept,
    )
    triangles, counts = layout.cut(books.triangle_inverse), layout.cut(books.accepted)
    result = []
    for i, slot in enumerate(layout.cut(slots)):
        pair = kf.Pair(vectors[i][:, 0], vectors[i][:, 1])
        s, y = jax.vmap(kf.write_pair)(memories[i], pair, slot)
        result.append(kf.InverseMemory(s, y, triangles[i], counts[i]))
    return tuple(result)
