"""A mask and a box of the volume: what is wanted is what it would be without them, the rest is 0, for every blocking."""

import json
from dataclasses import replace
from operator import truediv
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.helpers import RUN_STAGES_SETTINGS, Quiet, decide, digest, markers_of, run_stages, settings, write_volume
from volseg import api
from volseg.box import Blocks, Box
from volseg.config import Input, load
from volseg.engine import instances
from volseg.engine.folder import load_run
from volseg.engine.run import Run, redundancy
from volseg.engine.stages import keys
from volseg.errors import DamagedFileError, UserError
from volseg.evaluation.synthetic import synth
from volseg.evaluation.verify import verify
from volseg.io import files, roi, volume
from volseg.io.occupancy import Occupied
from volseg.io.resample import Grid
from volseg.io.roi import RegionOfInterest, find, full_counts
from volseg.segmentation.basins import watershed_block
from volseg.segmentation.heights import OUTSIDE

SHAPE = (7, 70, 90)


@pytest.fixture(scope="module")
def em(tmp_path_factory):
    """A synthetic volume, black in the last tile of its sections 2 to 6. Tests must not change it."""
    image = synth(Box.from_shape(SHAPE), seed=12)[0]
    image[2:, :, 26:] = 0
    return write_volume(str(tmp_path_factory.mktemp("em") / "em.zarr"), image)


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    """A mask of it at a quarter of the resolution in the plane, rounded up along y and down along x."""
    small = np.zeros((7, 18, 22), np.uint8)
    small[1:, 2:9, 1:20] = 1
    small[3] = 0
    return write_volume(str(tmp_path_factory.mktemp("mask") / "mask.zarr"), small, (5.0, 20.0, 20.0))


def probabilities(out):
    return zarr.open_array(f"{out}/0", mode="r")[:]


@pytest.fixture(scope="module")
def plain(em, tmp_path_factory):
    """A run of it without a mask. Tests must not change it."""
    return run_stages(em, tmp_path_factory.mktemp("plain") / "run.zarr")


@pytest.fixture(scope="module")
def masked(em, mask, tmp_path_factory):
    """A run of it with mask and box. Tests must not change it."""
    return run_stages(em, tmp_path_factory.mktemp("masked") / "run.zarr", input={"mask": mask, "roi": "0:7,10:70,3:90"})


def test_what_is_wanted_stays_and_the_rest_is_background(mask, plain, masked):
    every = zarr.open_array(f"{mask}/0", mode="r")[:].repeat(4, 1).repeat(4, 2)[:, :70]
    want = np.concatenate([every, every[..., -1:].repeat(2, 2)], 2).astype(bool)
    want[:, :10] = want[..., :3] = False
    found, all_of_it = probabilities(masked[0].out), probabilities(plain[0].out)
    np.testing.assert_array_equal(found, all_of_it * want)
    assert found.any()
    assert masked[0].roi.voxels == want.sum()


