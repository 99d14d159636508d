"""Small nonlinear least-squares problems: residuals, and where to start.

A problem is one entry of `REGRESSIONS`. It must be loaded in double precision.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Any
Residuals = Callable[[Params], jax.Array]


@dataclasses.dataclass(frozen=True)
class Regression:
    """A sum of squares to minimize.

    Attributes:
        name: What the command line calls it.
        description: One line.
        load: Makes the residuals, a function of the parameters, and the start.
    """

    name: str
    description: str
    load: Callable[[], tuple[Residuals, Params]]


def rosenbrock(x: jax.Array) -> jax.Array:
    """Rosenbrock's function as two residuals; minimum 0 at ones."""
    return jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def exponentials(x: jax.Array, times: jax.Array) -> jax.Array:
    """``x0 + x1 exp(-x3 t) + x2 exp(-x4 t)``."""
    return x[0] + x[1] * jnp.exp(-x[3] * times) + x[2] * jnp.exp(-x[4] * times)


def gauss_peaks(x: jax.Array, places: jax.Array) -> jax.Array:
    """The sum of peaks; ``x`` is ``(3, peaks)``: heights, centers and widths."""
    heights, centers, widths = x[..., None]
    return jnp.sum(heights * jnp.exp(-0.5 * ((places - centers) / widths) ** 2), axis=0)


def perceptron(params: list[dict[str, jax.Array]], inputs: jax.Array) -> jax.Array:
    """A network with one input, a hidden layer of tanh and one output."""
    hidden, readout = params
    activations = jnp.tanh(inputs[:, None] @ hidden["kernel"] + hidden["bias"])
    return (activations @ readout["kernel"] + readout["bias"])[:, 0]


# Osborne (1972), problem 1, as in Moré, Garbow and Hillstrom (1981), number 17; NIST's MGH17 too.
_OSBORNE = (
    0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685,
    0.658, 0.628, 0.603, 0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448,
    0.438, 0.431, 0.424, 0.420, 0.414, 0.411, 0.406,
)  # fmt: skip


def _rosenbrock() -> tuple[Residuals, Params]:
    return rosenbrock, jnp.array([-1.2, 1.0])


def _decay() -> tuple[Residuals, Params]:
    """Exact data: the sum of squares at the minimum is 0."""
    times = jnp.linspace(0, 4, 30)
    data = exponentials(jnp.array([0.2, 1.0, 2.0, 0.5, 3.0]), times)
    return lambda x: exponentials(x, times) - data, jnp.array([0.0, 1.0, 1.0, 0.3, 1.0])


def _osborne() -> tuple[Residuals, Params]:
    times, data = 10.0 * jnp.arange(33), jnp.array(_OSBORNE)
    return lambda x: exponentials(x, times) - data, jnp.array([0.5, 1.5, -1.0, 0.01, 0.02])


def _gauss() -> tuple[Residuals, Params]:
    places = jnp.linspace(0, 10, 80)
    truth = jnp.array([[2.0, 1.0], [3.5, 6.0], [0.7, 1.2]])
    noise = 0.02 * np.random.default_rng(0).standard_normal(80)
    data = gauss_peaks(truth, places) + noise
    start = jnp.array([[1.0, 1.0], [3.0, 7.0], [1.0, 1.0]])
    return lambda x: gauss_peaks(x, places) - data, start


def _perceptron() -> tuple[Residuals, Params]:
    """With the parameters as small further residuals, so that there is a minimum to converge to."""
    rng = np.random.default_rng(0)
    inputs = jnp.linspace(-2, 2, 50)
    data = jnp.sin(2 * inputs) + 0.05 * rng.standard_normal(50)
    start = [
        {"kernel": jnp.asarray(rng.standard_normal((1, 8))), "bias": jnp.zeros(8)},
        {"kernel": jnp.asarray(rng.standard_normal((8, 1)) / 8**0.5), "bias": jnp.zeros(1)},
    ]

    def residuals(params: Params) -> jax.Array:
        shrunk = [0.1 * jnp.ravel(leaf) for leaf in jax.tree.leaves(params)]
        return jnp.concatenate([perceptron(params, inputs) - data, *shrunk])

    return residuals, start


_ALL = (
    Regression("rosenbrock", "Rosenbrock as two residuals", _rosenbrock),
    Regression("decay", "two exponentials and a constant, exact data", _decay),
    Regression("osborne-1", "Osborne 1: two exponentials and a constant, 33 data", _osborne),
    Regression("gauss-peaks", "two Gaussian peaks in noise, 80 data", _gauss),
    Regression("tanh-mlp", "network 1-8-1 with tanh, 50 noisy data of a sine, ridge", _perceptron),
)

REGRESSIONS: dict[str, Regression] = {regression.name: regression for regression in _ALL}
