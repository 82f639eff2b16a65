import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from skimage.measure import regionprops

from volseg.box import Blocks, Box
from volseg.segmentation.extents import directions
from volseg.segmentation.object_sums import MAX_RUN_VOXELS
from volseg.segmentation.objects import first_plane, measure, merge, objects_table, paint

SIZE = (40.0, 5.0, 4.0)


def measured(labels, probability, block, at=(0, 0, 0)):
    """Sums of a label volume cut into blocks, each with region numbers of its own; ``at`` is where the volume begins."""
    parts = []
    for box in Blocks(labels.shape, block):
        ids, region = np.unique(labels[box.slices], return_inverse=True)
        region = region.reshape(box.shape).astype(np.uint32) + (ids[0] != 0)
        ids = np.r_[np.zeros(int(ids[0] != 0), ids.dtype), ids]
        behind = [
            np.take(labels, stop, axis)[tuple(s for i, s in enumerate(box.slices) if i != axis)] if stop < n else None
            for axis, (stop, n) in enumerate(zip(box.stop, labels.shape, strict=True))
        ]
        gray = probability[box.slices].astype(np.uint16) * 200
        parts.append(measure(region, ids, probability[box.slices], box.shift(at), behind, gray, directions(SIZE)))
    return merge(parts)


def rows_of(labels, size=(1.0, 1.0, 1.0), block=None):
    """The table of a label volume without background probability."""
    probability = np.full(labels.shape, 255, np.uint8)
    return objects_table(measured(labels.astype(np.uint32), probability, block or labels.shape), labels.shape, size)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), data=st.data())
def test_sums_and_table_do_not_see_the_blocks(seed, data):
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, shape).astype(np.uint32)
    probability = rng.integers(0, 256, shape).astype(np.uint8)
    block = tuple(data.draw(st.integers(1, n)) for n in shape)
    cut, full = measured(labels, probability, block), measured(labels, probability, shape)
    np.testing.assert_array_equal(cut.rows, full.rows)
    np.testing.assert_array_equal(cut.contacts, full.contacts)
    result, expected = objects_table(cut, shape, SIZE), objects_table(full, shape, SIZE)
    assert all(result[name].tobytes() == expected[name].tobytes() for name in expected)
    for label in result["id"]:
        row = result["id"] == label
        assert result["mean_gray"][row] == pytest.approx(200 * probability[labels == label].mean())
        corners = np.unique(np.argwhere(labels == label)[:, None] + np.indices((2, 2, 2)).reshape(3, -1).T, axis=1)
        longest = pdist(corners.reshape(-1, 3) * SIZE).max()
        assert 0.982 * longest <= result["feret_nm"][row] <= longest * (1 + 1e-9)


def test_a_direction_is_near_every_line_whatever_the_voxels():
    """So near that a width is at most 1.8 % short."""
    lines = np.random.default_rng(0).normal(size=(100_000, 3))
    lines /= np.linalg.norm(lines, axis=1, keepdims=True)
    for size in ((1.0, 1.0, 1.0), SIZE, (4.0, 900.0, 30.0)):
        along = directions(size) / np.array(size)
        along /= np.linalg.norm(along, axis=1, keepdims=True)
        assert np.abs(lines @ along.T).max(axis=1).min() > 0.982


def test_gray_values_and_extents_are_measured_where_they_are_asked_for():
    one = np.ones((1, 1, 1), np.uint32)
    plain = measure(one, np.arange(2), one.astype(np.uint8), Box((0, 0, 0), (1, 1, 1)), [None, None, None])
    assert plain.gray is plain.reach is None
    assert not {"mean_gray", "feret_nm"} & set(objects_table(plain, (1, 1, 1), SIZE))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), data=st.data())
