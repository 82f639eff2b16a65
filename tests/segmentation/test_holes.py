"""Cavities are filled in whole runs: bytes do not see the blocks, and only stitch and relabel run again."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from tests.helpers import Quiet, decide, digest, segment_here
from volseg.box import Box
from volseg.config import load
from volseg.evaluation import calibrate
from volseg.evaluation.recheck import check_box
from volseg.evaluation.stored import open_stored
from volseg.evaluation.verify import verify
from volseg.io import arrays, volume

SHAPE = (21, 60, 70)
PLAIN = ["probabilities.mask_channel=0", "fragments.smooth=[0, 0, 0]", "stitch.seed=0.5", "stitch.min_voxels=200",
         "cluster.dashboard=", "cluster.workers=1", "output.levels=2"]  # fmt: skip


def volume_with_cavities():
    """Blobs with holes of many sizes, uint8, 0 or 255."""
    rng = np.random.default_rng(3)
    blobs = ndimage.gaussian_filter(rng.random(SHAPE), 4)
    holes = ndimage.gaussian_filter(rng.random(SHAPE), 0.8)
    return np.where((blobs > np.quantile(blobs, 0.55)) & (holes > np.quantile(holes, 0.06)), 255, 0).astype(np.uint8)


def labels(out):
    return volume.open(str(out), dataset="labels/instances/0").read(Box.from_shape(SHAPE))


def sets(*more):
    return lambda config: load(sets=more, base=config.model_dump(mode="json", exclude={"train"}))


def markers(out, stage):
    return {p.name: p.stat().st_mtime_ns for p in Path(out, "work/markers", stage).glob("*.json")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in blocks that cut cavities, none of them filled."""
    folder = tmp_path_factory.mktemp("holes")
    tifffile.imwrite(folder / "mask.tif", volume_with_cavities(), photometric="minisblack")
    out = str(folder / "run.volseg.zarr")
    config = load(sets=[*PLAIN, "blocks.shape=[8, 25, 33]"])
    segment_here(str(folder / "mask.tif"), out, config)
    return out


def test_filling_reads_no_probability_and_sees_no_blocks(run):
    """On, larger and off again; against scipy, and against other blocks."""
    plain, before = labels(run), markers(run, "fragments")
    decide(run, sets("stitch.fill_holes_voxels=5"), progress=Quiet())
    few, looked = labels(run), markers(run, "find_holes")
    decide(run, sets("stitch.fill_holes_voxels=60"), progress=Quiet())
    many = labels(run)
    assert before == markers(run, "fragments")
    assert looked == markers(run, "find_holes")
    np.testing.assert_array_equal(few, filled(plain, 5))
    np.testing.assert_array_equal(many, filled(plain, 60))
    assert np.count_nonzero(plain) < np.count_nonzero(few) < np.count_nonzero(many)
    result = verify(run)
    assert result.ok, str(result)
    checks = [check_box(open_stored(run), box) for box in (Box((3, 2, 5), (17, 50, 61)), Box((0, 0, 0), (9, 40, 40)))]
    assert all(set(check.wrong.values()) == {0} for check in checks)
    own = calibrate.calibrate(run, f"{run}/labels/instances/0").own
    assert (own.pq, own.iou) == (1, 1)
    one = digest(run)
    decide(run, sets("blocks.shape=[5, 60, 11]"), progress=Quiet())
    assert digest(run) == one
    decide(run, sets("stitch.fill_holes_voxels=0"), progress=Quiet())
    np.testing.assert_array_equal(labels(run), plain)


def filled(label, most):
    """Each small piece of background away from the border that touches one label alone has it."""
    out = label.copy()
    holes, _ = ndimage.label(label == 0)
    for n, place in enumerate(ndimage.find_objects(holes), 1):
        hole = holes == n
        around = np.setdiff1d(label[ndimage.binary_dilation(hole)], 0)
        inside = all(s.start > 0 and s.stop < size for s, size in zip(place, SHAPE, strict=True))
        if around.size == 1 and hole.sum() <= most and inside:
            out[hole] = around[0]
    return out


def test_a_label_in_a_cavity_that_must_not_have_it_is_found(run):
    decide(run, sets("stitch.fill_holes_voxels=5"), progress=Quiet())
    array = arrays.open_array(run, "labels/instances/0")
    box = Box((4, 4, 4), (20, 56, 66))
    sound = labels(run)
    holes, _ = ndimage.label(sound == 0)
    small = next(n for n in np.unique(holes[box.slices])[1:] if 5 < np.count_nonzero(holes == n) < 60)
    label = int(np.setdiff1d(sound[ndimage.binary_dilation(holes == small)], 0)[0])
    arrays.write(array, Box.from_shape(SHAPE), np.where(holes == small, label, sound).astype(sound.dtype))
    found = verify(run)
    arrays.write(array, Box.from_shape(SHAPE), sound)
    assert {"mask", "ids", "table"} <= {name for box in found.boxes for name, count in box.wrong.items() if count}
