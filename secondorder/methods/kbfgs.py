r"""K-BFGS and K-BFGS(L): Kronecker-factored quasi-Newton optimizers.

For a layer ``h = a W`` the Hessian block is approximated by ``A (x) G``, with the second moment
``A`` of the inputs and the Hessian ``G`` with respect to the outputs. Both inverses are kept by
BFGS: ``H_a`` from the known action of ``A``, ``H_g`` from differences of outputs and of their
cotangents along the steps. The direction is ``H_a M H_g`` for the momentum ``M``.

References:
  Goldfarb, Ren, Bahamou. Practical Quasi-Newton Methods for Training Deep Neural Networks.
  NeurIPS 2020, arXiv 2006.08877 ("the paper of 2020").
  Ren, Bahamou, Goldfarb. Kronecker-factored Quasi-Newton Methods for Deep Learning.
  arXiv 2102.06737 ("the paper of 2021").
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder import factors as kf
from secondorder.checks import check_choice, check_range, check_static_count, is_number
from secondorder.jaxprs import canonical_convolutions
from secondorder.layers.groups import Layout, arrange_layers
from secondorder.layers.layer import Layers, check_leaves
from secondorder.layers.uses import curvature_dtype
from secondorder.methods.kbfgs_factors import (
    InputFactor,
    KBFGSFactors,
    Settings,
    init_factors,
    measure,
    precondition,
)
from secondorder.methods.kbfgs_pass import AnyPass, LayerPass
from secondorder.methods.kbfgs_update import KBFGSMetrics, count_pairs, refresh, unchanged
from secondorder.methods.layerwise import (
    check_layers,
    merge_directions,
    on_unassigned,
    with_settings_of,
)
from secondorder.methods.transform import make_transform
from secondorder.methods.weight_decay import WeightDecayForm, with_weight_decay
from secondorder.objective import all_finite, check_has_arrays, check_params, check_value_fn
from secondorder.sharding import check_sees_batch
from secondorder.spread import devices_of

MomentumForm: TypeAlias = Literal["ema", "heavy_ball"]
RefreshOrder: TypeAlias = Literal["before", "after"]


class ScaleByKBFGSState(NamedTuple):
    """State of `scale_by_kbfgs`.

    Attributes:
      count: Steps taken, int32.
      momentum: The gradient with momentum, like the parameters.
      previous_params: The parameters before the last step, as far as a refresh needs them.
      factors: The Kronecker factors of all layers.
      fallback: State of the transform for parameters in no layer.
      metrics: Counters.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    momentum: chex.ArrayTree
    previous_params: chex.ArrayTree
    factors: KBFGSFactors
    fallback: optax.OptState
    metrics: KBFGSMetrics


