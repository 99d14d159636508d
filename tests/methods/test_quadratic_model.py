"""Steps from the quadratic model: against dense algebra, behind every direction, and their cost."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from secondorder.operators import gauss_newton_forms
from tests.methods.comparisons import all_zero, identical

DECAY, DAMPING = 0.05, 0.3


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape), dtype=float)


def params_of():
    return {"w": normal(3, 4), "b": normal(4, seed=1), "v": normal(4, 2, seed=2)}


def model(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def batch_of(seed, size=8):
    return normal(size, 3, seed=seed), normal(size, 2, seed=seed + 1)


def on(batch):
    x, y = batch
    return so.Objective(
        lambda p: model(p, x), lambda z: jnp.mean(jnp.sum(jax.nn.softplus(z) - y * z, axis=-1))
    )


def objective_on(seed, size=8):
    return on(batch_of(seed, size))


def take_steps(tx, steps, objective=None, params=None):
    """The points of a few steps, on different batches, the updates, the states, the objectives."""

    @jax.jit
    def step(params, state, batch):
        fun = on(batch) if objective is None else objective
        value, grads = jax.value_and_grad(fun)(params)
        return tx.update(grads, state, params, value=value, grad=grads, value_fn=fun)

    params = params_of() if params is None else params
    state, history = tx.init(params), []
    for k in range(steps):
        updates, state = step(params, state, batch_of(k))
        history.append((params, updates, state, objective or objective_on(k)))
        params = optax.apply_updates(params, updates)
    return history


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def dense_gauss_newton(objective, params):
    """``J^T H J`` from dense Jacobians."""
    jacobian = jax.jacobian(objective.model)(params)
    leaves = [leaf.reshape(16, -1) for leaf in jax.tree.leaves(jacobian)]
    rows = np.concatenate(leaves, axis=1)
    outputs = objective.model(params)
    hessian = np.reshape(jax.hessian(objective.loss)(outputs), (16, 16))
    return rows.T @ hessian @ rows


def test_steps_are_those_of_a_dense_solve(x64):
    """Slopes, curvature, weight decay and damping, over two steps with different batches."""
    tx = so.scale_by_quadratic_model(optax.scale(3.0), damping=DAMPING, weight_decay=DECAY)
    (_, first, _, _), (params, second, state, objective) = take_steps(tx, 2)
    gradient = flat(jax.grad(objective)(params)) + DECAY * flat(params)
    curvature = dense_gauss_newton(objective, params)
    damped = curvature + (DECAY + DAMPING) * np.eye(len(gradient))
    basis = np.stack([3 * gradient, flat(first)], axis=1)
    coefficients = -np.linalg.solve(basis.T @ damped @ basis, basis.T @ gradient)
    step = basis @ coefficients
    np.testing.assert_allclose(flat(second), step, rtol=1e-8)
    np.testing.assert_allclose(state.coefficients, coefficients, rtol=1e-8)
    promised = gradient @ step + step @ (curvature + DECAY * np.eye(len(step))) @ step / 2
    np.testing.assert_allclose(state.metrics.predicted, promised, rtol=1e-8)


def test_the_length_of_the_direction_does_not_matter(x64):
    short, long = (
        take_steps(so.scale_by_quadratic_model(optax.scale(c)), 3)[-1][1] for c in (1e-6, -1e6)
    )
    np.testing.assert_allclose(flat(short), flat(long), rtol=1e-6)


def test_between_planes_only_the_common_factor_is_chosen(x64):
    tx = so.scale_by_quadratic_model(damping=DAMPING, plane_every=3)
    history = take_steps(tx, 3)
    params, step, state, objective = history[2]
    before = history[1][2].coefficients
    np.testing.assert_allclose(
        state.coefficients[1] / state.coefficients[0], before[1] / before[0], rtol=1e-9, atol=1e-12
    )
    gradient, step = flat(jax.grad(objective)(params)), flat(step)
    damped = dense_gauss_newton(objective, params) + DAMPING * np.eye(len(step))
    np.testing.assert_allclose(gradient @ step + step @ damped @ step, 0, atol=1e-10)


def test_without_momentum_it_is_the_minimizer_along_the_direction(x64):
    tx = so.scale_by_quadratic_model(momentum=False, damping=DAMPING)
    params, step, state, objective = take_steps(tx, 2)[1]
    assert state.last_step is None
    gradient = flat(jax.grad(objective)(params))
    damped = dense_gauss_newton(objective, params) + DAMPING * np.eye(len(gradient))
    rate = gradient @ gradient / (gradient @ damped @ gradient)
    np.testing.assert_allclose(flat(step), -rate * gradient, rtol=1e-9)


LINEAR = so.Objective(lambda p: p["a"] * 2.0, lambda z: jnp.sum((z - 1) ** 2))


def test_a_quadratic_objective_keeps_its_promise_and_lowers_the_damping():
    """The promise is that of the model without damping, whatever the damping is."""
    tx = so.scale_by_quadratic_model(damping=5.0, adapt_every=2)
    history = take_steps(tx, 4, LINEAR, {"a": jnp.array([3.0, -1.0])})
    dampings = [float(state.damping) for _, _, state, _ in history]
    factor = (19 / 20) ** 2
    np.testing.assert_allclose(dampings, [5, 5 * factor, 5 * factor, 5 * factor**2], rtol=1e-5)
    np.testing.assert_allclose(history[-1][2].metrics.ratio, 1, rtol=1e-4)


@pytest.mark.parametrize(
    ("actual", "factor"),
    [(0.1, 20 / 19), (0.5, 1.0), (0.9, 19 / 20), (-1.0, 20 / 19), (np.nan, 20 / 19)],
)
def test_the_damping_follows_the_ratio(actual, factor):
    """The step is from 1 to 2/3 and promises 2/9; NaN behind it takes no step."""
    jump = 0.25 - actual * 2 / 9 - 1 / 36
    objective = so.Objective(
        lambda p: p, lambda z: jnp.sum((z - 0.5) ** 2 + jnp.where(z == 1.0, 0.0, jump))
    )
    tx = so.scale_by_quadratic_model(damping=1.0, adapt_every=1)
    ((_, updates, state, _),) = take_steps(tx, 1, objective, jnp.ones(1))
    np.testing.assert_allclose(state.damping, factor, rtol=1e-5)
    assert int(state.metrics.rejections) == int(np.isnan(actual))
    assert bool(all_zero(updates)) == bool(np.isnan(actual))


def test_steps_are_clipped():
    free, short, near = (
        take_steps(so.scale_by_quadratic_model(damping=DAMPING, **clip), 1)[0]
        for clip in ({}, {"max_norm": 0.1}, {"max_divergence": 1e-3})
    )
    np.testing.assert_allclose(np.linalg.norm(flat(short[1])), 0.1, rtol=1e-4)
    params, step, _, objective = near
    step = flat(step)
    np.testing.assert_allclose(
        step @ dense_gauss_newton(objective, params) @ step / 2, 1e-3, rtol=1e-3
    )
    assert [int(s.metrics.clipped) for _, _, s, _ in (free, short, near)] == [0, 1, 1]


def test_the_direction_is_told_the_damping_and_sees_the_decay():

    def update(updates, state, params=None, *, damping, **extra_args):
        return updates, (damping, updates)

    inner = optax.GradientTransformationExtraArgs(lambda p: (jnp.zeros(()), p), update)
    tx = so.scale_by_quadratic_model(inner, damping=DAMPING, weight_decay=DECAY)
    ((params, _, state, objective),) = take_steps(tx, 1)
    told, gradient = state.direction
    np.testing.assert_allclose(told, DAMPING + DECAY, rtol=1e-6)
    expected = flat(jax.grad(objective)(params)) + DECAY * flat(params)
    np.testing.assert_allclose(flat(gradient), expected, rtol=1e-4, atol=1e-6)


def directions(layers):
    lrsfn = so.scale_by_low_rank_saddle_free_newton(2, damping=0.3)
    return {
        "gradient": so.scale_by_quadratic_model(),
        "adam": optax.chain(optax.scale_by_adam(), so.scale_by_quadratic_model()),
        "kbfgs": optax.chain(so.scale_by_kbfgs(layers), so.scale_by_quadratic_model()),
        "kbfgs-told": so.scale_by_quadratic_model(so.scale_by_kbfgs(layers)),
        "kfac": so.scale_by_quadratic_model(so.scale_by_kfac(layers), damping=0.1),
        "lrsfn": so.scale_by_quadratic_model(lrsfn),
        "bhf": so.scale_by_quadratic_model(so.block_hessian_free(max_iterations=3)),
    }


@pytest.mark.parametrize(
    "name", ["gradient", "adam", "kbfgs", "kbfgs-told", "kfac", "lrsfn", "bhf"]
)
def test_it_trains_behind_every_direction(name):
    objective = objective_on(0)
    tx = directions(so.find_layers(objective, params_of()))[name]

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, value

    params, state = params_of(), tx.init(params_of())
    values = []
    for _ in range(12):
        params, state, value = step(params, state)
        values.append(float(value))
    # The loss is not bounded by zero; in twelve gradients of any length it falls as far as that.
    assert values[-1] < values[0] - 0.5


def test_curvature_of_another_batch(x64):
    tx = so.scale_by_quadratic_model(momentum=False, damping=DAMPING)
    params, objective, other = params_of(), objective_on(0), objective_on(5)
    gradient = jax.jit(jax.grad(objective))(params)
    step, _ = tx.update(gradient, tx.init(params), params, value_fn=objective, curvature_fn=other)
    gradient = flat(gradient)
    damped = dense_gauss_newton(other, params) + DAMPING * np.eye(len(gradient))
    rate = gradient @ gradient / (gradient @ damped @ gradient)
    np.testing.assert_allclose(flat(step), -rate * gradient, rtol=1e-9)


def test_microbatches_have_the_curvature_of_the_whole(x64):
    params, basis = params_of(), [params_of(), jax.tree.map(jnp.cos, params_of())]
    pieces = so.Microbatches.split(on, batch_of(0), size=2)
    whole = gauss_newton_forms(on(batch_of(0)), params)(basis)
    np.testing.assert_allclose(gauss_newton_forms(pieces, params)(basis), whole, rtol=1e-10)


@pytest.mark.parametrize("bad", ["gradient", "value", "curvature"])
def test_what_is_not_finite_changes_a_counter_only(bad):
    params, objective = params_of(), objective_on(0)
    tx = so.scale_by_quadratic_model(so.scale_by_kfac(so.find_layers(objective, params)))
    unit = {name: jnp.nan if name == bad else 1.0 for name in ("gradient", "value", "curvature")}

    @jax.jit
    def step(params, state, unit):
        value, grads = jax.value_and_grad(objective)(params)
        grads, value = jax.tree.map(lambda g: g * unit["gradient"], grads), value * unit["value"]
        curved = so.Objective(lambda p: objective.model(p) * unit["curvature"], objective.loss)
        return tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective, curvature_fn=curved
        )

    _, state = step(params, tx.init(params), dict.fromkeys(unit, 1.0))
    updates, after = step(params, state, unit)
    assert all_zero(updates)
    assert int(after.metrics.nonfinite_steps) == 1
    # K-FAC guards its own state, and has no objection to a finite gradient.
    of_kfac = after.direction._replace(metrics=state.direction.metrics)
    if bad == "curvature":
        of_kfac = of_kfac._replace(count=state.direction.count)
    metrics = after.metrics._replace(nonfinite_steps=state.metrics.nonfinite_steps)
    assert identical(after._replace(metrics=metrics, direction=of_kfac), state)


def test_a_direction_that_does_not_guard_its_state_sees_zeros():
    params, objective = params_of(), objective_on(0)
    tx = so.scale_by_quadratic_model(optax.scale_by_adam())
    value, grads = jax.value_and_grad(objective)(params)
    _, state = tx.update(grads, tx.init(params), params, value=value, value_fn=objective)
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    updates, after = tx.update(bad, state, params, value=value, value_fn=objective)
    assert all_zero(updates)
    assert identical(after.direction, state.direction)


@pytest.mark.parametrize(
    "setting",
    [{"damping": 0.0}, {"adapt_every": 0}, {"plane_every": 1.5}, {"momentum": 1}, {"max_norm": 0}],
)
def test_wrong_settings_raise(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        so.scale_by_quadratic_model(**setting)


def test_a_plain_callable_raises():
    tx = so.scale_by_quadratic_model()
    with pytest.raises(TypeError, match=r"so\.Objective"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), value_fn=jnp.sum)


def test_cost_in_gradients():
    """The first vector costs two thirds of a gradient, and the second as much."""
    sizes = (160, 200, 100, 20, 100, 200, 160)
    params = [jnp.ones(shape) for shape in itertools.pairwise(sizes)]
    x = jnp.ones((100, 160))

    def model(params):
        h = x
        for weight in params:
            h = jnp.tanh(h @ weight)
        return h

    objective = so.Objective(model, lambda z: jnp.mean((z - x) ** 2))

    def flops(vectors):
        def evaluate(params):
            forms = gauss_newton_forms(objective, params)
            basis = [jax.tree.map(lambda p, k=k: p * (k + 0.5), params) for k in range(vectors)]
            return jax.value_and_grad(objective)(params), forms(basis) if vectors else 0

        return jax.jit(evaluate).lower(params).compile().cost_analysis()["flops"]

    gradient = flops(0)
    one, two = ((flops(k) - gradient) / gradient for k in (1, 2))
    assert one < 0.67
    assert two < 1.33
    assert (two + 4 * one) / 5 < 0.8  # with plane_every=5
