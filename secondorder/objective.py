"""What a method is told about the loss: `Objective`, and the checks of the extra arguments.

Every method is called as ``tx.update(grads, state, params, value=..., grad=..., value_fn=...)``.
``value_fn`` closes over the batch and maps parameters to a scalar; methods that need the
Gauss-Newton matrix need the split of that map into model and loss, which `Objective` carries, or
`Microbatches`, its mean over the pieces of a batch too large for one pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import chex
import jax
import jax.numpy as jnp

from secondorder.checks import check_static_count
from secondorder.jaxprs import canonical_convolutions

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

    def without_aux(self) -> "Objective[Params]":
        """The same objective, whose value comes alone, as optax's line searches want it.

        Returns:
          The objective.
        """
        if not self.has_aux:
            return self
        return dataclasses.replace(self, model=lambda params: self.model(params)[0], has_aux=False)

    def with_loss(self, loss: Callable[[Any], jax.Array]) -> "Objective[Params]":
        """Another objective of the same model.

        Args:
          loss: Maps the outputs ``z`` to a scalar.

        Returns:
          The objective.
        """
        return dataclasses.replace(self, loss=loss)


@dataclasses.dataclass(frozen=True, eq=False)
class Microbatches(Generic[Params]):
    r"""A split objective over a large batch that is evaluated piece by piece.

    .. math:: f(\theta) = \frac1k \sum_{i=1}^k f_i(\theta), \qquad f_i \text{ on the } i
        \text{-th of } k \text{ equal pieces of the batch}

    It is a ``value_fn`` as `Objective` is, and stands where one is asked for. Its gradient and the
    products with its curvature matrices hold the activations of one piece at a time. They pay for
    it in time: the gradient repeats the forward pass, 4 instead of 3 forward passes; every
    product linearizes each piece again, about 5 instead of 4.

    Args:
      objective_on: Maps one piece of the batch to its `Objective`, or to any callable where no
        split is needed. The mean of these values must be the objective on the whole batch, as it
        is for a mean over cases.
      batches: The pieces, a pytree of arrays ``(k, ...)``; or see `split`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import secondorder as so
      >>> from secondorder.objective import Microbatches
      >>> x, y = jnp.ones((6, 3)), jnp.zeros((6, 2))
      >>> def objective_on(batch):
      ...     x, y = batch
      ...     return so.Objective(lambda w: x @ w, lambda z: jnp.mean((z - y) ** 2))
      >>> objective = Microbatches.split(objective_on, (x, y), size=2)
      >>> float(objective(jnp.ones((3, 2)))), objective.pieces
      (9.0, 3)
    """

    objective_on: Callable[[Any], Objective[Params]]
    batches: Any

    def __post_init__(self) -> None:
        if not callable(self.objective_on):
            raise TypeError(
                "Microbatches: `objective_on` must be callable (batch -> so.Objective), got "
                f"{type(self.objective_on)}."
            )
        _leading_axis(self.batches, "Microbatches: `batches`")

    @classmethod
    def split(
        cls, objective_on: Callable[[Any], Objective[Params]], batch: Any, size: int
    ) -> "Microbatches[Params]":
        """Cuts a batch into equal pieces.

        A piece takes every ``k``-th case, so that a batch that is sharded along its cases stays
        so: every device has its share of every piece.

        Args:
          objective_on: Maps one piece of the batch to its `Objective`.
          batch: A pytree of arrays ``(N, ...)``.
          size: Cases in a piece, at least 1; divides ``N``.

        Returns:
          The objective, of ``k = N / size`` pieces.

        Raises:
          ValueError: If the arrays differ in ``N``, or ``size`` is not a positive integer that
            divides it.
        """
        count = _leading_axis(batch, "Microbatches.split: `batch`")
        check_static_count("size", size)
        if count % size:
            raise ValueError(
                f"Microbatches.split: a batch of {count} cases cannot be cut into pieces of {size}."
            )

        def cut(leaf: jax.Array) -> jax.Array:
            return jnp.moveaxis(jnp.reshape(leaf, (size, count // size, *leaf.shape[1:])), 1, 0)

        return cls(objective_on, jax.tree.map(cut, batch))

    @property
    def pieces(self) -> int:
        """The number of pieces, ``k``."""
        return _leading_axis(self.batches, "Microbatches: `batches`")

    def first(self) -> Objective[Params]:
        """The objective of the first piece, whose shapes and layers are those of all.

        Returns:
          The objective.
        """
        return self.objective_on(jax.tree.map(lambda leaf: leaf[0], self.batches))

    def __call__(self, params: Params) -> Any:
        """Evaluates the objective.

        Args:
          params: The parameters, a pytree of arrays.

        Returns:
          The scalar value, or ``(value, aux)`` if the pieces have aux; its leaves ``(k, ...)``.
        """

        def evaluate(batch: Any) -> Any:
            return self.objective_on(batch)(params)

        # The loop itself keeps what is evaluated again from being merged with the first time.
        output = jax.lax.map(jax.checkpoint(evaluate, prevent_cse=False), self.batches)
        if isinstance(output, tuple):
            return jnp.mean(output[0]), output[1]
        return jnp.mean(output)

    def with_loss(self, loss: Callable[[Any], jax.Array]) -> "Microbatches[Params]":
        """Another objective of the same model on the same pieces.

        Args:
          loss: Maps the outputs ``z`` of any piece to a scalar.

        Returns:
          The objective.
        """
        return Microbatches(lambda batch: self.objective_on(batch).with_loss(loss), self.batches)

    def mean(
        self, measure: Callable[[Objective[Params], jax.Array], chex.ArrayTree], like: Any
    ) -> chex.ArrayTree:
        """The mean over the pieces of anything that is measured of one, one piece at a time.

        Args:
          measure: Maps the objective of a piece, and its index, to a pytree of arrays.
          like: A pytree of arrays of the shapes, dtypes and shardings of the result.

        Returns:
          A pytree like it.
        """

        def add(total: Any, piece: tuple[jax.Array, Any]) -> tuple[Any, None]:
            index, batch = piece
            measured = measure(self.objective_on(batch), index)
            return jax.tree.map(jnp.add, total, measured), None

        zeros = jax.tree.map(jnp.zeros_like, like)
        indices = jnp.arange(self.pieces)
        total, _ = jax.lax.scan(add, zeros, (indices, self.batches))
        return jax.tree.map(lambda leaf: leaf / self.pieces, total)


def reparametrize(objective: Any, embed: Callable[[Any], Any]) -> Any:
    r"""An objective as one of other variables, :math:`f \circ e`.

    Args:
      objective: A callable, an `Objective` or `Microbatches`.
      embed: Maps the new variables to the parameters, :math:`e`.

    Returns:
      An objective of the same kind.

    Example:
      >>> held = reparametrize(lambda p: p["a"] * p["b"], lambda a: {"a": a, "b": 3.0})
      >>> held(2.0)
      6.0
    """
    if isinstance(objective, Microbatches):
        return Microbatches(
            lambda batch: reparametrize(objective.objective_on(batch), embed), objective.batches
        )
    if isinstance(objective, Objective):
        model = objective.model
        return dataclasses.replace(objective, model=lambda variables: model(embed(variables)))
    return lambda variables: objective(embed(variables))


def _leading_axis(tree: Any, name: str) -> int:
    """The length of the first axis of all leaves; raises if they differ."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            f"{name} must be a pytree of arrays with the same first axis, got first axes "
            f"{sorted(lengths)}."
        )
    return lengths.pop()[0]


