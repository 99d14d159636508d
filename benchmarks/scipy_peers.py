"""SciPy's minimizers as peers, with evaluations counted by the function that they call."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.flatten_util
import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from benchmarks.functions import Instance
from benchmarks.minimization import Iterate, Limits

Vector = NDArray[np.float64]

# SciPy's own criteria to stop are replaced by one for all, the Euclidean norm of the gradient.
_NEVER = 0.0


@dataclasses.dataclass(frozen=True)
class Peer:
    """A minimizer of SciPy.

    Attributes:
        name: What the command line calls it.
        description: One line.
        method: SciPy's name of it.
        options: Makes its options from the most iterations that it may take.
        uses_products: Whether it is given products with the Hessian.
        hessian: Makes the approximation of the Hessian that it is given, None for none.
    """

    name: str
    description: str
    method: str
    options: Callable[[int], Mapping[str, Any]]
    uses_products: bool = False
    hessian: Callable[[], Any] | None = None


class CountedFunction:
    """A function that counts where it is evaluated.

    A value and a gradient at the same point in succession, in whatever order, are one evaluation of
    the gradient; repeated calls at the last point are none.
    """

    def __init__(self, instance: Instance) -> None:
        start, unravel = jax.flatten_util.ravel_pytree(instance.start)
        self.start: Vector = np.asarray(start)
        self.gradients, self.values, self.products = 0, 0, 0
        self._data = instance.data

        def function(x: jax.Array, data: Any) -> jax.Array:
            return instance.function(unravel(x), data)

        gradient = jax.grad(function)
        self._value = jax.jit(function)
        self._gradient = jax.jit(jax.value_and_grad(function))
        self._product = jax.jit(
            lambda x, v, data: jax.jvp(lambda at: gradient(at, data), (x,), (v,))[1]
        )
        self._point: Vector | None = None
        self._last_value = float("nan")
        self._last_gradient: Vector | None = None

    def compile(self, with_products: bool) -> None:
        """Compiles everything, without counting."""
        self._value(self.start, self._data)
        self._gradient(self.start, self._data)
        if with_products:
            self._product(self.start, self.start, self._data)

    def value(self, x: Vector) -> float:
        """The value at a point."""
        if not self._is_last(x):
            self._go_to(x)
            self._last_value = float(self._value(x, self._data))
            self.values += 1
        return self._last_value

    def gradient(self, x: Vector) -> Vector:
        """The gradient at a point, whose value comes with it."""
        if self._is_last(x) and self._last_gradient is not None:
            return self._last_gradient.copy()
        if self._is_last(x):
            self.values -= 1  # That value came with this gradient.
        else:
            self._go_to(x)
        value, gradient = self._gradient(x, self._data)
        self._last_value, self._last_gradient = float(value), np.array(gradient)
        self.gradients += 1
        return self._last_gradient.copy()

    def product(self, x: Vector, vector: Vector) -> Vector:
        """The product of the Hessian at a point with a vector."""
        self.products += 1
        return np.array(self._product(x, vector, self._data))

    def at(self, x: Vector) -> Iterate:
        """Value, gradient and counts at a point."""
        norm = float(np.linalg.norm(self.gradient(x)))
        return Iterate(self.value(x), norm, self.gradients, self.values, self.products)

    def _is_last(self, x: Vector) -> bool:
        return self._point is not None and np.array_equal(x, self._point)

    def _go_to(self, x: Vector) -> None:
        self._point, self._last_gradient = np.array(x, copy=True), None


class _Stop(Exception):  # noqa: N818 - not an error
    """The gradient is small enough, or the budget is used up."""


def minimize(instance: Instance, peer: Peer, limits: Limits) -> Iterate:
    """Minimizes until the gradient at an iterate is small or the budget is used up.

    Returns:
        The last iterate within the budget. Its seconds include SciPy's own work, not compilation.
    """
    function = CountedFunction(instance)
    function.compile(peer.uses_products)
    begin = time.perf_counter()
    last, last_x = function.at(function.start), function.start

    def value(x: Vector) -> float:
        found = function.value(x)
        if max(function.gradients, function.values) > limits.max_gradients:
            raise _Stop
        return found

    # The name is how SciPy knows which arguments to call with.
    def callback(xk: Vector, *_: Any) -> None:
        nonlocal last, last_x
        if np.array_equal(xk, last_x):
            return  # A rejected step: nothing is to be evaluated there again.
        point = function.at(xk)._replace(
            updates=last.updates + 1, seconds=time.perf_counter() - begin
        )
        if not limits.allows(point):
            raise _Stop
        last, last_x = point, np.array(xk, copy=True)
        if limits.is_reached(point):
            raise _Stop

    if not limits.is_reached(last):
        _run(peer, function, value, callback, limits)
    return last


def _run(
    peer: Peer,
    function: CountedFunction,
    value: Callable[[Vector], float],
    callback: Callable[..., None],
    limits: Limits,
) -> None:
    arguments: dict[str, Any] = {}
    if peer.uses_products:
        arguments["hessp"] = function.product
    if peer.hessian is not None:
        arguments["hess"] = peer.hessian()
    with contextlib.suppress(_Stop):
        scipy.optimize.minimize(
            value,
            function.start,
            jac=function.gradient,
            method=peer.method,
            callback=callback,
            options=peer.options(2 * limits.max_gradients),
            **arguments,
        )


def _lbfgsb_options(max_iterations: int) -> Mapping[str, Any]:
    unlimited = {"maxfun": 100 * max_iterations, "maxiter": max_iterations}
    return {"ftol": _NEVER, "gtol": _NEVER, **unlimited}


def _krylov_options(max_iterations: int) -> Mapping[str, Any]:
    return {"gtol": _NEVER, "maxiter": max_iterations}


def _constr_options(max_iterations: int) -> Mapping[str, Any]:
    return {"gtol": _NEVER, "xtol": _NEVER, "maxiter": max_iterations}


_ALL = (
    Peer("scipy-l-bfgs-b", "SciPy's L-BFGS-B", "L-BFGS-B", _lbfgsb_options),
    Peer(
        "scipy-trust-krylov",
        "SciPy's trust-krylov, exact products with the Hessian",
        "trust-krylov",
        _krylov_options,
        uses_products=True,
    ),
    Peer(
        "scipy-trust-constr-sr1",
        "SciPy's trust-constr with its full-memory SR1",
        "trust-constr",
        _constr_options,
        hessian=scipy.optimize.SR1,
    ),
)

PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}
