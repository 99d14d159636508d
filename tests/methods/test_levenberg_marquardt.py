"""Levenberg-Marquardt: against an oracle of Nielsen's algorithm, in blocks, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from secondorder import levenberg_marquardt
from secondorder.objective import Microbatches, Objective
from tests.methods.comparisons import all_finite, all_zero, identical

TIMES = np.linspace(0, 1, 15)


def rosenbrock(p, xp):
    return xp.stack([10 * (p[1] - p[0] ** 2), 1 - p[0]])


def decay(p, xp):
    noise = 0.05 * np.cos(7 * TIMES)
    return p[0] * xp.exp(-p[1] * TIMES) + p[2] - (2 * np.exp(-4 * TIMES) + 0.5 + noise)


def helix(p, xp):
    """Fletcher and Powell's helical valley, off its branch cut."""
    angle = xp.arctan2(p[1], p[0]) / (2 * np.pi)
    return xp.stack([10 * (p[2] - 10 * angle), 10 * (xp.sqrt(p[0] ** 2 + p[1] ** 2) - 1), p[2]])


PROBLEMS = {
    "rosenbrock": (rosenbrock, [-1.2, 1.0]),
    "decay": (decay, [1.0, 1.0, 0.0]),
    "helix": (helix, [0.3, 1.0, 0.5]),
}


def objective_of(residuals):
    return Objective(lambda p: residuals(p, jnp), lambda z: jnp.sum(z**2) / 2)


def nielsen(residuals, start, steps, tau, diagonal=False):
    """The algorithm as the report has it, in NumPy; yields each point, damping and acceptance."""
    jacobian = jax.jacobian(lambda p: residuals(p, jnp))
    point, factor, damping = np.array(start), 2.0, None
    for _ in range(steps):
        r, j = np.asarray(residuals(point, np)), np.asarray(jacobian(point))
        matrix, g = j.T @ j, j.T @ r
        metric = np.diag(np.diag(matrix)) if diagonal else np.eye(len(point))
        if damping is None:
            damping = tau * (1 if diagonal else np.max(np.diag(matrix)))
        h = np.linalg.solve(matrix + damping * metric, -g)
        trial = np.asarray(residuals(point + h, np))
        gain = (r @ r - trial @ trial) / (h @ (damping * metric @ h - g))
        if gain > 0:
            point, accepted = point + h, True
            damping, factor = damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
        else:
            damping, factor, accepted = damping * factor, 2 * factor, False
        yield point, damping, accepted


def step_of(tx, objective, full_batch=False, **extra):
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(params, state):
        if full_batch:
            value, grads = value_and_grad(params, state=state)
        else:
            value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective, **extra
        )
        return optax.apply_updates(params, updates), state, updates

    return step


def run(tx, objective, params, steps, full_batch=False):
    """The parameters, state and values after some steps, which are scanned over."""
    step = step_of(tx, objective, full_batch)

    def body(carry, _):
        params, state, _ = step(*carry)
        return (params, state), objective(params)

    scanned = jax.jit(
        lambda params, state: jax.lax.scan(body, (params, state), length=steps),
    )
    (params, state), values = scanned(params, tx.init(params))
    return params, state, values


