"""Inexact Newton-CG: convergence, saddle points, rejection, and what is not finite."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import secondorder as so
from secondorder import newton_cg
from secondorder.control import DampingRule
from secondorder.objective import Microbatches, value_and_aux
from tests.meshes import make_mesh, place, use_mesh
from tests.methods.comparisons import all_finite, all_zero, identical


def rosenbrock(p):
    return jnp.sum(100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2)


def saddle(p):
    return p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4


def monkey(p):
    """At zero its Hessian vanishes too; bounded below by a quartic term."""
    return p[0] ** 3 - 3 * p[0] * p[1] ** 2 + jnp.sum(p**2) ** 2


@functools.cache
def stepping(objective, settings=()):
    """A transform and its compiled step, which also returns the value before it."""
    tx = newton_cg(**dict(settings))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, value

    return tx, step


def minimize(objective, params, steps, **settings):
    """The parameters and the state after some steps, none of which raised the objective."""
    tx, step = stepping(objective, tuple(settings.items()))
    state, values = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        values.append(float(value))
    values.append(float(objective(params)))
    for before, after in itertools.pairwise(values):
        assert after <= before + 1e-12 * abs(before)
    return params, state


def update_once(tx, params, objective, **extra):
    """One compiled update, without a value."""

    def update(params, state):
        grads = jax.grad(lambda p: value_and_aux(objective)(p)[0])(params)
        return tx.update(grads, state, params, value_fn=objective, **extra)

    return jax.jit(update)(params, tx.init(params))


# Convergence.


@pytest.mark.parametrize(("n", "steps"), [(2, 35), (10, 45)])
@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
def test_rosenbrock(x64, n, steps, mode):
    params, state = minimize(rosenbrock, jnp.resize(jnp.array([-1.2, 1.0]), n), steps, mode=mode)
    assert jnp.linalg.norm(jax.grad(rosenbrock)(params)) < 1e-8
    np.testing.assert_allclose(params, 1, atol=1e-8)
    assert state.metrics.negative_curvature > 0


def test_rosenbrock_by_differences_of_gradients(x64):
    params, _ = minimize(rosenbrock, jnp.array([-1.2, 1.0]), 40, mode="central_difference")
    assert jnp.linalg.norm(jax.grad(rosenbrock)(params)) < 1e-6


def test_rosenbrock_with_adapted_damping(x64):
    params, state = minimize(
        rosenbrock, jnp.array([-1.2, 1.0]), 60, damping=1.0, damping_rule=DampingRule()
    )
    assert jnp.linalg.norm(jax.grad(rosenbrock)(params)) < 1e-8
    assert state.damping < 1e-3


def test_rosenbrock_truncated(x64):
    params, _ = minimize(rosenbrock, jnp.array([-1.2, 1.0]), 80, negative_curvature="truncate")
    assert jnp.linalg.norm(jax.grad(rosenbrock)(params)) < 1e-8


@functools.cache
def quadratic():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    return (basis * np.geomspace(1, 100, 6)) @ basis.T, rng.standard_normal(6)


def test_quadratic_in_one_step(x64):
    matrix, right = quadratic()

    def objective(p):
        x = jnp.concatenate([p["a"], p["b"].ravel()])
        return x @ matrix @ x / 2 - right @ x

    params = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}
    params, state = minimize(objective, params, 1, forcing=0.0)
    found = np.concatenate([params["a"], params["b"].ravel()])
    np.testing.assert_allclose(found, np.linalg.solve(matrix, right), rtol=1e-9, atol=1e-10)
    assert state.metrics.rate == state.metrics.evaluations == 1
    assert state.metrics.ratio == pytest.approx(1)
    assert state.metrics.iterations <= 9


def test_damping_and_weight_decay_are_in_the_equation(x64):
    matrix, right = quadratic()
    tx = newton_cg(forcing=0.0, damping=0.5, weight_decay=0.25)

    def objective(p):
        return p @ matrix @ p / 2 - right @ p

    start = jnp.ones(6)
    updates, state = update_once(tx, start, objective)
    gradient = matrix @ np.ones(6) - right + 0.25
    np.testing.assert_allclose(updates, -np.linalg.solve(matrix + 0.75 * np.eye(6), gradient))
    # The model is without the damping, with the weight decay.
    model = gradient @ updates + updates @ (matrix + 0.25 * np.eye(6)) @ updates / 2
    assert state.metrics.predicted == pytest.approx(model)
    assert state.metrics.ratio == pytest.approx(1)


def test_forcing(x64):
    """The residual that is asked for falls with the gradient, and is reached."""
    matrix, right = quadratic()

    def objective(p):
        return p @ matrix @ p / 2 - right @ p

    tx = newton_cg(forcing=0.3, forcing_power=1.0, max_iterations=20)
    update = jax.jit(functools.partial(tx.update, value_fn=objective))
    params = jnp.ones(6)
    state, norms = tx.init(params), []
    for _ in range(4):
        gradient = jax.grad(objective)(params)
        norms.append(float(jnp.linalg.norm(gradient)))
        updates, state = update(gradient, state, params)
        asked = min(0.3, norms[-1] / max(norms))
        assert state.metrics.residual == pytest.approx(asked)
        assert jnp.linalg.norm(matrix @ updates + gradient) <= asked * norms[-1] * (1 + 1e-9)
        params = optax.apply_updates(params, updates)
    assert norms[-1] < 1e-3 * norms[0]


def test_curvature_fn_gives_the_hessian_and_nothing_else(x64):
    matrix, right = quadratic()

    def objective(p):
        return p @ matrix @ p / 2 - right @ p

    tx, start = newton_cg(forcing=0.0), jnp.ones(6)
    gradient = jax.grad(objective)(start)
    updates, _ = update_once(tx, start, objective, curvature_fn=lambda p: 2 * objective(p))
    np.testing.assert_allclose(updates, -np.linalg.solve(2 * matrix, gradient), rtol=1e-8)


@pytest.mark.parametrize("iterations", [2, 10])
def test_inexact_newton_cg_of_oleary_roseberry_alger_and_ghattas(x64, iterations):
    """The preset of the docstring: at negative curvature the last iterate, then backtracking."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    matrix = (basis * np.array([9.0, 5.0, 2.0, 1.0, 0.3, -0.2])) @ basis.T
    right = basis @ np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.3])

    def objective(p):
        return p @ matrix @ p / 2 - right @ p + 0.5 * jnp.sum(p**2) ** 2

    shifted, x = matrix + 1e-3 * np.eye(6), np.zeros(6)
    residual = direction = right
    for done in range(iterations):
        image = shifted @ direction
        if direction @ image <= 0:
            assert done > 0
            break
        rate = residual @ residual / (direction @ image)
        x, before = x + rate * direction, residual
        residual = residual - rate * image
        direction = residual + residual @ residual / (before @ before) * direction
    rate = 1.0
    while objective(rate * x) > objective(0 * x) - 1e-4 * rate * (right @ x):
        rate /= 2
    tx = newton_cg(
        max_iterations=iterations, damping=1e-3, forcing=1e-9, forcing_power=0.0,
        negative_curvature="truncate", max_trials=10,
    )  # fmt: skip
    updates, state = update_once(tx, jnp.zeros(6), objective)
    np.testing.assert_allclose(updates, rate * x, rtol=1e-8)
    assert state.metrics.negative_curvature == (iterations == 10)
    assert state.metrics.rate == rate


