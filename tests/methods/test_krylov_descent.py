"""Krylov subspace descent: on quadratics, indefinite curvature, networks; what is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import secondorder as so
from secondorder import krylov_subspace_descent
from tests.meshes import make_mesh, place, use_mesh
from tests.methods.comparisons import all_finite, all_zero, identical

STATIC = ("subspace_size", "preconditioner_probes", "max_evaluations")


def compiled(objective, **settings):
    """A transform and its compiled step, without a value that is given."""
    tx = krylov_subspace_descent(**settings)

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


# Quadratics.


@functools.cache
def quadratic():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    return (basis * np.geomspace(1, 100, 6)) @ basis.T, rng.standard_normal(6)


def on_quadratic(params):
    matrix, right = quadratic()
    x = jnp.concatenate([params["a"], params["b"].ravel()])
    return x @ matrix @ x / 2 - right @ x


ONES = {"a": np.ones(2), "b": np.ones((2, 2))}


def ones():
    return jax.tree.map(jnp.asarray, ONES)


@pytest.mark.parametrize("size", [6, 9])
def test_quadratic_in_one_step(x64, size):
    """With as many vectors as dimensions, or more, one iteration of BFGS is Newton's."""
    params, state = descend(on_quadratic, ones(), 1, curvature="hessian", subspace_size=size)
    found = np.concatenate([params["a"], params["b"].ravel()])
    np.testing.assert_allclose(found, np.linalg.solve(*quadratic()), rtol=1e-9, atol=1e-10)
    metrics = state.metrics
    assert metrics.iterations == metrics.evaluations == 1
    assert metrics.dimension == 6
    np.testing.assert_allclose(
        [metrics.smallest_eigenvalue, metrics.largest_eigenvalue], [1, 100], rtol=1e-9
    )


@pytest.mark.parametrize("size", [1, 3])
def test_a_step_is_the_minimum_over_the_krylov_space(x64, size):
    """Against NumPy: of the gradient's space, and then with the last step in it."""
    matrix, right = quadratic()
    x, last = np.ones(6), None
    tx, step = compiled(on_quadratic, curvature="hessian", subspace_size=size)
    params, state = ones(), tx.init(ones())
    for _ in range(3):
        powers = [matrix @ x - right]
        for _ in range(size - 1):
            powers.append(matrix @ powers[-1])
        basis = np.linalg.qr(np.stack(powers + ([] if last is None else [last]), axis=1))[0]
        last = -basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ powers[0])
        updates, state = step(params, state)
        found = np.concatenate([updates["a"], updates["b"].ravel()])
        np.testing.assert_allclose(found, last, rtol=1e-6, atol=1e-8)
        assert state.metrics.dimension == basis.shape[1]
        np.testing.assert_allclose(state.step["a"], updates["a"])
        params, x = optax.apply_updates(params, updates), x + last


def test_weight_decay_is_in_objective_and_curvature(x64):
    matrix, right = quadratic()
    updates = compiled(on_quadratic, curvature="hessian", subspace_size=6, weight_decay=0.5)
    tx, step = updates
    found, state = step(ones(), tx.init(ones()))
    found = np.concatenate([found["a"], found["b"].ravel()])
    solution = np.linalg.solve(matrix + 0.5 * np.eye(6), right)
    np.testing.assert_allclose(found, solution - 1, rtol=1e-8)
    assert state.metrics.evaluations == 1


# Objectives that are not convex.


def rosenbrock(p):
    return jnp.sum(100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2)


def test_rosenbrock_with_its_indefinite_hessian(x64):
    start = jnp.resize(jnp.array([0.1, 0.9]), 6)
    assert np.linalg.eigvalsh(jax.hessian(rosenbrock)(start))[0] < 0
    params, _ = descend(
        rosenbrock, start, 60, curvature="hessian", subspace_size=4, max_evaluations=30
    )
    assert rosenbrock(params) < 1e-9


def test_negative_eigenvalues_are_floored(x64):
    def objective(p):
        return p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4

    params, state = descend(
        objective, jnp.array([1.0, 0.1]), 8, curvature="hessian", subspace_size=2
    )
    assert objective(params) == pytest.approx(-1)
    tx, step = compiled(objective, curvature="hessian", subspace_size=2)
    _, state = step(jnp.array([1.0, 0.1]), tx.init(jnp.zeros(2)))
    assert state.metrics.smallest_eigenvalue == pytest.approx(-2 + 3 * 0.01)
    assert state.metrics.largest_eigenvalue == pytest.approx(2)


