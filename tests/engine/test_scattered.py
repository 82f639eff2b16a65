"""Masks that want a few scattered spots: the bytes are those of a run that looks at every block, for what the spots cost."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from scipy import ndimage

from tests.engine.test_drop import Kills, go_on, same
from tests.helpers import Quiet, digest, markers_of
from volseg.box import Box
from volseg.config import load
from volseg.engine import folder
from volseg.engine.finished import open_run
from volseg.engine.stages import stages_of
from volseg.evaluation.verify import verify
from volseg.io import probabilities
from volseg.planning import prepare

SHAPE = (12, 60, 130)
SPOTS = ["0:5,0:16,0:20", "3:9,28:45,60:83", "8:12,44:60,112:130"]
PLAIN = ["probabilities.mask_channel=0", "stitch.min_voxels=10", "cluster.dashboard=", "cluster.workers=1", "output.levels=3",
         "output.chunk=[3, 15, 26]", "fragments.smooth=[1, 1, 1]"]  # fmt: skip
LOW = ("fragments.threshold=0.2", "stitch.seed=0.4")  # smoothing carries the mask over the border of what is wanted
BLOCKS = "blocks.shape=[3, 15, 26]"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Probabilities, and a mask of spots in chunks of which few are stored. Tests must not change them."""
    place = tmp_path_factory.mktemp("given")
    field = ndimage.gaussian_filter(np.random.default_rng(8).random(SHAPE), 2)
    data = np.clip((field - 0.5) * 1500 + 160, 0, 255).astype(np.uint8)
    tifffile.imwrite(place / "probability.tif", data, photometric="minisblack")
    write_mask(place / "mask.zarr", SPOTS)
    return place


def write_mask(path, spots):
    mask = zarr.create_array(path, shape=SHAPE, chunks=(3, 15, 26), dtype="uint8", overwrite=True)
    for spot in spots:
        mask[Box.parse(spot).slices] = 1


def begin(given, out, *sets, every=False):
    """A run of which nothing is done; it looks at ``every`` block, as runs did that knew nothing of the mask."""
    config = load(sets=[*PLAIN, f"input.mask={given / 'mask.zarr'}", *sets])
    channels = probabilities.named_channels(str(given / "probability.tif"), config.probabilities, config.input)
    run = prepare.from_probabilities(channels, config, f"{out}.partial")
    if every:
        run = replace(run, roi=replace(run.roi, occupied=None))
    folder.begin(run, overwrite=False)
    return run


def make(given, out, *sets, every=False):
    return go_on(begin(given, out, *sets, every=every), str(out)).path


@pytest.fixture(scope="module")
def looked_at(given, tmp_path_factory):
    """Runs that looked at every block, by settings. Tests must not change them."""
    place = tmp_path_factory.mktemp("every")
    return {low: make(given, place / f"{len(low)}.zarr", *low, every=True) for low in ((), LOW)}


@pytest.mark.parametrize(
    ("low", "sets"),
    [
        ((), ["blocks.shape=[3, 15, 26]"]),
        (LOW, ["blocks.shape=[12, 60, 130]"]),
        (LOW, ["blocks.shape=[5, 16, 30]"]),
        (LOW, ["blocks.shape=[4, 20, 26]", "output.probabilities=drop"]),
        (LOW, ["blocks.shape=[7, 30, 50]", "stitch.reduce=tree"]),
    ],
)
def test_labels_are_those_of_a_run_that_looks_at_every_block(given, looked_at, tmp_path, low, sets):
    out = make(given, tmp_path / "run.zarr", *low, *sets)
    assert digest(out) == digest(looked_at[low])
    assert "tree" in sets[-1] or same(out, looked_at[low])
    for name in ("labels/instances/1", "labels/instances/2", *(("0", "1", "2") if "drop" not in sets[-1] else ())):
        coarse, expected = (zarr.open_array(f"{path}/{name}", mode="r")[:] for path in (out, looked_at[low]))
        np.testing.assert_array_equal(coarse, expected)
        assert coarse.any()
    assert open_run(out).object_count > 2


def test_smoothing_carries_objects_over_the_border_of_a_roi_that_ends_with_a_block(given, tmp_path):
    sets = [*LOW, "input.mask=", "input.roi=0:6,15:30,26:52"]
    made = [
        make(given, tmp_path / f"{k}.zarr", *sets, block)
        for k, block in enumerate((BLOCKS, "blocks.shape=[12, 60, 130]"))
    ]
    assert same(*made)
    labels = zarr.open_array(f"{made[0]}/labels/instances/0", mode="r")[:]
    assert labels[6:].any()


def test_a_block_in_which_nothing_is_wanted_gets_no_task_marker_table_or_shard(given, looked_at, tmp_path):
    show, run = Quiet(), begin(given, tmp_path / "run.zarr", BLOCKS)
    out = go_on(run, str(tmp_path / "run.zarr"), show).path
    run, mask = open_run(out).run, zarr.open_array(given / "mask.zarr", mode="r")[:]
    smoothed = ndimage.maximum_filter(mask, 3)
    for name, wanted in {"import": mask, "fragments": smoothed, "link": smoothed, "relabel": smoothed}.items():
        stage = stages_of(run)[name]
        inside = [i for i in range(len(stage.grid)) if wanted[stage.grid[i].slices].any()]
        assert sorted(markers_of(run).done(name)) == list(stage.part.numbers) == inside
        assert sum(show.stages[name]) == stage.part.voxels
        assert stage.part.block_voxels == sum(stage.grid[i].voxels for i in inside)
        assert 0 <= stage.part.voxels - mask.sum() < len(inside)  # one for each that smoothing alone reaches
    assert run.layout.block_basins.count() == run.layout.links.count() == len(inside) < len(run.grid) / 2
    assert sum(show.stages["stitch"]) == sum(show.stages["fragments"])
    for array, name in ((run.layout.probabilities, "import"), (run.layout.labels(1), "pyramid1")):
        stored = [path for path in Path(out, array.name).rglob("*") if path.is_file() and path.name != "zarr.json"]
        assert 0 < len(stored) <= stages_of(run)[name].part.count < len(stages_of(run)[name].grid)
    assert verify(out).ok
    assert same(out, looked_at[()])


@pytest.mark.parametrize("every", [False, True])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(given, looked_at, tmp_path, every):
    """Also one that was begun by a volseg which knew nothing of the mask."""
    sets, out = [*LOW, BLOCKS], tmp_path / "run.zarr"
    with pytest.raises(KeyboardInterrupt):
        go_on(begin(given, out, *sets, every=every), str(out), Kills("link", 3000))
    assert same(go_on(begin(given, out, *sets), str(out)).path, looked_at[LOW])
