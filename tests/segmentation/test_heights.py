"""Heights are what their definition says, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from volseg.box import Blocks, Box
from volseg.config import Fragments
from volseg.errors import UserError
from volseg.segmentation.distances import distance_unit
from volseg.segmentation.heights import OUTSIDE, block_heights, height_halo, seed_height


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    smooth=st.tuples(*[st.integers(0, 2)] * 3),
    height=st.sampled_from(["probability", "contour", "distance", "head"]),
    distance=st.sampled_from([{"distance": 1}, {"distance": 4}, {"distance_nm": 9}, {"distance_nm": 40}]),
    contour=st.sampled_from([0.0, 0.5, 1.0]),
    voxel_size_nm=st.sampled_from([(4.0, 4.0, 4.0), (30.0, 4.5, 5.0), (6.0, 17.0, 4.0)]),
    data=st.data(),
)
def test_heights_do_not_see_the_blocks(seed, smooth, height, distance, contour, voxel_size_nm, data):
    shape = data.draw(st.tuples(*[st.integers(1, 12)] * 3))
    rng = np.random.default_rng(seed)
    probability = rng.choice(np.array([0, 100, 130, 200, 255], np.uint8), (3, *shape), p=[0.3, 0.1, 0.2, 0.2, 0.2])
    fragments = Fragments(smooth=smooth, contour=contour, threshold=0.4, height=height, **distance)
    full = block_heights(probability, Box.from_shape(shape), shape, fragments, voxel_size_nm)
    block = tuple(data.draw(st.integers(1, n)) for n in shape)
    for box in Blocks(shape, block):
        covered = box.grow(height_halo(fragments, voxel_size_nm)).clip(shape)
        part = block_heights(probability[(slice(None), *covered.slices)], box, shape, fragments, voxel_size_nm)
        np.testing.assert_array_equal(part, full[box.grow(1).shift((1, 1, 1)).slices])


def test_heights_are_what_their_definition_says():
    """Against scipy: the smoothed value rounded down, and the exact distance transform."""
    rng = np.random.default_rng(5)
    shape = (9, 14, 17)
    smooth = ndimage.gaussian_filter(rng.random(shape), 2)
    mask = np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))
    probability = np.stack([mask, np.zeros_like(mask)])
    fragments = Fragments(smooth=(1, 2, 0), distance=4, threshold=0.4)
    level = mask.astype(float)
    for axis, passes in enumerate(fragments.smooth):
        row = {0: [1.0], 1: [0.25, 0.5, 0.25], 2: np.array([1, 4, 6, 4, 1]) / 16}[passes]
        level = ndimage.correlate1d(level, row, axis, mode="nearest")
    level = np.floor(level * 64)
    inside = level >= np.ceil(0.4 * 255 * 64)
    squared = np.minimum(np.rint(ndimage.distance_transform_edt(inside) ** 2), 16)
    expected = np.where(inside, (255 * 64 - level) * 17 + 16 - squared, OUTSIDE)
    result = block_heights(probability, Box.from_shape(shape), shape, fragments)[1:-1, 1:-1, 1:-1]
    np.testing.assert_array_equal(result, expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    smooth=st.tuples(*[st.integers(0, 3)] * 3),
    contour=st.sampled_from([0.0, 0.5, 1.0]),
    share=st.sampled_from([0.0, 0.01, 0.1, 0.6]),
    data=st.data(),
)
def test_heights_of_long_rows_are_what_their_definition_says(seed, smooth, contour, share, data):
    """Rows of several stretches, empty and not, whole and in blocks, against scipy: a stretch left out changes nothing."""
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 90)))
    rng = np.random.default_rng(seed)
    probability = rng.integers(0, 256, (2, *shape)).astype(np.uint8)
    probability[0][rng.random(shape) >= share] //= 4
    fragments = Fragments(smooth=smooth, contour=contour, threshold=0.4)
    less = np.maximum(0, probability[0].astype(int) - ((probability[1].astype(int) * round(contour * 256)) >> 8))
    level, inside = (_smoothed(field, smooth) for field in (probability[0], less))
    expected = np.where(level >= np.ceil(0.4 * 255 * 64), 255 * 64 - inside, OUTSIDE)
    block = tuple(data.draw(st.integers(1, n)) for n in shape)
    for box in [Box.from_shape(shape), *Blocks(shape, block)]:
        covered = box.grow(height_halo(fragments)).clip(shape)
        result = block_heights(probability[(slice(None), *covered.slices)], box, shape, fragments)
        np.testing.assert_array_equal(result[1:-1, 1:-1, 1:-1], expected[box.slices])


def _smoothed(field, passes):
    """By whole numbers: the field, its ends repeated, after [1 2 1] as often as told, times 64, rounded down once."""
    out, row = field.astype(np.int64), np.array([1, 2, 1])
    out = np.pad(out, [(p, p) for p in passes], mode="edge")
    for axis, count in enumerate(passes):
        for _ in range(count):
            out = ndimage.correlate1d(out, row, axis, mode="nearest")
    core = out[tuple(slice(p, n - p) for p, n in zip(passes, out.shape, strict=True))]
    return (core * 64) >> (2 * sum(passes))


def blobs(seed, shape):
    """A smooth random field, 0..255."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 2)
    return np.uint8(255 * (field - field.min()) / np.ptp(field))


