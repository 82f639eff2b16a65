"""The constants by which a volume is standardized."""

import numpy as np
import pytest

from volseg.inference.normalization import gray_statistics


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
