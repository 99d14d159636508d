r"""Krylov subspace descent: the objective itself is minimized over a small Krylov space.

Hessian-free methods minimize a quadratic model over such a space. Here a few products make a basis
of it, which includes the last step, and BFGS then minimizes the objective over the coefficients:
the model only says what the basis is, and how to scale it. There is no damping to be found, and a
matrix that is indefinite does no harm. The step has been tried when it is returned: the method is
*terminal*, as optax's line searches are.

References:
  Vinyals, Povey (2012), Krylov subspace descent for deep learning, AISTATS, arXiv 1111.4259 ("the
  paper").
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from secondorder import tree as vectors
from secondorder.checks import check_choice, check_range, check_static_count
from secondorder.factors import Pair, inverse_bfgs_update
from secondorder.methods.hessian_free_model import (
    PreconditionerKind,
    curvature_operator,
    estimate_diagonal,
)
from secondorder.methods.terminal import (
    Point,
    curvature_objective,
    keep_unless,
    look,
    scaled_step,
    zero_metrics,
)
from secondorder.methods.transform import make_transform
from secondorder.objective import check_params
from secondorder.products import inner, matmul
from secondorder.sharding import replicate
from secondorder.solvers import KrylovBasis, krylov_basis, whitening

SubspaceCurvature: TypeAlias = Literal["gauss_newton", "hessian"]

_SMALLEST_FACTOR = 0.05  # from one rate to the next


class _Settings(NamedTuple):
    """The hyperparameters; see `krylov_subspace_descent`."""

    subspace_size: int
    curvature: SubspaceCurvature
    preconditioner: PreconditionerKind | None
    preconditioner_power: chex.Numeric
    preconditioner_floor: chex.Numeric
    preconditioner_probes: int
    eigenvalue_floor: chex.Numeric
    max_evaluations: int
    sufficient: chex.Numeric
    shrink: chex.Numeric
    weight_decay: chex.Numeric
    seed: int


class _Subspace(NamedTuple):
    """Coordinates in which the curvature is the identity.

    Attributes:
      basis: An orthonormal basis, and the curvature restricted to it.
      transform: From the coordinates to coefficients of the basis, array ``(k, k)``.
      eigenvalues: Of the restricted curvature, ascending ``(k,)``.
    """

    basis: KrylovBasis
    transform: jax.Array
    eigenvalues: jax.Array

    def vector(self, coordinates: jax.Array) -> chex.ArrayTree:
        """The vector of some coordinates ``(k,)``, like the parameters."""
        return vectors.combine(matmul(self.transform, coordinates), self.basis.vectors)

    def coordinates(self, gradient: chex.ArrayTree) -> jax.Array:
        """The gradient with respect to the coordinates ``(k,)``."""
        columns = replicate(vectors.project(self.basis.vectors, [gradient]))
        return matmul(self.transform.T, columns[:, 0])


class _Search(NamedTuple):
    """BFGS in the coordinates of a subspace.

    Attributes:
      place: The best coordinates so far ``(k,)``.
      value: Of the objective there.
      gradient: With respect to the coordinates, there ``(k,)``.
      inverse: Approximates the inverse Hessian ``(k, k)``.
      rate: The next to be tried along the direction of BFGS.
      evaluations: Of value and gradient so far, int32.
      iterations: Of BFGS so far, int32.
    """

    place: jax.Array
    value: jax.Array
    gradient: jax.Array
    inverse: jax.Array
    rate: jax.Array
    evaluations: jax.Array
    iterations: jax.Array

    def direction(self) -> jax.Array:
        """The direction of BFGS ``(k,)``."""
        return -matmul(self.inverse, self.gradient)


class KrylovDescentMetrics(NamedTuple):
    """What `krylov_subspace_descent` reports, all scalars.

    Attributes:
      decrease: Of the objective by the last step; 0 if it was rejected.
      step_norm: Length of the last step; 0 if it was rejected.
      dimension: Of the last subspace, int32.
      smallest_eigenvalue: Of the curvature restricted to it.
      largest_eigenvalue: Of the same.
      iterations: Of BFGS at the last step, int32.
      evaluations: Of value and gradient at its trial points, int32.
      rejections: Steps rejected since `init`, int32.
      nonfinite_products: Steps whose basis a product with a non-finite element cut short, int32.
      nonfinite_steps: Batches whose value or gradient was not finite; they changed nothing.
    """

    decrease: jax.Array
    step_norm: jax.Array
    dimension: jax.Array
    smallest_eigenvalue: jax.Array
    largest_eigenvalue: jax.Array
    iterations: jax.Array
    evaluations: jax.Array
    rejections: jax.Array
    nonfinite_products: jax.Array
    nonfinite_steps: jax.Array


class KrylovDescentState(NamedTuple):
    """State of `krylov_subspace_descent`.

    Attributes:
      count: Updates so far, int32.
      step: The last step that was not rejected.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    step: chex.ArrayTree
    metrics: KrylovDescentMetrics


