"""SOAP: against an oracle with Kronecker products, and against Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so
from tests.methods import blockwise_oracle
from tests.methods.test_shampoo import directions_of, gradients_of, tree_of

# The first gradient leaves at most one direction of each axis out, so that its basis is unique.
SHAPES = {"vector": (2,), "matrix": (3, 4), "tensor": (2, 3, 4)}
STEPS = 8


@pytest.mark.parametrize("every", [1, 3, 20])
def test_against_the_oracle(x64, every):
    """Also of the squares: they advance in steps that leave the bases alone."""
    gradients = tree_of(SHAPES, STEPS, jnp.float64)
    settings = {"b1": 0.8, "b2": 0.9}
    tx = so.scale_by_soap(
        **settings, precondition_every=every, merge_dims=False, precondition_vectors=True
    )
    found, state = directions_of(tx, gradients)
    squares = {stack.shape[1:]: stack[0] for stack in state.squares}
    for name, shape in SHAPES.items():
        given = [np.asarray(g[name]) for g in gradients]
        directions, square, _ = blockwise_oracle.soap(given, **settings, every=every)
        for direction, other in zip(found, directions, strict=True):
            np.testing.assert_allclose(direction[name], other, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(squares[shape], square, rtol=1e-6, atol=1e-10)


def test_one_side_is_the_shortest_axis(x64):
    shapes = {"wide": (3, 4), "tall": (4, 3)}
    gradients = tree_of(shapes, STEPS, jnp.float64)
    found, _ = directions_of(so.scale_by_soap(one_sided=True, precondition_every=2), gradients)
    for name, axis in {"wide": 0, "tall": 1}.items():
        given = [np.asarray(g[name]) for g in gradients]
        expected, *_ = blockwise_oracle.soap(given, axes=[axis], every=2)
        np.testing.assert_allclose(found[-1][name], expected[-1], rtol=1e-6, atol=1e-8)


def test_blocks_are_parameters_of_their_own():
    gradients = [jnp.float32(g) for g in gradients_of((6, 4), STEPS)]
    whole, _ = directions_of(so.scale_by_soap(block_size=4, precondition_every=2), gradients)
    parts = [{"a": g[:3], "b": g[3:]} for g in gradients]
    apart, _ = directions_of(so.scale_by_soap(precondition_every=2), parts)
    joined = [jnp.concatenate([d["a"], d["b"]]) for d in apart]
    np.testing.assert_allclose(jnp.stack(whole), jnp.stack(joined), rtol=1e-3, atol=1e-4)


def adam_after_the_first(gradients, **settings):
    """Adam on all gradients but the first."""
    return directions_of(optax.scale_by_adam(**settings), gradients[1:])[0]


def test_with_identities_for_bases_it_is_adam():
    gradients = tree_of(SHAPES, STEPS)
    tx = so.scale_by_soap(b1=0.9, b2=0.99, precondition_every=100, precondition_vectors=True)
    params = gradients[0]
    _, state = tx.update(gradients[0], tx.init(params), params)
    identities = jax.tree.map(
        lambda basis: jnp.tile(jnp.eye(basis.shape[-1]), (len(basis), 1, 1)), state.bases
    )
    state, update = state._replace(bases=identities), jax.jit(tx.update)
    for gradient, expected in zip(
        gradients[1:], adam_after_the_first(gradients, b1=0.9, b2=0.99), strict=True
    ):
        updates, state = update(gradient, state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), updates, expected)


def test_vectors_are_left_to_adam():
    gradients = tree_of({"vector": (4,), "scalar": (), "column": (5, 1)}, STEPS)
    found, state = directions_of(so.scale_by_soap(precondition_every=1), gradients)
    expected = adam_after_the_first(gradients, b1=0.95, b2=0.95)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found[0]))
    for updates, other in zip(found[1:], expected, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), updates, other)
    assert not jax.tree.leaves(state.bases)


def test_the_first_step_makes_the_bases_alone():
    gradients = [jnp.float32(g) for g in gradients_of((3, 4), 2)]
    found, state = directions_of(so.scale_by_soap(), gradients[:1])
    assert not found[0].any()
    assert not any(leaf.any() for leaf in jax.tree.leaves((state.average, state.squares)))
    assert so.metrics(state)["soap/basis_updates"] == 1
    (basis,) = (b[0] for b in state.bases[0][:1])
    rotated = basis.T @ (gradients[0] @ gradients[0].T) @ basis
    np.testing.assert_allclose(rotated, jnp.diag(jnp.diagonal(rotated)), atol=1e-5)


def test_a_first_batch_that_is_not_finite_is_not_the_first():
    gradients = [jnp.float32(g) for g in gradients_of((3, 4), 3)]
    tx = so.scale_by_soap()
    found, state = directions_of(tx, [gradients[0] * jnp.nan, *gradients])
    expected, other = directions_of(tx, gradients)
    jax.tree.map(np.testing.assert_array_equal, found[1:], expected)
    assert state.metrics.nonfinite_steps == 1
    assert other.count == state.count == 3


def test_bases_that_are_not_finite_stay_and_are_counted():
    gradients = tree_of(SHAPES, 4)
    tx = so.scale_by_soap(precondition_every=1, merge_dims=False)
    _, state = directions_of(tx, gradients)
    groups = [list(group) for group in state.statistics]
    broken = next(i for i, group in enumerate(groups) if len(group) == 2)
    groups[broken][1] = groups[broken][1] * jnp.nan
    state = state._replace(statistics=tuple(map(tuple, groups)))
    updates, new = jax.jit(tx.update)(gradients[0], state, gradients[0])
    assert so.metrics(new)["soap/failed_bases"] == 1
    np.testing.assert_array_equal(new.bases[broken][1], state.bases[broken][1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, new.bases)))


def test_forms_of_weight_decay():
    gradients = [jnp.float32(g) for g in gradients_of((3,), 3)]
    params = jnp.ones(3)
    direction = so.scale_by_soap()
    decay, rate = optax.add_decayed_weights(0.1), optax.scale(-0.3)
    chains = {"l2": (decay, direction, rate), "decoupled": (direction, decay, rate)}
    for form, links in chains.items():
        tx = so.soap(0.3, weight_decay=0.1, weight_decay_form=form)
        found, _ = directions_of(tx, gradients, params)
        expected, _ = directions_of(optax.chain(*links), gradients, params)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
