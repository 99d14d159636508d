"""Tensors as stacks of blocks: what is cut is joined again, and equal blocks stand together."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.tree.tensor_blocks import arrange_blocks, merge_shape, split_length

SHAPES = [(), (1,), (7,), (5, 3), (1, 6, 1), (2, 3, 5), (3, 2, 4, 5), (0, 3), (4, 4)]


def all_axes(shape):
    return tuple(range(len(shape)))


def numbered(shapes):
    return [jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) for shape in shapes]


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("merge", [True, False])
def test_join_is_the_inverse_of_cut(block_size, merge):
    layout = arrange_blocks(SHAPES, block_size, all_axes, merge=merge)
    tensors = numbered(SHAPES)
    stacks = layout.cut(tensors)
    for group, stack in zip(layout.groups, stacks, strict=True):
        assert stack.shape == (group.stack, *group.shape)
        assert max(group.shape) <= block_size
    assert sum(stack.size for stack in stacks) == sum(tensor.size for tensor in tensors)
    for shape, tensor, joined in zip(SHAPES, tensors, layout.join(stacks), strict=True):
        if 0 in shape:
            assert joined is None
        else:
            np.testing.assert_array_equal(joined, tensor)


def test_blocks_are_parts_of_the_merged_tensor():
    """Every block is a rectangle of neighbors."""
    layout = arrange_blocks([(2, 3, 5)], 6, all_axes)
    assert layout.merged == ((6, 5),)
    layout = arrange_blocks([(5, 4)], 3, all_axes)
    (tensor,) = numbered([(5, 4)])
    expected = {(3, 2): [tensor[:3, :2], tensor[:3, 2:]], (2, 2): [tensor[3:, :2], tensor[3:, 2:]]}
    for group, stack in zip(layout.groups, layout.cut([tensor]), strict=True):
        np.testing.assert_array_equal(stack, jnp.stack(expected[group.shape]))


def test_what_fits_is_one_block():
    layout = arrange_blocks([(5, 4), (3,)], 5, all_axes)
    assert [(group.shape, group.stack) for group in layout.groups] == [((5, 4), 1), ((3,), 1)]


def test_equal_blocks_of_different_tensors_stand_together():
    layout = arrange_blocks([(4, 2), (2, 2), (4, 2), (2,)], 2, all_axes)
    assert [(group.shape, group.stack) for group in layout.groups] == [((2, 2), 5), ((2,), 1)]


def test_blocks_that_are_treated_differently_do_not():
    """As are those of a tensor whose first axis, and of one whose second axis is the shorter."""
    layout = arrange_blocks([(4, 2), (2, 4)], 2, lambda shape: (shape.index(min(shape)),))
    assert [(group.shape, group.axes) for group in layout.groups] == [
        ((2, 2), (1,)),
        ((2, 2), (0,)),
    ]


@pytest.mark.parametrize(
    ("shape", "limit", "merged"),
    [
        ((), 9, (1,)),
        ((1, 1), 9, (1,)),
        ((2, 3), 9, (2, 3)),
        ((3, 3, 16, 32), 1024, (144, 32)),
        ((3, 3, 16, 32), 64, (9, 16, 32)),
        ((2, 2, 2, 2), 9, (8, 2)),
        ((2, 2, 2, 2), 0, (2, 2, 2, 2)),
    ],
)
def test_merged_shapes(shape, limit, merged):
    assert merge_shape(shape, limit) == merged


def test_lengths_are_nearly_equal_and_few():
    for length, limit in itertools.product(range(1, 30), range(1, 12)):
        sizes = [size for count, size in split_length(length, limit) for _ in range(count)]
        assert sum(sizes) == length
        assert len(sizes) == -(-length // limit)
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= limit
