"""Conjugate gradients in lockstep against separate ones of dense matrices, in float64."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from secondorder.solvers import conjugate_gradient, predicted_decrease, stored_iterations
from secondorder.solvers.progress import has_stalled, init_model_ring, record_model
from secondorder.tree import Blocks, one_block
from tests.solvers.solver_oracles import assert_finite, few, seeds

BLOCKS = Blocks(("ab", "c", "d"), (0, 0, 1, 2))
SIZES = (10, 1, 5)
STATIC = ("max_iterations", "store")

stalled_jit, record_jit = jax.jit(has_stalled), jax.jit(record_model)
GRID_250 = (5, 7, 9, 11, 15, 19, 25, 32, 41, 54, 69, 90, 117, 152, 197)


class Scalar(NamedTuple):
    """What `martens` returns; the iterates are those from 0."""

    iterates: list
    values: list
    stopped: bool


def martens(a, b, start=None, m=None, limit=100, first=1, progress=5e-4, residual=None):
    """Conjugate gradients of one dense matrix, as in Martens' program."""
    x, m = np.zeros_like(b) if start is None else start, np.ones_like(b) if m is None else m
    r = a @ x - b
    y = r / m
    p = -y
    iterates, values = [x], [x @ (r - b) / 2]
    for i in range(1, limit + 1):
        ap = a @ p
        if p @ ap <= 0:
            return Scalar(iterates, values, False)
        length = (r @ y) / (p @ ap)
        x, rest = x + length * p, r + length * ap
        y, old = rest / m, r @ y
        r, p = rest, -y + (rest @ y) / old * p
        iterates.append(x)
        values.append(x @ (r - b) / 2)
        k = max(math.ceil(i / 10), 10)
        stop = residual is not None and np.linalg.norm(r) <= residual * np.linalg.norm(b)
        if progress is not None and i > k and values[i - k] < 0:
            stop |= (values[i] - values[i - k]) / values[i] < k * progress
        if stop and i >= first:
            return Scalar(iterates, values, True)
    return Scalar(iterates, values, False)


def spd(rng, size, spread):
    """A random matrix with eigenvalues from ``1 / spread`` to 1."""
    q = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return (q * np.geomspace(1 / spread, 1, size)) @ q.T


def system(seed, spread=30.0):
    """The three matrices of a block-diagonal system, and its right-hand side."""
    rng = np.random.default_rng(seed)
    return [spd(rng, n, spread) for n in SIZES], [rng.standard_normal(n) for n in SIZES]


def as_tree(parts, dtype=None):
    """Vectors of the three blocks as a pytree."""
    ab, c, d = (jnp.asarray(part, dtype or float) for part in parts)
    return {"a": ab[:6].reshape(2, 3), "b": ab[6:], "c": c[0], "d": d}


def as_parts(tree):
    """The inverse of `as_tree`; of stacks too."""
    lead = tree["c"].shape
    a, b, c, d = (np.asarray(tree[name]).reshape(*lead, -1) for name in "abcd")
    return [np.concatenate([a, b], axis=-1), c, d]


def product_of(matrices):
    """The product with a block-diagonal matrix."""

    def product(v):
        ab, c, d = (jnp.asarray(matrix, v["d"].dtype) for matrix in matrices)
        flat = ab @ jnp.concatenate([v["a"].ravel(), v["b"]])
        return {"a": flat[:6].reshape(2, 3), "b": flat[6:], "c": c[0, 0] * v["c"], "d": d @ v["d"]}

    return product


@functools.partial(jax.jit, static_argnames=STATIC)
def solve_tree(matrices, b, **options):
    return conjugate_gradient(product_of(matrices), b, BLOCKS, **options)


def solve(matrices, parts, max_iterations=40, **options):
    """All blocks; compiled once for all numbers."""
    b = as_tree(parts)
    matrices = [jnp.asarray(a, b["d"].dtype) for a in matrices]
    return solve_tree(matrices, b, max_iterations=max_iterations, **options)


