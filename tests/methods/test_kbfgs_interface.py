"""What K-BFGS accepts and returns: options around the direction, compilation, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, Y, OTHER = normal(0, 6, 3), normal(1, 6, 2), normal(2, 6, 3)
PARAMS = {"w": normal(3, 3, 2), "b": normal(4, 2), "scale": jnp.float32(1.2)}


def model(params, x):
    return params["scale"] * jnp.tanh(x @ params["w"] + params["b"])


def objective_on(x, y=Y):
    return so.Objective(lambda p: model(p, x), lambda z: jnp.mean(jnp.sum((z - y) ** 2, -1)))


LAYERS = so.find_layers(objective_on(X), PARAMS)


def make_step(tx, *, extra=lambda params, x: {}, to_grads=lambda grads, params: grads):
    """A step that returns its updates; ``extra`` gives more arguments for ``update``."""

    def step(params, state, x):
        objective = objective_on(x)
        value, grads = jax.value_and_grad(objective)(params)
        arguments = {"value": value, "grad": grads, "value_fn": objective, **extra(params, x)}
        updates, state = tx.update(to_grads(grads, params), state, params, **arguments)
        return optax.apply_updates(params, updates), state, updates

    return step


def train(tx, steps=4, **options):
    """The updates of a few steps on changing batches."""
    step = jax.jit(make_step(tx, **options))
    params, state, history = PARAMS, tx.init(PARAMS), []
    for k in range(steps):
        params, state, updates = step(params, state, (1 + 0.1 * k) * X)
        history.append(updates)
    return history, params, state


@functools.cache
def plain():
    return train(so.kbfgs(0.3, LAYERS))


def assert_same(one, other, rtol=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), one, other)


def differ(one, other):
    return any(
        np.abs(a - b).max() > 1e-4
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


# Weight decay.


def test_l2_decay_adds_to_the_gradient():
    """So it is averaged and preconditioned, on all parameters, and curvature leaves it out."""
    history, *_ = train(so.kbfgs(0.3, LAYERS, weight_decay=0.2))
    expected, *_ = train(
        so.kbfgs(0.3, LAYERS),
        to_grads=lambda grads, params: jax.tree.map(lambda g, p: g + 0.2 * p, grads, params),
    )
    assert_same(history, expected)
    assert differ(history, plain()[0])


def test_decoupled_decay_adds_to_the_direction():
    history, *_ = train(so.kbfgs(0.3, LAYERS, weight_decay=0.2, weight_decay_form="decoupled"), 1)
    expected = jax.tree.map(lambda u, p: u - 0.3 * 0.2 * p, plain()[0][0], PARAMS)
    assert_same(history[0], expected)


# Parameters in no layer.


def test_the_default_fallback_is_the_momentum_direction():
    history, _, state = plain()
    np.testing.assert_allclose(history[-1]["scale"], -0.3 * state[0].momentum["scale"], rtol=1e-5)
    grads = jax.grad(objective_on(X))(PARAMS)
    np.testing.assert_allclose(history[0]["scale"], -0.3 * 0.1 * grads["scale"], rtol=1e-5)


def test_a_given_fallback_has_those_parameters_only():
    tx = so.scale_by_kbfgs(LAYERS, fallback=optax.adam(0.01))
    history, _, state = train(optax.chain(tx, optax.scale(-0.3)), 2)
    grads = jax.grad(objective_on(X))(PARAMS)
    adam, adam_state = optax.adam(0.01), optax.adam(0.01).init(PARAMS["scale"])
    expected, _ = adam.update(grads["scale"], adam_state, PARAMS["scale"])
    np.testing.assert_allclose(history[0]["scale"], -0.3 * expected, rtol=1e-5)
    # Its moments are of that scalar alone, and the layers' directions are as without it.
    moments = [leaf for leaf in jax.tree.leaves(state[0].fallback) if leaf.dtype == jnp.float32]
    assert [leaf.shape for leaf in moments] == [(), ()]
    assert all(leaf != 0 for leaf in moments)
    for name in ("w", "b"):
        np.testing.assert_allclose(history[0][name], plain()[0][0][name], rtol=1e-5)


def test_a_batch_that_is_not_finite_leaves_the_fallback():
    tx = so.scale_by_kbfgs(LAYERS, fallback=optax.adam(0.01))
    _, params, state = train(tx, 2)
    _, new, updates = jax.jit(make_step(tx))(params, state, X * np.nan)
    assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))
    for a, b in zip(jax.tree.leaves(new.fallback), jax.tree.leaves(state.fallback), strict=True):
        np.testing.assert_array_equal(a, b)


def test_strict_names_the_parameter_and_the_reason():
    with pytest.raises(ValueError, match=r"strict=True(.|\n)*scale: goes into `mul`"):
        so.scale_by_kbfgs(LAYERS, strict=True)
    inner = so.find_layers(
        lambda p: jnp.mean(X @ p["w"] + p["b"]), {k: PARAMS[k] for k in ("w", "b")}
    )
    so.scale_by_kbfgs(inner, strict=True)


# Objectives.


def test_curvature_fn_replaces_the_objective_for_curvature_only():
    """Then `value_fn` is not looked at: the gradients say all that is needed of it."""
    history, *_ = train(
        so.kbfgs(0.3, LAYERS), extra=lambda _, x: {"curvature_fn": objective_on(OTHER)}
    )
    expected, *_ = train(
        so.kbfgs(0.3, LAYERS), extra=lambda _, x: {"value_fn": objective_on(OTHER)}
    )
    assert_same(history, expected)
    assert differ(history, plain()[0])


def test_curvature_fn_may_have_another_batch_size():
    history, *_ = train(
        so.kbfgs(0.3, LAYERS), extra=lambda _, x: {"curvature_fn": objective_on(OTHER[:2], Y[:2])}
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(history))


def test_aux_outputs_change_nothing():
    def with_aux(params, x):
        def value_and_outputs(params):
            outputs = model(params, x)
            return objective_on(x).loss(outputs), {"outputs": outputs}

        return {"value_fn": value_and_outputs}

    def split_with_aux(params, x):
        objective = objective_on(x)
        return {
            "value_fn": so.Objective(
                lambda p: (objective.model(p), {"norm": jnp.linalg.norm(p["w"])}),
                objective.loss,
                has_aux=True,
            )
        }

    for extra in (with_aux, split_with_aux):
        assert_same(train(so.kbfgs(0.3, LAYERS), extra=extra)[0], plain()[0])


def test_value_and_grad_are_not_required():
    def without(params, x):
        return {"value": None, "grad": None}

    assert_same(train(so.kbfgs(0.3, LAYERS), extra=without)[0], plain()[0])


# Compilation.


def primitives(jaxpr, name):
    """How often a primitive occurs, once with conds in full and once with their least branch."""
    every, least = 0, 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            every, least = every + 1, least + 1
        inner = [
            primitives(getattr(value, "jaxpr", value), name)
            for parameter in equation.params.values()
            for value in (parameter if isinstance(parameter, tuple | list) else [parameter])
            if hasattr(getattr(value, "jaxpr", value), "eqns")
        ]
        if equation.primitive.name == "cond":
            every += max(total for total, _ in inner)
            least += min(total for _, total in inner)
        else:
            every += sum(total for total, _ in inner)
            least += sum(total for _, total in inner)
    return every, least


def accepted_branch(jaxpr):
    """The branch of the outermost cond that is taken for finite batches."""
    conds = [equation for equation in jaxpr.eqns if equation.primitive.name == "cond"]
    branches = [branch.jaxpr for equation in conds for branch in equation.params["branches"]]
    return max(branches, key=lambda branch: primitives(branch, "dot_general")[0])


def test_the_second_pass_is_inside_a_branch_if_it_is_not_always_due():
    def tanh_passes(update_every):
        tx = so.kbfgs(0.3, LAYERS, update_every=update_every)
        jaxpr = jax.make_jaxpr(make_step(tx))(PARAMS, tx.init(PARAMS), X)
        return primitives(accepted_branch(jaxpr.jaxpr), "tanh")

    # The branch of finite batches holds the pass at the previous parameters.
    always, always_least = tanh_passes(1)
    sometimes, sometimes_least = tanh_passes(3)
    assert always == always_least == sometimes >= 1
    assert sometimes_least == 0


def test_operations_of_a_step_do_not_grow_with_the_interval():
    def flops(update_every):
        tx = so.kbfgs(0.3, LAYERS, update_every=update_every)
        lowered = jax.jit(make_step(tx)).lower(PARAMS, tx.init(PARAMS), X)
        cost = lowered.compile().cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    assert flops(10) <= 1.02 * flops(1)  # the test whether it is due


@functools.cache
def every_third():
    tx = so.kbfgs(0.3, LAYERS, update_every=3)
    return tx, jax.jit(make_step(tx))


def loop(params, steps=7):
    tx, step = every_third()
    state = tx.init(params)
    for k in range(steps):
        params, state, _ = step(params, state, (1 + 0.1 * k) * X)
    return params, state


def test_one_compilation_serves_all_steps():
    _, state = loop(PARAMS)
    assert state[0].metrics.curvature_updates == 3  # steps 0, 3, 6
    assert state[0].count == 7
    assert every_third()[1]._cache_size() == 1


def test_factors_are_kept_between_refreshes():
    params, state = loop(PARAMS, 1)
    _, step = every_third()
    for k, refreshed in enumerate([False, False, True, False]):
        old = state[0].factors
        params, state, _ = step(params, state, (1 + 0.1 * k) * X)
        same = all(
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(state[0].factors), strict=True)
        )
        assert same != refreshed


def scanned(params, steps=7):
    tx, _ = every_third()
    step = make_step(tx)

    def body(carry, k):
        params, state, _ = step(*carry, (1 + 0.1 * k) * X)
        return (params, state), None

    return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(steps))[0]


def test_scan_over_steps_equals_a_loop():
    assert_same(jax.jit(scanned)(PARAMS), loop(PARAMS), rtol=1e-4)


def test_vmap_over_seeds_equals_separate_runs():
    seeds = [jax.tree.map(lambda v, k=k: v * (1 + 0.3 * k), PARAMS) for k in range(3)]
    together = jax.jit(jax.vmap(scanned))(jax.tree.map(lambda *v: jnp.stack(v), *seeds))
    for k, params in enumerate(seeds):
        one = jax.tree.map(lambda v, k=k: v[k], together)
        assert_same(one, loop(params), rtol=1e-3)


# Bad input.


@pytest.fixture(scope="module")
def scale_by():
    tx = so.scale_by_kbfgs(LAYERS)
    return tx, tx.init(PARAMS)


def test_missing_params(scale_by):
    tx, state = scale_by
    with pytest.raises(ValueError, match=r"`params`.*tx\.update"):
        tx.update(PARAMS, state, value_fn=objective_on(X))
    with pytest.raises(ValueError, match="params"):
        tx.init(None)


def test_missing_value_fn(scale_by):
    tx, state = scale_by
    with pytest.raises(ValueError, match=r"`value_fn`.*value_fn=objective"):
        tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("name", ["value_fn", "curvature_fn"])
def test_objectives_that_cannot_be_called(scale_by, name):
    tx, state = scale_by
    arguments = {"value_fn": objective_on(X), name: 3.0}
    with pytest.raises(TypeError, match=f"`{name}` must be callable"):
        tx.update(PARAMS, state, PARAMS, **arguments)


def test_an_objective_that_is_no_scalar(scale_by):
    tx, state = scale_by
    with pytest.raises(TypeError, match="one real scalar"):
        tx.update(PARAMS, state, PARAMS, value_fn=lambda p: model(p, X))


def test_an_objective_of_another_model(scale_by):
    tx, state = scale_by
    with pytest.raises(ValueError, match=r"'w'(.|\n)*find_layers"):
        tx.update(PARAMS, state, PARAMS, value_fn=lambda p: jnp.sum(p["w"] ** 2))
    # A layer in which the bias has gone is another layer.
    with pytest.raises(ValueError, match=r"built with(.|\n)*found"):
        tx.update(PARAMS, state, PARAMS, value_fn=lambda p: jnp.mean((X @ p["w"]) ** 2))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({**PARAMS, "w": jnp.ones((4, 2))}, r"w: layers have \(3, 2\), params have \(4, 2\)"),
        ({"w": PARAMS["w"], "b": PARAMS["b"]}, "scale.*no such leaf"),
        ({**PARAMS, "more": jnp.ones(1)}, "more.*no such leaf"),
    ],
)
def test_parameters_of_another_shape(scale_by, params, words):
    tx, state = scale_by
    with pytest.raises(ValueError, match=words):
        tx.init(params)
    with pytest.raises(ValueError, match=words):
        tx.update(params, state, params, value_fn=objective_on(X))


@pytest.mark.parametrize("layers", [None, [], (LAYERS.layers), PARAMS])
def test_layers_from_elsewhere(layers):
    with pytest.raises(TypeError, match="find_layers"):
        so.scale_by_kbfgs(layers)


OUT_OF_RANGE = [
    ("damping", 0.0),
    ("damping", -0.1),
    ("damping", float("nan")),
    ("momentum", -0.1),
    ("momentum", 1.0),
    ("pair_decay", 1.0),
    ("pair_decay", -0.5),
    ("moment_decay", 1.0),
    ("moment_decay", -0.5),
    ("powell_fraction", 0.0),
    ("powell_fraction", 1.0),
    ("acceptance", -1e-4),
    ("memory_size", 0),
    ("memory_size", 2.0),
    ("memory_size", True),
    ("forget", "newest"),
    ("update_every", 0),
    ("update_every", 1.5),
    ("update_every", None),
    ("momentum_form", "nesterov"),
    ("input_factor", "exact"),
    ("pair_damping", "powell"),
    ("damping_split", "sqrt"),
    ("refresh_order", "during"),
    ("weight_decay", -1e-5),
    ("weight_decay_form", "l1"),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_hyperparameters_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}"):
        so.kbfgs(0.3, LAYERS, **{name: value})


def test_identity_damping_needs_a_damping_below_one():
    so.kbfgs(0.3, LAYERS, damping=3.0)
    with pytest.raises(ValueError, match="powell_identity"):
        so.kbfgs(0.3, LAYERS, damping=1.0, pair_damping="powell_identity")


@pytest.mark.parametrize("name", ["update_every", "memory_size"])
def test_structural_numbers_cannot_be_traced(name):
    with pytest.raises(ValueError, match=f"`{name}`.*static_args"):
        jax.jit(lambda k: so.kbfgs(0.3, LAYERS, **{name: k}).init(PARAMS))(3)


def test_unknown_hyperparameters():
    with pytest.raises(TypeError, match="dampening"):
        so.kbfgs(0.3, LAYERS, dampening=0.1)
