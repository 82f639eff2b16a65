"""Blocks whose labels do_stages not change are left alone when a run is decided anew; what is there is what a fresh run has."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import zarr
from scipy import ndimage

from tests.helpers import Quiet, Stops, decide, digest, do_stages, markers_of, segment_here
from volseg.box import Box
from volseg.config import load
from volseg.engine import folder
from volseg.io import arrays, files, volume

SHAPE = (17, 40, 140)
PLAIN = ["probabilities.mask_channel=0", "fragments.smooth=[0, 0, 0]", "stitch.seed=0.5", "stitch.min_voxels=10",
         "cluster.dashboard=", "cluster.workers=1", "output.levels=3", "blocks.shape=[5, 20, 73]"]  # fmt: skip


def sets(*more):
    return lambda config: load(sets=more, base=config.model_dump(mode="json", exclude={"train"}))


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    field = ndimage.gaussian_filter(np.random.default_rng(8).random(SHAPE), 2)
    path = tmp_path_factory.mktemp("kept") / "mask.tif"
    tifffile.imwrite(path, np.where(field > np.quantile(field, 0.7), 255, 0).astype(np.uint8), photometric="minisblack")
    return str(path)


def same(out, mask, tmp_path, *more):
    """Whether all that a user sees of labels is what a fresh run with these settings has, in one block."""
    fresh = str(tmp_path / "fresh.volseg.zarr")
    shutil.rmtree(fresh, ignore_errors=True)
    segment_here(mask, fresh, load(sets=[*PLAIN, *more, "blocks.shape=[17, 40, 140]"]))
    levels = [f"labels/instances/{k}" for k in range(3)]
    equal = [
        np.array_equal(*(zarr.open_array(f"{run}/{name}", mode="r")[:] for run in (out, fresh))) for name in levels
    ]
    tables = [files.read_bytes(run, "tables/objects.parquet") for run in (out, fresh)]
    return all(equal) and tables[0] == tables[1]


def kept(out, stage="relabel"):
    run = folder.load_run(out)
    return [receipt.kept for _, receipt in sorted(markers_of(replace(run, out=out)).receipts(stage).items())]


def test_a_decision_that_changes_nothing_writes_no_labels(mask, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    segment_here(mask, out, load(sets=PLAIN))
    assert not any(kept(out))
    decide(out, sets("stitch.seed=0.4"), progress=Quiet())  # every voxel is 0 or 1
    assert len(kept(out)) == 16
    assert all(kept(out) + kept(out, "pyramid1") + kept(out, "pyramid2"))
    assert same(out, mask, tmp_path, "stitch.seed=0.4")


def test_back_and_forth_with_stops_between_gives_what_a_fresh_run_has(mask, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    segment_here(mask, out, load(sets=PLAIN))
    first, sizes = digest(out), np.bincount(labels(out).ravel())[1:]
    largest = f"stitch.max_voxels={int(np.sort(sizes)[-2])}"  # drops one object
    decide(out, sets(largest), progress=Quiet())
    assert same(out, mask, tmp_path, largest)
    assert not all(kept(out))
    with pytest.raises(KeyboardInterrupt):
        decide(out, sets("stitch.max_voxels=0"), progress=Stops("pyramid1"))
    half(f"{out}.partial", [f"stitch.min_voxels={int(np.sort(sizes)[2])}", "stitch.max_voxels=0"])
    decide(out, sets("stitch.max_voxels=0", "stitch.min_voxels=10"), progress=Quiet())
    assert digest(out) == first
    assert same(out, mask, tmp_path)
    decide(out, sets("stitch.min_voxels=1000000"), progress=Quiet())
    assert not labels(out).any()
    assert same(out, mask, tmp_path, "stitch.min_voxels=1000000")


def test_labels_that_an_earlier_volseg_began_are_made_anew(mask, tmp_path):
    """It did not write down their type."""
    out = str(tmp_path / "run.volseg.zarr")
    segment_here(mask, out, load(sets=PLAIN))
    files.write_bytes(out, "work/labels.json", b'{"objects": 3}')
    decide(out, sets("stitch.reduce=flat"), progress=Quiet())  # decides no byte, so no key changes
    assert same(out, mask, tmp_path)


def labels(out):
    return volume.open(out, dataset="labels/instances/0").read(Box.from_shape(SHAPE))


def half(out, change):
    """The run at ``out`` is decided anew, but its process ends when some blocks are relabeled, one of them half."""
    old = folder.load_run(out.removesuffix(".partial"))
    run = replace(old, out=out, config=sets(*change)(old.config))
    folder.apply_settings(run)
    do_stages(run, "stitch")
    folder.create_labels(run, markers_of(run))
    do_stages(run, "relabel", some=range(0, 16, 3))
    files.write_bytes(out, "work/stamps/relabel/5", b"")
    arrays.write(arrays.open_array(out, "labels/instances/0"), run.grid[5], np.full(run.grid[5].shape, 77, np.uint32))