# Against the oracle.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("diagonal", [False, True], ids=["identity", "diagonal"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_iterates_are_those_of_nielsens_algorithm(problem, diagonal):
    residuals, start = PROBLEMS[problem]
    scaling = "diagonal" if diagonal else "identity"
    tx = levenberg_marquardt(damping=1e-3, scaling=scaling, full_batch=True)
    params = jnp.asarray(start)
    state = tx.init(params)
    step = jax.jit(step_of(tx, objective_of(residuals), full_batch=True))
    seen = set()
    for point, damping, accepted in nielsen(residuals, start, 12, 1e-3, diagonal):
        params, state, _ = step(params, state)
        np.testing.assert_allclose(params, point, rtol=1e-7, atol=1e-9)
        assert state.metrics.accepted == accepted
        # As long as the ratio is not one of rounding errors.
        if np.sum(np.asarray(residuals(point, np)) ** 2) < 1e-16 or state.metrics.step_norm < 1e-5:
            break
        own = state.damping.damping[0] * state.measures.scale[0]
        np.testing.assert_allclose(own, damping, rtol=1e-3)
        seen.add(accepted)
    assert True in seen
    if problem == "rosenbrock":
        assert seen == {True, False}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_minimum_and_evaluations_against_optimistix(problem):
    optimistix = pytest.importorskip("optimistix")
    residuals, start = PROBLEMS[problem]
    solver = optimistix.LevenbergMarquardt(rtol=1e-10, atol=1e-10)
    theirs = optimistix.least_squares(
        lambda p, _: residuals(p, jnp), solver, jnp.asarray(start), throw=False
    )
    needed = int(theirs.stats["num_steps"])  # one evaluation of the residuals each
    tx = levenberg_marquardt(damping=1e-3, full_batch=True)
    ours, _, values = run(tx, objective_of(residuals), jnp.asarray(start), 60, full_batch=True)
    np.testing.assert_allclose(ours, theirs.value, rtol=1e-5, atol=1e-7)
    least = objective_of(residuals)(theirs.value)
    first = 1 + int(jnp.argmax(values <= least * (1 + 1e-9) + 1e-14))
    print(f"{problem}: {first} evaluations, optimistix {needed}")
    assert first <= 1.5 * needed


# A model with layers.


RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((40, 3)), jnp.float32)
Y = jnp.asarray(np.sin(X @ RNG.standard_normal((3, 2))), jnp.float32)
PARAMS = {
    "hidden": {"w": jnp.asarray(RNG.standard_normal((3, 5)) / 2, jnp.float32), "b": jnp.zeros(5)},
    "out": {"w": jnp.asarray(RNG.standard_normal((5, 2)) / 2, jnp.float32), "b": jnp.zeros(2)},
}


def network(params, x=X):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def mse(outputs):
    return jnp.mean(jnp.sum((outputs - Y) ** 2, axis=-1)) / 2


OBJECTIVE = Objective(network, mse)


def update(tx, state=None, params=PARAMS, objective=OBJECTIVE, **extra):
    state = tx.init(params) if state is None else state
    value, grads = jax.value_and_grad(objective)(params)
    arguments = {"value": value, "grad": grads, "value_fn": objective} | extra
    return jax.jit(lambda grads, state: tx.update(grads, state, params, **arguments))(grads, state)


def assert_same(found, expected, rtol=1e-4, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("blocks", [None, "layers"])
def test_both_solvers_take_the_same_step(blocks):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), PARAMS)
    common = {"damping": 0.01, "relative": False, "blocks": blocks, "weight_decay": 1e-3}
    dense, _ = update(levenberg_marquardt(**common), params=params)
    exact = levenberg_marquardt(solver="conjugate_gradient", tolerance=1e-12, **common)
    products, state = update(exact, params=params)
    assert_same(products, dense, 1e-6, 1e-9)
    assert state.metrics.iterations > 5


def test_few_iterations_give_a_step_that_descends():
    tx = levenberg_marquardt(solver="conjugate_gradient", max_iterations=3, tolerance=0.0)
    _, state = update(tx)
    assert state.metrics.iterations == 3
    assert state.metrics.accepted


def test_diagonal_scaling_by_products_is_jacobi_preconditioned_and_descends():
    tx = levenberg_marquardt(
        solver="conjugate_gradient", scaling="running_diagonal", damping=0.1, diagonal_probes=8
    )
    _, state, values = run(tx, OBJECTIVE, PARAMS, 10)
    assert values[-1] < 0.2 * OBJECTIVE(PARAMS)
    assert all((leaf > 0).all() for leaf in jax.tree.leaves(state.measures.diagonal))


@pytest.mark.parametrize("scaling", ["diagonal", "running_diagonal"])
def test_scaled_steps_do_not_depend_on_units(scaling):
    units = {"hidden": {"w": 8.0, "b": 4.0}, "out": {"w": 0.25, "b": 2.0}}
    tx = levenberg_marquardt(scaling=scaling, damping=0.1)
    expected, _ = update(tx)
    scaled = Objective(lambda p: network(jax.tree.map(jnp.multiply, units, p)), mse)
    found, _ = update(tx, params=jax.tree.map(jnp.divide, PARAMS, units), objective=scaled)
    assert_same(jax.tree.map(jnp.multiply, units, found), expected, 1e-3, 1e-5)


