"""Low-rank saddle-free Newton against dense eigendecompositions; the interface; saddle points."""

import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

import secondorder as so
from secondorder import scale_by_low_rank_saddle_free_newton
from secondorder.methods.low_rank_model import precondition, tied_damping
from secondorder.objective import Microbatches
from secondorder.operators import hessian
from secondorder.solvers import Eigenpairs, krylov_basis, orthonormalize
from secondorder.tree import project, random_stack
from tests.meshes import make_mesh, place, use_mesh
from tests.methods.comparisons import all_finite, all_zero, identical

X = np.random.default_rng(0).standard_normal((16, 3))
Y = np.sin(X[:, :2])
N = 9  # parameters of the small network


def start_of(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    params = {"w": rng.standard_normal((3, 2)), "b": rng.standard_normal(2), "scale": 1.2}
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), params)


def objective_on(batch):
    x, y = batch
    return so.Objective(
        lambda p: p["scale"] * jnp.tanh(x @ p["w"] + p["b"]),
        lambda z: jnp.mean(jnp.sum((z - y) ** 2, axis=-1)),
    )


def loss_on(count=16, dtype=jnp.float32):
    return objective_on((jnp.asarray(X[:count], dtype), jnp.asarray(Y[:count], dtype)))


def update_once(tx, params, objective, state=None, **extra):
    """One compiled update from a fresh state."""
    state = tx.init(params) if state is None else state

    @jax.jit
    def update(params, state):
        grads = jax.grad(objective)(params)
        return tx.update(grads, state, params, value_fn=objective, **extra)

    return update(params, state)


def dense(objective, params):
    """Gradient, eigenvalues and eigenvectors as columns, by decreasing magnitude."""
    flat, unravel = ravel_pytree(params)
    gradient, matrix = jax.jit(
        lambda v: (jax.grad(f := lambda v: objective(unravel(v)))(v), jax.hessian(f)(v))
    )(flat)
    values, basis = np.linalg.eigh(matrix)
    order = np.argsort(-np.abs(values))
    return np.asarray(gradient), values[order], basis[:, order]


def expected_direction(gradient, values, basis, rank, damping):
    inside = basis[:, :rank].T @ gradient
    kept = basis[:, :rank] @ (inside / (np.abs(values[:rank]) + damping))
    return kept + (gradient - basis[:, :rank] @ inside) / damping


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


# The algebra of a step.


@pytest.mark.parametrize("spectrum", ["absolute", "shifted", "zero", "infinite"])
def test_woodbury_is_the_dense_solve(x64, spectrum):
    rng = np.random.default_rng(0)
    rows = np.linalg.qr(rng.standard_normal((N, 4)))[0].T
    values, kept = np.array([9.0, -5.0, 2.0, -0.3]), np.array([True, True, False, True])
    rows, values = rows * kept[:, None], values * kept
    gradient = rng.standard_normal(N)
    pairs = Eigenpairs(*map(jnp.asarray, (values, rows, kept)))
    given = {"zero": jnp.zeros_like, "infinite": lambda v: jnp.full_like(v, jnp.inf)}
    found = precondition(
        pairs, jnp.asarray(gradient), jnp.asarray(0.2), given.get(spectrum, spectrum), None
    )
    if spectrum == "shifted":
        matrix = rows.T @ np.diag(values) @ rows + 5.2 * np.eye(N)
    else:
        curvatures = 0 * values if spectrum == "zero" else np.abs(values)
        matrix = rows.T @ np.diag(curvatures) @ rows + 0.2 * np.eye(N)
    expected = np.linalg.solve(matrix, gradient)
    if spectrum == "infinite":
        expected = (gradient - rows.T @ rows @ gradient) / 0.2
    np.testing.assert_allclose(found.vector, expected, rtol=1e-9, atol=1e-11)
    if spectrum == "absolute":
        clipped = precondition(pairs, jnp.asarray(gradient), jnp.asarray(0.2), spectrum, 0.5)
        assert clipped.clipped
        assert jnp.linalg.norm(clipped.vector) == pytest.approx(0.5)
        step = np.asarray(clipped.vector)
        along = (step @ matrix @ step) / (np.asarray(found.vector) @ matrix @ step)
        assert clipped.decrease == pytest.approx((1 - along / 2) * (gradient @ step))


