r"""K-FAC: natural gradients with Kronecker-factored curvature, in every layer that is found.

References:
  Martens, Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature,
  arXiv 1503.05671 ("the paper").
  Grosse, Martens (2016), A Kronecker-factored approximate Fisher matrix for convolution layers,
  arXiv 1602.01407.
  George et al. (2018), Fast approximate natural gradient descent in a Kronecker-factored
  eigenbasis, arXiv 1806.03884.
  Eschenhagen et al. (2023), arXiv 2311.00636, for weights that are shared.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import factors as kf
from secondorder.checks import check_choice, check_range, check_static_count
from secondorder.layers.groups import Layout, arrange_layers
from secondorder.layers.layer import Layers, check_leaves
from secondorder.layers.rows import WeightSharing
from secondorder.layers.uses import curvature_dtype
from secondorder.methods.kfac_factors import (
    KFACFactors,
    KFACInverses,
    correct,
    init_factors,
    init_inverses,
    invert,
    precondition,
    update_factors,
)
from secondorder.methods.kfac_statistics import (
    Curvature,
    Inverse,
    LayerPass,
    Sample,
    Settings,
)
from secondorder.methods.layerwise import check_layers, merge_directions, on_unassigned
from secondorder.methods.terminal import keep_unless
from secondorder.methods.transform import make_transform
from secondorder.objective import all_finite, check_has_arrays, check_params, check_value_fn
from secondorder.sharding import check_sees_batch, replicate
from secondorder.spread import devices_of

_NAME = "scale_by_kfac"
_NO_CURVATURE: dict[str, Any] = {"factors": (), "inverses": ()}
Fallback: TypeAlias = optax.GradientTransformation | Literal["diagonal"]


class KFACMetrics(NamedTuple):
    """What K-FAC reports; int32 scalars, counted since `init`.

    Attributes:
      nonfinite_steps: Batches whose value or gradient was not finite; they changed nothing.
      nonfinite_curvature: Refreshes that were left out, as a factor was not finite.
      curvature_updates: Refreshes of the factors.
      inverse_updates: Refreshes of the inverses.
      failed_inverses: Blocks that kept their inverse or their moments along the eigenvectors, as
        new ones were not finite.
    """

    nonfinite_steps: jax.Array
    nonfinite_curvature: jax.Array
    curvature_updates: jax.Array
    inverse_updates: jax.Array
    failed_inverses: jax.Array


class ScaleByKFACState(NamedTuple):
    """State of `scale_by_kfac`.

    Attributes:
      count: Steps taken, int32.
      key: Data of a PRNG key, uint32; give each of several seeds its own.
      factors: The averaged factors of all layers.
      inverses: Their inverses, or their eigenvectors and eigenvalues.
      fallback: State of the transform for parameters in no layer.
      metrics: Counters.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    key: jax.Array
    factors: KFACFactors
    inverses: KFACInverses
    fallback: optax.OptState
    metrics: KFACMetrics