@pytest.mark.parametrize("voxel_size_nm", [(5.0, 5.0, 5.0), (50.0, 4.6, 4.6), (4.0, 7.3, 11.0)])
def test_distances_in_nm_are_those_of_scipy(voxel_size_nm):
    mask = blobs(6, (9, 24, 27))
    fragments = Fragments(smooth=(0, 0, 0), distance_nm=45, threshold=0.4)
    around = distance_unit(fragments, voxel_size_nm)
    inside = mask >= np.ceil(0.4 * 255)
    result = block_heights(np.stack([mask] * 2), Box.from_shape(mask.shape), mask.shape, fragments, voxel_size_nm)[
        1:-1, 1:-1, 1:-1
    ]
    assert (inside == (result != OUTSIDE)).all()
    far = around.cap**2 - result[inside] % (around.cap**2 + 1)
    exact = ndimage.distance_transform_edt(inside, sampling=around.spacing)[inside]
    np.testing.assert_array_equal(far, np.minimum(np.rint(exact**2), around.cap**2))
    nm = np.minimum(ndimage.distance_transform_edt(inside, sampling=voxel_size_nm)[inside], 45)
    np.testing.assert_allclose(45 * np.sqrt(far) / around.cap, nm, rtol=1 / 32)
    assert len(np.unique(far)) > 5


def test_cubes_have_the_same_distance_in_nm_as_in_voxels():
    mask = np.stack([blobs(7, (8, 13, 11))] * 2)
    box, shape = Box.from_shape(mask.shape[1:]), mask.shape[1:]
    for height in ("probability", "distance"):
        voxels, nm = (Fragments(height=height, contour=0.3, **d) for d in ({"distance": 4}, {"distance_nm": 33}))
        np.testing.assert_array_equal(
            block_heights(mask, box, shape, voxels), block_heights(mask, box, shape, nm, (8, 8, 8))
        )
        assert seed_height(0.6, voxels) == seed_height(0.6, nm, (8, 8, 8))


def test_a_distance_too_far_for_whole_numbers_is_refused():
    assert distance_unit(Fragments(distance_nm=1275), (5, 5, 5)).cap == 255
    with pytest.raises(UserError, match="give at most 1275"):
        distance_unit(Fragments(distance_nm=1290), (5, 5, 5))
    with pytest.raises(ValueError, match="voxel_size_nm"):
        height_halo(Fragments(distance_nm=10))


@pytest.mark.parametrize(
    ("height", "first"),
    [("probability", [150, 250]), ("contour", [205, 255]), ("distance", [1, 4]), ("head", [30, 60])],
)
def test_each_height_is_low_where_its_evidence_is_strong(height, first):
    """Two voxels of a bar, at its end and one further in: their evidence, and what comes second where that is equal."""
    mask = np.array([0, 200, 250, 250, 250, 200, 0], np.uint8)
    probability = np.stack([mask, [0, 50, 0, 0, 0, 50, 0], [0, 30, 60, 90, 60, 30, 0]]).reshape(3, 1, 1, 7)
    fragments = Fragments(smooth=(0, 0, 0), distance=2, height=height)
    result = block_heights(probability.astype(np.uint8), Box.from_shape((1, 1, 7)), (1, 1, 7), fragments)[1, 1, 2:4]
    if height == "distance":
        assert result.tolist() == [(4 - first[0]) * 16321 + 64 * (255 - 150), (4 - first[1]) * 16321 + 64 * (255 - 250)]
    else:
        assert result.tolist() == [64 * (255 - first[0]) * 5 + 4 - 1, 64 * (255 - first[1]) * 5 + 4 - 4]


@pytest.mark.parametrize(("height", "channel"), [("probability", 0), ("contour", 1), ("head", 2)])
def test_a_seed_is_where_the_evidence_reaches_its_share(height, channel):
    """At 0.6: 153 of 255."""
    probability = np.zeros((3, 1, 1, 5), np.uint8)
    probability[channel, 0, 0] = [100, 152, 153, 154, 255]
    if height == "contour":
        probability = 255 - probability
        probability[0] = 255
    fragments = Fragments(smooth=(0, 0, 0), distance=3, height=height, threshold=0.0)
    result = block_heights(probability, Box.from_shape((1, 1, 5)), (1, 1, 5), fragments)[1, 1, 1:-1]
    assert (result <= seed_height(0.6, fragments)).tolist() == [False, False, True, True, True]


def test_a_seed_of_the_distance_is_a_share_of_its_cap():
    """A bar of 23 voxels between background; at 0.6 of 10 voxels, what is at least 6 away from it."""
    probability = np.full((2, 1, 1, 25), [[[[255]]], [[[0]]]], np.uint8)
    probability[0, 0, 0, [0, -1]] = 0
    fragments = Fragments(smooth=(0, 0, 0), distance=10, height="distance")
    result = block_heights(probability, Box.from_shape((1, 1, 25)), (1, 1, 25), fragments)[1, 1, 1:-1]
    assert np.flatnonzero(result <= seed_height(0.6, fragments)).tolist() == list(range(6, 19))
