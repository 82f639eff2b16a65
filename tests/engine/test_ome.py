"""A finished run as other programs read it: valid OME-Zarr, whole in itself."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import yaozarrs
import zarr
from ome_zarr_models import open_ome_zarr

import volseg
from tests.helpers import Quiet, settings
from volseg.errors import UserError
from volseg.io import pyramid, volume


@pytest.fixture(scope="module")
def run(image, tmp_path_factory):
    config = settings(output={"copy_image": True}, cluster={"workers": 1}, blocks={"shape": (8, 96, 100)})
    return volseg.infer(image, str(tmp_path_factory.mktemp("ome") / "run.zarr"), config=config, progress=Quiet())


@pytest.mark.parametrize(
    ("name", "kind"), [("", "Image"), ("labels", "Labels"), ("labels/instances", "ImageLabel"), ("image", "Image")]
)
def test_validators_agree(run, name, kind):
    group = zarr.open_group(run.path, path=name, mode="r")
    assert type(open_ome_zarr(group)).__name__ == kind
    yaozarrs.validate_zarr_store(f"{run.path}/{name}")


def test_levels_are_those_of_the_whole_volume(run, image):
    """Coarser levels, made block by block, against one pass over all."""
    whole = {"": run.probabilities[:], "image": zarr.open_array(f"{image}/0", mode="r")[:]}
    np.testing.assert_array_equal(zarr.open_array(f"{run.path}/image/0", mode="r")[:], whole["image"])
    for name, finest in whole.items():
        above = finest if finest.ndim == 4 else finest[None]
        for level, (_, factor) in list(enumerate(run.run.levels))[1:]:
            above = np.stack([pyramid.downsample_mean(channel, factor) for channel in above])
            stored = zarr.open_array(f"{run.path}/{name}/{level}".replace("//", "/"), mode="r")[:]
            np.testing.assert_array_equal(stored, above if finest.ndim == 4 else above[0])


def test_tensorstore_reads_every_array(run):
    for name in ("0", "1", "image/0", "labels/instances/0"):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{run.path}/{name}/"}}
        stored = tensorstore.open(spec, read=True).result().read().result()
        np.testing.assert_array_equal(stored, zarr.open_array(f"{run.path}/{name}", mode="r")[:])


def test_channels_and_labels_have_names_colors_and_sizes(run):
    image = zarr.open_group(run.path, mode="r").attrs["ome"]
    assert [channel["label"] for channel in image["omero"]["channels"]] == ["mask", "contour"]
    label = zarr.open_group(f"{run.path}/labels/instances", mode="r").attrs["ome"]["image-label"]
    voxels = {row["label-value"]: row["voxels"] for row in label["properties"]}
    assert voxels == dict(zip(run.objects["id"], run.objects["voxels"], strict=True))
    assert [color["label-value"] for color in label["colors"]] == run.objects["id"].tolist()
    assert zarr.open_group(run.path, mode="r").attrs["volseg"]["source"] == run.run.source.path


def test_a_copy_is_a_volume_of_its_own(run, image):
    copy = volume.open(f"{run.path}/image")
    assert copy.voxel_size_nm == volume.open(image).voxel_size_nm
    assert [level.shape for level in volume.levels(copy)] == [shape for shape, _ in run.run.levels]


def test_deciding_anew_keeps_or_changes_levels(run):
    again = volseg.segment(run, settings=["stitch.seed=0.7", "output.levels=2"], progress=Quiet())
    assert len(zarr.open_group(again.path, mode="r").attrs["ome"]["multiscales"][0]["datasets"]) == 2
    open_ome_zarr(zarr.open_group(again.path, mode="r"))
    assert volseg.verify(again, boxes=1).ok
    quiet = Quiet()
    again = volseg.segment(run, settings=["output.copy_image=false"], progress=quiet)
    assert not Path(again.path, "image").exists()
    assert not any("not as it was written" in line for line in quiet.said)


def test_a_copy_without_coarser_levels_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"int64, of which no coarser levels are made.*leave out output\.copy_image"):
        volseg.infer(
            np.ones((4, 64, 64), np.int64),
            str(tmp_path / "run"),
            config=settings(output={"copy_image": True}),
            progress=Quiet(),
        )
