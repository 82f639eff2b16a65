"""Coarser levels: right on their own, and the same however the volume is cut."""

from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from volseg.box import Blocks
from volseg.io.pyramid import downsample, levels, parent_box, sizes

shapes = st.tuples(*[st.integers(1, 9)] * 3)
factors = st.sampled_from(list(product((1, 2), repeat=3)))
small_labels = shapes.flatmap(lambda shape: arrays(np.uint32, shape, elements=st.integers(0, 4)))


def slow_downsample(labels, factor):
    out = np.zeros(tuple(-(-n // f) for n, f in zip(labels.shape, factor, strict=True)), labels.dtype)
    for at in np.ndindex(out.shape):
        cell = labels[tuple(slice(i * f, i * f + f) for i, f in zip(at, factor, strict=True))]
        counts = Counter(cell.ravel().tolist())
        out[at] = min(counts, key=lambda label: (-counts[label], label == 0, label))
    return out


def test_a_hand_worked_pair_of_cells():
    labels = np.array([[[9, 9, 0, 0], [9, 2, 0, 6]], [[2, 2, 6, 8], [5, 9, 8, 8]]], np.uint32)
    assert downsample(labels, (2, 2, 2)).tolist() == [[[9, 8]]]  # four 9, three 2; three 0 and three 8 tie


@given(small_labels, factors)
@settings(max_examples=60, deadline=None)
def test_each_cell_becomes_its_most_frequent_label(labels, factor):
    np.testing.assert_array_equal(downsample(labels, factor), slow_downsample(labels, factor))


@given(small_labels, factors, shapes)
@settings(max_examples=60, deadline=None)
def test_blocks_do_not_change_a_voxel(labels, factor, block):
    whole = downsample(labels, factor)
    pieces = np.full_like(whole, 99)
    for box in Blocks(whole.shape, block):
        pieces[box.slices] = downsample(labels[parent_box(box, factor, labels.shape).slices], factor)
    np.testing.assert_array_equal(pieces, whole)


@pytest.mark.parametrize("width", [31, 32, 33, 63, 64, 65, 66, 129, 131])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int64, np.uint64])
def test_long_rows_without_labels_keep_those_that_there_are(width, dtype):
    """Cells that hold none are passed over many at a time."""
    for at in {0, width // 2, width - 2, width - 1}:
        labels = np.zeros((2, 3, width), dtype)
        labels[:, :, at] = 7
        for factor in ((1, 1, 1), (1, 1, 2), (2, 2, 1), (2, 2, 2)):
            np.testing.assert_array_equal(downsample(labels, factor), slow_downsample(labels, factor))


def test_labels_beyond_32_bits_survive():
    big = 2**63 + 1
    labels = np.full((2, 2, 2), big, np.uint64)
    labels[0, 0, 0] = big - 1
    out = downsample(labels, (2, 2, 2))
    assert out.dtype == np.uint64
    assert out.tolist() == [[[big]]]


def test_a_view_with_odd_strides_is_fine():
    labels = np.arange(4 * 4 * 4, dtype=np.uint32).reshape(4, 4, 4)[:, ::-1].T
    np.testing.assert_array_equal(downsample(labels, (2, 2, 2)), slow_downsample(labels, (2, 2, 2)))


def test_voxels_tend_to_cubes():
    found = levels((400, 4000, 4000), (50, 4.6, 4.6), 6)
    assert [factor for _, factor in found] == [(1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]
    assert found[-1][0] == (100, 125, 125)
    assert sizes(found, (50, 4.6, 4.6))[-1] == pytest.approx((200, 147.2, 147.2))


def test_isotropic_voxels_are_halved_along_every_axis():
    assert levels((165, 768, 1024), None, 3)[1:] == [((83, 384, 512), (2, 2, 2)), ((42, 192, 256), (2, 2, 2))]


def test_levels_end_when_they_are_small():
    assert levels((30, 60, 64), None, 9) == [((30, 60, 64), (1, 1, 1))]
    assert levels((1, 50, 300), (5, 5, 5), 9)[-1][0] == (1, 7, 38)


@given(st.tuples(*[st.integers(1, 5000)] * 3), st.tuples(*[st.floats(0.1, 900)] * 3), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_each_level_shrinks(shape, size, count):
    found = levels(shape, size, count)
    assert 1 <= len(found) <= count
    for (above, _), (below, factor) in pairwise(found):
        assert below == tuple(-(-n // f) for n, f in zip(above, factor, strict=True))
        assert below != above


def test_factors_other_than_one_and_two_are_refused():
    with pytest.raises(ValueError, match="must be 1 or 2"):
        downsample(np.zeros((4, 4, 4), np.uint32), (4, 1, 1))
