"""The promise: cutting up must not change the answer, and the answer must be the forest."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tests.helpers import all_rules, basins_of, cut, fields, row
from volseg.box import Blocks
from volseg.segmentation import hierarchy, holes
from volseg.segmentation.edges import argsort_rows, argsort_saddles
from volseg.segmentation.heights import OUTSIDE
from volseg.segmentation.rules import Rules, label_basins
from volseg.segmentation.stitch import gather


def paint(grid, regions, ids):
    """The labels of the volume, from those of each block's regions."""
    out = np.zeros(grid.shape, np.uint32)
    for box, region, of_region in zip(grid, regions, ids, strict=True):
        out[box.slices] = np.r_[0, of_region][region]
    return out


def blockwise(height, rules, block, **options):
    """Labels by one union-find over the tables of all blocks; where holes are filled, of their voids too."""
    grid, regions, tables, links = cut(height, block, **options)
    basins, basin_of = gather(tables, links)
    if not rules.fill_voxels:
        label = label_basins(basins, rules)
        return paint(grid, regions, [label[basin] for basin in basin_of])
    parts = [holes.block_holes(region, box, height.shape) for region, box in zip(regions, grid, strict=True)]
    contacts = [holes.face_contacts(i, parts.__getitem__, grid) for i in range(len(grid))]
    full, hole_of = holes.gather(parts, contacts, basin_of)
    label, count = label_basins(basins, rules, full), basins.minimum.size
    places = [np.r_[basin, count + hole] for basin, hole in zip(basin_of, hole_of, strict=True)]
    return paint(grid, map(holes.number_holes, regions), [label[place] for place in places])


def treewise(height, rules, block, *, connectivity=6, shuffle=None, **options):
    """Labels by `hierarchy`, the parts of each level in any order and some of them twice."""
    grid, regions, tables, links = cut(height, block, connectivity=connectivity, **options)
    graphs, done, destinations = {}, {}, {}
    for step in range(hierarchy.top_level(grid) + 1):
        parts = list(range(len(hierarchy.parts(grid, step))))
        for n in [*shuffle.permutation(parts), *shuffle.choice(parts, 2)] if shuffle else parts:
            if step == 0:
                graph = hierarchy.block_graph(
                    n, tables[n], {j: links[j] for j in hierarchy.linked_blocks(grid, n, connectivity)}
                )
            else:
                graph = hierarchy.join([graphs[step - 1, c] for c in hierarchy.children(grid, step, n)], grid, step, n)
            graphs[step, n], done[step, n], destinations[step, n] = hierarchy.contract(graph, rules.seed_height)
    assert graphs[hierarchy.top_level(grid), 0].minimum.size == 0
    return paint(grid, regions, labels_of_blocks(grid, rules, graphs, done, destinations))


def labels_of_blocks(grid, rules, graphs, done, destinations):
    """The labels of each block's regions."""
    keep = {part: hierarchy.labeled(finished, rules) for part, finished in done.items()}
    ranks = dict(zip(done, hierarchy.ranks([done[part].first[keep[part]] for part in done]), strict=True))
    above = {(hierarchy.top_level(grid), 0): np.empty(0, np.int64)}
    for step in range(hierarchy.top_level(grid), -1, -1):
        for n in range(len(hierarchy.parts(grid, step))):
            finished = np.zeros(keep[step, n].size, np.int64)
            finished[keep[step, n]] = ranks[step, n] + 1
            label = hierarchy.assign(destinations[step, n], above.pop((step, n)), finished)
            below = hierarchy.children(grid, step, n) if step else [n]
            sizes = [graphs[step - 1, c].minimum.size for c in below] if step else [label.size]
            above.update(
                {(step - 1, c): share for c, share in zip(below, np.split(label, np.cumsum(sizes)[:-1]), strict=True)}
            )
    return [above[-1, n] for n in range(len(grid))]


