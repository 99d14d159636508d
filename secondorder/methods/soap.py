r"""SOAP: Adam in the basis of eigenvectors of Shampoo's factors.

References:
  Vyas, Morwani, Zhao, Shapira, Brandfonbrener, Janson, Kakade (2024), SOAP: improving and
  stabilizing Shampoo using Adam, arXiv 2409.11321 ("the paper").
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import factors as kf
from secondorder import tree as vectors
from secondorder.checks import check_range
from secondorder.methods.blockwise import (
    AxisMatrices,
    Blocking,
    Blocks,
    cast_like,
    check_schedule,
    count_failed,
    if_due,
    is_usable,
    widen,
)
from secondorder.methods.layerwise import with_settings_of
from secondorder.methods.transform import make_transform
from secondorder.methods.weight_decay import WeightDecayForm, with_weight_decay
from secondorder.objective import check_has_arrays, check_params
from secondorder.sharding import replicate
from secondorder.tree import BlockGroup

_NAME = "scale_by_soap"


class SOAPMetrics(NamedTuple):
    """What SOAP reports; int32 scalars, counted since `init`.

    Attributes:
      nonfinite_steps: Batches whose value or gradient was not finite, or whose gradient could not
        be squared; they changed nothing.
      basis_updates: Refreshes of the bases, the first included.
      failed_bases: Matrices that kept their basis, as the new one was not finite.
    """

    nonfinite_steps: jax.Array
    basis_updates: jax.Array
    failed_bases: jax.Array


class ScaleBySOAPState(NamedTuple):
    """State of `scale_by_soap`.

    Attributes:
      count: Steps taken, int32; the first makes the bases.
      average: State of the average of gradients, in the space of the parameters.
      squares: Averages of squared gradients along the bases, by group of equal blocks,
        ``(stack, *shape)``.
      statistics: Second moments by group and axis, ``(stack, n, n)``.
      bases: Their eigenvectors as columns, large eigenvalues first.
      metrics: Counters.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    average: optax.OptState
    squares: tuple[jax.Array, ...]
    statistics: AxisMatrices
    bases: AxisMatrices
    metrics: SOAPMetrics


