"""Saddle-free Newton in Krylov spaces against NumPy; saddle points; what is not finite."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import secondorder as so
from secondorder import saddle_free_newton
from tests.meshes import make_mesh, place, use_mesh
from tests.methods.comparisons import all_finite, all_zero, identical

N = 6


@functools.cache
def indefinite():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((N, N)))[0]
    values = np.array([8.0, 3.0, 1.0, 0.5, -0.7, -2.0])
    return (basis * values) @ basis.T, basis, values, rng.standard_normal(N)


def quartic(p):
    """Indefinite at zero, bounded by a quartic term that is zero there."""
    matrix, _, _, right = indefinite()
    x = jnp.concatenate([p["a"], p["b"].ravel()])
    return x @ matrix @ x / 2 - right @ x + 0.1 * jnp.sum(x**2) ** 2


def zeros():
    return {"a": jnp.zeros(2), "b": jnp.zeros((2, 2))}


def compiled(objective, **settings):
    tx = saddle_free_newton(**settings)

    @jax.jit
    def step(params, state):
        grads = jax.grad(objective)(params)
        return tx.update(grads, state, params, value_fn=objective)

    return tx, step


def descend(objective, params, steps, **settings):
    """Parameters and state after some steps; none may raise the objective."""
    tx, step = compiled(objective, **settings)
    state, value = tx.init(params), objective(params)
    for _ in range(steps):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        before, value = value, objective(params)
        assert value < before or (value == before and all_zero(updates))
    return params, state


# A step.


@pytest.mark.parametrize("size", [3, 6, 9])
def test_a_step_divides_by_magnitudes(x64, size):
    """In the Krylov space of the gradient, and of all dampings the best is taken."""
    matrix, _, _, right = indefinite()
    dampings = (1.0, 0.1, 1e-3)
    tx, step = compiled(
        quartic, subspace_size=size, damping=2.0, dampings=dampings, escape_length=1e-9
    )
    updates, state = step(zeros(), tx.init(zeros()))
    powers = [-right]
    for _ in range(min(size, N) - 1):
        powers.append(matrix @ powers[-1])
    basis = np.linalg.qr(np.stack(powers, axis=1))[0]
    values, rotation = np.linalg.eigh(basis.T @ matrix @ basis)
    space = basis @ rotation
    steps = [space @ (space.T @ right / (np.abs(values) + 2 * mu)) for mu in dampings]
    as_tree = [{"a": jnp.asarray(s[:2]), "b": jnp.asarray(s[2:].reshape(2, 2))} for s in steps]
    expected = as_tree[best := int(np.argmin([quartic(s) for s in as_tree]))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7), updates, expected)
    metrics = state.metrics
    assert metrics.damping == pytest.approx(2 * dampings[best])
    assert metrics.smallest_eigenvalue == pytest.approx(values[0])
    assert metrics.largest_eigenvalue == pytest.approx(values[-1])
    assert metrics.products == size + 1
    assert metrics.evaluations == 7


def test_quadratic_in_one_step_and_the_last_step_in_the_next_space(x64):
    values = jnp.array([9.0, 4.0, 1.0])

    def objective(p):
        return jnp.sum(values * (p - 1) ** 2) / 2

    params, _ = descend(objective, jnp.zeros(3), 1, subspace_size=3, dampings=(1e-12,))
    np.testing.assert_allclose(params, 1, atol=1e-9)
    # One vector of the gradient's space and the last step make conjugate gradients.
    params, state = descend(objective, jnp.zeros(3), 3, subspace_size=1, dampings=(1e-12,))
    np.testing.assert_allclose(params, 1, atol=1e-9)
    assert state.metrics.rejections == 0


def test_marquardt_update():
    """A good ratio lowers the damping; a rejected step raises it, and is zero."""
    tx, step = compiled(quartic, dampings=(1.0,), damping_rule=so.DampingRule())
    _, state = step(zeros(), tx.init(zeros()))
    lowered = state.damping
    assert state.metrics.ratio > 0.75
    assert lowered == pytest.approx(2 / 3)

    def rough(p):  # nothing falls away from the start
        return quartic(p) + 1e3 * (jnp.sum(jnp.abs(p["a"])) > 0)

    tx = saddle_free_newton(dampings=(1.0,), damping_rule=so.DampingRule())
    updates, state = jax.jit(
        lambda p, s: tx.update(jax.grad(quartic)(p), s, p, value_fn=rough, curvature_fn=quartic)
    )(zeros(), tx.init(zeros()))
    assert all_zero(updates)
    assert state.damping == 1.5
    assert state.metrics.rejections == 1
    assert state.metrics.step_norm == 0


# Saddle points.


def double_well(p):
    return p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4


def monkey(p):
    return p[0] ** 3 - 3 * p[0] * p[1] ** 2 + jnp.sum(p**2) ** 2


@pytest.mark.parametrize(
    ("objective", "starts", "lowest"),
    [
        (double_well, [(0.0, 0.0), (1.0, 0.0), (1.0, 1e-9)], -1.0),
        (monkey, [(0.0, 0.0), (1e-8, 1e-8)], -27 / 256),
    ],
)
def test_saddle_points_are_left(x64, objective, starts, lowest):
    tx, step = compiled(objective, subspace_size=2)
    for start in starts:
        params = jnp.array(start)
        state, values = tx.init(params), [objective(params)]
        for _ in range(20):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
            values.append(objective(params))
        assert all(after <= before for before, after in itertools.pairwise(values))
        assert values[-1] == pytest.approx(lowest, rel=1e-9)
        assert state.metrics.escapes >= 1


@pytest.mark.parametrize("objective", [lambda p: jnp.sum(p**2), lambda p: 0 * jnp.sum(p)])
def test_minima_and_plateaus_are_not_left(objective):
    params, state = descend(objective, jnp.zeros(3), 2, subspace_size=2)
    assert not params.any()
    assert state.metrics.rejections == 2


# What is not finite, and the interface.


@functools.cache
def trained():
    """Parameters and state after two steps, and the compiled step with numbers added."""
    tx = saddle_free_newton(subspace_size=3)

    @jax.jit
    def step(params, state, value=0.0, gradient=0.0, product=0.0):
        def curvature(p):
            return quartic(p) + product * jnp.sum(p["a"] ** 2)

        found, grads = jax.value_and_grad(quartic)(params)
        grads["a"] = grads["a"] + gradient
        return tx.update(
            grads, state, params,
            value=found + value, grad=grads, value_fn=quartic, curvature_fn=curvature,
        )  # fmt: skip

    params, state = zeros(), tx.init(zeros())
    for _ in range(2):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    return params, state, step


@pytest.mark.parametrize("where", ["value", "gradient"])
def test_a_batch_that_is_not_finite_changes_a_counter_only(where):
    params, state, step = trained()
    updates, new = step(params, state, **{where: np.nan})
    assert all_zero(updates)
    counted = new.metrics.nonfinite_steps
    assert counted == 1
    assert identical(new._replace(metrics=new.metrics._replace(nonfinite_steps=counted - 1)), state)


def test_products_that_are_not_finite_leave_no_subspace():
    params, state, step = trained()
    updates, new = step(params, state, product=np.nan)
    assert all_zero(updates)
    assert all_finite(new._replace(metrics=new.metrics._replace(ratio=0.0)))
    assert new.metrics.nonfinite_products == 1
    assert new.metrics.rejections == state.metrics.rejections + 1
    assert identical(new.step, state.step)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("subspace_size", 0), ("damping", 0.0), ("dampings", ()), ("dampings", (1.0, 0.0)),
        ("escape_length", 0.0), ("mode", "forward"), ("weight_decay", -1.0),
    ],
)  # fmt: skip
def test_bad_hyperparameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        saddle_free_newton(**{name: value})


def test_weight_decay_is_in_objective_and_hessian(x64):
    def objective(p):
        return jnp.sum(jnp.array([4.0, 1.0]) * p**2) / 2 - jnp.sum(p)

    found, _ = descend(
        objective, jnp.zeros(2), 1, subspace_size=2, weight_decay=1.0, dampings=(1e-12,)
    )
    np.testing.assert_allclose(found, [1 / 5, 1 / 2], rtol=1e-9)


def test_explicit_mesh():
    tx = saddle_free_newton(subspace_size=3)
    mesh = make_mesh(2, 2)
    with use_mesh(mesh):
        fresh = zeros()
        params = {"a": place(mesh, fresh["a"]), "b": place(mesh, fresh["b"], None, "model")}
        scale = jnp.arange(1.0, 3.0)

        def objective(p):
            rows = jnp.sum(p["b"], axis=1)
            return jnp.sum(scale * (p["a"] - rows) ** 2) - jnp.sum(p["b"]) - jnp.sum(rows**2)

        state = jax.jit(tx.init)(params)
        grads = jax.jit(jax.grad(objective))(params)
        updates, new = jax.jit(functools.partial(tx.update, value_fn=objective))(
            grads, state, params
        )
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        assert jax.typeof(updates["b"]).sharding.spec == PartitionSpec(None, "model")
