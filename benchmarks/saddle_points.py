"""Functions with saddle points, and starts on and beside them.

A start is one entry of `SADDLES`. The functions are made in double precision.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from benchmarks.functions import Instance

_ROWS, _COLUMNS, _RANK = 10, 8, 4
_SINGULAR_VALUES = (4.0, 3.0, 2.0, 1.0)
_LAYERS, _WIDTH, _SAMPLES = 5, 10, 100


@dataclasses.dataclass(frozen=True)
class Saddle:
    """A start on or beside a saddle point.

    Attributes:
        name: What the command line calls it.
        description: One line.
        minimum: The least value of the function.
        load: Makes the function and the start.
    """

    name: str
    description: str
    minimum: float
    load: Callable[[], Instance]


def double_well(point: jax.Array) -> jax.Array:
    """``x^2 - y^2 + y^4/4``: a saddle at 0, minima -1 at ``y = +-sqrt(2)``."""
    x, y = point
    return x**2 - y**2 + y**4 / 4


def monkey(point: jax.Array) -> jax.Array:
    """``x^3 - 3 x y^2 + (x^2 + y^2)^2 / 4``: Hessian 0 at 0, minima -27/4 at distance 3.

    The monkey saddle is unbounded; the quartic bounds it and leaves value, gradient, Hessian and
    third derivatives at 0 as they are.
    """
    x, y = point
    return x**3 - 3 * x * y**2 + (x**2 + y**2) ** 2 / 4


def factorization(factors: Mapping[str, jax.Array], matrix: jax.Array) -> jax.Array:
    """``0.5 |U V' - M|^2`` with a matrix whose rank is that of the product: minimum 0."""
    residual = factors["U"] @ factors["V"].T - matrix
    return 0.5 * jnp.sum(residual**2)


def deep_linear(weights: list[jax.Array], samples: tuple[jax.Array, jax.Array]) -> jax.Array:
    """``0.5 mean |x W_1 ... W_L - y|^2`` where ``y = x A``: minimum 0.

    At 0 all derivatives of order below ``L`` vanish: it is flatter than a quadratic model can see.
    """
    inputs, targets = samples
    outputs = inputs
    for matrix in weights:
        outputs = outputs @ matrix
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1))


def _plane(
    name: str,
    description: str,
    function: Callable[[jax.Array], jax.Array],
    minimum: float,
    start: tuple[float, float],
) -> Saddle:
    def load() -> Instance:
        return Instance(lambda point, _: function(point), jnp.array(start))

    return Saddle(name, description, minimum, load)


def _factorization(name: str, description: str, noise: float) -> Saddle:
    def load() -> Instance:
        rng = np.random.default_rng(0)
        left, right = _orthonormal(rng, _ROWS), _orthonormal(rng, _COLUMNS)
        matrix = left @ np.diag(_SINGULAR_VALUES) @ right.T
        shapes = {"U": (_ROWS, _RANK), "V": (_COLUMNS, _RANK)}
        start = {key: noise * rng.standard_normal(shape) for key, shape in shapes.items()}
        return _on_device(Instance(factorization, start, matrix))

    return Saddle(name, description, 0.0, load)


def _deep_linear(name: str, description: str, noise: float) -> Saddle:
    def load() -> Instance:
        rng = np.random.default_rng(0)
        inputs = rng.standard_normal((_SAMPLES, _WIDTH))
        target = rng.standard_normal((_WIDTH, _WIDTH)) / np.sqrt(_WIDTH)
        start = [noise * rng.standard_normal((_WIDTH, _WIDTH)) for _ in range(_LAYERS)]
        return _on_device(Instance(deep_linear, start, (inputs, inputs @ target)))

    return Saddle(name, description, 0.0, load)


def _orthonormal(rng: np.random.Generator, rows: int) -> NDArray[np.float64]:
    return np.linalg.qr(rng.standard_normal((rows, _RANK)))[0]


def _on_device(instance: Instance) -> Instance:
    start, data = jax.tree.map(jnp.asarray, (instance.start, instance.data))
    return instance._replace(start=start, data=data)


# 1e-8 away from the origin, in a direction that is no symmetry of the function.
_NEARBY = (0.6e-8, 0.8e-8)

_ALL = (
    _plane("double-well-0", "double well from (0, 0)", double_well, -1.0, (0.0, 0.0)),
    _plane("double-well-1", "double well from (1, 0)", double_well, -1.0, (1.0, 0.0)),
    _plane("double-well-1-near", "double well from (1, 1e-8)", double_well, -1.0, (1.0, 1e-8)),
    _plane("monkey-0", "bounded monkey saddle from (0, 0)", monkey, -6.75, (0.0, 0.0)),
    _plane("monkey-0-near", "bounded monkey saddle from 1e-8 away", monkey, -6.75, _NEARBY),
    _factorization("factorization-0", "10 x 8 matrix of rank 4 from U = V = 0", 0.0),
    _factorization("factorization-0-near", "the same with noise of 1e-6", 1e-6),
    _deep_linear("deep-linear-1e-3", "5 linear layers of width 10, entries of 1e-3", 1e-3),
    _deep_linear("deep-linear-1e-2", "the same, entries of 1e-2", 1e-2),
    _deep_linear("deep-linear-1e-1", "the same, entries of 1e-1", 1e-1),
)

SADDLES: dict[str, Saddle] = {saddle.name: saddle for saddle in _ALL}
