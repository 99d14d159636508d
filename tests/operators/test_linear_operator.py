"""`LinearOperator`: algebra, masks and other forms, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from secondorder.operators import LinearOperator, vectors_like
from tests.operators.operator_models import assert_close, normal

POINT = {"a": [normal(2, 2), normal()], "b": (normal(3, seed=1),)}
SIZE = 8
_ROOT = normal(SIZE, SIZE)
MATRIX = _ROOT @ _ROOT.T
OTHER = _ROOT + _ROOT.T


def operator_of(matrix, like=POINT):
    _, unravel = ravel_pytree(like)
    return LinearOperator(lambda v: unravel(matrix @ ravel_pytree(v)[0]), vectors_like(like))


def test_product_and_matrix():
    operator = operator_of(MATRIX)
    assert_close(ravel_pytree(operator(POINT))[0], MATRIX @ ravel_pytree(POINT)[0], 1e-6)
    assert_close(operator.as_matrix(), MATRIX, 1e-6)


def test_matrix_has_products_as_columns():
    """Even of an operator that is not symmetric."""
    assert_close(operator_of(_ROOT).as_matrix(), _ROOT, 1e-6)


def test_columns():
    stack = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), POINT)
    products = operator_of(MATRIX).columns(stack)
    expected = operator_of(MATRIX)(POINT)
    for stacked, one in zip(jax.tree.leaves(products), jax.tree.leaves(expected), strict=True):
        assert_close(stacked, jnp.stack([one, 2 * one, -one]), 1e-6)


def test_sum_scaled_damped():
    operator = (operator_of(MATRIX) + operator_of(OTHER)).scaled(0.5).damped(0.1)
    assert_close(operator.as_matrix(), 0.5 * (MATRIX + OTHER) + 0.1 * np.eye(SIZE), 1e-6)


def test_plus_diagonal():
    diagonal = jax.tree.map(jnp.exp, POINT)
    expected = MATRIX + np.diag(ravel_pytree(diagonal)[0])
    assert_close(operator_of(MATRIX).plus_diagonal(diagonal).as_matrix(), expected, 1e-6)


@pytest.mark.parametrize(
    "mask",
    [
        {"a": True, "b": False},
        {"a": [True, False], "b": (np.array([1, 0, 1]),)},
        {"a": [jnp.array([[1.0, 0.0], [0.0, 1.0]]), True], "b": True},
    ],
)
def test_masked(mask):
    full = jax.tree.map(lambda m, p: jax.tree.map(lambda q: m * jnp.ones_like(q), p), mask, POINT)
    kept = np.asarray(ravel_pytree(full)[0])
    expected = kept[:, None] * MATRIX * kept
    assert_close(operator_of(MATRIX).masked(mask).as_matrix(), expected, 1e-6)


def test_masked_keeps_what_is_not_finite_out():
    """Zero times infinity is not zero; a mask is no product."""
    operator = operator_of(MATRIX).masked({"a": True, "b": False})
    vector = POINT | {"b": (jnp.full(3, jnp.inf),)}
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(operator(vector)))


def test_vectors_are_wide():
    point = jax.tree.map(lambda p: p.astype(jnp.bfloat16), POINT)
    like = vectors_like(point)
    assert {leaf.dtype for leaf in jax.tree.leaves(like)} == {jnp.dtype("float32")}
    matrix = LinearOperator(operator_of(MATRIX).product, like).as_matrix()
    assert matrix.dtype == jnp.float32
    assert_close(matrix, MATRIX, 1e-6)


@pytest.mark.usefixtures("x64")
def test_wide_numbers_keep_the_dtype_of_the_vectors():
    """In a loop the carry's dtype must not change, whatever the damping's is."""
    point, number = jnp.ones(2, jnp.float32), jnp.asarray(0.5, jnp.float64)
    double = LinearOperator(lambda v: 2 * v, vectors_like(point))
    for operator in (
        double.damped(number),
        double.scaled(number),
        double.plus_diagonal(number * jnp.ones(2)),
    ):
        assert operator(point).dtype == jnp.float32
        assert operator(operator(point)).tolist() in ([6.25, 6.25], [1.0, 1.0])


@pytest.mark.usefixtures("x64")
def test_mixed_dtypes_become_the_widest():
    point = (jnp.ones(1, jnp.float64), jnp.ones(1, jnp.bfloat16))
    assert [leaf.dtype for leaf in vectors_like(point)] == [jnp.dtype("float64")] * 2


def test_works_under_jit_and_vmap():
    solve = jax.jit(jax.vmap(lambda damping: operator_of(MATRIX).damped(damping).as_matrix()))
    matrices = solve(jnp.array([0.0, 1.0]))
    assert_close(matrices[1] - matrices[0], np.eye(SIZE), 1e-5)


def test_as_lineax():
    lineax = pytest.importorskip("lineax")
    operator = operator_of(MATRIX).damped(1.0)
    converted = operator.as_lineax()
    assert lineax.is_symmetric(converted)
    assert_close(converted.as_matrix(), operator.as_matrix(), 1e-6)
    solver = lineax.CG(rtol=1e-6, atol=1e-6)
    tagged = lineax.TaggedLinearOperator(converted, lineax.positive_semidefinite_tag)
    solution = lineax.linear_solve(tagged, POINT, solver).value
    assert_close(ravel_pytree(operator(solution))[0], ravel_pytree(POINT)[0], 1e-4)


def test_as_lineax_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lineax", None)
    with pytest.raises(ImportError, match="pip install lineax"):
        operator_of(MATRIX).as_lineax()