def brute_force(height, rules, connectivity=6, joins=(), splits=()):
    """Labels voxel by voxel: every edge sorted, one union-find, no basins; then the rules as they are told.

    Pairs of voxels that must be joined, or must not be, are looked at once all joins are known.
    """
    flat = height.ravel()
    masked = np.flatnonzero(flat != OUTSIDE)
    edges, faces = list(contacts(height, connectivity)), list(contacts(height))
    level, low, depth = rules.seeds
    object_of = {int(v): {int(v)} for v in masked}

    def deepest(members):
        return int(flat[list(members)].min())

    def join(p, q):
        p |= q
        object_of.update(dict.fromkeys(q, p))

    ordered = sorted(sorted([(int(flat[u]), u), (int(flat[v]), v)], reverse=True) for u, v in edges)
    sequence = []
    for (high, u), (_, v) in ordered:
        p, q = object_of[u], object_of[v]
        shallow = max(deepest(p), deepest(q)) if p is not q else high
        if p is not q and (high <= level or shallow > low or high - shallow < depth):
            join(p, q)
            sequence.append((u, v))
    while pairs := [
        (mean, min(p), min(q)) for mean, p, q in borders(object_of, faces, flat) if mean <= rules.join_height
    ]:
        _, p, q = min(pairs)
        ends = {p, q}
        lowest = ((u, v) for (_, u), (_, v) in ordered if {min(object_of[u]), min(object_of[v])} == ends)
        sequence.append(next(lowest))
        join(object_of[p], object_of[q])
    if joins or splits:
        object_of.update(replayed(object_of, [*descents(edges, flat), *joins, *sequence], splits))
    named = {voxel for pair in (*joins, *splits) for voxel in pair}
    return numbered(flat, object_of, dropped_and_filled(height, object_of, edges, rules, named)).reshape(height.shape)


def descents(edges, flat):
    """Each voxel that is no minimum, with its lowest neighbor: both are of one basin."""
    lowest = {}
    for u, v in [*edges, *((v, u) for u, v in edges)]:
        lowest[u] = min(lowest.get(u, (flat[u], u)), (flat[v], v))
    return [(u, v) for u, (_, v) in lowest.items() if u != v]


def replayed(voxels, sequence, splits):
    """The objects after the joins of a sequence, without those that would bring together what must be apart."""
    object_of = {v: {v} for v in voxels}
    for u, v in sequence:
        both = object_of[u] | object_of[v]
        if not any(a in both and b in both for a, b in splits):
            object_of.update(dict.fromkeys(both, both))
    return object_of


def contacts(height, connectivity=6):
    """Pairs of masked voxels that touch, as linear indices."""
    number = {at: i for i, (at, h) in enumerate(np.ndenumerate(height)) if h != OUTSIDE}
    ways = [way for way in product((-1, 0, 1), repeat=3) if way > (0, 0, 0)]
    for way in ways if connectivity == 26 else [way for way in ways if np.abs(way).sum() == 1]:
        for at, u in number.items():
            v = number.get(tuple(i + j for i, j in zip(at, way, strict=True)))
            if v is not None:
                yield u, v


def borders(object_of, faces, flat):
    """Mean height of the higher ends over all faces of each pair of objects, the earlier object first."""
    result = {}
    for u, v in faces:
        pair = tuple(sorted({min(object_of[u]), min(object_of[v])}))
        result.setdefault(pair, []).append(max(int(flat[u]), int(flat[v])))
    return [(Fraction(sum(h), len(h)), object_of[p[0]], object_of[p[1]]) for p, h in result.items() if len(p) == 2]


def dropped_and_filled(height, object_of, edges, rules, named=frozenset()):
    """Voxels that are in no object; those of filled holes have come to their object in ``object_of``.

    What holds a voxel that is ``named`` is an object.
    """
    flat = height.ravel()
    places = np.indices(height.shape).reshape(3, -1).T
    on_face = ((places == 0) | (places == np.array(height.shape) - 1)) @ np.array(rules.cut_weights)

    def is_small(members):
        missing = rules.min_voxels - len(members)
        return missing > 0 and (missing * rules.voxel_weight) ** 2 > int(on_face[list(members)].sum()) ** 3

    empty = {
        v for v, o in object_of.items()
        if not named & o and (is_small(o) or not (rules.keep_unseeded or min(flat[list(o)]) <= rules.seeds[1]))
    }  # fmt: skip
    fill(object_of, empty, edges, rules.fill_voxels)
    outside = set(np.flatnonzero(flat == OUTSIDE).tolist())
    empty |= outside
    faces = [pair for pair in contacts(np.zeros_like(height)) if outside & set(pair)]
    fill(object_of, empty, [*edges, *faces], rules.fill_voxels, outside & border(height.shape))
    return empty | {v for v, o in object_of.items() if len(o) > rules.max_voxels and not named & o}


def fill(object_of, empty, edges, most, open_voxels=frozenset()):
    """Connected parts of ``empty`` become part of the one object that they touch."""
    near = {v: set() for v in empty}
    for u, v in [*edges, *((v, u) for u, v in edges)]:
        near.get(u, set()).add(v)
    left = set(empty)
    while left:
        hole, todo, rim = set(), {left.pop()}, set()
        while todo:
            v = todo.pop()
            hole.add(v)
            todo |= (near[v] & empty) - hole
            rim |= near[v] - empty
        left -= hole
        around = {min(object_of[v]) for v in rim}
        if len(around) == 1 and len(hole) <= most and not hole & open_voxels:
            full = object_of[around.pop()] | hole
            object_of.update(dict.fromkeys(full, full))
            empty -= hole


