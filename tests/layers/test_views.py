"""Views of parameters and axis groups, against arrays of indices."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondorder.layers.views import Digit, View, identity_view, origin_groups, regroup

few = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def factorizations(draw, size: int) -> tuple[int, ...]:
    """A shape with the given number of elements."""
    shape = []
    while size > 1:
        part = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        shape.append(part)
        size //= part
        if part == 1 and len(shape) > 4:
            shape.append(size)
            break
    return tuple(shape)


@st.composite
def chains(draw):
    """A shape and a few rearrangements of it: a new shape, or a permutation of axes."""
    size = draw(st.sampled_from([1, 6, 8, 12, 24]))
    shape = draw(factorizations(size))
    steps, current = [], shape
    for _ in range(draw(st.integers(0, 5))):
        if draw(st.booleans()):
            current = draw(factorizations(size))
            steps.append(("reshape", current))
        else:
            perm = tuple(draw(st.permutations(range(len(current)))))
            current = tuple(current[axis] for axis in perm)
            steps.append(("transpose", perm))
    return shape, steps


@few
@given(chains())
def test_view_applies_its_steps_and_inverts_them(chain):
    shape, steps = chain
    array = np.arange(math.prod(shape)).reshape(shape)
    expected, view = array, identity_view(shape)
    for name, argument in steps:
        expected = getattr(np, name)(expected, argument)
        view = getattr(view, name)(argument)
    applied = view.apply(array)
    assert view.shape == expected.shape
    np.testing.assert_array_equal(applied, expected)
    np.testing.assert_array_equal(view.invert(applied), array)


def test_steps_are_joined():
    view = identity_view((4, 6))
    assert view.reshape((4, 6)) == view.transpose((0, 1)) == view
    assert view.reshape((2, 12)).reshape((24,)) == view.reshape((24,))
    assert view.reshape((24,)).reshape((4, 6)) == view
    assert view.transpose((1, 0)).transpose((1, 0)) == view
    assert view.reshape((1, 4, 6)).transpose((1, 0, 2)) == view.reshape((4, 1, 6))
    assert view.transpose((1, 0)) != view.reshape((6, 4))
    assert isinstance(hash(view), int)


def test_view_keeps_dtype():
    view = identity_view((2, 3)).transpose((1, 0)).reshape((6,))
    assert view.apply(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert View(((3,),)).invert(jnp.ones(3, jnp.int8)).dtype == jnp.int8


@few
@given(st.data())
def test_regroup_follows_indices(data):
    """Reading the parts of every new axis off the origin's indices gives the same elements."""
    size = data.draw(st.sampled_from([6, 8, 12, 24]))
    shape = data.draw(factorizations(size))
    perm = data.draw(st.permutations(range(len(shape))))
    target = data.draw(factorizations(size))
    origin = np.indices(shape).transpose(0, *(axis + 1 for axis in perm))  # index by origin's axis
    groups = tuple(origin_groups(shape)[axis] for axis in perm)
    regrouped = regroup(groups, target)
    moved = origin.reshape(len(shape), *target)
    if regrouped is None:
        assert _splits_unevenly([shape[axis] for axis in perm], target)
        return
    assert len(regrouped) == len(target)
    for place, group in enumerate(regrouped):
        expected = np.zeros(target, int)
        for digit in group:
            part = moved[digit.axis] // digit.stride % digit.size
            expected = expected * digit.size + part
        np.testing.assert_array_equal(expected, np.indices(target)[place])


def _splits_unevenly(before, after) -> bool:
    """Whether the boundaries between axes of two shapes do not divide one another."""
    bounds = sorted({math.prod(s[:i]) for s in (before, after) for i in range(len(s) + 1)})
    return any(big % small for small, big in itertools.pairwise(bounds))


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        ((2, 3), (6,), ((Digit(0, 1, 2), Digit(1, 1, 3)),)),
        ((6,), (2, 3), ((Digit(0, 3, 2),), (Digit(0, 1, 3),))),
        ((4, 1), (1, 4), ((), (Digit(0, 1, 4),))),
        ((2, 3), (3, 2), None),
        ((4, 6), (6, 4), None),
        ((4,), (2,), None),
    ],
)
def test_regroup(shape, target, expected):
    assert regroup(origin_groups(shape), target) == expected


def test_regroup_joins_what_was_split():
    groups = origin_groups((2, 12))
    for shape in ((2, 2, 6), (2, 2, 3, 2), (4, 6), (2, 12)):
        groups = regroup(groups, shape)
    assert groups == origin_groups((2, 12))
