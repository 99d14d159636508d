"""L-SR1 against the algorithm written out in NumPy, step by step in double precision."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from tests.methods.lsr1_oracle import Oracle

SIZES = [3, 4, 2]
BATCH = 6
STEPS = 16
RULE = {"shrink": 0.5, "grow": 2.0, "shrink_below": 0.1, "grow_above": 0.75, "reach": 0.8}
BASE = {
    "memory_size": 4,
    "model": "trust_region",
    "scale": "bb",
    "radius": 1.0,
    "acceptance": 1e-4,
    "skip": 1e-8,
    "momentum": 0.0,
    "diagonal": False,
    "restart_after": 5,
    "weight_decay": 0.0,
}
OFF = ["momentum", "weight_decay"]  # these are left out where they are the plain number zero
COMPARED = (
    "ratio",
    "step_norm",
    "scale",
    "smallest_eigenvalue",
    "largest_eigenvalue",
    "pairs_kept",
    "pairs_skipped",
)

VARIANTS = {
    "trust region": {},
    "plain numbers": {},
    "full batch": {"full_batch": True},
    "long steps": {"radius": 30.0, "restart_after": 2, "acceptance": 0.2},
    "other radius rule": {
        "radius": 3.0,
        "rule": {
            "shrink": 0.3, "grow": 1.5, "shrink_below": 0.5, "grow_above": 0.6, "reach": 0.5,
        },
    },
    "strict skips": {"skip": 0.3, "momentum": 0.1},
    "memory of one": {"memory_size": 1, "radius": 0.5, "weight_decay": 0.1},
    "shape changing": {"model": "shape_changing"},
    "cubic": {"model": "cubic"},
    "regularized": {"model": "regularized", "full_batch": True},
    "below": {"scale": "pencil_below", "full_batch": True},
    "least": {"scale": "least_rayleigh"},
    "above": {"scale": "pencil_above"},
    "number": {"scale": 0.2},
    "negative number": {"scale": -0.1},
    "momentum": {"momentum": 0.2, "model": "shape_changing"},
    "cubic with momentum": {"model": "cubic", "momentum": 0.4, "full_batch": True},
    "diagonal": {"diagonal": True, "diagonal_decay": 0.9, "momentum": 0.3, "radius": 5.0},
    "slope": {"rule": RULE | {"slope_rate": 0.3, "slope_target": 0.1}, "momentum": 0.2},
    "every third": {"update_every": 3, "memory_size": 3},
    "every third with momentum": {
        "update_every": 3, "memory_size": 3, "momentum": 0.3, "diagonal": True,
        "rule": RULE | {"slope_rate": 0.1},
    },
    "every other with curvature": {"update_every": 2, "curvature": True, "model": "cubic"},
    "weight decay": {"weight_decay": 0.3, "full_batch": True},
    "curvature": {"curvature": True, "weight_decay": 0.1},
}  # fmt: skip


def model(params, x):
    (w, b), (v, c) = params
    return jnp.tanh(x @ w + b) @ v + c


def loss(params, batch):
    x, y = batch
    return jnp.mean(jnp.sum(jnp.log(jnp.cosh(model(params, x) - y)), axis=-1))


def flatten(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def value_and_gradient(vector, batch):
    """The same loss by hand, on the flat vector."""
    shapes = [shape for i, o in itertools.pairwise(SIZES) for shape in ((i, o), (o,))]
    ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
    w, b, v, c = (
        part.reshape(shape)
        for part, shape in zip(np.split(vector, ends), shapes, strict=True)
    )  # fmt: skip
    x, y = batch
    h = np.tanh(x @ w + b)
    z = h @ v + c - y
    cotangent = np.tanh(z) / len(x)
    hidden = cotangent @ v.T * (1 - h**2)
    gradient = [x.T @ hidden, hidden.sum(0), h.T @ cotangent, cotangent.sum(0)]
    value = np.log(np.cosh(z)).sum() / len(x)
    return value, np.concatenate([part.ravel() for part in gradient])


def problem(full_batch):
    rng = np.random.default_rng(3)
    params = [
        (rng.standard_normal((i, o)), rng.standard_normal(o)) for i, o in itertools.pairwise(SIZES)
    ]
    batches = [
        (rng.standard_normal((BATCH, SIZES[0])), 3 * rng.standard_normal((BATCH, SIZES[-1])))
        for _ in range(STEPS + 1)
    ]
    return params, [batches[0]] * (STEPS + 1) if full_batch else batches


def split(variant):
    """The settings of the method, the radius rule, and the options of the problem."""
    settings = BASE | VARIANTS[variant]
    options = {name: settings.pop(name, False) for name in ("full_batch", "curvature")}
    return settings, settings.pop("rule", RULE), options


@functools.cache
def compiled_step(with_curvature, **static):
    """A step whose numbers are traced, so that variants share it."""

    @jax.jit
    def step(params, state, batch, other, numbers, rule):
        def objective(p):
            return loss(p, batch)

        tx = so.lsr1(**static, **numbers, radius_rule=so.RadiusRule(**rule))
        value, grads = jax.value_and_grad(objective)(params)
        extra = {"curvature_fn": lambda p: loss(p, other)} if with_curvature else {}
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective, **extra
        )
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def trajectory(variant):
    """Parameters, radius and metrics after every step; under 64-bit types."""
    settings, rule, options = split(variant)
    params, batches = problem(options["full_batch"])
    params = jax.tree.map(jnp.asarray, params)
    state, history = so.lsr1(**settings).init(params), []
    plain = ["memory_size", "update_every", *(OFF if variant == "plain numbers" else [])]
    numbers = {
        name: value
        for name, value in settings.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in plain
    }
    static = {name: value for name, value in settings.items() if name not in numbers}
    step = compiled_step(options["curvature"], **static)
    for batch, other in itertools.pairwise(batches):
        params, state = step(params, state, batch, other, numbers, rule)
        history.append((flatten(params), float(state.radius), state.metrics))
    return history


@functools.cache
@np.errstate(over="ignore", invalid="ignore")
def oracle_trajectory(variant):
    settings, rule, options = split(variant)
    oracle = Oracle(**settings, **rule)
    params, batches = problem(options["full_batch"])
    vector, history = flatten(params), []
    for batch, other in itertools.pairwise(batches):
        curvature = functools.partial(value_and_gradient, batch=other)
        vector = vector + oracle.step(
            vector,
            functools.partial(value_and_gradient, batch=batch),
            curvature if options["curvature"] else None,
        )
        history.append((vector, oracle.radius, dict(oracle.metrics)))
    return history, oracle


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_radius_and_metrics_equal_the_oracle(x64, variant):
    found, (expected, oracle) = trajectory(variant), oracle_trajectory(variant)
    for k, (one, other) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(one[0], other[0], rtol=0, atol=1e-6, err_msg=f"step {k}")
        np.testing.assert_allclose(one[1], other[1], rtol=1e-5, err_msg=f"radius, step {k}")
        for name in COMPARED:
            np.testing.assert_allclose(
                getattr(one[2], name), other[2][name], rtol=1e-4, atol=1e-8, err_msg=f"{name}, {k}"
            )
    metrics = found[-1][2]
    assert metrics.rejections == oracle.events["rejected"]
    assert metrics.restarts == oracle.events["restarted"]
    assert metrics.probes == metrics.nonfinite_steps == 0


def test_the_variants_exercise_every_rule():
    """Otherwise the comparison above would say little."""
    events = {name: oracle_trajectory(name)[1].events for name in VARIANTS}
    for name, counted in events.items():
        assert counted["accepted"] > 0, name
        assert counted["wrapped"] > 0, name
    for name in ("trust region", "shape changing", "cubic", "diagonal", "curvature"):
        assert events[name]["rejected"] > 0, name
        assert events[name]["negative curvature"] > 0, name
        assert events[name]["shrunk"] > 0, name
        assert events[name]["grown"] > 0, name
    assert events["strict skips"]["skipped"] > 0
    assert events["long steps"]["restarted"] > 0
    for name in ("slope", "every third with momentum"):
        assert events[name]["overshot"] > 0, name
    for name in ("momentum", "cubic with momentum", "diagonal", "every third with momentum"):
        assert events[name]["momentum used"] > 0, name
    assert events["momentum"]["clipped"] > 0
