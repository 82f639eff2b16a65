"""Decoding chosen on held-out sections."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers import config_of
from volseg.training import decoding
from volseg.training.decoding import (
    ValidationSlab,
    best_mask,
    calibrate,
    overlaps,
    score_objects,
    smooth,
    validation_slabs,
)
from volseg.training.targets import UNLABELED


def test_calibration_finds_the_threshold_of_a_network_that_knows_the_answer(known):
    config, source, network = known
    found = calibrate(network, [source], config)
    assert found.threshold <= 0.3
    assert found.iou > 0.9
    assert found.tables()["fragments"] == {"threshold": found.threshold, "smooth": list(found.smooth)}


def test_without_held_out_sections_the_settings_stay(known):
    config, source, network = known
    found = calibrate(network, [replace(source, validation_sections=())], config)
    assert (found.threshold, found.seed, found.min_voxels) == (0.5, config.stitch.seed, config.stitch.min_voxels)
    assert found.scores() == {}


def test_slabs_are_runs_of_consecutive_sections(known):
    config, source, network = known
    found = list(validation_slabs(network, replace(source, validation_sections=(1, 2, 5, 7)), 3, config.train))
    assert [slab.probability.shape for slab in found] == [(2, 2, 96, 96), (2, 1, 96, 96), (2, 1, 96, 96)]
    np.testing.assert_array_equal(found[0].labels, source.labels[1:3])
    assert found[0].source == 3


def two_balls(gap):
    """A slab of two touching objects with a dip of ``gap`` in the probability between them, and a speck."""
    chance = np.zeros((2, 8, 32, 64), np.uint8)
    labels = np.zeros((8, 32, 64), np.uint32)
    chance[0, :, 8:24, 8:56] = 250
    chance[0, :, 8:24, 31:33] = 250 - gap
    chance[0, 3:5, 28:31, 2:5] = 250
    labels[:, 8:24, 8:32], labels[:, 8:24, 32:56] = 1, 2
    return ValidationSlab(chance, labels, 0, 1.0)


def test_seed_and_size_are_those_that_give_the_true_objects(tables, tmp_path):
    config = config_of(tables, tmp_path)
    own = config.model_copy(
        update={"stitch": config.stitch.model_copy(update={"min_voxels": 0}),
                "fragments": config.fragments.model_copy(update={"smooth": (0, 0, 0)})}
    )  # fmt: skip
    rows = score_objects([two_balls(60)], own)
    assert rows[0]["pq"] > 0.9
    assert rows[0]["seed"] > 190 / 255
    assert rows[0]["min_voxels"] > 0
    twice = score_objects([two_balls(60), two_balls(60)], own)
    assert twice[0] == pytest.approx(rows[0])


def test_settings_stay_where_nothing_is_gained(tables, tmp_path):
    config = config_of(tables, tmp_path)
    slab = two_balls(0)
    slab = replace(slab, labels=(slab.labels > 0).astype(np.uint32))
    assert score_objects([slab], config)[0]["seed"] == config.stitch.seed
    assert score_objects([slab], config)[0]["min_voxels"] == config.stitch.min_voxels
    assert best_mask([slab], config.fragments)[0] == config.fragments.smooth


def test_smoothing_is_dropped_where_it_harms(tables, tmp_path):
    rng = np.random.default_rng(0)
    labels = (rng.random((3, 64, 64)) < 0.3).astype(np.uint32)
    chance = np.stack([labels * 200, labels * 0]).astype(np.uint8)
    passes, threshold, curve = best_mask(
        [ValidationSlab(chance, labels, 0, 1.0)], config_of(tables, tmp_path).fragments
    )
    assert passes == (0, 0, 0)
    assert curve.max() == 1.0
    assert threshold <= 0.78


def test_overlaps_are_those_of_each_threshold():
    both, either = overlaps(
        np.array([0.1, 0.5, 0.9, 0.9, 0.9], np.float32), np.array([0, 1, 1, 0, UNLABELED], np.uint32)
    )
    assert both[0] / either[0] == pytest.approx(2 / 3)
    assert both[-1] / either[-1] == pytest.approx(1 / 3)
    at_half = int(np.argmin(abs(decoding.THRESHOLDS - 0.5)))
    assert both[at_half] == 2
    assert both[at_half + 1] == 1


def test_smoothing_keeps_constants_and_spreads_a_point():
    np.testing.assert_allclose(smooth(np.full((3, 4, 5), 0.25, np.float32), (2, 2, 2)), 0.25, rtol=1e-6)
    point = np.zeros((5, 5, 5))
    point[2, 2, 2] = 1
    np.testing.assert_allclose(smooth(point, (1, 0, 0))[:, 2, 2], [0, 0.25, 0.5, 0.25, 0])