def test_tied_damping(x64):
    pairs = Eigenpairs(jnp.array([9.0, -5.0, 0.0]), jnp.eye(3), jnp.array([True, True, False]))
    assert tied_damping(pairs, 1e-3, 0.5) == 2.5
    assert tied_damping(pairs, 1e-3, 0.0) == 1e-3
    assert tied_damping(pairs._replace(kept=jnp.zeros(3, bool)), 1e-3, 1.0) == 1e-3


# Steps against the dense Hessian.


@pytest.mark.parametrize("eigensolver", ["subspace_iteration", "single_pass", "block_krylov"])
def test_full_rank_is_the_dense_inverse(x64, eigensolver):
    params, objective = start_of(jnp.float64), loss_on(dtype=jnp.float64)
    tx = scale_by_low_rank_saddle_free_newton(
        N, damping=1e-3, damping_share=0.0, max_norm=None, eigensolver=eigensolver
    )
    found, state = update_once(tx, params, objective)
    expected = expected_direction(*dense(objective, params), N, 1e-3)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-8, atol=1e-8)
    assert state.metrics.rank == N
    assert state.metrics.smallest_eigenvalue < 0


def test_adaptive_rank_may_be_full(x64):
    params, objective = start_of(jnp.float64), loss_on(dtype=jnp.float64)
    tx = scale_by_low_rank_saddle_free_newton(
        N, eigensolver="adaptive", block_size=3, tolerance=1e-9, max_norm=None, damping_share=0.0
    )
    found, state = update_once(tx, params, objective)
    expected = expected_direction(*dense(objective, params), N, 1e-3)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-8, atol=1e-8)
    assert state.metrics.products == 1 + 2 * N
    assert state.basis is None


@functools.cache
def standing():
    """A warm-started transform, and its compiled update where the parameters do not move."""
    tx = scale_by_low_rank_saddle_free_newton(
        3, oversampling=2, refresh_every=1, initial_passes=1, max_norm=None
    )
    objective = loss_on()

    @jax.jit
    def update(state, params, scale):
        grads = jax.grad(objective)(params)
        return tx.update(
            grads, state, params, value_fn=objective, curvature_fn=lambda p: scale * objective(p)
        )

    return tx, update


def test_warm_start_converges_to_the_truncated_inverse():
    """As a cold start with many passes does; the damping is the smallest eigenvalue."""
    params, (tx, update) = start_of(), standing()
    state = tx.init(params)
    for _ in range(25):
        warm, state = update(state, params, 1.0)
        assert state.metrics.products == 5
    cold, _ = update_once(
        scale_by_low_rank_saddle_free_newton(
            3, oversampling=2, warm_start=False, passes=25, max_norm=None
        ),
        params,
        loss_on(),
    )
    gradient, values, basis = dense(loss_on(), params)
    expected = expected_direction(gradient, values, basis, 3, abs(values[2]))
    np.testing.assert_allclose(flat(warm), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(flat(cold), flat(warm), rtol=1e-3, atol=1e-4)
    assert state.metrics.damping == pytest.approx(abs(values[2]), rel=1e-4)
    assert state.metrics.largest_eigenvalue == pytest.approx(values[:3].max(), rel=1e-4)


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1)])
def test_quadratics(x64, signs):
    """At full rank one step is at the minimum; of an indefinite one it leaves the saddle."""
    curvatures = jnp.array([5.0, 2.0, 0.5]) * jnp.array(signs)

    def objective(p):
        return jnp.sum(curvatures * (p - 1) ** 2) / 2

    tx = so.low_rank_saddle_free_newton(1.0, 3, damping=1e-9, damping_share=0.0, max_norm=None)
    start = jnp.array([2.0, 1.5, 0.0])
    updates, _ = update_once(tx, start, objective)
    found = optax.apply_updates(start, updates)
    # Along negative curvature the distance to the saddle doubles.
    expected = np.where(np.array(signs) > 0, 1, 1 + 2 * (start - 1))
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_chunks_change_nothing(x64):
    params, objective = start_of(jnp.float64), loss_on(dtype=jnp.float64)
    whole, chunks = (
        update_once(scale_by_low_rank_saddle_free_newton(5, chunk_size=size), params, objective)
        for size in (None, 2)
    )
    np.testing.assert_allclose(flat(whole[0]), flat(chunks[0]), rtol=1e-8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8),
        whole[1].metrics,
        chunks[1].metrics,
    )