def test_stationary_point_is_not_left():
    params, state = descend(lambda p: jnp.sum(p**4), jnp.zeros(3), 2, curvature="hessian")
    assert not params.any()
    assert state.metrics.dimension == state.metrics.evaluations == 0
    assert state.metrics.rejections == 2


# A small network.


X = jnp.asarray(np.random.default_rng(0).standard_normal((64, 4)), jnp.float32)
Y = jnp.stack([jnp.sin(2 * X[:, 0]), X[:, 1] * X[:, 2]], axis=1)


def start_of(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    shapes = {"w": (4, 12), "b": (12,), "v": (12, 2), "scale": ()}
    return {k: jnp.asarray(0.5 * rng.standard_normal(s), dtype) for k, s in shapes.items()}


def model(params, x=X):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return (1 + params["scale"]) * (hidden @ params["v"])


def objective_on(x, y):
    return so.Objective(
        functools.partial(model, x=x), lambda z: jnp.mean(jnp.sum((z - y) ** 2, axis=-1))
    )


OBJECTIVE = objective_on(X, Y)


def sgd(rate, steps):
    params, gradient = start_of(), jax.jit(jax.grad(OBJECTIVE))
    for _ in range(steps):
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient(params))
    return OBJECTIVE(params)


@functools.cache
def best_of_sgd():
    values = [sgd(rate, 100) for rate in (0.03, 0.1, 0.2)]
    return min(float(value) for value in values if np.isfinite(value))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preconditioner": "empirical_fisher", "preconditioner_power": 0.75},
        {"preconditioner": "gauss_newton", "preconditioner_probes": 2, "curvature": "hessian"},
    ],
    ids=["plain", "empirical_fisher", "hessian"],
)
def test_network_trains_faster_than_by_sgd(settings):
    """In ten steps further than in a hundred with the best rate."""
    params, state = descend(OBJECTIVE, start_of(), 10, subspace_size=10, **settings)
    assert OBJECTIVE(params) < best_of_sgd()
    assert state.metrics.dimension == 11


def test_batches_of_their_own():
    """The step is in the space of ``grad`` and ``curvature_fn``, and its length by ``value_fn``."""
    curvature, search = objective_on(X[:32], Y[:32]), objective_on(X[32:], Y[32:])
    tx, params = krylov_subspace_descent(subspace_size=1), start_of()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(OBJECTIVE)(params)
        return tx.update(
            grads, state, params,
            value=value, grad=grads, value_fn=search, curvature_fn=curvature,
        )  # fmt: skip

    updates, state = step(params, tx.init(params))
    grads = jax.grad(OBJECTIVE)(params)
    cosine = optax.tree_utils.tree_vdot(updates, grads) / (
        optax.tree_utils.tree_norm(updates) * optax.tree_utils.tree_norm(grads)
    )
    assert cosine == pytest.approx(-1, abs=1e-5)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        state.metrics.decrease, search(params) - search(after), rtol=1e-3, atol=1e-6
    )
    direction = optax.tree_utils.tree_scale(1 / optax.tree_utils.tree_norm(grads), grads)
    outputs, change = jax.jvp(curvature.model, (params,), (direction,))
    product = jax.jvp(jax.grad(curvature.loss), (outputs,), (change,))[1]
    rayleigh = float(jnp.vdot(change, product))
    assert state.metrics.largest_eigenvalue == pytest.approx(rayleigh, rel=1e-4)


# The interface.


@functools.cache
def trained():
    """Parameters and state after two accepted steps, and the compiled step."""
    tx = krylov_subspace_descent(subspace_size=3, max_evaluations=8)

    @jax.jit
    def step(params, state, value=0.0, gradient=0.0, product=0.0, trial=0.0, start=0.0):
        """With numbers added to what is given, to the curvature, away from the start and at it."""

        def search(p):
            moved = jnp.any(p["w"] != params["w"])
            return OBJECTIVE(p) + jnp.where(moved, trial, start)

        curvature = so.Objective(model, lambda z: OBJECTIVE.loss(z) + product * jnp.sum(z[0] ** 2))
        found, grads = jax.value_and_grad(OBJECTIVE)(params)
        grads["w"] = grads["w"].at[0, 0].add(gradient)
        return tx.update(
            grads, state, params,
            value=found + value, grad=grads, value_fn=search, curvature_fn=curvature,
        )  # fmt: skip

    params, state = start_of(), tx.init(start_of())
    for _ in range(2):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert state.metrics.rejections == 0
    return params, state, step


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["value", "gradient", "start"])
def test_a_batch_that_is_not_finite_changes_a_counter_only(where, bad):
    params, state, step = trained()
    updates, new = step(params, state, **{where: bad})
    assert all_zero(updates)
    counted = new.metrics.nonfinite_steps
    assert counted == 1
    assert identical(new._replace(metrics=new.metrics._replace(nonfinite_steps=counted - 1)), state)