@functools.partial(jax.jit, static_argnames=STATIC)
def solve_array(matrix, b, **options):
    return conjugate_gradient(lambda v: matrix @ v, b, one_block(b), **options)


def solve_one(matrix, b, **options):
    """One block, that of a single array."""
    return solve_array(jnp.asarray(matrix), jnp.asarray(b), **options)


def quadratic(seed, size=60, spread=1e4):
    """A diagonal matrix and a right-hand side."""
    rng = np.random.default_rng(seed)
    return np.diag(np.geomspace(1 / spread, 1, size)), rng.standard_normal(size)


def chain(damping=0.0, size=300):
    """A tridiagonal matrix whose residuals are one coordinate each, so that rounding is harmless.

    Without damping the model is ``-i / (2 i + 2)`` after ``i`` iterations.
    """
    a = (2 + damping) * np.eye(size) - np.eye(size, k=1) - np.eye(size, k=-1)
    return a, np.eye(size)[0]


def assert_parts(found, expected, rtol=1e-9):
    for one, other in zip(as_parts(found), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * (1 + np.abs(other).max()))


# The iteration.


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 9])
@few
@given(seed=seeds)
def test_iterates_are_those_of_separate_blocks(x64, seed, limit):
    matrices, parts = system(seed)
    options = {"progress": None, "residual": 0.05}
    result = solve(matrices, parts, max_iterations=limit, **options)
    separate = [martens(a, b, limit=limit, **options) for a, b in zip(matrices, parts, strict=True)]
    assert_parts(result.solution, [one.iterates[-1] for one in separate])
    assert result.converged.tolist()[0] == separate[0].stopped
    counts = [len(one.iterates) - 1 for one in separate]
    assert result.iterations.tolist() == counts
    assert result.products == max(counts)
    np.testing.assert_allclose(result.model, [one.values[-1] for one in separate], rtol=1e-9)
    assert result.finite.all()
    assert not result.negative_curvature.any()


@few
@given(seed=seeds, damping=st.floats(0.01, 10))
def test_model_and_residual_are_those_of_the_solution(x64, seed, damping):
    matrices, parts = system(seed)
    damped = [a + damping * np.eye(len(a)) for a in matrices]
    result = solve(damped, parts, max_iterations=4)
    x = as_parts(result.solution)
    blocks = list(zip(matrices, damped, parts, x, strict=True))
    assert_parts(result.residual, [a @ v - b for _, a, b, v in blocks], rtol=1e-12)
    np.testing.assert_allclose(result.model, [v @ a @ v / 2 - b @ v for _, a, b, v in blocks])
    decrease = predicted_decrease(result, BLOCKS, damping)
    np.testing.assert_allclose(decrease, [b @ v - v @ a @ v / 2 for a, _, b, v in blocks])


def test_solves_exactly_in_as_many_iterations_as_unknowns(x64):
    matrices, parts = system(0, spread=5.0)
    result = solve(matrices, parts, max_iterations=50, progress=None)
    assert_parts(
        result.solution, [np.linalg.solve(a, b) for a, b in zip(matrices, parts, strict=True)]
    )
    assert result.converged.all()  # to rounding
    assert (result.iterations <= np.array(SIZES) + 3).all()
    exact = solve(matrices, parts, max_iterations=max(SIZES), progress=None)
    assert_parts(exact.solution, as_parts(result.solution))


def test_blocks_are_not_one_system(x64):
    """Each block has step lengths of its own."""
    matrices, parts = system(1)
    matrices[2] = 1e6 * matrices[2]
    result = solve(matrices, parts, residual=1e-8)
    assert result.iterations.tolist()[1:] == [1, 5]
    assert result.iterations[0] == 10


