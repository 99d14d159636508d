r"""Saddle-free Newton on a Krylov space: absolute values of all that Lanczos' process sees.

Newton's step divides the gradient by eigenvalues, negative ones too, and so is drawn to saddle
points. Divided by their magnitudes it descends along every eigenvector. In a Krylov space of the
gradient the Hessian is a small matrix whose magnitudes are exact; outside of it nothing is moved.
The step has been tried when it is returned: the method is *terminal*, as optax's line searches are.

References:
  Dauphin, Pascanu, Gulcehre, Cho, Ganguli, Bengio (2014), Identifying and attacking the saddle
  point problem in high-dimensional non-convex optimization, NeurIPS, arXiv 1406.2572 ("the paper").
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import tree as vectors
from secondorder.checks import check_choice, check_range, check_static_count
from secondorder.control import DampingRule, reduction_ratio
from secondorder.methods.hessian_free_model import steer
from secondorder.methods.newton_cg_step import Equation, pose
from secondorder.methods.terminal import (
    curvature_objective,
    keep_unless,
    look,
    scaled_step,
    trial_value,
    zero_metrics,
)
from secondorder.methods.transform import make_transform
from secondorder.objective import check_params
from secondorder.operators import hessian
from secondorder.operators.hessian import HessianMode
from secondorder.products import matmul
from secondorder.sharding import replicate
from secondorder.solvers import KrylovBasis, krylov_basis

_REALS = (
    "damping", "ratio", "decrease", "step_norm", "smallest_eigenvalue", "largest_eigenvalue",
)  # fmt: skip
_EXITS = (1.0, -1.0, 1 / 8, -1 / 8)  # steps along negative curvature, as multiples of a length


class _Settings(NamedTuple):
    """The hyperparameters; see `saddle_free_newton`."""

    subspace_size: int
    dampings: tuple[float, ...]
    damping_rule: DampingRule | None
    escape_length: chex.Numeric
    mode: HessianMode
    weight_decay: chex.Numeric
    seed: int


class _Spectrum(NamedTuple):
    """The Hessian and the gradient in the eigenvectors of a subspace.

    Attributes:
      values: Eigenvalues ``(k,)``; above all others where a vector of the basis is missing.
      rows: The eigenvectors in the coordinates of the basis, as rows ``(k, k)``.
      slopes: The gradient along each ``(k,)``.
      known: Which are there ``(k,)``.
    """

    values: jax.Array
    rows: jax.Array
    slopes: jax.Array
    known: jax.Array


class SaddleFreeNewtonMetrics(NamedTuple):
    """What `saddle_free_newton` reports, all scalars.

    Attributes:
      damping: Of the last step; 0 for one along negative curvature alone.
      ratio: Actual over predicted reduction of the last step, minus infinity if it was rejected.
      decrease: Of the objective by the last step; 0 if it was rejected.
      step_norm: Length of the last step; 0 if it was rejected.
      smallest_eigenvalue: Of the Hessian restricted to the last subspace.
      largest_eigenvalue: Of the same.
      products: Products with the Hessian at the last step, int32.
      evaluations: Values that it tried, int32.
      escapes: Steps along negative curvature alone since `init`, int32.
      rejections: Steps rejected since `init`, int32.
      nonfinite_products: Steps whose subspace a product with a non-finite element cut short.
      nonfinite_steps: Batches whose value or gradient was not finite; they changed nothing.
    """

    damping: jax.Array
    ratio: jax.Array
    decrease: jax.Array
    step_norm: jax.Array
    smallest_eigenvalue: jax.Array
    largest_eigenvalue: jax.Array
    products: jax.Array
    evaluations: jax.Array
    escapes: jax.Array
    rejections: jax.Array
    nonfinite_products: jax.Array
    nonfinite_steps: jax.Array


class SaddleFreeNewtonState(NamedTuple):
    """State of `saddle_free_newton`.

    Attributes:
      count: Updates so far, int32.
      damping: The scale of the dampings that are tried.
      largest_gradient: The largest gradient norm so far.
      step: The last step that was not rejected.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    damping: jax.Array
    largest_gradient: jax.Array
    step: chex.ArrayTree
    metrics: SaddleFreeNewtonMetrics