def check_given(params: Any, method: str) -> None:
    """Raises if the parameters were not passed to ``update``.

    Args:
      params: The argument as ``update`` received it.
      method: Name of the method, for the message.

    Raises:
      ValueError: If ``params`` is None.
    """
    if params is None:
        raise ValueError(f"{method} needs the current `params`; call {_CALL}.")


def check_params(params: Any, method: str) -> None:
    """Raises unless a method can optimize the parameters: they were passed, and are real.

    Every method asks this in ``init``; for ``update`` see `check_has_arrays`.

    Args:
      params: The argument as the method received it.
      method: Name of the method, for the message.

    Raises:
      ValueError: If ``params`` is None.
      TypeError: If a parameter is complex.

    Example:
      >>> import jax.numpy as jnp
      >>> check_params({"w": jnp.ones(2, "complex64")}, "lsr1")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      TypeError: lsr1: parameters must be real, got complex64 at ['w']; ...
    """
    check_given(params, method)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"{method}: parameters must be real, got {dtype} at {jax.tree_util.keystr(path)}; "
                "let the real and imaginary parts be two parameters that the objective joins by "
                "jax.lax.complex, or leave it to another optimizer by so.partition."
            )


def check_has_arrays(params: Any, method: str) -> None:
    """Raises unless there is something to optimize: `check_params`, and at least one array.

    This is for ``update``: ``init`` may be given a placeholder, as by `optax.tree_map_params`.

    Args:
      params: The argument as ``update`` received it.
      method: Name of the method, for the message.

    Raises:
      ValueError: If ``params`` is None, or a tree without leaves.
      TypeError: If a parameter is complex.
    """
    check_params(params, method)
    if not jax.tree.leaves(params):
        raise ValueError(f"{method}: `params` has no arrays, got {params!r}.")


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
    piece = value_fn.first() if isinstance(value_fn, Microbatches) else value_fn
    if not isinstance(piece, Objective):
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

    def evaluate(params: Params) -> tuple[jax.Array, Params]:
        (value, _), grad = jax.value_and_grad(value_and_aux(value_fn), has_aux=True)(params)
        return value, grad  # aux may be anything

    return canonical_convolutions(evaluate)(params)


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
