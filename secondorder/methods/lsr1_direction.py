"""L-SR1 as an ordinary link of a chain: the direction of its regularized model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from secondorder import tree as vectors
from secondorder.checks import check_range, check_static_count
from secondorder.control import RadiusRule, next_radius, reduction_ratio
from secondorder.methods.lsr1_model import (
    ScaleSetting,
    as_combination,
    assemble,
    build_matrix,
    build_model,
    check_scale,
    curvature_along,
    solve_model,
)
from secondorder.methods.lsr1_pairs import (
    can_be_stored,
    make_pair,
)
from secondorder.methods.terminal import add_decay, coarsest_resolution, keep_unless
from secondorder.methods.transform import make_transform
from secondorder.objective import (
    all_finite,
    check_has_arrays,
    check_params,
    check_value_fn,
    value_and_grad,
)
from secondorder.sharding import shard_like
from secondorder.tree import PairMemory

_RULE = RadiusRule()


class ScaleByLSR1Metrics(NamedTuple):
    """What `scale_by_lsr1` reports, all scalars.

    Attributes:
      ratio: Actual over predicted reduction of the last step, on the batch after it.
      scale: ``γ`` of the last matrix.
      pairs_kept: Pairs that it used, int32.
      nonfinite_steps: Batches that were not finite; they changed nothing, int32.
    """

    ratio: jax.Array
    scale: jax.Array
    pairs_kept: jax.Array
    nonfinite_steps: jax.Array


class ScaleByLSR1State(NamedTuple):
    """State of `scale_by_lsr1`.

    Attributes:
      count: Updates so far, int32.
      memory: The pairs.
      previous_params: The parameters before the last step.
      radius: Inverse of the multiple of the identity that is added to ``B``.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    memory: PairMemory
    previous_params: chex.ArrayTree
    radius: jax.Array
    metrics: ScaleByLSR1Metrics