@given(block=st.tuples(*(st.integers(n // 2, n) for n in SHAPE)))
@hypothesis_settings(max_examples=3, deadline=None, derandomize=True)
def test_a_masked_run_does_not_depend_on_blocks(em, mask, masked, tmp_path_factory, block):
    out = tmp_path_factory.mktemp("cut") / "run.zarr"
    run, _ = run_stages(em, out, input={"mask": mask, "roi": "0:7,10:70,3:90"}, blocks={"shape": block})
    assert probabilities(run.out).tobytes() == probabilities(masked[0].out).tobytes()
    assert digest(run.out) == digest(masked[0].out)


def test_constant_tiles_are_0_and_not_inferred(em, plain):
    """Tiles begin at 0 and 26 along x and at 0 and 6 along y: those at 26 are black from section 3 on, with 2 around."""
    run, ledger = plain
    constant = 2 * (SHAPE[0] - 3)
    assert ledger.inferred_voxels == run.inferred_voxels - constant * 64 * 64
    assert not probabilities(run.out)[:, 3:, :, 64:].any()


def test_only_what_was_inferred_is_counted(masked, plain):
    run, ledger = masked
    assert 0 < ledger.inferred_voxels < run.inferred_voxels < plain[0].inferred_voxels
    assert redundancy(run, ledger.inferred_voxels) == ledger.inferred_voxels / run.roi.voxels


def test_a_run_with_workers_gives_the_same(em, mask, masked, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    part = {"input": {"mask": mask, "roi": "0:7,10:70,3:90"}, "blocks": {"shape": (3, 40, 50)}}
    config = settings(**{**RUN_STAGES_SETTINGS, **part})
    api.infer(em, out, config=config, progress=Quiet())
    assert probabilities(out).tobytes() == probabilities(masked[0].out).tobytes()
    assert digest(out) == digest(masked[0].out)


def test_a_mask_that_wants_nothing_gives_no_object(em, tmp_path):
    empty = write_volume(str(tmp_path / "empty.zarr"), np.zeros(SHAPE, np.uint8))
    config = settings(**{**RUN_STAGES_SETTINGS, "input": {"mask": empty}})
    assert api.infer(em, str(tmp_path / "run.zarr"), config=config, progress=Quiet()).object_count == 0


def test_probabilities_from_elsewhere_are_masked_too(plain, mask, tmp_path):
    channels = {"mask_channel": 0, "contour_channel": 1}
    config = load(base={**RUN_STAGES_SETTINGS, "input": {"mask": mask}, "probabilities": channels})
    out = str(tmp_path / "run.zarr")
    api.segment(f"{plain[0].out}/0", out, config=config, progress=Quiet())
    run = Run.from_json(json.loads(files.read_bytes(out, "run.json")))
    want = run.roi.read(Box.from_shape(SHAPE))
    np.testing.assert_array_equal(probabilities(out), probabilities(plain[0].out) * want)


def test_mask_and_box_decide_the_keys(em, mask, plain, tmp_path):
    run = plain[0]
    image = volume.open(em)
    other = write_volume(str(tmp_path / "mask.zarr"), np.ones(SHAPE, np.uint8))
    found = [find(Input(**options), SHAPE, image.voxel_size_nm)
             for options in ({}, {"roi": "0:7,0:9,0:9"}, {"mask": mask}, {"mask": other})]  # fmt: skip
    assert len({keys(replace(run, roi=one))["predict"] for one in found}) == 4
    again = replace(run, roi=found[2])
    assert keys(Run.from_json(again.to_json())) == keys(again)


@pytest.mark.parametrize(
    ("shape", "roi", "said"),
    [
        (None, "0:7,0:70,0:91", r"roi 0:7,0:70,0:91 leaves the volume, whose shape is 7 x 70 x 90"),
        ((7, 70, 61), "", r"mask .* has shape 7 x 70 x 61 and the volume 7 x 70 x 90"),
        ((8, 70, 90), "", r"mask .* has shape 8 x 70 x 90 and the volume 7 x 70 x 90"),
    ],
)
def test_what_does_not_fit_the_volume_is_refused(tmp_path, shape, roi, said):
    path = write_volume(str(tmp_path / "mask.zarr"), np.ones(shape, np.uint8)) if shape else ""
    with pytest.raises(UserError, match=said):
        find(Input(mask=path, roi=roi), SHAPE, None)


def test_what_is_no_box_is_refused():
    with pytest.raises(UserError, match=r"input\.roi: box '1:2' is not of the form z0:z1,y0:y1,x0:x1"):
        load(sets=["input.roi=1:2"])


@given(st.data())
@hypothesis_settings(max_examples=40, deadline=None)
def test_a_coarse_mask_is_its_nearest_voxel(data):
    """Held against the formula, read in any box; `meets` agrees with `read`."""
    shape = data.draw(st.tuples(*(st.integers(1, 20) for _ in range(3))))
    factor = data.draw(st.tuples(*(st.integers(1, 5) for _ in range(3))))
    small = tuple(-(-n // f) for n, f in zip(shape, factor, strict=True))
    voxels = np.random.default_rng(data.draw(st.integers(0, 9))).random(small) < 0.2
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    box = Box(start, tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)))

    class InMemory(volume.Volume):
        def read(self, box):
            return voxels[box.slices].astype(np.uint8)

    found = RegionOfInterest(Box.from_shape(shape), InMemory("", "zarr", small, "uint8", None, small), factor)
    at = np.ix_(*(np.arange(a, b) // f for a, b, f in zip(box.start, box.stop, factor, strict=True)))
    np.testing.assert_array_equal(found.read(box), voxels[at])
    assert found.meets(box) == voxels[at].any()
    whole = np.ix_(*(np.arange(n) // f for n, f in zip(shape, factor, strict=True)))
    assert full_counts(found)["voxels"] == voxels[whole].sum()


@given(st.data())
@hypothesis_settings(max_examples=40, deadline=None)
def test_what_is_known_of_a_mask_leaves_no_wanted_voxel_out(data):
    """Of a coarse one, of one of a resampled volume, in cells of any size, in a box."""
    shape = data.draw(st.tuples(*(st.integers(1, 20) for _ in range(3))))
    factor = data.draw(st.tuples(*(st.integers(1, 5) for _ in range(3))))
    small = tuple(-(-n // f) for n, f in zip(shape, factor, strict=True))
    voxels = np.random.default_rng(data.draw(st.integers(0, 9))).random(small) < data.draw(st.sampled_from([0.01, 0.2]))

    def boxed(shape):
        start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        return Box(start, tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)))

    class InMemory(volume.Volume):
        def read(self, box):
            return voxels[box.slices].astype(np.uint8)

    occupied = Occupied(small, most=data.draw(st.sampled_from([1, 30, 10000])))
    occupied.add(Box.from_shape(small), voxels)
    region = RegionOfInterest(boxed(shape), InMemory("", "zarr", small, "uint8", None, small), factor)
    region = replace(region, occupied=occupied.occupancy())
    if data.draw(st.booleans()):
        own = data.draw(st.tuples(*(st.integers(1, 20) for _ in range(3))))
        region, shape = (
            region.resampled(Grid.between(own, (1.0, 1.0, 1.0), shape, tuple(map(truediv, own, shape)))),
            own,
        )
    wanted, box = region.read(Box.from_shape(shape)), boxed(shape)
    inside = np.zeros(shape, bool)
    inside[region.part(box).slices] = True
    assert not (wanted & ~inside)[box.slices].any()
    assert region.meets(box) == wanted[box.slices].any()
    grid = Blocks(shape, data.draw(st.tuples(*(st.integers(1, 8) for _ in range(3)))))
    edges = [np.array([grid.edge(k, c) for c in range(n + 1)]) for k, n in enumerate(grid.counts)]
    counts = region.count([(edge[:-1], edge[1:]) for edge in edges]).ravel()
    held = np.array([wanted[each.slices].any() for each in grid])
    assert (counts[held] > 0).all()
    assert all(0 <= count <= each.voxels for count, each in zip(counts, grid, strict=True))
    if occupied.cells.block == (1, 1, 1) and not region.grid:
        assert counts.sum() == wanted.sum() or factor != (1, 1, 1)
        np.testing.assert_array_equal(counts > 0, held)


@pytest.mark.parametrize("shards", [None, (8, 32, 32)])
def test_a_mask_that_stores_little_is_counted_however_large_it_is(tmp_path, monkeypatch, shards):
    """Each chunk that is there is read once, no other is; one that is changed changes the checksum."""
    shape = (40, 70, 90)
    mask = zarr.create_array(tmp_path / "mask.zarr", shape=shape, chunks=(4, 16, 16), shards=shards, dtype="uint8")
    for spot in ("0:3,0:9,0:9", "30:40,60:70,81:90"):
        mask[Box.parse(spot).slices] = 1
    settings = Input(mask=str(tmp_path / "mask.zarr"))
    whole = find(settings, shape, None)
    read, boxes = volume.Volume.read, []
    monkeypatch.setattr(roi, "MAX_SCANNED_VOXELS", 100_000)
    with monkeypatch.context() as patched:
        patched.setattr(volume.Volume, "read", lambda source, box: boxes.append(box) or read(source, box))
        found = find(settings, shape, None)
    stored = found.mask.stored()
    assert (found.voxels, found.occupied) == (whole.voxels, whole.occupied)
    assert boxes == stored.boxes()
    assert 0 < len(boxes) < len(stored.grid) / 2
    mask[39, 69, 88] = 0
    assert find(settings, shape, None).checksum != found.checksum
    monkeypatch.setattr(roi, "MAX_SCANNED_VOXELS", 10)  # then the chunks themselves are what is known
    sampled = find(settings, shape, None)
    assert found.occupied.held.sum() < sampled.occupied.held.sum() < sampled.occupied.held.size / 2


def test_cells_of_a_mask_that_nobody_can_read_are_refused(masked):
    plain = masked[0].to_json()
    for name, value in {"packed": "eNpjYCAL1P//", "edge": 0, "shape": (7, 18, 21)}.items():
        roi_plain = {**plain["roi"], "occupied": {**plain["roi"]["occupied"], name: value}}
        with pytest.raises(DamagedFileError, match=r"run\.json is damaged"):
            Run.from_json({**plain, "roi": roi_plain})


def test_what_is_not_stored_may_be_wanted(tmp_path):
    """Where the fill value is not 0, and where nobody can tell."""
    for name, form in {"ones": {"fill_value": 1}, "none": {"zarr_format": 2, "fill_value": None}}.items():
        array = zarr.create_array(tmp_path / f"{name}.zarr", shape=(4, 8, 8), chunks=(2, 4, 4), dtype="uint8", **form)
        array[:2, :4, :4] = 1
        assert volume.open(str(tmp_path / f"{name}.zarr")).stored() is None
    ones = find(Input(mask=str(tmp_path / "ones.zarr")), (4, 8, 8), None)
    assert (ones.voxels, ones.occupied.held.all()) == (256, True)


@pytest.mark.parametrize("connectivity", [6, 26])
def test_a_block_without_mask_has_one_table_whatever_its_shape(connectivity):
    box = Box((4, 8, 0), (9, 15, 6))
    height = np.full(tuple(n + 2 for n in box.shape), OUTSIDE, np.int32)
    _, table = watershed_block(height, np.zeros(box.shape, np.uint8), box, (20, 20, 20), connectivity)
    for name, expected in vars(table).items():
        stored = getattr(instances.no_basins(connectivity), name)
        np.testing.assert_array_equal(stored, expected)
        assert getattr(stored, "dtype", None) == getattr(expected, "dtype", None)


def test_what_is_not_wanted_is_not_stored(em, tmp_path):
    run, _ = run_stages(em, tmp_path / "run", input={"roi": "0:3,0:30,0:30"}, blocks={"shape": (3, 30, 30)})
    layout, far = run.layout, Box((6, 60, 60), SHAPE)
    for array in (layout.probabilities, layout.regions, layout.labels()):
        stored = [
            path for path in Path(array.path, array.name).rglob("*") if path.is_file() and path.name != "zarr.json"
        ]
        assert len(stored) <= 8 < len(run.grid)
        assert array.is_empty(far)
    assert not layout.probabilities.is_empty(Box.from_shape(SHAPE))


def test_blocks_beyond_the_region_get_no_task(em, tmp_path):
    """Nor a marker or a table; and checks, another decision and a full look at the holes work all the same."""
    out, show = str(tmp_path / "run.volseg.zarr"), Quiet()
    options = {"input": {"roi": "1:3,10:40,20:58"}, "blocks": {"shape": (4, 20, 30)}}
    api.infer(em, out, config=settings(**options, cluster={"workers": 1}), progress=show)
    run = load_run(out)
    inside = run.grid.overlapping(run.roi.roi)
    assert len(inside) < len(run.grid) / 2
    assert run.layout.block_basins.count() == run.layout.links.count() == len(inside)
    assert sorted(markers_of(run).done("relabel")) == inside
    assert sum(show.stages["fragments"]) == run.roi.roi.voxels
    assert verify(out).ok
    digests = [digest(out)]
    decide(out, lambda config: with_stitch(config, fill_holes_voxels=50), progress=Quiet())
    assert run.layout.block_basins.count() == len(run.grid)
    decide(out, lambda config: with_stitch(config, fill_holes_voxels=0), progress=Quiet())
    digests.append(digest(out))
    assert len(set(digests)) == 1


def with_stitch(config, **rules):
    return config.model_copy(update={"stitch": config.stitch.model_copy(update=rules)})
