r"""One update from several micro-batches that arrive one after another.

`optax.MultiSteps` averages gradients, and hands on the objective of the last micro-batch. Methods
of this package evaluate the objective, and make their curvature of it, so that the last micro-batch
alone would decide. An objective is a closure and cannot be kept in a state; what can be kept is
the micro-batches. At the end of a round the objective is made again on all of them, as
`Microbatches`: one piece at a time, in the memory of one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from secondorder.checks import check_static_count
from secondorder.objective import Microbatches, all_finite, check_given
from secondorder.sharding import constrain, shard_like
from secondorder.tree import accumulation_dtype, zeros_vector

_CALL = "tx.update(grads, state, params, value=value, grad=grads, batch=batch)"


class AccumulateMetrics(NamedTuple):
    """What accumulation reports; int32 scalars.

    Attributes:
      micro_batches: In the present round so far.
      skipped_batches: Micro-batches whose value or gradient was not finite, since `init`; they
        changed nothing else.
    """

    micro_batches: jax.Array
    skipped_batches: jax.Array


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      inner: State of the transform.
      gradients: Sum of the updates of this round, like the parameters, float32 or wider.
      value: Sum of the values.
      batches: The micro-batches of this round, a pytree of arrays ``(every, ...)``.
      metrics: What is reported.
    """

    inner: optax.OptState
    gradients: chex.ArrayTree
    value: jax.Array
    batches: chex.ArrayTree
    metrics: AccumulateMetrics


