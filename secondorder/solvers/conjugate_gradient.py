r"""Preconditioned conjugate gradients on pytrees, for all blocks of a matrix in lockstep.

Where :math:`A` is block diagonal, :math:`A x = b` is one system per block. All are solved in
one loop: a product with :math:`A` is a product with each of its blocks, every block has its own
step lengths and its own end, and the iterates of a block that has ended do not move any more.

Nothing is compared with an absolute number: multiplying :math:`A` and :math:`b` by a constant
changes no iterate, as long as the inner products neither overflow nor underflow.

Besides its product an iteration passes over vectors of the size of the parameters twelve times:
each is read and written once, in place. Nothing is selected but where it is computed, a direction
is turned at the beginning of the iteration that uses it, and the model is known by numbers alone.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from secondorder.checks import check_static_count
from secondorder.solvers.progress import (
    has_stalled,
    init_model_ring,
    record_model,
    storage_row,
    stored_at,
    stored_iterations,
)
from secondorder.solvers.quadratic import positive_or_one
from secondorder.tree import Blocks, block_choose, block_inner, block_scale, is_function, write

Product = Callable[[chex.ArrayTree], chex.ArrayTree]


class CGResult(NamedTuple):
    r"""What conjugate gradients found for the ``L`` blocks of a system.

    Attributes:
      solution: The last iterate ``x``, a pytree like ``b``; always finite.
      residual: ``A x - b`` by the recursion, a pytree like ``b``; always finite.
      model: :math:`\phi_b = \tfrac12 x_b^\top A x_b - b_b^\top x_b` of each block (L,); never
        positive but for rounding.
      iterations: Steps that each block took (L,), int32.
      products: Products with the matrix, that of the start included, int32.
      negative_curvature: Blocks that ended at a direction with :math:`p^\top A p \le 0` (L,).
      finite: Blocks that met finite numbers only (L,); others ended at their last good iterate.
      converged: Blocks that ended by a stop rule, or with a residual of zero but for rounding (L,).
      direction: The last search direction ``p``, a pytree like ``b``. In a block of negative
        curvature it is the one with that curvature; it descends, or is zero if ``b`` is.
      stored: Iterates, a pytree of arrays (S, *shape), or None. The last one is that of the largest
        number in ``stored_at``; later rows are zero.
      stored_at: The numbers of their iterations (S,), int32, -1 where a row is empty; or None.
      stored_model: Their models (S, L), or None.
    """

    solution: chex.ArrayTree
    residual: chex.ArrayTree
    model: jax.Array
    iterations: jax.Array
    products: jax.Array
    negative_curvature: jax.Array
    finite: jax.Array
    converged: jax.Array
    direction: chex.ArrayTree
    stored: chex.ArrayTree | None
    stored_at: jax.Array | None
    stored_model: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _System:
    """What does not change from iteration to iteration.

    Attributes:
      product: ``A``.
      precondition: The inverse of the preconditioner.
      costly: Whether that is any function, and not to be computed twice; static.
      b: The right-hand side; zero in blocks where the given one is not finite.
      blocks: The partition, of ``L`` blocks.
      max_iterations: Bound on the iterations; static.
      min_iterations: No stop rule ends a block before.
      progress: Relative decrease of the model per iteration at which to stop, or None.
      smallest: Norms of the residual at which to stop (L,), or None.
      rounding: Squared norms that the preconditioner defines of a residual that is zero but for
        rounding (L,), positive.
    """

    product: Product
    precondition: Product
    costly: bool
    b: chex.ArrayTree
    blocks: Blocks
    max_iterations: int
    min_iterations: chex.Numeric
    progress: chex.Numeric | None
    smallest: jax.Array | None
    rounding: jax.Array


class _State(NamedTuple):
    """What changes.

    Attributes:
      trips: Iterations of the loop.
      solution: ``x``.
      residual: ``r = A x - b``.
      preconditioned: ``y``, if the preconditioner is a function; None: it is made anew where used.
      direction: ``p`` of the last iteration; before the first one ``-y``.
      turn: What of it the next direction keeps (L,).
      size: The squared norm of the residual that the preconditioner defines (L,), larger than its
        rounding where active.
      model: ``φ`` (L,).
      iterations: Steps taken (L,).
      active: Blocks that go on (L,).
      negative_curvature, finite, converged: As in `CGResult`.
      ring: Recent values of the model (R, L), or None.
      stored: Iterates, a stack of S, with their models (S, L), or None.
    """

    trips: jax.Array
    solution: chex.ArrayTree
    residual: chex.ArrayTree
    preconditioned: chex.ArrayTree | None
    direction: chex.ArrayTree
    turn: jax.Array
    size: jax.Array
    model: jax.Array
    iterations: jax.Array
    active: jax.Array
    negative_curvature: jax.Array
    finite: jax.Array
    converged: jax.Array
    ring: jax.Array | None
    stored: tuple[chex.ArrayTree, jax.Array] | None


def conjugate_gradient(
    product: Product,
    b: chex.ArrayTree,
    blocks: Blocks,
    *,
    start: chex.ArrayTree | None = None,
    preconditioner: chex.ArrayTree | Product | None = None,
    max_iterations: int,
    min_iterations: chex.Numeric = 1,
    progress: chex.Numeric | None = 5e-4,
    residual: chex.Numeric | None = None,
    store: bool = False,
) -> CGResult:
    r"""Solves :math:`A x = b` by preconditioned conjugate gradients, all blocks in one loop.

    From :math:`r = A x - b`, :math:`y = M^{-1} r` and :math:`p = -y` each block iterates

    .. math::
      x_+ = x + \frac{r^\top y}{p^\top A p}\, p, \qquad
      r_+ = r + \frac{r^\top y}{p^\top A p}\, A p, \qquad
      p_+ = -y_+ + \frac{r_+^\top y_+}{r^\top y}\, p

    and knows :math:`\phi = \tfrac12 x^\top A x - b^\top x` without another product,

    .. math:: \phi_+ = \phi - \tfrac12 \frac{(r^\top y)^2}{p^\top A p}

    which holds wherever a step ends at the minimum of its line; that directions lose their
    conjugacy to rounding does not matter. A block ends

    * by `has_stalled`, Martens' rule on the decrease of :math:`\phi`;
    * where :math:`\|r\| \le \mathrm{residual} \cdot \|b\|`;
    * where, in the norm of :math:`M^{-1}`, the residual is smaller than the rounding of ``b``: the
      recursion goes on to zero, but :math:`A x - b` does not follow it;
    * where :math:`p^\top A p \le 0`, before the step;
    * where a number is not finite: before the step, if it is one of the product; after it, if one
      of the preconditioner's. Numbers of the results that overflow are set to zero.

    A start :math:`x_0` is shortened in each block to :math:`t x_0`, with :math:`t` the minimizer of
    :math:`\phi(t x_0)` in [0, 1]: one from another batch cannot be worse than none.

    Args:
      product: Maps ``v`` to ``A v``; both are pytrees like ``b``. Symmetric, and block diagonal if
        there are several blocks.
      b: The right-hand side, such as the negative gradient; a pytree of arrays, float32 or wider.
      blocks: The partition of its leaves into ``L`` blocks; `one_block` for ordinary conjugate
        gradients.
      start: Where to start from, a pytree like ``b``, at the cost of one product; None: at zero.
      preconditioner: A positive diagonal ``M``, a pytree like ``b``, or a function from ``r`` to
        :math:`M^{-1} r` that is linear, symmetric, positive definite and block diagonal, or None.
      max_iterations: Bound on the iterations, at least 1; static.
      min_iterations: Stop rules hold from this iteration on; with 0 a start may be good enough.
      progress: Relative decrease per iteration :math:`\epsilon` of Martens' rule; None: no such
        rule. It takes more than ten iterations.
      residual: Relative residual at which to stop, a scalar or one per block (L,); None: no such
        rule.
      store: Whether to keep the iterates of `stored_iterations`; static. Takes the memory of as
        many vectors.

    Returns:
      The solution, and how it was found.

    Raises:
      ValueError: If ``max_iterations`` is not an integer of at least 1.

    Example:
      >>> from secondorder.tree import one_block
      >>> b = {"a": jnp.array([2.0]), "b": jnp.array([3.0, 4.0])}
      >>> result = conjugate_gradient(
      ...     lambda v: {"a": 2 * v["a"], "b": 4 * v["b"]}, b, one_block(b), max_iterations=99
      ... )
      >>> jax.tree.map(lambda x: x.round(4).tolist(), result.solution)
      {'a': [1.0], 'b': [0.75, 1.0]}
      >>> result.converged.tolist()
      [True]

    Source: Martens (2010), Deep learning via Hessian-free optimization, section 4; Hestenes,
    Stiefel (1952), Methods of conjugate gradients; its model: Strakoš, Tichý (2002), On error
    estimation in the conjugate gradient method. Blocks in parallel: Zhang, Xiong, Bradbury, Socher
    (2017), Block-diagonal Hessian-free optimization.
    """
    check_static_count("max_iterations", max_iterations)
    squares = block_inner(blocks, b, b)
    finite = jnp.isfinite(squares)
    b = block_choose(blocks, finite, b, jax.tree.map(jnp.zeros_like, b))
    precondition = _as_inverse(preconditioner)
    system = _System(
        product=product,
        precondition=precondition,
        costly=is_function(preconditioner),
        b=b,
        blocks=blocks,
        max_iterations=max_iterations,
        min_iterations=min_iterations,
        progress=progress,
        smallest=None if residual is None else residual * jnp.sqrt(jnp.where(finite, squares, 0)),
        rounding=_rounding(block_inner(blocks, b, precondition(b))),
    )
    last: _State = jax.lax.while_loop(
        lambda state: jnp.any(state.active) & (state.trips < max_iterations),
        lambda state: _iterate(system, state),
        _init_state(system, start, finite, store=store),
    )
    return _as_result(last, started=start is not None, max_iterations=max_iterations)


def predicted_decrease(result: CGResult, blocks: Blocks, damping: chex.Numeric = 0.0) -> jax.Array:
    r"""The decrease that the model without damping promises for the solution of a damped system.

    With :math:`A = B + \lambda I` and :math:`b = -g` it is, without another product,

    .. math:: -(g^\top x + \tfrac12 x^\top B x) = -\phi(x) + \tfrac12 \lambda \|x\|^2

    in each block. More than :math:`-\phi(x)`, it asks more of a step before the damping is relaxed.

    Args:
      result: What `conjugate_gradient` found.
      blocks: The partition, of ``L`` blocks.
      damping: The number :math:`\lambda`, a scalar or one per block (L,).

    Returns:
      Array (L,).

    Example:
      >>> from secondorder.tree import one_block
      >>> b = jnp.array([3.0])
      >>> result = conjugate_gradient(lambda v: 2 * v + v, b, one_block(b), max_iterations=2)
      >>> predicted_decrease(result, one_block(b), damping=1.0).tolist()  # g = -3, B = 2, x = 1
      [2.0]

    Source: Martens (2010), section 4.1, where the ratio has the undamped model below the line.
    """
    squares = block_inner(blocks, result.solution, result.solution)
    return damping * squares / 2 - result.model


def _init_state(
    system: _System, start: chex.ArrayTree | None, finite: jax.Array, *, store: bool
) -> _State:
    """The state before the first iteration; ``finite`` says which blocks of ``b`` are."""
    solution, image = _shortened_start(system, start)
    residual = jax.tree.map(jnp.subtract, image, system.b)
    preconditioned = system.precondition(residual)
    size = block_inner(system.blocks, residual, preconditioned)
    # A preconditioner may fail here as well as later.
    finite = finite & jnp.isfinite(size)
    zeros = jax.tree.map(jnp.zeros_like, residual)
    model = _model(system, solution, residual)
    iterations = jnp.zeros_like(model, jnp.int32)
    small = _is_small(system, jnp.int32(0), residual)
    ended = finite & (small | (jnp.abs(size) <= system.rounding))
    return _State(
        trips=jnp.zeros((), jnp.int32),
        solution=solution,
        residual=residual,
        preconditioned=preconditioned if system.costly else None,
        direction=block_choose(
            system.blocks, finite, jax.tree.map(jnp.negative, preconditioned), zeros
        ),
        turn=jnp.zeros_like(size),
        size=jnp.where(finite, size, 0),
        model=model,
        iterations=iterations,
        active=finite & (size > system.rounding) & ~ended,
        negative_curvature=jnp.zeros_like(finite),
        finite=finite,
        converged=ended,
        ring=None if system.progress is None else init_model_ring(model, system.max_iterations),
        stored=_init_storage((solution, model), system.max_iterations) if store else None,
    )


def _iterate(system: _System, state: _State) -> _State:
    """One iteration of every active block; others stay where they are."""
    blocks, trips = system.blocks, state.trips + 1
    known = state.preconditioned
    opposite = system.precondition(state.residual) if known is None else known
    direction = _turned(blocks, opposite, state.active, state.turn, state.direction)
    image = system.product(direction)
    # Not finite if one element of the product is not, even if that of the direction is zero.
    curvature = block_inner(blocks, direction, image)
    downhill = jnp.isfinite(curvature) & _is_positive(curvature)
    length = jnp.where(downhill, state.size / positive_or_one(curvature), 0)
    model = state.model - length * state.size / 2
    moved = state.active & downhill & jnp.isfinite(model)
    solution = _moved(blocks, state.solution, moved, length, direction)
    residual = _moved(blocks, state.residual, moved, length, image)
    preconditioned = system.precondition(residual)
    size = block_inner(blocks, residual, preconditioned)

    finite = jnp.isfinite(curvature) & jnp.isfinite(size) & jnp.isfinite(model)
    stop = _is_small(system, trips, residual) | _is_stalled(system, state.ring, trips, model)
    ended = moved & finite & (stop | (jnp.abs(size) <= system.rounding))
    model = jnp.where(moved, model, state.model)
    iterations = state.iterations + moved
    return _State(
        trips=trips,
        solution=solution,
        residual=residual,
        preconditioned=None if state.preconditioned is None else preconditioned,
        direction=direction,
        turn=size / positive_or_one(state.size),
        size=jnp.where(jnp.isfinite(size), size, 0),
        model=model,
        iterations=iterations,
        # A preconditioner that is not positive definite ends a block too.
        active=moved & finite & ~ended & (size > system.rounding),
        negative_curvature=state.negative_curvature | (state.active & finite & ~downhill),
        finite=state.finite & (finite | ~state.active),
        converged=state.converged | ended,
        ring=None if state.ring is None else record_model(state.ring, trips, model),
        stored=_store(state.stored, iterations, (solution, model), system.max_iterations),
    )


def _as_result(last: _State, *, started: bool, max_iterations: int) -> CGResult:
    """What of the last state is of use to others."""
    iterates, models = (None, None) if last.stored is None else last.stored
    numbers = None
    if last.stored is not None:
        numbers = stored_at(jnp.max(last.iterations), max_iterations)
    return CGResult(
        solution=_without_overflow(last.solution),
        residual=_without_overflow(last.residual),
        model=last.model,
        iterations=last.iterations,
        products=last.trips + int(started),
        negative_curvature=last.negative_curvature,
        finite=last.finite,
        converged=last.converged,
        direction=last.direction,
        stored=iterates,
        stored_at=numbers,
        stored_model=models,
    )


def _without_overflow(vector: chex.ArrayTree) -> chex.ArrayTree:
    """A vector whose elements that are not finite are zero."""
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)), vector)


def _as_inverse(preconditioner: chex.ArrayTree | Product | None) -> Product:
    """The inverse of a preconditioner, as a function."""
    if preconditioner is None:
        return lambda residual: residual
    if is_function(preconditioner):
        inverse: Product = preconditioner
        return inverse
    return lambda residual: jax.tree.map(
        lambda r, m: (r / m).astype(r.dtype), residual, preconditioner
    )


def _shortened_start(
    system: _System, start: chex.ArrayTree | None
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    r"""Returns :math:`t x_0` and :math:`t A x_0`, with :math:`t` in [0, 1] best for each block."""
    zeros = jax.tree.map(jnp.zeros_like, system.b)
    if start is None:
        return zeros, zeros
    blocks = system.blocks
    start = jax.tree.map(lambda x, like: x.astype(like.dtype), start, system.b)
    start = block_choose(blocks, jnp.isfinite(block_inner(blocks, start, start)), start, zeros)
    image, curvature = _curvature_along(system, start)
    slope = block_inner(blocks, system.b, start)
    usable = jnp.isfinite(curvature) & jnp.isfinite(slope) & _is_positive(curvature)
    best = jnp.clip(slope / positive_or_one(curvature), 0, 1)
    share = jnp.where(usable, best, 0)
    return block_scale(blocks, share, start), block_scale(blocks, share, image)


def _curvature_along(
    system: _System, direction: chex.ArrayTree
) -> tuple[chex.ArrayTree, jax.Array]:
    """Returns ``A p``, zero in blocks where it is not finite, and ``pᵀ A p`` as it is (L,)."""
    image = system.product(direction)
    # Not finite if one element of the product is not, even if that of the direction is zero.
    curvature = block_inner(system.blocks, direction, image)
    zeros = jax.tree.map(jnp.zeros_like, direction)
    return block_choose(system.blocks, jnp.isfinite(curvature), image, zeros), curvature


def _model(system: _System, solution: chex.ArrayTree, residual: chex.ArrayTree) -> jax.Array:
    r"""The values :math:`\tfrac12 x^\top (r - b) = \tfrac12 x^\top A x - b^\top x` (L,)."""
    difference = jax.tree.map(jnp.subtract, residual, system.b)
    return block_inner(system.blocks, solution, difference) / 2


def _is_positive(x: jax.Array) -> jax.Array:
    """Whether a number is positive, and large enough to divide by."""
    return x >= float(np.finfo(x.dtype).tiny)


def _rounding(squares: jax.Array) -> jax.Array:
    """What is zero but for rounding compared with these squared norms (L,), positive."""
    limits = np.finfo(squares.dtype)
    return jnp.maximum(float(limits.eps) ** 2 * squares, float(limits.tiny))


def _is_small(system: _System, iteration: jax.Array, residual: chex.ArrayTree) -> jax.Array:
    """Whether the residual is as small as asked for, booleans (L,) or a scalar."""
    if system.smallest is None:
        return jnp.zeros((), bool)
    norm = jnp.sqrt(block_inner(system.blocks, residual, residual))
    return (iteration >= system.min_iterations) & (norm <= system.smallest)


def _is_stalled(
    system: _System, ring: jax.Array | None, iteration: jax.Array, model: jax.Array
) -> jax.Array:
    """Whether Martens' rule holds, booleans (L,) or a scalar."""
    if ring is None or system.progress is None:
        return jnp.zeros((), bool)
    stalled = has_stalled(ring, iteration, model, system.progress)
    return (iteration >= system.min_iterations) & stalled