def test_parameters_without_influence_stay():
    params = PARAMS | {"unused": jnp.ones(3)}
    for scaling in ("identity", "diagonal"):
        updates, state = update(levenberg_marquardt(scaling=scaling, damping=0.1), params=params)
        assert state.metrics.accepted
        assert all_zero(updates["unused"])


def test_scale_of_the_objective_changes_nothing():
    tiny = Objective(network, lambda z: 1e-8 * mse(z))
    for settings in ({}, {"solver": "conjugate_gradient"}):
        tx = levenberg_marquardt(damping=0.1, **settings)
        assert_same(update(tx, objective=tiny)[0], update(tx)[0], 1e-3, 1e-5)


def test_model_of_weight_decay_is_exact_on_a_quadratic():
    linear = Objective(lambda p: X @ p, lambda z: jnp.mean(jnp.sum((z - Y) ** 2, -1)) / 2)
    tx = levenberg_marquardt(damping=1e-6, weight_decay=0.5)
    updates, state = update(tx, params=jnp.ones((3, 2)), objective=linear)
    matrix = np.asarray(X.T @ X / 40 + 0.5 * np.eye(3))
    assert_same(1 + updates, np.linalg.solve(matrix, X.T @ Y / 40), 1e-3, 1e-4)
    np.testing.assert_allclose(state.metrics.ratio, 1, rtol=1e-3)


# Blocks.


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"step": "full"}, {"schedule": "asynchronous"}, {"solver": "conjugate_gradient"},
        {"schedule": "asynchronous", "solver": "conjugate_gradient"},
    ],
    ids=str,
)  # fmt: skip
def test_blocks_converge(settings):
    tx = levenberg_marquardt(blocks="layers", full_batch=True, damping=0.01, **settings)
    _, state, values = run(tx, OBJECTIVE, PARAMS, 40, full_batch=True)
    assert values[-1] < 0.05 * OBJECTIVE(PARAMS)
    assert (jnp.diff(values) <= 1e-6).all()
    assert state.damping.damping.shape == ((2,) if "schedule" in settings else (1,))


def test_turns_move_one_block_each_by_its_own_damping():
    tx = levenberg_marquardt(blocks="layers", schedule="asynchronous")
    first, state = update(tx)
    assert all_zero(first["out"])
    assert not all_zero(first["hidden"])
    assert state.damping.damping[1] == np.float32(1e-3)
    assert state.measures.scale[1] == 0
    params = optax.apply_updates(PARAMS, first)
    second, after = update(tx, state, params)
    assert all_zero(second["hidden"])
    assert after.damping.damping[0] == state.damping.damping[0]
    # The step is that of the block alone.
    held = Objective(lambda out: network(params | {"out": out}), mse)
    alone, _ = update(levenberg_marquardt(), params=params["out"], objective=held)
    assert_same(second["out"], alone, 1e-4, 1e-6)


def test_joint_step_of_blocks_has_the_best_length():
    start = {"damping": 0.1, "blocks": "layers"}
    found, state = update(levenberg_marquardt(**start))
    full, _ = update(levenberg_marquardt(step="full", **start))
    rate = float(found["out"]["b"][0] / full["out"]["b"][0])
    assert 0.1 < rate < 0.99
    assert_same(found, jax.tree.map(lambda leaf: rate * leaf, full), 1e-3)
    assert state.metrics.ratio > 0.5


