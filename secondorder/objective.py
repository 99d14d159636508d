"""What a method is told about the loss: `Objective`, and the checks of the extra arguments.

Every method is called as ``tx.update(grads, state, params, value=..., grad=..., value_fn=...)``.
``value_fn`` closes over the batch and maps parameters to a scalar; methods that need the
Gauss-Newton matrix need the split of that map into model and loss, which `Objective` carries.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import chex
import jax
import jax.numpy as jnp

Params = TypeVar("Params")

_CALL = "tx.update(grads, state, params, value=value, grad=grads, value_fn=objective)"


@dataclasses.dataclass(frozen=True, eq=False)
class Objective(Generic[Params]):
    r"""A scalar objective that remembers its split into a model and a loss.

    .. math:: f(\theta) = \ell(z), \qquad z = \mathrm{model}(\theta)

    Both functions close over the batch. An objective is a plain ``value_fn``: it can be called,
    differentiated and passed wherever optax takes one.

    Args:
      model: Maps the parameters to the outputs ``z``, an array or pytree of arrays. With
        ``has_aux`` it returns ``(z, aux)``; ``aux`` is any pytree, such as the new batch
        statistics of a normalization layer.
      loss: Maps the outputs ``z`` to a scalar, usually a mean over the batch.
      has_aux: Whether ``model`` returns ``(z, aux)``. The objective then returns
        ``(value, aux)``, as `jax.value_and_grad` with ``has_aux=True`` expects.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import secondorder as so
      >>> x, y = jnp.ones((4, 3)), jnp.zeros((4, 2))
      >>> objective = so.Objective(lambda w: x @ w, lambda z: jnp.mean((z - y) ** 2))
      >>> value, grad = jax.value_and_grad(objective)(jnp.ones((3, 2)))
      >>> float(value)
      9.0
    """

    model: Callable[[Params], Any]
    loss: Callable[[Any], jax.Array]
    has_aux: bool = False

    def __post_init__(self) -> None:
        for name in ("model", "loss"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"Objective: `{name}` must be callable, got {type(getattr(self, name))}; write "
                    "so.Objective(lambda p: model.apply(p, x), lambda z: loss(z, y))."
                )

    def __call__(self, params: Params) -> Any:
        """Evaluates the objective.

        Args:
          params: The parameters, a pytree of arrays.

        Returns:
          The scalar value, or ``(value, aux)`` with ``has_aux``.
        """
        if self.has_aux:
            outputs, aux = self.model(params)
            return self.loss(outputs), aux
        return self.loss(self.model(params))


def check_params(params: Any, method: str) -> None:
    """Raises if the parameters were not passed to ``update``.

    Args:
      params: The argument as ``update`` received it.
      method: Name of the method, for the message.

    Raises:
      ValueError: If ``params`` is None.
    """
    if params is None:
        raise ValueError(f"{method} needs the current `params`; call {_CALL}.")


def check_value_fn(value_fn: Any, method: str, name: str = "value_fn") -> None:
    """Raises if no callable objective was passed to ``update``.

    Args:
      value_fn: The argument as ``update`` received it.
      method: Name of the method, for the message.
      name: Name of the argument, for the message.

    Raises:
      ValueError: If ``value_fn`` is missing.
      TypeError: If it cannot be called.
    """
    if value_fn is None:
        raise ValueError(
            f"{method} needs `{name}`, the objective params -> scalar on the current batch; "
            f"call {_CALL}."
        )
    if not callable(value_fn):
        raise TypeError(
            f"{method}: `{name}` must be callable (params -> scalar), got {type(value_fn)}; "
            f"call {_CALL}."
        )


def check_split(value_fn: Any, method: str, name: str = "value_fn") -> None:
    """Raises unless the objective is split into model and loss.

    Args:
      value_fn: The argument as ``update`` received it.
      method: Name of the method, for the message.
      name: Name of the argument, for the message.

    Raises:
      ValueError: If it is missing.
      TypeError: If it is a plain callable, which hides the outputs of the model.
    """
    check_value_fn(value_fn, method, name)
    if not isinstance(value_fn, Objective):
        raise TypeError(
            f"{method} needs the split of the objective into model and loss, and `{name}` is a "
            "plain callable; write so.Objective(lambda p: model.apply(p, x), "
            f"lambda z: loss(z, y)) and pass it as `{name}`."
        )


def check_value(value: Any, method: str) -> None:
    """Raises unless a value (or its abstract form) is one real floating-point scalar.

    Args:
      value: An array or `jax.ShapeDtypeStruct`.
      method: Name of the caller, for the message.

    Raises:
      TypeError: If it is not a real scalar.
    """
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{method}: the objective must return one real scalar, got shape {value.shape} and "
            f"dtype {value.dtype}; reduce the per-example losses with jnp.mean."
        )


def value_and_aux(value_fn: Callable[[Params], Any]) -> Callable[[Params], tuple[jax.Array, Any]]:
    """Brings both forms of an objective to the one that returns ``(value, aux)``.

    Args:
      value_fn: Maps parameters to ``value`` or to ``(value, aux)``.

    Returns:
      A function that returns ``(value, aux)``; ``aux`` is None where there is none.

    Raises:
      TypeError: When called, if the value is not one real scalar.

    Example:
      >>> from secondorder.objective import value_and_aux
      >>> import jax.numpy as jnp
      >>> value_and_aux(jnp.sum)(jnp.ones(3))[1] is None
      True
    """

    def normalized(params: Params) -> tuple[jax.Array, Any]:
        output = value_fn(params)
        value, aux = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
        value = jnp.asarray(value)
        check_value(value, "value_fn")
        return value, aux

    return normalized


def value_and_grad(value_fn: Callable[[Params], Any], params: Params) -> tuple[jax.Array, Params]:
    """Value and gradient of an objective at a trial point, whatever its form; aux is dropped.

    Args:
      value_fn: Maps parameters to ``value`` or to ``(value, aux)``.
      params: The point, a pytree of arrays.

    Returns:
      The scalar value and the gradient, a pytree like ``params``.

    Raises:
      TypeError: If the value is not one real scalar.

    Example:
      >>> from secondorder.objective import value_and_grad
      >>> import jax.numpy as jnp
      >>> value, grad = value_and_grad(lambda p: (jnp.sum(p**2), "aux"), jnp.ones(2))
      >>> grad.tolist()
      [2.0, 2.0]
    """
    (value, _), grad = jax.value_and_grad(value_and_aux(value_fn), has_aux=True)(params)
    return value, grad


def all_finite(tree: chex.ArrayTree) -> jax.Array:
    """Whether every element of every array of a pytree is finite.

    Judged by the sum of each array, which costs and compiles to much less than a test of each
    element. Arrays whose sum overflows, in float32 or wider, count as not finite.

    Args:
      tree: A pytree of arrays of any shapes.

    Returns:
      A boolean scalar; True for an empty tree.

    Example:
      >>> from secondorder.objective import all_finite
      >>> import jax.numpy as jnp
      >>> bool(all_finite({"a": jnp.ones(2), "b": jnp.array(jnp.nan)}))
      False
    """
    sums = [
        jnp.sum(leaf, dtype=jnp.promote_types(jnp.result_type(leaf), jnp.float32))
        for leaf in jax.tree.leaves(tree)
    ]
    return jnp.isfinite(jnp.sum(jnp.stack(sums))) if sums else jnp.asarray(True)
