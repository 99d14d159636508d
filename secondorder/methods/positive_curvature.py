r"""BDA-PCH and EA-CG: Newton's method with the blocks of the positive-curvature Hessian.

For each weight and each bias of a chain of dense layers the direction solves a system with its own
block of the positive-curvature Hessian, mixed with the identity. The blocks are those of the
approximate expectation, Kronecker products that are known in closed form, or of the exact one.

Reference:
  Chen, Chou, Chang (2018), BDA-PCH: Block-diagonal approximation of positive-curvature Hessian for
  training neural networks, arXiv 1802.06502 ("the paper").
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder.checks import check_choice, check_range, check_static_count
from secondorder.factors.positive_curvature import CurvatureTransform
from secondorder.layers.layer import Layers, check_leaves
from secondorder.methods.layerwise import (
    check_layers,
    merge_directions,
    on_unassigned,
    with_settings_of,
)
from secondorder.methods.transform import make_transform
from secondorder.methods.weight_decay import WeightDecayForm, with_weight_decay
from secondorder.objective import all_finite, check_has_arrays, check_params, check_split
from secondorder.operators.expectation import (
    Moment,
    expected_curvature,
    expected_operator,
    layer_leaves,
    solve_expected,
)
from secondorder.operators.positive_curvature import block_positive_curvature
from secondorder.sharding import check_sees_batch
from secondorder.solvers import conjugate_gradient
from secondorder.spread import devices_of
from secondorder.tree import accumulation_dtype, label_blocks

Expectation: TypeAlias = Literal["approximate", "exact"]
SolverKind: TypeAlias = Literal["direct", "conjugate_gradient"]


class PositiveCurvatureMetrics(NamedTuple):
    """What is reported; int32 scalars.

    Attributes:
      nonfinite_steps: Batches whose value or gradient was not finite; they changed nothing else.
      nonfinite_curvature: Others whose curvature was not finite, or not positive definite where
        it was factorized; likewise.
      iterations: Of conjugate gradients at the last step, in the block that took most.
    """

    nonfinite_steps: jax.Array
    nonfinite_curvature: jax.Array
    iterations: jax.Array


class ScaleByPositiveCurvatureState(NamedTuple):
    """State of `scale_by_positive_curvature`.

    Attributes:
      count: Steps taken, int32.
      fallback: State of the transform for parameters in no layer.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    fallback: optax.OptState
    metrics: PositiveCurvatureMetrics


class _Settings(NamedTuple):
    """The hyperparameters of the direction."""

    mixing: chex.Numeric
    transform: CurvatureTransform
    expectation: Expectation
    input_moment: Moment
    slope_moment: Moment
    solver: SolverKind
    max_iterations: int
    residual: chex.Numeric
    spread_over: Sequence[str] | None


class _Direction(NamedTuple):
    """The direction by leaf, whether it is finite, and the iterations it took."""

    leaves: dict[int, jax.Array]
    finite: jax.Array
    iterations: jax.Array