def test_recurrent_net_in_blocks():
    """The sum of a sequence, remembered through a scan."""
    rng = np.random.default_rng(1)
    inputs = jnp.asarray(rng.uniform(-0.5, 0.5, (8, 24, 1)), jnp.float32)
    target = jnp.cumsum(inputs, axis=0)

    def model(params):
        def cell(hidden, x):
            hidden = jnp.tanh(x @ params["in"] + hidden @ params["recurrent"] + params["bias"])
            return hidden, hidden @ params["out"]

        return jax.lax.scan(cell, jnp.zeros((24, 4)), inputs)[1]

    params = {
        "in": jnp.asarray(rng.standard_normal((1, 4)), jnp.float32) / 2,
        "recurrent": jnp.eye(4) / 2,
        "bias": jnp.zeros(4),
        "out": jnp.asarray(rng.standard_normal((4, 1)), jnp.float32) / 2,
    }
    objective = Objective(model, lambda z: jnp.mean((z - target) ** 2))

    def blocks(path):
        return "recurrent" if path in ("recurrent", "bias") else path

    for schedule in ("synchronous", "asynchronous"):
        tx = levenberg_marquardt(blocks=blocks, schedule=schedule, full_batch=True)
        _, state, values = run(tx, objective, params, 45, full_batch=True)
        assert len(state.measures.scale) == 3
        assert values[-1] < 0.05 * objective(params)


# Rejections.


def test_rejected_steps_are_zero_and_raise_the_damping_faster_and_faster():
    objective = Objective(
        lambda p: p, lambda z: jnp.sum(z**2) / 2 + jnp.sum(jnp.where(z == 1, 0, 9))
    )
    tx = levenberg_marquardt(damping=0.25, full_batch=True)
    params = jnp.ones(3)
    state = tx.init(params)
    for count, damping in enumerate((0.5, 2.0, 16.0)):
        updates, state = update(tx, state, params, objective)
        assert all_zero(updates)
        assert state.damping.damping.tolist() == [damping]
        assert state.damping.factor.tolist() == [4.0 * 2**count]
        assert state.value == objective(params)
    assert state.metrics.rejections == 3
    assert not state.metrics.accepted
    assert state.metrics.step_norm > 0


def test_trials_that_are_not_finite_are_rejected():
    objective = Objective(lambda p: p, lambda z: jnp.sum(jnp.where(z < 1, jnp.nan, z**2)))
    for full_batch in (False, True):
        tx = levenberg_marquardt(full_batch=full_batch)
        updates, state = update(tx, params=jnp.ones(2), objective=objective)
        assert all_zero(updates)
        assert state.metrics.rejections == 1
        assert all_finite(state._replace(metrics=None))


@pytest.mark.parametrize("solver", ["dense", "conjugate_gradient"])
def test_curvature_that_is_not_finite_is_a_rejection(solver):
    broken = Objective(network, lambda z: jnp.nan * mse(z))
    scaling = "running_diagonal" if solver == "dense" else "identity"
    tx = levenberg_marquardt(solver=solver, scaling=scaling, damping=0.5)
    updates, state = update(tx, curvature_fn=broken)
    assert all_zero(updates)
    assert state.metrics.rejections == 1
    assert all_finite((state.damping, state.measures))
    assert not all_zero(update(tx, state)[0])


def test_a_batch_that_is_not_finite_changes_one_counter():
    broken = Objective(network, lambda z: jnp.nan * mse(z))
    for settings in ({"full_batch": True, "uphill": 1.0}, {"scaling": "running_diagonal"}):
        tx = levenberg_marquardt(blocks="layers", **settings)
        state = update(tx)[1]
        updates, new = update(tx, state, objective=broken)
        assert all_zero(updates)
        assert new.metrics.nonfinite_steps == 1
        assert identical(new._replace(metrics=0), state._replace(metrics=0))
        counted = state.metrics._replace(nonfinite_steps=new.metrics.nonfinite_steps)
        assert identical(new.metrics, counted)


def test_nothing_is_tried_where_the_gradient_vanishes():
    tx = levenberg_marquardt(full_batch=True)
    objective = Objective(lambda p: p, lambda z: jnp.sum(z**2))
    updates, state = update(tx, params=jnp.zeros(2), objective=objective)
    assert all_zero(updates)
    assert state.metrics.rejections == 0
    assert state.damping.damping.tolist() == [np.float32(1e-3)]


@pytest.mark.usefixtures("x64")
def test_uphill_steps_along_a_valley():
    """They are taken only with the exponent, and bounded by the lowest objective."""
    objective, start = objective_of(rosenbrock), jnp.array([-1.2, 1.0])
    found = {}
    for uphill in (None, 2.0):
        tx = levenberg_marquardt(damping=1e-3, uphill=uphill)
        params, _, values = run(tx, objective, start, 60)
        np.testing.assert_allclose(params, 1, rtol=1e-5)
        found[uphill] = values
    rises = {uphill: bool((jnp.diff(values) > 1e-12).any()) for uphill, values in found.items()}
    assert rises == {None: False, 2.0: True}


