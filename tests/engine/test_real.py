"""On real EM, where it is at hand: sections of EPFL that the shipped model never saw."""

import numpy as np
import pytest
import tifffile
from skimage.measure import label
from skimage.segmentation import watershed

from tests.helpers import Quiet, digest
from volseg import api
from volseg.box import Blocks, Box
from volseg.config import Fragments, load
from volseg.evaluation.evaluate import evaluate
from volseg.inference import model
from volseg.io import arrays, volume
from volseg.segmentation import stitch
from volseg.segmentation.basins import watershed_block
from volseg.segmentation.heights import OUTSIDE, block_heights, seed_height
from volseg.segmentation.rules import Rules, label_basins

PART = Box((140, 200, 400), (156, 520, 912))


@pytest.fixture(scope="module")
def part(shared_data, tmp_path_factory):
    """Image and truth of a part of EPFL as TIFF, and its run in one block."""
    folder = tmp_path_factory.mktemp("epfl")
    for name in ("training", "training_groundtruth"):
        voxels = volume.open(str(shared_data / f"epfl/{name}.tif")).read(PART)
        tifffile.imwrite(folder / f"{name}.tif", voxels, photometric="minisblack")
    run(folder, "whole", block=PART.shape)
    return folder


def run(folder, name, *, block, workers=1):
    sets = [f"blocks.shape={list(block)}", f"cluster.workers={workers}", 'cluster.dashboard=""', "predict.tile=256"]
    config = load(sets=sets, base=model.load_card(model.shipped()).decode)
    api.infer(str(folder / "training.tif"), str(folder / name), config=config, overwrite=True, progress=Quiet())


@pytest.mark.parametrize(("block", "workers"), [((16, 111, 512), 2), ((5, 320, 512), 2)])
def test_real_labels_do_not_depend_on_blocks_or_workers(part, block, workers):
    run(part, "cut", block=block, workers=workers)
    assert digest(part / "cut") == digest(part / "whole")


def test_the_shipped_model_finds_mitochondria_in_sections_it_never_saw(part):
    known = model.load_card(model.shipped()).training.data[0]
    assert known.name == "training.tif"
    assert (known.learn, max(known.held)) == (120, 129)
    scores = evaluate(str(part / "whole"), str(part / "training_groundtruth.tif"))
    assert scores.foreground.iou >= 0.80


def test_probabilities_are_calibrated_bytes(part):
    stored = np.asarray(arrays.open_array(str(part / "whole"), "0")[0])
    assert stored.min() < 10
    assert stored.max() > 245


def test_the_forest_agrees_with_a_watershed_of_the_whole_volume(part):
    """scikit-image with the same seeds: it may differ where heights tie, on at most 1 % of the mask."""
    stored = arrays.open_array(str(part / "whole"), "0")
    probability = np.asarray(stored[:])
    options = Fragments(threshold=0.5, smooth=(2, 2, 2))
    height = block_heights(probability, Box.from_shape(PART.shape), PART.shape, options)
    level = seed_height(0.8, options)
    ours = labeled(height, probability[0], level)
    height = height[1:-1, 1:-1, 1:-1]
    mask = height != OUTSIDE
    seeds = label(height <= level, connectivity=1)
    theirs = watershed(np.where(mask, height, 0), seeds, mask=mask, connectivity=1)
    pairs = np.unique(np.stack([seeds, ours])[:, seeds > 0], axis=1)
    assert len(set(pairs[0])) == len(set(pairs[1])) == pairs.shape[1]
    name = np.zeros(seeds.max() + 1, int)
    name[pairs[0]] = pairs[1]
    assert np.mean(name[theirs][mask] == ours[mask]) >= 0.99


def labeled(height, mass, level):
    """Labels of one block that is the whole volume."""
    region, table = watershed_block(height, mass, Box.from_shape(PART.shape), PART.shape)
    alone = stitch.link(0, [table].__getitem__, Blocks(PART.shape, PART.shape))
    basins, basin_of = stitch.gather([table], [alone])
    return np.r_[0, label_basins(basins, Rules(level))[basin_of[0]]][region]