@pytest.mark.parametrize("limit", [11, 40, 250])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1, 1.0])
def test_stops_where_martens_does(x64, limit, damping):
    a, b = chain(damping)
    expected = martens(a, b, limit=limit)
    result = solve_one(a, b, max_iterations=limit)
    assert result.iterations.tolist() == [len(expected.iterates) - 1]
    assert result.converged.tolist() == [expected.stopped]
    np.testing.assert_allclose(result.solution, expected.iterates[-1], rtol=1e-9)
    np.testing.assert_allclose(result.model, expected.values[-1:], rtol=1e-12)


@pytest.mark.parametrize("progress", [8e-5, 5e-5, 2e-5])
def test_stops_where_martens_does_after_the_ring_is_full(x64, progress):
    """The ring for 250 iterations holds 26 values, and is written over several times."""
    a, b = chain()
    expected = martens(a, b, limit=250, progress=progress)
    result = solve_one(a, b, max_iterations=250, progress=progress)
    count = len(expected.iterates) - 1
    assert expected.stopped
    assert 100 < count < 250
    assert result.iterations.tolist() == [count]


@few
@given(seed=seeds, limit=st.sampled_from([11, 99, 100, 101, 250]))
def test_rule_on_any_values(x64, seed, limit):
    """Also on values that rise, or are positive for a while."""
    rng = np.random.default_rng(seed)
    values = 5 - np.cumsum(rng.standard_normal((limit, 2)) + 1, axis=0)
    ring = init_model_ring(jnp.zeros(2), limit)
    for i in range(1, limit + 1):
        k = max(math.ceil(i / 10), 10)
        now, before = values[i - 1], values[i - k - 1] if i > k else np.zeros(2)
        expected = (before < 0) & ((now - before) / now < 0.03 * k)
        stalled = stalled_jit(ring, i, now, 0.03)
        np.testing.assert_array_equal(stalled, expected & (now < 0))
        ring = record_jit(ring, i, now)


def test_blocks_stop_at_different_iterations(x64):
    systems = [chain(damping, 100) for damping in (0.0, 0.01, 1.0)]
    matrices, b = jnp.stack([a for a, _ in systems]), [jnp.asarray(b) for _, b in systems]
    blocks = Blocks(("a", "b", "c"), (0, 1, 2))
    result = conjugate_gradient(
        lambda v: [matrices[i] @ x for i, x in enumerate(v)], b, blocks, max_iterations=100
    )
    separate = [martens(*one) for one in systems]
    assert result.iterations.tolist() == [len(one.iterates) - 1 for one in separate]
    assert len(set(result.iterations.tolist())) == 3
    for x, one in zip(result.solution, separate, strict=True):
        np.testing.assert_allclose(x, one.iterates[-1], rtol=1e-9)


def test_no_rule_holds_before_the_least_iterations(x64):
    a, b = quadratic(0, spread=10.0)
    options = {"max_iterations": 60, "residual": 0.5}
    early = solve_one(a, b, **options)
    assert early.iterations < 4
    late = solve_one(a, b, min_iterations=7, **options)
    assert late.iterations.tolist() == [7]
    assert late.converged.all()


def test_progress_takes_more_than_ten_iterations(x64):
    a, b = quadratic(0)
    result = solve_one(a, b, max_iterations=10, progress=1e9)
    assert result.iterations.tolist() == [10]
    assert not result.converged.any()
    assert solve_one(a, b, max_iterations=11, progress=1e9).converged.all()
    assert not solve_one(a, b, max_iterations=40, progress=None).converged.any()


def test_residual_bounds_may_be_traced_and_differ(x64):
    matrices, parts = system(2)
    bounds = jnp.array([0.5, 0.5, 1e-3])
    result = solve(matrices, parts, residual=bounds)
    separate = [
        martens(a, b, residual=bound)
        for a, b, bound in zip(matrices, parts, bounds.tolist(), strict=True)
    ]
    assert result.iterations.tolist() == [len(one.iterates) - 1 for one in separate]


