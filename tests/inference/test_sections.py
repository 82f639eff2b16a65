"""Sections through a network: what is cut, predicted and blended."""

import numpy as np
import pytest

from volseg.inference.sections import blend_sections, predict_sections, predict_sections_uint8, varying_tiles
from volseg.inference.tiles import Blend, Slab, grid

PLANE = (70, 96)
TILES = grid(PLANE, 64, 32)


def first_channel(batch):
    """A network whose one head is what it sees of the section below."""
    return batch[:, :1]


def slab(depth=5):
    """Random sections, of which number 3 and its neighbors are constant."""
    voxels = np.random.default_rng(0).integers(0, 256, (depth, *PLANE), np.uint8)
    voxels[2:5] = 7
    return Slab(voxels, (0, 0, 0), 1, depth)


def test_blended_tiles_that_agree_are_what_each_says():
    predicted = predict_sections(first_channel, slab(), [0, 2], grid=TILES, heads=1, scale=(0.0, 1 / 255))
    assert predicted.shape == (1, 2, *PLANE)
    np.testing.assert_allclose(predicted[0] * 255, slab().voxels[[0, 1]], atol=1e-3)


def test_a_section_that_shows_nothing_is_0_and_its_tiles_are_not_predicted():
    predicted = predict_sections(first_channel, slab(), [3], grid=TILES, heads=1, scale=(0.0, 1 / 255))
    assert not predicted.any()
    keys = [(z, tile) for z in range(5) for tile in TILES.overlapping(slice(0, 70), slice(0, 96))]
    assert {z for z, _ in varying_tiles(slab(), TILES, keys)} == {0, 1, 2}


def test_stored_values_are_rounded_probabilities():
    told = {"grid": TILES, "heads": 1, "scale": (0.0, 1 / 255)}
    stored = predict_sections_uint8(first_channel, slab(), [0, 1, 3], **told)
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(stored[0], np.stack([slab().voxels[0], slab().voxels[0], np.zeros(PLANE)]))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_each_section_comes_when_it_is_whole_with_the_number_of_its_tiles(batch):
    plane = slice(0, 70), slice(0, 96)
    keys = [(z, tile) for z in (0, 1, 2) for tile in TILES.overlapping(*plane)][:-1]
    blend, phases, sums = Blend(1, TILES, *plane), [], []

    class Phase:
        def __init__(self, name):
            phases.append(name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    told = {"scale": (0.0, 1.0), "batch": batch, "threads": 2, "timed": Phase}
    for z, count in blend_sections(first_channel, slab(), keys, blend, **told):
        sums.append((z, count))
        blend.mean()
    each = len(TILES.overlapping(*plane))
    assert sums == [(0, each), (1, each), (2, each - 1)]
    assert phases.count("blend") == len(keys)
    assert phases.count("cut") == -(-len(keys) // batch) + 1
