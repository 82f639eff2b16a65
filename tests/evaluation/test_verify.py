"""A finished run is recomputed with other cuts: a sound one passes whole, a tampered one is found out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import zarr
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.helpers import SHAPE, Quiet, decide, settings
from volseg import api
from volseg.box import Blocks, Box
from volseg.config import load
from volseg.errors import UserError
from volseg.evaluation.recheck import CHECKS, check_box, heights, sure_joins
from volseg.evaluation.recompute import rejoin
from volseg.evaluation.seams import MEASURES, compare, measure_seams, permutation_p
from volseg.evaluation.stored import StoredRun, open_stored
from volseg.evaluation.synthetic_volume import write_synthetic
from volseg.evaluation.verify import BOX, draw_boxes, verify
from volseg.io import arrays, volume
from volseg.io.occupancy import Occupied
from volseg.io.roi import RegionOfInterest
from volseg.segmentation import stitch
from volseg.segmentation.agglomerate import forest
from volseg.segmentation.heights import OUTSIDE
from volseg.segmentation.rules import Rules

BLOCK = (11, 75, 85)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in eight blocks, with objects on their faces."""
    folder = tmp_path_factory.mktemp("verify")
    write_synthetic(f"{folder}/em.zarr", SHAPE, (22, 75, 170), seed=12, overwrite=False, progress=Quiet())
    config = settings(blocks={"shape": BLOCK}, cluster={"workers": 1})
    api.infer(f"{folder}/em.zarr", f"{folder}/run.volseg.zarr", config=config, progress=Quiet())
    return f"{folder}/run.volseg.zarr"


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run to tamper with."""
    return shutil.copytree(run, tmp_path / "copy.volseg.zarr")


def failed(result):
    return {name for box in result.boxes for name, count in box.wrong.items() if count}


def test_a_sound_run_is_equal_in_every_check(run):
    result = verify(run)
    assert result.ok
    assert [box.box for box in result.boxes] == [Box.from_shape(SHAPE)]  # one box holds this volume
    assert set(result.boxes[0].wrong.values()) == {0}
    assert result.boxes[0].complete_objects == result.objects > 3
    assert result.relabeling.wrong == result.rejoining.wrong == 0
    assert result.relabeling.objects == result.objects
    assert json.loads(json.dumps(result.to_json())) == result.to_json()
    text = str(result)
    assert "every label equal" in text
    assert text.endswith("all that was checked is equal")
    assert "every label equal" in result._repr_html_()


def test_a_run_on_a_grid_of_26_neighbors_that_follows_distance_is_equal_in_every_check(copy):
    options = {"connectivity": 26, "height": "distance", "distance_nm": 40}
    decide(str(copy), lambda _: settings(fragments=options, blocks={"shape": BLOCK}), progress=Quiet())
    stored = open_stored(copy)
    assert stored.config.fragments.connectivity == 26
    result = verify(copy)
    assert result.ok
    assert result.boxes[0].wrong.keys() == set(CHECKS)
    boxes = [check_box(stored, box) for box in Blocks(SHAPE, (13, 61, 53))]
    assert all(set(box.wrong.values()) == {0} for box in boxes)


def test_a_run_under_every_rule_is_equal_too(copy):
    rules = ["persistence=0.02", "join_mean=0.5", "fill_holes_voxels=3000", "max_voxels=60000"]
    change = [f"stitch.{rule}" for rule in (*rules, "min_volume_nm3=3e6", "count_cut=true", "seed=0.93")]
    before = open_stored(copy).objects["id"].size
    decide(str(copy), lambda c: load(sets=change, base=c.model_dump(mode="json", exclude={"train"})), progress=Quiet())
    result = verify(copy)
    assert result.ok, str(result)
    assert result.objects != before


def test_boxes_that_cut_objects_and_blocks_accuse_no_sound_run(run):
    stored = open_stored(run)
    boxes = [check_box(stored, box) for box in Blocks(SHAPE, (9, 61, 53))]
    assert all(set(box.wrong.values()) == {0} for box in boxes)
    assert sum(box.sure_joins for box in boxes) > 10
    assert sum(box.masked for box in boxes) == check_box(stored, Box.from_shape(SHAPE)).masked


def test_a_changed_label_is_found(copy):
    labels = zarr.open_array(str(copy / "labels/instances/0"), mode="r+")
    place = tuple(int(n) for n in np.argwhere(labels[:] == 2)[0])
    labels[place] = 1
    result = verify(copy)
    assert not result.ok
    assert failed(result) == {"ids", "rule", "table"}
    assert result.boxes[0].first["ids"] == list(place) == result.relabeling.first
    assert result.boxes[0].wrong["ids"] == result.relabeling.wrong == 1
    assert "NOT EQUAL" in str(result)


def test_a_label_outside_the_mask_is_found(copy):
    labels = zarr.open_array(str(copy / "labels/instances/0"), mode="r+")
    stored = open_stored(copy)
    whole = Box.from_shape(SHAPE)
    masked = heights(stored, stored.probability(whole), whole)[1:-1, 1:-1, 1:-1] != OUTSIDE
    labels[tuple(np.argwhere(~masked)[5])] = 3
    assert "mask" in failed(verify(copy))


def test_a_lost_object_and_swapped_ids_are_found_without_the_work_folder(copy):
    shutil.rmtree(copy / "work")
    labels = zarr.open_array(str(copy / "labels/instances/0"), mode="r+")
    sound = labels[:]
    labels[:] = np.where(sound == 1, 0, sound)
    assert "rule" in failed(verify(copy))
    labels[:] = np.where((sound == 1) | (sound == 2), 3 - sound, sound)
    assert "rule" in failed(verify(copy))


def test_changed_fragments_of_one_block_are_found(copy):
    regions = zarr.open_array(str(copy / "work/fragments"), mode="r+")
    block = regions[:11, :75, :85]
    numbers, counts = np.unique(block[block > 0], return_counts=True)
    large = numbers[np.argmax(counts)]
    place = tuple(np.argwhere(block == large)[0])
    regions[place] = next(n for n in numbers if n != large)
    result = verify(copy)
    assert "basins" in failed(result)
    assert result.boxes[0].first["basins"] == [int(n) for n in place]
    assert result.relabeling.wrong == 0  # the labels are still right
    regions[place] = 10**6
    assert {"basins", "ids"} <= failed(verify(copy))


def test_tables_that_lead_in_circles_are_found(copy):
    for i in range(len(Blocks(SHAPE, BLOCK))):
        key = copy / f"work/links/{i}.npz"
        links = dict(np.load(key))
        if len(links["drains"]):
            links["drains"][:, 1] = links["drains"][:, 0]
            np.savez(key, **links)
    result = verify(copy)
    assert "basins" in failed(result)
    assert result.rejoining.wrong > 0


def test_links_to_blocks_that_do_not_exist_are_found(copy):
    keys = [copy / f"work/links/{i}.npz" for i in range(len(Blocks(SHAPE, BLOCK)))]
    key = next(key for key in keys if len(np.load(key)["drains"]))
    links = dict(np.load(key))
    links["drains"][:, 1] = stitch.global_id(99, links["drains"][:, 1])
    np.savez(key, **links)
    result = verify(copy)
    assert "basins" in failed(result)
    assert result.rejoining.wrong == len(links["drains"])


def test_objects_joined_by_a_changed_id_map_are_found_without_any_box(copy):
    key = copy / "work/labels/0.npz"
    ids = dict(np.load(key))
    kept = np.flatnonzero(ids["label"])
    ids["label"][kept[0]] += 1
    np.savez(key, **ids)
    assert rejoin(open_stored(copy)).wrong == 1


def test_a_changed_table_is_found(copy):
    table = pandas.read_parquet(copy / "tables/objects.parquet")
    table.loc[2, "voxels"] += 1
    table.to_parquet(copy / "tables/objects.parquet", index=False)
    assert failed(verify(copy)) == {"table"}


def test_a_run_without_its_work_folder_is_checked_as_far_as_possible(copy):
    shutil.rmtree(copy / "work")
    result = verify(copy)
    assert result.ok
    assert result.notes == (
        "the run's work folder was cleaned: stored basins and id maps cannot be checked, the rest is",
    )
    wrong = result.boxes[0].wrong
    assert {name for name, count in wrong.items() if count is None} == {"basins", "ids"}
    assert wrong["rule"] == wrong["table"] == 0


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_what_is_no_finished_run_is_refused(tmp_path, text):
    if text:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"is not a finished volseg run|is damaged|another version of volseg"):
        verify(str(tmp_path))


def test_a_damaged_work_folder_is_named(copy):
    key = copy / "work/tables/0.npz"
    key.write_bytes(key.read_bytes()[:100])
    assert "work/tables/0.npz" in verify(copy).damaged
    key.unlink()
    assert "work/tables holds 7 of 8 blocks" in verify(copy).notes[0]


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.6), st.integers(0, 20), st.integers(0, 30))
def test_sure_joins_hold_in_the_whole_graph(seed, outside, persistence, low):
    """Any part of a graph: what `sure` joins there, Kruskal joins on all of it."""
    rng = np.random.default_rng(seed)
    n = 30
    pairs = np.unique(np.sort(rng.integers(0, n, (70, 2)), axis=1), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    pairs = rng.permutation(pairs)
    saddle = np.sort(rng.integers(0, 50, len(pairs)))
    depth = np.full(n, 50)
    for end in pairs.T:
        np.minimum.at(depth, end, saddle)
    depth -= rng.integers(0, 20, n)
    rules = Rules(8, persistence, low_height=low)
    label, _ = forest(pairs[:, 0], pairs[:, 1], saddle, depth, *rules.seeds)
    here = rng.random(len(pairs)) > outside
    outward = np.isin(np.arange(n), pairs[~here])
    root, has_seed, whole = sure_joins(pairs[here, 0], pairs[here, 1], saddle[here], depth, outward, rules)
    np.testing.assert_array_equal(label, label[root])
    holds_seed = np.isin(label, label[depth <= rules.seeds[1]])
    assert holds_seed[has_seed[root]].all()
    for top in np.flatnonzero(whole & (root == np.arange(n))):
        np.testing.assert_array_equal(label == label[top], root == top)


def test_all_joins_are_sure_where_nothing_lies_outside():
    a, b = np.array([0, 1, 2]), np.array([1, 2, 3])
    depth = np.array([3, 5, 6, 3])
    root, has_seed, whole = sure_joins(a, b, np.array([5, 9, 6]), depth, np.zeros(4, bool), Rules(3))
    assert root.tolist() == [0, 0, 0, 3]
    assert has_seed[[0, 3]].all()
    assert whole[[0, 3]].all()
    root, _, whole = sure_joins(a, b, np.array([5, 9, 6]), depth, np.array([False, True, False, False]), Rules(3))
    assert root.tolist() == [0, 1, 1, 3]
    assert not whole[[0, 1]].any()


def rods(shape, block, torn):
    """Rods along z that end at random; those that are ``torn`` get another label behind each block face."""
    rng = np.random.default_rng(4)
    labels = np.zeros(shape, np.int64)
    for i, (y, x) in enumerate(np.ndindex(shape[1] // 5, shape[2] // 5)):
        cuts = np.sort(rng.choice(np.arange(1, shape[0]), 6, replace=False))
        along = 1 + np.searchsorted(cuts, np.arange(shape[0]), side="right")
        along = along + 10 * (np.arange(shape[0]) // block[0]) if torn else along
        labels[:, 5 * y : 5 * y + 3, 5 * x : 5 * x + 3] = (along + 1000 * (i + 1))[:, None, None]
    return labels


def described(stored, block, **fragments):
    """The same run in other blocks and with other settings of [fragments]."""
    config = stored.config.model_copy(update={"fragments": stored.config.fragments.model_copy(update=fragments)})
    return replace(stored.run, config=config, block=block, predict_block=block)


@pytest.mark.parametrize("torn", [False, True])
def test_seams_are_seen_where_they_are_and_only_there(tmp_path, run, torn):
    shape, block = (96, 40, 40), (8, 40, 40)
    path = str(tmp_path / "rods.zarr")
    labels = rods(shape, block, torn)
    arrays.create_group(path)
    arrays.create_array(path, "0", shape=(2, *shape), dtype="uint8", chunk=(1, *shape), shard=(2, *shape), axes="czyx")
    arrays.create_array(path, "labels", shape=shape, dtype="uint32", chunk=shape, shard=shape, axes="zyx")
    arrays.write(arrays.open_array(path, "labels"), Box.from_shape(shape), labels)
    arrays.write(arrays.open_array(path, "0"), Box.from_shape(shape), np.stack([(labels > 0) * np.uint8(255)] * 2))
    ids, voxels = np.unique(labels[labels > 0], return_counts=True)
    (tmp_path / "rods.zarr/tables").mkdir()
    pandas.DataFrame({"id": ids, "voxels": voxels}).to_parquet(tmp_path / "rods.zarr/tables/objects.parquet")
    description = described(open_stored(run), block, smooth=(0, 0, 0))
    stored = StoredRun(path, description, volume.open(path, dataset="labels"))
    seams = measure_seams(stored, np.random.default_rng(0))
    assert (seams.faces, seams.controls) == (11, 12)
    assert seams.visible == torn
    assert (seams.measures["changes"].p < 0.001) == torn


def test_an_exact_run_hardly_ever_draws_the_note():
    """Planes whose kind says nothing, with values that neighbors share and that drift along the axis."""
    rng, low = np.random.default_rng(7), 0
    for _ in range(60):
        rows = []
        for axis, count in enumerate((12, 48, 48)):
            noise = np.cumsum(rng.normal(size=(count, len(MEASURES))), axis=0) / 4 + rng.normal(size=(count, 1))
            rows += [(axis, k % 2, *values) for k, values in enumerate(noise)]
        seams = compare(np.array(rows), rng)
        assert not seams.visible
        low += seams.p < 0.05
    assert low <= 6


def test_few_planes_tell_nothing_and_say_so(run):
    result = verify(run)
    assert result.seams.faces == 3
    assert result.seams.p is None
    assert not result.seams.visible
    assert "too few planes" in str(result)


def test_chance_gives_an_even_p_value():
    rng = np.random.default_rng(1)
    mark = np.arange(40) < 20
    values = [permutation_p([(mark, rng.random(40))], rng) for _ in range(20)]
    assert 0.2 < np.mean(values) < 0.8
    assert permutation_p([(mark, np.where(mark, 1.0, 0.0))], rng) < 0.001
    assert permutation_p([(mark, np.ones(40))], rng) == 1.0


def test_boxes_are_drawn_by_the_seed_and_lie_inside(run):
    stored = open_stored(run)
    labels = replace(stored.labels, shape=(300, 2000, 900))
    large = replace(stored, labels=labels, run=described(stored, (100, 500, 900)))
    boxes = draw_boxes(large, 9, np.random.default_rng(3))
    assert boxes == draw_boxes(large, 9, np.random.default_rng(3)) != draw_boxes(large, 9, np.random.default_rng(4))
    assert len(boxes) == 9
    assert all(box.shape == BOX and box.clip(large.shape) == box for box in boxes)
    assert all(len(large.grid.overlapping(box)) > 1 for box in boxes[::2])


def test_boxes_lie_in_what_was_wanted(run):
    stored = open_stored(run)
    region = RegionOfInterest(Box.parse("100:220,1400:2000,0:20"))
    description = replace(described(stored, (100, 500, 900)), roi=region)
    large = replace(stored, labels=replace(stored.labels, shape=(300, 2000, 900)), run=description)
    boxes = draw_boxes(large, 9, np.random.default_rng(3))
    assert all(box.shape == BOX and box.clip(large.shape) == box for box in boxes)
    assert all(
        box.start[0] >= 100 and box.stop[0] <= 220 and box.start[1] >= 1400 and box.start[2] == 0 for box in boxes
    )
    assert len(large.grid.overlapping(boxes[0])) == 4  # the one corner in there; the boxes around it are one


def test_boxes_lie_where_a_mask_wants_something(run):
    stored, shape = open_stored(run), (300, 2000, 900)
    mask = replace(stored.run.source, shape=shape)
    held = Occupied(shape)
    spots = [Box.parse("10:90,100:400,0:300"), Box.parse("200:280,1400:1700,500:850")]
    for spot in spots:
        held.add(spot)
    region = RegionOfInterest(Box.from_shape(shape), mask, occupied=held.occupancy())
    description = replace(described(stored, (100, 500, 900)), source=mask, roi=region)
    large = replace(stored, labels=replace(stored.labels, shape=shape), run=description)
    boxes = draw_boxes(large, 9, np.random.default_rng(3))
    assert {next(k for k, spot in enumerate(spots) if box.intersect(spot).voxels) for box in boxes} == {0, 1}


def test_a_path_is_named_where_the_table_is_missing(copy):
    Path(copy, "tables/objects.parquet").unlink()
    assert "tables/objects.parquet" in verify(copy).damaged
