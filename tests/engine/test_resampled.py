"""Runs of volumes whose voxels are not the model's: the same labels for every cutting, in both spaces."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

import volseg
from tests.helpers import SHAPE, Quiet, settings, write_volume
from volseg import api
from volseg.box import Box
from volseg.evaluation.calibrate import calibrate
from volseg.evaluation.review import review
from volseg.io import corrections, volume

NM = (5.0, 10.0, 10.0)
BEGIN = (100.0, 30.0, -20.0)  # in the world, of the center of its first voxel
ROI = "1:20,7:70,3:80"


@pytest.fixture(scope="module")
def coarse(image, tmp_path_factory):
    """The volume of all tests with voxels twice as large in the plane."""
    gray = zarr.open_array(f"{image}/0", mode="r")[:]
    mean = gray.reshape(SHAPE[0], SHAPE[1] // 2, 2, SHAPE[2] // 2, 2).mean((2, 4)).round().astype(np.uint8)
    return write_volume(str(tmp_path_factory.mktemp("coarse") / "em.zarr"), mean, NM, BEGIN)


def infer(path, out, progress=None, **sections):
    sections = {"blocks": {}, "output": {}, "input": {}, **sections}
    return volseg.infer(
        path, str(out), config=settings(cluster={"workers": 1}, **sections), progress=progress or Quiet()
    )


@pytest.fixture(scope="module")
def own(coarse, tmp_path_factory):
    """The run in the model's space."""
    return infer(coarse, tmp_path_factory.mktemp("own") / "run.zarr", output={"space": "model"})


@pytest.fixture(scope="module")
def restored(coarse, tmp_path_factory):
    quiet = Quiet()
    run = infer(coarse, tmp_path_factory.mktemp("restored") / "run.zarr", quiet)
    assert any("the model's 5 x 5 x 5 nm: it is taken, resampled to 5 x 5 x 5 nm" in line for line in quiet.said)
    return run


def same(a, b):
    for name in ("labels", "probabilities"):
        np.testing.assert_array_equal(getattr(a, name)[:], getattr(b, name)[:])
    assert a.objects.equals(b.objects)


@pytest.mark.parametrize(
    ("space", "block"), [("model", (7, 64, 64)), ("source", (7, 64, 64)), ("source", (22, 37, 101))]
)
def test_cutting_changes_nothing_in_either_space(coarse, own, restored, tmp_path, space, block):
    run = infer(coarse, tmp_path / "run.zarr", output={"space": space}, blocks={"shape": block})
    same(run, own if space == "model" else restored)
    assert volseg.verify(run, boxes=2).ok


