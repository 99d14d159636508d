r"""The generalized Gauss-Newton matrix of an objective that is a loss of a model's outputs.

.. math:: G = J^\top H J, \qquad J = \partial z / \partial\theta, \quad H = \nabla^2 \ell(z)

The model is linearized once; a product is one pass forward through that linear program, the small
product with ``H``, and one pass back. Nothing of the model's own forward pass is repeated.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from secondorder.checks import check_choice
from secondorder.jaxprs import canonical_convolutions
from secondorder.objective import Microbatches, Objective
from secondorder.operators.linear_operator import LinearOperator, narrow, vectors_like, widen
from secondorder.operators.pieces import over_pieces
from secondorder.sharding import replicated_zeros, sum_of_parts
from secondorder.tree import accumulation_dtype, inner

LinearizationMode: TypeAlias = Literal["forward", "reverse"]


class Linearization(NamedTuple):
    """A model at a point, and its Jacobian ``J`` there.

    Attributes:
      outputs: ``z``, a pytree of arrays.
      forward: Maps ``v``, like the parameters, to ``J v``, like the outputs.
      backward: Maps ``u``, like the outputs, to ``Jᵀ u``, like the parameters.
    """

    outputs: Any
    forward: Callable[[chex.ArrayTree], Any]
    backward: Callable[[Any], chex.ArrayTree]


def linearize_model(
    objective: Objective[Any], params: chex.ArrayTree, mode: LinearizationMode = "forward"
) -> Linearization:
    """Linearizes the model of an objective, at the cost of about one forward pass.

    Args:
      objective: The split objective, in one piece.
      params: The point, a pytree of arrays.
      mode: ``"forward"``: by forward-mode differentiation. ``"reverse"``: the program of ``Jᵀ``
        comes from reverse mode, and that of ``J`` is its transpose; for models with operations
        that have only a `jax.custom_vjp`.

    Returns:
      The outputs and both products with the Jacobian. Vectors like the parameters are float32
      or wider, whatever the parameters are.

    Raises:
      TypeError: If the objective is not an `Objective`.
      ValueError: If ``mode`` is none of the two.

    Example:
      >>> import jax.numpy as jnp
      >>> import secondorder as so
      >>> objective = so.Objective(lambda p: p**2, jnp.sum)
      >>> at = linearize_model(objective, jnp.array([1.0, 3.0]))
      >>> at.forward(jnp.ones(2)).tolist(), at.backward(jnp.ones(2)).tolist()
      ([2.0, 6.0], [2.0, 6.0])
    """
    check_choice("mode", mode, ("forward", "reverse"))
    if not isinstance(objective, Objective):
        raise TypeError(
            "A model is linearized for one so.Objective, which says what the model is; got "
            f"{type(objective)}."
        )

    def model(point: chex.ArrayTree) -> Any:
        return objective.model(point)[0] if objective.has_aux else objective.model(point)

    linearize = _linearize_forward if mode == "forward" else _linearize_reverse
    outputs, push, pull = linearize(model, params)
    return Linearization(
        outputs,
        forward=lambda vector: push(narrow(vector, params)),
        backward=lambda cotangents: widen(canonical_convolutions(pull)(cotangents)),
    )


def _linearize_forward(model: Callable[[Any], Any], params: Any) -> tuple[Any, Any, Any]:
    """Outputs, ``J`` from forward mode, and its transpose."""
    outputs, push = jax.linearize(model, params)
    transposed = jax.linear_transpose(push, params)
    return outputs, push, lambda cotangents: transposed(cotangents)[0]


def _linearize_reverse(model: Callable[[Any], Any], params: Any) -> tuple[Any, Any, Any]:
    """Outputs, the transpose of ``Jᵀ``, and ``Jᵀ`` from reverse mode."""
    outputs, pull = jax.vjp(model, params)
    transposed = jax.linear_transpose(lambda cotangents: pull(cotangents)[0], outputs)
    return outputs, lambda tangents: transposed(tangents)[0], lambda u: pull(u)[0]


def output_hessian(
    loss: Callable[[Any], jax.Array], outputs: Any, mode: LinearizationMode = "forward"
) -> Callable[[Any], Any]:
    r"""Products with the Hessian :math:`H` of a loss in the outputs of a model.

    Args:
      loss: Maps outputs to a scalar.
      outputs: The point, a pytree of arrays.
      mode: How the gradient of the loss is differentiated; ``"reverse"`` for losses that have
        only a `jax.custom_vjp`.

    Returns:
      A function from ``u`` to ``H u``.

    Raises:
      ValueError: If ``mode`` is none of the two.

    Example:
      >>> import jax.numpy as jnp
      >>> product = output_hessian(lambda z: jnp.sum(z**2), jnp.ones(2))
      >>> product(jnp.array([1.0, 2.0])).tolist()
      [2.0, 4.0]
    """
    check_choice("mode", mode, ("forward", "reverse"))
    gradient = jax.grad(loss)
    if mode == "forward":
        return jax.linearize(gradient, outputs)[1]
    _, pull = jax.vjp(gradient, outputs)
    return lambda u: pull(u)[0]  # the Hessian is its own transpose


def gauss_newton(
    objective: Objective[Any] | Microbatches[Any],
    params: chex.ArrayTree,
    mode: LinearizationMode = "forward",
) -> LinearOperator:
    r"""The generalized Gauss-Newton matrix :math:`G = J^\top H J`.

    Positive semidefinite if the loss is convex in the outputs. A product costs about four forward
    passes, and one more over `Microbatches`.

    Args:
      objective: The split objective.
      params: The point, a pytree of arrays.
      mode: How model and loss are linearized; see `linearize_model`.

    Returns:
      The operator on vectors like the parameters, float32 or wider.

    Raises:
      TypeError: If the objective is not split.
      ValueError: If ``mode`` is none of the two.

    Example:
      >>> import jax.numpy as jnp
      >>> import secondorder as so
      >>> x = jnp.array([[1.0, 2.0]])
      >>> objective = so.Objective(lambda w: x @ w, lambda z: jnp.sum(z**2) / 2)
      >>> gauss_newton(objective, jnp.zeros(2)).as_matrix().tolist()
      [[1.0, 2.0], [2.0, 4.0]]

    Source: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient
    descent, Neural Computation 14.
    """

    def make(piece: Objective[Any], _: chex.Numeric) -> LinearOperator:
        at = linearize_model(piece, params, mode)
        hessian = output_hessian(piece.loss, at.outputs, mode)
        return LinearOperator(lambda v: at.backward(hessian(at.forward(v))), vectors_like(params))

    return over_pieces(make, objective, params)


def gauss_newton_forms(
    objective: Objective[Any] | Microbatches[Any], params: chex.ArrayTree
) -> Callable[..., jax.Array]:
    r"""The values :math:`v_i^\top G v_j` of the Gauss-Newton matrix on a few vectors.

    .. math:: v_i^\top G v_j = (J v_i)^\top H (J v_j)

    Nothing is passed back: each vector costs one pass forward through the linearized model, which
    all vectors share. That pass has a product for each weight and one for its change, so that it
    is about two forward passes.

    Args:
      objective: The split objective.
      params: The point, a pytree of arrays.

    Returns:
      A function from ``k`` vectors like the parameters to the symmetric matrix ``(k, k)``, float32
      or wider. With scales ``(k,)`` as a second argument it is that of the vectors times these,
      which multiply the images before anything is squared. The model of an `Objective` is
      linearized before it is called, and of `Microbatches` in every call, one piece at a time.

    Raises:
      TypeError: If the objective is not split.

    Example:
      >>> import secondorder as so
      >>> x = jnp.array([[1.0, 2.0]])
      >>> objective = so.Objective(lambda w: x @ w, lambda z: jnp.sum(z**2) / 2)
      >>> forms = gauss_newton_forms(objective, jnp.zeros(2))
      >>> forms([jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])]).tolist()
      [[1.0, 2.0], [2.0, 4.0]]

    Source: Martens, Grosse (2015), arXiv 1503.05671, appendix C.
    """
    dtype = accumulation_dtype(params)
    if not isinstance(objective, Microbatches):
        return _forms_of_piece(objective, params, dtype)

    def mean_forms(basis: Sequence[chex.ArrayTree], scales: jax.Array | None = None) -> jax.Array:
        zeros = replicated_zeros((len(basis), len(basis)), dtype)
        result: jax.Array = objective.mean(
            lambda piece, _: _forms_of_piece(piece, params, dtype)(basis, scales), zeros
        )
        return result

    return mean_forms


def _forms_of_piece(
    objective: Objective[Any], params: chex.ArrayTree, dtype: Any
) -> Callable[..., jax.Array]:
    """The values on one batch, whose model is linearized at once."""
    at = linearize_model(objective, params)
    hessian = output_hessian(objective.loss, at.outputs)

    def forms(basis: Sequence[chex.ArrayTree], scales: jax.Array | None = None) -> jax.Array:
        images = [at.forward(vector) for vector in basis]
        if scales is not None:
            images = [_scaled(image, scale) for image, scale in zip(images, scales, strict=True)]
        curved = [hessian(image) for image in images]
        rows = [[inner(a, b).astype(dtype) for b in curved] for a in images]
        matrix = jnp.stack([jnp.stack(row) for row in rows])
        return sum_of_parts((matrix + matrix.T) / 2, params)

    return forms


def _scaled(tree: chex.ArrayTree, scale: jax.Array) -> chex.ArrayTree:
    """A pytree times a number, in its own dtypes."""
    return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), tree)
