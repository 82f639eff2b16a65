"""Which blocks of a stage may start: five bytes for each block that there is to do, whatever the volume."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import numpy as np

from volseg.box import Blocks, Box, Triple

WAITING, READY, OUT, FAILED, DONE, EMPTY = range(6)  # the last two are done; in an empty one nothing is wanted
Region = Callable[[Box], Box]  # the part of an earlier stage's volume that a box is made from; each axis for itself


class Ready:
    """The blocks of a stage, each waiting, ready to be handed out, handed out, given up, or done.

    There is something to do in those that share a voxel with the box ``only``: others count as done and have no state here.
    ``voxels_of`` says of each of them, z y x, how many voxels there are to do, if not all of ``only``; one that has none is
    empty from the start.

    >>> z = Blocks((6, 4, 4), (2, 4, 4))
    >>> earlier = Ready(z, done=[0])
    >>> later = Ready(z, earlier={"first": (earlier, lambda box: box.grow(1))})
    >>> later.take() is None, later.tell("first", 1), later.take(), later.take() is None
    (True, None, 0, True)
    >>> row = Ready(Blocks((1, 1, 6), (1, 1, 2)), own=("row", lambda box: Box((0, 0, box.start[2] - 1), box.stop)))
    >>> row.take(), row.take() is None, row.end(0), row.tell("row", 0), row.take()
    (0, True, None, None, 1)
    """

    def __init__(
        self,
        grid: Blocks,
        done: Iterable[int] = (),
        earlier: dict[str, tuple[Ready, Region]] | None = None,
        own: tuple[str, Region] | None = None,
        only: Box | None = None,
        voxels_of: np.ndarray | None = None,
    ) -> None:
        self.grid = grid
        self.only = Box.from_shape(grid.shape) if only is None else only.clip(grid.shape)
        self.rows = grid.spans(self.only)
        self.state = bytearray(prod(map(len, self.rows)))
        self.at = np.frombuffer(self.state, np.uint8).reshape(tuple(map(len, self.rows)))
        self.voxels_of = voxels_of
        self.missing = np.zeros(self.at.shape, np.int32)  # blocks that each waits for
        self.spans = {}
        self._set_done(np.fromiter(done, np.int64))
        if voxels_of is not None:
            self.at[voxels_of == 0] = EMPTY
        for stage, (before, region) in (earlier or {}).items():
            self.spans[stage] = before.grid, self._spans(before.grid, region)
            self.missing += _missing(before, self.spans[stage][1])
        if own:  # a block waits for those of its own stage under a region of it, but not for itself
            self.spans[own[0]] = grid, self._spans(grid, own[1])
            self.missing += _missing(self, self.spans[own[0]][1]) - (self.at < DONE)
        self.at[(self.missing == 0) & (self.at == WAITING)] = READY
        self.left = int((self.at < DONE).sum())
        self.cursor = 0

    def _set_done(self, numbers: np.ndarray) -> None:
        _, ny, nx = self.grid.counts
        coords = numbers // (ny * nx), numbers // nx % ny, numbers % nx
        inside = np.all([(c >= row.start) & (c < row.stop) for c, row in zip(coords, self.rows, strict=True)], axis=0)
        z, y, x = (c[inside] - row.start for c, row in zip(coords, self.rows, strict=True))
        self.at[z, y, x] = DONE

    @property
    def first(self) -> Triple:
        """Grid position of the first block that there is to do."""
        z, y, x = (row.start for row in self.rows)
        return z, y, x

    @property
    def voxels(self) -> int:
        """That there were to do in all blocks that are done."""
        if self.voxels_of is not None:
            return int(self.voxels_of[self.at >= DONE].sum())
        z, y, x = (
            np.diff(np.clip([self.grid.edge(axis, k) for k in range(row.start, row.stop + 1)], start, stop))
            for axis, (row, start, stop) in enumerate(zip(self.rows, self.only.start, self.only.stop, strict=True))
        )
        return int((self.at >= DONE) @ x @ y @ z)

    def take(self) -> int | None:
        """The first block that is ready: it is handed out; None where none is."""
        k = self.state.find(READY, self.cursor)
        self.cursor = len(self.state) if k < 0 else k + 1
        if k < 0:
            return None
        self.state[k] = OUT
        z, y, x = (row[int(c)] for row, c in zip(self.rows, np.unravel_index(k, self.at.shape), strict=True))
        return self.grid.index((z, y, x))

    def end(self, i: int, *, empty: bool = False) -> None:
        """Block ``i`` is done; in an ``empty`` one nothing was wanted."""
        k = self._position(i)
        assert k is not None, f"block {i} was never handed out"
        self.left -= self.state[k] < DONE
        self.state[k] = EMPTY if empty else DONE

    def give_up(self, i: int) -> None:
        """Block ``i`` is not handed out any more, and so neither is what waits for it."""
        if (k := self._position(i)) is not None:
            self.state[k] = FAILED

    def tell(self, stage: str, i: int) -> None:
        """Block ``i`` of an earlier stage is done, which it was not before: what waited for it alone is ready."""
        before, spans = self.spans[stage]
        near = tuple(
            slice(int(np.searchsorted(stop, c, "right")), int(np.searchsorted(start, c, "right")))
            for c, (start, stop) in zip(before.coords(i), spans, strict=True)
        )
        self.missing[near] -= 1
        freed = (self.missing[near] == 0) & (self.at[near] == WAITING)
        if freed.any():
            self.at[near][freed] = READY
            first = tuple(int(k) + s.start for k, s in zip(np.argwhere(freed)[0], near, strict=True))
            self.cursor = min(self.cursor, int(np.ravel_multi_index(first, self.at.shape)))

    def _position(self, i: int) -> int | None:
        """Where the state of block ``i`` is; None where there is nothing to do in it."""
        coords = self.grid.coords(i)
        if not all(c in row for c, row in zip(coords, self.rows, strict=True)):
            return None
        _, ny, nx = self.at.shape
        z, y, x = (c - row.start for c, row in zip(coords, self.rows, strict=True))
        return (z * ny + y) * nx + x

    def _spans(self, earlier: Blocks, region: Region) -> list[tuple[np.ndarray, np.ndarray]]:
        """Along each axis and for each row of blocks: the first earlier block that it needs, and the one after the last."""
        spans = []
        for axis, row in enumerate(self.rows):
            boxes = [
                region(self.grid[self.grid.index(tuple(c * (k == axis) for k in range(3)))]).clip(earlier.shape)
                for c in row
            ]
            start = np.array([earlier.position(axis, box.start[axis]) for box in boxes], np.int64)
            stop = np.array([earlier.position(axis, box.stop[axis] - 1) + 1 for box in boxes], np.int64)
            spans.append((start, stop))
        return spans


def _missing(earlier: Ready, spans: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """How many of the earlier blocks in each block's spans are not done; where there is nothing to do, all are."""
    lacking = np.pad(earlier.at < DONE, ((1, 0),) * 3).astype(np.int32)
    for axis, (row, (start, stop)) in enumerate(zip(earlier.rows, spans, strict=True)):
        lacking = lacking.cumsum(axis, dtype=np.int32)
        start, stop = (np.clip(end - row.start, 0, len(row)) for end in (start, stop))
        lacking = lacking.take(stop, axis) - lacking.take(start, axis)
    return lacking
