r"""One refresh of the Kronecker factors of K-BFGS.

A refresh touches each factor with products of matrices and one elementwise pass only. All vectors
that a pair can become (``s``, ``y``, ``H s``, ``H y``, ...) are the rows of one small matrix, the
*basis*; damping, acceptance and the BFGS formula work on coefficients with respect to it, for all
blocks of the model at once, with inner products read off the Gram matrix of the rows. This is what
keeps the compiled program, and the time to compile it, small.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder import factors as kf
from secondorder.checks import is_number
from secondorder.layers.groups import Group, Layout, concatenate
from secondorder.methods.kbfgs_factors import (
    KBFGSFactors,
    Measurement,
    OutputInverse,
    Settings,
    keep_memory,
    matmul_transposed,
    output_product,
)
from secondorder.methods.kbfgs_pass import AnyPass, input_product
from secondorder.products import matmul
from secondorder.sharding import replicate


class Refreshed(NamedTuple):
    """The result of a refresh: the factors, and for each block which pairs were accepted."""

    factors: KBFGSFactors
    input_accepted: jax.Array
    output_accepted: jax.Array


class KBFGSMetrics(NamedTuple):
    """What K-BFGS reports; int32 scalars, counted since `init` and over all blocks.

    Attributes:
      nonfinite_steps: Batches whose value or gradient was not finite; they changed nothing.
      curvature_updates: Refreshes of the factors.
      input_pairs_accepted: Pairs that changed an input inverse.
      input_pairs_rejected: Pairs that did not.
      output_pairs_accepted: Pairs that changed an output inverse.
      output_pairs_rejected: Pairs that did not.
    """

    nonfinite_steps: jax.Array
    curvature_updates: jax.Array
    input_pairs_accepted: jax.Array
    input_pairs_rejected: jax.Array
    output_pairs_accepted: jax.Array
    output_pairs_rejected: jax.Array


def unchanged(layout: Layout, factors: KBFGSFactors) -> Refreshed:
    """The result of a refresh that was not made.

    Args:
      layout: The layers.
      factors: The factors.

    Returns:
      The same factors, with no pair accepted.
    """
    return Refreshed(factors, jnp.zeros(layout.blocks, bool), jnp.zeros(layout.blocks, bool))


def count_pairs(metrics: KBFGSMetrics, finite: jax.Array, result: Refreshed) -> KBFGSMetrics:
    """Adds one refresh to the counters.

    Args:
      metrics: The counters.
      finite: Whether the refresh was made.
      result: Its result.

    Returns:
      The new counters.
    """
    input_accepted = jnp.sum(result.input_accepted, dtype=jnp.int32)
    output_accepted = jnp.sum(result.output_accepted, dtype=jnp.int32)
    blocks = jnp.where(finite, result.input_accepted.size, 0)
    return metrics._replace(
        curvature_updates=metrics.curvature_updates + finite.astype(jnp.int32),
        input_pairs_accepted=metrics.input_pairs_accepted + input_accepted,
        input_pairs_rejected=metrics.input_pairs_rejected + blocks - input_accepted,
        output_pairs_accepted=metrics.output_pairs_accepted + output_accepted,
        output_pairs_rejected=metrics.output_pairs_rejected + blocks - output_accepted,
    )


def refresh(
    settings: Settings,
    layout: Layout,
    factors: KBFGSFactors,
    measured: Measurement,
    here: AnyPass,
    first: jax.Array,
    moved: jax.Array,
) -> Refreshed:
    """Updates both inverses of every layer with one pair each.

    Args:
      settings: The hyperparameters.
      layout: The layers.
      factors: The factors.
      measured: The measurement of the batch.
      here: The pass at the present parameters.
      first: Whether this is the first refresh, a boolean scalar.
      moved: Whether the parameters differ at the two points. Where they do not, the differences
        are rounding errors of two passes that were compiled differently.

    Returns:
      The new factors.
    """
    # Input side: the second moment, an exact inverse at the start, then Hessian-action BFGS.
    moments = _update_moments(settings, layout, factors, here, first)
    inverses = _start_inputs(layout, factors, moments, measured, here, first)
    input_inverses, input_accepted = _update_inputs(
        settings, layout, inverses, moments, measured, here
    )
    # Output side: the pair along the step, averaged and damped, then BFGS or L-BFGS.
    pairs = jax.lax.cond(
        moved,
        lambda pairs: kf.ema(pairs, tuple(measured.differences), settings.pair_decay),
        lambda pairs: pairs,
        factors.pairs,
    )
    output_inverses, output_accepted = _update_outputs(
        settings, layout, factors.output_inverses, pairs, measured
    )
    return Refreshed(
        KBFGSFactors(input_inverses, moments, output_inverses, pairs),
        input_accepted,
        output_accepted,
    )


def _update_moments(
    settings: Settings,
    layout: Layout,
    factors: KBFGSFactors,
    here: AnyPass,
    first: jax.Array,
) -> tuple[jax.Array | None, ...]:
    """The moving averages of ``A``, which start from the first batch's."""
    result: list[jax.Array | None] = []
    for group, old in zip(layout.groups, factors.input_moments, strict=True):
        if old is None:
            result.append(None)
            continue
        present = layout.devices.keep(_gram_of_inputs(group, here)) / here.batch_size
        result.append(kf.ema(old, present, jnp.where(first, 0, settings.moment_decay)))
    return tuple(result)


