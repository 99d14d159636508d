r"""Block-diagonal Hessian-free optimization.

The Gauss-Newton matrix without the curvature between blocks of parameters falls into one system
per block. Each needs fewer iterations of conjugate gradients than the whole, all run in one loop,
and a small curvature batch does for them. What is lost is how the blocks act together: all of them
remove the same error at once, and their joint step overshoots by almost the number of blocks. So
the step is scaled to the minimizer, along it, of the whole model, at the price of one full product.

Reference:
  Zhang, Xiong, Bradbury, Socher (2017), Block-diagonal Hessian-free optimization for training
  neural networks, arXiv 1712.07296 ("the paper").
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import operators
from secondorder import tree as vectors
from secondorder.checks import check_choice, check_flag, check_range, check_static_count, is_zero
from secondorder.control import DampingRule, SearchResult, backtrack, optimal_rate
from secondorder.methods.hessian_free_model import Parabola, steer
from secondorder.methods.terminal import (
    Point,
    at,
    curvature_objective,
    judge,
    keep_unless,
    look,
    scaled_step,
    trial_value,
    zero_metrics,
)
from secondorder.methods.transform import make_transform
from secondorder.objective import all_finite, check_params
from secondorder.operators import Engine, LinearOperator
from secondorder.solvers import conjugate_gradient
from secondorder.tree import Blocks, BlockSetting

_RULE = DampingRule()

StepKind: TypeAlias = Literal["optimal", "fixed", "armijo"]
EngineSetting: TypeAlias = Engine | Literal["auto"]


class BlockHessianFreeMetrics(NamedTuple):
    """What `block_hessian_free` reports, all scalars.

    Attributes:
      damping: Of the last model, mean over the blocks.
      ratio: Actual over predicted reduction of the last step; 0 where no step is tried.
      rate: The step as a multiple of the blocks' solutions; 0 if it was rejected.
      predicted: Change of the objective that the full model without damping promised.
      iterations: Of conjugate gradients, mean over the blocks; 0 with the dual engine.
      products: Block-diagonal products at the last step, int32.
      engine: 0 linearized, 1 factored, 2 dual; int32.
      evaluations: Values that the last step evaluated, int32.
      rejections: Steps that a search rejected since `init`, int32.
      negative_curvature: Steps in which a block met negative curvature since `init`, int32.
      nonfinite_products: Steps in which a block met a number that is not finite, int32.
      nonfinite_steps: Batches whose value or gradient was not finite; they changed nothing.
    """

    damping: jax.Array
    ratio: jax.Array
    rate: jax.Array
    predicted: jax.Array
    iterations: jax.Array
    products: jax.Array
    engine: jax.Array
    evaluations: jax.Array
    rejections: jax.Array
    negative_curvature: jax.Array
    nonfinite_products: jax.Array
    nonfinite_steps: jax.Array


class BlockHessianFreeState(NamedTuple):
    """State of `block_hessian_free`.

    Attributes:
      count: Updates so far, int32.
      solution: The last solutions, from which the next start; None without a warm start.
      damping: ``λ``.
      block_damping: Of each of the ``L`` blocks at the last step ``(L,)``.
      block_iterations: Of conjugate gradients at the last step ``(L,)``, int32.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    solution: chex.ArrayTree | None
    damping: jax.Array
    block_damping: jax.Array
    block_iterations: jax.Array
    metrics: BlockHessianFreeMetrics


class _Curvature(NamedTuple):
    """The Gauss-Newton matrix of one step, in the form that its engine needs.

    Attributes:
      engine: Its name.
      diagonal: The block-diagonal part.
      full: All of it.
      factors: What the dual engine solves with, or None.
    """

    engine: Engine
    diagonal: LinearOperator
    full: LinearOperator
    factors: operators.GaussNewtonFactors | None


class _Solution(NamedTuple):
    """The blocks' solutions, and how they were found."""

    direction: chex.ArrayTree
    iterations: jax.Array
    products: jax.Array
    negative_curvature: jax.Array
    finite: jax.Array


