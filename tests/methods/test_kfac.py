"""K-FAC as an optimizer: what it refuses, its periods, and that it trains every kind of model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from tests.methods.comparisons import all_zero, identical


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape), dtype=float)


def params_of(dtype=jnp.float32):
    shapes = {"w": (4, 6), "b": (6,), "scale": (6,), "v": (6, 3)}
    return {k: (normal(*s, seed=i) / 2).astype(dtype) for i, (k, s) in enumerate(shapes.items())}


def objective_on(seed=0, dtype=jnp.float32):
    x = normal(16, 4, seed=seed).astype(dtype)
    y = jax.nn.one_hot(jnp.argmax(x[:, :3], axis=1), 3, dtype=dtype)
    return so.Objective(
        lambda p: (jnp.tanh(x @ p["w"] + p["b"]) * p["scale"]) @ p["v"],
        lambda z: -jnp.mean(jnp.sum(y * jax.nn.log_softmax(z), axis=-1)),
    )


LAYERS = so.find_layers(objective_on(), params_of())


def step_of(tx, curvature_fn=None):
    @jax.jit
    def step(params, state):
        objective = objective_on()
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, value_fn=objective, curvature_fn=curvature_fn
        )
        return optax.apply_updates(params, updates), state, value

    return step


def losses(tx, steps=15):
    params, state, step = params_of(), tx.init(params_of()), step_of(tx)
    values = []
    for _ in range(steps):
        params, state, value = step(params, state)
        values.append(float(value))
    return values, state


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"curvature": "exact", "inverse": "corrected", "inverse_every": 3},
        {"curvature": "empirical", "inverse": "eigen"},
        {"update_every": 2, "inverse_every": 4, "weight_sharing": "reduce"},
        {"weight_decay": 1e-3, "max_divergence": 0.1, "fallback": optax.identity()},
    ],
)
def test_it_trains_at_a_learning_rate(settings):
    values, state = losses(so.kfac(0.1, LAYERS, damping=0.03, momentum=0.5, **settings))
    assert values[-1] < 0.6 * values[0]
    assert so.metrics(state)["kfac/failed_inverses"] == 0


def test_it_trains_without_one():
    values, state = losses(so.kfac(None, LAYERS, damping=0.1, weight_decay=1e-4))
    assert values[-1] < 0.2 * values[0]
    metrics = so.metrics(state)
    assert 0.5 < metrics["quadratic_model/ratio"] < 1.5
    assert metrics["quadratic_model/damping"] < 0.1


def test_refreshes_are_made_when_they_are_due():
    _, state = losses(so.kfac(0.1, LAYERS, update_every=3, inverse_every=6), steps=10)
    metrics = so.metrics(state)
    assert metrics["kfac/curvature_updates"] == 7  # in steps 0, 3, 6, 9, and 1, 2, 4 at first
    assert metrics["kfac/inverse_updates"] == 5  # in steps 0, 6, and 1, 2, 4 at first


def test_the_damping_that_it_is_told_replaces_its_own():
    objective, params = objective_on(), params_of()
    grads = jax.grad(objective)(params)
    own, told = so.scale_by_kfac(LAYERS, damping=0.5), so.scale_by_kfac(LAYERS, damping=7.0)
    one, _ = own.update(grads, own.init(params), params, value_fn=objective)
    two, _ = told.update(grads, told.init(params), params, value_fn=objective, damping=0.5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_large_damping_gives_the_gradient():
    objective, params = objective_on(), params_of()
    grads = jax.grad(objective)(params)
    tx = so.scale_by_kfac(LAYERS, damping=1e6, damping_split="plain")
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=objective)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(1e6 * a, b, rtol=0.02, atol=1e-6)


def test_the_limit_of_the_divergence():
    objective, params = objective_on(), params_of()
    grads = jax.grad(objective)(params)

    def product(limit):
        """Of the gradient and the step."""
        tx = so.kfac(0.5, LAYERS, max_divergence=limit, momentum=0.0)
        updates, _ = tx.update(grads, tx.init(params), params, value_fn=objective)
        return sum(
            jax.tree.leaves(jax.tree.map(lambda u, g: float(jnp.sum(u * g)), updates, grads))
        )

    # 1/2 eta^2 g'd = -1/2 eta g'(step), which a shorter step changes by the square of its factor.
    free, factor = product(None), product(1e-4) / product(None)
    assert factor < 1
    np.testing.assert_allclose(-0.25 * free * factor**2, 1e-4, rtol=1e-3)
    np.testing.assert_allclose(product(1e4), free, rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_limit_of_what_is_not_finite_is_zero(momentum):
    """Batches of NaN, and gradients whose product with the direction overflows."""
    objective, params = objective_on(), params_of()
    grads = jax.grad(objective)(params)
    tx = so.kfac(0.1, LAYERS, max_divergence=1.0, momentum=momentum)
    state = tx.init(params)
    for number, factor in enumerate((jnp.nan, 1e25)):
        spoiled = jax.tree.map(lambda g, f=factor: f * g, grads)
        updates, state = tx.update(spoiled, state, params, value_fn=objective)
        assert all_zero(updates)
        assert so.metrics(state)["divergence_limit/nonfinite_steps"] == number + 1
    assert so.metrics(state)["kfac/nonfinite_steps"] == 1
    updates, state = tx.update(grads, state, params, value_fn=objective)
    assert not all_zero(updates)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("curvature", ["sampled", "exact", "empirical"])
def test_batches_that_are_not_finite(curvature):
    tx = so.scale_by_kfac(LAYERS, curvature=curvature)
    objective, params = objective_on(), params_of()
    state = tx.init(params)
    grads = jax.grad(objective)(params)
    _, state = tx.update(grads, state, params, value_fn=objective)
    updates, after = tx.update(
        jax.tree.map(lambda g: g * jnp.nan, grads), state, params, value_fn=objective
    )
    assert all_zero(updates)
    assert int(after.metrics.nonfinite_steps) == 1
    assert identical((after.factors, after.inverses), (state.factors, state.inverses))
    broken = so.Objective(lambda p: objective.model(p) * jnp.nan, objective.loss)
    updates, after = tx.update(grads, state, params, value_fn=objective, curvature_fn=broken)
    assert not all_zero(updates)
    assert int(after.metrics.nonfinite_curvature) == 1
    assert identical((after.factors, after.inverses), (state.factors, state.inverses))


def test_curvature_is_wide_whatever_the_parameters_are():
    params, objective = params_of(jnp.bfloat16), objective_on(dtype=jnp.bfloat16)
    tx = so.scale_by_kfac(so.find_layers(objective, params))
    state = jax.eval_shape(tx.init, params)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.factors, state.inverses))} == {
        jnp.dtype("float32")
    }


def test_state_in_parameters():
    """Of the autoencoder 784-1000-500-250-30 mirrored, adaptive: the last step included."""
    sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    shapes = [((a, b), (b,)) for a, b in itertools.pairwise(sizes)]
    params = [tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in pair) for pair in shapes]
    x = jnp.zeros((2, 784))

    def model(params):
        h = x
        for w, b in params:
            h = jnp.tanh(h @ w + b)
        return h

    objective = so.Objective(model, lambda z: jnp.mean(z**2))
    tx = so.kfac(None, so.find_layers(objective, params))
    state = jax.eval_shape(tx.init, params)
    count, size = (sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (params, state))
    assert size <= 5.6 * count


def embedded(p, tokens):
    return jnp.mean(jnp.tanh(p["table"][tokens] @ p["w"]), axis=1) @ p["v"]


def recurrent(p, tokens):
    h = jnp.zeros((len(tokens), 5))
    inputs = jnp.moveaxis(jax.nn.one_hot(tokens, 7), 1, 0)
    h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(x @ p["table"] + h @ p["w"]), None), h, inputs)
    return h @ p["v"]


def attentive(p, tokens):
    h = p["table"][tokens]
    q, k = jnp.split(h @ p["w"], 2, axis=-1)
    scores = jax.nn.softmax(jnp.einsum("nid,njd->nij", q, k))
    return jnp.mean(scores @ h, axis=1) @ p["v"]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("model", "width"),
    [(embedded, 5), (recurrent, 5), (attentive, 4)],
    ids=["embedded", "recurrent", "attentive"],
)
def test_models_that_share_their_weights(model, width, sharing):
    params = {"table": normal(7, 5), "w": normal(5, width), "v": normal(5, 2)}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (12, 4)))
    y = jax.nn.one_hot((jnp.sum(tokens, axis=1) > 12).astype(int), 2)
    objective = so.Objective(
        lambda p: model(p, tokens), lambda z: jnp.mean(optax.softmax_cross_entropy(z, y))
    )
    layers = so.find_layers(objective, params)
    assert len(layers) == 3
    tx = so.kfac(None, layers, weight_sharing=sharing, damping=0.1, inverse_every=2, strict=True)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(12):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]


# What is refused.


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"damping": 0.0}, "damping"),
        ({"curvature": "true"}, "curvature"),
        ({"inverse": "lu"}, "inverse"),
        ({"weight_sharing": "mean"}, "weight_sharing"),
        ({"update_every": 2, "inverse_every": 5}, "multiple"),
        ({"fallback": "momentum"}, "fallback"),
        ({"fallback": 3}, "fallback"),
        ({"strict": True}, "scale"),
    ],
)
def test_wrong_settings_raise(setting, message):
    with pytest.raises(ValueError, match=message):
        so.scale_by_kfac(LAYERS, **setting)


def test_strict_refuses_uses_that_have_no_part_in_the_factors():
    objective = so.Objective(lambda p: jnp.tanh(p["w"][jnp.arange(5)]) @ p["w"].T, jnp.sum)
    params = {"w": normal(7, 3)}
    layers = so.find_layers(objective, params)
    so.scale_by_kfac(layers)
    with pytest.raises(ValueError, match=r"strict=True(.|\n)*transposed(.|\n)*w"):
        so.scale_by_kfac(layers, strict=True)


def test_decoupled_decay_needs_a_learning_rate():
    with pytest.raises(ValueError, match="decoupled"):
        so.kfac(None, LAYERS, weight_decay_form="decoupled")


@pytest.mark.parametrize(
    ("learning_rate", "setting"),
    [
        (None, {"momentum": 0.5}),
        (0.1, {"max_norm": 1.0}),
        (0.1, {"damping_rule": so.DampingRule()}),
        (0.1, {"adapt_every": 1}),
        (0.1, {"plane_every": 5}),
    ],
)
def test_what_has_no_effect_raises(learning_rate, setting):
    with pytest.raises(ValueError, match=f"kfac: .*{next(iter(setting))}"):
        so.kfac(learning_rate, LAYERS, **setting)


def test_the_quadratic_model_is_reached_through_the_alias():
    _, state = losses(so.kfac(None, LAYERS, damping=0.1, momentum=0.0, max_norm=1e-3), steps=3)
    metrics = so.metrics(state)
    assert metrics["quadratic_model/momentum"] == 0
    assert metrics["quadratic_model/clipped"] == 3
    np.testing.assert_allclose(metrics["quadratic_model/step_norm"], 1e-3, rtol=1e-4)


def test_plain_callables_are_for_the_empirical_matrix():
    params, objective = params_of(), objective_on()
    grads = jax.grad(objective)(params)
    plain = lambda p: objective(p)  # noqa: E731
    tx = so.scale_by_kfac(LAYERS)
    with pytest.raises(TypeError, match=r"so\.Objective"):
        tx.update(grads, tx.init(params), params, value_fn=plain)
    tx = so.scale_by_kfac(LAYERS, curvature="empirical", fallback=optax.identity())
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=plain)
    assert not all_zero(updates)


def test_cases_that_are_mixed_are_refused():
    x = normal(6, 3)
    objective = so.Objective(
        lambda p: (x @ p) / (1e-3 + jnp.std(x @ p, axis=0)), lambda z: jnp.mean(z**2)
    )
    params = normal(3, 2)
    tx = so.scale_by_kfac(so.find_layers(objective, params), curvature="exact")
    with pytest.raises(ValueError, match="apart"):
        tx.update(params, tx.init(params), params, value_fn=objective)