def test_a_source_voxel_has_the_label_at_its_middle(own, restored):
    assert own.labels.shape == SHAPE
    assert restored.shape == restored.labels.shape == (SHAPE[0], SHAPE[1] // 2, SHAPE[2] // 2)
    np.testing.assert_array_equal(restored.labels[:], own.labels[:][:, 1::2, 1::2])
    counts = np.bincount(restored.labels[:].ravel())
    assert restored.objects["voxels"].tolist() == counts[restored.objects["id"]].tolist()
    assert restored.object_count == np.count_nonzero(counts[1:])


def test_scales_and_shifts_place_all_arrays_in_one_space(own, restored):
    for run in (own, restored):
        probability = volume.open_channels(run.path, dataset="0")[0]
        assert probability.voxel_size_nm == pytest.approx((5.0, 5.0, 5.0))
        assert volume.open(run.path).voxel_size_nm == run.voxel_size_nm
        first = zarr.open_group(run.path, mode="r").attrs["ome"]["multiscales"][0]["datasets"][0]
        assert first["coordinateTransformations"][1]["translation"] == [0.0, 100.0, 27.5, -22.5]
    labels = zarr.open_group(f"{own.path}/labels/instances", mode="r").attrs["ome"]["multiscales"][0]["datasets"][0]
    assert labels["coordinateTransformations"][1]["translation"] == [100.0, 27.5, -22.5]
    labels = zarr.open_group(f"{restored.path}/labels/instances", mode="r").attrs["ome"]["multiscales"][0]["datasets"]
    assert [level["coordinateTransformations"][1]["translation"] for level in labels] == [
        [*BEGIN],
        [102.5, 30, -20],
        [107.5, 35, -15],
    ]
    assert own.origin_nm == (100.0, 27.5, -22.5)
    assert restored.origin_nm == volume.open(restored.path).origin_nm == BEGIN


def test_objects_are_corrected_by_points_of_either_grid_and_by_labels(restored, tmp_path):
    run = volseg.open(shutil.copytree(restored.path, tmp_path / "run.zarr"))
    found = review(run, 4)
    given = corrections.read(found.corrections)
    asked = json.loads(Path(found.corrections).read_text())["corrections"]
    assert given.shape == SHAPE  # saddles are voxels of the grid in which was decided
    turned = {"join": "split", "border": "join"}
    entries = [
        {"do": turned[one.kind], "points": each["points"]} for one, each in zip(found.decisions, asked, strict=True)
    ]
    file = corrections.header(given.run, given.labels, given.shape)
    assert api.segment(run, corrections={**file, "corrections": entries}, progress=Quiet()).object_count > 1
    result = volseg.verify(run)
    assert result.ok, str(result)
    assert sum(result.corrections) == len(entries) == 4
    api.segment(run, corrections="none", progress=Quiet())
    same(run, restored)
    one, two = run.objects.sort_values("voxels")["id"].to_list()[-2:]
    points = [[int(n) for n in np.argwhere(run.labels[:] == label)[9]] for label in (one, two)]
    by_labels = {**file, "corrections": [{"do": "join", "labels": [one, two]}]}
    by_points = {**file, "shape": list(run.shape), "corrections": [{"do": "join", "points": points}]}
    joined = [api.segment(run, corrections=each, progress=Quiet()).labels[:] for each in (by_points, "none", by_labels)]
    np.testing.assert_array_equal(joined[0], joined[2])
    np.testing.assert_array_equal(joined[1], restored.labels[:])
    assert np.unique(joined[0][np.isin(joined[1], [one, two])]).size == 1


def test_region_and_mask_are_given_in_the_source(coarse, restored, tmp_path):
    mask = np.zeros(restored.shape, np.uint8)
    mask[2:, 10:60] = 1
    tifffile.imwrite(tmp_path / "mask.tif", mask)
    runs = [
        infer(coarse, tmp_path / f"{k}.zarr", input={"roi": ROI, "mask": str(tmp_path / "mask.tif")}, blocks=blocks)
        for k, blocks in enumerate(({}, {"shape": (7, 64, 64)}))
    ]
    same(*runs)
    wanted = np.zeros(restored.shape, bool)
    wanted[Box.parse(ROI).slices] = True
    labels = runs[0].labels[:]
    assert labels.any()
    assert not labels[~(wanted & (mask > 0))].any()
    assert runs[0].origin_nm == BEGIN  # a region does not begin a volume of its own
    assert volseg.verify(runs[0], boxes=3).ok


def test_other_commands_know_both_grids(restored):
    again = volseg.segment(restored, settings=["stitch.seed=0.75"], progress=Quiet())
    assert volseg.verify(again, boxes=3).ok
    truth = again.labels[:]
    assert volseg.evaluate(again, truth).foreground.iou == 1
    scores = calibrate(again, truth)
    assert next(c for c in scores.candidates if c.own).pq == 1
    for decision in review(again, top=2).decisions:
        assert (decision.z, decision.y, decision.x) < again.shape
        assert all(place < n for place, n in zip((decision.z, decision.y, decision.x), again.shape, strict=True))
    assert again.show().size == (2 * again.shape[2], again.shape[1])


def test_space_is_decided_anew_and_the_source_may_be_gone(coarse, own, tmp_path):
    source = shutil.copytree(coarse, tmp_path / "em.zarr")
    run = infer(str(source), tmp_path / "run.zarr", output={"space": "model", "copy_image": True})
    np.testing.assert_array_equal(run.labels[:], own.labels[:])
    run = volseg.segment(run, settings=["output.space=source"], progress=Quiet())
    gray = zarr.open_array(f"{source}/0", mode="r")[:]
    np.testing.assert_array_equal(run.labels[:], own.labels[:][:, 1::2, 1::2])
    shutil.rmtree(source)
    api.clean(run)
    run = volseg.segment(run, recompute=True, progress=Quiet())
    np.testing.assert_array_equal(run.labels[:], own.labels[:][:, 1::2, 1::2])
    np.testing.assert_array_equal(zarr.open_array(f"{run.path}/image/0", mode="r")[:], gray)
    assert run.show().size == (2 * run.shape[2], run.shape[1])


LARGER = {"input": {"voxel_size_nm": (5, 5, 10), "resample": "off"}, "stitch": {"min_voxels": 101}}


@pytest.fixture(scope="module")
def larger(image, tmp_path_factory):
    """A run whose voxels are twice as large as those of its model, and what was said of it."""
    quiet = Quiet()
    return infer(image, tmp_path_factory.mktemp("larger") / "run.zarr", quiet, **LARGER), quiet.said


def brought_up_to_date(image, run):
    """The run, inferred again with the same settings, and what was said of it."""
    quiet = Quiet()
    config = settings(**LARGER, cluster={"workers": 1})
    return volseg.infer(image, run, config=config, update=True, progress=quiet), quiet.said


def test_rules_count_the_models_voxels_whatever_command_takes_them(image, larger, tmp_path):
    run, said = larger
    assert run.config.stitch.min_voxels == 101
    assert any("stitch.min_voxels = 101 are 51" in line for line in said)
    voxels = run.objects["voxels"].sort_values().to_list()
    run = volseg.open(shutil.copytree(run.path, tmp_path / "run.zarr"))
    middle = voxels[len(voxels) // 2]
    assert voxels[0] < middle < voxels[-1]
    for wanted, least in ((2 * middle, middle), (2 * middle + 1, middle + 1)):
        quiet = Quiet()
        again = volseg.segment(run, settings=[f"stitch.min_voxels={wanted}"], progress=quiet)
        assert any(f"stitch.min_voxels = {wanted} are {least}" in line for line in quiet.said)
        assert again.objects["voxels"].min() == next(n for n in voxels if n >= least)
    assert volseg.verify(again, boxes=2).ok
    own = next(each for each in calibrate(again, again.labels[:]).candidates if each.own)
    assert (own.pq, own.min_voxels) == (1, 2 * middle + 1)
    again, said = brought_up_to_date(image, run.path)
    assert any("stitch.min_voxels = 101 was" in line for line in said)
    assert again.objects["voxels"].sort_values().to_list() == voxels


def test_a_run_that_counts_its_own_voxels_is_brought_up_to_date_in_those(image, larger, tmp_path):
    """As runs of an earlier state do, whose settings were scaled when they were stored."""
    path = shutil.copytree(larger[0].path, tmp_path / "run.zarr")
    for file in (path / "run.json", path / "work" / "run.json"):
        plain = json.loads(file.read_text())
        del plain["rule_voxel_nm"]
        plain["config"]["stitch"]["min_voxels"] = 51
        file.write_text(json.dumps(plain))
    assert any("nothing is done" in line for line in brought_up_to_date(image, str(path))[1])