def test_curvature_is_that_of_another_batch(x64):
    params = start_of(jnp.float64)
    objective, other = loss_on(dtype=jnp.float64), loss_on(5, jnp.float64)
    tx = scale_by_low_rank_saddle_free_newton(N, damping_share=0.0, max_norm=None, damping=0.1)
    found, _ = update_once(tx, params, objective, curvature_fn=other)
    gradient = dense(objective, params)[0]
    expected = expected_direction(gradient, *dense(other, params)[1:], N, 0.1)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-8)


def test_eigenpairs_are_kept_between_refreshes():
    params, objective = start_of(), loss_on()
    tx = scale_by_low_rank_saddle_free_newton(3, refresh_every=3, initial_passes=2)
    update = jax.jit(functools.partial(tx.update, value_fn=objective))
    state, counts, values = tx.init(params), [], []
    for _ in range(5):
        updates, state = update(jax.grad(objective)(params), state, params)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        counts.append(int(state.metrics.products))
        values.append(np.asarray(state.pairs.values))
    assert counts == [6, 0, 0, 3, 0]
    assert (values[0] == values[2]).all()
    assert (values[2] != values[3]).any()


# Noise.


def test_signal_to_noise():
    """Eigenpairs on which the pieces do not agree are dropped."""
    params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    signs = jnp.array([1.0, -1.0, 1.0, -1.0, 1.1])

    def piece(sign):
        def loss(p):
            return jnp.sum(p["a"] ** 2) + 50 * sign * p["b"][0] ** 2 + jnp.sum(p["b"])

        return so.Objective(lambda p: p, loss)

    tx = scale_by_low_rank_saddle_free_newton(3, signal_to_noise=1.0, initial_passes=8)
    objective = Microbatches(piece, signs)
    _, state = update_once(tx, params, objective)
    assert state.metrics.rank == 2
    assert state.metrics.largest_eigenvalue == pytest.approx(2, rel=1e-4)
    grads = jax.grad(objective)(params)
    for other in (piece(signs[0]), Microbatches(piece, signs[:3])):
        with pytest.raises(TypeError, match="at least 4 pieces"):
            tx.update(grads, tx.init(params), params, value_fn=objective, curvature_fn=other)


# Saddle points.


def double_well(p):
    return p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4


def monkey(p):
    return p[0] ** 3 - 3 * p[0] * p[1] ** 2 + jnp.sum(p**2) ** 2


def test_saddle_points_are_left():
    """Exactly stationary ones too, and where the Hessian vanishes with the gradient."""
    for objective, starts, lowest in (
        (double_well, [(0.0, 0.0), (1.0, 0.0), (1.0, 1e-8)], -1.0),
        (monkey, [(0.0, 0.0), (1e-6, 1e-6)], -27 / 256),
    ):
        tx = so.low_rank_saddle_free_newton(
            1.0, 2, damping=1e-3, damping_share=0.0, refresh_every=1, escape_length=0.1
        )

        @jax.jit
        def step(params, state, tx=tx, objective=objective):
            grads = jax.grad(objective)(params)
            updates, state = tx.update(grads, state, params, value_fn=objective)
            return optax.apply_updates(params, updates), state

        for start in starts:
            params = jnp.array(start)
            state = tx.init(params)
            for _ in range(25):
                params, state = step(params, state)
            assert objective(params) == pytest.approx(lowest, rel=1e-3)
            assert 1 <= state[0].metrics.escapes <= 3


@pytest.mark.parametrize("objective", [lambda p: jnp.sum(p**2), lambda p: 0 * jnp.sum(p)])
def test_minima_and_plateaus_are_not_left(objective):
    updates, state = update_once(scale_by_low_rank_saddle_free_newton(2), jnp.zeros(3), objective)
    assert all_zero(updates)
    assert state.metrics.escapes == 0


