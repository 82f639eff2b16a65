"""Decoding chosen on held-out sections."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from scipy import ndimage

from tests.helpers import Quiet, config_of, segment_here
from tests.training.conftest import Known
from volseg import api
from volseg.box import Box
from volseg.config import Fragments, resolve
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.metrics import score_instances
from volseg.inference import model
from volseg.segmentation.heights import OUTSIDE, block_heights, mask_level
from volseg.training.decoding import (
    THRESHOLDS,
    ValidationSlab,
    annotated_slab,
    best_mask,
    calibrate,
    cut_basins,
    foreground,
    only_sections,
    score_objects,
    threshold_overlaps,
    usual_size,
    validation_slabs,
)
from volseg.training.sources import load_sources
from volseg.training.targets import UNLABELED


def test_calibration_finds_the_threshold_of_a_network_that_knows_the_answer(known):
    config, source, network = known
    found = calibrate(network, [source], config)
    assert found.threshold <= 0.3
    assert found.iou > 0.9
    assert found.tables()["fragments"] == {"threshold": found.threshold, "smooth": list(found.smooth)}


def test_without_held_out_sections_the_settings_stay(known):
    config, source, network = known
    network.forward = lambda images: Known.forward(network, images) + 3
    found = calibrate(network, [replace(source, validation_sections=())], config)
    assert (found.threshold, found.seed, found.min_voxels) == (0.5, config.stitch.seed, config.stitch.min_voxels)
    assert found.scores() == {}


def test_a_network_that_is_hardly_sure_is_not_decoded_to_nothing(known):
    """Without held-out sections, those learned from mend threshold and seed of a network that gives 0.3 inside."""
    config, source, network = known
    every = tuple(range(len(source.labels)))
    taught = replace(source, validation_sections=(), train_sections=every)
    found = calibrate(network, [taught], config)
    assert found.taught
    assert 0.2 <= found.threshold <= 0.3
    assert (found.scores(), found.pq) == ({}, None)
    network.forward = lambda images: Known.forward(network, images) + 3
    sure = calibrate(network, [taught], config)
    assert (sure.taught, sure.threshold, sure.seed) == (False, config.fragments.threshold, config.stitch.seed)


def test_objects_on_both_sides_of_a_gap_are_scored_apart(tables, tmp_path):
    """A rod that nobody annotated in the middle is two true objects, and not merged by a prediction that joins them."""
    slab = replace(two_balls(0), labels=(two_balls(0).labels > 0).astype(np.uint32))
    gap = np.where(np.isin(np.arange(8), (0, 1, 6, 7))[:, None, None], slab.labels, UNLABELED).astype(np.uint32)
    gap[6:][gap[6:] == 1] = 2
    rows = score_objects([replace(slab, labels=gap)], config_of(tables, tmp_path))
    assert rows[0]["pq"] > 0.9


def test_slabs_are_runs_of_consecutive_sections(known):
    config, source, network = known
    found = list(validation_slabs(network, replace(source, validation_sections=(1, 2, 5, 7)), 3, config))
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


def cubes(side, count):
    """A slab of cubes in a row along x, before them as many quarters that a face cuts, and a false speck after each."""
    chance = np.zeros((2, 3 * side, 2 * side, 2 * side * count), np.uint8)
    for z, edge in ((side, side), (0, side // 2)):
        for i in range(count):
            chance[0, z : z + edge, 2 : 2 + side, 2 * side * i : 2 * side * i + edge] = 250
    labels = ndimage.label(chance[0])[0].astype(np.uint32)
    for i in range(count):
        chance[0, side, -3:-1, 2 * side * i + 1 : 2 * side * i + 3] = 250
    return ValidationSlab(chance, labels, 0, 1.0)


def test_sizes_are_those_of_objects_that_annotated_sections_confirm(tables, tmp_path):
    """Neither specks nor a splinter of a cube make them smaller than what the cut quarters seem to be."""
    config = config_of(tables, tmp_path)
    config = config.model_copy(update={"fragments": config.fragments.model_copy(update={"smooth": (0, 0, 0)})})
    slab = cubes(8, 6)
    slab.probability[0, :, :, 6] = 0
    slab = only_sections(slab, (1, 2, 8, 9))
    size = usual_size(cut_basins(slab, config.fragments), config, slab.voxel_size_nm)
    assert size == int(8 * 4 * 4 + (8 * 4) ** 1.5) // 8
    assert only_sections(slab, (99,)) is None
    assert usual_size(cut_basins(only_sections(slab, (23,)), config.fragments), config, slab.voxel_size_nm) is None


def test_held_out_sections_are_scored_among_the_objects_that_they_are_part_of(known):
    """Two held-out sections show specks, and yet sizes are those of the volume."""
    config, source, network = known
    network.forward = lambda images: Known.forward(network, images) + 3
    around = annotated_slab(network, source, 0, config)
    assert around.labels.shape == source.labels.shape
    held_out = only_sections(around, source.validation_sections)
    (slab,) = validation_slabs(network, source, 0, config)
    np.testing.assert_array_equal(held_out.probability[:, list(source.validation_sections)], slab.probability)
    assert (held_out.labels != UNLABELED).any(axis=(1, 2)).sum() == len(source.validation_sections)
    whole, part = (cut_basins(each, config.fragments)[0].voxels.max() for each in (held_out, slab))
    assert whole > part


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
    level = np.array([mask_level(t) for t in (0.1, 0.5, 0.9, 0.9, 0.9)], np.uint16)
    both, either = threshold_overlaps(level, np.array([0, 1, 1, 0, UNLABELED], np.uint32))
    assert both[0] / either[0] == pytest.approx(2 / 3)
    assert both[-1] / either[-1] == pytest.approx(1 / 3)
    at_half = int(np.argmin(abs(THRESHOLDS - 0.5)))
    assert both[at_half] == 2
    assert both[at_half + 1] == 1


@pytest.mark.parametrize("smooth", [(0, 0, 0), (2, 2, 2), (0, 1, 3), (3, 0, 1)])
@pytest.mark.parametrize("threshold", [0.0, 0.31, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(5, 40, 50), (1, 33, 16), (2, 3, 1)])
def test_the_foreground_is_where_a_run_has_heights(smooth, threshold, shape):
    rng = np.random.default_rng(sum(shape))
    probability = rng.integers(0, 256, (2, *shape), np.uint8) * (rng.random(shape) < 0.8).astype(np.uint8)
    settings = Fragments(smooth=smooth, threshold=threshold)
    height = block_heights(probability, Box.from_shape(shape), shape, settings)[1:-1, 1:-1, 1:-1]
    np.testing.assert_array_equal(foreground(probability, settings), height != OUTSIDE)


def test_a_slab_holds_the_probabilities_that_a_run_stores(whole_run, tables, tmp_path):
    """In several tiles: both cut, standardize, blend and round alike."""
    path, out = whole_run[0] / "model.safetensors", str(tmp_path / "run.volseg.zarr")
    predict = {"model": str(path), "backend": "torch", "precision": "fp32", "tile": 64, "overlap": 32}
    tables = {"predict": predict, "train": {**tables, "precision": "fp32"}, "blocks": {"shape": [3, 40, 96]}}
    config = resolve(("test", {**tables, "cluster": {"workers": 1, "dashboard": ""}}))
    api.infer(config.train.data[0].image, out, config=config, progress=Quiet())
    network = model.load(path)[0].to(memory_format=torch.channels_last)
    (slab,) = validation_slabs(network, *load_sources(config.train), 0, config)
    stored = zarr.open_array(f"{out}/0", mode="r")[:, 6:8]
    assert len(np.unique(stored)) > 50
    np.testing.assert_array_equal(slab.probability, stored)


def test_scores_of_a_decoding_are_those_of_a_run_with_it(known, tmp_path):
    """Calibration decides as runs do: a run of the held-out sections has the very foreground and objects."""
    config, source, _ = known
    network = Known(source)
    network.forward = lambda images: Known.forward(network, images) + 3
    chosen = calibrate(network, [source], config)
    (slab,) = validation_slabs(network, source, 0, config)
    path = str(tmp_path / "probability.zarr")
    zarr.create_array(path, data=slab.probability)
    channels = {"probabilities": {"mask_channel": 0, "contour_channel": 1}, "blocks": {"shape": [1, 40, 50]}}
    truth = slab.labels

    def run(name, **stitch):
        tables = chosen.tables()
        decided = resolve(("test", {**channels, **tables, "stitch": {**tables["stitch"], **stitch}}))
        segment_here(path, str(tmp_path / name), decided)
        return zarr.open_array(str(tmp_path / name / "labels/instances/0"), mode="r")[:]

    labels = run("objects.volseg.zarr")
    assert chosen.pq == score_instances(Contingency.from_labels(truth, labels)).pq > 0
    every = run("foreground.volseg.zarr", keep_unseeded=True, min_voxels=0) > 0
    assert chosen.iou == (every & (truth > 0)).sum() / (every | (truth > 0)).sum()
    fragments = config.fragments.model_copy(update={"threshold": chosen.threshold, "smooth": chosen.smooth})
    np.testing.assert_array_equal(every, foreground(slab.probability, fragments))
