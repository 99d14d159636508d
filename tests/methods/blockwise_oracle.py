"""Shampoo and SOAP on single tensors in float64, from the papers, with Kronecker products."""

import numpy as np


def unfold(tensor, axis):
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def moment(tensor, axis):
    return unfold(tensor, axis) @ unfold(tensor, axis).T


def inverse_root(matrix, order, eps):
    damped = matrix + eps * np.trace(matrix) * np.eye(len(matrix))
    values, vectors = np.linalg.eigh(damped)
    return (vectors * values ** (-1 / order)) @ vectors.T


def kronecker(matrices):
    product = np.ones((1, 1))
    for matrix in matrices:
        product = np.kron(product, matrix)
    return product


def shampoo(gradients, *, axes=None, decay=None, b1=0.0, eps=1e-6, order=None, every=1, start=0):
    """Directions without grafting; before the start the averaged gradient."""
    shape = gradients[0].shape
    axes = range(len(shape)) if axes is None else axes
    order = order or 2 * len(axes)
    moments, roots = {}, {axis: np.eye(shape[axis]) for axis in axes}
    average, directions = np.zeros(shape), []
    for t, gradient in enumerate(gradients):
        for axis in axes:
            new = moment(gradient, axis)
            if decay is None:
                moments[axis] = moments.get(axis, 0) + new
            else:  # corrected for its start from zero
                moments[axis] = decay * moments.get(axis, 0) + (1 - decay) * new
        if t >= start and (t - start) % every == 0:
            scale = 1 if decay is None else 1 - decay ** (t + 1)
            roots = {axis: inverse_root(moments[axis] / scale, order, eps) for axis in axes}
        average = b1 * average + (1 - b1) * gradient
        corrected = average / (1 - b1 ** (t + 1))
        if t < start:
            directions.append(corrected)
            continue
        factors = [roots.get(axis, np.eye(length)) for axis, length in enumerate(shape)]
        directions.append((kronecker(factors) @ corrected.ravel()).reshape(shape))
    return directions


def soap(gradients, *, axes=None, b1=0.95, b2=0.95, eps=1e-8, every=10):
    """Directions, the last squares and the last bases."""
    shape = gradients[0].shape
    axes = range(len(shape)) if axes is None else axes
    moments = {axis: (1 - b2) * moment(gradients[0], axis) for axis in axes}
    bases = [np.eye(length) for length in shape]
    for axis in axes:
        bases[axis] = np.linalg.eigh(moments[axis])[1][:, ::-1]
    average, squares, directions = np.zeros(shape), np.zeros(shape), [np.zeros(shape)]
    for t, gradient in enumerate(gradients[1:], start=1):
        rotation = kronecker(bases).T
        along = (rotation @ gradient.ravel()).reshape(shape)
        average = b1 * average + (1 - b1) * gradient
        squares = b2 * squares + (1 - b2) * along**2
        numerator = (rotation @ average.ravel()).reshape(shape) / (1 - b1**t)
        scaled = numerator / (np.sqrt(squares / (1 - b2**t)) + eps)
        directions.append((rotation.T @ scaled.ravel()).reshape(shape))
        for axis in axes:
            moments[axis] = b2 * moments[axis] + (1 - b2) * moment(gradient, axis)
            if t % every == 0:
                image = moments[axis] @ bases[axis]
                order = np.argsort(-np.sum(bases[axis] * image, axis=0), kind="stable")
                squares = np.take(squares, order, axis)
                bases[axis] = np.linalg.qr(image[:, order])[0]
    return directions, squares, bases