# Interface.


def test_bfloat16_parameters():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    tx = levenberg_marquardt(damping=0.01, blocks="layers", full_batch=True)
    objective = Objective(lambda p: network(p, X.astype(jnp.bfloat16)), mse)
    updates, state = update(tx, params=params, objective=objective)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert state.damping.damping.dtype == jnp.float32
    _, _, values = run(tx, objective, params, 15)
    assert values[-1] < 0.3 * objective(params)


def test_it_compiles_once_and_donates_its_state():
    tx = levenberg_marquardt(damping=jnp.float32(0.1), scaling="running_diagonal", uphill=1.0)
    step = jax.jit(step_of(tx, OBJECTIVE), donate_argnums=1)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state, _ = step(params, state)
    assert step._cache_size() == 1
    assert OBJECTIVE(params) < OBJECTIVE(PARAMS)


def test_full_batch_keeps_value_and_gradient_of_the_point():
    tx = levenberg_marquardt(full_batch=True, weight_decay=0.1)
    updates, state = update(tx)
    value, grads = jax.value_and_grad(OBJECTIVE)(optax.apply_updates(PARAMS, updates))
    assert_same((state.value, state.grad), (value, grads), 1e-5)
    plain, _ = update(levenberg_marquardt(weight_decay=0.1))
    assert_same(updates, plain, 1e-5)


def test_values_and_gradients_are_optional():
    tx = levenberg_marquardt(full_batch=True)
    assert_same(update(tx, value=None, grad=None), update(tx))


def test_microbatches_and_aux_are_the_same_problem():
    def objective_on(batch):
        x, y = batch
        return Objective(
            lambda p: network(p, x), lambda z: jnp.mean(jnp.sum((z - y) ** 2, axis=-1)) / 2
        )

    pieces = Microbatches.split(objective_on, (X, Y), size=10)
    with_aux = Objective(lambda p: (network(p), "aux"), mse, has_aux=True)
    tx = levenberg_marquardt(solver="conjugate_gradient", damping=0.1)
    expected, _ = update(tx)
    assert_same(update(tx, objective=pieces)[0], expected, 1e-3, 1e-5)
    assert_same(update(tx, value_fn=with_aux)[0], expected)


def test_curvature_of_another_batch():
    part = Objective(functools.partial(network, x=X[:20]), lambda z: jnp.mean((z - Y[:20]) ** 2))
    tx = levenberg_marquardt(damping=0.1)
    plain = lambda p: mse(network(p))  # noqa: E731
    updates, state = update(tx, value_fn=plain, curvature_fn=part)
    assert state.metrics.accepted
    with pytest.raises(AssertionError):
        assert_same(updates, update(tx)[0])


def test_missing_arguments_and_plain_objectives_are_named():
    tx = levenberg_marquardt()
    state, grads = tx.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    with pytest.raises(ValueError, match="levenberg_marquardt needs the current `params`"):
        tx.update(grads, state, value_fn=OBJECTIVE)
    with pytest.raises(ValueError, match="levenberg_marquardt needs `value_fn`"):
        tx.update(grads, state, PARAMS)
    with pytest.raises(TypeError, match="needs the split"):
        tx.update(grads, state, PARAMS, value_fn=lambda p: mse(network(p)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("damping", 0.0), ("damping", -1.0), ("relative", 1), ("scaling", "none"),
        ("solver", "qr"), ("tolerance", 1.0), ("tolerance", -0.1), ("max_iterations", 0),
        ("max_iterations", 2.0), ("schedule", "random"), ("schedule", "asynchronous"),
        ("step", "half"), ("acceptance", 1.0), ("acceptance", -0.1), ("uphill", -1.0),
        ("full_batch", 1), ("diagonal_probes", 0), ("weight_decay", -0.1), ("seed", 0.5),
    ],
)  # fmt: skip
def test_bad_hyperparameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        levenberg_marquardt(**{name: value})
