"""Work on stacks is shared by the devices of a mesh, as the compiled program shows."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import secondorder as so
from benchmarks.programs import batched_sizes, read_work
from secondorder.spread import ALONE, devices_of, map_by_shape
from tests.meshes import make_mesh, place, use_mesh

P = PartitionSpec
KINDS = [AxisType.Auto, AxisType.Explicit]
pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="XLA_FLAGS asks for fewer than eight host devices"
)


def stack_of(k, n=3):
    roots = np.random.default_rng(k).normal(size=(k, n, n)).astype(np.float32)
    return roots @ roots.transpose(0, 2, 1) + np.eye(n, dtype=np.float32)


def on_mesh(kind, function, *arrays):
    """Compiles a function of the devices and of arrays, which are on all devices at first."""
    mesh = make_mesh(4, 2, kind=kind)
    with use_mesh(mesh):
        arrays = [place(mesh, array) for array in arrays]
        return jax.jit(lambda *a: function(devices_of(a), *a)).lower(*arrays).compile(), arrays


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 3, 8, 13, 16])
def test_each_device_takes_its_share(kind, k):
    """Factorizations, of which the compiler would gather the operands."""
    stack = stack_of(k)
    program, arrays = on_mesh(kind, lambda d, s: d.spread(jnp.linalg.cholesky, s), stack)
    np.testing.assert_allclose(program(*arrays), np.linalg.cholesky(stack), rtol=1e-4, atol=1e-5)
    (size,) = {
        shape[0] if len(shape) > 2 else 1 for shape in batched_sizes(program.as_text(), "potrf")
    }
    assert size <= -(-k // 8) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_product(kind):
    left, right = stack_of(1, 13)[0], stack_of(2, 13)[1]

    def multiply(devices, a, b):
        return devices.spread(jnp.matmul, a, b, in_axes=(0, None))

    program, arrays = on_mesh(kind, multiply, left, right)
    np.testing.assert_allclose(program(*arrays), left @ right, rtol=1e-5)
    assert read_work(program.as_text()).flops == 2 * 2 * 13 * 13  # two of 13 rows


def test_stacks_are_pytrees_and_may_be_cut_anywhere():
    tree = {"a": np.ones((5, 9), np.float32), "b": np.arange(9.0, dtype=np.float32)}

    def double(devices, tree):
        return devices.spread(
            lambda t, u: {"sum": t["a"] + u["b"]},
            {"a": tree["a"]}, {"b": tree["b"]}, in_axes=(1, 0), out_axes=1,
        )  # fmt: skip

    program, arrays = on_mesh(AxisType.Explicit, double, tree)
    np.testing.assert_allclose(program(*arrays)["sum"], tree["a"] + tree["b"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "kept"), [(8, ("data", "model")), (12, ("data",)), (6, ("model",))])
def test_stacks_are_kept_where_devices_divide_them(kind, k, kept):
    program, arrays = on_mesh(kind, lambda d, s: d.keep(s), stack_of(k))
    found = program(*arrays).sharding
    wanted = jax.sharding.NamedSharding(found.mesh, P(kept))
    assert found.is_equivalent_to(wanted, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_shapes_are_one_batch(kind):
    matrices = [*stack_of(9), *stack_of(2, 4)]

    def invert(devices, *matrices):
        return map_by_shape(jnp.linalg.cholesky, [(m,) for m in matrices], devices)

    program, arrays = on_mesh(kind, invert, *matrices)
    for found, matrix in zip(program(*arrays), matrices, strict=True):
        np.testing.assert_allclose(found, np.linalg.cholesky(matrix), rtol=1e-4, atol=1e-5)
    assert len(re.findall('custom_call_target="lapack_spotrf', program.as_text())) == 2


def test_axes_are_chosen():
    mesh = make_mesh(4, 2, kind=AxisType.Auto)
    params = place(mesh, np.ones(8, np.float32), "data")
    assert devices_of(params).count == 8
    assert devices_of(params, ("model",)).count == 2
    assert devices_of(params, ()).count == 1
    assert devices_of(np.ones(3)) == ALONE
    with pytest.raises(ValueError, match=r"spread_over names \['pipeline'\].*'data', 'model'"):
        devices_of(params, ("pipeline",))


def test_under_vmap():
    mesh = make_mesh(8, names=("data",), kind=AxisType.Auto)
    stacks = place(mesh, np.stack([stack_of(8), stack_of(8)]))
    found = jax.jit(jax.vmap(lambda s: devices_of(stacks).spread(jnp.linalg.cholesky, s)))(stacks)
    np.testing.assert_allclose(found, np.linalg.cholesky(stacks), rtol=1e-4, atol=1e-5)


def test_stacks_of_unequal_length():
    with pytest.raises(ValueError, match=r"one length, got \[2, 3\]"):
        ALONE.spread(jnp.add, jnp.ones(2), jnp.ones(3))


# The factor work of whole methods.


def mlp(depth, width):
    def model(p, x):
        for w in p:
            x = jnp.tanh(x @ w)
        return x

    params = [np.eye(width, dtype=np.float32)] * depth
    batch = np.ones((8, width), np.float32)

    def objective(p, x=batch):
        return so.Objective(lambda p: model(p, x), lambda z: jnp.mean(jnp.sum(z**2, axis=-1)))(p)

    return model, params, batch, so.find_layers(objective, params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [8, 11])
@pytest.mark.parametrize("method", ["kbfgs", "pch"])
def test_no_device_does_the_work_of_others(method, depth, kind):
    """Of ``depth`` equal layers each takes its share of inverses, updates and products."""
    width = 5
    model, params, batch, layers = mlp(depth, width)
    factories = {
        "kbfgs": lambda: so.kbfgs(0.1, layers),
        "pch": lambda: so.positive_curvature_hessian(0.1, layers, input_moment="full"),
    }
    tx = factories[method]()

    def step(params, state, x):
        objective = so.Objective(lambda p: model(p, x), lambda z: jnp.mean(jnp.sum(z**2, axis=-1)))
        value, grads = jax.value_and_grad(objective)(params)
        return tx.update(grads, state, params, value=value, grad=grads, value_fn=objective)

    mesh = make_mesh(4, 2, kind=kind)
    with use_mesh(mesh):
        params = [place(mesh, w) for w in params]
        batch = place(mesh, batch, "data")
        shardings = so.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        jitted = jax.jit(step, out_shardings=(None, shardings))
        text = jitted.lower(params, state, batch).compile().as_text()
    allowed = -(-depth // 8) + 1
    kinds = ("potrf",) if method == "kbfgs" else ("syevd",)
    shapes = [shape for name in kinds for shape in batched_sizes(text, name)]
    assert shapes
    # What is square and of the width of a layer, and neither a gradient nor a weight itself.
    for shape in shapes + [s for s in batched_sizes(text, "dot") if s[-2:] == (width, width)]:
        assert len(shape) < 3 or shape[0] <= allowed, shape
