"""Boxes and grids of blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.box import Blocks, Box, inverse_axes, transpose_axes

SHAPE = (5, 7, 9)


@st.composite
def boxes(draw):
    """Boxes of one voxel or more in a volume of `SHAPE`."""
    start = tuple(draw(st.integers(0, n - 1)) for n in SHAPE)
    return Box(start, tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, SHAPE, strict=True)))


def marked(box):
    """A volume that is True in the box."""
    out = np.zeros(SHAPE, bool)
    out[box.slices] = True
    return out


def test_blocks_and_boxes_are_consistent():
    grid = Blocks(SHAPE, (2, 3, 4))
    count = np.zeros(grid.shape, int)
    for i, box in enumerate(grid):
        count[box.slices] += 1
        assert grid.index(grid.coords(i)) == i
        assert i in grid.overlapping(box)
        assert all(i in grid.neighbors(j) for j in grid.neighbors(i))
        behind = [grid.next_along(i, axis) for axis in range(3)]
        assert {j for j in behind if j is not None} == {j for j in grid.neighbors(i) if j > i}
    assert np.all(count == 1)
    assert Box.parse(str(grid[3])) == grid[3]
    with pytest.raises(IndexError):
        grid[len(grid)]


@given(a=boxes(), b=boxes(), halo=st.integers(0, 3), axes=st.permutations(range(3)))
def test_what_boxes_do_is_what_arrays_do(a, b, halo, axes):
    np.testing.assert_array_equal(marked(a.intersect(b)), marked(a) & marked(b))
    assert a.voxels == marked(a).sum()
    outer = a.grow(halo).clip(SHAPE)
    inner = marked(outer)[outer.slices]
    inner[a.slices_within(outer)] = False
    assert inner.sum() == outer.voxels - a.voxels
    assert marked(a).transpose(axes)[a.transpose(tuple(axes)).slices].all()
    assert transpose_axes(transpose_axes(a.start, tuple(axes)), inverse_axes(tuple(axes))) == a.start


@given(box=boxes(), block=st.tuples(*[st.integers(1, 6)] * 3))
def test_blocks_that_overlap_a_box_are_those_that_share_a_voxel_with_it(box, block):
    grid = Blocks(SHAPE, block)
    assert grid.overlapping(box) == [i for i, other in enumerate(grid) if (marked(other) & marked(box)).any()]
    assert grid.overlapping(Box((0, 0, 0), (0, 1, 1))) == []


@pytest.mark.parametrize("text", ["", "0:1,0:1", "0:1,0:1,a:b", "1:1,0:1,0:1", "-1:1,0:1,0:1"])
def test_what_is_no_box_is_refused(text):
    with pytest.raises(ValueError, match="box"):
        Box.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-5:64,0:9,0:9", "begins before the first voxel"),
        ("5:5,0:9,0:9", "is empty"),
        ("0:9,0:9", "is not of the form"),
    ],
)
def test_a_box_that_is_none_says_why(text, said):
    with pytest.raises(ValueError, match=said):
        Box.parse(text)
