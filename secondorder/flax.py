"""Training steps for Flax, Linen and NNX, that hand the objective to the optimizer.

Flax's own train state keeps the objective from the optimizer: ``apply_gradients`` takes additional
arguments for fields of its own. Needs Flax (``pip install 'secondorder[flax]'``), which the rest of
the package does not.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state

from secondorder.layers import Layers, find_layers
from secondorder.metrics import metrics
from secondorder.objective import Objective

Loss: TypeAlias = Callable[[Any, Any], jax.Array]
Metrics: TypeAlias = dict[str, jax.Array]


class TrainState(train_state.TrainState):  # type: ignore[misc, no-untyped-call]
    """Flax's train state, whose gradients are applied with the objective that they are of.

    Attributes:
      step, apply_fn, params, tx, opt_state: As in `flax.training.train_state.TrainState`.
      model_state: The collections of variables that are not parameters, such as
        ``{"batch_stats": ...}``; empty if there are none.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flax.linen as nn
      >>> import secondorder as so
      >>> from secondorder.flax import TrainState
      >>> model, x = nn.Dense(1), jnp.ones((4, 2))
      >>> variables = model.init(jax.random.key(0), x)
      >>> state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=so.lsr1())
      >>> objective = state.objective(lambda z: jnp.mean((z - 1.0) ** 2), x)
      >>> value, grads = jax.value_and_grad(objective)(state.params)
      >>> state = state.apply_gradients(grads=grads, value=value, value_fn=objective)
      >>> bool(objective(state.params) < value)
      True
    """

    model_state: Any = dataclasses.field(default_factory=dict)

    def objective(
        self,
        loss: Callable[[Any], jax.Array],
        *inputs: Any,
        rngs: Mapping[str, jax.Array] | None = None,
        **call: Any,
    ) -> Objective[Any]:
        """The objective of the parameters on a batch, with its split into model and loss.

        Args:
          loss: Maps the outputs of the model to a scalar.
          *inputs: Of the model.
          rngs: Keys by name, for instance of dropout. They are part of the objective, which is so
            the same function wherever the optimizer evaluates it.
          **call: Other arguments of the model, such as ``train=True``.

        Returns:
          The objective; its aux is the new `model_state` if there is one.
        """
        mutable = list(self.model_state)

        def model(params: Any) -> Any:
            variables = {"params": params, **self.model_state}
            return self.apply_fn(
                variables, *inputs, rngs=rngs, **({"mutable": mutable} if mutable else {}), **call
            )

        return Objective(model, loss, has_aux=bool(mutable))

    @classmethod
    def create(cls, **fields: Any) -> "TrainState":
        """A state before the first step.

        Args:
          **fields: ``apply_fn``, ``params``, ``tx`` and, if there is one, ``model_state``.

        Returns:
          The state.
        """
        # An array from the beginning: a Python number would compile a first step of its own.
        state: TrainState = super().create(**fields)  # type: ignore[no-untyped-call]
        return state.replace(step=jnp.zeros((), jnp.int32))

    def apply_gradients(
        self,
        *,
        grads: Any,
        value: jax.Array | None = None,
        value_fn: Callable[[Any], Any] | None = None,
        curvature_fn: Callable[[Any], Any] | None = None,
        **fields: Any,
    ) -> "TrainState":
        """The state after a step of the optimizer.

        Args:
          grads: Gradients like the parameters.
          value: The objective at the parameters.
          value_fn: The objective, for optimizers that evaluate it.
          curvature_fn: An objective on another batch, for the curvature.
          **fields: Of this state, to be replaced.

        Returns:
          The new state.
        """
        given = {"value": value, "value_fn": value_fn, "curvature_fn": curvature_fn}
        known = {name: argument for name, argument in given.items() if argument is not None}
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, grad=grads, **known)
        return self.replace(
            step=self.step + 1,
            params=optax.apply_updates(self.params, updates),
            opt_state=opt_state,
            **fields,
        )


def make_train_step(
    loss: Loss,
    *,
    inputs: Callable[[Any], Any] = operator.itemgetter(0),
    rngs: Sequence[str] = (),
    **call: Any,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A training step of a Linen model.

    Args:
      loss: Maps the outputs of the model and the batch to a scalar.
      inputs: Finds the inputs of the model in a batch; by default its first entry.
      rngs: Names of the keys that the model wants, such as ``("dropout",)``, which are split from
        that of the step.
      **call: Other arguments of the model, such as ``train=True``.

    Returns:
      A function of a `TrainState`, a batch and, with ``rngs``, a key, to be jitted. It returns the
      new state, and a dict of the loss and of what the optimizer reports.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import secondorder as so
      >>> from secondorder.flax import TrainState, make_train_step
      >>> model, batch = nn.Dense(1), (jnp.ones((4, 2)), jnp.ones((4, 1)))
      >>> params = model.init(jax.random.key(0), batch[0])["params"]
      >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=so.lsr1())
      >>> step = jax.jit(make_train_step(lambda z, batch: jnp.mean((z - batch[1]) ** 2)))
      >>> for _ in range(10):
      ...     state, metrics = step(state, batch)
      >>> bool(metrics["loss"] < 1e-4), "lsr1/ratio" in metrics
      (True, True)
    """

    def train_step(
        state: TrainState, batch: Any, key: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        objective = state.objective(
            lambda outputs: loss(outputs, batch),
            inputs(batch),
            rngs=_split(rngs, key),
            **call,
        )
        has_aux = bool(state.model_state)
        value, grads = jax.value_and_grad(objective, has_aux=has_aux)(state.params)
        value, model_state = value if has_aux else (value, state.model_state)
        state = state.apply_gradients(
            grads=grads,
            value=value,
            value_fn=objective.without_aux(),
            model_state=model_state,
        )
        return state, {"loss": value, **metrics(state.opt_state)}

    return train_step


def make_nnx_train_step(
    loss: Loss, *, inputs: Callable[[Any], Any] = operator.itemgetter(0)
) -> Callable[[Any, nnx.Optimizer[Any], Any], Metrics]:
    """A training step of an NNX model, with batch statistics and dropout.

    Args:
      loss: Maps the outputs of the model and the batch to a scalar.
      inputs: Finds the inputs of the model in a batch; by default its first entry.

    Returns:
      A function of the model, its `flax.nnx.Optimizer` and a batch, to be put under `flax.nnx.jit`.
      It changes both, and returns a dict of the loss and of what the optimizer reports. Wherever
      the optimizer evaluates the objective, random streams are those of the step, and statistics
      those from before it; the new ones are kept once.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import secondorder as so
      >>> from secondorder.flax import make_nnx_train_step
      >>> model, batch = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), (jnp.ones((4, 2)), jnp.ones((4, 1)))
      >>> optimizer = nnx.Optimizer(model, so.lsr1(), wrt=nnx.Param)
      >>> step = nnx.jit(make_nnx_train_step(lambda z, batch: jnp.mean((z - batch[1]) ** 2)))
      >>> for _ in range(10):
      ...     metrics = step(model, optimizer, batch)
      >>> bool(metrics["loss"] < 1e-4)
      True
    """

    def train_step(model: Any, optimizer: nnx.Optimizer[Any], batch: Any) -> Metrics:
        graph, params, *rest = nnx.split(model, optimizer.wrt, ...)

        def forward(params: Any) -> tuple[Any, Any]:
            moved = nnx.merge(graph, params, *rest, copy=True)
            outputs = moved(inputs(batch))
            return outputs, nnx.state(moved, nnx.Not(optimizer.wrt))

        objective = Objective(forward, lambda outputs: loss(outputs, batch), has_aux=True)
        (value, after), grads = jax.value_and_grad(objective, has_aux=True)(params)
        optimizer.update(model, grads, value=value, grad=grads, value_fn=objective.without_aux())
        nnx.update(model, after)
        reported = metrics(optimizer.opt_state)
        return {"loss": value, **{name: number[...] for name, number in reported.items()}}

    return train_step


def find_nnx_layers(
    model: Any,
    loss: Loss,
    batch: Any,
    *,
    inputs: Callable[[Any], Any] = operator.itemgetter(0),
    wrt: Any = nnx.Param,
) -> Layers:
    """The layers of an NNX model, for methods that want them; see `secondorder.find_layers`.

    Args:
      model: The model.
      loss: Maps its outputs and the batch to a scalar.
      batch: One batch; its values do not matter.
      inputs: Finds the inputs of the model in a batch; by default its first entry.
      wrt: The filter of the parameters that the optimizer is made with.

    Returns:
      The layers, of the pytree that `flax.nnx.Optimizer` hands to its transform.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import secondorder as so
      >>> from secondorder.flax import find_nnx_layers
      >>> model, batch = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), (jnp.ones((4, 2)), jnp.ones((4, 1)))
      >>> layers = find_nnx_layers(model, lambda z, batch: jnp.mean((z - batch[1]) ** 2), batch)
      >>> optimizer = nnx.Optimizer(model, so.kbfgs(0.1, layers), wrt=nnx.Param)
      >>> len(layers)
      1
    """
    graph, params, *rest = nnx.split(model, wrt, ...)

    def objective(params: Any) -> jax.Array:
        return loss(nnx.merge(graph, params, *rest, copy=True)(inputs(batch)), batch)

    return find_layers(objective, params)


def _split(names: Sequence[str], key: jax.Array | None) -> dict[str, jax.Array] | None:
    if not names:
        return None
    if key is None:
        raise ValueError(
            f"The model wants keys for {', '.join(names)}: call step(state, batch, key)."
        )
    return dict(zip(names, jax.random.split(key, len(names)), strict=True))