def _gram_of_inputs(group: Group, here: AnyPass) -> jax.Array:
    """The current batch's ``m A`` of a group, or its diagonal for embeddings."""
    return replicate(concatenate([here.input_gram(m) for m in group.members]))


def _start_inputs(
    layout: Layout,
    factors: KBFGSFactors,
    moments: Sequence[jax.Array | None],
    measured: Measurement,
    here: AnyPass,
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
        inverses = kf.damped_inverses(
            [replicate(matrix) for matrix in matrices],
            [dampings[i] for i in dense],
            scale,
            layout.devices.spread,
        )
        return [layout.devices.keep(replicate(inverse)) for inverse in inverses]

    old = [factors.input_inverses[i] for i in dense]
    started = jax.lax.cond(first, exact, lambda inverses: inverses, old) if dense else []
    inverses = dict(zip(dense, started, strict=True))
    for i, moment in enumerate(moments):
        if i not in inverses and moment is not None:
            inverses[i] = 1 / (moment + layout.devices.keep(dampings[i])[:, None])
    return [inverses[i] for i in range(len(layout.groups))]


def _update_inputs(
    settings: Settings,
    layout: Layout,
    inverses: Sequence[jax.Array],
    moments: Sequence[jax.Array | None],
    measured: Measurement,
    here: AnyPass,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    r"""BFGS with ``s = H_a \bar a`` and ``y = (A + \lambda_A I) s``."""
    mean_inputs = layout.join(
        [replicate(here.mean_input(index)) for index in range(len(here.traced))]
    )
    multiply = functools.partial(_multiply, layout, input_product)
    bases = []
    for i, group in enumerate(layout.groups):
        # Rows, each twice: s, A s, H s, H A s.
        step = multiply(inverses[i], mean_inputs[i])
        moment = moments[i]
        product = _batch_product(group, step, here) if moment is None else multiply(moment, step)
        again = [multiply(inverses[i], rows) for rows in (step, product)]
        bases.append(jnp.concatenate([step, product, *again], axis=1))

    def change(
        gram: jax.Array, scale: jax.Array, damping: jax.Array, reference: jax.Array
    ) -> tuple[kf.Change, jax.Array]:
        inner = kf.gram_product(gram)
        s, a_s, _, _ = jnp.eye(8, dtype=gram.dtype)[::2]
        pair = kf.Pair(s, scale * a_s + damping * s)
        accept = kf.accept_pair(pair, reference, settings.acceptance, inner)
        pair = kf.normalize_pair(pair, accept, inner)
        # Multiplying by H moves every coefficient four rows on.
        return kf.bfgs_change(pair, jnp.roll(pair.y, 4), inner), accept

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


def _multiply(layout: Layout, product: Any, matrix: Any, rows: jax.Array) -> jax.Array:
    """A product of rows with the matrices of a group, which are shared by the devices."""
    devices = layout.devices
    return devices.gather(devices.spread(product, matrix, devices.gather(rows)))


def _batch_product(group: Group, rows: jax.Array, here: AnyPass) -> jax.Array:
    """``m V A`` with the current batch's ``A`` of a group."""
    start, products = 0, []
    for member, size in zip(group.members, group.sizes, strict=True):
        products.append(here.gram_product(member, rows[start : start + size]))
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
    multiply = functools.partial(_multiply, layout, output_product)
    bases = []
    for inverse, rows in zip(inverses, pairs, strict=True):
        # Rows: s, y, H s, H y, H H s, H H y.
        once = multiply(inverse, rows)
        twice = multiply(inverse, once)
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
    damped, changes, accept = _map_blocks(damp, _grams(bases), measured.output_damping, references)
    dense = [inverse for inverse in inverses if not isinstance(inverse, kf.InverseMemory)]
    if dense:
        return _apply_changes(layout, dense, bases, changes), accept
    memories = [inverse for inverse in inverses if isinstance(inverse, kf.InverseMemory)]
    return _push_pairs(settings, layout, memories, bases, damped, accept), accept


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
    return concatenate([matmul_transposed(rows, rows) for rows in bases])


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
    return [matmul(c, rows) for c, rows in zip(coefficients, bases, strict=True)]


def _apply_changes(
    layout: Layout,
    inverses: Sequence[jax.Array],
    bases: Sequence[jax.Array],
    changes: kf.Change,
) -> tuple[jax.Array, ...]:
    """Changes the dense inverses by rank two each; diagonal ones stay."""
    vectors = _combine(layout, bases, changes.grow, changes.drop)

    def apply(inverse: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.vmap(kf.apply_change)(inverse, kf.Change(rows[:, 0], rows[:, 1]))

    devices = layout.devices
    return tuple(
        devices.keep(devices.spread(apply, inverse, devices.gather(rows)))
        if inverse.ndim == 3
        else inverse
        for inverse, rows in zip(inverses, vectors, strict=True)
    )


def _push_pairs(
    settings: Settings,
    layout: Layout,
    memories: Sequence[kf.InverseMemory],
    bases: Sequence[jax.Array],
    pairs: kf.Pair,
    accept: jax.Array,
) -> tuple[kf.InverseMemory, ...]:
    """Adds a pair to the memory of every block."""
    vectors = _combine(layout, bases, pairs.s, pairs.y)
    project = functools.partial(_multiply, layout, matmul_transposed)
    projections = concatenate(
        [project(memory.s, rows) for memory, rows in zip(memories, vectors, strict=True)]
    )
    books = kf.Bookkeeping(
        concatenate([memory.triangle_inverse for memory in memories]),
        concatenate([memory.accepted for memory in memories]),
        concatenate([memory.numbers for memory in memories]),
    )
    scores = _forget_scores(
        settings, layout, memories, vectors, books.numbers, projections[:, :, 0]
    )
    books, slots = jax.vmap(kf.extend_triangle)(books, projections[:, :, 1], accept, scores)
    parts = [layout.cut(part) for part in books]
    result = []
    for i, slot in enumerate(layout.cut(slots)):
        rows = layout.devices.gather(vectors[i])
        pair = kf.Pair(rows[:, 0], rows[:, 1])
        s, y = layout.devices.spread(jax.vmap(kf.write_pair), memories[i], pair, slot)
        memory = kf.InverseMemory(s, y, *(part[i] for part in parts))
        result.append(keep_memory(memory, layout.devices))
    return tuple(result)


def _forget_scores(
    settings: Settings,
    layout: Layout,
    memories: Sequence[kf.InverseMemory],
    vectors: Sequence[jax.Array],
    numbers: jax.Array,
    products: jax.Array,
) -> jax.Array:
    """How dispensable each pair of every block is, ``(blocks, p)``."""
    if settings.forget == "oldest":
        return kf.forget_scores(numbers, None, products, "oldest")
    squares = _grams(vectors)[:, 0, 0]
    norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    gram = functools.partial(_multiply, layout, matmul_transposed)
    grams = concatenate([gram(memory.s, memory.s) for memory in memories])
    return jax.vmap(kf.forget_scores)(numbers, grams, products / norms[:, None])
