import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.inference import tiles


@given(length=st.integers(1, 5000), tile=st.integers(32, 1500), overlap=st.integers(0, 31))
def test_tiles_cover_the_axis_and_share_what_was_asked(length, tile, overlap):
    axis = tiles.axis(length, tile, overlap)
    assert axis.size % 32 == 0
    assert axis.origins[0] == 0
    assert axis.size <= max(32, tile) or axis.origins == (0,)
    assert axis.origins[-1] + axis.size >= length
    assert len(axis.origins) == 1 or axis.origins[-1] + axis.size == length
    steps = np.diff(axis.origins)
    assert np.all(axis.size - steps >= overlap)


def blended(grid, values, y, x):
    """One section of 2 channels whose tile t holds values[t] everywhere or as an array."""
    blend = tiles.Blend(2, grid, y, x)
    for tile in grid.meeting(y, x):
        blend.add(tile, values[tile])
    out = np.empty((2, y.stop - y.start, x.stop - x.start), np.uint8)
    blend.quantize(out)
    return out


def test_tiles_that_agree_are_left_alone():
    grid = tiles.grid((100, 130), 64, 16)
    plane = (slice(0, 100), slice(0, 130))
    same = {tile: np.full((2, *grid.size), 0.25, np.float32) for tile in grid.meeting(*plane)}
    assert len(same) > 4
    assert np.all(blended(grid, same, *plane) == 64)


def test_two_tiles_blend_along_a_ramp():
    """Two tiles of 32 sharing 4 voxels: weights 1/5..4/5 against 4/5..1/5, of values 0 and 1."""
    grid = tiles.Grid(tiles.axis(32, 32, 0), tiles.axis(60, 32, 4))
    assert grid.x.origins == (0, 28)
    values = {(0, 0): np.zeros((2, 32, 32), np.float32), (0, 1): np.ones((2, 32, 32), np.float32)}
    row = blended(grid, values, slice(0, 32), slice(0, 60))[0, 5]
    assert row[26:34].tolist() == [0, 0, 51, 102, 153, 204, 255, 255]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), data=st.data())
def test_blend_does_not_see_the_blocks(seed, data):
    shape = data.draw(st.tuples(st.integers(20, 90), st.integers(20, 90)))
    grid = tiles.grid(shape, 32, data.draw(st.integers(0, 20)))
    whole = (slice(0, shape[0]), slice(0, shape[1]))
    rng = np.random.default_rng(seed)
    values = {tile: rng.random((2, *grid.size), np.float32) for tile in grid.meeting(*whole)}
    want = blended(grid, values, *whole)
    y0, x0 = (data.draw(st.integers(0, n - 1)) for n in shape)
    part = (slice(y0, data.draw(st.integers(y0 + 1, shape[0]))), slice(x0, data.draw(st.integers(x0 + 1, shape[1]))))
    np.testing.assert_array_equal(blended(grid, values, *part), want[(slice(None), *part)])


def test_a_plane_smaller_than_its_tile_is_mirrored():
    plane = np.arange(6).reshape(1, 2, 3)
    assert tiles.cut(plane, slice(0, 4), slice(0, 5))[0].tolist() == [
        [0, 1, 2, 2, 1], [3, 4, 5, 5, 4], [3, 4, 5, 5, 4], [0, 1, 2, 2, 1],
    ]  # fmt: skip