# Saddle points.


@pytest.mark.parametrize("kind", ["follow", "truncate"])
@pytest.mark.parametrize(
    "start", [(0.0, 0.0), (1e-3, 0.0), (1e-3, 1e-9), (1e-12, 1e-12), (0.0, 1e-15), (0.3, 0.0)]
)
def test_saddle_point_is_left(x64, start, kind):
    params, _ = minimize(saddle, jnp.array(start), 12, negative_curvature=kind)
    assert saddle(params) == pytest.approx(-1, abs=1e-12)
    assert jnp.linalg.norm(jax.grad(saddle)(params)) < 1e-7


@pytest.mark.parametrize("start", [(0.0, 0.0), (1e-3, 0.0), (-1e-3, 0.0), (1e-2, 1e-2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_monkey_saddle_is_left(x64, start, seed):
    """Half of the random directions lead up, where the Hessian says nothing."""
    params, _ = minimize(monkey, jnp.array(start), 60, seed=seed)
    assert monkey(params) == pytest.approx(-27 / 256)  # at distance 3/4


def test_saddle_point_in_single_precision_and_of_a_small_objective():
    params, _ = minimize(lambda p: 1e-6 * saddle(p), jnp.zeros(2), 10)
    assert saddle(params) == pytest.approx(-1, abs=1e-5)


def test_direction_of_negative_curvature(x64):
    """Its length is the curvature, or that of a gradient step; the rate grows or shrinks from 1."""

    def objective(p):  # the minimum along the second coordinate is at 1/sqrt(2) and 10
        return p[0] ** 2 / 2 - p[1] ** 2 + p[1] ** 4

    tx = newton_cg(max_iterations=5)
    start = jnp.array([0.0, 1e-6])
    updates, state = update_once(tx, start, objective)
    assert state.metrics.curvature == pytest.approx(-2, rel=1e-6)
    assert state.metrics.rate == 0.25  # 2 is too long, 1 is stationary, 0.5 is taken
    np.testing.assert_allclose(updates, [0, 0.5], atol=1e-9)

    def linear(p):
        return jnp.sum(p)

    updates, state = update_once(tx, start, linear)
    assert state.metrics.curvature == 0
    np.testing.assert_allclose(updates, -np.ones(2) * 2.0**29)  # unbounded: all trials are used
    assert state.metrics.evaluations == 30


def test_minimum_is_not_left(x64):
    """A probe finds no negative curvature; nothing is evaluated, nothing moves."""
    params, state = minimize(saddle, jnp.array([0.0, np.sqrt(2)]), 1)
    params, state = minimize(lambda p: jnp.sum(p**2), jnp.zeros(2), 3)
    assert not params.any()
    assert state.metrics.probes == 3
    assert state.metrics.evaluations == 0
    assert state.metrics.rejections == 3


def test_plateau_is_not_left():
    params, state = minimize(lambda p: 0 * jnp.sum(p) + 3, jnp.ones(2), 2)
    np.testing.assert_array_equal(params, 1)
    assert state.metrics.evaluations == 30


# The interface, on a small network.


X = jnp.asarray(np.random.default_rng(0).standard_normal((12, 3)), jnp.float32)
Y = jnp.sin(X[:, :2])


def start_of(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    params = {"w": rng.standard_normal((3, 2)), "b": rng.standard_normal(2), "scale": 1.2}
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), params)


def loss(params, x=X, y=Y):
    outputs = params["scale"] * jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1))