def scale_by_kbfgs(
    layers: Layers,
    *,
    damping: chex.Numeric = 0.3,
    momentum: chex.Numeric = 0.9,
    momentum_form: MomentumForm = "ema",
    input_factor: InputFactor = "minibatch",
    memory_size: int | None = None,
    forget: kf.Forget = "redundant",
    update_every: int = 1,
    pair_decay: chex.Numeric = 0.9,
    moment_decay: chex.Numeric = 0.9,
    pair_damping: kf.PairDamping = "powell_lm",
    powell_fraction: chex.Numeric = 0.2,
    damping_split: kf.DampingSplit = "sqrtT",
    acceptance: chex.Numeric = 0.0,
    refresh_order: RefreshOrder = "before",
    fallback: optax.GradientTransformation | None = None,
    strict: bool = False,
    spread_over: Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions gradients by Kronecker-factored BFGS inverses of the layers' Hessian blocks.

    With the momentum :math:`M` of a layer's gradient,

    .. math::
      P = H_a M H_g, \qquad H_a \approx (A + \lambda_A I)^{-1}, \quad H_g \approx G^{-1},

    and at every refresh, on the current batch,

    .. math::
      s_a = H_a \bar a, \; y_a = (A + \lambda_A I) s_a; \qquad
      s_g = \bar h(\theta_k) - \bar h(\theta_{k-1}), \;
      y_g = \bar g(\theta_k) - \bar g(\theta_{k-1}),

    where :math:`(s_g, y_g)` is averaged over refreshes, damped and gated before it changes
    :math:`H_g`. The pair is taken along the step that was really made, so that this is an ordinary
    link of a chain: anything may stand before and after it. A refresh costs one forward and one
    backward pass at the previous parameters, without weight gradients; the pass at the present
    ones is shared with the caller's gradient.

    Args:
      layers: The layers of the model, from `find_layers`.
      damping: :math:`\lambda > 0`, split between the factors so that
        :math:`\lambda_A \lambda_G = \lambda`. The extra argument ``damping`` of ``update``
        replaces it, as `scale_by_quadratic_model` does.
      momentum: Decay of the momentum, in [0, 1).
      momentum_form: ``"ema"``: ``m = b m + (1 - b) g``, without bias correction as in the paper of
        2020; ``"heavy_ball"``: ``m = b m + g``, which is ten times larger for ``b = 0.9``.
      input_factor: ``"minibatch"`` uses the current batch's ``A``, of which only products with
        vectors are formed (2021); ``"moving_average"`` stores an average of ``A`` (2020).
      memory_size: None keeps ``H_g`` dense (K-BFGS); an integer keeps that many pairs (K-BFGS(L)).
        Static.
      forget: Which pair a full memory forgets: the most ``"redundant"``, whose step a newer one
        repeats best, or the ``"oldest"`` (papers; diverges where refreshes are rare).
      update_every: Refresh the factors at every so many steps only. Static.
      pair_decay: Decay of the averages of ``s_g`` and ``y_g``, in [0, 1); 0 for full batches.
      moment_decay: Decay of the average of ``A``, in [0, 1).
      pair_damping: ``"powell_lm"`` (2021) or ``"powell_identity"`` (2020; needs
        ``damping < 1``).
      powell_fraction: :math:`\mu_1` of Powell's damping, in (0, 1).
      damping_split: ``"sqrtT"`` weighs the shares by the number of positions, ``"plain"`` takes
        :math:`\sqrt\lambda` for both (2020), ``"trace"`` balances the factors' mean eigenvalues.
      acceptance: Pairs with :math:`s^\top y \le` this times :math:`|s|^2 |\bar g|` (or
        :math:`|\bar a|`) are skipped; 1e-4 in the paper of 2020, 0 in that of 2021.
      refresh_order: Whether factors are refreshed ``"before"`` the gradient is preconditioned with
        them, or ``"after"``.
      fallback: Transform of the gradients of parameters in no layer. Default: their momentum.
      strict: Whether parameters in no layer are an error, and weights with uses that see them as
        another matrix.
      spread_over: Names of the axes of the parameters' mesh over which the factors of layers of
        equal shape, and the work on them, are spread; None for all axes, ``()`` for none. Static.

    Returns:
      A transform whose ``update`` needs ``params`` and ``value_fn``, the objective on the current
      batch; ``curvature_fn``, an objective on another batch, replaces it for curvature. Of
      `Microbatches` the layers' inputs and outputs are held for one piece at a time. Batches whose
      value or gradients are not finite give a zero update and change only a counter.

    Raises:
      ValueError: For hyperparameters out of range, or with ``strict`` for a parameter in no layer.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x, y = jnp.ones((8, 3)), jnp.zeros((8, 2))
      >>> objective = so.Objective(lambda w: x @ w, lambda z: jnp.mean((z - y) ** 2))
      >>> params = jnp.ones((3, 2))
      >>> tx = optax.chain(so.scale_by_kbfgs(so.find_layers(objective, params)), optax.scale(-0.3))
      >>> state = tx.init(params)
      >>> value, grads = jax.value_and_grad(objective)(params)
      >>> updates, state = tx.update(grads, state, params, value_fn=objective)
      >>> float(objective(optax.apply_updates(params, updates))) < float(value)
      True

    References:
      Goldfarb, Ren, Bahamou (2020), arXiv 2006.08877; Ren, Bahamou, Goldfarb (2021),
      arXiv 2102.06737.
    """
    settings = Settings(
        damping=damping,
        pair_decay=pair_decay,
        moment_decay=moment_decay,
        powell_fraction=powell_fraction,
        acceptance=acceptance,
        input_factor=input_factor,
        memory_size=memory_size,
        forget=forget,
        pair_damping=pair_damping,
        damping_split=damping_split,
    )
    _check_hyperparameters(settings, momentum, momentum_form, update_every, refresh_order)
    check_layers(layers, strict)
    layout = arrange_layers(layers.layers)
    others = on_unassigned(fallback, layers)

    def init(params: chex.ArrayTree) -> ScaleByKBFGSState:
        check_params(params, "scale_by_kbfgs")
        leaves = jax.tree.leaves(params)
        if leaves:  # There are none in the placeholder that `optax.tree.map_params` passes.
            check_leaves(layers, params)
        dtype = curvature_dtype(jnp.result_type(*leaves, *(() if leaves else (jnp.float32,))))
        return ScaleByKBFGSState(
            count=jnp.zeros((), jnp.int32),
            momentum=jax.tree.map(jnp.zeros_like, params),
            previous_params=jax.tree.map(jnp.copy, params),
            factors=init_factors(settings, layout.on(devices_of(params, spread_over)), dtype),
            fallback=others.init(params),
            metrics=KBFGSMetrics(*(jnp.zeros((), jnp.int32) for _ in KBFGSMetrics._fields)),
        )

    def update(
        updates: chex.ArrayTree,
        state: ScaleByKBFGSState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        curvature_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByKBFGSState]:
        check_has_arrays(params, "scale_by_kbfgs")
        check_value_fn(value_fn, "scale_by_kbfgs")
        objective = value_fn if curvature_fn is None else curvature_fn
        check_value_fn(objective, "scale_by_kbfgs", "curvature_fn")
        told = dataclasses.replace(settings, damping=extra_args.get("damping", damping))
        check_sees_batch("scale_by_kbfgs", params)

        layer_pass = LayerPass(layers, objective, params)
        shared = layout.on(devices_of(params, spread_over))
        # A pass at the present parameters is the caller's own gradient, if XLA can see both.
        here = layer_pass(params) if layer_pass.merges else None

        def accepted(state: ScaleByKBFGSState) -> tuple[ScaleByKBFGSState, jax.Array]:
            # 1. Momentum.
            averaged = _momentum(state.momentum, updates, momentum, momentum_form)

            # 2. Factors, from the current batch at the present and at the previous parameters.
            @canonical_convolutions  # as this is done in a branch
            def due(state: ScaleByKBFGSState) -> tuple[KBFGSFactors, KBFGSMetrics]:
                return _refresh(told, shared, layer_pass, here, params, state)

            def not_due(state: ScaleByKBFGSState) -> tuple[KBFGSFactors, KBFGSMetrics]:
                return state.factors, state.metrics

            if update_every == 1:
                factors, metrics = due(state)
            else:
                is_due = state.count % update_every == 0
                factors, metrics = jax.lax.cond(is_due, due, not_due, state)
            return ScaleByKBFGSState(
                count=optax.safe_increment(state.count),
                momentum=averaged,
                previous_params=_before_next_refresh(state, params, update_every),
                factors=factors,
                fallback=state.fallback,
                metrics=metrics,
            ), jnp.asarray(True)

        def rejected(state: ScaleByKBFGSState) -> tuple[ScaleByKBFGSState, jax.Array]:
            count = state.metrics.nonfinite_steps + 1
            metrics = state.metrics._replace(nonfinite_steps=count)
            return state._replace(metrics=metrics), jnp.asarray(False)

        # A batch that is not finite changes nothing but a counter.
        finite = all_finite((updates, value))
        new_state, moves = jax.lax.cond(finite, accepted, rejected, state)

        # 3. Direction: H_a M H_g for each layer, the fallback for the rest.
        factors = new_state.factors if refresh_order == "before" else state.factors
        direction = _direction(layers, shared, factors, new_state.momentum)
        rest = new_state.momentum
        if fallback is not None:
            rest, fallback_state = others.update(updates, state.fallback, params, **extra_args)
            fallback_state = optax.tree_utils.tree_where(moves, fallback_state, state.fallback)
            new_state = new_state._replace(fallback=fallback_state)
        direction = merge_directions(direction, rest, params)
        return optax.tree_utils.tree_where(
            moves, direction, jax.tree.map(jnp.zeros_like, direction)
        ), new_state

    return make_transform("scale_by_kbfgs", init, update)


def _momentum(
    momentum: chex.ArrayTree, gradient: chex.ArrayTree, decay: chex.Numeric, form: MomentumForm
) -> chex.ArrayTree:
    """The next momentum, in the momentum's dtype."""
    weight = 1 - decay if form == "ema" else 1
    return jax.tree.map(lambda m, g: (decay * m + weight * g).astype(m.dtype), momentum, gradient)


def _refresh(
    settings: Settings,
    layout: Layout,
    layer_pass: LayerPass,
    here: AnyPass | None,
    params: chex.ArrayTree,
    state: ScaleByKBFGSState,
) -> tuple[KBFGSFactors, KBFGSMetrics]:
    """Updates the factors of all layers, unless the batch's curvature is not finite."""
    here = (layer_pass(params) if here is None else here).form_inputs()
    before = layer_pass(state.previous_params, outputs_only=True)
    with jax.named_scope("kbfgs_refresh"):
        measured = measure(settings, layout, here, params, before, state.previous_params)
        finite = all_finite((here.value, before.value, here.checked(), measured.differences))
        result = jax.lax.cond(
            finite,
            lambda factors: refresh(
                settings,
                layout,
                factors,
                measured,
                here,
                state.metrics.curvature_updates == 0,
                _moved(state, params),
            ),
            lambda factors: unchanged(layout, factors),
            state.factors,
        )
    return result.factors, count_pairs(state.metrics, finite, result)


def _moved(state: ScaleByKBFGSState, params: chex.ArrayTree) -> jax.Array:
    """Whether the last step was not zero, as a warm-up's first is; asked until a pair is kept."""

    def compare(previous: chex.ArrayTree) -> jax.Array:
        sizes = jax.tree.map(lambda p, q: jnp.sum(jnp.abs(p - q)) > 0, params, previous)
        return jnp.any(jnp.stack(jax.tree.leaves(sizes)))

    unasked = state.metrics.output_pairs_accepted > 0
    return jax.lax.cond(unasked, lambda _: jnp.asarray(True), compare, state.previous_params)


def _before_next_refresh(
    state: ScaleByKBFGSState, params: chex.ArrayTree, update_every: int
) -> chex.ArrayTree:
    """The parameters before the step that the next refresh looks at; copied only if it is due."""
    if update_every == 1:
        return params
    next_is_due = (state.count + 1) % update_every == 0
    return jax.lax.cond(next_is_due, lambda _: params, lambda old: old, state.previous_params)


def _direction(
    layers: Layers, layout: Layout, factors: KBFGSFactors, momentum: chex.ArrayTree
) -> dict[int, jax.Array]:
    """``H_a M H_g`` for every leaf in a layer."""
    leaves = jax.tree.leaves(momentum)
    with jax.named_scope("kbfgs_precondition"):
        matrices = [layer.to_matrix(leaves) for layer in layers.layers]
        products = precondition(factors, layout, matrices)
    direction: dict[int, jax.Array] = {}
    for layer, product in zip(layers.layers, products, strict=True):
        direction.update(layer.from_matrix(product))
    return direction


def _check_hyperparameters(
    settings: Settings, momentum: Any, momentum_form: str, update_every: Any, refresh_order: str
) -> None:
    """Raises `ValueError` for whatever can be judged before tracing."""
    check_range("damping", settings.damping, low=0, open_low=True)
    check_range("momentum", momentum, low=0, high=1)
    check_range("pair_decay", settings.pair_decay, low=0, high=1)
    check_range("moment_decay", settings.moment_decay, low=0, high=1)
    check_range("powell_fraction", settings.powell_fraction, low=0, high=1, open_low=True)
    check_range("acceptance", settings.acceptance, low=0)
    check_choice("momentum_form", momentum_form, get_args(MomentumForm))
    check_choice("input_factor", settings.input_factor, get_args(InputFactor))
    check_choice("pair_damping", settings.pair_damping, get_args(kf.PairDamping))
    check_choice("forget", settings.forget, get_args(kf.Forget))
    check_choice("damping_split", settings.damping_split, get_args(kf.DampingSplit))
    check_choice("refresh_order", refresh_order, get_args(RefreshOrder))
    check_static_count("update_every", update_every)
    if settings.memory_size is not None:
        check_static_count("memory_size", settings.memory_size)
    if settings.pair_damping == "powell_identity" and is_number(settings.damping):
        check_range("damping (with pair_damping='powell_identity')", settings.damping, high=1)


@with_settings_of(scale_by_kbfgs)
def kbfgs(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    weight_decay: chex.Numeric = 0.0,
    weight_decay_form: WeightDecayForm = "l2",
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""K-BFGS, and K-BFGS(L) with ``memory_size``: a Kronecker-factored quasi-Newton optimizer.

    .. math:: \theta_{k+1} = \theta_k - \alpha\, H_a M H_g

    for the weights of every linear layer; see `scale_by_kbfgs` for the factors and for all
    hyperparameters that are not listed here. The paper of 2020 is::

        so.kbfgs(0.3, layers, damping=0.3, weight_decay=1e-5, input_factor="moving_average",
                 pair_damping="powell_identity", damping_split="plain", acceptance=1e-4)

    with ``memory_size=100, forget="oldest"`` for K-BFGS(L), and that of 2021::

        so.kbfgs(0.03, layers, damping=0.3, momentum_form="heavy_ball", input_factor="minibatch",
                 pair_damping="powell_lm", damping_split="sqrtT")

    except that pairs are taken along the step really made, on the current batch.

    Args:
      learning_rate: Step size :math:`\alpha`, or a schedule of it.
      layers: The layers of the model, from `find_layers`.
      weight_decay: Coefficient :math:`\tau \ge 0` of the decay, on all parameters.
      weight_decay_form: ``"l2"`` adds :math:`\tau\theta` to the gradient before it is averaged
        and preconditioned, the gradient of :math:`\tau|\theta|^2/2`, which curvature leaves out;
        ``"decoupled"`` adds it to the direction.
      **settings: Hyperparameters of `scale_by_kbfgs`.

    Returns:
      The optimizer. Its ``update`` needs ``params`` and ``value_fn``.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x, y = jnp.ones((8, 3)), jnp.zeros((8, 2))
      >>> objective = so.Objective(lambda w: x @ w, lambda z: jnp.mean((z - y) ** 2))
      >>> params = jnp.ones((3, 2))
      >>> tx = so.kbfgs(0.3, so.find_layers(objective, params))
      >>> state = tx.init(params)
      >>> for _ in range(20):
      ...     value, grads = jax.value_and_grad(objective)(params)
      ...     updates, state = tx.update(
      ...         grads, state, params, value=value, grad=grads, value_fn=objective)
      ...     params = optax.apply_updates(params, updates)
      >>> float(objective(params)) < 0.1 * 9
      True

    References:
      Goldfarb, Ren, Bahamou (2020), arXiv 2006.08877; Ren, Bahamou, Goldfarb (2021),
      arXiv 2102.06737.
    """
    direction = scale_by_kbfgs(layers, **settings)
    links = with_weight_decay((direction,), weight_decay, weight_decay_form)
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate))