def krylov_subspace_descent(
    *,
    subspace_size: int = 20,
    curvature: SubspaceCurvature = "gauss_newton",
    preconditioner: PreconditionerKind | None = None,
    preconditioner_power: chex.Numeric = 1.0,
    preconditioner_floor: chex.Numeric = 1e-4,
    preconditioner_probes: int = 1,
    eigenvalue_floor: chex.Numeric = 1e-4,
    max_evaluations: int = 20,
    sufficient: chex.Numeric = 1e-4,
    shrink: chex.Numeric = 0.5,
    weight_decay: chex.Numeric = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Krylov subspace descent.

    An orthonormal basis ``V`` of

    .. math:: \mathrm{span}\{D^{-1} g,\; D^{-1} B D^{-1} g,\; \dots,\; (D^{-1} B)^{K-1} D^{-1} g,\;
                             \text{last step}\}

    is made of ``K + 1`` products with the curvature ``B``. With the eigenvalues of
    :math:`V B V^\top = Q \Lambda Q^\top` raised to a floor, :math:`T = Q \Lambda^{-1/2}`, BFGS
    minimizes

    .. math:: a \mapsto f(\theta + V^\top T a)

    from :math:`a = 0` and an inverse Hessian of one, as the curvature in these coordinates is.
    Where ``B`` is exact its first step is Newton's in the subspace. If the objective does not fall
    the step is zero. The basis takes the memory of ``K + 1`` gradients.

    The paper's settings are::

        so.krylov_subspace_descent(subspace_size=20, curvature="gauss_newton",
                                   preconditioner="empirical_fisher", max_evaluations=40)

    with ``grad`` on all data, and ``curvature_fn`` and ``value_fn`` on two different parts of it:
    a subspace that is searched on the batch that it was made of fits that batch too well.

    Args:
      subspace_size: ``K``, at least 1. Static.
      curvature: ``B``: ``"gauss_newton"``, or ``"hessian"``, which may be indefinite. Static.
      preconditioner: Diagonal ``D``: ``"empirical_fisher"``, of squared gradients of single cases,
        or ``"gauss_newton"``, both estimated by random probes; None: the identity. Static.
      preconditioner_power: Exponent of the diagonal, at least 0.
      preconditioner_floor: Smallest element of the diagonal, before the exponent, as a fraction of
        the largest, in (0, 1).
      preconditioner_probes: Probes per step, each a backward pass. Static.
      eigenvalue_floor: Smallest eigenvalue, as a fraction of the largest by magnitude, in (0, 1).
      max_evaluations: How often BFGS evaluates value and gradient at most. Static.
      sufficient: Share of the slope's promise that a step of BFGS must keep, in (0, 1).
      shrink: Factor in (0, 1) of the rate where it does not. A power of it is taken at once, if
        the parabola through slope and values has its minimum there.
      weight_decay: Coefficient :math:`\tau \ge 0` of :math:`\tau|\theta|^2/2`, which is added to
        the objective and its curvature.
      seed: Of the probes.

    Returns:
      A terminal transform whose ``update`` needs ``params`` and ``value_fn``, the objective that is
      minimized over the subspace. ``curvature_fn``, an objective on another batch, gives the
      curvature; of the two, the one that gives it is an `Objective`, or any callable for the
      Hessian without a preconditioner. ``grad``, or in its place the first argument, may be
      of a larger batch than ``value_fn``. Nothing should follow it in a chain. A batch that is not
      finite gives a zero update and changes only a counter.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x = jax.random.normal(jax.random.key(0), (64, 3))
      >>> objective = so.Objective(
      ...     lambda w: jnp.tanh(x @ w), lambda z: jnp.mean((z - jnp.tanh(x[:, 0])) ** 2))
      >>> params, tx = jnp.zeros(3), so.krylov_subspace_descent(subspace_size=3)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     value, grad = jax.value_and_grad(objective)(params)
      ...     updates, state = tx.update(
      ...         grad, state, params, value=value, grad=grad, value_fn=objective)
      ...     params = optax.apply_updates(params, updates)
      >>> float(objective(params)) < 1e-4
      True

    References:
      Vinyals, Povey (2012), Krylov subspace descent for deep learning.
    """
    settings = _Settings(
        subspace_size, curvature, preconditioner, preconditioner_power, preconditioner_floor,
        preconditioner_probes, eigenvalue_floor, max_evaluations, sufficient, shrink, weight_decay,
        seed,
    )  # fmt: skip
    _check(settings)

    def init(params: chex.ArrayTree) -> KrylovDescentState:
        check_params(params, "krylov_subspace_descent")
        dtype = vectors.accumulation_dtype(params)
        return KrylovDescentState(
            count=jnp.zeros((), jnp.int32),
            step=vectors.zeros_vector(params),
            metrics=zero_metrics(
                KrylovDescentMetrics,
                dtype,
                ("decrease", "step_norm", "smallest_eigenvalue", "largest_eigenvalue"),
            ),
        )

    def update(
        updates: chex.ArrayTree,
        state: KrylovDescentState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        grad: chex.ArrayTree | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        curvature_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, KrylovDescentState]:
        del extra_args
        name = "krylov_subspace_descent"
        grad = updates if grad is None else grad
        point = look(name, value_fn, params, value, grad, weight_decay)
        # The compiler merges this pass with the caller's own, if that was on the same batch.
        start = look(name, value_fn, params, None, None, weight_decay)
        usable = point.usable & start.usable

        # 1. The curvature, linearized once for all products; a basis of its Krylov space.
        splits = curvature != "hessian" or preconditioner is not None
        objective = curvature_objective(name, value_fn, curvature_fn, splits)
        basis = _build_basis(settings, objective, point, state)

        # 2. Coordinates in which the curvature is the identity.
        subspace = _Subspace(basis, *whitening(_filled(basis), eigenvalue_floor))

        # 3. BFGS on the objective in these coordinates.
        search = _minimize(settings, value_fn, start, subspace)

        # 4. The step, if the objective falls.
        accepted = usable & (search.value < start.value)
        step = scaled_step(point.params, subspace.vector(search.place), accepted)
        new = KrylovDescentState(
            count=optax.safe_increment(state.count),
            step=jax.tree.map(
                lambda s, old: jnp.where(accepted, s.astype(old.dtype), old), step, state.step
            ),
            metrics=_report(state.metrics, subspace, search, start, step),
        )
        return step, keep_unless(usable, new, state)

    return make_transform("krylov_subspace_descent", init, update)


def _check(settings: _Settings) -> None:
    check_choice("curvature", settings.curvature, get_args(SubspaceCurvature))
    if settings.preconditioner is not None:
        check_choice("preconditioner", settings.preconditioner, get_args(PreconditionerKind))
    for name in ("subspace_size", "preconditioner_probes", "max_evaluations"):
        check_static_count(name, getattr(settings, name))
    for name in ("preconditioner_power", "weight_decay"):
        check_range(name, getattr(settings, name), low=0)
    for name in ("preconditioner_floor", "eigenvalue_floor", "sufficient", "shrink"):
        check_range(name, getattr(settings, name), low=0, high=1, open_low=True)


def _build_basis(
    settings: _Settings, objective: Any, point: Point, state: KrylovDescentState
) -> KrylovBasis:
    with jax.named_scope("krylov_basis"):
        matrix = curvature_operator(settings.curvature, objective, point.params)
        return krylov_basis(
            matrix.damped(settings.weight_decay),
            point.gradient,
            settings.subspace_size,
            preconditioner=_precondition(settings, objective, point, state.count),
            extra=state.step,
        )


def _filled(basis: KrylovBasis) -> jax.Array:
    """The restricted curvature, with vectors that are missing between its extreme eigenvalues."""
    between = basis.projected[0, 0]  # a Rayleigh quotient
    return basis.projected + jnp.diag(jnp.where(basis.used, 0, between))


def _precondition(
    settings: _Settings, objective: Any, point: Point, count: jax.Array
) -> chex.ArrayTree | None:
    """The floored diagonal, or None."""
    if settings.preconditioner is None:
        return None
    key = jax.random.fold_in(jax.random.key(settings.seed), count)
    estimate = estimate_diagonal(
        settings.preconditioner, objective, point.params, key, settings.preconditioner_probes
    )
    diagonal = jax.tree.map(lambda d: d + settings.weight_decay, estimate)
    largest = jnp.max(jnp.stack([jnp.max(leaf, initial=0) for leaf in jax.tree.leaves(diagonal)]))
    usable = jnp.isfinite(largest) & (largest > 0)
    floor = jnp.where(usable, settings.preconditioner_floor * largest, 1)
    return jax.tree.map(
        lambda d: (jnp.where(usable, jnp.maximum(d, floor), 1) ** settings.preconditioner_power)
        .astype(d.dtype),
        diagonal,
    )  # fmt: skip


def _minimize(settings: _Settings, value_fn: Any, start: Point, subspace: _Subspace) -> _Search:
    """BFGS with backtracking; every trip of the loop is one value and gradient."""
    eps = float(np.finfo(start.value.dtype).eps)

    def proceed(search: _Search) -> jax.Array:
        promise = -search.rate * inner(search.gradient, search.direction())
        # What is promised must be more than the rounding of the value.
        worthwhile = promise > eps * jnp.abs(search.value)
        return worthwhile & (search.evaluations < settings.max_evaluations)

    def attempt(search: _Search) -> _Search:
        step = search.rate * search.direction()
        trial = scaled_step(start.params, subspace.vector(search.place + step), 1.0)
        there = look(
            "krylov_subspace_descent",
            value_fn,
            optax.apply_updates(start.params, trial),
            None,
            None,
            settings.weight_decay,
        )
        return _judge(settings, search, step, there, subspace)

    gradient = subspace.coordinates(start.gradient)
    count = jnp.zeros((), jnp.int32)
    first = _Search(
        place=jnp.zeros_like(gradient),
        value=start.value,
        gradient=gradient,
        inverse=jnp.eye(len(gradient), dtype=gradient.dtype),
        rate=jnp.ones_like(start.value),
        evaluations=count,
        iterations=count,
    )
    with jax.named_scope("subspace_search"):
        return jax.lax.while_loop(proceed, attempt, first)


def _judge(
    settings: _Settings, search: _Search, step: jax.Array, there: Point, subspace: _Subspace
) -> _Search:
    """Goes to the trial point if the value falls sufficiently, or shortens the rate."""
    slope = inner(search.gradient, step)
    rise = there.value - search.value
    taken = there.usable & (rise <= settings.sufficient * slope) & (rise < 0)
    gradient = subspace.coordinates(there.gradient)
    pair = Pair(step, gradient - search.gradient)
    return _Search(
        place=jnp.where(taken, search.place + step, search.place),
        value=jnp.where(taken, there.value, search.value),
        gradient=jnp.where(taken, gradient, search.gradient),
        inverse=inverse_bfgs_update(search.inverse, pair, taken),
        rate=jnp.where(taken, 1, _shorter(settings, slope, rise) * search.rate).astype(
            search.rate.dtype
        ),
        evaluations=search.evaluations + 1,
        iterations=search.iterations + taken,
    )


def _shorter(settings: _Settings, slope: jax.Array, rise: jax.Array) -> jax.Array:
    """The factor of a rate that is too long: a power of ``shrink``, by a parabola."""
    # Where an eigenvalue was raised to its floor the first rate may be far too long.
    excess = rise - slope
    usable = jnp.isfinite(excess) & (excess > 0)
    minimum = jnp.where(usable, -slope / (2 * jnp.where(usable, excess, 1)), 0)
    # Powers do not pass the rounding of the values on to the step.
    power = jnp.floor(jnp.log(jnp.maximum(minimum, _SMALLEST_FACTOR)) / jnp.log(settings.shrink))
    return settings.shrink ** jnp.maximum(power, 1)


def _report(
    old: KrylovDescentMetrics,
    subspace: _Subspace,
    search: _Search,
    start: Point,
    step: chex.ArrayTree,
) -> KrylovDescentMetrics:
    accepted = search.value < start.value
    return KrylovDescentMetrics(
        decrease=start.value - search.value,
        step_norm=jnp.sqrt(vectors.inner(step, step)),
        dimension=jnp.sum(subspace.basis.used, dtype=jnp.int32),
        smallest_eigenvalue=subspace.eigenvalues[0],
        largest_eigenvalue=subspace.eigenvalues[-1],
        iterations=search.iterations,
        evaluations=search.evaluations,
        rejections=old.rejections + ~accepted,
        nonfinite_products=old.nonfinite_products + ~subspace.basis.finite,
        nonfinite_steps=old.nonfinite_steps,
    )
