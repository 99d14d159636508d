"""Layers of equal shape side by side."""

import jax.numpy as jnp
import numpy as np

import secondorder as so
from secondorder.layers.groups import Group, arrange_layers, concatenate


def some_layers() -> so.Layers:
    """Five layers: two of one shape, a stack of three blocks of that shape, and two others."""
    x, words = jnp.ones((4, 3)), jnp.zeros((4, 2), int)

    def objective(p):
        h = jnp.tanh(x @ p["a"]["w"] + p["a"]["b"])  # (4 -> 3 with the homogeneous row)
        h = jnp.tanh(h @ p["c"])
        h = jnp.tanh(h @ p["d"]["w"] + p["d"]["b"])
        h = h + jnp.einsum("bi,sio->bso", h, p["e"]).sum(1)
        stack = jnp.einsum("sbi,sio->sbo", jnp.stack([h, 2 * h, h]), p["s"]["w"])
        stack = jnp.tanh(stack + p["s"]["b"][:, None])
        return jnp.mean(stack) + jnp.mean(jnp.tanh(p["t"][words]))

    layer = {"w": jnp.ones((3, 3)), "b": jnp.ones(3)}
    stack = {"w": jnp.ones((3, 3, 3)), "b": jnp.ones((3, 3))}
    return so.find_layers(
        objective,
        {
            "a": layer,
            "c": jnp.ones((3, 3)),
            "d": layer,
            "e": jnp.ones((2, 3, 3)),
            "s": stack,
            "t": jnp.ones((4, 3)),
        },
    )


def test_groups_by_shape_in_order_of_use():
    layout = arrange_layers(some_layers().layers)
    assert layout.groups == (
        Group((0, 2, 4), (1, 1, 3), 4, 3, False),
        Group((1,), (1,), 3, 3, False),
        Group((3,), (1,), 3, 6, False),
        Group((5,), (1,), 4, 3, True),  # an embedding of the first group's shape
    )
    assert [group.stack for group in layout.groups] == [5, 1, 1, 1]
    assert layout.blocks == 8


def test_join_and_split_are_inverse():
    layers = some_layers().layers
    layout = arrange_layers(layers)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(layer.stack, layer.inputs, 2))) for layer in layers]
    stacks = layout.join(arrays)
    assert [s.shape[:2] for s in stacks] == [(g.stack, g.inputs) for g in layout.groups]
    np.testing.assert_array_equal(stacks[0][0], arrays[0][0])
    np.testing.assert_array_equal(stacks[0][1], arrays[2][0])
    np.testing.assert_array_equal(stacks[0][2:], arrays[4])
    for array, back in zip(arrays, layout.split(stacks), strict=True):
        np.testing.assert_array_equal(array, back)


def test_cut_divides_by_group():
    layout = arrange_layers(some_layers().layers)
    rows = jnp.arange(layout.blocks * 2).reshape(layout.blocks, 2)
    parts = layout.cut(rows)
    assert [len(part) for part in parts] == [5, 1, 1, 1]
    np.testing.assert_array_equal(concatenate(parts), rows)


def test_no_layers():
    layout = arrange_layers(())
    assert (layout.groups, layout.blocks) == ((), 0)
    assert layout.join([]) == layout.split([]) == []
