r"""Shampoo: gradients preconditioned along every axis of a parameter by roots of second moments.

References:
  Gupta, Koren, Singer (2018), Shampoo: preconditioned stochastic tensor optimization,
  arXiv 1802.09568 ("the paper").
  Anil et al. (2020), Scalable second order optimization for deep learning, arXiv 2002.09018, for
  blocks, grafting and Newton's iteration.
  Shi et al. (2023), A distributed data-parallel PyTorch implementation of the distributed Shampoo
  optimizer, arXiv 2309.06497, for averages of gradient and moments.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import factors as kf
from secondorder import tree as vectors
from secondorder.checks import (
    check_choice,
    check_flag,
    check_range,
    check_static_count,
    is_number,
    is_zero,
)
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
from secondorder.tree import BlockGroup

_NAME = "scale_by_shampoo"

GraftingName: TypeAlias = Literal["none", "sgd", "adagrad", "rmsprop", "adam"]
Grafting: TypeAlias = GraftingName | optax.GradientTransformation

_GRAFTING = {
    "none": optax.identity,
    "sgd": optax.identity,
    "adagrad": optax.scale_by_rss,
    "rmsprop": optax.scale_by_rms,
    "adam": optax.scale_by_adam,
}


class ShampooMetrics(NamedTuple):
    """What Shampoo reports; int32 scalars, counted since `init`.

    Attributes:
      nonfinite_steps: Batches whose value or gradient was not finite, or whose gradient could not
        be squared; they changed nothing.
      root_updates: Refreshes of the roots.
      failed_roots: Matrices that kept their root, as no new one was found.
      retried_roots: Matrices whose root Newton's iteration found with a thousand times the damping
        only.
    """

    nonfinite_steps: jax.Array
    root_updates: jax.Array
    failed_roots: jax.Array
    retried_roots: jax.Array


class ScaleByShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    Attributes:
      count: Steps taken, int32.
      average: State of the average of gradients.
      statistics: Second moments by group of equal blocks and by axis, ``(stack, n, n)``.
      roots: Their inverse roots.
      grafting: State of the method that gives the length.
      metrics: Counters.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    average: optax.OptState
    statistics: AxisMatrices
    roots: AxisMatrices
    grafting: optax.OptState
    metrics: ShampooMetrics


def scale_by_shampoo(
    *,
    grafting: Grafting = "adam",
    gradient_decay: chex.Numeric = 0.9,
    moment_decay: chex.Numeric | None = 0.99,
    eps: chex.Numeric = 1e-6,
    root_order: float | None = None,
    root_solver: kf.RootSolver = "eigh",
    update_every: int = 1,
    precondition_every: int = 10,
    start_preconditioning_step: int | None = None,
    block_size: int = 1024,
    merge_dims: bool = True,
    one_sided: bool = False,
    precondition_vectors: bool = True,
    spread_over: Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions gradients by inverse roots of their second moments along every axis.

    For a matrix with the gradients :math:`G_t` and their average :math:`M_t`,

    .. math::
      D_t = L_t^{-1/4} M_t R_t^{-1/4}, \qquad
      L_t = \sum_s w_s G_s G_s^\top, \quad R_t = \sum_s w_s G_s^\top G_s,

    and likewise with ``k`` factors of the power :math:`-1/2k` for a tensor with ``k`` axes. Axes of
    length 1 do not count; what has none left is a vector, whose second moment is that of
    full-matrix AdaGrad. The length of each parameter's direction is that of *grafting*'s.

    Args:
      grafting: Whose length the direction of each parameter gets, and whose direction is taken
        before preconditioning starts: ``"sgd"``, ``"adagrad"``, ``"rmsprop"`` or ``"adam"`` with
        optax's settings; a transform such as ``optax.scale_by_adam(b2=0.95)``; or ``"none"``. It
        sees the gradient itself, not the average. Static.
      gradient_decay: Decay in [0, 1) of the average of gradients that is preconditioned, which is
        corrected for its start from zero; 0 for the gradient alone.
      moment_decay: Decay in [0, 1) of the averages :math:`L` and :math:`R`, whose weights sum to
        one; None for plain sums, as in the paper.
      eps: Damping :math:`\epsilon > 0`, relative to the trace:
        :math:`L + \epsilon\, \mathrm{tr} L\, I`.
      root_order: :math:`p` of the power :math:`-1/p`, for all factors; None for ``2k``. Static.
      root_solver: ``"eigh"``, or ``"newton"`` for the coupled Newton iteration, made of products
        alone and for integer orders. Static.
      update_every: Refresh the second moments at every so many steps only. Static.
      precondition_every: Refresh the roots at every so many steps only. Static.
      start_preconditioning_step: Steps that grafting's method takes first, while moments are
        gathered; None for ``precondition_every``, and for 0 without grafting. Roots of few
        gradients magnify what these did not see. Static.
      block_size: Longest axis of a block: longer ones are cut into nearly equal parts, each with
        factors of its own. Static.
      merge_dims: Whether neighboring axes are merged from the left, up to ``block_size`` and until
        two are left: a kernel of a convolution becomes a matrix. Static.
      one_sided: Whether only the shortest axis of each parameter, the first of several, has a
        factor. Static.
      precondition_vectors: Whether vectors are preconditioned; their direction is otherwise
        grafting's, or without grafting the averaged gradient. Static.
      spread_over: Names of the axes of the parameters' mesh over which the work on equal blocks is
        spread; None for all axes, ``()`` for none. Static.

    Returns:
      A transform whose ``update`` needs ``params``, and no ``value_fn``. Batches whose value or
      gradient is not finite, or whose gradient cannot be squared, give a zero update and change
      only a counter. Where no root is found the previous one stays.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> params = jnp.ones((3, 2))
      >>> tx = optax.chain(so.scale_by_shampoo(grafting="none"), optax.scale(-0.1))
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> gradient = jnp.array([[3.0, 0.0], [0.0, 0.1], [0.0, 0.0]])
      >>> updates, state = update(gradient, state, params)
      >>> jnp.abs(10 * updates).round(2).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]

    References:
      Gupta, Koren, Singer (2018), arXiv 1802.09568, algorithms 1 and 2; Anil et al. (2020),
      arXiv 2002.09018; Shi et al. (2023), arXiv 2309.06497.
    """
    blocking = Blocking(block_size, merge_dims, one_sided, precondition_vectors, spread_over)
    _check_hyperparameters(grafting, gradient_decay, moment_decay, eps, root_order, root_solver)
    blocking.check()
    check_schedule(update_every, precondition_every)
    start = start_preconditioning_step
    if start is None:
        start = 0 if grafting == "none" else precondition_every
    elif start != 0:
        check_static_count("start_preconditioning_step", start)
    method = _GRAFTING[grafting]() if isinstance(grafting, str) else grafting
    mean = optax.identity() if is_zero(gradient_decay) else optax.ema(gradient_decay)

    def init(params: chex.ArrayTree) -> ScaleByShampooState:
        check_params(params, _NAME)
        blocks, dtype = blocking.blocks_of(params), vectors.accumulation_dtype(params)
        zeros = vectors.zeros_vector(params)
        return ScaleByShampooState(
            count=jnp.zeros((), jnp.int32),
            average=mean.init(zeros),
            statistics=blocks.zeros(dtype),
            roots=blocks.identities(dtype),
            grafting=method.init(zeros),
            metrics=ShampooMetrics(*(jnp.zeros((), jnp.int32) for _ in ShampooMetrics._fields)),
        )

    def update(
        updates: chex.ArrayTree,
        state: ScaleByShampooState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByShampooState]:
        del extra_args
        check_has_arrays(params, _NAME)
        blocks, gradient = blocking.blocks_of(params), widen(updates, params)

        def accepted(state: ScaleByShampooState) -> tuple[chex.ArrayTree, ScaleByShampooState]:
            # 1. The second moments.
            statistics = if_due(
                state.count,
                update_every,
                functools.partial(_statistics, blocks, moment_decay, gradient),
                *(state.statistics, state.count // update_every),
            )
            # 2. Their roots.
            roots = functools.partial(_roots, blocks, statistics, eps, root_order, root_solver)
            began = state.count >= start
            is_due = began & ((state.count - start) % precondition_every == 0)
            none = jnp.zeros((), jnp.int32)
            inverses, failed, retried = jax.lax.cond(
                is_due, roots, lambda old: (old, none, none), state.roots
            )
            # 3. The direction, and the length that another method would give it.
            averaged, average = mean.update(gradient, state.average)
            grafted, grafting_state = method.update(gradient, state.grafting, params)
            averaged = cast_like(averaged, gradient)
            plain = averaged if grafting == "none" else cast_like(grafted, gradient)
            direction = jax.lax.cond(
                began,
                functools.partial(_direction, blocks, grafting != "none"),
                lambda inverses, averaged, plain: plain,
                *(inverses, averaged, plain),
            )
            new = ScaleByShampooState(
                count=optax.safe_increment(state.count),
                average=average,
                statistics=statistics,
                roots=inverses,
                grafting=grafting_state,
                metrics=state.metrics._replace(
                    root_updates=state.metrics.root_updates + is_due,
                    failed_roots=state.metrics.failed_roots + failed,
                    retried_roots=state.metrics.retried_roots + retried,
                ),
            )
            return cast_like(direction, params), cast_like(new, state)

        def rejected(state: ScaleByShampooState) -> tuple[chex.ArrayTree, ScaleByShampooState]:
            count = state.metrics.nonfinite_steps + 1
            metrics = state.metrics._replace(nonfinite_steps=count)
            return jax.tree.map(jnp.zeros_like, params), state._replace(metrics=metrics)

        return jax.lax.cond(is_usable(gradient, value), accepted, rejected, state)

    return make_transform(_NAME, init, update)


def _statistics(
    blocks: Blocks,
    decay: chex.Numeric | None,
    gradient: chex.ArrayTree,
    old: AxisMatrices,
    count: jax.Array,
) -> AxisMatrices:
    """The second moments with those of one more gradient, as a sum or as an average."""
    with jax.named_scope("shampoo_statistics"):
        new = blocks.moments(blocks.cut(gradient))
        if decay is None:
            return jax.tree.map(jnp.add, old, new)
        return kf.ema(old, new, kf.warm_decay(decay, count))


def _roots(
    blocks: Blocks,
    statistics: AxisMatrices,
    eps: chex.Numeric,
    order: float | None,
    solver: kf.RootSolver,
    old: AxisMatrices,
) -> tuple[AxisMatrices, jax.Array, jax.Array]:
    """New roots of all moments, how many are the old ones, and how many took more damping."""

    def order_of(group: BlockGroup) -> float:
        return 2 * len(group.axes) if order is None else order

    def roots(
        order: float, matrices: jax.Array, previous: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return kf.inverse_roots(matrices, previous, order, eps, solver)

    with jax.named_scope("shampoo_roots"):
        new, failed, retried = blocks.map_by_size(roots, statistics, old, results=3, kind=order_of)
        return new, count_failed(failed), count_failed(retried)


def _direction(
    blocks: Blocks,
    grafts: bool,
    roots: AxisMatrices,
    averaged: chex.ArrayTree,
    plain: chex.ArrayTree,
) -> chex.ArrayTree:
    """The preconditioned gradient, each parameter's as long as the one that is given."""
    with jax.named_scope("shampoo_precondition"):
        products = blocks.join(blocks.multiply(roots, blocks.cut(averaged)), averaged)
    leaves, structure = jax.tree.flatten(plain)
    chosen = []
    for axes, other, product in zip(
        blocks.layout.axes, leaves, jax.tree.leaves(products), strict=True
    ):
        chosen.append(_graft(product, other) if axes and grafts else product if axes else other)
    return jax.tree.unflatten(structure, chosen)


def _graft(direction: jax.Array, other: jax.Array) -> jax.Array:
    """One direction with the length of another."""
    # Divided by its largest element first: the square of a direction can underflow.
    largest = jnp.max(jnp.abs(direction), initial=0)
    scaled = direction / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(scaled**2))
    length = jnp.sqrt(jnp.sum(other**2))
    return scaled * jnp.where(norm > 0, length / jnp.where(norm > 0, norm, 1), 0)


def _check_hyperparameters(
    grafting: Any,
    gradient_decay: Any,
    moment_decay: Any,
    eps: Any,
    root_order: Any,
    root_solver: Any,
) -> None:
    """Raises `ValueError` for whatever can be judged before tracing."""
    if isinstance(grafting, str):
        check_choice("grafting", grafting, get_args(GraftingName))
    elif not isinstance(grafting, optax.GradientTransformation):
        raise ValueError(
            "`grafting` must be a name or a transform such as optax.scale_by_adam(), got "
            f"{type(grafting)}."
        )
    check_range("gradient_decay", gradient_decay, low=0, high=1)
    check_range("moment_decay", moment_decay, low=0, high=1)
    check_range("eps", eps, low=0, open_low=True)
    check_choice("root_solver", root_solver, get_args(kf.RootSolver))
    if root_order is None:
        return
    if root_solver == "newton":
        check_static_count("root_order", root_order)
    elif not is_number(root_order) or root_order <= 0:
        raise ValueError(f"`root_order` must be a positive Python number, got {root_order}.")


@with_settings_of(scale_by_shampoo)
def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: chex.Numeric = 0.0,
    nesterov: bool = False,
    weight_decay: chex.Numeric = 0.0,
    weight_decay_form: WeightDecayForm = "l2",
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo, with momentum and weight decay.

    .. math:: v_{k+1} = \mu v_k + D_k, \qquad \theta_{k+1} = \theta_k - \eta v_{k+1}

    See `scale_by_shampoo` for the direction :math:`D` and for all hyperparameters that are not
    listed here. The paper's are::

        so.shampoo(learning_rate, grafting="none", gradient_decay=0.0, moment_decay=None,
                   merge_dims=False, precondition_every=1)

    Args:
      learning_rate: Step size :math:`\eta`, or a schedule of it.
      momentum: :math:`\mu` in [0, 1).
      nesterov: Whether the step is :math:`\mu v_{k+1} + D_k` instead. Static.
      weight_decay: Coefficient :math:`\tau \ge 0` of the decay.
      weight_decay_form: ``"l2"`` adds :math:`\tau\theta` to the gradient before it is
        preconditioned; ``"decoupled"`` adds it to the direction, behind the momentum.
      **settings: Hyperparameters of `scale_by_shampoo`.

    Returns:
      The optimizer. Its ``update`` needs ``params``, and no ``value_fn``.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x, y = jnp.ones((8, 3)), jnp.zeros((8, 2))
      >>> objective = lambda w: jnp.mean((x @ w - y) ** 2)
      >>> params, tx = jnp.ones((3, 2)), so.shampoo(0.1)
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for _ in range(15):
      ...     updates, state = update(jax.grad(objective)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(objective(params)) < 0.5
      True

    References:
      Gupta, Koren, Singer (2018), arXiv 1802.09568; Anil et al. (2020), arXiv 2002.09018.
    """
    check_range("momentum", momentum, low=0, high=1)
    check_flag("nesterov", nesterov)
    trace = () if is_zero(momentum) else (optax.trace(momentum, nesterov),)
    links = (scale_by_shampoo(**settings), *trace)
    links = with_weight_decay(links, weight_decay, weight_decay_form)
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate))
