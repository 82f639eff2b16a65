"""The promise: cutting up must not change the answer, and the answer must be the forest."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.box import Blocks, Box
from volseg.config import Fragments
from volseg.decide import decide
from volseg.fragments import OUTSIDE, fragments, halo, heights, seed_height
from volseg.stitch import gather, link


def blockwise(height, level, block, *, order=None, repeat=(), connectivity=6, **rules):
    """Labels of a height field cut into blocks, done in any order, some of them twice."""
    grid = Blocks(height.shape, block)
    padded = np.pad(height, 1, constant_values=OUTSIDE)
    done = {}
    for i in [*(order if order is not None else range(len(grid))), *repeat]:
        box = grid[i]
        frame = box.grow(1).shift((1, 1, 1)).slices
        done[i] = fragments(padded[frame], np.ones(box.shape, np.uint8), box, height.shape, connectivity)
    tables = [done[i][1] for i in range(len(grid))]
    links = [link(i, lambda j: tables[j], grid) for i in range(len(grid))]
    basins, basin_of = gather(tables, links)
    label = decide(basins, seed_height=level, **rules)
    out = np.zeros(height.shape, np.uint32)
    for i, box in enumerate(grid):
        out[box.slices] = np.r_[0, label[basin_of[i]]][done[i][0]]
    return out


def basins_of(height, block, connectivity=6):
    """The volume's basins, found in blocks of that shape."""
    grid = Blocks(height.shape, block)
    padded = np.pad(height, 1, constant_values=OUTSIDE)
    frames = [box.grow(1).shift((1, 1, 1)).slices for box in grid]
    ones = [np.ones(box.shape, np.uint8) for box in grid]
    tables = [
        fragments(padded[f], mass, box, height.shape, connectivity)[1]
        for f, mass, box in zip(frames, ones, grid, strict=True)
    ]
    return gather(tables, [link(i, lambda j: tables[j], grid) for i in range(len(grid))])[0]


