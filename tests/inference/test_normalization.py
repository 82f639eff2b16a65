"""The constants by which a volume is standardized."""

import numpy as np
import pytest

from volseg.inference.normalization import gray_levels, gray_statistics
from volseg.io import volume


def _of(image):
    return gray_statistics(image.shape, lambda box: image[box.slices])


def test_padding_does_not_enter():
    image = np.zeros((3, 10, 10), np.uint8)
    image[1, :5] = 100
    image[1, 5:] = 140
    assert _of(image) == (120.0, 20.0)


def test_a_volume_without_contrast_has_a_deviation_of_1():
    assert _of(np.zeros((1, 4, 4), np.uint8)) == (0.0, 1.0)
    assert _of(np.full((2, 4, 4), 7, np.uint8)) == (7.0, 1.0)


def test_patches_are_spread_over_a_large_plane():
    image = np.arange(1, 31, dtype=np.uint16)[:, None, None] * np.ones((1, 8, 8), np.uint16)
    mean, _ = _of(image)
    assert mean == pytest.approx(15.5, abs=0.5)


def test_counted_grays_give_the_sums_bit_for_bit():
    image = np.random.default_rng(0).integers(0, 256, (9, 70, 80), np.uint8)
    assert _of(image) == _of(image.astype(np.uint16))


def _levels(image, padding="auto"):
    return gray_levels(image.shape, lambda box: image[box.slices], padding)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_a_value_that_fills_the_border_is_padding(dtype):
    image = np.random.default_rng(0).integers(1, 120, (6, 40, 40)).astype(dtype)
    inside = image[:, 8:-8, 8:-8]
    plain = _levels(image)
    lowest = 0 if image.dtype.kind == "u" else -2000
    for value in (255, lowest, 128, 60):
        padded = np.full_like(image, value)
        padded[:, 8:-8, 8:-8] = inside
        found = _levels(padded)
        assert (found.mean, found.std) == pytest.approx(
            (_levels(inside).mean, _levels(inside).std), rel=1e-2 if value == 60 else 1e-6
        )
        assert found.padding == ((0.0, value) if value else (0.0,))
        assert "padding" in " ".join(found.notes("v.tif"))
        narrow = image.copy()
        narrow[:, :, :16] = value  # less than half of the border, and more than a quarter
        assert _levels(narrow).padding == ((0.0, value) if value not in (0, 60) else (0.0,))
    assert (plain.padding, plain.notes("v.tif")) == ((0.0,), ())


def test_a_value_given_is_padding_beside_0_and_none_is_none():
    image = np.full((1, 10, 10), 50, np.uint8)
    image[0, 3:5], image[0, 5:7], image[0, 7:] = 100, 140, 0
    assert (_levels(image, 50.0).mean, _levels(image, 50.0).padding) == (pytest.approx(120.0), (0.0, 50.0))
    assert _levels(image, 0.0).padding == (0.0,)
    assert (_levels(image, "none").mean, _levels(image).mean) == (pytest.approx(63.0), pytest.approx(90.0))
    assert "50" in _levels(image, 50.0).notes("v.tif")[0]


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_volume_is_told(value):
    (note,) = _levels(np.full((3, 10, 10), value, np.uint8)).notes("v.tif")
    assert f"v.tif has the value {value} in every voxel" in note


def test_saturated_voxels_inside_are_no_padding():
    image = np.random.default_rng(0).integers(1, 200, (6, 40, 40), np.uint8)
    image[:, 5:20, 5:20] = 255
    assert _levels(image).padding == (0.0,)


NOISE = np.random.default_rng(0).normal(120, 20, (6, 96, 128)).clip(1, 254).astype(np.uint8)
PARTS = np.where(NOISE < 255, (np.arange(96)[:, None] // 24 + np.arange(128) // 32).astype(np.uint8), 0)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (NOISE, False),
        (NOISE[:, :24, :32].repeat(4, 1).repeat(4, 2), False),  # enlarged
        (np.where(np.arange(128) < 110, 128, NOISE).astype(np.uint8), False),  # filled up
        (NOISE // 32 * 32, False),
        (np.float32(NOISE) / 255, False),
        (PARTS, True),
        (PARTS.astype(np.int32) * 70_000, True),
        (np.where(PARTS == 4, 255, 0).astype(np.uint8), True),
        (PARTS * np.float32(0.5), True),
        (np.zeros_like(NOISE), False),
    ],
)
def test_labels_and_masks_are_told_from_images(image, told):
    notes = gray_levels(image.shape, lambda box: image[box.slices]).notes("em.tif")
    assert any("looks like labels or a mask" in note for note in notes) == told


def test_real_em_draws_no_note_and_its_labels_do(shared_data):
    for name, told in (("epfl/training", False), ("epfl/training_groundtruth", True)):
        opened = volume.open(shared_data / f"{name}.tif")
        notes = gray_levels(opened.shape, opened.read).notes("em.tif")
        assert any("looks like labels" in note for note in notes) == told
    for name, told in (("vnc/raw", False), ("vnc/mitochondria", True)):
        opened = volume.open(shared_data / name)
        assert bool(gray_levels(opened.shape, opened.read).notes("em.tif")) == told


def test_sections_that_were_lost_are_told():
    image = np.random.default_rng(0).integers(1, 255, (48, 40, 50), np.uint8)
    image[::2] = 0
    found = gray_levels(image.shape, lambda box: image[box.slices])
    assert found.blank > 5
    assert any("are of one gray value; one between two others is seen" in note for note in found.notes("em.tif"))
    plain = gray_levels(image.shape, lambda box: image[box.slices], "none")
    assert any("are of one gray value; seen as they are" in note for note in plain.notes("em.tif"))
    black = np.zeros_like(image)
    assert not gray_levels(black.shape, lambda box: black[box.slices]).blank
    assert not gray_levels((20, 40, 50), lambda box: image[box.slices]).blank, "each is looked at more than once"


@pytest.mark.parametrize(("dtype", "value"), [("int16", -32768), ("float32", -9999), ("uint8", 255)])
def test_a_second_value_of_padding_is_found_beside_0(dtype, value):
    image = np.random.default_rng(0).integers(50, 150, (6, 60, 60)).astype(dtype)
    inside = image[:, 10:-10, 10:-10].copy()
    image[:] = 0
    image[:, :, 38:] = value
    image[:, 10:-10, 10:-10] = inside
    found = _levels(image)
    assert set(found.padding) == {0.0, float(value)}
    assert found.mean == pytest.approx(_levels(inside).mean, rel=1e-6)