def scale_by_soap(
    *,
    b1: chex.Numeric = 0.95,
    b2: chex.Numeric = 0.95,
    eps: chex.Numeric = 1e-8,
    moment_decay: chex.Numeric | None = None,
    update_every: int = 1,
    precondition_every: int = 10,
    block_size: int = 1024,
    merge_dims: bool = True,
    one_sided: bool = False,
    precondition_vectors: bool = False,
    spread_over: Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales gradients as Adam does, in the basis of eigenvectors of their second moments.

    For a matrix with the gradients :math:`G_t` and their average :math:`M_t`,

    .. math::
      D_t = Q_L\, \frac{\hat M'_t}{\sqrt{\hat V_t} + \epsilon}\, Q_R^\top, \qquad
      M'_t = Q_L^\top M_t Q_R, \quad
      V_t = \beta_2 V_{t-1} + (1 - \beta_2)\, (Q_L^\top G_t Q_R)^2,

    with both averages corrected for their start from zero, and with orthonormal columns
    :math:`Q_L` and :math:`Q_R` near the eigenvectors of averages of :math:`G G^\top` and
    :math:`G^\top G`; likewise for tensors with more axes. The first step makes the bases by
    eigendecompositions **and returns zero**: along its own singular vectors most of a gradient is
    rounding, which Adam's first step would make as large as the rest. Later bases follow by one
    step of orthogonal iteration each. :math:`M` is kept in the space of the parameters; :math:`V`
    advances in every step, and stays along the columns that move.

    Args:
      b1: Decay :math:`\beta_1` in [0, 1).
      b2: Decay :math:`\beta_2` in [0, 1).
      eps: :math:`\epsilon > 0`.
      moment_decay: Decay in [0, 1) of the averages that the bases belong to; None for ``b2``.
      update_every: Refresh these averages at every so many steps only. Static.
      precondition_every: Refresh the bases at every so many steps only. Static.
      block_size: Longest axis of a block: longer ones are cut into nearly equal parts, each with
        bases of its own. Static.
      merge_dims: Whether neighboring axes are merged from the left, up to ``block_size`` and until
        two are left: a kernel of a convolution becomes a matrix. Static.
      one_sided: Whether only the shortest axis of each parameter, the first of several, has a
        basis. Static.
      precondition_vectors: Whether vectors have a basis; Adam is what is left without. Static.
      spread_over: Names of the axes of the parameters' mesh over which the work on equal blocks is
        spread; None for all axes, ``()`` for none. Static.

    Returns:
      A transform whose ``update`` needs ``params``, and no ``value_fn``. Batches whose value or
      gradient is not finite, or whose gradient cannot be squared, give a zero update and change
      only a counter. Where a new basis is not finite the previous one stays.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> params = jnp.ones((3, 2))
      >>> tx = optax.chain(so.scale_by_soap(), optax.scale(-0.1))
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> gradient = jnp.array([[3.0, 0.0], [0.0, 0.1], [0.0, 0.0]])
      >>> for _ in range(2):
      ...     updates, state = update(gradient, state, params)
      >>> jnp.abs(10 * updates).round(2).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]

    References:
      Vyas et al. (2024), arXiv 2409.11321, algorithms 3 and 4.
    """
    blocking = Blocking(block_size, merge_dims, one_sided, precondition_vectors, spread_over)
    blocking.check()
    check_schedule(update_every, precondition_every)
    check_range("b1", b1, low=0, high=1)
    check_range("b2", b2, low=0, high=1)
    check_range("eps", eps, low=0, open_low=True)
    check_range("moment_decay", moment_decay, low=0, high=1)
    mean = optax.ema(b1)
    decay = b2 if moment_decay is None else moment_decay

    def init(params: chex.ArrayTree) -> ScaleBySOAPState:
        check_params(params, _NAME)
        blocks, dtype = blocking.blocks_of(params), vectors.accumulation_dtype(params)

        def zeros(group: BlockGroup) -> jax.Array:
            return jnp.zeros((group.stack, *group.shape), dtype)

        return ScaleBySOAPState(
            count=jnp.zeros((), jnp.int32),
            average=mean.init(vectors.zeros_vector(params)),
            squares=blocks.init(zeros),
            statistics=blocks.zeros(dtype),
            bases=blocks.identities(dtype),
            metrics=SOAPMetrics(*(jnp.zeros((), jnp.int32) for _ in SOAPMetrics._fields)),
        )

    def update(
        updates: chex.ArrayTree,
        state: ScaleBySOAPState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleBySOAPState]:
        del extra_args
        check_has_arrays(params, _NAME)
        blocks, gradient = blocking.blocks_of(params), widen(updates, params)

        def started(state: ScaleBySOAPState) -> tuple[chex.ArrayTree, ScaleBySOAPState]:
            # 1. The first gradient gives the bases, and no step.
            statistics = _statistics(blocks, decay, state.statistics, blocks.cut(gradient))
            bases, failed = _first_bases(blocks, statistics, state.bases)
            new = state._replace(statistics=statistics, bases=bases)
            zeros = jax.tree.map(jnp.zeros_like, params)
            return zeros, cast_like(_counted(new, True, failed), state)

        def stepped(state: ScaleBySOAPState) -> tuple[chex.ArrayTree, ScaleBySOAPState]:
            # 2. Adam along the bases.
            stacks = blocks.cut(gradient)
            squares = _squares(blocks, b2, state, stacks)
            averaged, average = mean.update(gradient, state.average)
            correction = 1 - jnp.asarray(b2, vectors.accumulation_dtype(params)) ** state.count
            scaled = [
                along / (jnp.sqrt(square / correction) + eps)
                for along, square in zip(
                    blocks.multiply(state.bases, blocks.cut(averaged)), squares, strict=True
                )
            ]
            direction = blocks.join(blocks.multiply(state.bases, scaled, transpose=False), gradient)
            # 3. The bases follow the moments, and the squares the bases.
            statistics = if_due(
                state.count,
                update_every,
                functools.partial(_statistics, blocks, decay),
                *(state.statistics, stacks),
            )
            is_due = state.count % precondition_every == 0
            bases, squares, failed = jax.lax.cond(
                is_due,
                functools.partial(_next_bases, blocks, statistics),
                lambda bases, squares: (bases, squares, jnp.zeros((), jnp.int32)),
                *(state.bases, squares),
            )
            new = state._replace(
                average=average, squares=squares, statistics=statistics, bases=bases
            )
            return cast_like(direction, params), cast_like(_counted(new, is_due, failed), state)

        def accepted(state: ScaleBySOAPState) -> tuple[chex.ArrayTree, ScaleBySOAPState]:
            return jax.lax.cond(state.count == 0, started, stepped, state)

        def rejected(state: ScaleBySOAPState) -> tuple[chex.ArrayTree, ScaleBySOAPState]:
            count = state.metrics.nonfinite_steps + 1
            metrics = state.metrics._replace(nonfinite_steps=count)
            return jax.tree.map(jnp.zeros_like, params), state._replace(metrics=metrics)

        return jax.lax.cond(is_usable(gradient, value), accepted, rejected, state)

    return make_transform(_NAME, init, update)


def _counted(
    state: ScaleBySOAPState, refreshed: chex.Numeric, failed: jax.Array
) -> ScaleBySOAPState:
    """The state after one more step."""
    metrics = state.metrics
    return state._replace(
        count=optax.safe_increment(state.count),
        metrics=metrics._replace(
            basis_updates=metrics.basis_updates + refreshed,
            failed_bases=metrics.failed_bases + failed,
        ),
    )


def _statistics(
    blocks: Blocks, decay: chex.Numeric, old: AxisMatrices, stacks: Sequence[jax.Array]
) -> AxisMatrices:
    """The averaged second moments; their scale, which says nothing of vectors, starts from zero."""
    with jax.named_scope("soap_statistics"):
        return cast_like(kf.ema(old, blocks.moments(stacks), decay), old)


def _squares(
    blocks: Blocks, decay: chex.Numeric, state: ScaleBySOAPState, stacks: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """The averages of squares along the present bases."""
    along = blocks.multiply(state.bases, stacks)
    new = tuple(blocks.devices.keep(stack**2) for stack in along)
    return cast_like(kf.ema(state.squares, new, decay), state.squares)


def _first_bases(
    blocks: Blocks, statistics: AxisMatrices, old: AxisMatrices
) -> tuple[AxisMatrices, jax.Array]:
    """The eigenvectors, and how many bases are the old ones."""

    def decompose(_: Any, *stacks: jax.Array) -> tuple[jax.Array, jax.Array]:
        return kf.eigenbases(*stacks)

    with jax.named_scope("soap_eigenvectors"):
        bases, failed = blocks.map_by_size(decompose, statistics, old)
        return bases, count_failed(failed)


def _next_bases(
    blocks: Blocks,
    statistics: AxisMatrices,
    bases: AxisMatrices,
    squares: tuple[jax.Array, ...],
) -> tuple[AxisMatrices, tuple[jax.Array, ...], jax.Array]:
    """The bases after one more iteration, the squares along them, and how many bases are old."""

    def follow(_: Any, *stacks: jax.Array) -> tuple[jax.Array, ...]:
        return kf.follow_bases(*stacks)

    with jax.named_scope("soap_bases"):
        new, orders, failed = blocks.map_by_size(follow, statistics, bases, results=3)
        sorted_squares = tuple(
            blocks.devices.keep(_sort(square, group.axes, order))
            for square, group, order in zip(squares, blocks.layout.groups, orders, strict=True)
        )
        return new, sorted_squares, count_failed(failed)


def _sort(stack: jax.Array, axes: tuple[int, ...], orders: Sequence[jax.Array]) -> jax.Array:
    """Tensors (S, ...) with some axes in other orders, (S, n) each."""
    stack = replicate(stack)
    for axis, order in zip(axes, orders, strict=True):
        shape = [1] * stack.ndim
        shape[0], shape[axis + 1] = order.shape
        stack = jnp.take_along_axis(stack, jnp.reshape(replicate(order), shape), axis + 1)
    return stack


@with_settings_of(scale_by_soap)
def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: chex.Numeric = 0.0,
    weight_decay_form: WeightDecayForm = "decoupled",
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP, with weight decay.

    .. math:: \theta_{k+1} = \theta_k - \eta D_k

    See `scale_by_soap` for the direction :math:`D` and for all hyperparameters that are not listed
    here. The first step is zero.

    Args:
      learning_rate: Step size :math:`\eta`, or a schedule of it. That of Adam is a good start.
      weight_decay: Coefficient :math:`\tau \ge 0` of the decay.
      weight_decay_form: ``"l2"`` adds :math:`\tau\theta` to the gradient; ``"decoupled"`` adds it
        to the direction.
      **settings: Hyperparameters of `scale_by_soap`.

    Returns:
      The optimizer. Its ``update`` needs ``params``, and no ``value_fn``.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x, y = jnp.ones((8, 3)), jnp.zeros((8, 2))
      >>> objective = lambda w: jnp.mean((x @ w - y) ** 2)
      >>> params, tx = jnp.ones((3, 2)), so.soap(0.1)
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for _ in range(15):
      ...     updates, state = update(jax.grad(objective)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(objective(params)) < 0.5 * 9
      True

    References:
      Vyas et al. (2024), arXiv 2409.11321.
    """
    direction = scale_by_soap(**settings)
    links = with_weight_decay((direction,), weight_decay, weight_decay_form)
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate))