def accumulate(
    inner: optax.GradientTransformation,
    every: int,
    objective_on: Callable[[Any], Any],
    batch: chex.ArrayTree,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes one step from several micro-batches, the one that their union would give.

    .. math::
      g = \frac1k \sum_{i=1}^k g_i, \qquad f(\theta) = \frac1k \sum_{i=1}^k f_i(\theta)

    The first ``k - 1`` updates of a round are zero, and evaluate nothing: the micro-batch is
    stored, and its gradient added. The ``k``-th one calls the transform with the mean gradient and
    with ``f`` as its ``value_fn``, which is `Microbatches` of all that was stored. So every method
    does what it does with one batch ``k`` times as large, trial steps included, and holds the
    activations of one micro-batch at a time. The state is larger by ``k`` micro-batches and a
    gradient. Methods that share a pass with the caller's gradient do not share it here: K-BFGS
    evaluates the present parameters once more.

    It stands outside of `masked`, `partition` and of whatever else belongs to a step, such as
    weight decay: ``so.accumulate(optax.chain(...), ...)``.

    Args:
      inner: A method of this package, or any transform.
      every: :math:`k`, micro-batches to a step, at least 1. Static.
      objective_on: Maps a micro-batch to its objective, an `Objective` or a callable. The mean of
        the values must be the objective on the union, as it is for means over equally many cases.
      batch: A micro-batch, or the `jax.ShapeDtypeStruct` of one. Its shapes, dtypes and shardings
        are those of all; its values do not matter. What differs between micro-batches belongs to
        it, such as the seed of dropout.

    Returns:
      A transform whose ``update`` needs ``params`` and ``batch``, a micro-batch; ``value``,
      ``grad`` and others are as ever. A ``value_fn`` is replaced; of several ``curvature_fn`` in a
      round the last one is used. Micro-batches whose value or gradient is not finite are skipped,
      and the round takes one more.

    Raises:
      TypeError: If ``objective_on`` is not callable.
      ValueError: If ``every`` is not a positive integer, or ``batch`` has no arrays; in ``update``
        if ``params`` or ``batch`` is missing, or a micro-batch has other shapes or dtypes than the
        first.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import secondorder as so
      >>> def objective_on(batch):
      ...     x, y = batch
      ...     return so.Objective(lambda w: x @ w, lambda z: jnp.mean((z - y) ** 2))
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 3))
      >>> batches, params = [(x[i], x[i] @ jnp.ones(3)) for i in range(2)], jnp.zeros(3)
      >>> tx = so.accumulate(so.gauss_newton(), 2, objective_on, batches[0])
      >>> @jax.jit
      ... def step(params, state, batch):
      ...     value, grads = jax.value_and_grad(objective_on(batch))(params)
      ...     updates, state = tx.update(grads, state, params, value=value, grad=grads, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> state = tx.init(params)
      >>> for batch in batches:
      ...     params, state = step(params, state, batch)
      ...     print(bool(jnp.any(params)))
      False
      True
    """
    check_static_count("every", every)
    if not callable(objective_on):
        raise TypeError(
            "accumulate: `objective_on` must be callable (batch -> so.Objective), got "
            f"{type(objective_on)}."
        )
    inner = optax.with_extra_args_support(inner)
    template = jax.tree.map(_describe, batch)
    if not jax.tree.leaves(template):
        raise ValueError(f"accumulate: `batch` has no arrays, got {batch!r}.")

    def init(params: chex.ArrayTree) -> AccumulateState:
        check_given(params, "accumulate")
        return AccumulateState(
            inner=inner.init(params),
            gradients=zeros_vector(params),
            value=jnp.zeros((), accumulation_dtype(params)),
            batches=jax.tree.map(lambda leaf: _empty(leaf, every), template),
            metrics=AccumulateMetrics(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
        )

    def update(
        updates: chex.ArrayTree,
        state: AccumulateState,
        params: chex.ArrayTree | None = None,
        *,
        batch: Any = None,
        value: jax.Array | None = None,
        grad: chex.ArrayTree | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, AccumulateState]:
        del value_fn  # It is of this micro-batch alone.
        check_given(params, "accumulate")
        _check_batch(batch, template)

        # 1. The micro-batch joins the round, unless it is not finite.
        state = _store(state, batch, updates, value)
        complete = state.metrics.micro_batches == every

        # 2. A step with what the round has gathered, or none.
        def step(state: AccumulateState) -> tuple[chex.ArrayTree, optax.OptState]:
            mean = jax.tree.map(lambda g, u: (g / every).astype(u.dtype), state.gradients, updates)
            known: dict[str, Any] = {"value_fn": Microbatches(objective_on, state.batches)}
            if value is not None:
                known["value"] = (state.value / every).astype(jnp.result_type(value))
            if _are_same(grad, updates):  # A gradient that is not the updates is not averaged.
                known["grad"] = mean
            final, new = inner.update(mean, state.inner, params, **known, **extra_args)
            return jax.tree.map(lambda f, u: shard_like(f.astype(u.dtype), u), final, mean), new

        def wait(state: AccumulateState) -> tuple[chex.ArrayTree, optax.OptState]:
            return jax.tree.map(jnp.zeros_like, updates), state.inner

        final, new = jax.lax.cond(complete, step, wait, state)
        count = jnp.where(complete, 0, state.metrics.micro_batches)
        return final, state._replace(inner=new, metrics=state.metrics._replace(micro_batches=count))

    return optax.GradientTransformationExtraArgs(init, update)


def _store(
    state: AccumulateState, batch: Any, updates: chex.ArrayTree, value: jax.Array | None
) -> AccumulateState:
    """Adds a micro-batch to the round; one that is not finite changes nothing but a counter."""
    usable = all_finite((updates, value))
    index = state.metrics.micro_batches

    def add(total: jax.Array, term: jax.Array) -> jax.Array:
        term = shard_like(term.astype(total.dtype), total)
        return jnp.where(usable, jnp.where(index == 0, term, total + term), total)

    def write(stored: jax.Array, leaf: jax.Array) -> jax.Array:
        old = jax.lax.dynamic_index_in_dim(stored, index, 0, keepdims=False)
        new = jnp.where(usable, shard_like(jnp.asarray(leaf, stored.dtype), old), old)
        return jax.lax.dynamic_update_index_in_dim(stored, new, index, 0)

    metrics = AccumulateMetrics(index + usable, state.metrics.skipped_batches + ~usable)
    return AccumulateState(
        inner=state.inner,
        gradients=jax.tree.map(add, state.gradients, updates),
        value=state.value if value is None else add(state.value, jnp.asarray(value)),
        batches=jax.tree.map(write, state.batches, batch),
        metrics=metrics,
    )


def _are_same(grad: chex.ArrayTree | None, updates: chex.ArrayTree) -> bool:
    """Whether the gradient among the extra arguments is what was passed as updates."""
    pairs = zip(jax.tree.leaves(grad), jax.tree.leaves(updates), strict=False)
    return grad is not None and all(g is u for g, u in pairs)


# The micro-batches in the state.


def _describe(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding of a leaf of a batch."""
    dtype: Any = jax.dtypes.canonicalize_dtype(jnp.result_type(leaf), allow_extended_dtype=True)
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        raise ValueError(
            "accumulate: `batch` holds typed keys, which a state cannot; put "
            "jax.random.key_data(key) into it, and jax.random.wrap_key_data into `objective_on`."
        )
    sharding = getattr(leaf, "sharding", None)
    known = isinstance(sharding, jax.sharding.NamedSharding)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype, sharding=sharding if known else None)


def _empty(leaf: jax.ShapeDtypeStruct, every: int) -> jax.Array:
    """Room for the micro-batches of a round, each sharded as the one that is known."""
    zeros = jnp.zeros((every, *leaf.shape), leaf.dtype)
    if leaf.sharding is None:
        return zeros
    spec = jax.sharding.PartitionSpec(None, *leaf.sharding.spec)
    return constrain(zeros, jax.sharding.NamedSharding(leaf.sharding.mesh, spec))


def _check_batch(batch: Any, template: chex.ArrayTree) -> None:
    """Raises unless a batch has the form of the first one."""
    if batch is None:
        raise ValueError(f"accumulate needs `batch`, the micro-batch; call {_CALL}.")
    found, expected = (
        {
            jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (jax.tree.map(_describe, batch), template)
    )
    if found != expected:
        wrong = [
            f"batch{path}: {found.get(path, 'missing')}, first {expected.get(path, 'missing')}"
            for path in {**expected, **found}
            if found.get(path) != expected.get(path)
        ]
        raise ValueError(
            "accumulate: all micro-batches must have the shapes and dtypes of the first:\n  "
            + "\n  ".join(wrong)
            + "\nLeave an incomplete last one out, or fill it with cases of weight zero and have "
            "`objective_on` divide by a number that is the same for all."
        )