@functools.cache
def trained():
    """A transform, parameters and state after two accepted steps, and the compiled step."""
    tx = newton_cg(max_trials=10)

    @jax.jit
    def step(params, state, value=0.0, gradient=0.0, product=0.0, trial=0.0):
        """With numbers added to what is given, to the curvature, and away from the parameters."""

        def objective(p):
            moved = jnp.any(p["w"] != params["w"])
            return loss(p) + jnp.where(moved, trial, 0)

        def curvature(p):
            return loss(p) + product * jnp.sum(p["b"] ** 2)

        found, grads = jax.value_and_grad(loss)(params)
        grads["w"] = grads["w"].at[0, 0].add(gradient)
        return tx.update(
            grads, state, params,
            value=found + value, grad=grads, value_fn=objective, curvature_fn=curvature,
        )  # fmt: skip

    params, state = start_of(), tx.init(start_of())
    for _ in range(2):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert state.metrics.rejections == 0
    assert loss(params) < 0.9 * loss(start_of())
    return params, state, step


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["value", "gradient"])
def test_a_batch_that_is_not_finite_changes_a_counter_only(where, bad):
    params, state, step = trained()
    updates, new = step(params, state, **{where: bad})
    assert all_zero(updates)
    counted = new.metrics.nonfinite_steps
    assert counted == state.metrics.nonfinite_steps + 1
    assert identical(new._replace(metrics=new.metrics._replace(nonfinite_steps=counted - 1)), state)


def test_a_product_that_is_not_finite_ends_the_iterations():
    params, state, step = trained()
    updates, new = step(params, state, product=np.nan)
    assert all_zero(updates)
    assert all_finite((updates, new._replace(metrics=new.metrics._replace(ratio=0.0))))
    assert new.metrics.nonfinite_products == 1
    assert new.metrics.iterations == 0
    assert new.metrics.rejections == 1


@pytest.mark.parametrize("trial", [np.nan, np.inf, 1e3])
def test_rejected_step_is_exactly_zero(trial):
    params, state, step = trained()
    updates, new = step(params, state, trial=trial)
    assert all_zero(updates)
    assert new.metrics.rate == 0
    assert new.metrics.rejections == 1
    assert new.metrics.evaluations == 10
    # The next batch is none the worse.
    again, _ = step(params, new)
    expected, _ = step(params, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, expected)