def brute_force(height, level, *, connectivity=6, min_voxels=0, keep_unseeded=False):
    """The minimum spanning forest, voxel by voxel: every edge sorted, one union-find, no basins."""
    flat = height.ravel()
    ends = {at: (int(h), i) for i, (at, h) in enumerate(np.ndenumerate(height)) if h != OUTSIDE}
    ways = [way for way in product((-1, 0, 1), repeat=3) if way > (0, 0, 0)]
    edges = []
    for way in ways if connectivity == 26 else [way for way in ways if np.abs(way).sum() == 1]:
        for at, end in ends.items():
            if other := ends.get(tuple(i + j for i, j in zip(at, way, strict=True))):
                edges.append((max(end, other), min(end, other)))
    parent = list(range(flat.size))
    seeded = [bool(h <= level) for h in flat]

    def find(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for (high, u), (_, v) in sorted(edges):
        p, q = find(u), find(v)
        if p != q and (high <= level or not (seeded[p] and seeded[q])):
            parent[q] = p
            seeded[p] = seeded[p] or seeded[q]
    root = np.array([find(i) for i in range(flat.size)])
    out = np.zeros(flat.size, np.uint32)
    count = 0
    seen = {}
    for i in np.flatnonzero(flat != OUTSIDE):
        r = root[i]
        if r not in seen:
            keep = (seeded[r] or keep_unseeded) and np.sum((root == r) & (flat != OUTSIDE)) >= min_voxels
            count += keep
            seen[r] = count if keep else 0
        out[i] = seen[r]
    return out.reshape(height.shape)


@st.composite
def fields(draw):
    """Small height fields with plateaus and holes, and a level."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)))
    steps = draw(st.sampled_from([2, 4, 30]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    height = rng.integers(0, steps, shape).astype(np.int32)
    height[rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.6]))] = OUTSIDE
    return height, draw(st.integers(-1, steps))


@pytest.mark.parametrize("connectivity", [6, 26])
@settings(max_examples=200, deadline=None)
@given(field=fields(), data=st.data())
def test_every_cutting_gives_the_brute_force_forest(connectivity, field, data):
    height, level = field
    block = tuple(data.draw(st.integers(1, n)) for n in height.shape)
    count = len(Blocks(height.shape, block))
    order = data.draw(st.permutations(range(count)))
    repeat = data.draw(st.lists(st.integers(0, count - 1), max_size=3))
    rules = {"min_voxels": data.draw(st.integers(0, 5)), "keep_unseeded": data.draw(st.booleans()),
             "connectivity": connectivity}  # fmt: skip
    want = brute_force(height, level, **rules)
    np.testing.assert_array_equal(blockwise(height, level, block, order=order, repeat=repeat, **rules), want)


@pytest.mark.parametrize("connectivity", [6, 26])
@settings(max_examples=60, deadline=None)
@given(field=fields(), data=st.data())
def test_every_contact_face_is_counted_once_with_its_higher_end(connectivity, field, data):
    height, _ = field
    block = tuple(data.draw(st.integers(1, n)) for n in height.shape)
    whole, cut = (basins_of(height, b, connectivity).edges for b in (height.shape, block))
    for name in ("high_at", "low_at", "area", "height"):
        np.testing.assert_array_equal(whole[name], cut[name])
    assert (whole["height"] >= whole["area"] * whole["high"].astype(np.int64)).all()


def test_the_border_of_two_valleys_adds_up_by_hand():
    """The ridge of 8 and 9 drains to the left, so its faces with 2 and 0 are the border: 9-2 and 8-0."""
    (edge,) = basins_of(np.array([[[1, 9, 2], [0, 8, 0]]], np.int32), (1, 2, 2)).edges
    assert (edge["area"], edge["high"], edge["height"]) == (2, 8, 17)


def test_two_valleys_meet_at_their_ridge():
    """Worked by hand: heights 0 3 9 2 1 with seeds at most 1; the ridge joins the side with the lower saddle.

    Edges in order of their higher end: 2-1 (high 2), 0-3 (high 3), then 9's two: its lower neighbour is 2, so the ridge
    voxel goes right. The last edge would join two seeds and is refused.
    """
    height = np.array([[[0, 3, 9, 2, 1]]], np.int32)
    for width in (1, 2, 3, 5):
        np.testing.assert_array_equal(blockwise(height, 1, (1, 1, width)), [[[1, 1, 2, 2, 2]]])


def test_voxels_that_touch_by_a_corner_are_one_object_on_a_grid_of_26():
    """Three voxels on a space diagonal, every one in a block of its own: two exits and no face in contact."""
    height = np.full((3, 3, 3), OUTSIDE, np.int32)
    height[0, 0, 0], height[1, 1, 1], height[2, 2, 2] = 3, 2, 1
    assert blockwise(height, 3, (1, 1, 1)).max() == 3
    assert blockwise(height, 3, (1, 1, 1), connectivity=26).max() == 1
    assert basins_of(height, (1, 1, 1), 26).depth.tolist() == [1]


def test_basins_that_touch_by_an_edge_alone_have_a_saddle_and_no_area():
    """Worked by hand: two valleys of height 1, their ways out 5 and 4 touch diagonally. The saddle is the higher one."""
    height = np.array([[[1, 5, OUTSIDE, OUTSIDE], [OUTSIDE, OUTSIDE, 4, 1]]], np.int32)
    for block in ((1, 2, 4), (1, 1, 2)):
        (edge,) = basins_of(height, block, 26).edges
        assert (edge["area"], edge["height"], edge["high"], edge["low"]) == (0, 0, 5, 4)
        assert not basins_of(height, block).edges.size


def test_labels_follow_the_raster_order_of_first_voxels():
    height = np.full((1, 3, 5), OUTSIDE, np.int32)
    height[0, 0, 3:] = 5
    height[0, 2, :2] = 1
    np.testing.assert_array_equal(
        blockwise(height, 5, (1, 2, 2)), [[[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [2, 2, 0, 0, 0]]]
    )


def test_no_mask_means_no_objects():
    assert not blockwise(np.full((3, 4, 5), OUTSIDE, np.int32), 5, (2, 2, 2)).any()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    smooth=st.tuples(*[st.integers(0, 2)] * 3),
    distance=st.integers(0, 4),
    contour=st.sampled_from([0.0, 0.5, 1.0]),
    data=st.data(),
)
def test_heights_do_not_see_the_blocks(seed, smooth, distance, contour, data):
    shape = data.draw(st.tuples(*[st.integers(1, 12)] * 3))
    rng = np.random.default_rng(seed)
    probability = rng.choice(np.array([0, 100, 130, 200, 255], np.uint8), (2, *shape), p=[0.3, 0.1, 0.2, 0.2, 0.2])
    knobs = Fragments(smooth=smooth, distance=distance, contour=contour, threshold=0.4)
    whole = heights(probability, Box.whole(shape), shape, knobs)
    block = tuple(data.draw(st.integers(1, n)) for n in shape)
    for box in Blocks(shape, block):
        have = box.grow(halo(knobs)).clip(shape)
        part = heights(probability[(slice(None), *have.slices)], box, shape, knobs)
        np.testing.assert_array_equal(part, whole[box.grow(1).shift((1, 1, 1)).slices])


def test_heights_are_what_their_definition_says():
    """Against scipy: the smoothed value rounded down, and the exact distance transform."""
    from scipy import ndimage

    rng = np.random.default_rng(5)
    shape = (9, 14, 17)
    smooth = ndimage.gaussian_filter(rng.random(shape), 2)
    mask = np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))
    probability = np.stack([mask, np.zeros_like(mask)])
    knobs = Fragments(smooth=(1, 2, 0), distance=4, threshold=0.4)
    level = mask.astype(float)
    for axis, passes in enumerate(knobs.smooth):
        row = {0: [1.0], 1: [0.25, 0.5, 0.25], 2: np.array([1, 4, 6, 4, 1]) / 16}[passes]
        level = ndimage.correlate1d(level, row, axis, mode="nearest")
    level = np.floor(level * 64)
    inside = level >= np.ceil(0.4 * 255 * 64)
    squared = np.minimum(np.rint(ndimage.distance_transform_edt(inside) ** 2), 16)
    want = np.where(inside, (255 * 64 - level) * 17 + 16 - squared, OUTSIDE)
    got = heights(probability, Box.whole(shape), shape, knobs)[1:-1, 1:-1, 1:-1]
    np.testing.assert_array_equal(got, want)


def test_a_seed_is_where_the_smoothed_probability_reaches_the_level():
    knobs = Fragments(smooth=(0, 0, 0), distance=3, threshold=0.1)
    probability = np.zeros((2, 1, 1, 5), np.uint8)
    probability[0, 0, 0] = [100, 152, 153, 154, 255]
    height = heights(probability, Box.whole((1, 1, 5)), (1, 1, 5), knobs)[1, 1, 1:-1]
    assert (height <= seed_height(0.6, knobs)).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("connected", [True, False])
def test_an_object_below_the_minimum_size_goes_by_its_global_size(connected):
    """A bar of 6 voxels over three blocks is kept at a minimum of 6; cut in two it is dropped."""
    height = np.zeros((1, 1, 6), np.int32)
    if not connected:
        height[0, 0, 3] = OUTSIDE
    assert blockwise(height, 0, (1, 1, 2), min_voxels=6).any() == connected