def scale_by_kfac(
    layers: Layers,
    *,
    damping: chex.Numeric = 1e-3,
    curvature: Curvature = "sampled",
    weight_sharing: WeightSharing = "expand",
    inverse: Inverse = "cholesky",
    update_every: int = 1,
    inverse_every: int = 10,
    moment_decay: chex.Numeric = 0.95,
    damping_split: kf.DampingSplit = "trace",
    fallback: Fallback = "diagonal",
    strict: bool = False,
    spread_over: Sequence[str] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions gradients by Kronecker-factored blocks of the Gauss-Newton matrix.

    For the gradient :math:`V` of a layer's weight,

    .. math::
      P = (A + \lambda_A I)^{-1} V (G + \lambda_G I)^{-1}, \qquad
      A = \frac1m \sum_{n,t} a_{nt} a_{nt}^\top, \quad
      G = \frac1T \sum_{n,t} c_{nt} c_{nt}^\top,

    with the inputs :math:`a` and the cotangents :math:`c` of ``m`` cases at ``T`` positions each.
    By ``curvature`` the cotangents are

    * ``"sampled"``: one random combination :math:`S \epsilon` of the columns of a square root of
      the outputs' Hessian, passed back: a sampled Fisher matrix if the loss is the negative
      logarithm of a likelihood. One more pass back; any number of outputs.
    * ``"exact"``: all these columns, a pass back for each output: for few of them. Diagonals of
      parameters in no layer are sampled all the same.
    * ``"empirical"``: those of the loss itself, which the caller's gradient has made already. Costs
      nothing, knows no loss and takes any objective that is a mean over cases; but it is not the
      curvature.

    Uses of a tied weight that see it as another matrix, such as the transposed one of a decoder,
    have no part in its factors, and steps can be too long for them. `find_layers` counts them as
    tied, and ``strict`` refuses them.

    Args:
      layers: The layers of the model, from `find_layers`.
      damping: :math:`\lambda > 0`, in the scale of the curvature. The extra argument ``damping`` of
        ``update`` replaces it, as `scale_by_quadratic_model` does.
      curvature: Where cotangents come from. Static.
      weight_sharing: For weights applied at several positions of a case: ``"expand"`` takes each
        for a case of its own, ``"reduce"`` takes sums over the positions of a case. Static.
      inverse: ``"cholesky"``: both factors damped and inverted. ``"eigen"``: their eigenvectors,
        with :math:`\lambda` exactly and as it is now; twice the products in a step.
        ``"corrected"``: likewise, with the gradients' second moments along the eigenvectors in
        place of products of eigenvalues (EKFAC); in a new basis their average starts from these
        products. Static.
      update_every: Refresh the factors at every so many steps only. Static.
      inverse_every: Refresh the inverses at every so many steps only, a multiple of
        ``update_every``. Before that many steps both are also refreshed after 1, 2, 4, 8, ..., as
        curvature changes fast at the start. Static.
      moment_decay: Decay of the averages of factors, in [0, 1); their weights always sum to one.
      damping_split: ``"trace"`` balances the factors' mean eigenvalues, as in the paper; see
        `secondorder.scale_by_kbfgs` for the others. For ``"cholesky"`` only. Static.
      fallback: For parameters in no layer, such as a normalization's scale and shift:
        ``"diagonal"`` divides their gradient by an estimate of the diagonal of the same curvature,
        plus the damping; or a transform of it. The estimate averages squares of random gradients,
        also if ``curvature`` is ``"exact"``, and is drawn toward its mean over the leaf as far as
        it is noise: at first nearly all the way; see `secondorder.factors.shrink_to_mean`.
      strict: Whether parameters in no layer are an error, and weights with uses that see them as
        another matrix.
      spread_over: Names of the axes of the parameters' mesh over which the factors and inverses of
        layers of equal shape, and the work on them, are spread; None for all axes, ``()`` for none.
        Static.
      seed: Of the random cotangents. Static.

    Returns:
      A transform whose ``update`` needs ``params`` and a ``value_fn`` that is an `Objective`, or,
      for ``"empirical"`` with ``"expand"`` and no diagonal, any callable; ``curvature_fn``, an
      objective on another batch, replaces it for curvature. Batches whose value or gradients are
      not finite give a zero update and change only a counter.

    Raises:
      ValueError: For hyperparameters out of range, or with ``strict`` for a parameter in no layer.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x, y = jnp.ones((8, 3)), jnp.zeros((8, 2))
      >>> objective = so.Objective(lambda w: x @ w, lambda z: jnp.mean((z - y) ** 2))
      >>> params = jnp.ones((3, 2))
      >>> tx = optax.chain(so.scale_by_kfac(so.find_layers(objective, params)), optax.scale(-0.3))
      >>> state = tx.init(params)
      >>> value, grads = jax.value_and_grad(objective)(params)
      >>> updates, state = tx.update(grads, state, params, value_fn=objective)
      >>> float(objective(optax.apply_updates(params, updates))) < 0.6 * float(value)
      True

    References:
      Martens, Grosse (2015), arXiv 1503.05671.
    """
    check_layers(layers, strict)
    is_diagonal = isinstance(fallback, str)
    settings = Settings(
        damping=damping,
        curvature=curvature,
        weight_sharing=weight_sharing,
        inverse=inverse,
        update_every=update_every,
        inverse_every=inverse_every,
        moment_decay=moment_decay,
        damping_split=damping_split,
        diagonals=tuple(i for i, _ in layers.unassigned) if is_diagonal else (),
    )
    _check_hyperparameters(settings, fallback, seed)
    layout = arrange_layers(layers.layers)
    others = on_unassigned(None if isinstance(fallback, str) else fallback, layers)

    def init(params: chex.ArrayTree) -> ScaleByKFACState:
        check_params(params, _NAME)
        leaves = jax.tree.leaves(params)
        if leaves:  # There are none in the placeholder that `optax.tree.map_params` passes.
            check_leaves(layers, params)
        dtype = curvature_dtype(jnp.result_type(*leaves, *(() if leaves else (jnp.float32,))))
        shared = layout.on(devices_of(params, spread_over))
        return ScaleByKFACState(
            count=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(jax.random.key(seed)),
            factors=init_factors(settings, layers, shared, dtype),
            inverses=init_inverses(settings, shared, dtype),
            fallback=others.init(params),
            metrics=KFACMetrics(*(jnp.zeros((), jnp.int32) for _ in KFACMetrics._fields)),
        )

    def update(
        updates: chex.ArrayTree,
        state: ScaleByKFACState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        curvature_fn: Callable[[Any], Any] | None = None,
        damping: chex.Numeric | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByKFACState]:
        check_has_arrays(params, _NAME)
        check_value_fn(value_fn, _NAME)
        objective = value_fn if curvature_fn is None else curvature_fn
        check_value_fn(objective, _NAME, "curvature_fn")
        shift = settings.damping if damping is None else damping
        check_sees_batch(_NAME, params)
        shared = layout.on(devices_of(params, spread_over))
        layer_pass = LayerPass(_NAME, settings, layers, objective, params)

        # 1. The factors and their inverses, from the current batch.
        finite = all_finite((updates, value))
        merges = layer_pass.merges and curvature_fn is None
        refreshed = _refresh_if_due(settings, shared, layer_pass, state, shift, finite, merges)

        # 2. The direction of each layer, the diagonal's or the fallback's of the rest.
        gradient = jax.tree.map(lambda g: jnp.where(finite, g, jnp.zeros_like(g)), updates)
        with jax.named_scope("kfac_precondition"):
            direction = _direction(settings, layers, shared, refreshed, gradient, shift)
        rest, fallback_state = gradient, state.fallback
        if not is_diagonal:
            rest, fallback_state = others.update(gradient, state.fallback, params, **extra_args)
        merged = merge_directions(direction, rest, params)
        # 3. Nothing but a counter, if a number was not finite. The refresh has asked that itself:
        # to select factors and inverses once more would copy them all.
        merged = jax.tree.map(lambda d: jnp.where(finite, d, jnp.zeros_like(d)), merged)
        kept = keep_unless(
            finite,
            refreshed._replace(
                count=optax.safe_increment(state.count), fallback=fallback_state, **_NO_CURVATURE
            ),
            state._replace(**_NO_CURVATURE),
        )
        return merged, kept._replace(factors=refreshed.factors, inverses=refreshed.inverses)

    return make_transform(_NAME, init, update)


def _refresh_if_due(
    settings: Settings,
    layout: Layout,
    layer_pass: LayerPass,
    state: ScaleByKFACState,
    damping: chex.Numeric,
    finite: jax.Array,
    merges: bool,
) -> ScaleByKFACState:
    """The state with new factors and inverses, where they are due and the batch is finite."""
    # A pass at the present parameters is the caller's own, if XLA sees both outside of a branch.
    seen = layer_pass.look() if merges else None

    def refresh(state: ScaleByKFACState) -> ScaleByKFACState:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
        with jax.named_scope("kfac_statistics"):
            sample = layer_pass.sample(layer_pass.look() if seen is None else seen, key)
            return _refresh(settings, layout, layer_pass, sample, state, damping)

    is_due = finite & _is_due(settings, state.count, settings.update_every)
    return jax.lax.cond(is_due, refresh, lambda state: state, state)


def _is_due(settings: Settings, count: jax.Array, every: int) -> jax.Array:
    """Every so many steps, and first after powers of two: at the start all ages fast."""
    early = (count < settings.inverse_every) & (count & (count - 1) == 0)
    return (count % every == 0) | early


def _refresh(
    settings: Settings,
    layout: Layout,
    layer_pass: LayerPass,
    sample: Sample,
    state: ScaleByKFACState,
    damping: chex.Numeric,
) -> ScaleByKFACState:
    """Averages the factors, and inverts them if that is due too."""
    metrics = state.metrics
    factors = update_factors(settings, layout, state.factors, sample, metrics.curvature_updates)
    finite = all_finite(factors)
    factors = jax.tree.map(lambda n, o: jnp.where(finite, n, o), factors, state.factors)
    positions = [traced.positions / layer_pass.batch_size for traced in layer_pass.traced]

    def due(old: KFACInverses) -> tuple[KFACInverses, jax.Array]:
        with jax.named_scope("kfac_inverses"):
            return invert(settings, layout, factors, old, positions, sample.batch_size, damping)

    is_due = finite & _is_due(settings, state.count, settings.inverse_every)
    none = jnp.zeros((), jnp.int32)
    inverses, failed = jax.lax.cond(is_due, due, lambda old: (old, none), state.inverses)
    if settings.inverse == "corrected":
        count = metrics.curvature_updates
        corrected, kept = correct(settings, layout, factors, inverses, sample, count)
        inverses = jax.tree.map(lambda n, o: jnp.where(finite, n, o), corrected, inverses)
        failed += jnp.where(finite, kept, 0)
    return state._replace(
        factors=factors,
        inverses=inverses,
        metrics=metrics._replace(
            nonfinite_curvature=metrics.nonfinite_curvature + ~finite,
            curvature_updates=metrics.curvature_updates + finite,
            inverse_updates=metrics.inverse_updates + is_due,
            failed_inverses=metrics.failed_inverses + failed,
        ),
    )


def _direction(
    settings: Settings,
    layers: Layers,
    layout: Layout,
    state: ScaleByKFACState,
    gradient: chex.ArrayTree,
    damping: chex.Numeric,
) -> dict[int, jax.Array]:
    """The preconditioned gradient of every leaf in a layer, and of those with a diagonal."""
    leaves = jax.tree.leaves(gradient)
    matrices = [layer.to_matrix(leaves) for layer in layers.layers]
    direction: dict[int, jax.Array] = {}
    for layer, product in zip(
        layers.layers, precondition(state.inverses, layout, matrices, damping), strict=True
    ):
        direction.update(layer.from_matrix(product))
    samples = kf.effective_samples(settings.moment_decay, state.metrics.curvature_updates)
    for leaf, squares in zip(settings.diagonals, state.factors.diagonals, strict=True):
        diagonal = kf.shrink_to_mean(squares, samples)
        direction[leaf] = replicate(leaves[leaf]).astype(diagonal.dtype) / (diagonal + damping)
    return direction


def _check_hyperparameters(settings: Settings, fallback: Any, seed: Any) -> None:
    """Raises `ValueError` for whatever can be judged before tracing."""
    check_range("damping", settings.damping, low=0, open_low=True)
    check_range("moment_decay", settings.moment_decay, low=0, high=1)
    check_choice("curvature", settings.curvature, get_args(Curvature))
    check_choice("weight_sharing", settings.weight_sharing, get_args(WeightSharing))
    check_choice("inverse", settings.inverse, get_args(Inverse))
    check_choice("damping_split", settings.damping_split, get_args(kf.DampingSplit))
    check_static_count("update_every", settings.update_every)
    check_static_count("inverse_every", settings.inverse_every)
    if settings.inverse_every % settings.update_every:
        raise ValueError(
            f"`inverse_every` must be a multiple of `update_every`, got {settings.inverse_every} "
            f"and {settings.update_every}."
        )
    if isinstance(fallback, str):
        check_choice("fallback", fallback, ("diagonal",))
    elif not isinstance(fallback, optax.GradientTransformation):
        raise ValueError(
            "`fallback` must be 'diagonal' or a transform such as optax.identity(), got "
            f"{type(fallback)}."
        )
    if not isinstance(seed, int):
        raise ValueError(f"`seed` must be an integer, got {seed}.")
