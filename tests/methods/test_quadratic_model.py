"""Steps from the quadratic model: against dense algebra, behind every direction, and their cost."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from secondorder.methods import quadratic_model
from secondorder.methods.quadratic_model_trial import Review
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
    settings = {"damping": DAMPING, "weight_decay": DECAY, "confirmation": None}
    tx = so.scale_by_quadratic_model(optax.scale(3.0), **settings)
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


@pytest.mark.parametrize("scale", [1e-18, -1e18])
@pytest.mark.parametrize("setting", [{}, {"plane_every": 3}, {"momentum": False}])
def test_directions_whose_squares_leave_the_range(scale, setting):
    """In float32; the third step is on the line of the last proportions, or on a plane."""
    given = setting | {"damping": DAMPING}
    one, other = (
        take_steps(so.scale_by_quadratic_model(optax.scale(c), **given), 3) for c in (1.0, scale)
    )
    for (_, step, _, _), (_, scaled, state, _) in zip(one, other, strict=True):
        np.testing.assert_allclose(flat(scaled), flat(step), rtol=1e-3, atol=1e-5)
        assert int(state.metrics.nonfinite_steps) == 0
    rate = other[-1][2].metrics.rate
    np.testing.assert_allclose(rate * scale, one[-1][2].metrics.rate, rtol=1e-3)


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
    assert state.coefficients[1] == 0
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
    [(0.1, 20 / 19), (0.5, 1.0), (0.9, 19 / 20), (-0.1, 4.0), (-2.0, 4.0), (np.nan, 4.0)],
)
def test_the_damping_follows_the_ratio(actual, factor):
    """The step is from 1 to 2/3 and promises 2/9; where the objective rises there is no step."""
    jump = 0.25 - actual * 2 / 9 - 1 / 36
    objective = so.Objective(
        lambda p: p, lambda z: jnp.sum((z - 0.5) ** 2 + jnp.where(z == 1.0, 0.0, jump))
    )
    tx = so.scale_by_quadratic_model(damping=1.0, adapt_every=1)
    ((_, updates, state, _),) = take_steps(tx, 1, objective, jnp.ones(1))
    np.testing.assert_allclose(state.damping, factor, rtol=1e-5)
    assert int(state.metrics.rejections) == int(factor == 4)
    assert bool(all_zero(updates)) == (factor == 4)


def test_nothing_is_rejected_where_nothing_is_left():
    """The value is zero, and so are its gradient, the promise, and what a step changes."""
    objective = so.Objective(lambda p: p, lambda z: jnp.sum(z**2))
    tx = so.scale_by_quadratic_model(damping=1.0, adapt_every=1)
    *_, (_, updates, state, _) = take_steps(tx, 3, objective, jnp.zeros(2))
    assert bool(all_zero(updates))
    assert int(state.metrics.rejections) == 0
    assert float(state.damping) < 4


def test_early_steps_are_all_judged_and_raise_the_damping_only():
    """A slope of -1 promises much that is not kept; later only each seventh step is judged."""
    steep = so.Objective(lambda p: p, lambda z: jnp.sum(jnp.abs(z) ** 1.1))
    tx = so.scale_by_quadratic_model(damping=1e-6, adapt_every=7)
    history = take_steps(tx, 30, steep, jnp.ones(1))
    states = [state for _, _, state, _ in history]
    dampings = np.array([1e-6, *(float(state.damping) for state in states)])
    factors = dampings[1:] / dampings[:-1]
    tried = [int(state.metrics.evaluations) for state in states]
    assert tried == 20 * [1] + [int((k + 1) % 7 == 0) for k in range(20, 30)]
    due = np.arange(1, 31) % 7 == 0
    assert np.all(factors[:20][~due[:20]] >= 1)
    assert np.any(factors[:20][~due[:20]] > 1)
    np.testing.assert_array_equal(factors[20:][~due[20:]], 1)


def values_of_rectifiers(seed, steps=20):
    """Of a deep autoencoder on new batches, with curvature from a sixteenth of each."""
    rng = np.random.default_rng(seed)
    sizes = (16, 24, 16, 8, 3, 8, 16, 24, 16)
    params = [
        jnp.asarray(rng.normal(size=shape) * np.sqrt(2 / shape[0]), jnp.float32)
        for shape in itertools.pairwise(sizes)
    ]
    basis = rng.normal(size=(6, 16))

    def model(params, x):
        h = x
        for weight in params[:-1]:
            h = jax.nn.relu(h @ weight)
        return h @ params[-1]

    def fun(x):
        return so.Objective(
            lambda p: model(p, x), lambda z: jnp.mean(jnp.sum((z - x) ** 2, axis=-1)) / 2
        )

    layers = so.find_layers(fun(jnp.ones((64, 16))), params)
    tx = so.kfac(None, layers, damping=1e-5, confirmation=None)

    @jax.jit
    def step(params, state, x):
        value, grads = jax.value_and_grad(fun(x))(params)
        given = {"value_fn": fun(x), "curvature_fn": fun(x[:4])}
        updates, state = tx.update(grads, state, params, value=value, grad=grads, **given)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(steps):
        x = jnp.asarray(np.maximum(rng.normal(size=(64, 6)) @ basis, 0), jnp.float32)
        params, state, value = step(params, state, x)
        values.append(float(value))
    return values


@pytest.mark.parametrize("seed", range(3))
def test_a_first_damping_that_is_far_too_small(seed, monkeypatch):
    """It leads nowhere far; by steps that are judged in their periods alone it does.

    If they are not undone either.
    """
    values = values_of_rectifiers(seed)
    assert max(values) < 2 * values[0]
    assert values[-1] < values[0] / 2
    monkeypatch.setattr(quadratic_model, "_EARLY", 0)
    never = jnp.zeros((), bool)
    monkeypatch.setattr(quadratic_model, "review_last_step", lambda *_: Review(never, never))
    assert not max(values_of_rectifiers(seed)) < 1e6


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


DIRECTIONS = {
    "gradient": lambda layers: so.scale_by_quadratic_model(),
    "adam": lambda layers: optax.chain(optax.scale_by_adam(), so.scale_by_quadratic_model()),
    "kbfgs": lambda layers: optax.chain(so.scale_by_kbfgs(layers), so.scale_by_quadratic_model()),
    "kbfgs-told": lambda layers: so.scale_by_quadratic_model(so.scale_by_kbfgs(layers)),
    "kfac": lambda layers: optax.chain(
        so.scale_by_kfac(layers, damping=0.1), so.scale_by_quadratic_model(damping=0.1)
    ),
    "kfac-told": lambda layers: so.scale_by_quadratic_model(so.scale_by_kfac(layers), damping=0.1),
    "kfac-told-in-a-chain": lambda layers: so.scale_by_quadratic_model(
        optax.chain(so.scale_by_kfac(layers), optax.scale(2.0)), damping=0.1
    ),
    "lrsfn": lambda layers: so.scale_by_quadratic_model(
        so.scale_by_low_rank_saddle_free_newton(2, damping=0.3)
    ),
    "bhf": lambda layers: so.scale_by_quadratic_model(so.block_hessian_free(max_iterations=3)),
    "shampoo": lambda layers: optax.chain(
        so.scale_by_shampoo(precondition_every=2), so.scale_by_quadratic_model()
    ),
    "soap": lambda layers: optax.chain(
        so.scale_by_soap(precondition_every=2), so.scale_by_quadratic_model()
    ),
    "soap-inside": lambda layers: so.scale_by_quadratic_model(so.scale_by_soap()),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_it_trains_behind_every_direction(name):
    """Past a batch that is not finite, which those that guard their state see in a chain."""
    objective = objective_on(0)
    tx = DIRECTIONS[name](so.find_layers(objective, params_of()))

    @jax.jit
    def step(params, state, unit):
        value, grads = jax.value_and_grad(objective)(params)
        value, grads = value * unit, jax.tree.map(lambda g: g * unit, grads)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, value

    guards = name != "adam"  # as a link it sees the batch first, and keeps its NaN
    params, state = params_of(), tx.init(params_of())
    values = []
    for k in range(13):
        bad = guards and k == 4
        before = params
        params, state, value = step(params, state, jnp.nan if bad else 1.0)
        if bad:
            assert identical(params, before)
        else:
            values.append(float(value))
    # The loss is not bounded by zero; in twelve gradients of any length it falls as far as that.
    assert values[-1] < values[0] - 0.5


def test_the_damping_is_handed_through_a_chain():
    """To K-FAC, whose own has then no effect."""
    objective, params = objective_on(0), params_of()
    layers = so.find_layers(objective, params)

    @jax.jit
    def coefficients(own):
        link = optax.chain(so.scale_by_kfac(layers, damping=own), optax.identity())
        tx = so.scale_by_quadratic_model(link, damping=DAMPING)
        grads = jax.grad(objective)(params)
        return tx.update(grads, tx.init(params), params, value_fn=objective)[1].coefficients

    np.testing.assert_allclose(coefficients(1e-3), coefficients(1e3), rtol=1e-5)


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
    """And a flag: a second one in a row would undo the step."""
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
    assert int(after.metrics.evaluations) == 0
    metrics = after.metrics._replace(
        nonfinite_steps=state.metrics.nonfinite_steps, evaluations=state.metrics.evaluations
    )
    assert after.suspect
    assert not state.suspect
    after = after._replace(suspect=state.suspect, metrics=metrics, direction=of_kfac)
    assert identical(after, state)


LOGARITHM = so.Objective(lambda p: p, lambda z: jnp.sum(z - jnp.log(z)))  # least at one


@pytest.mark.parametrize("adapt_every", [1, 5])
@pytest.mark.parametrize("momentum", [True, False])
def test_rejected_steps_lead_to_one_that_is_taken(adapt_every, momentum):
    """From 5 the model goes far below zero until the damping is above 0.12."""
    tx = so.scale_by_quadratic_model(damping=1e-3, adapt_every=adapt_every, momentum=momentum)
    history = take_steps(tx, 25, LOGARITHM, jnp.full(1, 5.0))
    dampings = [float(state.damping) for _, _, state, _ in history[:4]]
    np.testing.assert_allclose(dampings, [4e-3, 1.6e-2, 6.4e-2, 0.256], rtol=1e-5)
    params, _, state, _ = history[-1]
    np.testing.assert_allclose(params, 1, atol=1e-5)
    assert int(state.metrics.rejections) == 4
    assert int(state.metrics.nonfinite_steps) == int(state.metrics.undone) == 0


LOSSES = (
    lambda z: jnp.sum((z - 5) ** 2),
    lambda z: jnp.sum(z - jnp.log(z)),
    lambda z: jnp.nan * jnp.sum(z),
    lambda z: 1e4 + jnp.sum((z - 5) ** 2),
    lambda z: jnp.sum(jnp.exp(z**2)),
)
PARABOLA, LOG, BAD, HARD, STEEP = range(5)


def alternating_run(tx, kinds, params):
    """Parameters and states over batches of these kinds."""

    @jax.jit
    def step(params, state, kind):
        objective = so.Objective(lambda p: p, lambda z: jax.lax.switch(kind, LOSSES, z))
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    state, history = tx.init(params), []
    for kind in kinds:
        params, state = step(params, state, kind)
        history.append((params, state))
    return history


@pytest.mark.parametrize("momentum", [True, False])
def test_an_untried_step_to_nowhere_is_undone(momentum, monkeypatch):
    monkeypatch.setattr(quadratic_model, "_EARLY", 0)
    tx = so.scale_by_quadratic_model(damping=1e-3, momentum=momentum)
    history = alternating_run(tx, [PARABOLA] + 30 * [LOG], jnp.full(1, 4.0))
    places = [float(params[0]) for params, _ in history]
    assert places[1] == places[2] < 0
    np.testing.assert_allclose([places[0], places[3]], [4.999, 4.999], atol=1e-3)
    np.testing.assert_allclose(history[3][1].damping, 4e-3, rtol=1e-5)
    np.testing.assert_allclose(places[-1], 1, atol=1e-5)
    metrics = history[-1][1].metrics
    counts = [int(n) for n in (metrics.undone, metrics.nonfinite_steps, metrics.rejections)]
    assert counts == [1, 2, 3]


@pytest.mark.parametrize(("kind", "undone"), [(HARD, 0), (STEEP, 1)])
def test_a_step_is_undone_by_the_batch_that_rose_not_by_one_that_is_high(kind, undone):
    """Both are far above the average, but the hard batch was so before the step as well."""
    tx = so.scale_by_quadratic_model(damping=1.0)
    history = alternating_run(tx, [PARABOLA, kind, PARABOLA], jnp.full(1, 3.0))
    (first, _), (second, state), (third, last) = history
    before, after = history[0][1], state
    assert 3 < first < 5
    if undone:
        np.testing.assert_allclose(second, 3, rtol=1e-6)
    else:
        assert first < second < 5
    assert int(after.metrics.undone) == int(last.metrics.undone) == undone
    assert int(after.metrics.nonfinite_steps) == 0
    assert int(after.metrics.evaluations) == (1 if undone else 2)  # the early step was tried too
    np.testing.assert_allclose(after.damping / before.damping, 4 if undone else 1, rtol=1e-6)
    assert bool(jnp.any(after.coefficients)) != undone
    assert third > second


def test_bad_data_undo_one_step_at_most():
    """One bad batch changes nothing, two in a row undo a step, and more of them nothing else."""
    tx = so.scale_by_quadratic_model(damping=1.0)
    kinds = [BAD, BAD, PARABOLA, BAD, PARABOLA, *4 * [BAD], PARABOLA]
    history = alternating_run(tx, kinds, jnp.full(1, 4.0))
    places = np.array([float(params[0]) for params, _ in history])
    assert places[0] == places[1] == 4  # there is no step to be undone
    assert 4 < places[2] == places[3] < places[4] == places[5]
    np.testing.assert_allclose(places[6:9], places[3], rtol=1e-6)
    assert places[9] > places[8]
    dampings = [float(state.damping) for _, state in history]
    np.testing.assert_allclose(dampings, 6 * [1.0] + 4 * [4.0], rtol=1e-6)
    assert int(history[-1][1].metrics.undone) == 1


def test_the_bound_of_the_damping_is_reported():
    rule = so.DampingRule(smallest=0.4, largest=5.0, lower_by=0.5)
    tx = so.scale_by_quadratic_model(damping=5.0, damping_rule=rule, adapt_every=1)
    history = take_steps(tx, 6, LINEAR, {"a": jnp.array([3.0, -1.0])})
    assert [int(state.metrics.bound) for _, _, state, _ in history] == [1, 0, 0, 0, -1, -1]


def flops_of(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_what_a_direction_is_made_of_is_the_gradient():
    """It is not evaluated again; what is behind a direction cannot know it."""
    objective, params = objective_on(0), params_of()

    def passes(tx, known):
        """Forward passes of the model in an update."""

        def update(value, grads):
            given = {"grad": grads} if known else {}
            return tx.update(
                grads, tx.init(params), params, value=value, value_fn=objective, **given
            )

        return str(jax.make_jaxpr(update)(objective(params), params)).count(" tanh ")

    around = so.scale_by_quadratic_model(optax.scale(2.0))
    behind = optax.chain(optax.scale(2.0), so.scale_by_quadratic_model())
    # One for the curvature, one where the step is tried, one where the last step began.
    counts = [passes(tx, known) for tx in (around, behind) for known in (True, False)]
    assert counts == [3, 3, 3, 4]


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


def autoencoder(cases=100):
    """One so wide that products with its weights are nearly all the work."""
    sizes = (160, 200, 100, 20, 100, 200, 160)
    params = [jnp.ones(shape) for shape in itertools.pairwise(sizes)]
    x = jnp.ones((cases, 160))

    def model(params):
        h = x
        for weight in params:
            h = jnp.tanh(h @ weight)
        return h

    return so.Objective(model, lambda z: jnp.mean((z - x) ** 2)), params


def test_cost_in_gradients():
    """The first vector costs two thirds of a gradient, and the second as much."""
    objective, params = autoencoder()

    def work(vectors):
        def evaluate(params):
            forms = gauss_newton_forms(objective, params)
            basis = [jax.tree.map(lambda p, k=k: p * (k + 0.5), params) for k in range(vectors)]
            return jax.value_and_grad(objective)(params), forms(basis) if vectors else 0

        return flops_of(evaluate, params)

    gradient = work(0)
    one, two = ((work(k) - gradient) / gradient for k in (1, 2))
    assert one < 0.67
    assert two < 1.33


def test_cost_of_a_plane_in_every_fifth_step():
    """Of whole steps as compiled for their place, without the objective behind or before them."""
    objective, params = autoencoder(cases=500)
    tx = so.scale_by_quadratic_model(plane_every=5, adapt_every=1000)
    state = tx.init(params)

    def gradient_and_step(count):
        def evaluate(params, last_step):
            value, grads = jax.value_and_grad(objective)(params)
            # Constants, so that only the branches that are taken are compiled.
            constant = {"count": jnp.int32(count), "coefficients": jnp.ones(2)}
            now = state._replace(last_step=last_step, **constant)
            return tx.update(grads, now, params, value=value, grad=grads, value_fn=objective)

        return flops_of(evaluate, params, params)

    gradient = flops_of(jax.value_and_grad(objective), params)
    before = flops_of(objective, params)  # one branch that a run which goes down never takes
    on_plane, on_line = ((gradient_and_step(count) - before) / gradient - 1 for count in (25, 26))
    assert 1.2 < on_plane < 1.4
    assert 0.6 < on_line < 0.75
    assert (on_plane + 4 * on_line) / 5 < 0.8