def test_faces_and_neighbors_agree_with_counting_them_one_by_one(seed, data):
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * 3))
    labels = np.random.default_rng(seed).integers(0, 4, shape)
    faces, touching = {}, set()
    for axis in range(3):
        for low, high in zip(np.delete(labels, -1, axis).flat, np.delete(labels, 0, axis).flat, strict=True):
            for side in {low, high} - {0} if low != high else ():
                faces[side, axis] = faces.get((side, axis), 0) + 1
            if low and high and low != high:
                touching.add((min(low, high), max(low, high)))
    result = measured(labels.astype(np.uint32), np.zeros(shape, np.uint8), tuple(max(1, n // 2) for n in shape))
    assert {tuple(pair) for pair in result.contacts.tolist()} == touching
    for row in result.rows:
        assert row["faces"].tolist() == [faces.get((row["id"], axis), 0) for axis in range(3)]


def test_the_table_agrees_with_scikit_image():
    rng = np.random.default_rng(1)
    labels = np.kron(rng.integers(0, 5, (4, 4, 4)), np.ones((3, 5, 4), int)).astype(np.uint32)
    probability = rng.integers(5, 256, labels.shape).astype(np.uint8)
    result = objects_table(measured(labels, probability, (5, 7, 6)), labels.shape, SIZE)
    props = regionprops(labels, probability)
    assert result["id"].tolist() == [p.label for p in props]
    assert result["voxels"].tolist() == [p.area for p in props]
    np.testing.assert_allclose(result["volume_um3"], [p.area * 800e-9 for p in props])
    np.testing.assert_allclose(result["mean_probability"], [p.intensity_mean / 255 for p in props])
    np.testing.assert_allclose(result["min_probability"], [p.intensity_min / 255 for p in props])
    for i, axis in enumerate("zyx"):
        assert result[f"{axis}0"].tolist() == [p.bbox[i] for p in props]
        assert result[f"{axis}1"].tolist() == [p.bbox[i + 3] for p in props]
        np.testing.assert_allclose(result[f"centroid_{axis}_nm"], [p.centroid[i] * SIZE[i] for p in props])


def test_axes_agree_with_the_inertia_tensor_of_scikit_image():
    rng = np.random.default_rng(2)
    labels = np.kron(rng.integers(0, 5, (3, 4, 5)), np.ones((4, 4, 7), int)).astype(np.uint32)
    result = rows_of(labels, SIZE, (5, 7, 6))
    for k, p in enumerate(regionprops(labels, spacing=SIZE)):
        inertia = p.inertia_tensor
        covariance = np.eye(3) * np.trace(inertia) / 2 - inertia + np.diag(np.square(SIZE) / 12)
        variance, vector = np.linalg.eigh(covariance)
        np.testing.assert_allclose([result[f"sd{i}_nm"][k] ** 2 for i in range(3)], variance[::-1])
        axis0 = np.array([result[f"axis0_{axis}"][k] for axis in "zyx"])
        assert abs(axis0 @ vector[:, -1]) == pytest.approx(1)
        assert axis0[np.abs(axis0).argmax()] > 0


def test_the_length_is_the_longest_axis_of_an_ellipsoid():
    z, y, x = np.ogrid[-11:12, -41:42, -21:22]
    ball = (z / 10) ** 2 + (y / 40) ** 2 + (x / 20) ** 2 <= 1
    result = rows_of(ball, (2.0, 1.0, 1.0))
    (p,) = regionprops(ball.astype(np.uint8), spacing=(2.0, 1.0, 1.0))
    assert result["length_nm"][0] == pytest.approx(80, rel=0.01)
    assert result["length_nm"][0] == pytest.approx(p.axis_major_length, rel=0.01)
    assert [result[f"axis0_{axis}"][0] for axis in "zyx"] == pytest.approx([0, 1, 0])


def test_a_rod_has_its_standard_deviations_and_axis():
    labels = np.zeros((5, 5, 9), np.uint32)
    labels[1:3, 2, 1:8] = 1
    result = rows_of(labels, (40.0, 5.0, 4.0))
    assert result["sd0_nm"][0] * np.sqrt(12) == pytest.approx(2 * 40)
    assert result["sd1_nm"][0] * np.sqrt(12) == pytest.approx(7 * 4)
    assert result["sd2_nm"][0] * np.sqrt(12) == pytest.approx(5)
    assert [result[f"axis0_{axis}"][0] for axis in "zyx"] == [1, 0, 0]


@pytest.mark.parametrize("block", [(6, 7, 8), (2, 3, 4), (1, 1, 1)])
def test_the_surface_of_a_brick_is_that_of_its_six_sides(block):
    labels = np.zeros((6, 7, 8), np.uint32)
    labels[1:3, 2:5, 3:7] = 9  # 80 x 15 x 16 nm
    assert rows_of(labels, SIZE, block)["surface_area_um2"] == pytest.approx([2 * (80 * 15 + 80 * 16 + 15 * 16) * 1e-6])


def test_contact_is_surface_and_the_end_of_the_volume_is_not():
    labels = np.array([[[1, 1, 2, 0, 2]]])
    result = rows_of(labels, SIZE, (1, 1, 2))
    np.testing.assert_allclose(result["surface_area_um2"], [200e-6, 600e-6])
    assert result["neighbors"].tolist() == [1, 1]


def test_neighbors_share_a_face_and_count_once():
    labels = np.zeros((2, 4, 5), np.uint32)
    labels[0] = [[1, 1, 2, 0, 5], [1, 1, 2, 0, 0], [3, 3, 2, 0, 0], [3, 3, 0, 4, 0]]
    for block in ((2, 4, 5), (1, 2, 2)):
        assert rows_of(labels, block=block)["neighbors"].tolist() == [2, 2, 2, 0, 0]


def test_the_lowest_probability_is_that_of_the_object_alone():
    labels = np.array([[[1, 1, 1, 0, 2, 2]]], np.uint32)
    probability = np.array([[[255, 51, 102, 0, 204, 255]]], np.uint8)
    result = objects_table(measured(labels, probability, (1, 1, 2)), labels.shape, SIZE)
    np.testing.assert_allclose(result["min_probability"], [0.2, 0.8])


def test_moments_stay_exact_far_from_the_origin():
    """Squares of these coordinates add up to more than 2**63."""
    labels = np.zeros((3, 4, 2 * MAX_RUN_VOXELS), np.uint32)
    labels[1, 1:3, 5:-5] = 1
    probability = np.zeros(labels.shape, np.uint8)
    far = (1 << 24, 30_000_000, 1 << 25)
    sums = [measured(labels, probability, block, at) for block, at in (((3, 4, 999), far), (labels.shape, far))]
    sums.append(measured(labels, probability, labels.shape))
    assert np.all(sums[0].rows == sums[1].rows)
    assert sums[1].rows["moment"][0, 2, 0] >= 1 << 31
    result, near, at_zero = (objects_table(s, labels.shape, SIZE) for s in sums)
    for name in ("sd0_nm", "sd1_nm", "sd2_nm", "axis0_z", "axis0_y", "axis0_x"):
        assert result[name] == near[name] == at_zero[name]


def test_regions_of_one_label_are_one_object():
    region = np.array([[[1, 2, 3, 0]]], np.uint32)
    sums = measure(
        region, np.array([0, 7, 7, 0]), np.zeros(region.shape, np.uint8), Box((0, 0, 0), (1, 1, 4)), [None] * 3
    )
    assert sums.rows["id"].tolist() == [7]
    assert sums.rows["faces"].tolist() == [[0, 0, 1]]
    assert sums.contacts.size == 0


def test_the_near_face_of_a_block_is_found_among_its_face_voxels():
    labels = np.random.default_rng(3).integers(0, 3, (5, 6, 7))
    box = Box((2, 3, 1), (5, 6, 4))
    face_voxel = np.flatnonzero(labels)
    face_voxel = face_voxel[[all(a <= p < b for a, p, b in zip(box.start, np.unravel_index(i, labels.shape), box.stop,
                                                         strict=True)) for i in face_voxel]]  # fmt: skip
    for axis in range(3):
        result = first_plane(face_voxel, labels.flat[face_voxel], box, labels.shape, axis)
        np.testing.assert_array_equal(result, np.take(labels[box.slices], 0, axis))


@pytest.mark.parametrize("background", [0, 7])
def test_every_voxel_is_painted_with_the_label_of_its_region(background):
    region = np.random.default_rng(5).integers(0, 4, (3, 4, 9), np.uint32)
    region[1:, :2] = 0
    label = np.array([background, 3, 0, 5], np.uint32)
    whole = np.zeros((3, 8, 20), np.uint32)
    part = whole[:, 2:6, 5:14]
    paint(region, label, part)
    np.testing.assert_array_equal(part, label[region])
    np.testing.assert_array_equal(paint(region, label), label[region])
    assert whole.sum() == part.sum()


def test_an_object_at_the_border_says_so():
    labels = np.zeros((3, 5, 5), np.uint32)
    labels[1, 2, 2] = 1
    labels[1, 4, 2] = 2
    assert rows_of(labels, block=(2, 2, 2))["touches_border"].tolist() == [False, True]


def test_no_objects_make_an_empty_table():
    result = objects_table(merge([]), (4, 4, 4), (1.0, 1.0, 1.0))
    assert all(len(column) == 0 for column in result.values())
    assert rows_of(np.zeros((2, 3, 4)))["id"].size == 0


def test_shapes_of_a_ball_a_rod_and_a_plate():
    """A ball is round; a rod is long; a plate is flat; each knows who is nearest."""
    label = np.zeros((60, 60, 120), np.int64)
    z, y, x = np.ogrid[:60, :60, :120]
    label[(z - 30) ** 2 + (y - 30) ** 2 + (x - 30) ** 2 <= 20**2] = 1
    label[28:32, 28:32, 60:100] = 2
    label[5:45, 5:45, 110:112] = 3
    result = rows_of(label, (5.0, 5.0, 5.0))
    volume = np.bincount(label.ravel())[1:]
    np.testing.assert_allclose(result["equivalent_diameter_nm"], 5 * np.cbrt(6 * volume / np.pi))
    assert result["elongation"] == pytest.approx([1, 10, 1], rel=0.01)
    assert result["flatness"] == pytest.approx([1, 1, 20], rel=0.01)
    assert 0.6 < result["sphericity"][0] < 0.75
    faces = 2 * 16 + 4 * 160
    assert result["sphericity"][1] == pytest.approx(np.pi ** (1 / 3) * (6 * 640) ** (2 / 3) / faces)
    assert result["nearest_id"].tolist() == [2, 3, 2]
    assert result["nearest_nm"][0] == pytest.approx(5 * np.linalg.norm([30 - 29.5, 30 - 29.5, 30 - 79.5]))


def test_an_object_alone_has_no_neighbor():
    label = np.zeros((4, 4, 4), np.int64)
    label[1:3, 1:3, 1:3] = 1
    result = rows_of(label, (1.0, 1.0, 1.0))
    assert result["nearest_id"].tolist() == [0]
    assert np.isnan(result["nearest_nm"]).all()
