"""On real EM, where it is at hand: sections of EPFL that the shipped model never saw."""

import numpy as np
import pytest
import tifffile

from tests.test_pipeline import Quiet, digest
from volseg import model, pipeline, volume
from volseg.box import Box
from volseg.config import load
from volseg.evaluate import evaluate

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
    config = load(sets=sets, base=model.load_card(model.shipped())["decode"])
    pipeline.infer(str(folder / "training.tif"), str(folder / name), config, overwrite=True, show=Quiet())


@pytest.mark.parametrize(("block", "workers"), [((16, 111, 512), 2), ((5, 320, 512), 2)])
def test_real_labels_do_not_depend_on_blocks_or_workers(part, block, workers):
    run(part, "cut", block=block, workers=workers)
    assert digest(part / "cut") == digest(part / "whole")


def test_the_shipped_model_finds_mitochondria_in_sections_it_never_saw(part):
    known = model.load_card(model.shipped())["training"]["data"][0]
    assert known["name"] == "training.tif"
    assert (known["learn"], max(known["held"])) == (120, 129)
    scores = evaluate(str(part / "whole"), str(part / "training_groundtruth.tif"))
    assert scores["foreground"]["iou"] >= 0.80


def test_probabilities_are_calibrated_bytes(part):
    stored = np.asarray(volume.open_array(str(part / "whole"), "0")[0])
    assert stored.min() < 10
    assert stored.max() > 245
