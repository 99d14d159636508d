"""Dense Gauss-Newton blocks of small models, and what Kronecker factors say of them.

`blocks` makes the dense block of each weight from Jacobians; `products` what the factors say.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import secondorder as so
from secondorder.methods.kfac_statistics import LayerPass, Settings


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape), dtype=float)


def squared(y):
    return lambda z: jnp.sum((z - y) ** 2) / len(y)


def cross_entropy(labels):
    return lambda z: -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(z), axis=-1))


def settings_of(**settings):
    given = {"curvature": "exact", "weight_sharing": "expand", "diagonals": (), **settings}
    return Settings(
        damping=0.1,
        inverse="cholesky",
        update_every=1,
        inverse_every=1,
        moment_decay=0.5,
        damping_split="trace",
        **given,
    )


def sample_of(objective, params, seed=0, **settings):
    """What a batch says of the layers, and these."""
    layers = so.find_layers(objective, params)
    layer_pass = LayerPass("kfac", settings_of(**settings), layers, objective, params)
    return layer_pass.sample(layer_pass.look(), jax.random.key(seed)), layers


def factors_of(objective, params, seed=0, **settings):
    """The state's factors after one batch, for each layer ``(A, G)``; and the layers."""
    layers = so.find_layers(objective, params)
    given = {"curvature": "exact", "fallback": optax.identity(), **settings}
    tx = so.scale_by_kfac(layers, **given)
    return updated(tx, objective, params)[1].factors, layers


def updated(tx, objective, params):
    """The update and the state after one step."""

    @jax.jit
    def update(params, state):
        return tx.update(jax.grad(objective)(params), state, params, value_fn=objective)

    return update(params, tx.init(params))


def products(factors):
    """For each group of one layer the matrix ``A (x) G``."""
    return [np.kron(a[0], g[0]) for a, g in zip(factors.inputs, factors.outputs, strict=True)]


def blocks(objective, params, layers):
    """For each layer the dense block of the Gauss-Newton matrix of its matrix, row by row."""
    jacobian = jax.jit(jax.jacobian(objective.model))(params)
    outputs = objective.model(params)
    size = outputs.size
    hessian = np.reshape(jax.hessian(objective.loss)(outputs), (size, size))
    rows = [leaf.reshape(size, *leaf.shape[outputs.ndim :]) for leaf in jax.tree.leaves(jacobian)]
    result = []
    for layer in layers.layers:
        to_matrix = jax.vmap(lambda *leaves, layer=layer: layer.to_matrix(leaves))
        matrix = np.reshape(to_matrix(*rows), (size, -1))
        result.append(matrix.T @ hessian @ matrix)
    return result


def assert_blocks(objective, params, rtol=1e-9, **settings):
    factors, layers = factors_of(objective, params, **settings)
    for found, expected in zip(products(factors), blocks(objective, params, layers), strict=True):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def mlp(activation, sizes=(3, 4, 2)):
    pairs = list(itertools.pairwise(sizes))
    params = [
        {"w": normal(*pair, seed=i), "b": normal(pair[1], seed=i)} for i, pair in enumerate(pairs)
    ]

    def model(params, x):
        for layer in params[:-1]:
            x = activation(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    return model, params
