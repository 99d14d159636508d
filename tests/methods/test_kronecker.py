"""Products with both factors of a stack, shared by blocks and by rows, equal dense ones."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from benchmarks.programs import read_work
from secondorder.methods.kronecker import spread_product, spread_solution
from secondorder.spread import ALONE, devices_of
from tests.meshes import make_mesh, place, use_mesh

INPUTS, OUTPUTS = 13, 3


def normal(*shape):
    return np.random.default_rng([3, *shape]).normal(size=shape)


def orthogonal(stack, n):
    return np.linalg.qr(normal(stack, n, n))[0]


def operands_of(stack, diagonal):
    left = 1 + normal(stack, INPUTS) ** 2 if diagonal else orthogonal(stack, INPUTS)
    return left, normal(stack, INPUTS, OUTPUTS), orthogonal(stack, OUTPUTS)


def product(left, matrices, right):
    pairs = zip(left, matrices, right, strict=True)
    return [(np.diag(a) if a.ndim == 1 else a) @ v @ r for a, v, r in pairs]


def solution(left, matrices, right, spectrum):
    result = []
    for basis, v, r, s in zip(left, matrices, right, spectrum, strict=True):
        u = np.eye(INPUTS) if basis.ndim == 1 else basis
        result.append(u @ ((u.T @ v @ r) / s) @ r.T)
    return result


@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("stack", [1, 7])
def test_every_way_to_share(x64, stack, diagonal, kind):
    if kind is not None and jax.device_count() < 8:
        pytest.skip("XLA_FLAGS asks for fewer than eight host devices")
    operands = operands_of(stack, diagonal)
    spectrum = 1 + normal(stack, INPUTS, OUTPUTS) ** 2

    def both(operands, spectrum):
        devices = ALONE if kind is None else devices_of(operands)
        return spread_product(devices, *operands), spread_solution(devices, *operands, spectrum)

    if kind is None:
        found = jax.jit(both)(operands, spectrum)
    else:
        mesh = make_mesh(8, names=("data",), kind=kind)
        with use_mesh(mesh):
            found = jax.jit(both)(*jax.tree.map(lambda a: place(mesh, a), (operands, spectrum)))
    np.testing.assert_allclose(found[0], product(*operands), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found[1], solution(*operands, spectrum), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(jax.device_count() < 8, reason="fewer than eight host devices")
@pytest.mark.parametrize(("stack", "rows", "layers"), [(1, 2, 1), (7, 13, 1)])
def test_a_device_multiplies_its_share(stack, rows, layers):
    """Of one layer two rows of thirteen; of seven layers one."""
    left, matrices, right = (a.astype(np.float32) for a in operands_of(stack, False))
    mesh = make_mesh(8, names=("data",), kind=AxisType.Auto)
    given = [place(mesh, a) for a in (left, matrices, right, np.ones_like(matrices))]
    product_flops = 2 * layers * rows * (INPUTS * OUTPUTS + OUTPUTS**2)

    def work(function, *operands):
        run = jax.jit(lambda *a: function(devices_of(a), *a))
        return read_work(run.lower(*operands).compile().as_text()).flops

    assert work(spread_product, *given[:3]) == product_flops
    assert work(spread_solution, *given) == 2 * product_flops
