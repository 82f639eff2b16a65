"""Several looks at one voxel: flips of a tile, and passes over xy, xz and yz planes. They keep the promise too."""

import hashlib
import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from tests.helpers import Quiet, decide, digest, mark, settings
from volseg import api
from volseg.box import Blocks, Box
from volseg.engine import folder, pipeline
from volseg.engine.run import redundancy
from volseg.errors import UserError
from volseg.evaluation.synthetic import synth
from volseg.evaluation.synthetic_volume import write_synthetic
from volseg.inference import model, tiles
from volseg.io import arrays, volume
from volseg.planning import prepare as describe

SHAPE = (8, 16, 70)
LOOKS = {"predict": {"planes": ("xy", "xz", "yz"), "tta": 4, "tile": 64, "overlap": 16, "precision": "fp32"},
         "stitch": {"min_voxels": 10, "seed": 0.55}}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A synthetic volume with axes shorter than the shortest tile. Tests must not change it."""
    path = str(tmp_path_factory.mktemp("image") / "em.zarr")
    write_synthetic(path, SHAPE, SHAPE, seed=12, overwrite=False, progress=Quiet())
    return path


@pytest.fixture(scope="module")
def seen(small, tmp_path_factory):
    """A run of it with every look there is, in the blocks that volseg chooses. Tests must not change it."""
    out = str(tmp_path_factory.mktemp("seen") / "run.volseg.zarr")
    api.infer(small, out, config=settings(**LOOKS, cluster={"workers": 1}), progress=Quiet())
    return out


def stored(out):
    """SHA-256 of the stored probabilities, and of the labels."""
    return hashlib.sha256(zarr.open_array(f"{out}/0", mode="r")[:].tobytes()).hexdigest(), digest(out)


def in_order(run, stage, grid, order):
    """Does blocks of a stage here, as a worker would."""
    for i in (int(i) % len(grid) for i in order):
        mark(run, stage, i, pipeline.process_block(run.out, run.id, stage, i))


def test_several_looks_do_not_depend_on_blocks_or_workers(small, seen, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    config = settings(**LOOKS, blocks={"shape": (5, 9, 70)}, cluster={"workers": 2})
    api.infer(small, out, config=config, progress=Quiet())
    assert stored(out) == stored(seen)


def test_a_stopped_run_of_several_planes_goes_on_where_it_was(small, seen, tmp_path):
    """Killed in the passes, then while their mean was taken; some tasks are done twice and in another order."""
    out = str(tmp_path / "run.volseg.zarr")
    config = settings(**LOOKS, blocks={"shape": (4, 16, 70)}, cluster={"workers": 1})
    run = describe.from_image(volume.open(small), config, f"{out}.partial")
    folder.begin(run, overwrite=False)
    in_order(run, "predict-xz", run.pass_grid("xz"), (1, 0, 1))
    for stage, plane in run.passes.items():
        grid = run.pass_grid(plane)
        in_order(run, stage, grid, reversed(range(len(grid))))
    in_order(run, "predict", run.predict_grid, (2, 0, 2))
    show = Quiet()
    api.infer(small, out, config=config, progress=show)
    assert [show.stages[stage][0] for stage in run.passes] == [np.prod(SHAPE)] * 3
    assert 0 < show.stages["predict"][0] < np.prod(SHAPE)
    assert not any(Path(out, "work", stage).exists() for stage in run.passes)
    assert stored(out) == stored(seen)


def test_passes_are_not_made_again_once_their_mean_is_there(seen, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    shutil.copytree(seen, out)
    show = Quiet()
    decide(out, lambda config: config.model_copy(update={"blocks": config.blocks.model_copy(
        update={"shape": (8, 9, 70)})}), progress=show)  # fmt: skip
    assert not any(stage.startswith("predict-") for stage in show.stages)
    assert digest(out) == digest(seen)


def test_a_damaged_mean_of_passes_is_made_again(seen, tmp_path):
    """The passes are gone by then."""
    out = str(shutil.copytree(seen, tmp_path / "run.volseg.zarr"))
    next(Path(out, "0/c").rglob("*/*/*/*")).write_bytes(b"damaged")
    api.repair(out, progress=Quiet())
    assert stored(out) == stored(seen)


def forwards(image, run, axes, ways):
    """Probabilities (channels, z, y, x) of whole planes across ``axes[0]``: torch, numpy and a loop, nothing else."""
    network, card = model.load(model.shipped())
    seen = np.transpose((image - run.mean) / run.std, axes).astype(np.float32)
    length, y, x = seen.shape
    seen = np.pad(seen, [(1, 1), (0, 0), (0, 0)], mode="edge")
    multiple = 32 * card.binning
    seen = np.pad(seen, [(0, 0), (0, -y % multiple), (0, -x % multiple)], mode="symmetric")
    assert card.sections == 3
    out = np.zeros((2, length, *seen.shape[1:]))
    for z, (transpose, flips) in product(range(length), ways):
        tile = np.flip(seen[z : z + 3].transpose(0, 2, 1) if transpose else seen[z : z + 3], flips)
        with torch.inference_mode():
            one = torch.sigmoid(network(torch.from_numpy(tile.copy())[None]))[0].numpy()
        one = np.flip(one, flips)
        out[:, z] += (one.transpose(0, 2, 1) if transpose else one) / len(ways)
    return out[:, :, :y, :x].transpose(0, *(1 + np.argsort(axes)))


PLAIN = [(False, ())]
FLIPS = [(transpose, flips) for transpose in (False, True) for flips in ((), (2,), (1,), (1, 2))]


@pytest.mark.parametrize(
    ("looks", "ways", "planes"),
    [({}, PLAIN, [(0, 1, 2)]), ({"tta": 4, "planes": ("xz",)}, FLIPS[:4], [(1, 0, 2)]),
     ({"tta": 8, "planes": ("yz", "xy", "xz")}, FLIPS, [(0, 1, 2), (1, 0, 2), (2, 0, 1)])],
    ids=["plain", "flips of one plane", "everything"],
)  # fmt: skip
def test_stored_probabilities_are_the_mean_of_whole_plane_forwards(looks, ways, planes, tmp_path):
    """Planes of one tile, in the product's blocks and in torch on the whole volume: within one step of 1/255."""
    image = synth(Box((0, 0, 0), (5, 20, 30)), seed=1)[0]
    path = str(tmp_path / "em.zarr")
    arrays.create_array(tmp_path, "em.zarr", shape=image.shape, dtype="uint8", chunk=image.shape, shard=image.shape)
    arrays.write(arrays.open_array(tmp_path, "em.zarr"), Box.from_shape(image.shape), image)
    config = settings(predict={"tile": 1280, "precision": "fp32", "normalize": "volume", **looks},
                      blocks={"shape": (5, 13, 17)})  # fmt: skip
    run = describe.from_image(volume.open(path), config, str(tmp_path / "run.partial"))
    folder.begin(run, overwrite=False)
    for stage, plane in run.passes.items():
        in_order(run, stage, run.pass_grid(plane), range(len(run.pass_grid(plane))))
    in_order(run, "predict", run.predict_grid, range(len(run.predict_grid)))
    got = zarr.open_array(f"{run.out}/0", mode="r")[:]
    want = 255 * np.mean([forwards(image, run, axes, ways) for axes in planes], axis=0)
    assert want.max() - want.min() > 20
    assert np.abs(got - want).max() <= 1