def _init_storage(
    iterate: tuple[chex.ArrayTree, jax.Array], max_iterations: int
) -> tuple[chex.ArrayTree, jax.Array]:
    """Room for the iterates to keep and their models, with the start in the first row."""
    size = len(stored_iterations(max_iterations)) + 1
    stack = jax.tree.map(lambda x: jax.lax.broadcast(jnp.zeros_like(x), (size,)), iterate)
    return write(stack, jnp.int32(0), iterate)


def _store(
    stored: tuple[chex.ArrayTree, jax.Array] | None,
    iterations: jax.Array,
    iterate: tuple[chex.ArrayTree, jax.Array],
    max_iterations: int,
) -> tuple[chex.ArrayTree, jax.Array] | None:
    """Writes the present iterate and its model where they belong."""
    if stored is None:
        return None
    return write(stored, storage_row(jnp.max(iterations), max_iterations), iterate)


def _turned(
    blocks: Blocks, y: chex.ArrayTree, active: jax.Array, turn: jax.Array, p: chex.ArrayTree
) -> chex.ArrayTree:
    """The next direction in active blocks, the last one in others."""
    return block_choose(
        blocks, active, jax.tree.map(jnp.subtract, block_scale(blocks, turn, p), y), p
    )


def _moved(
    blocks: Blocks, x: chex.ArrayTree, moved: jax.Array, length: jax.Array, y: chex.ArrayTree
) -> chex.ArrayTree:
    """Adds a multiple of ``y`` in the blocks that move, whatever it is in others."""
    scaled = block_scale(blocks, length, y)
    return block_choose(blocks, moved, jax.tree.map(jnp.add, x, scaled), x)
