"""Columns of the object table that are there where they are asked for."""

import shutil

import numpy as np
import pytest
import zarr

import volseg
from tests.helpers import Quiet, settings
from volseg.errors import UserError

ASKED = "output.measure=['gray','feret']"


def test_gray_values_and_extents_are_the_same_for_every_cutting(reference, image, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run.volseg.zarr")
    before = volseg.open(run).objects
    asked = volseg.segment(run, settings=[ASKED], progress=Quiet())
    found, labels, gray = asked.objects, asked.labels[:], zarr.open_array(f"{image}/0", mode="r")[:]
    assert set(found) - set(before) == {"mean_gray", "feret_nm"}
    for label, mean in zip(found["id"], found["mean_gray"], strict=True):
        assert mean == pytest.approx(gray[labels == label].mean())
    assert (
        found["feret_nm"] >= 0.98 * np.max([found["z1"] - found["z0"], found["x1"] - found["x0"]], axis=0) * 5
    ).all()
    cut = volseg.segment(run, settings=[ASKED, "blocks.shape=[7,70,90]"], progress=Quiet()).objects
    assert all(cut[name].to_numpy().tobytes() == found[name].to_numpy().tobytes() for name in found)
    assert volseg.verify(run, boxes=1).ok
    assert set(volseg.segment(run, settings=["output.measure=[]"], progress=Quiet()).objects) == set(before)


def test_gray_values_that_cannot_be_added_up_are_refused(tmp_path):
    floats = np.ones((4, 64, 64), np.float32)
    config = settings(output={"measure": ["gray"]}, cluster={"dashboard": ""})
    with pytest.raises(UserError, match=r"float32, and means are made of whole numbers alone"):
        volseg.infer(floats, str(tmp_path / "run"), config=config, progress=Quiet())
    with pytest.raises(UserError, match=r"holds probabilities, no gray values; leave gray out"):
        volseg.segment(floats, str(tmp_path / "run"), config=config, progress=Quiet())