@few
@given(seed=seeds)
def test_preconditioner(x64, seed):
    matrices, parts = system(seed)
    rng = np.random.default_rng(seed)
    diagonal = [10.0 ** rng.uniform(-1, 1, n) for n in SIZES]
    m = as_tree(diagonal)
    result = solve(matrices, parts, preconditioner=m, max_iterations=4)
    separate = [
        martens(a, b, m=d, limit=4) for a, b, d in zip(matrices, parts, diagonal, strict=True)
    ]
    iterates = [one.iterates[min(4, n)] for one, n in zip(separate, SIZES, strict=True)]
    assert_parts(result.solution, iterates, rtol=1e-8)


def test_preconditioner_as_a_function(x64):
    matrices, parts = system(0)
    m = as_tree([np.linspace(1, 2, n) for n in SIZES])
    called = conjugate_gradient(
        product_of(matrices),
        as_tree(parts),
        BLOCKS,
        preconditioner=lambda r: jax.tree.map(jnp.divide, r, m),
        max_iterations=4,
    )
    divided = solve(matrices, parts, preconditioner=m, max_iterations=4)
    assert_parts(called.solution, as_parts(divided.solution))


def test_residual_is_measured_in_the_plain_norm(x64):
    a, b = quadratic(3, size=20, spread=100.0)
    diagonal = np.geomspace(1e-3, 1e3, 20)
    expected = martens(a, b, m=diagonal, residual=0.1)
    result = solve_one(a, b, preconditioner=jnp.asarray(diagonal), max_iterations=100, residual=0.1)
    assert result.iterations.tolist() == [len(expected.iterates) - 1]


def test_exact_preconditioner_solves_at_once(x64):
    a, b = quadratic(4, size=20)
    result = solve_one(a, b, preconditioner=jnp.asarray(np.diag(a)), max_iterations=9)
    assert result.iterations <= 2
    np.testing.assert_allclose(result.solution, b / np.diag(a), rtol=1e-12)


# The start.


@few
@given(seed=seeds, size=st.floats(-3, 3))
def test_start_is_shortened_to_the_best_multiple(x64, seed, size):
    matrices, parts = system(seed)
    rng = np.random.default_rng(seed + 1)
    starts = [10.0**size * rng.standard_normal(n) for n in SIZES]
    blocks = list(zip(matrices, parts, starts, strict=True))
    best = [float(np.clip((b @ x) / (x @ a @ x), 0, 1)) for a, b, x in blocks]
    shortened = [t * x for t, x in zip(best, starts, strict=True)]
    at_start = solve(
        matrices, parts, start=as_tree(starts), max_iterations=1, residual=np.inf, min_iterations=0
    )
    assert_parts(at_start.solution, shortened)
    assert_parts(
        at_start.residual, [a @ x - b for (a, b, _), x in zip(blocks, shortened, strict=True)]
    )
    assert (at_start.model <= 1e-14).all()
    assert at_start.products == 1
    assert not at_start.iterations.any()
    result = solve(matrices, parts, start=as_tree(starts), max_iterations=3, progress=None)
    iterates = [
        martens(a, b, x, limit=min(3, len(b))).iterates[-1]
        for (a, b, _), x in zip(blocks, shortened, strict=True)
    ]
    assert_parts(result.solution, iterates, rtol=1e-7)
    assert result.products == 4
    assert (result.model <= at_start.model + 1e-14).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_harmful_starts_are_dropped_block_by_block(x64, bad):
    matrices, parts = system(3)
    good = 0.5 * np.linalg.solve(matrices[0], parts[0])
    starts = [good, -parts[1], np.full(5, bad)]
    options = {"residual": np.inf, "min_iterations": 0}
    result = solve(matrices, parts, start=as_tree(starts), **options)
    assert_parts(result.solution, [good, np.zeros(1), np.zeros(5)])
    assert result.finite.all()
    solved = solve(matrices, parts, start=as_tree(starts), residual=1e-10)
    exact = [np.linalg.solve(a, b) for a, b in zip(matrices, parts, strict=True)]
    assert_parts(solved.solution, exact, rtol=1e-7)


