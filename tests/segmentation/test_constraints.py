"""Corrections of objects: what must be one is one, what must be two is two, all else stays, however the volume is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers import all_rules, cut, fields, row
from tests.segmentation.test_exact import brute_force, contacts, descents, labels_of_blocks, paint, replayed
from volseg.box import Blocks, Box
from volseg.segmentation import constraints, hierarchy, holes
from volseg.segmentation.constraints import Constraints
from volseg.segmentation.heights import OUTSIDE
from volseg.segmentation.rules import Rules, label_basins
from volseg.segmentation.stitch import REGION_MASK, gather


def regions_at(grid, regions, pairs):
    """The global ids of the regions at pairs of voxels (linear indices)."""
    out = np.zeros((len(pairs), 2), np.int64)
    for k, pair in enumerate(pairs):
        for end, voxel in enumerate(pair):
            z, y, x = (int(n) for n in np.unravel_index(voxel, grid.shape))
            point = Box((z, y, x), (z + 1, y + 1, x + 1))
            (i,) = grid.overlapping(point)
            out[k, end] = i << 32 | int(regions[i][point.slices_within(grid[i])][0, 0, 0])
    return out


def by_region(grid, regions, joins, splits):
    return Constraints(regions_at(grid, regions, joins), regions_at(grid, regions, splits))


def flat(height, rules, block, joins, splits, connectivity=6):
    """Labels by one process."""
    grid, regions, tables, links = cut(height, block, connectivity=connectivity)
    basins, basin_of = gather(tables, links)
    wanted = by_region(grid, regions, joins, splits).looked_up(basin_of.__getitem__)
    if not rules.fill_voxels:
        label = label_basins(basins, rules, constraints=wanted)
        return paint(grid, regions, [label[basin] for basin in basin_of])
    parts = [holes.block_holes(region, box, height.shape) for region, box in zip(regions, grid, strict=True)]
    touching = [holes.face_contacts(i, parts.__getitem__, grid) for i in range(len(grid))]
    full, hole_of = holes.gather(parts, touching, basin_of)
    label, count = label_basins(basins, rules, full, wanted), basins.minimum.size
    places = [np.r_[basin, count + hole] for basin, hole in zip(basin_of, hole_of, strict=True)]
    return paint(grid, map(holes.number_holes, regions), [label[place] for place in places])


def tree(height, rules, block, joins, splits, connectivity=6):
    """Labels by a tree of blocks, then corrected."""
    grid, regions, tables, links = cut(height, block, connectivity=connectivity)
    wanted = by_region(grid, regions, joins, splits)
    graphs, done, destinations = {}, {}, {}
    for step in range(hierarchy.top_level(grid) + 1):
        for n in range(len(hierarchy.parts(grid, step))):
            if step == 0:
                near = {j: links[j] for j in hierarchy.linked_blocks(grid, n, connectivity)}
                pinned = wanted.named[wanted.named >> 32 == n] & REGION_MASK
                graph = hierarchy.block_graph(n, tables[n], near, pinned)
            else:
                graph = hierarchy.join([graphs[step - 1, c] for c in hierarchy.children(grid, step, n)], grid, step, n)
            graphs[step, n], done[step, n], destinations[step, n] = hierarchy.contract(graph, rules.seed_height)
    before = labels_of_blocks(grid, rules, graphs, done, destinations)
    kept = [part.first[hierarchy.labeled(part, rules)] for part in done.values()]
    begun = np.sort(np.concatenate([np.empty(0, np.int64), *kept]))
    named = np.unique(constraints.look_up(wanted.named, before.__getitem__))
    parts = [constraints.named_parts(i, tables[i], links[i], before.__getitem__, named) for i in range(len(grid))]
    corrected = constraints.correct_objects(parts, wanted, lambda first: np.searchsorted(begun, first), begun.size)
    after = [constraints.renumber(i, np.r_[0, label], corrected)[1:] for i, label in enumerate(before)]
    assert max((int(label.max(initial=0)) for label in after), default=0) == corrected.objects[0]
    return paint(grid, regions, after)


@st.composite
def corrected_fields(draw):
    """A field, its level and connectivity, and corrections of it that do not contradict each other."""
    height, level = draw(fields())
    connectivity = draw(st.sampled_from([6, 26]))
    voxels = np.flatnonzero(height.ravel() != OUTSIDE).tolist()
    assume(len(voxels) > 1)
    pair = st.tuples(st.sampled_from(voxels), st.sampled_from(voxels))
    joins, splits = draw(st.lists(pair, max_size=3)), draw(st.lists(pair, min_size=1, max_size=4))
    basin = descents(list(contacts(height, connectivity)), height.ravel())
    one = replayed(voxels, [*basin, *joins], [])
    return height, level, connectivity, joins, [(a, b) for a, b in splits if a not in one[b]]


@settings(max_examples=40, deadline=None)
@given(field=corrected_fields(), data=st.data())
def test_every_cutting_gives_the_brute_force_corrections(field, data):
    height, level, connectivity, joins, splits = field
    block = tuple(data.draw(st.integers(1, n)) for n in height.shape)
    rules = data.draw(all_rules(level))
    expected = brute_force(height, rules, connectivity, joins, splits)
    np.testing.assert_array_equal(flat(height, rules, block, joins, splits, connectivity), expected)


@settings(max_examples=40, deadline=None)
@given(field=corrected_fields(), data=st.data())
def test_a_tree_gives_the_corrections_that_one_process_gives(field, data):
    height, level, connectivity, joins, splits = field
    assume(joins or splits)
    block = tuple(data.draw(st.integers(1, n)) for n in height.shape)
    rules = Rules(level, min_voxels=data.draw(st.integers(0, 5)), keep_unseeded=data.draw(st.booleans()))
    expected = flat(height, rules, height.shape, joins, splits, connectivity)
    np.testing.assert_array_equal(tree(height, rules, block, joins, splits, connectivity), expected)
    turned = [(b, a) for a, b in reversed(splits)]
    np.testing.assert_array_equal(tree(height, rules, block, joins[::-1], turned, connectivity), expected)


@settings(max_examples=40, deadline=None)
@given(field=corrected_fields(), data=st.data())
def test_points_end_up_where_they_must_and_no_other_object_changes(field, data):
    height, level, connectivity, joins, splits = field
    rules = data.draw(all_rules(level))
    before = brute_force(height, rules, connectivity)
    after = flat(height, rules, height.shape, joins, splits, connectivity)
    named = {int(after.ravel()[voxel]) for pair in (*joins, *splits) for voxel in pair}
    assert 0 not in named
    assert all(after.ravel()[a] == after.ravel()[b] for a, b in joins)
    assert all(after.ravel()[a] != after.ravel()[b] for a, b in splits)
    if not rules.fill_voxels:  # a hole may touch two objects where it touched one
        others = (after > 0) & ~np.isin(after, list(named))
        pairs = np.unique(np.stack([before[others], after[others]]), axis=1)
        assert pairs.shape[1] == np.unique(pairs[0]).size == np.unique(pairs[1]).size
        assert 0 not in pairs[0]


CHAIN = row(1, 7, 2, 9, 3, 8, 4)  # basins with saddles 7, 9 and 8 between them


@pytest.mark.parametrize("label", [flat, tree])
def test_an_object_is_cut_at_its_weakest_edge(label):
    rules = Rules(10)
    assert label(CHAIN, rules, (1, 1, 3), [], [(0, 6)]).ravel().tolist() == [1, 1, 1, 1, 2, 2, 2]
    assert label(CHAIN, rules, (1, 1, 3), [(2, 4)], [(0, 6)]).ravel().tolist() == [1, 1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("label", [flat, tree])
def test_what_is_named_is_an_object_whatever_its_size(label):
    rules = Rules(5, min_voxels=5)
    assert label(CHAIN, rules, (1, 1, 2), [(4, 4)], []).ravel().tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert label(CHAIN, rules, (1, 1, 2), [(0, 6)], []).ravel().tolist() == [1, 1, 0, 0, 0, 0, 1]


def test_what_must_be_one_and_two_is_refused():
    grid, regions, tables, links = cut(CHAIN, (1, 1, 7))
    basins, basin_of = gather(tables, links)
    wanted = by_region(grid, regions, [(0, 2), (2, 4)], [(0, 4)]).looked_up(basin_of.__getitem__)
    with pytest.raises(ValueError, match="must be one object must be two"):
        label_basins(basins, Rules(10), constraints=wanted)


def test_blocks_of_a_correction_are_those_of_its_voxels():
    grid = Blocks((1, 1, 7), (1, 1, 3))
    regions = [np.full((1, 1, n), 5 + i, np.uint32) for i, n in enumerate((3, 3, 1))]
    assert regions_at(grid, regions, [(0, 6)]).tolist() == [[5, 2 << 32 | 7]]