def scale_by_lsr1(
    *,
    memory_size: int = 5,
    scale: ScaleSetting = "pencil_below",
    radius: chex.Numeric = 1.0,
    radius_rule: RadiusRule = _RULE,
    skip: chex.Numeric = 1e-8,
    storage_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions updates by a regularized limited-memory SR1 matrix.

    .. math:: d = (B + \mu I)^{-1} g, \qquad \mu \ge -2 \lambda_{\min}(B),

    with the pairs :math:`s = \theta_k - \theta_{k-1}` and
    :math:`y = \nabla f_k(\theta_k) - \nabla f_k(\theta_{k-1})` of the steps that were really made,
    both gradients on the current batch. So this is an ordinary link of a chain: anything may stand
    before and after it. :math:`\mu` follows the ratio of actual to predicted reduction of the last
    step, as a trust region does. An update costs one gradient at the previous parameters; that at
    the present ones is shared with the caller's.

    Args:
      memory_size: Number of pairs ``m``. Static.
      scale: :math:`\gamma` of :math:`B_0 = \gamma I`: a rule or a number, see `lsr1`.
      radius: First :math:`1 / \mu > 0`.
      radius_rule: How :math:`1 / \mu` follows the ratio.
      skip: Pairs with :math:`|s^\top r| <` this times :math:`\|s\| \|r\|` are left out, where
        :math:`r = y - B s`.
      storage_dtype: Of the stored vectors; default float32 or wider.

    Returns:
      A transform whose ``update`` needs ``params`` and ``value_fn``; ``curvature_fn``, an objective
      on another batch, replaces it. Batches that are not finite give a zero update and change
      only a counter.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> bowl = lambda p: p[0] ** 2 + 50 * p[1] ** 2
      >>> params = jnp.array([1.0, 1.0])
      >>> tx = optax.chain(so.scale_by_lsr1(radius=0.01), optax.scale(-1.0))
      >>> state = tx.init(params)
      >>> for _ in range(30):
      ...     value, grads = jax.value_and_grad(bowl)(params)
      ...     updates, state = tx.update(grads, state, params, value=value, value_fn=bowl)
      ...     params = optax.apply_updates(params, updates)
      >>> float(bowl(params)) < 1e-6
      True

    References:
      Kanzow, Steck (2023), Regularization of limited memory quasi-Newton methods for large-scale
      nonconvex minimization, Mathematical Programming Computation.
    """
    check_static_count("memory_size", memory_size)
    check_scale(scale)
    check_range("radius", radius, low=0, open_low=True)
    check_range("skip", skip, low=0, high=1)

    def init(params: chex.ArrayTree) -> ScaleByLSR1State:
        check_params(params, "scale_by_lsr1")
        dtype = vectors.accumulation_dtype(params)
        return ScaleByLSR1State(
            count=jnp.zeros((), jnp.int32),
            memory=vectors.init_pairs(params, memory_size, storage_dtype),
            previous_params=jax.tree.map(jnp.copy, params),
            radius=jnp.array(radius, dtype),
            metrics=ScaleByLSR1Metrics(
                ratio=jnp.zeros((), dtype),
                scale=jnp.zeros((), dtype),
                pairs_kept=jnp.zeros((), jnp.int32),
                nonfinite_steps=jnp.zeros((), jnp.int32),
            ),
        )

    def update(
        updates: chex.ArrayTree,
        state: ScaleByLSR1State,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Callable[[Any], Any] | None = None,
        curvature_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByLSR1State]:
        del extra_args
        check_has_arrays(params, "scale_by_lsr1")
        check_value_fn(value_fn, "scale_by_lsr1")
        objective: Any = value_fn if curvature_fn is None else curvature_fn
        check_value_fn(objective, "scale_by_lsr1", "curvature_fn")

        # 1. Both ends of the last step, on the present batch.
        previous = state.previous_params
        here, there = (value_and_grad(objective, point) for point in (params, previous))
        resolution = coarsest_resolution(here[0], there[0])
        value, gradient = add_decay(*here, params, 0)
        old_value, old_gradient = add_decay(*there, previous, 0)
        direction = jax.tree.map(lambda u, g: shard_like(u.astype(g.dtype), g), updates, gradient)
        square = vectors.inner(direction, direction)  # infinite if anything in it is
        usable = all_finite((square, value, gradient, old_value, old_gradient))

        # 2. The pair along it, and all inner products.
        norm = _distance(params, previous)
        pair = make_pair(previous, params, old_gradient, gradient, None, norm)
        moved = usable & (norm > 0) & can_be_stored(pair, state.memory)
        memory = vectors.push_pair(state.memory, *pair, moved)
        memory, products = vectors.project_on_pairs(memory, direction)

        # 3. How well the last model foresaw the step decides the regularization.
        slope = norm * vectors.inner(old_gradient, pair[0])
        predicted = _foreseen(memory, state.metrics.scale, skip, slope, norm)
        ratio = reduction_ratio(old_value, value, predicted, resolution)
        steered = next_radius(radius_rule, state.radius, ratio, state.radius)
        next_one = jnp.where(moved, steered, state.radius)

        # 4. The direction of the new model.
        model = build_model(memory, products[:, 0], square, scale, skip)
        step, measures = solve_model("regularized", model.quadratic, next_one)
        scaled = assemble(as_combination(model, step), memory, direction, None)
        new_state = ScaleByLSR1State(
            count=optax.safe_increment(state.count),
            memory=memory,
            previous_params=params,
            radius=measures.length,  # smaller if the penalty had to be larger
            metrics=ScaleByLSR1Metrics(
                ratio=jnp.where(moved, ratio, state.metrics.ratio),
                scale=model.matrix.scale,
                pairs_kept=jnp.sum(model.matrix.used, dtype=jnp.int32),
                nonfinite_steps=state.metrics.nonfinite_steps,
            ),
        )
        scaled = jax.tree.map(
            lambda d, u: jnp.where(usable, -d, 0).astype(u.dtype), scaled, updates
        )
        # The memory takes care of itself: nothing that is not finite was written to it.
        return scaled, keep_unless(usable, new_state, state._replace(memory=memory))

    return make_transform("scale_by_lsr1", init, update)


def _distance(params: chex.ArrayTree, previous: chex.ArrayTree) -> jax.Array:
    """The length of the step between two points."""
    dtype = vectors.accumulation_dtype(params)
    step = jax.tree.map(lambda p, q: p.astype(dtype) - q.astype(dtype), params, previous)
    return jnp.sqrt(vectors.inner(step, step))


def _foreseen(
    memory: PairMemory,
    scale: jax.Array,
    skip: chex.Numeric,
    slope: jax.Array,
    norm: jax.Array,
) -> jax.Array:
    """The reduction along the newest step that the model without its pair predicts.

    The Gram matrix holds the products of that step with the older pairs already.
    """
    slot = vectors.newest_slot(memory)
    older = jnp.where(jnp.arange(len(memory.numbers)) == slot, -1, memory.numbers)
    matrix = build_matrix(memory._replace(numbers=older), scale, skip)
    products = jnp.where(jnp.tile(older >= 0, 2), memory.gram[slot], 0)
    bend = curvature_along(matrix, products, memory.gram[slot, slot])
    return -(slope + norm**2 * bend / 2)
