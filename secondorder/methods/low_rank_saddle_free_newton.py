r"""Low-rank saddle-free Newton: absolute values of the Hessian's largest eigenvalues.

A Newton step is attracted by saddle points, as it divides by negative eigenvalues too. Dividing by
their magnitudes makes it leave. The few eigenvalues of a network's Hessian that are large are
found by products with a few vectors at once; the others are taken for one number, the damping.

References:
  O'Leary-Roseberry, Alger, Ghattas (2020), Low rank saddle free Newton: a scalable method for
  stochastic nonconvex optimization, arXiv 2002.02881 ("the paper").
  Dauphin, Pascanu, Gulcehre, Cho, Ganguli, Bengio (2014), Identifying and attacking the saddle
  point problem in high-dimensional non-convex optimization, NeurIPS, arXiv 1406.2572.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import tree as vectors
from secondorder.checks import is_zero
from secondorder.methods.layerwise import with_settings_of
from secondorder.methods.low_rank_model import (
    Direction,
    find_eigenpairs,
    lower_end,
    precondition,
    tied_damping,
    way_out,
)
from secondorder.methods.low_rank_settings import (
    EigenSettings,
    Eigensolver,
    Spectrum,
    StepSettings,
    check_rank,
    check_settings,
)
from secondorder.methods.terminal import curvature_objective, keep_unless, zero_metrics
from secondorder.methods.transform import make_transform
from secondorder.methods.weight_decay import WeightDecayForm, with_weight_decay
from secondorder.objective import Microbatches, all_finite, check_has_arrays, check_params
from secondorder.operators.hessian import HessianMode
from secondorder.sharding import replicated_zeros, shard_like
from secondorder.solvers import Eigenpairs, Solution

_NAME = "scale_by_low_rank_saddle_free_newton"
_REALS = ("damping", "largest_eigenvalue", "smallest_eigenvalue", "step_norm")
_LEAST_SAMPLES = 4  # of a Rayleigh quotient, for its standard deviation to mean something


class LowRankSaddleFreeNewtonMetrics(NamedTuple):
    """What `scale_by_low_rank_saddle_free_newton` reports, all scalars.

    Attributes:
      damping: Of the last step.
      largest_eigenvalue: The largest that is kept, 0 if none is.
      smallest_eigenvalue: The smallest, negative if the Hessian is indefinite.
      step_norm: Length of the last direction, after it was clipped.
      rank: Eigenpairs that are kept, int32.
      products: Products with the Hessian at the last step, int32.
      evaluations: Values of the objective at the last step, for a way out of a saddle, int32.
      clipped: Steps that were shortened since `init`, int32.
      escapes: Steps along negative curvature instead since `init`, int32.
      nonfinite_products: Batches with a product that was not finite; they changed nothing else.
      nonfinite_steps: Others whose value or gradient was not finite, likewise.
    """

    damping: jax.Array
    largest_eigenvalue: jax.Array
    smallest_eigenvalue: jax.Array
    step_norm: jax.Array
    rank: jax.Array
    products: jax.Array
    evaluations: jax.Array
    clipped: jax.Array
    escapes: jax.Array
    nonfinite_products: jax.Array
    nonfinite_steps: jax.Array


class ScaleByLowRankSaddleFreeNewtonState(NamedTuple):
    """State of `scale_by_low_rank_saddle_free_newton`.

    Attributes:
      count: Steps taken, int32.
      key: Data of a PRNG key, uint32; give each of several seeds its own.
      basis: With a warm start the basis for the next products, a stack; else None.
      pairs: The eigenpairs between refreshes; None where there is one at every step.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    key: jax.Array
    basis: chex.ArrayTree | None
    pairs: Eigenpairs | None
    metrics: LowRankSaddleFreeNewtonMetrics