def border(shape):
    """Linear indices of the voxels on the border of a volume."""
    inner = np.ones([n - 2 for n in shape], bool) if min(shape) > 2 else np.zeros((0, 0, 0), bool)
    full = np.pad(inner, 1) if inner.size else np.zeros(shape, bool)
    return set(np.flatnonzero(~full).tolist())


def numbered(flat, object_of, dropped):
    out, number = np.zeros(flat.size, np.uint32), {}
    for v in sorted(object_of):
        if v not in dropped:
            out[v] = number.setdefault(id(object_of[v]), len(number) + 1)
    return out


@settings(max_examples=250, deadline=None)
@given(field=fields(), connectivity=st.sampled_from([6, 26]), data=st.data())
def test_every_cutting_gives_the_brute_force_forest(field, connectivity, data):
    height, level = field
    block = tuple(data.draw(st.integers(1, n)) for n in height.shape)
    count = len(Blocks(height.shape, block))
    order = data.draw(st.permutations(range(count)))
    repeat = data.draw(st.lists(st.integers(0, count - 1), max_size=3))
    rules = data.draw(all_rules(level))
    expected = brute_force(height, rules, connectivity)
    result = blockwise(height, rules, block, order=order, repeat=repeat, connectivity=connectivity)
    np.testing.assert_array_equal(result, expected)


@settings(deadline=None, max_examples=30)
@given(field=fields(), ends=st.data())
def test_blocks_without_basins_may_be_left_out(field, ends):
    height = field[0].copy()
    start = [ends.draw(st.integers(0, n - 1)) for n in height.shape]
    height[: start[0]], height[:, : start[1]], height[:, :, : start[2]] = OUTSIDE, OUTSIDE, OUTSIDE
    grid, _, tables, links = cut(height, (2, 2, 2))
    kept = [i for i in range(len(grid)) if tables[i].minimum.size]
    whole, basin_of = gather(tables, links)
    part, basin_of_kept = gather([tables[i] for i in kept], [links[i] for i in kept], kept)
    for name, values in vars(whole).items():
        np.testing.assert_array_equal(getattr(part, name), values)
    for i, basin in zip(kept, basin_of_kept, strict=True):
        np.testing.assert_array_equal(basin, basin_of[i])