# What is not finite.


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_products_that_are_not_finite_are_skipped_and_counted(scale):
    params, (tx, update) = start_of(), standing()
    _, state = update(tx.init(params), params, 1.0)
    updates, new = update(state, params, scale)
    assert all_zero(updates)
    assert new.metrics.nonfinite_products == 1
    assert identical(
        new._replace(metrics=new.metrics._replace(nonfinite_products=0)),
        state._replace(metrics=state.metrics._replace(nonfinite_products=0)),
    )
    again, _ = update(new, params, 1.0)
    assert identical(again, update(state, params, 1.0)[0])


def test_a_batch_that_is_not_finite_changes_a_counter_only():
    params, (tx, update) = start_of(), standing()
    _, state = update(tx.init(params), params, 1.0)
    updates, new = update(state, jax.tree.map(lambda p: p * jnp.nan, params), 1.0)
    assert all_zero(updates)
    assert new.metrics.nonfinite_steps == 1
    assert new.metrics.nonfinite_products == 0
    assert all_finite(new)
    assert new.count == state.count


# The interface.


def test_the_same_key_gives_the_same_run_from_a_checkpoint_too():
    params, (tx, update) = start_of(), standing()

    def run(state, params, steps):
        history = []
        for _ in range(steps):
            updates, state = update(state, params, 1.0)
            params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
            history.append(updates)
        return state, params, history

    state, middle, _ = run(tx.init(params), params, 3)
    saved = jax.tree.map(jnp.asarray, pickle.loads(pickle.dumps(jax.device_get(state))))
    assert identical(run(saved, middle, 2), run(state, middle, 2))
    assert identical(run(tx.init(params), params, 5)[2][3:], run(saved, middle, 2)[2])
    other = tx.init(params)._replace(key=jax.random.key_data(jax.random.key(7)))
    assert not identical(run(other, params, 1)[2], run(tx.init(params), params, 1)[2])


def test_a_rank_above_the_number_of_parameters_is_an_error():
    tx = so.low_rank_saddle_free_newton(0.1, N + 1)
    with pytest.raises(ValueError, match=f"`rank` is {N + 1}, but there are only {N} parameters"):
        tx.init(start_of())
    # With oversampling a basis is the whole space at most.
    state = scale_by_low_rank_saddle_free_newton(N - 1, oversampling=10).init(start_of())
    assert state.basis["b"].shape == (N, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0), ("rank", 2.0), ("oversampling", -1), ("eigensolver", "lanczos"),
        ("warm_start", 1), ("passes", 0), ("initial_passes", 0), ("refresh_every", 0),
        ("damping", 0.0), ("damping_share", -1.0), ("spectrum", "plain"), ("max_norm", 0.0),
        ("escape_length", -1.0), ("signal_to_noise", -1.0), ("tolerance", 1.0), ("block_size", 0),
        ("mode", "forward"), ("chunk_size", 0),
    ],
)  # fmt: skip
def test_bad_hyperparameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        scale_by_low_rank_saddle_free_newton(**{name: value})
    with pytest.raises(ValueError, match="`signal_to_noise` needs `eigensolver`"):
        scale_by_low_rank_saddle_free_newton(signal_to_noise=1.0, eigensolver="single_pass")


def test_missing_arguments_name_the_call():
    tx, params = scale_by_low_rank_saddle_free_newton(2), start_of()
    with pytest.raises(ValueError, match="needs the current `params`"):
        tx.init(None)
    with pytest.raises(ValueError, match=r"needs `value_fn`(.|\n)*tx.update\("):
        tx.update(params, tx.init(params), params)
    with pytest.raises(TypeError, match="`curvature_fn` must be callable"):
        tx.update(params, tx.init(params), params, value_fn=loss_on(), curvature_fn=3.0)


def test_weight_decay():
    """As L2 it is preconditioned with the gradient; decoupled it is not."""
    params, objective = start_of(), loss_on()
    directions = {}
    for form, decay in (("l2", 0.0), ("l2", 0.5), ("decoupled", 0.5)):
        tx = so.low_rank_saddle_free_newton(
            1.0, 3, weight_decay=decay, weight_decay_form=form, max_norm=None
        )
        directions[form, decay] = update_once(tx, params, objective)[0]
    plain = flat(directions["l2", 0.0])
    np.testing.assert_allclose(
        flat(directions["decoupled", 0.5]), plain - 0.5 * flat(params), rtol=1e-4
    )
    assert np.abs(flat(directions["l2", 0.5]) - plain).max() > 1e-2


