"""What is chosen of a file, and turned around, is what a run sees: whatever its blocks, its labels are the plain stack's."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.helpers import SHAPE, Quiet, digest, settings
from volseg import api
from volseg.box import Box
from volseg.io import volume


@pytest.fixture(scope="module")
def turned(image, tmp_path_factory):
    """The voxels of ``image``, turned, as channel 1 of time 1 of a hyperstack."""
    plain = volume.open(image).read(Box.from_shape(SHAPE))
    stack = np.zeros((2, SHAPE[0], 2, *SHAPE[1:]), np.uint8)
    stack[1, :, 1], stack[0, :, 0] = 255 - plain, 77
    path = tmp_path_factory.mktemp("turned") / "hyper.tif"
    tifffile.imwrite(path, stack, imagej=True, metadata={"axes": "TZCYX"})
    return path


@pytest.mark.parametrize("block", [None, (8, 64, 170)])
def test_a_turned_channel_of_a_hyperstack_gives_the_labels_of_the_plain_stack(turned, reference, tmp_path, block):
    show = Quiet()
    chosen = {"channel": 1, "time": 1, "invert": True, "voxel_size_nm": volume.open(reference).voxel_size_nm}
    config = settings(cluster={"workers": 1}, input=chosen, blocks={"shape": block})
    run = api.infer(str(turned), str(tmp_path / "run.zarr"), config=config, progress=show)
    assert digest(run.path) == digest(reference)
    stored = json.loads(Path(run.path, "run.json").read_text())["source"]["notes"]
    for words in ("channel 1 of 2 is read", "time 1 of 2 is read", "contrast is turned"):
        assert any(words in line for line in stored), stored
        assert any(words in line for line in show.said), show.said
