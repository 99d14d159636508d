"""Chains of dense layers, and their positive-curvature Hessians written out in NumPy.

Nothing of the package is used here but `Objective`: units are differentiated one by one, and the
recursion of the approximate expectation is transcribed from the paper.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import secondorder as so

WIDTHS = (4, 5, 3, 3)
FUNCTIONS = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu}
TRANSFORMS = {
    "abs": np.abs,
    "clip": lambda c: np.maximum(c, 0),
    "zero": np.zeros_like,
    "none": lambda c: c,
}


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(0.8 * rng.normal(size=shape), dtype=float)


def params_of(widths=WIDTHS):
    return [
        {"b": normal(b, seed=i), "w": normal(a, b, seed=i)}
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    ]


def run(function, params, x):
    """The arguments ``s`` of all functions, and the outputs."""
    sums = []
    for layer in params[:-1]:
        sums.append(x @ layer["w"] + layer["b"])
        x = function(sums[-1])
    return sums, x @ params[-1]["w"] + params[-1]["b"]


def loss_of(kind, batch):
    targets = jnp.asarray(np.random.default_rng(5).integers(0, WIDTHS[-1], batch))
    onehot = jax.nn.one_hot(targets, WIDTHS[-1])
    if kind == "squared":
        return lambda z: jnp.mean(jnp.sum((z - onehot) ** 2, axis=-1))
    return lambda z: -jnp.mean(jnp.sum(onehot * jax.nn.log_softmax(z), axis=-1))


def objective_of(name, batch=6, loss="softmax"):
    x = normal(batch, WIDTHS[0], seed=8)
    function = FUNCTIONS[name]
    return so.Objective(lambda p: run(function, p, x)[1], loss_of(loss, batch)), x


def units(name, objective, params, x):
    """For every function between layers its slope, and its bend, case by case."""
    function, batch = FUNCTIONS[name], len(x)
    first = jax.vmap(jax.vmap(jax.grad(function)))
    second = jax.vmap(jax.vmap(jax.grad(jax.grad(function))))
    result = []
    for index, s in enumerate(run(function, params, x)[0]):

        def value(a, k=index):
            return objective.loss(run(function, params[k + 1 :], a)[1])

        outward = jax.grad(value)(function(s)).reshape(batch, -1)
        result.append((np.asarray(first(s)), np.asarray(second(s) * outward)))
    return result


def leaf_blocks(matrix, params):
    """The diagonal blocks of a matrix, one for each leaf, and zeros between."""
    kept, start = np.zeros_like(matrix), 0
    for leaf in jax.tree.leaves(params):
        end = start + leaf.size
        kept[start:end, start:end] = matrix[start:end, start:end]
        start = end
    return kept


def exact(name, objective, params, x, transform):
    """The positive-curvature Hessian, dense, its blocks between layers included."""
    flat, unravel = ravel_pytree(params)
    function = FUNCTIONS[name]
    jacobian = jax.jacobian(lambda v: run(function, unravel(v), x)[1].ravel())(flat)
    outputs = objective.model(params)
    hessian = jax.hessian(lambda z: objective.loss(z.reshape(outputs.shape)))(outputs.ravel())
    total = np.array(jacobian.T @ hessian @ jacobian)
    for index, (_, bend) in enumerate(units(name, objective, params, x)):
        inner = jax.jacobian(lambda v, k=index: run(function, unravel(v), x)[0][k].ravel())(flat)
        total += inner.T @ (TRANSFORMS[transform](bend).ravel()[:, None] * inner)
    return total


def approximate(name, objective, params, x, transform, input_moment, slope_moment):
    """For each layer the moment of its inputs and the curvature in its outputs, by recursion."""
    function, batch = FUNCTIONS[name], len(x)
    sums, outputs = run(function, params, x)
    hessian = jax.hessian(objective.loss)(outputs)
    curvature = sum(np.asarray(hessian[n, :, n]) for n in range(batch))
    inputs = [np.asarray(a) for a in [x, *(function(s) for s in sums)]]
    found = [curvature]
    for layer, (slope, bend) in reversed(
        list(zip(params[1:], units(name, objective, params, x), strict=True))
    ):
        weight = np.asarray(layer["w"])
        inward = weight @ curvature @ weight.T
        mean = slope.mean(axis=0)
        moment = np.outer(mean, mean) if slope_moment == "mean" else slope.T @ slope / batch
        curvature = inward * moment + np.diag(TRANSFORMS[transform](bend.sum(axis=0)))
        found.append(curvature)
    moments = [a.mean(axis=0) if input_moment == "mean" else a.T @ a / batch for a in inputs]
    return list(zip(moments, reversed(found), strict=True))


def approximate_matrix(layers):
    """The blocks of all biases and weights as one matrix, in the order of the parameters."""
    blocks = []
    for inputs, outputs in layers:
        moment = np.outer(inputs, inputs) if inputs.ndim == 1 else inputs
        blocks += [outputs, np.kron(moment, outputs)]
    total = np.zeros((sum(map(len, blocks)),) * 2)
    start = 0
    for block in blocks:
        end = start + len(block)
        total[start:end, start:end] = block
        start = end
    return total
