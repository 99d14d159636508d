"""Smooth functions to minimize exactly: classical test functions and logistic regression.

A function is one entry of `FUNCTIONS`. Its data is read and its start made by `Function.load`,
which must be called in double precision.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from benchmarks import data
from benchmarks.data import BinarySamples, DataOptions

Params = Any


class Instance(NamedTuple):
    """A function with its data and a point to start from.

    Attributes:
        function: ``(params, data) -> scalar``. Data is an argument, so that it is not compiled in.
        start: Where to start, a pytree of arrays.
        data: What else the function depends on, a pytree of arrays.
    """

    function: Callable[[Params, Any], jax.Array]
    start: Params
    data: Any = ()


@dataclasses.dataclass(frozen=True)
class Function:
    """A smooth function.

    Attributes:
        name: What the command line calls it.
        description: One line.
        load: Reads its data and makes its start.
    """

    name: str
    description: str
    load: Callable[[DataOptions], Instance]


def rosenbrock(x: jax.Array) -> jax.Array:
    r"""``sum_i 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2``, minimum 0 at ones.

    This is the chained form, in which all variables depend on each other. For four variables and
    more it has another local minimum, near ``(-1, 1, ..., 1)``.
    """
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def beale(x: jax.Array) -> jax.Array:
    """Beale's function of two variables, minimum 0 at ``(3, 1/2)``."""
    targets, powers = jnp.array([1.5, 2.25, 2.625]), jnp.arange(1, 4)
    return jnp.sum((targets - x[0] * (1 - x[1] ** powers)) ** 2)


def wood(x: jax.Array) -> jax.Array:
    """Wood's function of four variables, minimum 0 at ones."""
    valleys = 100 * (x[1] - x[0] ** 2) ** 2 + 90 * (x[3] - x[2] ** 2) ** 2
    bowls = (1 - x[0]) ** 2 + (1 - x[2]) ** 2
    coupling = 10 * (x[1] + x[3] - 2) ** 2 + 0.1 * (x[1] - x[3]) ** 2
    return valleys + bowls + coupling


def powell_singular(x: jax.Array) -> jax.Array:
    """Powell's function of four variables, minimum 0 at zero with a singular Hessian."""
    squares = (x[0] + 10 * x[1]) ** 2 + 5 * (x[2] - x[3]) ** 2
    return squares + (x[1] - 2 * x[2]) ** 4 + 10 * (x[0] - x[3]) ** 4


def logistic_regression(weights: jax.Array, samples: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean logistic loss without an intercept, plus ``|weights|^2 / (2 N)`` for ``N`` samples."""
    features, signs = samples
    losses = jnp.logaddexp(0, -signs * (features @ weights))
    return jnp.mean(losses) + 0.5 / len(signs) * jnp.vdot(weights, weights)


def _classical(
    name: str, description: str, function: Callable[[jax.Array], jax.Array], start: ArrayLike
) -> Function:
    def load(options: DataOptions) -> Instance:
        return Instance(lambda x, _: function(x), jnp.asarray(start, jnp.float64))

    return Function(name, description, load)


def _rosenbrock(size: int) -> Function:
    start = np.resize([-1.2, 1.0], size)
    return _classical(
        f"rosenbrock-{size}", f"chained Rosenbrock, {size} variables", rosenbrock, start
    )


def _logistic(
    name: str, description: str, read: Callable[[DataOptions], BinarySamples]
) -> Function:
    def load(read: Callable[[DataOptions], BinarySamples], options: DataOptions) -> Instance:
        samples = read(options)
        features, signs = jnp.asarray(samples.features), jnp.asarray(samples.signs)
        return Instance(logistic_regression, jnp.zeros(features.shape[1]), (features, signs))

    return Function(name, f"logistic regression, {description}", functools.partial(load, read))


_ALL = (
    _rosenbrock(2),
    _rosenbrock(10),
    _rosenbrock(100),
    _classical("beale", "Beale, 2 variables", beale, [1.0, 1.0]),
    _classical("wood", "Wood, 4 variables", wood, [-3.0, -1.0, -3.0, -1.0]),
    _classical(
        "powell-singular", "Powell singular, 4 variables", powell_singular, [3.0, -1.0, 0.0, 1.0]
    ),
    _logistic("a9a", "a9a, 32561 x 123, L2 1/N", data.a9a),
    _logistic("breast-cancer", "standardized, 569 x 30, L2 1/N", data.breast_cancer),
)

FUNCTIONS: dict[str, Function] = {function.name: function for function in _ALL}