def test_solution_as_start_is_left_alone(x64):
    matrices, parts = system(4)
    solved = solve(matrices, parts, progress=None)
    again = solve(matrices, parts, start=solved.solution, residual=1e-6, min_iterations=0)
    assert again.products == 1
    assert again.converged.all()
    assert_parts(again.solution, as_parts(solved.solution))


# Curvature that is not positive, numbers that are not finite, nothing to do.


def test_negative_curvature_ends_a_block(x64):
    matrices, parts = system(5)
    matrices[1] = -matrices[1]
    result = solve(matrices, parts, residual=1e-8)
    assert result.negative_curvature.tolist() == [False, True, False]
    assert result.iterations.tolist() == [10, 0, 5]
    assert result.converged.tolist() == [True, False, True]
    assert result.finite.all()
    x, p = as_parts(result.solution), as_parts(result.direction)
    assert not x[1].any()
    np.testing.assert_array_equal(p[1], parts[1])
    np.testing.assert_allclose(x[2], np.linalg.solve(matrices[2], parts[2]), rtol=1e-6)


def test_negative_curvature_after_some_steps_keeps_them(x64):
    rng = np.random.default_rng(0)
    values = np.append(np.linspace(1, 2, 11), -0.02)
    b = np.append(rng.standard_normal(11), 0.01)
    expected = martens(np.diag(values), b)
    count = len(expected.iterates) - 1
    assert count >= 2
    result = solve_one(np.diag(values), b, max_iterations=50)
    assert result.negative_curvature.all()
    assert result.iterations.tolist() == [count]
    assert result.products == count + 1
    np.testing.assert_allclose(result.solution, expected.iterates[-1], rtol=1e-8)
    p = np.asarray(result.direction)
    assert p @ (values * p) <= 0
    assert p @ b > 0  # and descends


def test_zero_matrix_has_no_curvature():
    b = jnp.array([1.0, 2.0])
    result = solve_one(jnp.zeros((2, 2)), b, max_iterations=5)
    assert result.negative_curvature.all()
    np.testing.assert_array_equal(result.direction, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sudden", [False, True])
def test_product_that_is_not_finite_ends_a_block(x64, bad, sudden):
    """At once, or after the direction has become small; one element is enough."""
    matrices, parts = system(6)
    good = product_of(matrices)

    def product(v):
        image = good(v)
        spoiled = jnp.linalg.norm(v["d"]) < 0.5 if sudden else True
        first = jnp.where(spoiled, bad, image["d"][0])
        return image | {"d": image["d"].at[0].set(first)}

    result = conjugate_gradient(
        product, as_tree(parts), BLOCKS, max_iterations=30, residual=1e-8, store=True
    )
    assert result.finite.tolist() == [True, True, False]
    assert result.iterations.tolist()[:2] == [10, 1]
    assert result.converged.tolist() == [True, True, False]
    assert not result.negative_curvature.any()
    assert_finite(result)
    count = int(result.iterations[2])
    assert (count > 0) == sudden
    last = martens(matrices[2], parts[2], limit=max(count, 1)).iterates[count]
    np.testing.assert_allclose(as_parts(result.solution)[2], last, rtol=1e-9, atol=1e-12)


def test_product_of_a_finished_block_does_not_matter(x64):
    """Zero times NaN must not come back into a block that has ended."""
    matrices, parts = system(7)
    good = product_of(matrices)

    def product(v):
        image = good(v)
        return image | {"c": jnp.where(jnp.abs(v["c"]) < 1e-7, jnp.nan, image["c"])}

    # Nothing is left to do in the scalar block: its direction is zero, its product is not finite.
    parts[1][:] = 0.0
    result = conjugate_gradient(product, as_tree(parts), BLOCKS, max_iterations=30)
    assert result.finite.all()
    assert result.converged[1]
    assert_finite(result)


def test_right_hand_side_that_is_not_finite():
    b = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.array([2.0])}
    blocks = Blocks(("a", "b"), (0, 1))
    result = conjugate_gradient(
        lambda v: jax.tree.map(lambda x: 2 * x, v), b, blocks, start=b, max_iterations=5
    )
    assert result.finite.tolist() == [False, True]
    assert result.converged.tolist() == [False, True]
    assert_finite(result)
    assert [x.tolist() for x in jax.tree.leaves(result.solution)] == [[0.0, 0.0], [1.0]]