@pytest.mark.parametrize("trial", [np.nan, np.inf, 1e3])
def test_rejected_step_is_exactly_zero(trial):
    params, state, step = trained()
    updates, new = step(params, state, trial=trial)
    assert all_zero(updates)
    assert new.metrics.decrease == new.metrics.step_norm == new.metrics.iterations == 0
    assert new.metrics.rejections == 1
    assert 4 < new.metrics.evaluations <= 8
    assert identical(new.step, state.step)


def test_products_that_are_not_finite_leave_no_basis():
    params, state, step = trained()
    updates, new = step(params, state, product=np.nan)
    assert all_zero(updates)
    assert all_finite((updates, new))
    assert new.metrics.nonfinite_products == 1
    assert new.metrics.dimension == 0


def test_arguments():
    tx, params = krylov_subspace_descent(), start_of()
    name = "krylov_subspace_descent"
    with pytest.raises(ValueError, match=f"{name} needs the current `params`"):
        tx.init(None)
    with pytest.raises(ValueError, match=rf"{name} needs `value_fn`(.|\n)*tx.update\("):
        tx.update(params, tx.init(params), params)
    with pytest.raises(TypeError, match=f"{name} needs the split of the objective"):
        jax.eval_shape(
            lambda p: tx.update(p, tx.init(p), p, value_fn=lambda q: OBJECTIVE(q)), params
        )
    with pytest.raises(TypeError, match="`curvature_fn` is a plain callable"):
        jax.eval_shape(
            lambda p: tx.update(
                p, tx.init(p), p, value_fn=OBJECTIVE, curvature_fn=lambda q: OBJECTIVE(q)
            ),
            params,
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("subspace_size", 0), ("subspace_size", 2.0), ("curvature", "fisher"),
        ("preconditioner", "hessian"), ("preconditioner_power", -1.0),
        ("preconditioner_floor", 0.0), ("preconditioner_floor", 1.0), ("preconditioner_probes", 0),
        ("eigenvalue_floor", 0.0), ("eigenvalue_floor", 1.0), ("max_evaluations", 0),
        ("sufficient", 0.0), ("shrink", 1.0), ("weight_decay", -0.1),
    ],
)  # fmt: skip
def test_bad_hyperparameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        krylov_subspace_descent(**{name: value})


def test_explicit_mesh():
    mesh = make_mesh(2, 2)
    settings = {"subspace_size": 3, "preconditioner": "empirical_fisher", "max_evaluations": 3}
    tx, plain = compiled(OBJECTIVE, **settings)
    expected, _ = plain(start_of(), tx.init(start_of()))

    with use_mesh(mesh):
        fresh = start_of()
        params = {
            "w": place(mesh, fresh["w"], None, "model"),
            "b": place(mesh, fresh["b"], "model"),
            "v": place(mesh, fresh["v"], "model", None),
            "scale": place(mesh, fresh["scale"]),
        }
        x, y = place(mesh, X, "data", None), place(mesh, Y, "data", None)

        def sharded_model(p):
            hidden = jnp.tanh(x @ p["w"] + p["b"])
            outputs = jnp.dot(hidden, p["v"], out_sharding=PartitionSpec("data", None))
            return (1 + p["scale"]) * outputs

        objective = so.Objective(sharded_model, lambda z: jnp.mean(jnp.sum((z - y) ** 2, axis=-1)))
        tx, step = compiled(objective, **settings)
        state = jax.jit(tx.init)(params)
        updates, new = step(params, state)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        assert jax.typeof(updates["w"]).sharding.spec == PartitionSpec(None, "model")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-4), updates, expected
    )


def test_the_search_shares_the_pass_of_the_caller():
    """Value and gradient at the parameters are computed once, if on the same batch."""
    tx, params = krylov_subspace_descent(subspace_size=2), start_of()

    def step(params, state, shared):
        objective = objective_on(X, Y if shared else Y + 1)
        value, grads = jax.value_and_grad(objective)(params)
        return tx.update(grads, state, params, value=value, grad=grads, value_fn=OBJECTIVE)

    def flops(shared):
        lowered = jax.jit(functools.partial(step, shared=shared)).lower(params, tx.init(params))
        cost = lowered.compile().cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    def gradient_flops():
        cost = jax.jit(jax.grad(OBJECTIVE)).lower(params).compile().cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    assert flops(shared=False) - flops(shared=True) > 0.5 * gradient_flops()