@settings(max_examples=250, deadline=None)
@given(field=fields(), data=st.data())
def test_a_tree_of_blocks_gives_what_one_union_find_does(field, data):
    height, level = field
    block = tuple(data.draw(st.integers(1, n)) for n in height.shape)
    count = len(Blocks(height.shape, block))
    options = {
        "order": data.draw(st.permutations(range(count))),
        "repeat": data.draw(st.lists(st.integers(0, count - 1), max_size=3)),
        "connectivity": data.draw(st.sampled_from([6, 26])),
    }
    rules = replace(data.draw(all_rules(level)), persistence=0, join_height=-1, fill_voxels=0, low_height=-1)
    result = treewise(height, rules, block, shuffle=np.random.default_rng(data.draw(st.integers(0, 99))), **options)
    np.testing.assert_array_equal(result, blockwise(height, rules, block, **options))
    np.testing.assert_array_equal(result, brute_force(height, rules, options["connectivity"]))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(3, 10)] * 3),
    share=st.sampled_from([0.2, 0.35, 0.5, 0.65]),
    most=st.sampled_from([1, 3, 10, 200]),
    size=st.integers(0, 6),
    data=st.data(),
)
def test_what_scipy_calls_a_hole_is_filled(seed, shape, share, most, size, data):
    """Where every masked voxel is a seed, objects are `ndimage.label` of the mask, and holes those of what is left."""
    mask = np.random.default_rng(seed).random(shape) > share
    thin = data.draw(st.integers(0, 2))
    block = tuple(data.draw(st.integers(1 if axis == thin else 1 + n // 3, n)) for axis, n in enumerate(shape))
    height = np.where(mask, 0, OUTSIDE).astype(np.int32)
    result = blockwise(height, Rules(0, min_voxels=size, fill_voxels=most), block)
    np.testing.assert_array_equal(result, scipy_filled(mask, size, most))


def scipy_filled(mask, size, most):
    """Labels by scipy alone: small components are dropped, then small holes of one object filled, pieces of mask first."""
    label, count = ndimage.label(mask)
    label[np.bincount(label.ravel(), minlength=count + 1)[label] < size] = 0
    for within in (mask, np.ones_like(mask)):
        holes, count = ndimage.label((label == 0) & within)
        frame = np.pad(np.zeros([n - 2 for n in mask.shape], bool), 1, constant_values=True) & ~mask
        filled = label.copy()
        for n in range(1, count + 1):
            hole = holes == n
            around = np.setdiff1d(label[ndimage.binary_dilation(hole)], 0)
            if around.size == 1 and hole.sum() <= most and not (hole & frame).any():
                filled[hole] = around[0]
        label = filled
    _, first, number = np.unique(label[label > 0], return_index=True, return_inverse=True)
    out = np.zeros(mask.shape, np.uint32)
    out[label > 0] = 1 + np.argsort(np.argsort(first))[number]
    return out


def test_a_cavity_is_filled_only_inside_one_object():
    """By hand, four shells around one voxel: two whole ones, one with a leak by a face, one with a leak by an edge."""
    height = np.full((3, 3, 15), OUTSIDE, np.int32)
    for x in (0, 4, 8, 12):
        height[:, :, x : x + 3] = 0
        height[1, 1, x + 1] = OUTSIDE
    height[1, 1, 10] = OUTSIDE  # by a face
    height[1, 0, 12] = OUTSIDE  # by an edge: paths of background go through faces alone
    for block in ((3, 3, 15), (1, 2, 5)):
        result = blockwise(height, Rules(0, fill_voxels=1), block)
        assert result[1, 1, [1, 5, 9, 13]].tolist() == [1, 2, 0, 4]
        assert result.max() == 4
    assert not blockwise(height, Rules(0), (3, 3, 15))[1, 1, 1]


def test_only_what_outer_faces_leave_open_goes_up():
    """By hand, in two blocks: of a valley at 0 and three hills, only the one that crosses the face, and its way to 0."""
    height = row(0, 8, 5, 7, 3, 6, 2)
    grid, _, tables, links = cut(height, (1, 1, 4))
    up, finished, _ = hierarchy.contract(hierarchy.block_graph(0, tables[0], dict(enumerate(links))), 0)
    assert (up.minimum.size, up.inner.size, finished.minimum.size) == (2, 1, 0)
    up, finished, _ = hierarchy.contract(hierarchy.block_graph(1, tables[1], dict(enumerate(links))), 0)
    assert (up.minimum.size, up.inner.size, finished.minimum.size) == (1, 0, 0)
    assert hierarchy.top_level(grid) == 1


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([0, 1, 7, 40_000]), high=st.sampled_from([1, 3, 1 << 20]))
def test_orders_are_those_of_numpy(seed, size, high):
    rng = np.random.default_rng(seed)
    columns = [
        rng.integers(0, h, size).astype(t) - h // 2 for h, t in [(high, "i4"), (1 << 40, "i8"), (9, "i4"), (2, "i8")]
    ]
    np.testing.assert_array_equal(argsort_rows(*columns), np.lexsort(columns[::-1]))
    columns[1] = rng.integers(0, 1 + size // 3, size)
    np.testing.assert_array_equal(argsort_saddles(*columns), np.lexsort(columns[::-1]))


@pytest.mark.parametrize("connectivity", [6, 26])
@settings(max_examples=60, deadline=None)
@given(field=fields(), data=st.data())
def test_every_contact_face_is_counted_once_with_its_higher_end(connectivity, field, data):
    height, _ = field
    block = tuple(data.draw(st.integers(1, n)) for n in height.shape)
    full, cut = (basins_of(height, b, connectivity).edges for b in (height.shape, block))
    for name in ("high_voxel", "low_voxel", "area", "height"):
        np.testing.assert_array_equal(full[name], cut[name])
    assert (full["height"] >= full["area"] * full["high"].astype(np.int64)).all()


def test_the_border_of_two_valleys_adds_up_by_hand():
    """The ridge of 8 and 9 drains to the left, so its faces with 2 and 0 are the border: 9-2 and 8-0."""
    (edge,) = basins_of(np.array([[[1, 9, 2], [0, 8, 0]]], np.int32), (1, 2, 2)).edges
    assert (edge["area"], edge["high"], edge["height"]) == (2, 8, 17)


def test_two_valleys_meet_at_their_ridge():
    """Worked by hand: heights 0 3 9 2 1 with seeds at most 1; the ridge joins the side with the lower saddle.

    Edges in order of their higher end: 2-1 (high 2), 0-3 (high 3), then 9's two: its lower neighbor is 2, so the ridge
    voxel goes right. The last edge would join two seeds and is refused.
    """
    height = np.array([[[0, 3, 9, 2, 1]]], np.int32)
    for width in (1, 2, 3, 5):
        np.testing.assert_array_equal(blockwise(height, Rules(1), (1, 1, width)), [[[1, 1, 2, 2, 2]]])


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Rules(4), [1, 1, 2, 2, 2, 2, 3]),
        (Rules(0, low_height=5), [1, 1, 2, 2, 2, 2, 3]),
        (Rules(0, low_height=2), [1, 1, 1, 1, 1, 1, 2]),  # the dip at 4 is no seed
        (Rules(4, persistence=3), [1, 1, 1, 1, 1, 1, 2]),  # the dip at 4 is 2 deep, that at 1 is 8
        (Rules(4, persistence=9), [1, 1, 1, 1, 1, 1, 1]),
        (Rules(4, join_height=6), [1, 1, 1, 1, 1, 1, 2]),
        (Rules(4, min_voxels=2), [1, 1, 2, 2, 2, 2, 0]),
        (Rules(4, min_voxels=2, fill_voxels=1), [1, 1, 2, 2, 2, 2, 2]),
        (Rules(4, min_voxels=3, fill_voxels=1), [0, 0, 1, 1, 1, 1, 1]),  # the left hole has two voxels
        (Rules(4, max_voxels=2), [1, 1, 0, 0, 0, 0, 2]),
        (Rules(4, min_voxels=3, cut_weights=(0, 0, 1)), [1, 1, 2, 2, 2, 2, 0]),
        (Rules(4, min_voxels=3, cut_weights=(0, 0, 2)), [1, 1, 2, 2, 2, 2, 3]),
        (Rules(4, min_voxels=3, cut_weights=(0, 0, 2), voxel_weight=2), [1, 1, 2, 2, 2, 2, 0]),
        (Rules(0), [1, 1, 1, 1, 1, 1, 1]),
        (Rules(-1), [0] * 7),
        (Rules(-1, keep_unseeded=True), [1] * 7),
    ],
)
def test_each_rule_by_hand(rules, expected):
    for width in (1, 3, 7):
        np.testing.assert_array_equal(blockwise(row(4, 6, 5, 1, 0, 9, 1), rules, (1, 1, width)), [[expected]])


