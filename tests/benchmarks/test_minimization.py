"""Deterministic minimization: evaluations are those that really happen."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import secondorder as so
from benchmarks import minimization, scipy_peers
from benchmarks.data import DataOptions
from benchmarks.functions import FUNCTIONS, Instance, rosenbrock, wood
from benchmarks.minimization import Iterate, Limits, iterates, within
from benchmarks.saddle_points import SADDLES
from benchmarks.scipy_peers import PEERS
from benchmarks.settings import SettingError
from benchmarks.solvers import SOLVERS, Variant

pytestmark = pytest.mark.usefixtures("x64")


class Tally:
    """A function that counts, from inside compiled code, how it is evaluated."""

    def __init__(self, function):
        self.gradients = self.values = 0

        def count(name):
            setattr(self, name, getattr(self, name) + 1)

        @jax.custom_vjp
        def counted(x):
            jax.debug.callback(functools.partial(count, "values"))
            return function(x)

        def forward(x):
            jax.debug.callback(functools.partial(count, "gradients"))
            return jax.value_and_grad(function)(x)

        counted.defvjp(forward, lambda gradient, cotangent: (cotangent * gradient,))
        self.function = counted

    def instance(self, start):
        return Instance(lambda x, _: self.function(x), jnp.asarray(start, jnp.float64))

    def read(self):
        jax.effects_barrier()
        return self.gradients, self.values


class TrialState(NamedTuple):
    rate: Any
    value: Any
    grad: Any


def trial_descent(full_batch: bool = False, initial_rate: float = 1e-2):
    """Looks at a trial point, stays if that is worse, and keeps what it knows in its state."""
    assert full_batch

    def init(params):
        return TrialState(jnp.asarray(initial_rate), jnp.asarray(jnp.inf), jnp.zeros_like(params))

    def update(grads, state, params, *, value, value_fn, **_):
        step = -state.rate * grads
        new_value, new_grads = jax.value_and_grad(value_fn)(params + step)
        is_better = new_value < value
        rate = state.rate * jnp.where(is_better, 1.5, 0.5)
        kept = (new_value, new_grads), (value, grads)
        new_value, new_grads = jax.tree.map(lambda a, b: jnp.where(is_better, a, b), *kept)
        return step * is_better, TrialState(rate, new_value, new_grads)

    return optax.GradientTransformationExtraArgs(init, update)


BY_PRODUCTS = ("lrsfn", "sfn")


@pytest.mark.parametrize("name", BY_PRODUCTS)
def test_products_count_as_gradients(name):
    settings = {"rank": 2, "refresh_every": 1} if name == "lrsfn" else {"subspace_size": 2}
    instance = Instance(lambda x, _: rosenbrock(x), jnp.array([-1.2, 1.0]))
    points = iterates(instance, SOLVERS[name], {**SOLVERS[name].candidates[0], **settings})
    *_, last = itertools.islice(points, 6)
    # Two products, each two gradients, in each of five updates; and a gradient at each point.
    assert last.gradients >= 6 + 5 * 4


@pytest.mark.parametrize("start", [[-1.2, 1.0], [-1.2, 1.0, -1.2, 1.0]])
@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in BY_PRODUCTS])
def test_counts_are_what_happens(name, start, monkeypatch):
    if not SOLVERS[name].is_available():
        monkeypatch.setattr(so, name, trial_descent, raising=False)
    (settings, *_) = SOLVERS[name].trials({})
    tally = Tally(rosenbrock)
    points = iterates(tally.instance(start), SOLVERS[name], settings)
    for point in itertools.islice(points, 40):
        assert (point.gradients, point.values) == tally.read()
    assert point.updates == 39
    # Only what evaluates more than one gradient for an update may have more.
    assert (point.gradients > 40) == (name == "lbfgs")


def test_a_line_search_that_fails_is_counted(monkeypatch):
    """On a line without a minimum every step of the search is taken, also without success."""
    tally = Tally(lambda x: -jnp.sum(x**3))
    points = iterates(tally.instance([1.0]), SOLVERS["lbfgs"], {"max_linesearch_steps": 7})
    *_, last = itertools.islice(points, 3)
    assert (last.gradients, 0) == tally.read()
    assert last.gradients > 7


def test_values_and_gradients_are_those_at_the_point():
    """The value and gradient out of the state are no others than at the parameters."""
    params = jnp.array([-3.0, -1.0, -3.0, -1.0])
    points = iterates(Instance(lambda x, _: wood(x), params), SOLVERS["lbfgs"], {})
    optimizer = SOLVERS["lbfgs"].build({})
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(wood)(params)
        updates, state = optimizer.update(
            grads, state, params, value=value, grad=grads, value_fn=wood
        )
        return value, jnp.linalg.norm(grads), params + updates, state

    for point in itertools.islice(points, 10):
        value, norm, params, state = step(params, state)
        assert point.value == pytest.approx(float(value), rel=1e-9)
        assert point.gradient_norm == pytest.approx(float(norm), rel=1e-8)


def test_stops_at_the_tolerance_and_at_the_budget():
    instance = FUNCTIONS["beale"].load(DataOptions())
    reached = minimization.minimize(instance, SOLVERS["lbfgs"], {}, Limits(100, 1e-5))
    assert reached.gradient_norm <= 1e-5
    assert Limits(100, 1e-5).is_reached(reached)
    short = minimization.minimize(instance, SOLVERS["lbfgs"], {}, Limits(8, 1e-5))
    assert short.gradients <= 8
    assert not Limits(8, 1e-5).is_reached(short)


def test_a_method_that_evaluates_nothing_ends():
    points = itertools.repeat(Iterate(1.0, 1.0, gradients=1))
    assert len(list(within(Limits(5), points))) == 6


def test_parameters_may_be_a_pytree():
    instance = SADDLES["factorization-0-near"].load()
    (settings, *_) = SOLVERS["adam"].trials({"learning_rate": 0.1})
    *_, last = within(Limits(150), iterates(instance, SOLVERS["adam"], settings))
    assert last.value < 1e-4


class TestSolvers:
    def test_trials(self):
        assert SOLVERS["lbfgs"].trials({"memory_size": 3}) == [{"memory_size": 3}]
        assert len(SOLVERS["adam"].trials({})) == 4
        assert SOLVERS["adam"].trials({"learning_rate": 1.0}) == [{"learning_rate": 1.0}]
        assert len(SOLVERS["adam"].trials({"b1": 0.5})) == 4

    def test_mistakes(self):
        with pytest.raises(SettingError, match="no method 'newton'; there are: lsr1, lrsfn, sfn"):
            Variant.parse("newton")
        with pytest.raises(SettingError, match=r"lbfgs has no setting x\. It has: max_lines"):
            SOLVERS["lbfgs"].build({"x": 1})
        with pytest.raises(SettingError, match=r"adam: .*learning_rate"):
            SOLVERS["adam"].build({})

    def test_lsr1_keeps_value_and_gradient(self, monkeypatch):
        seen = {}

        def fake(**settings):
            seen.update(settings)
            return optax.identity()

        monkeypatch.setattr(so, "lsr1", fake, raising=False)
        SOLVERS["lsr1"].build({"memory_size": 4})
        assert seen == {"full_batch": True, "memory_size": 4}


class TestPeers:
    @pytest.mark.parametrize("name", PEERS)
    def test_counts_are_what_happens(self, name):
        """At every point one evaluation, with a gradient or without; and as SciPy counts."""
        evaluated = []

        def function(x):
            jax.debug.callback(lambda at: evaluated.append(tuple(at.tolist())), x)
            return rosenbrock(x)

        start = np.array([-1.2, 1.0, -1.2])
        instance = Instance(lambda x, _: function(x), jnp.asarray(start))
        point = scipy_peers.minimize(instance, PEERS[name], Limits(500, 1e-5))
        jax.effects_barrier()
        assert point.gradient_norm <= 1e-5
        if not PEERS[name].uses_products:  # Products evaluate the function too.
            assert point.gradients + point.values == len(set(evaluated))
        assert (point.products > 0) == PEERS[name].uses_products
        theirs = self.by_scipy(PEERS[name], start)
        assert point.gradients + point.values == theirs.nfev
        assert point.gradients == theirs.njev
        assert point.value == pytest.approx(theirs.fun, abs=1e-9)

    def by_scipy(self, peer, start):
        """SciPy alone, with the Euclidean norm of the gradient as the criterion to stop."""
        hessian = {} if peer.hessian is None else {"hess": peer.hessian()}
        if peer.uses_products:
            hessian["hessp"] = scipy.optimize.rosen_hess_prod

        def stop(xk, *_):
            if np.linalg.norm(scipy.optimize.rosen_der(xk)) <= 1e-5:
                raise StopIteration

        return scipy.optimize.minimize(
            scipy.optimize.rosen,
            start,
            jac=scipy.optimize.rosen_der,
            method=peer.method,
            callback=stop,
            options=peer.options(1000),
            **hessian,
        )

    @pytest.mark.parametrize("name", PEERS)
    def test_budget(self, name):
        instance = FUNCTIONS["rosenbrock-10"].load(DataOptions())
        point = scipy_peers.minimize(instance, PEERS[name], Limits(12, 1e-5))
        assert 1 < point.gradients <= 12
        assert point.gradient_norm > 1e-5
        start = float(instance.function(instance.start, ()))
        assert point.value < start

    def test_start_that_is_a_minimum(self):
        instance = Instance(lambda x, _: rosenbrock(x), jnp.ones(3))
        point = scipy_peers.minimize(instance, PEERS["scipy-l-bfgs-b"], Limits(10, 1e-5))
        assert point == Iterate(0.0, 0.0, gradients=1)

    def test_value_and_gradient_at_a_point_are_one_evaluation(self):
        counted = scipy_peers.CountedFunction(Instance(lambda x, _: rosenbrock(x), jnp.zeros(2)))
        x, y = np.array([1.0, 2.0]), np.array([2.0, 2.0])
        counted.value(x)
        assert (counted.gradients, counted.values) == (0, 1)
        counted.gradient(x)
        counted.gradient(x)
        counted.value(x)
        assert (counted.gradients, counted.values) == (1, 0)
        counted.value(y)
        counted.value(x)
        assert (counted.gradients, counted.values) == (1, 2)
        vector = np.array([1.0, -1.0])
        expected = scipy.optimize.rosen_hess_prod(x, vector)
        np.testing.assert_allclose(counted.product(x, vector), expected)
        np.testing.assert_allclose(counted.gradient(y), scipy.optimize.rosen_der(y))
        assert (counted.gradients, counted.values, counted.products) == (2, 2, 1)
