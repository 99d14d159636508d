r"""The Kronecker factors of K-FAC: their averages, their inverses, and products with these.

For a layer ``h = a W`` the Gauss-Newton block is approximated by :math:`A \otimes G`, and inverted
in one of three ways: with a damping for each factor (``"cholesky"``), with one damping in the basis
of their eigenvectors (``"eigen"``), or with the second moments of the gradient in that basis in
place of the products of eigenvalues (``"corrected"``, EKFAC).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from secondorder import factors as kf
from secondorder.layers.groups import Group, Layout
from secondorder.layers.layer import Layers
from secondorder.layers.rows import input_moment, output_moment, rotated_moment
from secondorder.methods.kfac_statistics import Sample, Settings
from secondorder.methods.kronecker import spread_product, spread_solution
from secondorder.products import matmul
from secondorder.sharding import replicate
from secondorder.spread import Devices

# Of "corrected" one array (stack, inputs, outputs); of "eigen" the eigenvalues of both factors.
Tree = TypeVar("Tree")
Spectrum: TypeAlias = jax.Array | tuple[jax.Array, jax.Array] | None


class KFACFactors(NamedTuple):
    """The factors of all layers, by group of equal shape.

    Attributes:
      inputs: Averages of ``A``, ``(stack, inputs, inputs)``; of embeddings the diagonal,
        ``(stack, inputs)``.
      outputs: Averages of ``G``, ``(stack, outputs, outputs)``.
      diagonals: For each parameter in no layer whose diagonal is kept its average.
    """

    inputs: tuple[jax.Array, ...]
    outputs: tuple[jax.Array, ...]
    diagonals: tuple[jax.Array, ...]


class KFACInverses(NamedTuple):
    """What directions are made with, by group.

    Attributes:
      inputs: Inverses of the damped ``A`` or eigenvectors of ``A``, in its shape.
      outputs: The same of ``G``.
      spectra: The eigenvalues that belong to the eigenvectors, or None for inverses.
    """

    inputs: tuple[jax.Array, ...]
    outputs: tuple[jax.Array, ...]
    spectra: tuple[Spectrum, ...]


def _keep(tree: Tree, layout: Layout) -> Tree:
    """Stacks as they are kept between steps, each device its share."""
    kept: Tree = jax.tree.map(layout.devices.keep, tree)
    return kept


def init_factors(settings: Settings, layers: Layers, layout: Layout, dtype: Any) -> KFACFactors:
    """The factors before the first batch.

    Args:
      settings: The hyperparameters.
      layers: The layers.
      layout: How they are arranged.
      dtype: float32 or wider.

    Returns:
      Zeros.
    """

    def zeros(group: Group, width: int, diagonal: bool) -> jax.Array:
        return jnp.zeros((group.stack, width) if diagonal else (group.stack, width, width), dtype)

    return KFACFactors(
        _keep(tuple(zeros(g, g.inputs, g.diagonal_input) for g in layout.groups), layout),
        _keep(tuple(zeros(g, g.outputs, False) for g in layout.groups), layout),
        tuple(jnp.zeros(layers.leaves[leaf].shape, dtype) for leaf in settings.diagonals),
    )


def init_inverses(settings: Settings, layout: Layout, dtype: Any) -> KFACInverses:
    """Identities, which the first batch replaces.

    Args:
      settings: The hyperparameters.
      layout: How the layers are arranged.
      dtype: float32 or wider.

    Returns:
      The inverses or eigenvectors.
    """

    def identity(group: Group, width: int, diagonal: bool) -> jax.Array:
        if diagonal:
            return jnp.ones((group.stack, width), dtype)
        return jnp.tile(jnp.eye(width, dtype=dtype), (group.stack, 1, 1))

    def spectrum(group: Group) -> Spectrum:
        if settings.inverse == "cholesky":
            return None
        if settings.inverse == "corrected":
            return jnp.ones((group.stack, group.inputs, group.outputs), dtype)
        widths = (group.inputs, group.outputs)
        first, second = (jnp.ones((group.stack, width), dtype) for width in widths)
        return first, second

    inverses = KFACInverses(
        tuple(identity(group, group.inputs, group.diagonal_input) for group in layout.groups),
        tuple(identity(group, group.outputs, False) for group in layout.groups),
        tuple(spectrum(group) for group in layout.groups),
    )
    return _keep(inverses, layout)


def update_factors(
    settings: Settings, layout: Layout, factors: KFACFactors, sample: Sample, count: jax.Array
) -> KFACFactors:
    """Averages the factors with those of a batch.

    Args:
      settings: The hyperparameters.
      layout: How the layers are arranged.
      factors: The averages so far.
      sample: What the batch says.
      count: Batches in the averages.

    Returns:
      The new averages.
    """
    widths = {m: group.inputs for group in layout.groups for m in group.members}
    inputs = [
        replicate(input_moment(row, widths[i])) / sample.batch_size
        for i, row in enumerate(sample.rows)
    ]
    outputs = [output_moment(row) for row in sample.rows]
    sides = _keep((tuple(layout.join(inputs)), tuple(layout.join(outputs))), layout)
    new = KFACFactors(*sides, tuple(sample.squares))
    return kf.ema(factors, new, kf.warm_decay(settings.moment_decay, count))


# Inverses.


def invert(
    settings: Settings,
    layout: Layout,
    factors: KFACFactors,
    old: KFACInverses,
    positions: Sequence[float],
    cases: int,
    damping: chex.Numeric,
) -> tuple[KFACInverses, jax.Array]:
    """New inverses, or eigenvectors with their eigenvalues.

    A row of an embedding has a gradient only in a batch where a case uses it. Its entry of ``A`` is
    therefore taken to be one over the number of cases at least: a row that was not seen when the
    inverses were made would be divided by the damping alone.

    Args:
      settings: The hyperparameters.
      layout: How the layers are arranged.
      factors: The factors.
      old: The present inverses, which stay where new ones are not finite.
      positions: For each layer its positions per case.
      cases: Number of cases in a batch.
      damping: ``λ``, positive.

    Returns:
      The inverses, and how many blocks kept theirs.
    """
    factors = jax.tree.map(replicate, factors)  # Those of several groups are one batch.
    used = [jnp.maximum(a, 1 / cases) if a.ndim == 2 else a for a in factors.inputs]
    factors = factors._replace(inputs=tuple(used))
    if settings.inverse == "cholesky":
        new = _damped_inverses(settings, layout, factors, positions, damping)
    else:
        new = _eigenvectors(settings, layout, factors)
    new = _keep(new, layout)
    chosen, failed = [], jnp.zeros((), jnp.int32)
    for index in range(len(layout.groups)):
        mine, theirs = ([part[index] for part in side] for side in (new, old))
        finite = _finite_blocks(mine)
        failed += jnp.sum(~finite, dtype=jnp.int32)
        chosen.append(jax.tree.map(lambda n, o, f=finite: _where(f, n, o), mine, theirs))
    return KFACInverses(*(tuple(side) for side in zip(*chosen, strict=True))), failed


def _finite_blocks(parts: Any) -> jax.Array:
    """Which blocks of a stack are finite in all their arrays."""
    sums = [jnp.sum(leaf, axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(parts)]
    return jnp.isfinite(sum(sums[1:], start=sums[0]))


def _where(blocks: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(jnp.reshape(blocks, (-1, *[1] * (new.ndim - 1))), new, old)


def _spread(devices: Devices) -> Callable[..., Any]:
    """Gives each device its share of a batch of factorizations; results can be cut anywhere."""

    def spread(function: Callable[..., Any], *stacks: jax.Array) -> Any:
        return jax.tree.map(replicate, devices.spread(function, *stacks))

    return spread


def _mean_eigenvalue(factor: jax.Array) -> jax.Array:
    diagonal = factor if factor.ndim == 2 else jnp.diagonal(factor, axis1=1, axis2=2)
    return jnp.mean(diagonal, axis=1)


def _damped_inverses(
    settings: Settings,
    layout: Layout,
    factors: KFACFactors,
    positions: Sequence[float],
    damping: chex.Numeric,
) -> KFACInverses:
    """Inverses of both factors, each with its share of the damping."""
    matrices, shares = [], []
    for group, first, second in zip(layout.groups, factors.inputs, factors.outputs, strict=True):
        split = kf.split_damping(
            damping,
            settings.damping_split,
            positions=jnp.asarray(np.repeat([positions[m] for m in group.members], group.sizes)),
            input_mean_eigenvalue=_mean_eigenvalue(first),
            output_mean_eigenvalue=_mean_eigenvalue(second),
        )
        matrices += [first, second]
        shares += [jnp.broadcast_to(share, (group.stack,)) for share in split]
    dense = [i for i, matrix in enumerate(matrices) if matrix.ndim == 3]
    inverses = {
        i: 1 / (matrices[i] + shares[i][:, None]) for i in range(len(matrices)) if i not in dense
    }
    found = kf.stacked_inverses(
        [matrices[i] for i in dense], [shares[i] for i in dense], _spread(layout.devices)
    )
    inverses.update(zip(dense, found, strict=True))
    pairs = [inverses[i].astype(matrices[i].dtype) for i in range(len(matrices))]
    return KFACInverses(tuple(pairs[::2]), tuple(pairs[1::2]), (None,) * len(layout.groups))


def _eigenvectors(settings: Settings, layout: Layout, factors: KFACFactors) -> KFACInverses:
    """Eigenvectors of both factors; those of a diagonal one are the unit vectors."""
    dense = [factor for factor in factors.inputs if factor.ndim == 3]
    found = kf.stacked_eigenvectors([*dense, *factors.outputs], _spread(layout.devices))
    rest, ends = iter(found[: len(dense)]), found[len(dense) :]
    inputs, spectra = [], []
    for factor, (values, _) in zip(factors.inputs, ends, strict=True):
        first, basis = next(rest) if factor.ndim == 3 else (factor, jnp.ones_like(factor))
        inputs.append(basis)
        product = first[:, :, None] * values[:, None, :]
        spectra.append(product if settings.inverse == "corrected" else (first, values))
    return KFACInverses(tuple(inputs), tuple(basis for _, basis in ends), tuple(spectra))


def correct(
    settings: Settings,
    layout: Layout,
    factors: KFACFactors,
    inverses: KFACInverses,
    sample: Sample,
    count: jax.Array,
) -> tuple[KFACInverses, jax.Array]:
    """Averages the second moments of the gradient in the present basis of eigenvectors.

    In a new basis the products of eigenvalues stand for the batches before: an average that began
    with this batch alone would know nothing of what it does not show, such as the rows of an
    embedding that it does not use.

    Args:
      settings: The hyperparameters.
      layout: How the layers are arranged.
      factors: The factors.
      inverses: The eigenvectors, and the moments or products of eigenvalues so far.
      sample: What the batch says.
      count: Batches in the averages.

    Returns:
      The same eigenvectors, with new moments; and how many blocks kept theirs, as new ones were not
      finite.
    """
    sides = jax.tree.map(layout.devices.gather, (inverses.inputs, inverses.outputs))
    bases = zip(*map(layout.split, sides), strict=True)
    moments = [rotated_moment(row, *basis) for row, basis in zip(sample.rows, bases, strict=True)]
    decay = kf.warm_decay(settings.moment_decay, count)
    chosen, failed = [], jnp.zeros((), jnp.int32)
    for index, moment in enumerate(_keep(tuple(layout.join(moments)), layout)):
        old = inverses.spectra[index]
        assert isinstance(old, jax.Array)
        new = kf.ema(old, moment, decay)
        if inverses.inputs[index].ndim == 2:
            least = _variances(factors.outputs[index], inverses.outputs[index]) / sample.batch_size
            new = jnp.maximum(new, least[:, None, :])
        finite = _finite_blocks(new)
        failed += jnp.sum(~finite, dtype=jnp.int32)
        chosen.append(_where(finite, new, old))
    return inverses._replace(spectra=tuple(chosen)), failed


def _variances(moment: jax.Array, basis: jax.Array) -> jax.Array:
    """The second moments along the columns of a basis."""
    return jnp.sum(basis * matmul(moment, basis), axis=1)


def precondition(
    inverses: KFACInverses, layout: Layout, matrices: Sequence[jax.Array], damping: chex.Numeric
) -> list[jax.Array]:
    """The direction of every layer.

    Args:
      inverses: The inverses, or eigenvectors and eigenvalues.
      layout: How the layers are arranged.
      matrices: For each layer the gradient, ``(blocks, inputs, outputs)``.
      damping: ``λ``, used with eigenvalues; inverses have it in them.

    Returns:
      For each layer ``(blocks, inputs, outputs)``.
    """
    products = []
    for index, stacked in enumerate(layout.join(matrices)):
        first, second = inverses.inputs[index], inverses.outputs[index]
        spectrum = inverses.spectra[index]
        stacked = stacked.astype(second.dtype)
        if spectrum is None:
            products.append(spread_product(layout.devices, first, stacked, second))
            continue
        if isinstance(spectrum, tuple):
            spectrum = spectrum[0][:, :, None] * spectrum[1][:, None, :]
        damped = spectrum + damping
        products.append(spread_solution(layout.devices, first, stacked, second, damped))
    return layout.split(products)
