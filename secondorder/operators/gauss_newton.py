r"""The generalized Gauss-Newton matrix of an objective that is a loss of a model's outputs.

.. math:: G = J^\top H J, \qquad J = \partial z / \partial\theta, \quad H = \nabla^2 \ell(z)

The model is linearized once; a product is one pass forward through that linear program, the small
product with ``H``, and one pass back. Nothing of the model's own forward pass is repeated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax

from secondorder.objective import Objective
from secondorder.operators.linear_operator import LinearOperator
from secondorder.tree import accumulation_dtype


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


def linearize_model(objective: Objective[Any], params: chex.ArrayTree) -> Linearization:
    """Linearizes the model of an objective, at the cost of about one forward pass.

    Args:
      objective: The split objective.
      params: The point, a pytree of arrays.

    Returns:
      The outputs and both products with the Jacobian. Vectors like the parameters are float32
      or wider, whatever the parameters are.

    Example:
      >>> import jax.numpy as jnp
      >>> import secondorder as so
      >>> objective = so.Objective(lambda p: p**2, jnp.sum)
      >>> at = linearize_model(objective, jnp.array([1.0, 3.0]))
      >>> at.forward(jnp.ones(2)).tolist(), at.backward(jnp.ones(2)).tolist()
      ([2.0, 6.0], [2.0, 6.0])
    """

    def model(point: chex.ArrayTree) -> Any:
        return objective.model(point)[0] if objective.has_aux else objective.model(point)

    dtype = accumulation_dtype(params)
    outputs, tangents = jax.linearize(model, params)
    transposed = jax.linear_transpose(tangents, params)

    def forward(vector: chex.ArrayTree) -> Any:
        return tangents(jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params))

    def backward(cotangents: Any) -> chex.ArrayTree:
        (vector,) = transposed(cotangents)
        return jax.tree.map(lambda v: v.astype(dtype), vector)

    return Linearization(outputs, forward, backward)


def output_hessian(loss: Callable[[Any], jax.Array], outputs: Any) -> Callable[[Any], Any]:
    r"""Products with the Hessian :math:`H` of a loss in the outputs of a model.

    Args:
      loss: Maps outputs to a scalar.
      outputs: The point, a pytree of arrays.

    Returns:
      A function from ``u`` to ``H u``.

    Example:
      >>> import jax.numpy as jnp
      >>> product = output_hessian(lambda z: jnp.sum(z**2), jnp.ones(2))
      >>> product(jnp.array([1.0, 2.0])).tolist()
      [2.0, 4.0]
    """
    return jax.linearize(jax.grad(loss), outputs)[1]


def vectors_like(params: chex.ArrayTree) -> chex.ArrayTree:
    """The shape of the vectors that operators at a point act on.

    Args:
      params: The point.

    Returns:
      A pytree of `jax.ShapeDtypeStruct`, float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> vectors_like(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    dtype = accumulation_dtype(params)
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)


def gauss_newton(objective: Objective[Any], params: chex.ArrayTree) -> LinearOperator:
    r"""The generalized Gauss-Newton matrix :math:`G = J^\top H J`.

    Positive semidefinite if the loss is convex in the outputs.

    Args:
      objective: The split objective.
      params: The point, a pytree of arrays.

    Returns:
      The operator on vectors like the parameters, float32 or wider.

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
    at = linearize_model(objective, params)
    hessian = output_hessian(objective.loss, at.outputs)
    return LinearOperator(lambda v: at.backward(hessian(at.forward(v))), vectors_like(params))
