import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import regionprops

from volseg.box import Blocks, Box
from volseg.objects import measure, merge, table


def measured(labels, mass, block):
    """Object rows of a label volume cut into blocks, each with region numbers of its own."""
    parts = []
    for box in Blocks(labels.shape, block):
        ids, region = np.unique(labels[box.slices], return_inverse=True)
        region = region.reshape(box.shape).astype(np.uint32) + (ids[0] != 0)
        parts.append(measure(region, np.r_[np.zeros(int(ids[0] != 0), ids.dtype), ids], mass[box.slices], box))
    return merge(parts)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), data=st.data())
def test_sums_add_up_whatever_the_blocks(seed, data):
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, shape).astype(np.uint32)
    mass = rng.integers(0, 256, shape).astype(np.uint8)
    block = tuple(data.draw(st.integers(1, n)) for n in shape)
    np.testing.assert_array_equal(measured(labels, mass, block), measured(labels, mass, shape))


def test_the_table_agrees_with_scikit_image():
    rng = np.random.default_rng(1)
    labels = np.kron(rng.integers(0, 5, (4, 4, 4)), np.ones((3, 5, 4), int)).astype(np.uint32)
    mass = rng.integers(0, 256, labels.shape).astype(np.uint8)
    got = table(measured(labels, mass, (5, 7, 6)), labels.shape, (40.0, 5.0, 4.0))
    props = regionprops(labels, mass)
    assert got["id"].tolist() == [p.label for p in props]
    assert got["voxels"].tolist() == [p.area for p in props]
    np.testing.assert_allclose(got["volume_um3"], [p.area * 800e-9 for p in props])
    np.testing.assert_allclose(got["mean_probability"], [p.intensity_mean / 255 for p in props])
    for i, axis in enumerate("zyx"):
        assert got[f"{axis}0"].tolist() == [p.bbox[i] for p in props]
        assert got[f"{axis}1"].tolist() == [p.bbox[i + 3] for p in props]
        size = (40.0, 5.0, 4.0)[i]
        np.testing.assert_allclose(got[f"centroid_{axis}_nm"], [p.centroid[i] * size for p in props])


def test_an_object_at_the_border_says_so():
    labels = np.zeros((3, 5, 5), np.uint32)
    labels[1, 2, 2] = 1
    labels[1, 4, 2] = 2
    got = table(measured(labels, np.zeros(labels.shape, np.uint8), (2, 2, 2)), labels.shape, (1.0, 1.0, 1.0))
    assert got["touches_border"].tolist() == [False, True]


def test_no_objects_make_an_empty_table():
    got = table(merge([]), (4, 4, 4), (1.0, 1.0, 1.0))
    assert all(len(column) == 0 for column in got.values())


def test_blocks_and_boxes_are_consistent():
    grid = Blocks((5, 7, 9), (2, 3, 4))
    count = np.zeros(grid.shape, int)
    for i, box in enumerate(grid):
        count[box.slices] += 1
        assert grid.index(grid.coords(i)) == i
        assert i in grid.meeting(box)
        assert all(i in grid.neighbours(j) for j in grid.neighbours(i))
    assert np.all(count == 1)
    assert Box.parse(str(grid[3])) == grid[3]