def block_hessian_free(
    *,
    blocks: BlockSetting = None,
    engine: EngineSetting = "auto",
    step: StepKind = "optimal",
    learning_rate: optax.ScalarOrSchedule = 1.0,
    damping: chex.Numeric = 0.1,
    damping_rule: DampingRule | None = _RULE,
    relative_damping: bool = False,
    max_iterations: int = 30,
    progress: chex.Numeric = 5e-4,
    warm_start: chex.Numeric = 0.0,
    sufficient: chex.Numeric = 1e-2,
    shrink: chex.Numeric = 0.8,
    max_trials: int = 60,
    weight_decay: chex.Numeric = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Block-diagonal Hessian-free optimization.

    For every block ``b`` of the parameters

    .. math:: (G_b + \lambda I)\, d_b = -g_b, \qquad G_b = J_b^\top H J_b,

    is solved by conjugate gradients, all blocks in lockstep, and the step is

    .. math:: \alpha d, \qquad \alpha = \frac{-g^\top d}{d^\top (G + \lambda I) d}.

    The paper's settings are::

        so.block_hessian_free(blocks=labels, step="fixed", learning_rate=0.1, damping=0.0,
                              damping_rule=None, max_iterations=30)

    with two blocks, encoder and decoder, for its autoencoder; ``damping=0.01`` and
    ``max_iterations=100`` for its LSTM, one block per layer; ``damping=0.1`` for its residual
    network. The gradient wants a batch at least four times that of the curvature.

    Args:
      blocks: None: leaves that have the same parent, such as kernel and bias of a layer, are a
        block; a function from the path of a leaf to the label of its block; or a pytree of labels,
        a prefix of the parameters as `optax.partition` takes. Layers that a scan has stacked in one
        leaf are in one block, whose products cost as much as full ones. Static.
      engine: How products are made: ``"linearized"``: the model is linearized once per block,
        whatever it is; ``"factored"``: columns of the Jacobian are stored, so that a product costs
        about two forward passes however many blocks there are, for models of linear layers with
        few outputs; ``"dual"``: an exact solve in the space of the outputs, for small batches of
        these; ``"auto"``: the one with the least predicted work. Static.
      step: ``"optimal"``: :math:`\alpha` as above, at most ``learning_rate``; ``"fixed"``:
        :math:`\alpha` is ``learning_rate``; ``"armijo"``: the first rate of a line search from
        there that decreases the objective sufficiently. Static.
      learning_rate: The largest, the only or the first rate; positive, or a schedule of it.
      damping: :math:`\lambda \ge 0`; positive for the dual engine.
      damping_rule: How it follows the ratio of actual to predicted reduction; each step is then
        evaluated, and is zero if it raises the objective. None keeps the damping.
      relative_damping: Whether the damping of a block is :math:`\lambda` times the mean of the
        diagonal of :math:`G_b`, which a random product estimates at each step. Static.
      max_iterations: Most iterations of conjugate gradients. Static.
      progress: A block stops when its relative progress per iteration is below this.
      warm_start: Factor in [0, 1] of the last solution where they start.
      sufficient: Share of the slope's promise that a step of ``"armijo"`` must keep, in [0, 1).
      shrink: Factor in (0, 1) of its search.
      max_trials: Most rates that it tries. Static.
      weight_decay: Coefficient :math:`\tau \ge 0` of :math:`\tau|\theta|^2/2`, which is added to
        the objective and its curvature.
      seed: Of the products of ``relative_damping``.

    Returns:
      A transform whose ``update`` needs ``params`` and a ``value_fn`` that is an `Objective`; value
      and gradient at the parameters are computed if they are not given. ``curvature_fn``, an
      `Objective` on another batch, gives the curvature. It is terminal; but with
      ``damping_rule=None`` and a step that is not searched other links may follow. A batch that is
      not finite gives a zero update and changes only a counter.

    Raises:
      ValueError: For hyperparameters out of range, or an engine that the model does not allow.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x = jax.random.normal(jax.random.key(0), (64, 3))
      >>> objective = so.Objective(
      ...     lambda p: jnp.tanh(x @ p["a"]["w"]) @ p["b"]["w"],
      ...     lambda z: jnp.mean((z - jnp.tanh(x[:, :1])) ** 2))
      >>> params = {"a": {"w": jnp.eye(3)}, "b": {"w": jnp.ones((3, 1))}}
      >>> tx = so.block_hessian_free()
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     value, grad = jax.value_and_grad(objective)(params)
      ...     updates, state = tx.update(
      ...         grad, state, params, value=value, grad=grad, value_fn=objective)
      ...     params = optax.apply_updates(params, updates)
      >>> float(objective(params)) < 1e-2
      True

    References:
      Zhang et al. (2017), algorithm 1. The scaled step is not in the paper.
    """
    check_choice("engine", engine, ("auto", *get_args(Engine)))
    check_choice("step", step, get_args(StepKind))
    check_flag("relative_damping", relative_damping)
    check_range("damping", damping, low=0, open_low=engine == "dual")
    check_static_count("max_iterations", max_iterations)
    check_static_count("max_trials", max_trials)
    for name, number in (("progress", progress), ("weight_decay", weight_decay)):
        check_range(name, number, low=0)
    for name, number in (("sufficient", sufficient), ("shrink", shrink)):
        check_range(name, number, low=0, high=1)
    check_range("warm_start", warm_start, low=0)
    if not callable(learning_rate):
        check_range("learning_rate", learning_rate, low=0, open_low=True)
    starts = not is_zero(warm_start)
    tries = step == "armijo" or damping_rule is not None
    among = (engine,) if engine != "auto" else get_args(Engine)[: 2 if is_zero(damping) else 3]

    def init(params: chex.ArrayTree) -> BlockHessianFreeState:
        check_params(params, "block_hessian_free")
        dtype = vectors.accumulation_dtype(params)
        count = len(vectors.label_blocks(blocks, params))
        return BlockHessianFreeState(
            count=jnp.zeros((), jnp.int32),
            solution=vectors.zeros_vector(params) if starts else None,
            damping=jnp.array(damping, dtype),
            block_damping=jnp.zeros(count, dtype),
            block_iterations=jnp.zeros(count, jnp.int32),
            metrics=zero_metrics(
                BlockHessianFreeMetrics,
                dtype,
                ("damping", "ratio", "rate", "predicted", "iterations"),
            ),
        )

    def solve(
        matrix: _Curvature,
        point: Point,
        damping: jax.Array,
        partition: Blocks,
        last: chex.ArrayTree | None,
    ) -> _Solution:
        descent = jax.tree.map(jnp.negative, point.gradient)
        if matrix.factors is not None:
            return _solve_dual(matrix.factors, descent, damping, partition)
        start = None if last is None else jax.tree.map(lambda x: warm_start * x, last)
        return _solve_by_products(
            matrix.diagonal, descent, damping, partition, start, max_iterations, progress
        )

    def go(
        point: Point,
        parabola: Parabola,
        damped: jax.Array,
        value_along: Callable[[chex.Numeric], jax.Array],
        bound: chex.Numeric,
    ) -> SearchResult:
        if step == "armijo":
            return backtrack(
                value_along,
                point.value,
                parabola.slope,
                first=bound,
                shrink=shrink,
                sufficient=sufficient,
                max_trials=max_trials,
                resolution=point.resolution,
            )
        rate = optimal_rate(parabola.slope, damped, bound) if step == "optimal" else bound
        return _single_rate(point, jnp.asarray(rate, point.value.dtype), value_along, tries)

    def update(
        updates: chex.ArrayTree,
        state: BlockHessianFreeState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        grad: chex.ArrayTree | None = None,
        value_fn: Any = None,
        curvature_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, BlockHessianFreeState]:
        del extra_args
        grad = updates if grad is None else grad
        point = look("block_hessian_free", value_fn, params, value, grad, weight_decay)
        objective = curvature_objective("block_hessian_free", value_fn, curvature_fn)
        partition = vectors.label_blocks(blocks, params)

        # 1. The curvature, by the engine that needs the least work, and its damping.
        with jax.named_scope("curvature"):
            matrix = _curvature(among, objective, point.params, partition, max_iterations)
        shift = jnp.broadcast_to(state.damping, (len(partition),))
        if relative_damping:
            key = jax.random.fold_in(jax.random.key(seed), state.count)
            shift = shift * _mean_diagonal(matrix.diagonal, point.params, partition, key)

        # 2. The system of each block.
        solution = solve(matrix, point, shift + weight_decay, partition, state.solution)

        # 3. How far to go along the joint step.
        parabola = _parabola(matrix.full, point, solution.direction, weight_decay)
        damped = parabola.curvature + vectors.inner(
            solution.direction, vectors.block_scale(partition, shift, solution.direction)
        )
        value_along = partial(
            trial_value, value_fn, point.params, solution.direction, weight_decay=weight_decay
        )
        search = go(point, parabola, damped, value_along, at(learning_rate, state.count))

        # 4. What the full model promised, what the objective did, and the next damping.
        predicted = parabola.change(search.rate)
        ratio = jnp.zeros_like(point.value)
        if tries:
            ratio = judge(point, search, predicted)
        new = BlockHessianFreeState(
            count=optax.safe_increment(state.count),
            solution=solution.direction if starts else None,
            damping=steer(damping_rule, state.damping, ratio),
            block_damping=shift,
            block_iterations=solution.iterations,
            metrics=_report(state, matrix.engine, solution, search, shift, ratio, predicted),
        )
        return scaled_step(point.params, solution.direction, search.rate), keep_unless(
            point.usable, new, state
        )

    return make_transform("block_hessian_free", init, update)


def _curvature(
    among: tuple[Engine, ...],
    objective: Any,
    params: chex.ArrayTree,
    blocks: Blocks,
    iterations: int,
) -> _Curvature:
    """The matrix of the curvature batch, as the best of some engines makes it."""
    choice = operators.choose_engine(objective, params, blocks, iterations=iterations, among=among)
    if choice.engine not in among:
        raise ValueError(
            f"block_hessian_free: the engine {among[0]!r} is not possible here, as "
            f'{choice.reason}; use engine="linearized" or "auto".'
        )
    if choice.engine == "linearized":
        diagonal = operators.block_gauss_newton(objective, params, blocks)
        return _Curvature("linearized", diagonal, operators.gauss_newton(objective, params), None)
    factors = operators.factor_gauss_newton(objective, params, trace=choice.trace)
    diagonal, full = (factors.operator(b) for b in (blocks, vectors.one_block(params)))
    return _Curvature(choice.engine, diagonal, full, factors if choice.engine == "dual" else None)


def _mean_diagonal(
    matrix: LinearOperator, params: chex.ArrayTree, blocks: Blocks, key: jax.Array
) -> jax.Array:
    """An unbiased estimate of the mean of the diagonal of each block ``(L,)``, not negative."""
    signs = vectors.random_vector("rademacher", key, params)
    leaves = jax.tree.leaves(params)
    sizes = [sum(leaves[i].size for i in blocks.leaves_of(b)) for b in range(len(blocks))]
    traces = vectors.block_inner(blocks, signs, matrix(signs))
    return jnp.maximum(traces, 0) / jnp.asarray(sizes, traces.dtype)


def _solve_by_products(
    matrix: LinearOperator,
    descent: chex.ArrayTree,
    damping: jax.Array,
    blocks: Blocks,
    start: chex.ArrayTree | None,
    max_iterations: int,
    progress: chex.Numeric,
) -> _Solution:
    def damped(vector: chex.ArrayTree) -> chex.ArrayTree:
        shift = vectors.block_scale(blocks, damping, vector)
        return jax.tree.map(jnp.add, matrix(vector), shift)

    with jax.named_scope("conjugate_gradients"):
        result = conjugate_gradient(
            damped, descent, blocks, start=start, max_iterations=max_iterations, progress=progress
        )
    return _Solution(
        result.solution,
        result.iterations,
        result.products,
        jnp.any(result.negative_curvature),
        jnp.all(result.finite),
    )


def _solve_dual(
    factors: operators.GaussNewtonFactors,
    descent: chex.ArrayTree,
    damping: jax.Array,
    blocks: Blocks,
) -> _Solution:
    with jax.named_scope("dual_solve"):
        direction = operators.dual_solve(factors, descent, damping, blocks)
    finite = all_finite(direction)
    none = jnp.zeros((), jnp.int32)
    return _Solution(
        jax.tree.map(lambda d: jnp.where(finite, d, 0), direction),
        jnp.zeros(len(blocks), jnp.int32),
        none,
        jnp.zeros((), bool),
        finite,
    )


def _parabola(
    matrix: LinearOperator, point: Point, direction: chex.ArrayTree, weight_decay: chex.Numeric
) -> Parabola:
    """The full model without damping along the joint step."""
    curvature = vectors.inner(direction, matrix.damped(weight_decay)(direction))
    return Parabola(vectors.inner(point.gradient, direction), curvature)


def _single_rate(
    point: Point,
    rate: jax.Array,
    value_along: Callable[[chex.Numeric], jax.Array],
    evaluate: bool,
) -> SearchResult:
    """A rate that is taken as it is; or, if it is tried, unless it raises the objective."""
    if not evaluate:
        return SearchResult(rate, point.value, jnp.zeros((), jnp.int32), jnp.ones((), bool))
    value = value_along(rate)
    taken = value <= point.value
    return SearchResult(
        jnp.where(taken, rate, 0),
        jnp.where(taken, value, point.value),
        jnp.ones((), jnp.int32),
        taken,
    )


def _report(
    state: BlockHessianFreeState,
    engine: Engine,
    solution: _Solution,
    search: SearchResult,
    damping: jax.Array,
    ratio: jax.Array,
    predicted: jax.Array,
) -> BlockHessianFreeMetrics:
    old = state.metrics
    return BlockHessianFreeMetrics(
        damping=jnp.mean(damping),
        ratio=ratio,
        rate=search.rate,
        predicted=predicted,
        iterations=jnp.mean(solution.iterations.astype(damping.dtype)),
        products=solution.products,
        engine=jnp.asarray(get_args(Engine).index(engine), jnp.int32),
        evaluations=search.trials,
        rejections=old.rejections + ~search.accepted,
        negative_curvature=old.negative_curvature + solution.negative_curvature,
        nonfinite_products=old.nonfinite_products + ~solution.finite,
        nonfinite_steps=old.nonfinite_steps,
    )
