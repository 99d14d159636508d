"""Maps over stacks of matrices, and what methods that use them compile to on CPUs."""

import functools
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from secondorder.products import map_matrices
from tests.steps import training_step

WIDTHS = (3, 3, 3, 5, 5, 5)  # layers of two shapes, two of each
# `lapack_spotrf_ffi` of a stack of more than one: its result has another axis, longer than one.
BATCHED = re.compile(
    r"= \(?f(?:32|64)\[(?:[2-9]|\d\d+),\d+,\d+\].*custom_call_target=\"(?:lapack|blas)_"
)


def _stack(size, dtype=jnp.float32):
    return jnp.stack([(k + size) * jnp.eye(size, dtype=dtype) + 1 for k in (1, 2)])


@pytest.mark.parametrize("function", [jnp.linalg.cholesky, jnp.linalg.eigh, jnp.linalg.qr])
def test_maps_as_vmap_does(x64, function):
    stack = _stack(4, jnp.float64)
    found, wanted = jax.jit(functools.partial(map_matrices, function))(stack), function(stack)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), found, wanted)


def test_the_pattern_finds_a_batched_call():
    text = jax.jit(jnp.linalg.cholesky).lower(_stack(4)).compile().as_text()
    assert BATCHED.search(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda layers: so.kfac(None, layers),
        lambda layers: so.kfac(0.1, layers, inverse="eigen"),
        lambda layers: so.kfac(0.1, layers, inverse="corrected"),
        lambda layers: so.kbfgs(0.1, layers),
        lambda _: so.shampoo(0.1),
        lambda _: so.soap(0.1),
        lambda layers: so.scale_by_positive_curvature(layers=layers),
    ],
    ids=["kfac", "kfac-eigen", "ekfac", "kbfgs", "shampoo", "soap", "positive-curvature"],
)
def test_methods_make_no_batched_calls(make):
    """With JAX 0.10 on two cores, K-FAC of eight layers waited forever in one of 300 steps."""
    x = jnp.ones((4, WIDTHS[0]))
    params = [jnp.ones(shape) / 4 for shape in pairwise(WIDTHS)]

    def objective_on(batch):
        return so.Objective(
            lambda params: functools.reduce(lambda h, w: jnp.tanh(h @ w), params, batch),
            lambda z: jnp.mean(jnp.sum((z - 1) ** 2, axis=-1)),
        )

    tx = optax.with_extra_args_support(make(so.find_layers(objective_on(x), params)))
    lowered = jax.jit(training_step(tx, objective_on)).lower(params, tx.init(params), x)
    assert not BATCHED.findall(lowered.compile().as_text())
