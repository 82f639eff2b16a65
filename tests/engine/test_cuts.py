"""Blocks of predict that follow the source's chunks and the tiles: each tile once, each chunk about once, the same bytes."""

import shutil
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.helpers import LIGHT, Quiet, mark, settings
from volseg import api
from volseg.box import Blocks, Box
from volseg.config import Config
from volseg.engine import blocks, folder, pipeline, shares, update
from volseg.engine.blocks import with_cuts
from volseg.engine.run import Run
from volseg.engine.stages import stages_of
from volseg.errors import UserError
from volseg.evaluation.synthetic import synth
from volseg.inference.backends import Engine
from volseg.io import arrays, volume
from volseg.io.roi import RegionOfInterest
from volseg.planning import memory
from volseg.planning import prepare as describe

SHAPE, CHUNK = (28, 118, 134), (8, 32, 32)
SMALL = {
    "predict": {"tile": 64, "overlap": 16, "precision": "fp32", "backend": "openvino"},
    "stitch": {"min_voxels": 50},
}
PLANES = {**SMALL, "predict": {**SMALL["predict"], "planes": ("xy", "yz")}}
ENGINE = Engine("openvino", "fp32", "cpu", "x86_64", "2025.3", "0.1.0", why="as set")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A synthetic volume in chunks that are 8 sections deep. Tests must not change it."""
    path = tmp_path_factory.mktemp("image") / "em.zarr"
    zarr.create_array(path, data=synth(Box.from_shape(SHAPE), seed=3)[0], chunks=CHUNK)
    return str(path)


@pytest.fixture(scope="module")
def whole(deep, tmp_path_factory):
    """Probabilities of it in one block, by settings. Tests must not change them."""
    found = {}
    for name, options in {"xy": SMALL, "planes": PLANES}.items():
        run = begun(deep, tmp_path_factory.mktemp("whole") / name, **options, blocks={"shape": SHAPE})
        work(run)
        found[name] = arrays.open_array(run.out, "0")[:]
    return found


@pytest.fixture
def cuts(monkeypatch):
    """Volumes this small are cut too, into blocks of a tile or two."""
    for name, value in {"CUT_VOXELS": 0, "LEAST_DEPTH": 4, "MOST_LAYERS": 2}.items():
        monkeypatch.setattr(blocks, name, value)
    monkeypatch.setattr(memory, "cut_room", lambda run: 260_000)


def begun(image, out, **options):
    """A run of which nothing is done yet."""
    run = describe.from_image(volume.open(image), settings(**options), f"{out}.partial")
    folder.begin(run, overwrite=False)
    return run


def work(run, order=None):
    """Does what stores probabilities here, as workers would, in an order for each stage; the receipts."""
    receipts = {}
    for name in (name for name in stages_of(run) if name.startswith("predict")):
        grid = stages_of(run)[name].grid
        for i in order(len(grid)) if order else range(len(grid)):
            receipts[name, i] = pipeline.process_block(run.out, run.id, name, i)
            mark(run, name, i, receipts[name, i])
    return receipts


def test_deep_chunks_are_cut_with_the_tiles(deep, cuts, tmp_path):
    run = begun(deep, tmp_path / "run", **SMALL)
    cut, grid = run.cuts["xy"], run.predict_grid
    assert cut.depth == 8
    assert cut.shard[0] == cut.shift[0] == 4
    assert {grid.edge(0, k) for k in range(1, grid.counts[0])} <= {z - 4 for z in range(8, 28, 8)}
    assert min(grid.counts[1:]) >= 2
    assert sum(box.voxels for box in grid) == prod(SHAPE)
    assert all(grid.overlapping(grid[i]) == [i] for i in range(len(grid)))
    edges = [grid.edge(1, k) for k in range(grid.counts[1] + 1)]
    own = [len(run.tile_grid("xy").y.starting(*ends)) for ends in pairwise(edges)]
    assert len(set(own)) == 1, "as many tiles begin in each row of blocks"


@pytest.mark.parametrize(
    ("looks", "order"),
    [
        ("xy", None),
        ("xy", lambda n: reversed(range(n))),
        ("xy", lambda n: [*range(n), *range(n // 2)]),
        ("planes", None),
    ],
    ids=["in order", "backwards, so that nothing is handed over", "half of it twice", "two passes"],
)
def test_bytes_are_those_of_one_block_in_any_order(deep, whole, cuts, tmp_path, looks, order):
    run = begun(deep, tmp_path / "run", **{"xy": SMALL, "planes": PLANES}[looks])
    assert run.cuts
    receipts = work(run, order)
    np.testing.assert_array_equal(arrays.open_array(run.out, "0")[:], whole[looks])
    if order is None:
        inferred = sum(receipt.inferred_voxels for receipt in receipts.values())
        assert inferred == run.inferred_voxels, "each tile once: in noise none is constant"
        assert not [file for file in Path(run.out, "work/parts").glob("*") if file.stat().st_size > 2000]


def test_parts_that_are_gone_or_damaged_are_made_again(deep, whole, cuts, monkeypatch, tmp_path):
    monkeypatch.setattr(shares, "SPAN", 3)
    monkeypatch.setattr("volseg.engine.predict.SPAN", 3)
    run = begun(deep, tmp_path / "run", **SMALL)
    for i in range(len(run.predict_grid)):
        if i == 1:
            gone, torn, empty, _ = sorted(Path(run.out, "work/parts").glob(f"*-{i}-*"))
            gone.unlink()
            torn.write_bytes(torn.read_bytes()[:-30])
            empty.write_bytes(b"")
            for _ in range(2):  # as the scheduler tries again what failed
                with pytest.raises(OSError, match=r"work/parts/.* is damaged"):
                    pipeline.process_block(run.out, run.id, "predict", i)
        pipeline.process_block(run.out, run.id, "predict", i)
    np.testing.assert_array_equal(arrays.open_array(run.out, "0")[:], whole["xy"])


def test_pieces_of_such_blocks_give_the_same_bytes(deep, whole, cuts, tmp_path):
    run = begun(deep, tmp_path / "run", **SMALL)
    for i in range(4):
        pipeline.process_block_in_pieces(run.out, run.id, "predict", i)
        box = run.predict_grid[i].slices
        np.testing.assert_array_equal(
            arrays.open_array(run.out, "0")[(slice(0, 2), *box)], whole["xy"][(slice(0, 2), *box)]
        )


def tiles_of_plane(run):
    return run.tile_grid("xy").overlapping(*(slice(0, n) for n in SHAPE[1:]))


@pytest.mark.parametrize("masked", [False, True])
def test_a_region_of_interest_gives_the_same_bytes_inside(deep, whole, cuts, tmp_path, masked):
    box = Box.parse("5:21,20:103,40:99")
    wanted = np.zeros(SHAPE, bool)
    wanted[box.slices] = True
    options = {"input": {"roi": str(box)}}
    if masked:
        mask = np.random.default_rng(0).random(tuple(-(-n // 16) for n in SHAPE)) < 0.3
        mask = np.kron(mask, np.ones((16, 16, 16), bool))[tuple(map(slice, SHAPE))]
        zarr.create_array(tmp_path / "mask.zarr", data=mask.astype(np.uint8))
        options["input"]["mask"] = str(tmp_path / "mask.zarr")
        wanted &= mask
    run = begun(deep, tmp_path / "run", **SMALL, **options)
    receipts = work(run)
    np.testing.assert_array_equal(arrays.open_array(run.out, "0")[:], whole["xy"] * wanted)
    every = len(tiles_of_plane(run)) * SHAPE[0] * prod(run.tile_grid("xy").size)
    assert 0 < sum(receipt.inferred_voxels for receipt in receipts.values()) < 0.8 * every


def test_another_mask_is_another_run(deep, tmp_path):
    """Refused by a run that is under way; a finished one is made anew."""
    path, wanted = tmp_path / "mask.zarr", np.zeros(SHAPE, np.uint8)
    mask = zarr.create_array(path, data=wanted, chunks=(4, 16, 16))
    options = {**SMALL, "input": {"mask": str(path)}}
    run = begun(deep, tmp_path / "run", **options)
    assert update.compare(run.out, run).what == "nothing"
    mask[20:22, 30:33, 50:51] = 1
    with pytest.raises(UserError, match="unfinished run"):
        begun(deep, tmp_path / "run", **options)
    change = update.compare(run.out, begun(deep, tmp_path / "other", **options))
    assert (change.what, change.why) == ("everything", "the region of interest changed")


@pytest.mark.parametrize("planes", ["xy", "planes"])
def test_a_network_infers_what_the_spots_need(deep, whole, cuts, tmp_path, planes):
    """In blocks of a tile or two, of which most hold nothing."""
    wanted = np.zeros(SHAPE, bool)
    for spot in ("0:3,0:20,0:10", "22:28,100:118,120:134"):
        wanted[Box.parse(spot).slices] = True
    zarr.create_array(tmp_path / "mask.zarr", data=wanted.astype(np.uint8), chunks=(4, 16, 16))
    options = {"xy": SMALL, "planes": PLANES}[planes]
    run = begun(deep, tmp_path / "run", **options, input={"mask": str(tmp_path / "mask.zarr")})
    inferred = 0
    for stage in (stage for name, stage in stages_of(run).items() if name.startswith("predict")):
        assert stage.part.count > 0
        assert stage.part.count < len(stage.grid) or not stage.on_device
        for i in stage.part.numbers:
            receipt = pipeline.process_block(run.out, run.id, stage.name, i)
            mark(run, stage.name, i, receipt)
            inferred += receipt.inferred_voxels
    np.testing.assert_array_equal(arrays.open_array(run.out, "0")[:], whole[planes] * wanted)
    assert 0 < inferred <= run.inferred_voxels


def test_workers_and_kills_change_nothing(deep, whole, cuts, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    run = begun(deep, out, **SMALL)
    mark(run, "predict", 0, pipeline.process_block(run.out, run.id, "predict", 0))
    show = Quiet()
    api.infer(deep, out, config=settings(**SMALL, cluster={"workers": 2}), progress=show)
    assert show.stages["predict"][0] == run.predict_grid[0].voxels
    np.testing.assert_array_equal(arrays.open_array(out, "0")[:], whole["xy"])
    assert not Path(out, "work/parts").exists()


LOST, END = 10, 96  # the section of `padded` that was lost, and the column at which its tissue ends


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """The same volume with black padding, a lost section, and white below the last ones. Tests must not change it."""
    path = tmp_path_factory.mktemp("padded") / "em.zarr"
    image = synth(Box.from_shape(SHAPE), seed=3)[0]
    image[:, :, END:] = image[LOST] = 0
    image[22:, 60:] = 255
    zarr.create_array(path, data=image, chunks=CHUNK)
    return str(path)


@pytest.mark.parametrize("looks", ["xy", "planes"])
@pytest.mark.parametrize("order", [None, lambda n: reversed(range(n))], ids=["in order", "backwards"])
def test_padding_is_the_same_in_every_block(padded, cuts, tmp_path, looks, order):
    options = {"xy": SMALL, "planes": PLANES}[looks]
    whole = begun(padded, tmp_path / "whole", **options, blocks={"shape": SHAPE})
    work(whole)
    want = arrays.open_array(whole.out, "0")[:]
    run = begun(padded, tmp_path / "run", **options)
    assert run.cuts
    assert run.padding == (0.0, 255.0)
    receipts = work(run, order)
    np.testing.assert_array_equal(arrays.open_array(run.out, "0")[:], want)
    assert {Box.parse(text).start[0] for receipt in receipts.values() for _, text in receipt.filled} == {LOST}
    if looks == "xy":
        assert not want[..., END:].any()
        assert not want[:, 22:, 60:].any()
        lost, before = want[:, LOST, :, :END].astype(int), want[:, LOST - 1, :, :END].astype(int)
        assert np.abs(lost - before).mean() < 0.5 * np.abs(want[:, LOST - 5, :, :END] - before).mean()


def test_lost_sections_are_told_also_when_work_was_cleaned(padded, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    run = api.infer(padded, out, config=settings(**SMALL, cluster={"workers": 1}), progress=Quiet())
    told = f"lost     all or some of a section, seen as the one before it: {LOST}"
    assert run.summary["lost_sections"] == [LOST]
    assert told in run.report()
    api.clean(out)
    again = api.segment(out, settings=["stitch.min_voxels=60"], recompute=True, progress=Quiet())
    assert again.summary["lost_sections"] == [LOST]
    assert told in again.report()


def test_padding_that_is_none_is_seen_as_it_is(padded, tmp_path):
    found = []
    for padding in ("auto", "none"):
        run = begun(padded, tmp_path / padding, **SMALL, input={"padding": padding})
        work(run)
        found.append((run.padding, arrays.open_array(run.out, "0")[:]))
    assert found[1][0] == ()
    assert found[1][1][..., END + 10 : -10].any()
    assert not found[0][1][..., END:].any()


# ---------------------------------------------------------------- large volumes, unread


def unread(shape, chunk, workers=2, region=None, **options):
    source = volume.Volume("em.zarr", "zarr", shape, "uint8", (5.0, 5.0, 5.0), chunk)
    config = Config(**{"predict": {"tile": 1280, "overlap": 64, **options}})
    slab, block = blocks.choose_blocks(shape, None)
    run = Run("run", source, config, ("mask", "contour"), (5.0, 5.0, 5.0), "", slab, block, sections=3, binning=2,
              engine=ENGINE, roi=region and RegionOfInterest(region, voxels=region.voxels))  # fmt: skip
    return with_cuts(run, memory.cut_room(run), workers)


def decoded(run):
    """Voxels of all chunks that the blocks of one column read, for each voxel of these, from what their reader asks for."""
    grid, chunk, read, wanted = run.predict_grid, run.source.chunk, 0, 0
    y, x = (min(2, n - 1) for n in grid.counts[1:])
    for k in range(grid.counts[0]):
        share = shares.Share.of_block(run, "xy", grid.index((k, y, x)))
        z = share.box.slices[0]
        window = shares.bounds_of_tiles(share.tiles, [share.own[0], share.own[-1]])
        ends = [(max(0, z.start - 1), min(z.stop + 1, run.shape[0])), *((s.start, s.stop) for s in window)]
        read += prod(-(-b // c) * c - a // c * c for (a, b), c in zip(ends, chunk, strict=True))
        wanted += share.box.voxels
    return read / wanted


@pytest.mark.parametrize(("chunk", "tile"), [(64, 1280), (128, 1280), (64, 2560), (128, 2560), (256, 2560)])
@pytest.mark.parametrize("plane", [1024, 4096, 16384, 65536])
def test_chunks_are_decoded_about_once(plane, chunk, tile):
    run = unread((4096, plane, plane), (chunk,) * 3, tile=tile)
    assert decoded(run) <= 1.5
    assert run.inferred_voxels / prod(run.shape) <= 1.15
    assert memory.worker_bytes(run, 1) < 2e9


@pytest.mark.parametrize(
    "shape", [(1000, 1000, 1000), (10_000, 10_000, 10_000), (100_000,) * 3, (40, 5_000_000, 5_000_000)]
)
@pytest.mark.parametrize("chunk", [(1, 256, 256), (64, 64, 64), (128, 128, 128), (256, 256, 256)])
@pytest.mark.parametrize("tile", [1280, 2560])
def test_workers_need_no_more_for_larger_volumes(shape, chunk, tile):
    run = unread(shape, chunk, tile=tile)
    assert memory.worker_bytes(run, 1) < 2e9


def test_few_workers_get_blocks_of_more_layers():
    alone, two = (unread((2048, 1024, 1024), (256,) * 3, workers) for workers in (1, 2))
    assert (alone.predict_block, two.predict_block) == ((512, 1024, 1024), (256, 1024, 1024))


def test_blocks_of_one_layer_of_chunks_are_of_one_depth():
    run = unread((64, 20_000, 20_000), (64,) * 3, tile=2560, region=Box((0, 0, 0), (64, 1536, 1536)))
    assert [run.predict_grid.edge(0, k) for k in range(run.predict_grid.counts[0] + 1)] == [0, 32, 64]


@pytest.mark.parametrize("start", [(0, 0, 0), (40, 3000, 7000)])
def test_blocks_of_a_region_share_its_voxels_as_they_share_its_tiles(start):
    run = unread(
        (128, 20_000, 20_000),
        (64,) * 3,
        region=Box(start, tuple(a + n for a, n in zip(start, (64, 1536, 1536), strict=True))),
    )
    part = run.parts.inferred("xy")
    found = [shares.Share.of_block(run, "xy", i) for i in part.numbers]
    tiles = [len(share.own) * share.reach.shape[0] for share in found]
    assert prod(run.tile_grid("xy").size) * sum(tiles) == run.inferred_voxels
    assert part.voxels == pytest.approx(run.wanted_voxels, abs=len(found))
    each = [max(1, run.wanted_voxels * n / sum(tiles)) for n in tiles]
    assert [part.voxels_of(i) for i in part.numbers] == pytest.approx(each, abs=1)


def test_blocks_that_were_asked_for_and_small_volumes_stay(deep, tmp_path):
    assert not begun(deep, tmp_path / "run", **SMALL).cuts
    run = unread((4096, 4000, 4000), (64, 64, 64))
    own = replace(run, config=run.config.model_copy(update={"blocks": run.config.blocks.model_copy(
        update={"shape": (64, 512, 512)})}))  # fmt: skip
    assert with_cuts(replace(own, cuts={}), blocks.CUT_BYTES).cuts == {}


def test_a_cut_run_is_read_as_it_was_written(deep, cuts, tmp_path):
    run = begun(deep, tmp_path / "run", **SMALL)
    assert replace(Run.from_json(run.layout.load_description()), out=run.out).cuts == run.cuts
    shutil.rmtree(run.out)
    assert isinstance(run.predict_grid, Blocks)


@pytest.mark.parametrize("plane", [1024, 8192, 65536])
@pytest.mark.parametrize("chunk", [(1, 1024, 1024), (64, 64, 64), (128, 128, 128), (64, 256, 256)])
def test_chunks_of_probabilities_of_others_are_decoded_once(plane, chunk):
    shape = (4096, plane, plane)
    block = blocks.blocks_of_chunks(shape, [chunk], blocks.plane_blocks(shape))
    assert all(b == n or b % c == 0 for b, c, n in zip(block, chunk, shape, strict=True))
    assert prod(block) <= 1 << 28


def test_probabilities_of_others_are_the_same_by_chunks_and_by_planes(tmp_path, monkeypatch):
    path = tmp_path / "probability.zarr"
    rng = np.random.default_rng(0)
    zarr.create_array(path, data=rng.integers(0, 255, SHAPE, dtype=np.uint8), chunks=CHUNK)
    labels, read_in = [], []
    for thin in (False, True):
        if thin:
            monkeypatch.setattr(blocks, "plane_blocks", lambda shape: (2, *shape[1:]))
        run = api.segment(path, tmp_path / f"{thin}.zarr", config=settings(**LIGHT), progress=Quiet())
        read_in.append(run.run.predict_block)
        labels.append(run.labels[:])
    assert read_in == [SHAPE, (8, 32, 96)]
    assert np.array_equal(*labels)


def test_what_is_read_ahead_is_read_once_and_gives_the_same_bytes(deep, whole, cuts, tmp_path, monkeypatch):
    """As of a store that answers late."""
    run, read, boxes = begun(deep, tmp_path / "run", **SMALL), volume.Volume.read, []
    assert run.cuts["xy"].block[0] == 2 * run.cuts["xy"].depth  # two layers of chunks
    monkeypatch.setattr(volume.Volume, "read", lambda source, box: boxes.append(str(box)) or read(source, box))
    i = len(run.predict_grid) // 2
    for ahead in (True, False):
        monkeypatch.setattr(Run, "reads_ahead", ahead)
        pipeline.process_block(run.out, run.id, "predict", i)
        box = run.predict_grid[i]
        np.testing.assert_array_equal(run.layout.probabilities.read(box), whole["xy"][(slice(None), *box.slices)])
    assert boxes[: len(boxes) // 2] == boxes[len(boxes) // 2 :]
    assert len(boxes) > 2
