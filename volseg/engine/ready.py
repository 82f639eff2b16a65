"""Which blocks of a stage may start: five bytes for each block, whatever the volume."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from volseg.box import Blocks, Box

WAITING, READY, OUT, FAILED, DONE, EMPTY = range(6)  # the last two are done; in an empty one nothing is wanted
Region = Callable[[Box], Box]  # the part of an earlier stage's volume that a box is made from; each axis for itself


class Ready:
    """The blocks of a stage, each waiting, ready to be handed out, handed out, given up, or done.

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
    ) -> None:
        self.grid = grid
        self.state = bytearray(len(grid))
        self.at = np.frombuffer(self.state, np.uint8).reshape(grid.counts)
        self.missing = np.zeros(grid.counts, np.int32)  # blocks that each waits for
        self.spans = {}
        self.inside = (slice(None),) * 3  # blocks that there are to do: others count as done
        if only is not None:
            z, y, x = (slice(span.start, span.stop) for span in grid.spans(only))
            self.inside = z, y, x
            self.at[...] = EMPTY
            self.at[self.inside] = WAITING
        for i in done:
            self.state[i] = DONE
        for stage, (before, region) in (earlier or {}).items():
            self.spans[stage] = before.grid, _spans(grid, before.grid, region)
            self.missing += _missing(before.at >= DONE, self.spans[stage][1])
        if own:  # a block waits for those of its own stage under a region of it, but not for itself
            self.spans[own[0]] = grid, _spans(grid, grid, own[1])
            self.missing += _missing(self.at >= DONE, self.spans[own[0]][1]) - (self.at < DONE)
        self.at[(self.missing == 0) & (self.at == WAITING)] = READY
        self.left = int((self.at < DONE).sum())
        self.cursor = 0

    @property
    def voxels(self) -> int:
        """Voxels of all blocks that are done, of those that there are to do."""
        axes = enumerate(self.grid.counts)
        z, y, x = (np.diff([self.grid.edge(axis, k) for k in range(count + 1)]) for axis, count in axes)
        z, y, x = (lengths[s] for lengths, s in zip((z, y, x), self.inside, strict=True))
        return int((self.at[self.inside] >= DONE) @ x @ y @ z)

    def take(self) -> int | None:
        """The first block that is ready: it is handed out; None where none is."""
        i = self.state.find(READY, self.cursor)
        self.cursor = len(self.state) if i < 0 else i + 1
        if i < 0:
            return None
        self.state[i] = OUT
        return i

    def end(self, i: int, *, empty: bool = False) -> None:
        """Block ``i`` is done; in an ``empty`` one nothing was wanted."""
        self.left -= self.state[i] < DONE
        self.state[i] = EMPTY if empty else DONE

    def give_up(self, i: int) -> None:
        """Block ``i`` is not handed out any more, and so neither is what waits for it."""
        self.state[i] = FAILED

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
            self.cursor = min(self.cursor, self.grid.index(first))


def _spans(grid: Blocks, earlier: Blocks, region: Region) -> list[tuple[np.ndarray, np.ndarray]]:
    """Along each axis and for each row of blocks: the first earlier block that it needs, and the one after the last."""
    spans = []
    for axis, count in enumerate(grid.counts):
        boxes = [
            region(grid[grid.index(tuple(c * (k == axis) for k in range(3)))]).clip(earlier.shape) for c in range(count)
        ]
        start = np.array([earlier.position(axis, box.start[axis]) for box in boxes])
        stop = np.array([earlier.position(axis, box.stop[axis] - 1) + 1 for box in boxes])
        spans.append((start, stop))
    return spans


def _missing(done: np.ndarray, spans: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """How many of the earlier blocks in each block's spans are not done."""
    lacking = np.pad(~done, ((1, 0),) * 3).astype(np.int32)
    for axis, (start, stop) in enumerate(spans):
        lacking = lacking.cumsum(axis, dtype=np.int32)
        lacking = lacking.take(stop, axis) - lacking.take(start, axis)
    return lacking
