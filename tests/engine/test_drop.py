"""Probabilities that are dropped once nothing needs them any more: labels and tables are those of a run that keeps them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from scipy import ndimage

from tests.helpers import Quiet, begin_run, decide, digest, markers_of, run_stages, with_sets, write_volume
from volseg import api
from volseg.box import Box
from volseg.config import load
from volseg.engine import cluster, drop, finish, folder, instances, schedule, update
from volseg.engine.corrections import correction_file
from volseg.engine.export import Request, checked
from volseg.engine.finished import open_run
from volseg.engine.receipt import Timings
from volseg.errors import DamagedFileError, UserError
from volseg.evaluation.verify import verify

SHAPE = (12, 30, 135)
PLAIN = ["probabilities.mask_channel=0", "stitch.seed=0.5", "stitch.min_voxels=10", "cluster.dashboard=", "cluster.workers=1",
         "output.levels=2", "output.chunk=[3, 30, 47]", "blocks.shape=[6, 30, 47]"]  # fmt: skip
DROP = "output.probabilities=drop"
HOLES = "stitch.fill_holes_voxels=50"


class Kills(Quiet):
    """Ends the run when so many voxels of a stage are done."""

    def __init__(self, at, voxels):
        super().__init__()
        self.at, self.voxels = at, voxels

    def stage(self, name, voxels, done):
        advance = super().stage(name, voxels, done)
        self.left = self.voxels

        def count(more):
            advance(more)
            if name == self.at and sum(self.stages[name]) >= self.voxels:
                raise KeyboardInterrupt

        return count


def go_on(run, out, progress=None):
    """All that is not done of a run, on threads of this process."""
    folder.create_missing_arrays(run)
    with cluster.connect(run.config.cluster, light=True) as client:
        markers = finish._checked_markers(run, _Unlocked(), progress or Quiet())
        try:
            statistics = schedule.run_stages(client, run, markers, progress or Quiet())
        finally:
            markers.flush()
        return finish.finish(run, out, statistics, 0.0, 0.0)


class _Unlocked:
    def check(self):
        pass


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    field = ndimage.gaussian_filter(np.random.default_rng(8).random(SHAPE), 2)
    path = tmp_path_factory.mktemp("drop") / "mask.tif"
    data = np.clip((field - 0.5) * 1500 + 128, 0, 255).astype(np.uint8)
    tifffile.imwrite(path, data, photometric="minisblack")
    return str(path)


@pytest.fixture(scope="module")
def kept(mask, tmp_path_factory):
    """Runs that keep their probabilities, by settings. Tests must not change them."""
    return {sets: make(mask, tmp_path_factory.mktemp("kept") / "run.zarr", *sets) for sets in [(), (HOLES,)]}


@pytest.fixture(scope="module")
def whole(mask, tmp_path_factory):
    """A run that dropped them. Tests must not change it."""
    return make(mask, tmp_path_factory.mktemp("whole") / "run.zarr", DROP)


@pytest.fixture
def dropped(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run.zarr")


def make(mask, out, *sets):
    run = begin_run(mask, f"{out}.partial", load(sets=[*PLAIN, *sets]))
    return go_on(run, str(out)).path


def same(a, b):
    tables = [Path(out, "tables/objects.parquet").read_bytes() for out in (a, b)]
    return digest(a) == digest(b) and tables[0] == tables[1]


@pytest.mark.parametrize("sets", [(), (HOLES,)])
def test_labels_and_table_are_those_of_a_run_that_keeps_them(mask, kept, tmp_path, sets):
    out = make(mask, tmp_path / "run.zarr", DROP, *sets)
    assert same(out, kept[sets])
    assert not Path(out, "0").exists()
    assert "multiscales" not in json.loads(Path(out, "zarr.json").read_text())["attributes"].get("ome", {})
    with pytest.raises(UserError, match=r"dropped .*output\.probabilities=keep"):
        _ = open_run(out).probabilities


@pytest.mark.parametrize("at", ["fragments", "tally"])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(mask, kept, tmp_path, at):
    out = tmp_path / "run.zarr"
    run = begin_run(mask, f"{out}.partial", load(sets=[*PLAIN, DROP, HOLES]))
    with pytest.raises(KeyboardInterrupt):
        go_on(run, str(out), Kills(at, np.prod(SHAPE) // 2))
    before = set(markers_of(run).done("import"))
    progress = Quiet()
    assert same(go_on(run, str(out), progress).path, kept[(HOLES,)])
    done = sum(run.predict_grid[i].voxels for i in before)
    assert progress.stages["import"][0] == done  # no block that was done is done again
    assert not any("as it was written" in said for said in progress.said)


def test_blocks_go_while_others_are_needed(mask, kept, tmp_path):
    """What is needed for a block that lost its marker is made again; what nothing needs stays away."""
    out = tmp_path / "run.zarr"
    run = begin_run(mask, f"{out}.partial", load(sets=[*PLAIN, DROP]))
    with pytest.raises(KeyboardInterrupt):
        go_on(run, str(out), Kills("relabel", 1))
    shards = sorted(Path(run.out, "0").rglob("c/*/*/*/*"))
    assert len(shards) == len(run.predict_grid)
    assert not any(shard.stat().st_size for shard in shards)
    markers = markers_of(run)
    assert drop.Dropper(run, markers).unneeded == set(range(len(run.predict_grid)))
    markers.remove("fragments", [0])
    with drop.dropping(run, markers):
        again = set(range(len(run.predict_grid))) - markers.done("import")
    assert 0 in again
    assert len(again) < len(run.predict_grid)
    assert same(go_on(run, str(out)).path, kept[()])


def test_a_worker_that_comes_back_late_writes_nothing(mask, tmp_path):
    out = tmp_path / "run.zarr"
    run = begin_run(mask, f"{out}.partial", load(sets=[*PLAIN, DROP]))
    with pytest.raises(KeyboardInterrupt):
        go_on(run, str(out), Kills("relabel", 1))
    stored = run.layout.regions.fingerprints(Box.from_shape(SHAPE))
    for late in (lambda: None, run.layout.probabilities.remove):
        late()
        with pytest.raises(DamagedFileError):
            instances.find_basins(run, 0, Timings())
    assert run.layout.regions.fingerprints(Box.from_shape(SHAPE)) == stored


def test_other_rules_are_decided_from_the_tables(kept, dropped, tmp_path):
    other = shutil.copytree(kept[()], tmp_path / "kept.zarr")
    for out in (dropped, other):
        decide(out, with_sets("stitch.seed=0.7", "stitch.min_voxels=40"))
    assert same(dropped, other)
    assert not Path(dropped, "0").exists()
    found = verify(dropped)
    assert found.ok
    assert found.rejoining is not None
    assert "were dropped" in str(found)


def test_what_needs_them_says_so(dropped):
    for change in ("fragments.smooth=[1, 1, 1]", "output.probabilities=keep", HOLES, "blocks.shape=[9, 30, 40]"):
        with pytest.raises(UserError, match=r"needs the probabilities of .* dropped .*output\.probabilities=keep"):
            decide(dropped, with_sets(change))
    with pytest.raises(UserError, match="export of mask needs the probabilities"):
        checked(open_run(dropped), "mask.tif", Request("tiff", what="mask"))
    api.clean(str(dropped))
    with pytest.raises(UserError, match="making basins anew needs the probabilities"):
        api.segment(str(dropped), recompute=True, progress=Quiet())


def test_a_run_that_kept_them_drops_them_when_asked(kept, tmp_path):
    out = shutil.copytree(kept[()], tmp_path / "run.zarr")
    decide(out, with_sets(DROP))
    assert same(out, kept[()])
    assert not [name for name in ("0", "1") if Path(out, name).exists()]
    assert verify(out).ok


def test_a_damaged_table_is_made_again(whole, dropped):
    Path(dropped, "work/tables/1.npz").write_bytes(b"damaged")
    assert verify(dropped).damaged == ("work/tables/1.npz",)
    api.repair(str(dropped), progress=Quiet())
    assert verify(dropped).ok
    assert same(dropped, whole)
    assert not Path(dropped, "0").exists()


def test_a_resampled_volume_of_which_a_part_is_wanted(image, tmp_path):
    """Inferred here, in blocks that fit neither grid; labels lie on the grid of the volume, in a box of it."""
    gray = zarr.open_array(f"{image}/0", mode="r")[:9, :64, :140]
    coarse = write_volume(str(tmp_path / "em.zarr"), gray[:, ::2, ::2], (5.0, 10.0, 10.0))
    made = []
    for how in ("keep", "drop"):
        sections = {
            "blocks": {"shape": (4, 64, 45)},
            "input": {"roi": "1:9,3:30,5:62"},
            "output": {"probabilities": how},
        }
        run, statistics = run_stages(coarse, tmp_path / f"{how}.zarr", **sections)
        made.append(finish.finish(run, run.out, statistics, 0.0, 0.0))
    assert run.restored
    assert same(*(each.path for each in made))
    assert made[0].object_count
    keeping = replace(run, config=made[0].config)
    kept, dropped = (each.path for each in made)
    assert [update.compare(*pair).what for pair in ((kept, keeping), (dropped, run))] == ["nothing", "nothing"]
    assert [update.compare(*pair).what for pair in ((kept, run), (dropped, keeping))] == ["labels", "everything"]
    shutil.rmtree(coarse)
    for out in (kept, dropped):
        decide(out, with_sets("stitch.seed=0.3"))
    assert same(kept, dropped)


def test_objects_are_corrected_by_points(kept, dropped, tmp_path):
    other = shutil.copytree(kept[()], tmp_path / "kept.zarr")
    labels = zarr.open_array(f"{other}/labels/instances/0", mode="r")[:]
    points = [np.argwhere(labels == label)[0].tolist() for label in (1, labels.max())]
    file = {**correction_file(open_run(str(other)).run), "corrections": [{"do": "join", "points": points}]}
    for out in (dropped, other):
        api.segment(str(out), corrections=file, progress=Quiet())
    assert same(dropped, other)
    assert open_run(str(dropped)).object_count == labels.max() - 1
    beside = [points[0], np.argwhere(labels == 0)[0].tolist()]
    file = {**file, "corrections": [{"do": "join", "points": beside}]}
    with pytest.raises(UserError, match="lies in the background"):
        api.segment(str(dropped), corrections=file, progress=Quiet())