def test_preconditioner_that_is_not_finite_or_not_positive(x64):
    matrices, parts = system(8)
    scale = [np.ones(10), np.full(1, -1.0), np.append(np.ones(4), 0.0)]
    result = solve(matrices, parts, preconditioner=as_tree(scale), residual=1e-8)
    assert result.finite.tolist() == [True, True, False]
    assert result.converged.tolist() == [True, False, False]
    assert result.iterations.tolist() == [10, 0, 0]
    assert_finite(result)


@pytest.mark.parametrize("with_start", [False, True])
def test_zero_right_hand_side_takes_no_iteration(with_start):
    matrices, parts = system(9)
    parts = [parts[0], parts[1], 0 * parts[2]]
    start = as_tree([np.ones(n) for n in SIZES]) if with_start else None
    result = solve(matrices, parts, start=start, residual=1e-3)
    assert result.iterations[2] == 0
    assert result.converged.all()
    assert not as_parts(result.solution)[2].any()
    assert result.model[2] == 0
    assert_finite(result)
    nothing = solve(matrices, [0 * b for b in parts])
    assert nothing.products == 0
    assert nothing.converged.all()


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_extreme_numbers_give_no_nan(size):
    """Inner products in float32 under- and overflow."""
    matrices, parts = system(10)
    for factor in (1.0, size):
        result = solve([factor * a for a in matrices], [size * b for b in parts])
        assert_finite(result)


# Units.


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_factor_of_the_objective_does_not_matter(factor):
    """With a power of two not even for rounding: no absolute number is compared with."""
    matrices, parts = system(11, spread=1e3)
    matrices = [np.asarray(a, np.float32) for a in matrices]
    parts = [np.asarray(b, np.float32) for b in parts]
    start = as_tree([np.ones(n) for n in SIZES])
    one = solve(matrices, parts, start=start)
    scaled = solve([factor * a for a in matrices], [factor * b for b in parts], start=start)
    jax.tree.map(np.testing.assert_array_equal, scaled.solution, one.solution)
    np.testing.assert_array_equal(scaled.iterations, one.iterations)
    np.testing.assert_array_equal(scaled.model, factor * one.model)


def test_millionth_of_the_objective(x64):
    a, b = chain()
    one = solve_one(a, b, max_iterations=100)
    scaled = solve_one(1e-6 * a, 1e-6 * b, max_iterations=100)
    assert scaled.iterations == one.iterations
    np.testing.assert_allclose(scaled.solution, one.solution, rtol=1e-12)


def test_float32_in_lockstep():
    matrices, parts = system(12, spread=10.0)
    result = solve(matrices, parts, residual=1e-3)
    separate = [martens(a, b, residual=1e-3) for a, b in zip(matrices, parts, strict=True)]
    assert result.iterations.tolist() == [len(one.iterates) - 1 for one in separate]
    assert_parts(result.solution, [one.iterates[-1] for one in separate], rtol=1e-4)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.solution)} == {jnp.dtype("float32")}
    assert result.model.dtype == jnp.float32
    assert result.iterations.dtype == jnp.int32
    assert result.products.dtype == jnp.int32