def test_full_batch_keeps_value_and_gradient(x64):
    """They are those at the parameters after the step, and save evaluations."""
    objective = functools.partial(loss, x=X.astype(float), y=Y.astype(float))
    tx = newton_cg(full_batch=True)
    value_and_grad = optax.value_and_grad_from_state(objective)
    params = start_of(jnp.float64)

    @jax.jit
    def step(params, state):
        value, grads = value_and_grad(params, state=state)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    state, plain = tx.init(params), minimize(objective, params, 6)[0]
    for _ in range(6):
        params, state = step(params, state)
        known = jax.value_and_grad(objective)(params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
            (state.value, state.grad),
            known,
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, plain)


def test_full_batch_refuses_a_step_whose_gradient_is_not_finite():
    def objective(p):  # at zero, the minimum, the root has no gradient
        return jnp.sum(p**2) / 2 + 0 * jnp.sum(jnp.sqrt(jnp.abs(p)))

    tx, params = newton_cg(full_batch=True, forcing=0.0), jnp.ones(2)
    updates, state = tx.update(
        params, tx.init(params), params, value=jnp.float32(1), value_fn=objective,
        curvature_fn=lambda p: jnp.sum(p**2) / 2,
    )  # fmt: skip
    assert all_zero(updates)
    assert state.value == 1
    np.testing.assert_array_equal(state.grad, 1)
    assert state.metrics.rate == 0


@pytest.mark.parametrize("given", [(), ("value",), ("grad",)])
def test_value_and_gradient_are_not_required(given):
    params = start_of()
    tx = newton_cg()
    value, grads = jax.value_and_grad(loss)(params)
    known = {name: {"value": value, "grad": grads}[name] for name in given}
    found, _ = update_once(tx, params, loss, **known)
    expected, _ = update_once(tx, params, lambda p: (loss(p), p), value=value, grad=grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_missing_arguments_name_the_call():
    tx, params = newton_cg(), start_of()
    with pytest.raises(ValueError, match="newton_cg needs the current `params`"):
        tx.init(None)
    with pytest.raises(ValueError, match=r"newton_cg needs `value_fn`(.|\n)*tx.update\("):
        tx.update(params, tx.init(params), params)
    with pytest.raises(TypeError, match="`curvature_fn` must be callable"):
        tx.update(params, tx.init(params), params, value_fn=loss, curvature_fn=3.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0), ("mode", "forward"), ("damping", -1.0), ("max_iterations", 0),
        ("max_iterations", 2.0), ("forcing", 1.0), ("forcing", -0.1), ("forcing_power", -1.0),
        ("negative_curvature", "ignore"), ("probe_length", 0.0), ("sufficient", 0.0),
        ("sufficient", 1.0), ("shrink", 0.0), ("shrink", 1.0), ("max_trials", 0),
        ("full_batch", 1), ("weight_decay", -0.1),
    ],
)  # fmt: skip
def test_bad_hyperparameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        newton_cg(**{name: value})


def test_explicit_mesh():
    mesh = make_mesh(2, 2)
    expected = trained()[2](start_of(), newton_cg().init(start_of()))[0]

    with use_mesh(mesh):
        fresh = start_of()
        params = {
            "w": place(mesh, fresh["w"], None, "model"),
            "b": place(mesh, fresh["b"], "model"),
            "scale": place(mesh, fresh["scale"]),
        }
        x, y = place(mesh, X, "data", None), place(mesh, Y, "data", None)
        objective = functools.partial(loss, x=x, y=y)
        tx = newton_cg(full_batch=True)
        state = jax.jit(tx.init)(params)

        @jax.jit
        def step(params, state):
            return tx.update(jax.grad(objective)(params), state, params, value_fn=objective)

        updates, new = step(params, state)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        assert jax.typeof(updates["w"]).sharding.spec == PartitionSpec(None, "model")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), updates, expected)


def test_microbatches():
    def objective_on(batch):
        x, y = batch
        return so.Objective(
            lambda p: p["scale"] * jnp.tanh(x @ p["w"] + p["b"]),
            lambda z: jnp.mean(jnp.sum((z - y) ** 2, axis=-1)),
        )

    objective = Microbatches.split(objective_on, (X, Y), size=4)
    params, tx = start_of(), newton_cg()
    found, expected = update_once(tx, params, objective)[0], update_once(tx, params, loss)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), found, expected)