def scale_by_low_rank_saddle_free_newton(
    rank: int = 20,
    *,
    oversampling: int = 0,
    eigensolver: Eigensolver = "subspace_iteration",
    warm_start: bool = True,
    passes: int = 1,
    initial_passes: int = 4,
    refresh_every: int = 5,
    damping: chex.Numeric = 1e-3,
    damping_share: chex.Numeric = 1.0,
    spectrum: Spectrum = "absolute",
    max_norm: chex.Numeric | None = 1.0,
    escape_length: chex.Numeric = 1e-2,
    signal_to_noise: chex.Numeric | None = None,
    tolerance: chex.Numeric = 0.1,
    block_size: int = 10,
    mode: HessianMode = "forward_over_reverse",
    chunk_size: int | None = 4,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions gradients by the magnitudes of the Hessian's largest eigenvalues.

    With the ``r`` eigenpairs :math:`(\lambda_i, u_i)` of largest magnitude,

    .. math::
      d = \big(U |\Lambda| U^\top + \gamma I\big)^{-1} g
        = \tfrac{1}{\gamma}\Big[g - U\, \mathrm{diag}\Big(\frac{|\lambda_i|}{|\lambda_i| +
          \gamma}\Big)\, U^\top g\Big], \qquad
      \gamma = \max(\gamma_0, c \min_i |\lambda_i|).

    Outside of the span of the eigenvectors it is the gradient over :math:`\gamma`. A direction in
    which the true curvature :math:`L` is not among them is stable only with a learning rate below
    :math:`2 \gamma / L`, which is why :math:`\gamma` follows the smallest eigenvalue that is, and
    why the direction is clipped.

    By default the eigenpairs come from subspace iteration with the basis of the refresh before: a
    refresh costs ``r`` products. Where the Hessian is a mean over `Microbatches`,
    ``signal_to_noise=1`` drops eigenpairs that the pieces do not agree on; of a small batch many
    negative eigenvalues are such noise.

    Near a saddle point the gradient is small, and with it the step along negative curvature. Where
    a step of length :math:`\ell` along it would gain more in the model, it is tried, in both
    directions, and taken if the objective falls.

    Args:
      rank: ``r``, at most the number of parameters. Static.
      oversampling: Further vectors that the eigensolver works with, at least 0. Static.
      eigensolver: ``"subspace_iteration"``; ``"block_krylov"``, which keeps all its passes and
        needs the memory; ``"single_pass"``, one product with each vector even from a random start,
        which wants as much oversampling as rank; or ``"adaptive"``, which draws blocks of random
        vectors, at most ``rank``, until they hold most of a product with one more. Static.
      warm_start: Whether to start from the last basis, which is kept in the state, or from a random
        one. Not for ``"adaptive"``, which never does. Static.
      passes: Products with each vector at a refresh; 2 from a random start make the usual
        randomized eigensolver. Static.
      initial_passes: The same at the first refresh with a warm start. Static.
      refresh_every: Steps from one refresh of the eigenpairs to the next. Static.
      damping: :math:`\gamma_0`, above 0. The extra argument ``damping`` of ``update`` replaces it,
        as `scale_by_quadratic_model` does.
      damping_share: ``c``, at least 0; with 0 the damping is fixed.
      spectrum: What is taken for curvatures: ``"absolute"``, :math:`|\lambda_i|`; ``"shifted"``,
        :math:`\lambda_i` with the damping raised by the magnitude of the lowest, as in
        Levenberg-Marquardt; or any function from eigenvalues ``(r,)`` to curvatures of at least 0,
        possibly infinite. Static.
      max_norm: Largest length of the direction, above 0, or None.
      escape_length: :math:`\ell \ge 0`; with 0 it is never tried.
      signal_to_noise: Least ratio of mean to standard deviation of an eigenpair's Rayleigh
        quotients over the pieces of the curvature batch, or None.
      tolerance: What may be left of a product with a random vector, in (0, 1); adaptive only.
      block_size: Vectors in a block; adaptive only. Static.
      mode: How the Hessian is multiplied with; see `operators.hessian`. Static.
      chunk_size: How many vectors are multiplied at a time, or None for all, which takes the memory
        of that many gradients. Best a divisor of their number. Static.
      seed: Of the random vectors.

    Returns:
      A transform whose ``update`` needs ``params`` and ``value_fn``, any callable.
      ``curvature_fn``, an objective on another batch, gives the Hessian; it must be `Microbatches`
      of at least four pieces for ``signal_to_noise``. Batches with a value, a gradient or a product
      that is not finite give a zero update and change only a counter.

    Raises:
      ValueError: For hyperparameters out of range; in ``init`` and ``update`` for a rank above the
        number of parameters.
      TypeError: In ``update``, if ``signal_to_noise`` has no pieces to judge by.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> saddle = lambda p: p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4
      >>> direction = so.scale_by_low_rank_saddle_free_newton(2, refresh_every=1)
      >>> tx = optax.chain(direction, optax.scale(-1.0))
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(saddle)(params)
      ...     updates, state = tx.update(grads, state, params, value_fn=saddle)
      ...     return optax.apply_updates(params, updates), state
      >>> params = jnp.array([1.0, 1e-6])
      >>> state = tx.init(params)
      >>> for _ in range(40):
      ...     params, state = step(params, state)
      >>> round(float(saddle(params)), 4)
      -1.0

    References:
      O'Leary-Roseberry, Alger, Ghattas (2020), arXiv 2002.02881.
    """
    eigen = EigenSettings(
        rank, oversampling, eigensolver, warm_start, passes, initial_passes, tolerance, block_size,
        signal_to_noise, mode, chunk_size,
    )  # fmt: skip
    settings = StepSettings(
        refresh_every, damping, damping_share, spectrum, max_norm, escape_length
    )
    check_settings(eigen, settings)
    keeps_basis = warm_start and eigensolver != "adaptive"

    def init(params: chex.ArrayTree) -> ScaleByLowRankSaddleFreeNewtonState:
        check_params(params, _NAME)
        check_rank(_NAME, rank, params)
        dtype = vectors.accumulation_dtype(params)
        pairs = Eigenpairs(
            jnp.zeros((rank,), dtype),
            vectors.zeros_stack(params, rank, dtype),
            jnp.zeros((rank,), bool),
        )
        return ScaleByLowRankSaddleFreeNewtonState(
            count=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(jax.random.key(seed)),
            basis=vectors.zeros_stack(params, eigen.columns(params), dtype)
            if keeps_basis
            else None,
            pairs=pairs if refresh_every > 1 else None,
            metrics=zero_metrics(LowRankSaddleFreeNewtonMetrics, dtype, _REALS),
        )

    def update(
        updates: chex.ArrayTree,
        state: ScaleByLowRankSaddleFreeNewtonState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        curvature_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByLowRankSaddleFreeNewtonState]:
        check_has_arrays(params, _NAME)
        check_rank(_NAME, rank, params)
        objective = _curvature_objective(eigen, value_fn, curvature_fn)

        # 1. The gradient; zero if the batch is not finite.
        usable = all_finite((updates, value))
        dtype = vectors.accumulation_dtype(params)
        gradient = jax.tree.map(
            lambda g, p: shard_like(jnp.where(usable, g, 0).astype(dtype), p), updates, params
        )

        # 2. The eigenpairs of largest magnitude, or those of the last refresh.
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
        with jax.named_scope("eigenpairs"):
            solution = _refresh(eigen, settings, objective, params, key, state)
        usable_products = solution.finite

        # 3. The preconditioned gradient, or a way out of a saddle point.
        pairs = solution.pairs
        gamma = tied_damping(pairs, extra_args.get("damping", damping), damping_share)
        direction = precondition(pairs, gradient, gamma, spectrum, max_norm)
        vector, escaped, evaluations = _escape(
            settings, value_fn, params, pairs, gradient, direction, key
        )

        # 4. Nothing but a counter, if a number was not finite.
        moves = usable & usable_products
        step = jax.tree.map(
            lambda v, p: shard_like(jnp.where(moves, v, 0).astype(p.dtype), p), vector, params
        )
        new = ScaleByLowRankSaddleFreeNewtonState(
            count=optax.safe_increment(state.count),
            key=state.key,
            basis=solution.basis if keeps_basis else None,
            pairs=pairs if refresh_every > 1 else None,
            metrics=_report(state.metrics, solution, direction, vector, escaped, evaluations),
        )
        return step, _keep(usable, usable_products, new, state)

    return make_transform("scale_by_low_rank_saddle_free_newton", init, update)


def _refresh(
    eigen: EigenSettings,
    settings: StepSettings,
    objective: Any,
    params: chex.ArrayTree,
    key: jax.Array,
    state: ScaleByLowRankSaddleFreeNewtonState,
) -> Solution:
    """New eigenpairs at every so many steps; the Hessian is linearized only then."""

    def find(basis: chex.ArrayTree | None) -> Solution:
        found = find_eigenpairs(eigen, objective, params, key, basis, state.count == 0)
        return found._replace(basis=None) if basis is None else found

    known = state.pairs
    if known is None:
        return find(state.basis)

    def keep(basis: chex.ArrayTree | None) -> Solution:
        none = replicated_zeros((), jnp.int32)
        return Solution(known, basis, none, none == 0)

    is_due = state.count % settings.refresh_every == 0
    return jax.lax.cond(is_due, find, keep, state.basis)


def _escape(
    settings: StepSettings,
    value_fn: Any,
    params: chex.ArrayTree,
    pairs: Eigenpairs,
    gradient: chex.ArrayTree,
    direction: Direction,
    key: jax.Array,
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """The direction or a step along negative curvature, which of the two, and what it evaluated."""
    no, zero = jnp.zeros((), bool), jnp.zeros((), jnp.int32)
    if is_zero(settings.escape_length):
        return direction.vector, no, zero
    step, gain = way_out(pairs, gradient, key, settings.escape_length)
    is_tried = gain > direction.decrease
    sign, is_lower = jax.lax.cond(
        is_tried,
        lambda: lower_end(value_fn, params, step),
        lambda: (zero, no),
    )
    vector = jax.tree.map(
        lambda d, s: jnp.where(is_lower, sign * s, d).astype(d.dtype), direction.vector, step
    )
    return vector, is_lower, jnp.where(is_tried, 3, 0).astype(jnp.int32)


def _keep(usable: jax.Array, usable_products: jax.Array, new: Any, old: Any) -> Any:
    """The new state, or the old one with one more batch counted."""
    metrics = old.metrics
    counted = metrics._replace(nonfinite_products=metrics.nonfinite_products + 1)
    skipped = old._replace(metrics=counted)
    after = jax.tree.map(
        lambda n, o: jnp.where(usable_products, n.astype(o.dtype), o), new, skipped
    )
    return keep_unless(usable, after, old)


def _report(
    old: LowRankSaddleFreeNewtonMetrics,
    solution: Solution,
    direction: Direction,
    vector: chex.ArrayTree,
    escaped: jax.Array,
    evaluations: jax.Array,
) -> LowRankSaddleFreeNewtonMetrics:
    return LowRankSaddleFreeNewtonMetrics(
        damping=direction.damping,
        largest_eigenvalue=_extreme(jnp.max, solution.pairs, -jnp.inf),
        smallest_eigenvalue=_extreme(jnp.min, solution.pairs, jnp.inf),
        step_norm=jnp.sqrt(vectors.inner(vector, vector)),
        rank=jnp.sum(solution.pairs.kept, dtype=jnp.int32),
        products=solution.products,
        evaluations=evaluations,
        clipped=old.clipped + (direction.clipped & ~escaped),
        escapes=old.escapes + escaped,
        nonfinite_products=old.nonfinite_products,
        nonfinite_steps=old.nonfinite_steps,
    )


def _extreme(
    choose: Callable[[jax.Array], jax.Array], pairs: Eigenpairs, otherwise: float
) -> jax.Array:
    """The largest or smallest of the eigenvalues that are kept, 0 if none is."""
    found = choose(jnp.where(pairs.kept, pairs.values, otherwise))
    return jnp.where(jnp.any(pairs.kept), found, 0)


def _curvature_objective(eigen: EigenSettings, value_fn: Any, curvature_fn: Any) -> Any:
    """The objective of the curvature batch, with as many pieces as its settings need."""
    objective = curvature_objective(_NAME, value_fn, curvature_fn, splits=False)
    if eigen.signal_to_noise is None:
        return objective
    if not isinstance(objective, Microbatches) or objective.pieces < _LEAST_SAMPLES:
        raise TypeError(
            f"{_NAME}: `signal_to_noise` compares at least {_LEAST_SAMPLES} pieces of the "
            "curvature batch; pass curvature_fn=Microbatches.split(objective_on, batch, size)."
        )
    return objective


@with_settings_of(scale_by_low_rank_saddle_free_newton)
def low_rank_saddle_free_newton(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 20,
    *,
    weight_decay: chex.Numeric = 0.0,
    weight_decay_form: WeightDecayForm = "l2",
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-rank saddle-free Newton (LRSFN).

    .. math:: \theta_{k+1} = \theta_k - \eta\, \big(U |\Lambda| U^\top + \gamma I\big)^{-1} g

    see `scale_by_low_rank_saddle_free_newton` for the eigenpairs, the damping, and all
    hyperparameters that are not listed here. The paper's settings are, with batches of 32 and
    curvature batches of 8::

        so.low_rank_saddle_free_newton(1e-5, 40, damping=1e-3, damping_share=0.0, max_norm=None,
                                       warm_start=False, passes=2, refresh_every=1,
                                       escape_length=0.0)

    At these, ``learning_rate / damping`` is the rate of gradient descent in all directions but 40.

    Args:
      learning_rate: Step size :math:`\eta`, or a schedule of it.
      rank: How many eigenpairs, at most the number of parameters. Static.
      weight_decay: Coefficient :math:`\tau \ge 0` of the decay.
      weight_decay_form: ``"l2"`` adds :math:`\tau\theta` to the gradient before it is
        preconditioned, the gradient of :math:`\tau|\theta|^2/2`, which the Hessian leaves out;
        ``"decoupled"`` adds it to the direction.
      **settings: Hyperparameters of `scale_by_low_rank_saddle_free_newton`.

    Returns:
      The optimizer. Its ``update`` needs ``params`` and ``value_fn``.

    Raises:
      ValueError: For hyperparameters out of range, and for a rank above the number of parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x = jax.random.normal(jax.random.key(0), (64, 5))
      >>> objective = lambda w: jnp.mean((jnp.tanh(x @ w) - jnp.tanh(x[:, 0])) ** 2)
      >>> params, tx = jnp.zeros(5), so.low_rank_saddle_free_newton(0.5, 3)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     value, grads = jax.value_and_grad(objective)(params)
      ...     updates, state = tx.update(
      ...         grads, state, params, value=value, grad=grads, value_fn=objective)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(30):
      ...     params, state = step(params, state)
      >>> float(objective(params)) < 1e-4
      True

    References:
      O'Leary-Roseberry, Alger, Ghattas (2020), arXiv 2002.02881.
    """
    direction = scale_by_low_rank_saddle_free_newton(rank, **settings)
    links = with_weight_decay((direction,), weight_decay, weight_decay_form)
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate))