def test_mixed_dtypes_keep_theirs(x64):
    b = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(2, jnp.float64)}
    result = conjugate_gradient(
        lambda v: jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1.0) * x, v),
        b,
        one_block(b),
        start=b,
        preconditioner=jax.tree.map(lambda x: jnp.ones(x.shape), b),
        max_iterations=20,
        store=True,
    )
    for tree in (result.solution, result.residual, result.direction, result.stored):
        assert (tree["a"].dtype, tree["b"].dtype) == (jnp.float32, jnp.float64)
    assert result.products.dtype == jnp.int32
    np.testing.assert_allclose(result.solution["b"], [1, 0.5], rtol=1e-6)


# The iterates that are kept.


def test_grid_is_martens():
    assert stored_iterations(250) == GRID_250
    assert stored_iterations(5) == ()
    assert stored_iterations(6) == (5,)


@pytest.mark.parametrize("limit", [1, 4, 5, 6, 9, 12, 30, 41])
def test_stored_iterates(x64, limit):
    a, b = chain(size=60)
    expected = martens(a, b, limit=limit, progress=None).iterates
    result = solve_one(a, b, max_iterations=limit, progress=None, store=True)
    numbers = [i for i in GRID_250 if i < limit] + [limit]
    assert result.stored_at.tolist() == numbers
    assert result.stored_at.dtype == jnp.int32
    assert result.stored.shape == (len(numbers), 60)
    for row, number in zip(result.stored, numbers, strict=True):
        np.testing.assert_allclose(row, expected[number], rtol=1e-9)
    np.testing.assert_array_equal(result.stored[-1], result.solution)


@pytest.mark.parametrize("count", [0, 3, 5, 6, 7, 8])
def test_rows_after_the_last_iterate_are_empty(x64, count):
    a, b = chain(size=60)
    options = {"min_iterations": count, "residual": np.inf, "max_iterations": 30, "store": True}
    result = solve_one(a, b, **options)
    assert result.iterations.tolist() == [count]
    numbers = [i for i in GRID_250 if i < count] + [count]
    used = len(numbers)
    assert result.stored_at.tolist() == numbers + [-1] * (8 - used)
    np.testing.assert_array_equal(result.stored[used - 1], result.solution)
    assert not result.stored[used:].any()


def test_blocks_that_have_ended_are_stored_as_they_are(x64):
    matrices, parts = system(13)
    result = solve(matrices, parts, residual=1e-8, store=True)
    assert result.stored_at.tolist()[:4] == [5, 7, 9, 10]
    stored = as_parts(result.stored)
    for row in range(4):
        np.testing.assert_array_equal(stored[1][row], as_parts(result.solution)[1])


def test_iterate_before_negative_curvature_is_stored_once(x64):
    values = np.append(np.linspace(1, 2, 11), -0.02)
    b = np.append(np.random.default_rng(0).standard_normal(11), 0.01)
    result = solve_one(np.diag(values), b, max_iterations=50, store=True)
    used = result.stored_at[result.stored_at >= 0]
    assert used[-1] == result.iterations[0]
    assert len(set(used.tolist())) == len(used)
    np.testing.assert_array_equal(result.stored[len(used) - 1], result.solution)


def test_nothing_is_stored_unless_asked_for():
    result = solve_one(jnp.eye(2), jnp.ones(2), max_iterations=2)
    assert result.stored is None
    assert result.stored_at is None


# The program.


def equations(jaxpr, name):
    """The equations of a primitive, in subprograms too."""
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == name]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += equations(inner, name)
    return found


@pytest.mark.parametrize("with_start", [False, True])
def test_one_product_per_iteration(with_start):
    b = jnp.ones(4)
    program = jax.make_jaxpr(
        lambda a, b: conjugate_gradient(
            lambda v: a @ v,
            b,
            one_block(b),
            start=b if with_start else None,
            preconditioner=b,
            max_iterations=30,
            residual=1e-3,
            store=True,
        )
    )(jnp.eye(4), b)
    loops = equations(program.jaxpr, "while")
    assert len(loops) == 1
    assert len(equations(loops[0].params["body_jaxpr"].jaxpr, "dot_general")) == 1
    assert len(equations(loops[0].params["cond_jaxpr"].jaxpr, "dot_general")) == 0
    assert len(equations(program.jaxpr, "dot_general")) == 1 + with_start


