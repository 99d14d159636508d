"""Which losses are seen to have the curvature of a softmax cross entropy, and which are not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from secondorder.jaxprs import is_log_partition_loss

LABELS = jnp.array([0, 2, 1, 2])
TARGETS = jnp.array([[0.2, 0.3, 0.5]] * 4)


def plain(z):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, LABELS))


def gathered(z):
    return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(4), LABELS])


def of_one_case(z, label):
    return jax.nn.logsumexp(z) - z[label]


def by_hand(z):
    shifted = z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    return jnp.sum(jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))) - jnp.sum(TARGETS * shifted)


def over_positions(z):
    rows = jnp.broadcast_to(z, (2, 4, 3)).astype(jnp.float32)
    return jnp.mean(jax.nn.logsumexp(rows.reshape(-1, 3), axis=-1))


@pytest.mark.parametrize(
    "loss",
    [
        plain,
        jax.jit(plain),
        gathered,
        by_hand,
        over_positions,
        lambda z: jnp.mean(jax.vmap(of_one_case)(z, LABELS)),
        lambda z: jnp.sum(optax.softmax_cross_entropy(z, TARGETS)),
        lambda z: jnp.sum(jnp.where(LABELS > 0, jax.nn.logsumexp(z, axis=-1), 0)) / jnp.sum(LABELS),
        lambda z: plain(z) + 3.0 * jnp.sum(z),
        jnp.sum,
    ],
)
def test_softmax_cross_entropies(loss):
    assert is_log_partition_loss(loss, jnp.ones((4, 3)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: jnp.mean(z**2),
        lambda z: plain(z) + jnp.mean(z**2),
        lambda z: plain(2 * z),  # another temperature: the probabilities are not softmax(z)
        lambda z: plain(z + jnp.arange(3.0)),  # nor with a prior
        lambda z: plain(jnp.concatenate([z, -z], axis=-1)),
        lambda z: plain(z.T.reshape(4, 3)),
        lambda z: plain(jnp.tanh(z)),
        lambda z: plain(z) ** 2,
        lambda z: jnp.mean(optax.sigmoid_binary_cross_entropy(z, TARGETS)),
        lambda z: jnp.mean(optax.sigmoid_focal_loss(z, TARGETS)),
        lambda z: jnp.mean(jax.nn.logsumexp(z, axis=0)),
        lambda z: jax.nn.logsumexp(z),
        # A weight of the logarithm that depends on the logits, with a derivative or without.
        lambda z: jnp.sum(jnp.maximum(jax.nn.logsumexp(z, axis=-1), 1.0)),
        lambda z: jnp.sum(
            jax.lax.stop_gradient(jnp.max(z, axis=-1)) * jax.nn.logsumexp(z, axis=-1)
        ),
        lambda z: jnp.sum(
            jnp.where(z[:, 0] > 0, jax.nn.logsumexp(z, axis=-1), 2 * jax.nn.logsumexp(z, axis=-1))
        ),
        lambda z: jnp.sum(jax.lax.optimization_barrier((z, jnp.exp(z)))[1]),
        lambda z: jax.lax.scan(lambda c, row: (c + jax.nn.logsumexp(row), None), 0.0, z)[0],
    ],
)
def test_other_losses(loss):
    assert not is_log_partition_loss(loss, jnp.ones((4, 3)))


def test_one_class_has_no_curvature_to_be_seen():
    assert not is_log_partition_loss(
        lambda z: jnp.sum(jax.nn.logsumexp(z, axis=-1)), np.ones((4, 1))
    )
