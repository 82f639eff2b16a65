"""The proofreading queue: every join and border that counts, with its margin, whatever the blocks."""

from dataclasses import replace

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import all_rules, basins_of, cut, fields, row
from volseg.box import Box
from volseg.config import Fragments
from volseg.io import volume
from volseg.segmentation import saddles
from volseg.segmentation.heights import MAX_LEVEL, seed_height
from volseg.segmentation.rules import Rules, label_basins
from volseg.segmentation.stitch import gather

VALLEYS = row(4, 6, 5, 1, 0, 9, 1)


def ranked_saddles(height, rules, block):
    basins = basins_of(height, block)
    return saddles.rank_saddles(basins, rules, label_basins(basins, rules))


@settings(max_examples=40, deadline=None)
@given(field=fields(), data=st.data())
def test_the_table_does_not_see_the_blocks(field, data):
    height, level = field
    rules = data.draw(all_rules(level))
    block = tuple(data.draw(st.integers(1, n)) for n in height.shape)
    np.testing.assert_array_equal(ranked_saddles(height, rules, block), ranked_saddles(height, rules, height.shape))


@settings(max_examples=40, deadline=None)
@given(field=fields(), connectivity=st.sampled_from([6, 26]), data=st.data())
def test_borders_and_confidence_need_no_basins_of_the_volume(connectivity, field, data):
    height, level = field
    rules = replace(data.draw(all_rules(level)), persistence=0, join_height=-1, fill_voxels=0)
    block = tuple(data.draw(st.integers(1, n)) for n in height.shape)
    _, _, tables, links = cut(height, block, connectivity=connectivity)
    basins, basin_of = gather(tables, links)
    label = label_basins(basins, rules)
    parts = [saddles.block_borders(i, table, links[i], lambda j: label[basin_of[j]]) for i, table in enumerate(tables)]
    graph = saddles.object_graph(parts)
    each = np.arange(1, 1 + graph.minimum.size)
    names = [name for name in saddles.ROW.names if name != "edge"]
    flat = saddles.rank_saddles(basins, rules, label)
    np.testing.assert_array_equal(saddles.rank_saddles(graph, rules, each)[names], flat[flat["kind"] == 1][names])
    np.testing.assert_array_equal(
        saddles.confidence(graph, each, Fragments()), saddles.confidence(basins, label, Fragments())
    )


@pytest.mark.parametrize(
    ("rules", "expected"),  # kind, rule, margin, height and place of the saddle, sizes
    [
        (Rules(4), [("border", "seed", 2, 6, 1, [2, 4]), ("border", "seed", 5, 9, 5, [4, 1])]),
        (Rules(6), [("join", "seed", 0, 6, 1, [4, 2]), ("border", "seed", 3, 9, 5, [6, 1])]),
        (Rules(4, persistence=3), [("join", "persistence", 1, 6, 1, [4, 2]), ("border", "seed", 5, 9, 5, [6, 1])]),
        (Rules(4, join_height=6), [("join", "mean", 0, 6, 1, [4, 2]), ("border", "mean", 3, 9, 5, [6, 1])]),
        (Rules(3), [("join", "unseeded", 1, 6, 1, [4, 2]), ("border", "seed", 6, 9, 5, [6, 1])]),
        (Rules(3, persistence=5), [("join", "unseeded", 3, 6, 1, [4, 2]), ("border", "persistence", 3, 9, 5, [6, 1])]),
        (Rules(2, low_height=5), [("border", "unseeded", 1, 6, 1, [2, 4]), ("border", "unseeded", 4, 9, 5, [4, 1])]),
        (Rules(6, min_voxels=3), []),
    ],
)
def test_each_rule_tells_how_near_it_came(rules, expected):
    rows = ranked_saddles(VALLEYS, rules, (1, 1, 2))
    names = [(saddles.KINDS[r["kind"]], saddles.RULES[r["rule"]]) for r in rows]
    columns = [rows[name].tolist() for name in ("margin", "saddle", "voxel", "voxels")]
    assert [(*name, *rest) for name, *rest in zip(names, *columns, strict=True)] == expected


def test_confidence_is_the_depth_below_the_lowest_saddle():
    basins, options = basins_of(VALLEYS * 1632, (1, 1, 7)), Fragments()  # a tenth of all heights for each unit
    label = label_basins(basins, Rules(4 * 1632))
    np.testing.assert_allclose(saddles.confidence(basins, label, options), [0.2, 0.6, 0.8])
    np.testing.assert_allclose(saddles.confidence(basins, np.minimum(label, 1), options), [1.0])


def test_confidence_of_distances_is_that_of_probabilities():
    """By hand: caps of 10 voxels, distances 8 and 6 and a saddle at 0. With every basin labeled, label 0 has no height."""
    settings = Fragments(height="distance", distance=10)
    heights = [(100 - far**2) * (MAX_LEVEL + 1) for far in (8, 0, 6)]
    basins = basins_of(row(*heights), (1, 1, 3))
    label = label_basins(basins, Rules(seed_height(0.5, settings)))
    assert label.tolist() == [1, 2]
    np.testing.assert_allclose(saddles.confidence(basins, label, settings), [0.8, 0.6])
    table = saddles.saddles_table(
        saddles.rank_saddles(basins, Rules(seed_height(0.5, settings)), label), settings, (1, 1, 3), (5.0, 5.0, 5.0)
    )
    assert table["saddle_probability"].tolist() == [0.0]


def test_a_runs_table_holds_every_pair_of_objects_that_touch(reference):
    table = pandas.read_parquet(f"{reference}/tables/merges.parquet")
    labels = volume.open(reference, dataset="labels/instances/0")
    ids = labels.read(Box.from_shape(labels.shape)).astype(np.int64)
    expected = set()
    for axis in range(3):
        near, far = (np.delete(ids, end, axis).ravel() for end in (-1, 0))
        apart = (near != far) & (near > 0) & (far > 0)
        expected |= set(zip(*np.sort([near[apart], far[apart]], axis=0).tolist(), strict=True))
    borders = table[table["kind"] == "border"]
    assert set(zip(borders["label_a"], borders["label_b"], strict=True)) == expected
    assert (table["margin"] >= 0).all()
    assert table["margin"].is_monotonic_increasing
    place = ids[table["z"], table["y"], table["x"]]
    assert ((place == table["label_a"]) | (place == table["label_b"])).all()
    known = pandas.read_parquet(f"{reference}/tables/objects.parquet")["confidence"]
    assert known.between(0, 1).all()