def test_counts_the_products_that_are_made(x64):
    a, b = quadratic(9, size=30)
    calls = []

    def product(v):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.asarray(a) @ v

    vector = jnp.asarray(b)
    result = conjugate_gradient(
        product, vector, one_block(vector), start=vector, max_iterations=17, progress=None
    )
    jax.block_until_ready(result)
    jax.effects_barrier()
    assert result.products == len(calls) == 18


def test_compiles_once_for_all_numbers():
    traces = []

    @jax.jit
    def run(a, b, start, progress, residual, least):
        traces.append(1)
        return conjugate_gradient(
            lambda v: a @ v,
            b,
            one_block(b),
            start=start,
            max_iterations=40,
            min_iterations=least,
            progress=progress,
            residual=residual,
        )

    for seed in range(3):
        rng = np.random.default_rng(seed)
        a, b = spd(rng, 6, 10.0).astype(np.float32), rng.standard_normal(6).astype(np.float32)
        result = run(a, b, b, 1e-3 * seed, 10.0**-seed, seed)
        assert_finite(result)
    assert len(traces) == 1


def test_maps_over_systems(x64):
    systems = [chain(damping, 50) for damping in (0.0, 1e-2, 0.1, 1.0)]
    matrices, b = (jnp.stack([jnp.asarray(s[i]) for s in systems]) for i in range(2))

    @jax.jit
    def run(a, b):
        return conjugate_gradient(
            lambda v: a @ v, b, one_block(b), start=b, max_iterations=45, store=True
        )

    together = jax.vmap(run)(matrices, b)
    assert len(set(together.iterations[:, 0].tolist())) > 1
    for i in range(4):
        one = run(matrices[i], b[i])
        np.testing.assert_array_equal(together.iterations[i], one.iterations)
        np.testing.assert_array_equal(together.products[i], one.products)
        np.testing.assert_array_equal(together.stored_at[i], one.stored_at)
        np.testing.assert_allclose(together.solution[i], one.solution, rtol=1e-9)
        np.testing.assert_allclose(together.stored[i], one.stored, rtol=1e-9)


@pytest.mark.skipif(jax.device_count() < 8, reason="XLA_FLAGS asks for fewer host devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharding_changes_nothing(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = {"w": PartitionSpec("x", "y"), "v": PartitionSpec("y"), "s": PartitionSpec()}
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 4), "v": (6,), "s": ()}
    b = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    scale = {name: np.abs(rng.standard_normal(s)) + 0.5 for name, s in shapes.items()}
    blocks = Blocks(("s", "vw"), (0, 1, 1))

    def run(b, scale):
        return conjugate_gradient(
            lambda v: jax.tree.map(jnp.multiply, scale, v),
            b,
            blocks,
            start=b,
            preconditioner=jax.tree.map(jnp.sqrt, scale),
            max_iterations=12,
            residual=1e-4,
            store=True,
        )

    scale = {name: np.asarray(leaf, np.float32) for name, leaf in scale.items()}
    expected = jax.jit(run)(b, scale)

    def place(tree):
        return {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in tree.items()}

    use = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
    with use(mesh):
        found = jax.jit(run)(place(b), place(scale))
        assert found.iterations.tolist() == expected.iterations.tolist()
        for name in shapes:
            x, y = found.solution[name], expected.solution[name]
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
            if kind == AxisType.Explicit:
                assert x.sharding.spec == specs[name]


@pytest.mark.parametrize("bad", [0, -1, 2.5, None])
def test_bound_on_the_iterations_is_checked(bad):
    with pytest.raises(ValueError, match="max_iterations"):
        solve_one(jnp.eye(2), jnp.ones(2), max_iterations=bad)
