"""Block-diagonal Hessian-free optimization."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import secondorder as so
from secondorder.operators import ENGINES
from tests.methods.least_squares import dense, make_problem, train

BLOCKS = (slice(0, 16), slice(16, 26))  # of the raveled parameters


def block_solutions(G, g, damping):
    """The direction of a dense solve of every block."""
    d = np.zeros_like(g)
    for block in BLOCKS:
        matrix = G[block, block] + damping * np.eye(len(g[block]))
        d[block] = -np.linalg.solve(matrix, g[block])
    return d


@pytest.mark.parametrize("engine", ENGINES)
def test_first_step_is_the_scaled_solution_of_the_blocks(x64, engine):
    objective, params = make_problem(jnp.float64)
    theta, _, gradient, matrix = dense(objective, params)
    g, G = gradient(theta), matrix(theta)
    d = block_solutions(G, g, 0.1)
    alpha = -g @ d / (d @ G @ d + 0.1 * d @ d)
    assert alpha < 0.9  # the blocks do overshoot
    tx = so.block_hessian_free(engine=engine, damping=0.1, max_iterations=60, progress=0.0)
    trained, state = train(tx, objective, params, 1)
    np.testing.assert_allclose(ravel_pytree(trained)[0], theta + alpha * d, rtol=1e-6)
    np.testing.assert_allclose(state.metrics.rate, alpha, rtol=1e-7)
    assert state.metrics.engine == ENGINES.index(engine)


def test_one_block_needs_no_scaling(x64):
    objective, params = make_problem(jnp.float64)
    tx = so.block_hessian_free(
        blocks=lambda path: "all", damping=0.1, max_iterations=60, progress=0.0
    )
    _, state = train(tx, objective, params, 1)
    np.testing.assert_allclose(state.metrics.rate, 1, rtol=1e-7)


def test_damping_relative_to_the_curvature_of_each_block(x64):
    objective, params = make_problem(jnp.float64)
    theta, _, _, matrix = dense(objective, params)
    G = matrix(theta)
    tx = so.block_hessian_free(
        relative_damping=True, damping=0.5, damping_rule=None, engine="linearized"
    )
    shifts = []
    state = tx.init(params)
    update = jax.jit(
        lambda g, s: tx.update(g, s, params, value=objective(params), value_fn=objective)
    )
    grad = jax.grad(objective)(params)
    for _ in range(300):
        _, state = update(grad, state)
        shifts.append(np.asarray(state.block_damping))
    means = [0.5 * np.trace(G[b, b]) / (b.stop - b.start) for b in BLOCKS]
    np.testing.assert_allclose(np.mean(shifts, axis=0), means, rtol=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"step": "fixed", "learning_rate": 0.3},
        {"step": "armijo", "warm_start": 0.9},
        {"step": "optimal", "damping_rule": so.DampingRule(), "damping": 1.0},
        {"relative_damping": True, "damping": 0.1},
    ],
)
def test_reduces_the_objective(settings):
    objective, params = make_problem()
    tx = so.block_hessian_free(max_iterations=12, **settings)
    trained, state = train(tx, objective, params, 12)
    assert objective(trained) < 0.5 * objective(params)
    if "damping_rule" in settings:
        assert state.metrics.evaluations == 1
        assert state.damping != 1.0


def test_the_scaled_step_holds_where_the_unscaled_overshoots():
    """The point of the scaling: without it the joint step of four layers raises the loss."""
    rng = np.random.default_rng(0)
    sizes = [8, 16, 16, 16, 4]
    x = jnp.asarray(rng.normal(size=(256, 8)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 4, 256))
    params = [
        {"w": jnp.asarray(rng.normal(size=(i, o)) / i**0.5, jnp.float32)}
        for i, o in itertools.pairwise(sizes)
    ]

    def model(p):
        h = x
        for layer in p[:-1]:
            h = jnp.tanh(h @ layer["w"])
        return h @ p[-1]["w"]

    def loss(z):
        return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(256), labels])

    objective = so.Objective(model, loss)
    params, _ = train(optax.with_extra_args_support(optax.adam(1e-2)), objective, params, 60)
    after = {}
    for step in ("fixed", "optimal"):
        tx = so.block_hessian_free(step=step, damping=1e-3, damping_rule=None, engine="factored")
        after[step] = float(objective(train(tx, objective, params, 1)[0]))
    before = float(objective(params))
    assert after["optimal"] < before < after["fixed"]


def test_an_engine_that_the_model_does_not_allow_is_an_error():
    objective = so.Objective(lambda p: p * jnp.ones((3, 2)), lambda z: jnp.mean(z**2))
    tx, params = so.block_hessian_free(engine="dual"), jnp.ones(2)
    with pytest.raises(ValueError, match="dual"):
        tx.update(params, tx.init(params), params, value_fn=objective)


def test_a_model_without_layers_is_linearized():
    objective = so.Objective(lambda p: p * jnp.ones((3, 2)), lambda z: jnp.mean((z - 1) ** 2))
    trained, state = train(so.block_hessian_free(damping=1e-4), objective, jnp.zeros(2), 3)
    np.testing.assert_allclose(trained, 1, atol=1e-3)
    assert ENGINES[int(state.metrics.engine)] == "linearized"


def test_without_damping_the_exact_engine_is_not_chosen():
    objective, params = make_problem(cases=4)
    _, state = train(so.block_hessian_free(damping=0.0, max_iterations=5), objective, params, 1)
    assert ENGINES[int(state.metrics.engine)] != "dual"


def test_a_batch_that_is_not_finite_changes_nothing():
    objective, params = make_problem()
    tx = so.block_hessian_free(warm_start=0.5, max_iterations=5)
    params, state = train(tx, objective, params, 2)
    broken = so.Objective(objective.model, lambda z: objective.loss(z) * jnp.nan)
    value, grad = jax.value_and_grad(broken)(params)
    updates, new = jax.jit(
        lambda g, s: tx.update(g, s, params, value=value, grad=g, value_fn=broken)
    )(grad, state)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    assert new.metrics.nonfinite_steps == 1
    metrics = new.metrics._replace(nonfinite_steps=state.metrics.nonfinite_steps)
    jax.tree.map(np.testing.assert_array_equal, new._replace(metrics=metrics), state)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"engine": "fast"}, "engine"),
        ({"step": "newton"}, "step"),
        ({"engine": "dual", "damping": 0.0}, "damping"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"max_iterations": 2.5}, "max_iterations"),
        ({"warm_start": -1.0}, "warm_start"),
    ],
)
def test_wrong_hyperparameters_are_errors(settings, match):
    with pytest.raises(ValueError, match=match):
        so.block_hessian_free(**settings)


def primitives_of(jaxpr):
    """The names of all primitives in a jaxpr, those of its bodies included."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for body in bodies_of(equation):
            names |= primitives_of(body)
    return names


def bodies_of(equation):
    """The jaxprs inside an equation."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            body = getattr(part, "jaxpr", part)
            if hasattr(body, "eqns"):
                yield body


def loops_of(jaxpr):
    """All `while` equations, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation
        for body in bodies_of(equation):
            yield from loops_of(body)


@pytest.mark.parametrize("engine", ["linearized", "factored"])
def test_the_loop_holds_no_forward_pass(engine):
    objective, params = make_problem()
    tx = so.block_hessian_free(engine=engine, damping_rule=None)
    state = tx.init(params)
    grad = jax.grad(objective)(params)
    jaxpr = jax.make_jaxpr(lambda g, p: tx.update(g, state, p, value_fn=objective))(grad, params)
    assert "tanh" in primitives_of(jaxpr.jaxpr)
    loops = [*loops_of(jaxpr.jaxpr)]
    assert any("dot_general" in primitives_of(b) for loop in loops for b in bodies_of(loop))
    assert all("tanh" not in primitives_of(b) for loop in loops for b in bodies_of(loop))
