"""Voxels of another size, against numpy and SciPy, and whatever box is asked for."""

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.box import Box
from volseg.io import arrays, ome, volume
from volseg.io.resample import Grid, resample

LENGTH = st.integers(1, 12)
SHAPE = st.tuples(LENGTH, LENGTH, LENGTH)


def whole(values, shape):
    box = Box.from_shape(shape)
    return resample(lambda part: values[part.slices], values.shape, values.dtype.name, shape, box)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_whole_factors_are_means(dtype):
    values = np.random.default_rng(0).integers(0, 200, (6, 8, 12)).astype(dtype) - np.dtype(dtype).type(
        dtype == "int16"
    )
    mean = values.reshape(3, 2, 4, 2, 3, 4).mean((1, 3, 5))
    if dtype == "float32":
        np.testing.assert_allclose(whole(values, (3, 4, 3)), mean, rtol=1e-6)
    else:
        np.testing.assert_array_equal(whole(values, (3, 4, 3)), np.floor(mean + 0.5))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_finer_voxels_lie_on_lines_between_stored_ones(dtype):
    values = np.random.default_rng(1).integers(0, 255, (5, 6, 7)).astype(dtype)
    shape = (10, 13, 20)
    places = [(np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(values.shape, shape, strict=True)]
    expected = scipy.ndimage.map_coordinates(
        values.astype(float), np.meshgrid(*places, indexing="ij"), order=1, mode="nearest"
    )
    assert np.abs(whole(values, shape) - expected).max() <= (2.5 if dtype == "uint8" else 0.6)


@pytest.mark.parametrize(("dtype", "like"), [(">u2", "uint16"), (">f4", "float32"), ("float16", "float32")])
def test_types_that_numba_does_not_know(dtype, like):
    values = np.random.default_rng(2).integers(0, 255, (4, 6, 8)).astype(dtype)
    for shape in ((2, 3, 4), (5, 9, 16)):
        made, expected = whole(values, shape), whole(values.astype(like), shape)
        assert made.dtype == np.dtype(dtype).newbyteorder("=")
        np.testing.assert_allclose(made.astype(float), expected, rtol=1e-3 if dtype == "float16" else 0)


def test_a_constant_stays_what_it_is():
    for value in (0, 1, 255):
        values = np.full((5, 7, 9), value, np.uint8)
        assert (whole(values, (3, 11, 4)) == value).all()


@settings(max_examples=80, deadline=None)
@given(SHAPE, SHAPE, st.sampled_from(["uint8", "int16", "uint32", "float32"]), st.data())
def test_a_voxel_does_not_depend_on_the_box(stored, shape, dtype, data):
    values = np.random.default_rng(sum(stored)).integers(0, 100, stored).astype(dtype)
    start = [data.draw(st.integers(0, n - 1)) for n in shape]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)]
    box = Box(tuple(start), tuple(stop))

    def read(part):
        assert part.clip(stored) == part
        return values[part.slices]

    np.testing.assert_array_equal(resample(read, stored, dtype, shape, box), whole(values, shape)[box.slices])


@settings(max_examples=80, deadline=None)
@given(SHAPE, SHAPE, st.data())
def test_grids_lead_to_each_other(shape, other, data):
    """Boxes of one grid, as the middles of its voxels see the other."""
    grid = Grid.between(shape, tuple(1 / n for n in shape), other, tuple(1 / n for n in other))
    nearest = [grid.nearest(axis, 0, n) for axis, n in enumerate(shape)]
    for axis in range(3):
        expected = np.floor((np.arange(shape[axis]) + 0.5) * other[axis] / shape[axis]).astype(int)
        np.testing.assert_array_equal(nearest[axis], expected)
    start = [data.draw(st.integers(0, n - 1)) for n in other]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, other, strict=True)]
    inside = grid.inside(Box(tuple(start), tuple(stop)))
    for axis in range(3):
        fits = np.flatnonzero((nearest[axis] >= start[axis]) & (nearest[axis] < stop[axis]))
        assert list(range(inside.start[axis], inside.stop[axis])) == fits.tolist()


def test_a_resampled_volume_covers_the_same_space(tmp_path):
    path = str(tmp_path / "em.zarr")
    values = np.random.default_rng(2).integers(0, 255, (4, 20, 30), dtype=np.uint8)
    arrays.create_group(path)
    for name, data in (("s0", values), ("s1", values[:, ::2, ::2])):
        arrays.create_array(path, name, shape=data.shape, dtype="uint8", chunk=(2, 8, 8), shard=data.shape, axes="zyx")
        arrays.write(arrays.open_array(path, name), Box.from_shape(data.shape), data)
    sizes = [("s0", (20.0, 4.0, 4.0)), ("s1", (20.0, 8.0, 8.0))]
    arrays.set_group_attributes(path, "", ome.multiscales("em", "zyx", sizes))
    source = volume.open(path)
    assert [level.voxel_size_nm for level in volume.levels(source)] == [size for _, size in sizes]
    made = volume.resampled(source, (8, 10, 15))
    assert (made.shape, made.voxel_size_nm, made.dtype) == ((8, 10, 15), (10.0, 8.0, 8.0), "uint8")
    np.testing.assert_array_equal(made.read(Box((1, 2, 3), (7, 9, 14))), whole(values, (8, 10, 15))[1:7, 2:9, 3:14])
    assert made.checksum() != source.checksum()