def saddle_free_newton(
    *,
    subspace_size: int = 20,
    damping: chex.Numeric = 1.0,
    dampings: Sequence[float] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
    damping_rule: DampingRule | None = None,
    escape_length: chex.Numeric = 1.0,
    mode: HessianMode = "forward_over_reverse",
    weight_decay: chex.Numeric = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Saddle-free Newton in a Krylov space.

    With an orthonormal basis ``V`` of the Krylov space of the gradient, and the last step, and
    :math:`V H V^\top = Q \Lambda Q^\top`, the steps

    .. math:: d_i = -V^\top Q\, (|\Lambda| + \lambda \mu_i I)^{-1}\, Q^\top V g

    are tried for all dampings :math:`\mu_i`, and the one with the lowest objective is taken; if
    none is lower than before, the step is zero. The basis takes the memory of its vectors. Where
    the Hessian has a negative eigenvalue in it, four steps along that eigenvector of a fixed length
    are tried as well: next to a saddle point the gradient, and with it all other steps, are small.
    Where it vanishes the space is that of a random vector.

    Where all steps are too long, the next ones are the same without a ``damping_rule``: then the
    largest damping should be of the size of the curvature.

    The paper's settings are ``subspace_size=500`` with the default dampings. Marquardt's rule in
    place of several trials is::

        so.saddle_free_newton(dampings=(1.0,), damping_rule=so.DampingRule())

    Args:
      subspace_size: Dimension of the Krylov space, at least 1, each a product. Static.
      damping: First :math:`\lambda`, above 0.
      dampings: Multiples :math:`\mu_i` of it to try, each above 0. Static.
      damping_rule: How :math:`\lambda` follows the ratio of actual to predicted reduction; None
        keeps it.
      escape_length: Length of the longest step along negative curvature alone, above 0.
      mode: How the Hessian is multiplied with; see `operators.hessian`. Static.
      weight_decay: Coefficient :math:`\tau \ge 0` of :math:`\tau|\theta|^2/2`, which is added to
        the objective and its Hessian.
      seed: Of the random vectors.

    Returns:
      A terminal transform whose ``update`` needs ``params`` and ``value_fn``, any callable;
      ``value`` is computed if it is not given, and the first argument is the gradient if ``grad``
      is not. ``curvature_fn``, an objective on another batch, gives the Hessian. Nothing should
      follow it in a chain. A batch that is not finite gives a zero update and changes only a
      counter.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> saddle = lambda p: p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4
      >>> params, tx = jnp.array([1.0, 0.0]), so.saddle_free_newton(subspace_size=2)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     value, grad = jax.value_and_grad(saddle)(params)
      ...     updates, state = tx.update(
      ...         grad, state, params, value=value, grad=grad, value_fn=saddle)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(10):
      ...     params, state = step(params, state)
      >>> round(float(saddle(params)), 4)
      -1.0

    References:
      Dauphin et al. (2014), arXiv 1406.2572, algorithm 1.
    """
    settings = _Settings(
        subspace_size, tuple(dampings), damping_rule, escape_length, mode, weight_decay, seed
    )
    check_range("damping", damping, low=0, open_low=True)
    _check(settings)

    def init(params: chex.ArrayTree) -> SaddleFreeNewtonState:
        check_params(params, "saddle_free_newton")
        dtype = vectors.accumulation_dtype(params)
        return SaddleFreeNewtonState(
            count=jnp.zeros((), jnp.int32),
            damping=jnp.array(damping, dtype),  # a copy, as states may be donated
            largest_gradient=jnp.zeros((), dtype),
            step=vectors.zeros_vector(params),
            metrics=zero_metrics(SaddleFreeNewtonMetrics, dtype, _REALS),
        )

    def update(
        updates: chex.ArrayTree,
        state: SaddleFreeNewtonState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        grad: chex.ArrayTree | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        curvature_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, SaddleFreeNewtonState]:
        del extra_args
        name = "saddle_free_newton"
        grad = updates if grad is None else grad
        objective = curvature_objective(name, value_fn, curvature_fn, splits=False)
        point = look(name, value_fn, params, value, grad, weight_decay)
        trial: Any = value_fn

        # 1. A basis of the Krylov space, of a random vector where the gradient vanishes.
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        equation = pose(point.gradient, state.largest_gradient, 0.0, 0.0, key)
        with jax.named_scope("krylov_basis"):
            matrix = hessian(objective, point.params, mode).damped(weight_decay)
            basis = krylov_basis(matrix, equation.right, subspace_size, extra=state.step)

        # 2. The steps to try, in coordinates of the basis.
        spectrum = _diagonalize(basis, point.gradient, equation)
        candidates = _candidates(settings, spectrum, state.damping, equation.is_probe)

        # 3. The one with the lowest objective, if that falls.
        def evaluate(coordinates: jax.Array) -> jax.Array:
            step = vectors.combine(matmul(coordinates, spectrum.rows), basis.vectors)
            return trial_value(trial, point.params, step, 1.0, weight_decay)

        values = jax.lax.map(evaluate, candidates)
        best = jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
        accepted = point.usable & (values[best] < point.value)
        chosen = candidates[best]
        direction = vectors.combine(matmul(chosen, spectrum.rows), basis.vectors)
        step = scaled_step(point.params, direction, accepted)

        # 4. What the model promised, and the next damping.
        predicted = jnp.sum(chosen * (spectrum.slopes + spectrum.values * chosen / 2))
        ratio = reduction_ratio(point.value, values[best], -predicted, point.resolution)
        ratio = jnp.where(accepted, ratio, -jnp.inf)
        steered = steer(damping_rule, state.damping, ratio)
        new = SaddleFreeNewtonState(
            count=optax.safe_increment(state.count),
            damping=jnp.where(equation.is_probe, state.damping, steered),
            largest_gradient=equation.largest_gradient,
            step=jax.tree.map(
                lambda s, old: jnp.where(accepted, s.astype(old.dtype), old), step, state.step
            ),
            metrics=_report(
                settings, state, spectrum, basis, best, ratio, point.value - values[best], step
            ),
        )
        return step, keep_unless(point.usable, new, state)

    return make_transform("saddle_free_newton", init, update)


def _check(settings: _Settings) -> None:
    check_static_count("subspace_size", settings.subspace_size)
    check_choice("mode", settings.mode, get_args(HessianMode))
    check_range("escape_length", settings.escape_length, low=0, open_low=True)
    check_range("weight_decay", settings.weight_decay, low=0)
    if not settings.dampings:
        raise ValueError("`dampings` must have at least one number, got none.")
    for multiple in settings.dampings:
        check_range("dampings", multiple, low=0, open_low=True)


def _diagonalize(basis: KrylovBasis, gradient: chex.ArrayTree, equation: Equation) -> _Spectrum:
    """The eigenvectors of the Hessian in the subspace, and the gradient along them."""
    projected = replicate(basis.projected)
    # Vectors that are missing get an eigenvalue of their own, so that nothing mixes with them.
    apart = 1 + 2 * jnp.sqrt(jnp.sum(projected**2))
    values, columns = jnp.linalg.eigh(projected + jnp.diag(jnp.where(basis.used, 0, apart)))
    slopes = matmul(columns.T, replicate(vectors.project(basis.vectors, [gradient]))[:, 0])
    # What is left of a gradient that vanishes has no say.
    slopes = jnp.where(equation.is_probe, 0, slopes)
    return _Spectrum(values, columns.T, slopes, jnp.arange(len(values)) < jnp.sum(basis.used))


def _candidates(
    settings: _Settings, spectrum: _Spectrum, damping: jax.Array, is_probe: jax.Array
) -> jax.Array:
    """The steps to try, in coordinates of the eigenvectors ``(m, k)``."""
    dampings = (damping * jnp.asarray(settings.dampings)).astype(damping.dtype)
    damped = -spectrum.slopes / (jnp.abs(spectrum.values) + dampings[:, None])
    # Eigenvalues ascend. Where gradient and curvature vanish, every direction is as good.
    lowest = spectrum.values[0]
    leads_out = spectrum.known[0] & ((lowest < 0) | (is_probe & (lowest == 0)))
    lengths = (settings.escape_length * jnp.asarray(_EXITS)).astype(damping.dtype)
    first = jnp.arange(len(spectrum.values)) == 0
    exits = jnp.where(leads_out & first, lengths[:, None], 0)
    return jnp.concatenate([damped, exits])


def _report(
    settings: _Settings,
    state: SaddleFreeNewtonState,
    spectrum: _Spectrum,
    basis: KrylovBasis,
    best: jax.Array,
    ratio: jax.Array,
    decrease: jax.Array,
    step: chex.ArrayTree,
) -> SaddleFreeNewtonMetrics:
    old, accepted = state.metrics, jnp.isfinite(ratio)
    tried = len(settings.dampings)
    multiples = jnp.asarray(settings.dampings + (0.0,) * len(_EXITS), state.damping.dtype)
    largest = jnp.max(jnp.where(spectrum.known, spectrum.values, -jnp.inf))
    some = spectrum.known[0]
    return SaddleFreeNewtonMetrics(
        damping=state.damping * multiples[best],
        ratio=ratio,
        decrease=jnp.where(accepted, decrease, 0),
        step_norm=jnp.sqrt(vectors.inner(step, step)),
        smallest_eigenvalue=jnp.where(some, spectrum.values[0], 0),
        largest_eigenvalue=jnp.where(some, largest, 0),
        products=jnp.asarray(len(spectrum.values), jnp.int32),
        evaluations=jnp.asarray(tried + len(_EXITS), jnp.int32),
        escapes=old.escapes + (accepted & (best >= tried)),
        rejections=old.rejections + ~accepted,
        nonfinite_products=old.nonfinite_products + ~basis.finite,
        nonfinite_steps=old.nonfinite_steps,
    )