def test_bfloat16():
    params, objective = start_of(jnp.bfloat16), loss_on(dtype=jnp.bfloat16)
    tx = so.low_rank_saddle_free_newton(0.3, 4, chunk_size=3)

    @jax.jit
    def step(params, state):
        grads = jax.grad(objective)(params)
        updates, state = tx.update(grads, state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state

    state, start = tx.init(params), params
    for _ in range(10):
        params, state = step(params, state)
    assert state[0].basis["w"].dtype == jnp.float32
    assert params["w"].dtype == jnp.bfloat16
    assert objective(params) < 0.5 * objective(start)


@pytest.mark.parametrize("eigensolver", ["subspace_iteration", "adaptive"])
def test_explicit_mesh(eigensolver):
    """Sharded weights give the step of weights on one device."""
    mesh = make_mesh(2, 2)
    tx = scale_by_low_rank_saddle_free_newton(
        4, chunk_size=2, eigensolver=eigensolver, block_size=2, tolerance=1e-3
    )
    expected, _ = update_once(tx, start_of(), loss_on())

    with use_mesh(mesh):
        fresh = start_of()
        params = {
            "w": place(mesh, fresh["w"], None, "model"),
            "b": place(mesh, fresh["b"], "model"),
            "scale": place(mesh, fresh["scale"]),
        }
        batch = [place(mesh, jnp.asarray(a, jnp.float32), "data", None) for a in (X, Y)]
        state = jax.jit(tx.init)(params)
        updates, new = update_once(tx, params, objective_on(batch), state)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        assert jax.typeof(updates["w"]).sharding.spec == PartitionSpec(None, "model")
        if state.basis is not None:
            assert jax.typeof(new.basis["w"]).sharding.spec == PartitionSpec(None, None, "model")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), updates, expected)


# A larger network.


def network_with_outliers():
    """100,910 parameters; its Hessian and 20 planted directions of known larger curvatures."""
    rng = np.random.default_rng(0)
    sizes, labels = (300, 250, 100, 10), np.arange(50) % 10
    x = jnp.asarray(rng.standard_normal((50, 300)), jnp.float32)
    params = [
        {
            "w": jnp.asarray(rng.standard_normal((m, n)) / np.sqrt(m), jnp.float32),
            "b": jnp.zeros(n),
        }
        for m, n in itertools.pairwise(sizes)
    ]
    planted = orthonormalize(random_stack(jax.random.key(3), params, 20))
    outliers = jnp.geomspace(100, 10, 20) * jnp.resize(jnp.array([1, 1, -1]), 20)

    def objective(theta, planted):
        hidden = x
        for layer in theta[:-1]:
            hidden = jnp.tanh(hidden @ layer["w"] + layer["b"])
        logits = hidden @ theta[-1]["w"] + theta[-1]["b"]
        network = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        moved = jax.tree.map(jnp.subtract, theta, params)
        return network + jnp.sum(outliers * project(planted, [moved])[:, 0] ** 2) / 2

    return objective, params, planted


def test_leading_eigenvalues_of_a_network_after_five_warm_steps():
    """The half of them that is wanted most, to 1 % of what many Lanczos vectors say."""
    objective, params, planted = network_with_outliers()
    tx = scale_by_low_rank_saddle_free_newton(20, initial_passes=1, refresh_every=2)

    @jax.jit
    def reference(params, planted):
        operator = hessian(lambda p: objective(p, planted), params)
        return krylov_basis(operator, jax.grad(objective)(params, planted), 60).projected

    @jax.jit
    def update(state, params, planted):
        grads = jax.grad(objective)(params, planted)
        return tx.update(grads, state, params, value_fn=lambda p: objective(p, planted))

    expected = np.linalg.eigvalsh(reference(params, planted))
    expected = expected[np.argsort(-np.abs(expected))][:10]
    assert np.abs(expected).min() > 2 * 10
    state, products = tx.init(params), 0
    for _ in range(10):  # of which five refresh
        _, state = update(state, params, planted)
        products += int(state.metrics.products)
    assert products == 5 * 20
    np.testing.assert_allclose(state.pairs.values[:10], expected, rtol=0.01)
