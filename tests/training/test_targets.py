"""Training targets: label encodings, masks and contours, section lists, and what is said about an annotation."""

import numpy as np
import pytest
from scipy import ndimage

from volseg.box import Box
from volseg.errors import UserError
from volseg.io import volume
from volseg.training.targets import (
    UNLABELED,
    border_distance,
    contact_mask,
    describe_annotation,
    mask_and_contour,
    normalize_labels,
    parse_sections,
)


@pytest.fixture
def objects():
    """A 6 x 32 x 32 mask of two bars, one of which joins its sections by a corner alone."""
    mask = np.zeros((6, 32, 32), bool)
    mask[:3, 4:8, 4:8] = True
    mask[3:, 8:12, 8:12] = True
    mask[1:5, 20:24, 4:28] = True
    return mask


@pytest.mark.parametrize("value", [1, 255, True])
def test_one_value_is_a_mask_and_becomes_26_connected_components(objects, value):
    labels, note = normalize_labels(objects * np.array(value))
    assert labels.dtype == np.uint32
    assert note["kind"] == "mask"
    assert note["objects"] == 2
    assert labels[0, 4, 4] == labels[5, 11, 11] != labels[1, 20, 4]
    np.testing.assert_array_equal(labels != 0, objects)


def test_sections_that_mix_one_bit_and_eight_bit_are_one_mask(objects):
    mixed = objects.astype(np.uint8) * np.array([255, 1, 255, 1, 1, 255], np.uint8)[:, None, None]
    labels, note = normalize_labels(mixed)
    assert note == {"kind": "mask", "values": {1: 3, 255: 3}, "objects": 2}
    np.testing.assert_array_equal(labels, normalize_labels(objects)[0])


def test_the_published_vnc_labels_are_one_mask(shared_data):
    stack = volume.open(shared_data / "vnc" / "mitochondria")
    labels, note = normalize_labels(stack.read(Box.from_shape(stack.shape)))
    assert note["kind"] == "mask"
    assert note["values"] == {1: 3, 255: 17}
    assert (labels != 0).mean() == pytest.approx(0.0539, abs=1e-4)


def test_several_values_are_instances_and_stay_apart_where_they_touch():
    array = np.zeros((1, 4, 6), np.int64)
    array[0, :, :3], array[0, :, 3:] = 7, 900_000_000_000
    labels, note = normalize_labels(array)
    assert note == {"kind": "instances", "objects": 2}
    assert labels[0, 0].tolist() == [1, 1, 1, 2, 2, 2]


def test_values_1_and_255_in_one_section_are_two_instances():
    labels, note = normalize_labels(np.array([[[0, 1, 255]]], np.uint8))
    assert note["kind"] == "instances"
    assert labels.tolist() == [[[0, 1, 2]]]


def test_strays_left_by_resampling_count_from_half_the_value_on():
    gray = np.zeros((1, 100, 100), np.uint8)
    gray[0, :60], gray[0, 60, 0], gray[0, 60, 1] = 255, 120, 140
    labels, note = normalize_labels(gray)
    assert note == {"kind": "mask", "values": {255: 1}, "objects": 1}
    assert labels[0, 60, :2].tolist() == [0, 1]


def test_one_small_object_beside_a_large_one_stays_an_instance():
    array = np.zeros((1, 100, 100), np.uint8)
    array[0, :60], array[0, 60, :2] = 1, 2
    assert normalize_labels(array)[1] == {"kind": "instances", "objects": 2}


def test_unlabeled_voxels_are_set_apart():
    labels, note = normalize_labels(np.array([[[0, 1, 1, 9]]], np.uint8), unlabeled=9)
    assert labels.tolist() == [[[0, 1, 1, UNLABELED]]]
    assert note["kind"] == "mask"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((1, 2, 2), 0.5), "fractions"),
        (np.full((1, 2, 2), -3), "-3"),
        (np.zeros((2, 2), np.uint8), "2 axes"),
        (np.zeros((1, 2, 2), complex), "complex128"),
    ],
)
def test_arrays_that_are_no_labels_are_refused(array, message):
    with pytest.raises(UserError, match=message):
        normalize_labels(array)


def test_whole_floats_are_labels():
    assert normalize_labels(np.array([[[0.0, 255.0]]]))[0].tolist() == [[[0, 1]]]


def test_the_contour_lies_between_touching_instances():
    labels = np.zeros((1, 9, 20), np.uint32)
    labels[0, :, 5:10], labels[0, :, 10:15] = 1, 2
    mask, contour = mask_and_contour(labels, 2)
    assert mask[0, 0].tolist() == [0] * 5 + [1] * 10 + [0] * 5
    assert np.flatnonzero(contour[0, 4]).tolist() == [3, 4, 5, 6, 8, 9, 10, 11, 13, 14, 15, 16]


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_the_contour_is_as_wide_as_asked_on_both_sides(width, objects):
    labels = normalize_labels(objects)[0]
    found = mask_and_contour(labels, width)[1]
    for section, contour in zip(labels, found, strict=True):
        steps = mask_and_contour(section, 1)[1]
        apart = ndimage.distance_transform_edt(steps == 0) if steps.any() else np.full(steps.shape, np.inf)
        np.testing.assert_array_equal(contour, apart <= width - 1)


