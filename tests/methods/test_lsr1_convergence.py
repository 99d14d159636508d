"""L-SR1 in double precision on the classical test functions, and from saddle points."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so


def lsr1(**settings):
    return so.lsr1(full_batch=True, **settings)


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def beale(x):
    return sum((a - x[0] * (1 - x[1] ** k)) ** 2 for k, a in ((1, 1.5), (2, 2.25), (3, 2.625)))


def wood(x):
    valleys = 100 * (x[1] - x[0] ** 2) ** 2 + 90 * (x[3] - x[2] ** 2) ** 2
    bowls = (1 - x[0]) ** 2 + (1 - x[2]) ** 2
    return valleys + bowls + 10 * (x[1] + x[3] - 2) ** 2 + 0.1 * (x[1] - x[3]) ** 2


def powell_singular(x):
    squares = (x[0] + 10 * x[1]) ** 2 + 5 * (x[2] - x[3]) ** 2
    return squares + (x[1] - 2 * x[2]) ** 4 + 10 * (x[0] - x[3]) ** 4


def minimize(tx, function, start, limit):
    """The last point and value, and the number of gradients until one was shorter than 1e-5."""
    value_and_grad = optax.value_and_grad_from_state(function)

    @jax.jit
    def run(params):
        def goes_on(carry):
            *_, norm, count = carry
            return (norm > 1e-5) & (count < limit)

        def step(carry):
            params, state, *_, count = carry
            value, grad = value_and_grad(params, state=state)
            updates, state = tx.update(
                grad, state, params, value=value, grad=grad, value_fn=function
            )
            params = optax.apply_updates(params, updates)
            return params, state, state.value, jnp.linalg.norm(state.grad), count + 1

        infinity = jnp.asarray(jnp.inf, params.dtype)
        return jax.lax.while_loop(goes_on, step, (params, tx.init(params), infinity, infinity, 1))

    params, _, value, _, count = run(jnp.asarray(start, jnp.float64))
    return params, value, int(count)


@pytest.mark.parametrize(
    ("function", "start", "minimum", "limit"),
    [
        (rosenbrock, [-1.2, 1.0], [1.0, 1.0], 150),
        (beale, [1.0, 1.0], [3.0, 0.5], 60),
        (wood, [-3.0, -1.0, -3.0, -1.0], [1.0, 1.0, 1.0, 1.0], 300),
        (powell_singular, [3.0, -1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], 150),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_classical_functions(x64, function, start, minimum, limit):
    params, value, count = minimize(lsr1(), function, start, limit)
    assert count < limit
    assert value < 1e-8
    tolerance = 0.1 if function is powell_singular else 1e-4  # whose Hessian vanishes there
    np.testing.assert_allclose(params, minimum, atol=tolerance)


def double_well(x):
    """A saddle at zero, minima at (+-sqrt 2, 0) of -1."""
    return x[0] ** 4 / 4 - x[0] ** 2 + x[1] ** 2


def monkey(x):
    """Zero gradient and Hessian at zero; three minima."""
    return x[0] ** 3 - 3 * x[0] * x[1] ** 2 + (x[0] ** 2 + x[1] ** 2) ** 2


@functools.cache
def from_saddle(model):
    """The value after some steps of either function; both are compiled as one."""
    tx = lsr1(model=model, radius=0.5)

    @jax.jit
    def run(start, which):
        def function(x):
            return jnp.where(which == 0, double_well(x), monkey(x))

        def step(carry, _):
            params, state = carry
            value, grad = jax.value_and_grad(function)(params)
            updates, state = tx.update(
                grad, state, params, value=value, grad=grad, value_fn=function
            )
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (start, tx.init(start)), length=300)
        return function(params), state.metrics.probes

    return run


@pytest.mark.parametrize("model", ["trust_region", "shape_changing", "cubic", "regularized"])
@pytest.mark.parametrize(
    ("which", "minimum"), [(0, -1.0), (1, -27 / 256)], ids=["double well", "monkey"]
)
def test_saddle_points(x64, which, minimum, model):
    """From the point itself, where the gradient is zero; the first random step may go up."""
    value, probes = from_saddle(model)(jnp.zeros(2), which)
    assert probes >= 1
    np.testing.assert_allclose(value, minimum, rtol=1e-6)


@pytest.mark.parametrize("start", [[0.0, 1.0], [1e-9, 1.0]], ids=["on the axis", "beside it"])
def test_a_saddle_point_that_gradients_lead_to(x64, start):
    """On the axis no gradient ever points away from it."""
    value, _ = from_saddle("trust_region")(jnp.array(start), 0)
    np.testing.assert_allclose(value, -1.0, rtol=1e-6)