@pytest.mark.parametrize("size", [(2, 3, 5, 5), (1, 3, 4, 7)])
def test_each_turn_is_undone(size):
    batch = np.random.default_rng(0).random(size).astype(np.float32)
    laid = [way.apply(batch) for way in tiles.dihedrals(8)]
    assert len({part.tobytes() + bytes(str(part.shape), "ascii") for part in laid}) == 8
    for way, part in zip(tiles.dihedrals(8), laid, strict=True):
        np.testing.assert_array_equal(way.undo(part), batch)
    np.testing.assert_allclose(tiles.mean_over_dihedrals(lambda x: x, batch, tiles.dihedrals(8)), batch, rtol=1e-6)


def test_the_mean_of_passes_is_rounded_once():
    values = np.stack([part.ravel() for part in np.meshgrid(*[np.arange(256)] * 2)])
    for parts in (values, np.stack([*values, values[0][::-1]])):
        want = np.floor(parts.mean(axis=0) + 0.5)
        np.testing.assert_array_equal(tiles.mean_over_passes(parts.astype(np.uint8)), want)


def test_planes_need_voxels_about_as_long_as_wide(small, tmp_path):
    config = settings(**LOOKS, input={"voxel_size_nm": (50, 5, 4), "resample": "off"})
    with pytest.raises(UserError, match=r"these are 50 x 5 x 4 nm: use predict\.planes = \['xy'\], or correct input"):
        describe.from_image(volume.open(small, voxel_size_nm=(50, 5, 4)), config, str(tmp_path))
    describe.from_image(volume.open(small, voxel_size_nm=(6, 5, 4)), config, str(tmp_path))


@pytest.mark.parametrize("planes", [[], ["xy", "xy"], ["zx"]])
def test_planes_that_make_no_sense_are_refused(planes):
    with pytest.raises(UserError, match="planes"):
        settings(predict={"planes": planes})


def test_the_headline_counts_every_look(small):
    run = describe.from_image(volume.open(small), settings(**LOOKS), "out")
    grid = {plane: run.tile_grid(plane).size for plane in run.passes.values()}
    assert grid == {"xy": (64, 64), "xz": (64, 64), "yz": (64, 64)}
    one = {"xy": 64 * 2 * 64 / (16 * 70), "xz": 64 * 2 * 64 / (8 * 70), "yz": 64 * 64 / (8 * 16)}
    assert redundancy(run) == pytest.approx(4 * sum(one.values()))
    said = describe.headline(run)
    assert "64 x 64 (xy), 64 x 64 (xz), 64 x 64 (yz) laid in 4 ways" in said


@pytest.mark.parametrize("plane", tiles.PLANES)
def test_a_pass_has_blocks_that_are_deep_across_its_planes(small, plane):
    run = describe.from_image(volume.open(small), settings(**LOOKS), "out")
    block = run.pass_grid(plane).block
    across = tiles.PLANES[plane][0]
    assert all(block[k] == SHAPE[k] for k in range(3) if k != across)
    assert sum(box.voxels for box in Blocks(SHAPE, block)) == np.prod(SHAPE)


def test_a_run_tells_how_it_looked(seen):
    assert json.loads(Path(seen, "run.json").read_text())["config"]["predict"]["tta"] == 4