def test_sections_do_not_see_each_other(objects):
    labels = normalize_labels(objects)[0]
    stack = mask_and_contour(labels, 2)
    single = [mask_and_contour(section, 2) for section in labels]
    for i in range(2):
        np.testing.assert_array_equal(stack[i], np.stack([pair[i] for pair in single]))


def test_no_width_is_no_contour(objects):
    assert not mask_and_contour(objects, 0)[1].any()


def test_sections_are_sorted_and_each_comes_once():
    assert parse_sections(("4:6", 0, "3:5", "9"), 10) == [0, 3, 4, 5, 9]


@pytest.mark.parametrize("part", ["0:11", 10, "-1:3", "5:5", "7:2", "all", "1:2:3", "1.5"])
def test_sections_that_are_not_there_are_refused(part):
    with pytest.raises(UserError, match="sections"):
        parse_sections((part,), 10)


def test_few_objects_and_empty_sections_are_told(objects):
    labels = normalize_labels(objects)[0]
    labels[2] = 0
    found = describe_annotation(labels, [0, 1, 2, 3])
    assert (found["sections"], found["objects"], found["empty"]) == (4, 2, [2])
    assert found["foreground"] == pytest.approx((labels[:4] != 0).mean())
    assert "2 annotated objects" in found["advice"][0]
    assert "(2)" in found["advice"][1]


def test_many_objects_on_full_sections_need_no_advice():
    labels = np.arange(200, dtype=np.uint32).reshape(1, 10, 20)
    assert describe_annotation(labels, [0])["advice"] == []


def test_unlabeled_voxels_count_neither_way():
    labels = np.array([[[1, 0, UNLABELED, UNLABELED]]], np.uint32)
    assert describe_annotation(labels, [0])["foreground"] == 0.5


def test_instances_that_were_numbered_section_by_section_are_joined():
    truth = np.zeros((6, 30, 60), np.int64)
    for i in range(4):
        for z in range(6):
            truth[z, 5:20, 15 * i + z % 2 : 15 * i + 12] = 10 * i + 7
    truth[4, :, 15:30] = 0
    by_section = truth.copy()
    for z, section in enumerate(by_section):
        section[section > 0] = (section[section > 0] + 10 * z) % 40 + 1
    labels, note = normalize_labels(by_section)
    assert note == {"kind": "instances, numbered section by section", "objects": 5}
    pairs = np.unique(np.stack([truth.ravel(), labels.ravel()], 1), axis=0).tolist()
    assert pairs == [[0, 0], [7, 1], [17, 2], [17, 5], [27, 3], [37, 4]]
    assert normalize_labels(truth)[1] == {"kind": "instances", "objects": 4}


def test_contacts_are_where_two_objects_are_that_near():
    labels = ndimage.zoom(np.random.default_rng(0).integers(0, 3, (3, 4, 4)), 3, order=0).astype(np.uint32)
    for along_z in (False, True):
        found = contact_mask(labels, 2, along_z)
        for at in np.ndindex(labels.shape):
            assert found[at] == _meets(labels, at, along_z), at


def _meets(labels, at, along_z):
    """Whether ``at`` or a voxel that shares a face with it shares a face with another object."""
    steps = [s for s in np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)]) if along_z or not s[0]]
    return any(
        _value(labels, near) and _value(labels, far) not in (0, _value(labels, near))
        for near in [np.array(at), *(np.array(at) + s for s in steps)]
        for far in [near + s for s in steps]
    )


def _value(labels, at):
    inside = (at >= 0).all() and (at < labels.shape).all()
    return labels[tuple(at)] if inside else 0


def test_nobody_touches_what_nobody_annotated():
    labels = np.full((1, 1, 4), UNLABELED)
    labels[..., :2] = 1
    assert not contact_mask(labels, 2, along_z=True).any()


@pytest.mark.parametrize("size", [(5, 5, 5), (50, 4, 6)])
def test_distances_are_those_of_a_search_of_all_voxels(size):
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 3, (2, 3, 3)), np.ones((2, 4, 4))).astype(np.uint32)
    labels[labels == 2] = 0xF0000000
    labels[0, :2, :2] = UNLABELED
    at = np.argwhere(np.ones(labels.shape)) * size
    gap = np.linalg.norm(at[:, None] - at[None], axis=2)
    ids = labels.ravel()
    other = (ids[:, None] != ids[None]) & (ids[None] != UNLABELED)
    nearest = np.where(other, gap, np.inf).min(axis=1)
    wanted = np.where((ids == 0) | (ids == UNLABELED), 0, np.minimum(nearest / 20, 1) * 255).reshape(labels.shape)
    assert np.abs(border_distance(labels, size, 20) - wanted).max() <= 0.5


def test_an_object_without_end_is_far_from_it():
    assert (border_distance(np.ones((2, 3, 4), np.uint32), (5, 5, 5), 100) == 255).all()