def test_voxels_that_touch_by_a_corner_are_one_object_on_a_grid_of_26():
    """Three voxels on a space diagonal, every one in a block of its own: two exits and no face in contact."""
    height = np.full((3, 3, 3), OUTSIDE, np.int32)
    height[0, 0, 0], height[1, 1, 1], height[2, 2, 2] = 3, 2, 1
    assert blockwise(height, Rules(3), (1, 1, 1)).max() == 3
    assert blockwise(height, Rules(3), (1, 1, 1), connectivity=26).max() == 1
    assert basins_of(height, (1, 1, 1), 26).minimum.tolist() == [1]


def test_basins_that_touch_by_an_edge_alone_have_a_saddle_and_no_area():
    """Worked by hand: two valleys of height 1, their ways out 5 and 4 touch diagonally. The saddle is the higher one."""
    height = np.array([[[1, 5, OUTSIDE, OUTSIDE], [OUTSIDE, OUTSIDE, 4, 1]]], np.int32)
    for block in ((1, 2, 4), (1, 1, 2)):
        (edge,) = basins_of(height, block, 26).edges
        assert (edge["area"], edge["height"], edge["high"], edge["low"]) == (0, 0, 5, 4)
        assert not basins_of(height, block).edges.size


def test_labels_follow_the_raster_order_of_first_voxels():
    height = np.full((1, 3, 5), OUTSIDE, np.int32)
    height[0, 0, 3:] = 5
    height[0, 2, :2] = 1
    np.testing.assert_array_equal(
        blockwise(height, Rules(5), (1, 2, 2)), [[[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [2, 2, 0, 0, 0]]]
    )


def test_no_mask_means_no_objects():
    assert not blockwise(np.full((3, 4, 5), OUTSIDE, np.int32), Rules(5), (2, 2, 2)).any()


@pytest.mark.parametrize("connected", [True, False])
def test_an_object_below_the_minimum_size_goes_by_its_global_size(connected):
    """A bar of 6 voxels over three blocks is kept at a minimum of 6; cut in two it is dropped."""
    height = np.zeros((1, 1, 6), np.int32)
    if not connected:
        height[0, 0, 3] = OUTSIDE
    assert blockwise(height, Rules(0, min_voxels=6), (1, 1, 2)).any() == connected