def scale_by_positive_curvature(
    layers: Layers,
    *,
    mixing: chex.Numeric = 0.02,
    transform: CurvatureTransform = "abs",
    expectation: Expectation = "approximate",
    input_moment: Moment = "mean",
    slope_moment: Moment = "mean",
    solver: SolverKind = "direct",
    max_iterations: int = 50,
    residual: chex.Numeric = 0.1,
    fallback: optax.GradientTransformation | None = None,
    strict: bool = False,
    spread_over: Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions gradients by the blocks of the positive-curvature Hessian.

    For every weight and every bias by itself, with gradient :math:`g`,

    .. math:: d = ((1 - \alpha) B + \alpha I)^{-1} g

    where ``B`` is the Gauss-Newton block and the curvature of the functions between layers made
    positive. The model is a chain of dense layers with elementwise functions between; the loss is
    convex in its outputs. With the *approximate expectation* the block of a layer's weight is
    :math:`E[x] E[x]^\top \otimes S`, that of its bias :math:`S`, and :math:`S` is passed back from
    layer to layer by mean slopes. Only the direction of the mean input is curved then, the rest of
    the gradient is divided by :math:`\alpha`: made for inputs with a large mean, such as those from
    sigmoids. Where inputs are centered, as with tanh, take ``input_moment="full"``.

    Args:
      layers: The layers of the model, from `find_layers`.
      mixing: :math:`\alpha` in (0, 1), the share of the identity.
      transform: ``"abs"`` takes the absolute values of the functions' curvatures, ``"clip"`` drops
        negative ones, ``"zero"`` drops all, which leaves the Gauss-Newton matrix. Static.
      expectation: ``"approximate"``, or ``"exact"``: products with the blocks of the batch itself,
        each about as many forward passes as there are weights and biases. Static.
      input_moment: ``"mean"``: :math:`E[x] E[x]^\top`; ``"full"``: :math:`E[x x^\top]`, which takes
        an eigendecomposition of the size of each layer's inputs. Approximate only. Static.
      slope_moment: ``"mean"``: :math:`E[\varphi'] E[\varphi']^\top`; ``"full"``:
        :math:`E[\varphi' \varphi'^\top]`. Approximate only. Static.
      solver: How approximate blocks are solved: ``"direct"``, exactly, or ``"conjugate_gradient"``,
        all blocks in lockstep, as in the paper. Exact blocks always are by the latter. Static.
      max_iterations: Most iterations of conjugate gradients. Static.
      residual: A block ends at this residual relative to its gradient, at least 0.
      fallback: Transform of the gradients of parameters in no layer. Default: the gradient itself.
      strict: Whether parameters in no layer are an error, and weights with uses that see them as
        another matrix.
      spread_over: Names of the axes of the parameters' mesh over which approximate blocks, and the
        work on them, are spread; None for all axes, ``()`` for none. Static.

    Returns:
      A transform whose ``update`` needs ``params`` and a ``value_fn`` that is an `Objective`;
      ``curvature_fn``, an `Objective` on another batch, replaces it for curvature. Batches whose
      value, gradients or curvature are not finite give a zero update and change only a counter.

    Raises:
      ValueError: For hyperparameters out of range, or with ``strict`` for a parameter in no layer;
        in ``update`` if the model is no chain of dense layers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x, y = jnp.ones((8, 3)), jnp.zeros((8, 2))
      >>> objective = so.Objective(
      ...     lambda p: jax.nn.sigmoid(x @ p[0]) @ p[1], lambda z: jnp.mean((z - y) ** 2))
      >>> params = (jnp.ones((3, 4)), jnp.ones((4, 2)))
      >>> direction = so.scale_by_positive_curvature(so.find_layers(objective, params))
      >>> tx = optax.chain(direction, optax.scale(-0.1))
      >>> state = tx.init(params)
      >>> value, grads = jax.value_and_grad(objective)(params)
      >>> updates, state = tx.update(grads, state, params, value_fn=objective)
      >>> float(objective(optax.apply_updates(params, updates))) < 0.9 * float(value)
      True

    References:
      Chen, Chou, Chang (2018), arXiv 1802.06502.
    """
    settings = _Settings(
        mixing=mixing,
        transform=transform,
        expectation=expectation,
        input_moment=input_moment,
        slope_moment=slope_moment,
        solver=solver,
        max_iterations=max_iterations,
        residual=residual,
        spread_over=spread_over,
    )
    _check_hyperparameters(settings)
    check_layers(layers, strict)
    if not len(layers):
        raise ValueError("scale_by_positive_curvature: there is no layer in `layers`.")
    others = on_unassigned(fallback, layers)

    def init(params: chex.ArrayTree) -> ScaleByPositiveCurvatureState:
        check_params(params, "scale_by_positive_curvature")
        if jax.tree.leaves(params):  # There are none in what `optax.tree.map_params` passes.
            check_leaves(layers, params)
        return ScaleByPositiveCurvatureState(
            count=jnp.zeros((), jnp.int32),
            fallback=others.init(params),
            metrics=PositiveCurvatureMetrics(*(jnp.zeros((), jnp.int32) for _ in range(3))),
        )

    def update(
        updates: chex.ArrayTree,
        state: ScaleByPositiveCurvatureState,
        params: chex.ArrayTree | None = None,
        *,
        value: jax.Array | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        curvature_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByPositiveCurvatureState]:
        check_has_arrays(params, "scale_by_positive_curvature")
        objective: Any = value_fn if curvature_fn is None else curvature_fn
        name = "value_fn" if curvature_fn is None else "curvature_fn"
        check_split(objective, "scale_by_positive_curvature", name)
        check_sees_batch("scale_by_positive_curvature", params)

        # 1. The gradients of the layers; zero if the batch is not finite.
        finite = all_finite((updates, value))
        dtype = accumulation_dtype(params)
        gradient = {
            index: jnp.where(finite, leaf.astype(dtype), 0)
            for index, leaf in layer_leaves(updates, layers).items()
        }

        # 2. The direction of each weight and each bias, the fallback for the rest.
        with jax.named_scope("positive_curvature"):
            direction = _solve(settings, layers, objective, params, gradient)
        moves = finite & direction.finite
        rest, fallback_state = updates, state.fallback
        if fallback is not None:
            rest, after = others.update(updates, state.fallback, params, **extra_args)
            fallback_state = optax.tree_utils.tree_where(moves, after, state.fallback)

        # 3. Nothing but a counter, if a number was not finite.
        merged = merge_directions(direction.leaves, rest, params)
        merged = jax.tree.map(lambda leaf: jnp.where(moves, leaf, jnp.zeros_like(leaf)), merged)
        metrics = PositiveCurvatureMetrics(
            nonfinite_steps=state.metrics.nonfinite_steps + ~finite,
            nonfinite_curvature=state.metrics.nonfinite_curvature + (finite & ~direction.finite),
            iterations=jnp.where(moves, direction.iterations, state.metrics.iterations),
        )
        count = jnp.where(moves, optax.safe_increment(state.count), state.count)
        return merged, ScaleByPositiveCurvatureState(count, fallback_state, metrics)

    return make_transform("scale_by_positive_curvature", init, update)


def _solve(
    settings: _Settings,
    layers: Layers,
    objective: Any,
    params: chex.ArrayTree,
    gradient: dict[int, jax.Array],
) -> _Direction:
    """The direction of all layers."""
    if settings.expectation == "exact":
        operator = block_positive_curvature(objective, params, layers, settings.transform)
    else:
        devices = devices_of(params, settings.spread_over)
        curvatures = expected_curvature(
            objective,
            params,
            layers,
            transform=settings.transform,
            input_moment=settings.input_moment,
            slope_moment=settings.slope_moment,
            devices=devices,
        )
        if settings.solver == "direct":
            leaves = solve_expected(curvatures, gradient, layers, settings.mixing, devices)
            return _Direction(leaves, all_finite(leaves), jnp.zeros((), jnp.int32))
        operator = expected_operator(curvatures, params, layers)
    result = conjugate_gradient(
        operator.scaled(1 - settings.mixing).damped(settings.mixing),
        gradient,
        label_blocks(lambda path: path, gradient),
        max_iterations=settings.max_iterations,
        progress=None,
        residual=settings.residual,
    )
    return _Direction(result.solution, jnp.all(result.finite), jnp.max(result.iterations))


def _check_hyperparameters(settings: _Settings) -> None:
    """Raises `ValueError` for whatever can be judged before tracing."""
    check_range("mixing", settings.mixing, low=0, high=1, open_low=True)
    check_range("residual", settings.residual, low=0)
    check_choice("transform", settings.transform, get_args(CurvatureTransform))
    check_choice("expectation", settings.expectation, get_args(Expectation))
    check_choice("input_moment", settings.input_moment, get_args(Moment))
    check_choice("slope_moment", settings.slope_moment, get_args(Moment))
    check_choice("solver", settings.solver, get_args(SolverKind))
    check_static_count("max_iterations", settings.max_iterations)


@with_settings_of(scale_by_positive_curvature)
def positive_curvature_hessian(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    weight_decay: chex.Numeric = 0.0,
    weight_decay_form: WeightDecayForm = "l2",
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""BDA-PCH: Newton's method with the blocks of the positive-curvature Hessian.

    .. math:: \theta_{k+1} = \theta_k - \eta\, ((1 - \alpha) B + \alpha I)^{-1} g

    for every weight and every bias; see `scale_by_positive_curvature` for the blocks ``B`` and for
    all hyperparameters that are not listed here. The paper's settings are::

        so.positive_curvature_hessian(0.1, layers, mixing=0.02, solver="conjugate_gradient",
                                      max_iterations=50, residual=0.1)

    with batches of 500; for tanh, add ``input_moment="full"``.

    Args:
      learning_rate: Step size :math:`\eta`, or a schedule of it.
      layers: The layers of the model, from `find_layers`.
      weight_decay: Coefficient :math:`\tau \ge 0` of the decay, on all parameters.
      weight_decay_form: ``"l2"`` adds :math:`\tau\theta` to the gradient before it is
        preconditioned, the gradient of :math:`\tau|\theta|^2/2`, which curvature leaves out;
        ``"decoupled"`` adds it to the direction.
      **settings: Hyperparameters of `scale_by_positive_curvature`.

    Returns:
      The optimizer. Its ``update`` needs ``params`` and a ``value_fn`` that is an `Objective`.

    Raises:
      ValueError: For hyperparameters out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> x = jnp.linspace(-1.0, 1.0, 16)[:, None]
      >>> objective = so.Objective(
      ...     lambda p: jax.nn.sigmoid(x @ p["w"] + p["b"]) @ p["v"],
      ...     lambda z: jnp.mean((z - x**2) ** 2))
      >>> params = {"w": jnp.array([[3.0, -3.0]]), "b": -jnp.ones(2), "v": jnp.zeros((2, 1))}
      >>> tx = so.positive_curvature_hessian(0.1, so.find_layers(objective, params))
      >>> state = tx.init(params)
      >>> for _ in range(12):
      ...     value, grads = jax.value_and_grad(objective)(params)
      ...     updates, state = tx.update(
      ...         grads, state, params, value=value, grad=grads, value_fn=objective)
      ...     params = optax.apply_updates(params, updates)
      >>> float(value) < 0.4 * float(jnp.mean(x**4))
      True

    References:
      Chen, Chou, Chang (2018), arXiv 1802.06502.
    """
    direction = scale_by_positive_curvature(layers, **settings)
    links = with_weight_decay((direction,), weight_decay, weight_decay_form)
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate))
