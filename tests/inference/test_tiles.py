import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.inference import tiles

AXES = st.builds(tiles.axis, st.integers(1, 600), st.integers(32, 200), st.integers(0, 31))


def origins(axis):
    return [axis.origin(i) for i in range(axis.count)]


@given(length=st.integers(1, 5000), tile=st.integers(32, 1500), overlap=st.integers(0, 31))
def test_tiles_cover_the_axis_and_share_what_was_asked(length, tile, overlap):
    axis = tiles.axis(length, tile, overlap)
    starts = origins(axis)
    assert axis.size % 32 == 0
    assert starts[0] == 0
    assert axis.size <= max(32, tile) or starts == [0]
    assert starts[-1] + axis.size >= length
    assert axis.count == 1 or starts[-1] + axis.size == length
    assert np.all(axis.size - np.diff(starts) >= overlap)
    assert np.all(np.diff(starts) > 0)


@given(length=st.integers(1, 10**6), tile=st.integers(2, 40), multiple=st.sampled_from([32, 64]))
def test_tiles_begin_at_the_next_multiple_from_where_they_would_be_even(length, tile, multiple):
    axis = tiles.axis(length, 64 * tile, 64, multiple)
    even = [i * (length - axis.size) / max(1, axis.count - 1) for i in range(min(axis.count, 300))]
    if axis.step == multiple:
        assert all(axis.origin(i) % multiple == 0 for i in range(len(even) - 1))
    assert all(0 <= axis.origin(i) - at < axis.step for i, at in enumerate(even))
    assert not axis.is_even or all(axis.origin(i) == at for i, at in enumerate(even))


@settings(max_examples=50, deadline=None)
@given(axis=AXES, data=st.data())
def test_tiles_and_blocks_that_overlap_are_found_without_looking_at_all(axis, data):
    start = data.draw(st.integers(0, axis.length - 1))
    stop, step = data.draw(st.integers(start + 1, axis.length)), data.draw(st.integers(1, axis.length))

    def overlapping(a, b):
        return [i for i, o in enumerate(origins(axis)) if o < b and o + axis.size > a]

    def blocks(a, b):
        return [(max(a, k), min(b, k + step)) for k in range(a // step * step, b, step)]

    assert list(axis.overlapping(start, stop)) == overlapping(start, stop)
    reaches = []
    for block in blocks(0, axis.length):
        own = axis.starting(*block)
        assert list(own) == [i for i, o in enumerate(origins(axis)) if block[0] <= o < block[1]]
        if own:
            reaches.append(min(axis.origin(own[-1]) + axis.size, axis.length) - axis.origin(own[0]))
    assert axis.longest_reach(step) == max(reaches) or axis.length > step * tiles.SAMPLED


@given(rows=st.integers(0, 5), first=st.integers(0, 3), columns=st.integers(0, 5))
def test_a_window_of_tiles_is_a_sequence_in_raster_order(rows, first, columns):
    window = tiles.TileWindow(range(first, first + rows), range(columns))
    want = [(i, j) for i in range(first, first + rows) for j in range(columns)]
    assert list(window) == [window[k] for k in range(len(window))] == want
    assert window[1:4] == want[1:4]
    if want:
        assert window[-1] == want[-1]


def test_a_plane_of_absurd_size_costs_nothing():
    grid = tiles.grid((1 << 25, 1 << 50), 1280, 64)
    window = grid.overlapping(slice(0, 1 << 25), slice(0, 1 << 50))
    assert len(window) == grid.y.count * grid.x.count > 1 << 54
    assert grid.place((grid.y.count - 1, grid.x.count - 1))[1].stop == 1 << 50
    assert grid.x.overlapping(1 << 49, (1 << 49) + 1).start > 1 << 38
    assert (1 << 36) - grid.x.size <= grid.x.longest_reach(1 << 36) <= (1 << 36) + (1 << 28)


def blended(grid, values, y, x):
    """One section of 2 channels whose tile t holds values[t] everywhere or as an array."""
    blend = tiles.Blend(2, grid, y, x)
    for tile in grid.overlapping(y, x):
        blend.add(tile, values[tile])
    out = np.empty((2, y.stop - y.start, x.stop - x.start), np.uint8)
    blend.quantize(out)
    return out


def test_tiles_that_agree_are_left_alone():
    grid = tiles.grid((100, 130), 64, 16)
    plane = (slice(0, 100), slice(0, 130))
    same = {tile: np.full((2, *grid.size), 0.25, np.float32) for tile in grid.overlapping(*plane)}
    assert len(same) > 4
    assert np.all(blended(grid, same, *plane) == 64)


def test_two_tiles_blend_along_a_ramp():
    """Two tiles of 32 sharing 4 voxels: weights 1/5..4/5 against 4/5..1/5, of values 0 and 1."""
    grid = tiles.Grid(tiles.axis(32, 32, 0), tiles.axis(60, 32, 4))
    assert origins(grid.x) == [0, 28]
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
    values = {tile: rng.random((2, *grid.size), np.float32) for tile in grid.overlapping(*whole)}
    want = blended(grid, values, *whole)
    y0, x0 = (data.draw(st.integers(0, n - 1)) for n in shape)
    part = (slice(y0, data.draw(st.integers(y0 + 1, shape[0]))), slice(x0, data.draw(st.integers(x0 + 1, shape[1]))))
    np.testing.assert_array_equal(blended(grid, values, *part), want[(slice(None), *part)])


def test_a_plane_smaller_than_its_tile_is_mirrored():
    plane = np.arange(6).reshape(1, 2, 3)
    assert tiles.cut(plane, slice(0, 4), slice(0, 5))[0].tolist() == [
        [0, 1, 2, 2, 1], [3, 4, 5, 5, 4], [3, 4, 5, 5, 4], [0, 1, 2, 2, 1],
    ]  # fmt: skip
