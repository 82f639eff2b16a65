"""Blocks become ready when all that they are made from is done, and not before."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.box import Blocks, Box
from volseg.engine.ready import DONE, EMPTY, FAILED, Ready

sizes = st.tuples(*[st.integers(1, 6)] * 3)


@settings(deadline=None, max_examples=40)
@given(shape=sizes, block=sizes, other=sizes, halo=st.integers(0, 5), before=st.data())
def test_a_block_is_ready_once_all_that_it_needs_is_done(shape, block, other, halo, before):
    early, late = Blocks(shape, block), Blocks(shape, other)

    def region(box):
        return box.grow(halo)

    order = before.draw(st.permutations(range(len(early))))
    known = before.draw(st.integers(0, len(early)))
    first = Ready(early, done=order[:known])
    then = Ready(late, earlier={"first": (first, region)})
    done, out = set(order[:known]), set()
    for i in [None, *order[known:]]:
        if i is not None:
            done.add(i)
            then.tell("first", i)
        while (j := then.take()) is not None:
            out.add(j)
        assert first.voxels == sum(early[j].voxels for j in order[:known])
        assert out == {j for j in range(len(late)) if done.issuperset(early.overlapping(region(late[j])))}


@settings(deadline=None, max_examples=40)
@given(shape=sizes, block=sizes, other=sizes, halo=st.integers(0, 3), ends=st.data())
def test_what_lies_outside_the_wanted_box_is_as_done(shape, block, other, halo, ends):
    early, late = Blocks(shape, block), Blocks(shape, other)
    start = [ends.draw(st.integers(0, n - 1)) for n in shape]
    stop = [ends.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)]
    only = Box(tuple(start), tuple(stop))

    def region(box):
        return box.grow(halo)

    first = Ready(early, only=only.grow(halo))
    then = Ready(late, earlier={"first": (first, region)}, only=only)
    waiting, wanted, out = set(early.overlapping(only.grow(halo))), set(late.overlapping(only)), set()
    assert (first.left, then.left) == (len(waiting), len(wanted)) == (len(first.state), len(then.state))
    while wanted - out:
        while (j := then.take()) is not None:
            out.add(j)
        assert out == {j for j in wanted if waiting.isdisjoint(early.overlapping(region(late[j])))}
        if (i := first.take()) is not None:
            first.end(i)
            waiting.remove(i)
            then.tell("first", i)
    begun = only.grow(halo).clip(shape)
    assert first.voxels == sum(early[i].intersect(begun).voxels for i in early.overlapping(begun) if i not in waiting)


def test_a_box_in_a_huge_volume_costs_what_is_in_it():
    grid = Blocks((1 << 20,) * 3, (64, 64, 64))
    ready = Ready(grid, own=("row", lambda box: Box((0, 0, 0), box.stop)), only=Box((640, 640, 640), (700, 768, 704)))
    assert len(ready.state) == 2
    assert (ready.take(), ready.take()) == (grid.index((10, 10, 10)), None)
    ready.end(grid.index((10, 10, 10)))
    ready.tell("row", grid.index((10, 10, 10)))
    assert (ready.take(), ready.take()) == (grid.index((10, 11, 10)), None)


def test_what_was_done_before_is_not_handed_out_again():
    grid = Blocks((4, 4, 4), (1, 4, 4))
    first = Ready(grid, done=[0, 1, 2])
    then = Ready(grid, done=[0], earlier={"first": (first, lambda box: box)})
    assert [then.take(), then.take(), then.take()] == [1, 2, None]
    then.end(1)
    assert then.left == 2
    assert (first.voxels, then.voxels) == (48, 32)


def test_a_block_waits_for_all_stages_before_it():
    grid = Blocks((2, 1, 1), (1, 1, 1))
    passes = {name: (Ready(grid), lambda box: box) for name in ("xy", "xz")}
    mean = Ready(grid, earlier=passes)
    mean.tell("xy", 1)
    assert mean.take() is None
    mean.tell("xz", 1)
    assert mean.take() == 1


def test_a_million_blocks_take_five_bytes_each():
    grid = Blocks((100, 100, 100), (1, 1, 1))
    first = Ready(grid)
    then = Ready(grid, earlier={"first": (first, lambda box: box.grow(1))})
    assert len(then.state) + then.missing.nbytes == 5 * len(grid)
    assert int(then.missing[50, 50, 50]) == 27
    assert not np.any(then.at)


def test_blocks_that_are_given_up_or_hold_nothing_that_is_wanted_say_so():
    grid = Blocks((4, 4, 4), (1, 4, 4))
    first = Ready(grid, only=Box((0, 0, 0), (3, 4, 4)))
    then = Ready(grid, earlier={"first": (first, lambda box: box)})
    for i in range(3):
        first.take()
        if i == 1:
            first.give_up(i)
        else:
            first.end(i, empty=i == 2)
            then.tell("first", i)
    assert list(first.state) == [DONE, FAILED, EMPTY]
    assert (first.left, first.voxels) == (1, 32)
    assert [then.take() for _ in range(4)] == [0, 2, 3, None]  # not what waits for the one that was given up


def test_what_lies_between_scattered_spots_is_as_done():
    """It has a state, is never handed out, and counts for no voxel."""
    grid = Blocks((1, 3, 4), (1, 1, 1))
    voxels = np.array([[[0, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2]]])
    first = Ready(grid, done=[0], voxels_of=voxels)
    then = Ready(grid, earlier={"first": (first, lambda box: box.grow(1))}, voxels_of=voxels)
    assert (first.left, first.voxels, list(first.state).count(EMPTY)) == (2, 0, 10)
    assert [first.take(), first.take(), first.take()] == [1, 11, None]
    assert then.take() is None
    first.end(11)
    then.tell("first", 11)
    assert (then.take(), then.take(), first.voxels) == (11, None, 2)
