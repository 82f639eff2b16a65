"""A run as the Dask dashboard shows it: what is told of it, and what follows from that. Arrays and numbers alone."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from volseg.box import Triple
from volseg.engine.ready import DONE, EMPTY, FAILED, OUT, READY, WAITING

RATE_S = 30.0  # over which the speed of late is taken
SMOOTH_S = 10.0  # over which each speed of a line is taken: blocks end in steps
HISTORY = 600  # moments of which the speeds are kept; of more, every second one
CELLS = 256  # of a map along an axis; of more blocks, several share one
STATES = {
    "waiting": (WAITING, READY),
    "running": (OUT,),
    "done": (DONE,),
    "failed": (FAILED,),
    "nothing wanted": (EMPTY,),
}
COLORS = {  # red, green, blue
    "waiting": (203, 213, 225), "running": (245, 158, 11), "done": (15, 118, 110), "failed": (220, 38, 38),
    "nothing wanted": (241, 245, 249),
}  # fmt: skip


@dataclass
class StageView:
    """One stage: its blocks along z, y, x, its voxels, and the state of each block as `ready` has it.

    ``before`` are voxels that were done when the run was first told of, ``infers`` says whether a network runs in it.
    """

    title: str
    counts: Triple
    shape: Triple
    voxels: int
    infers: bool = False
    done: int = 0
    before: int = -1
    states: np.ndarray | None = None  # z y x, of the blocks from ``first`` on: in others nothing is wanted
    first: Triple = (0, 0, 0)
    found: np.ndarray | None = None  # blocks in each state

    def take(self, done: int, states: np.ndarray, first: Triple = (0, 0, 0)) -> None:
        """So many voxels are done, and the blocks are in these states."""
        self.states, self.first = states, first
        self.found = np.bincount(states.ravel(), minlength=EMPTY + 1)
        self.found[EMPTY] += prod(self.counts) - states.size
        self.done, self.before = done, done if self.before < 0 else self.before

    def blocks(self) -> dict[str, int]:
        """How many blocks are in each of `STATES`; before it began, all wait."""
        if self.found is None:
            return {name: prod(self.counts) * (name == "waiting") for name in STATES}
        return {name: int(sum(self.found[state] for state in states)) for name, states in STATES.items()}

    def picture(self, z: int) -> np.ndarray:
        """Layer ``z`` of the blocks as `draw` colors it."""
        states = np.full(self.counts[1:], WAITING if self.states is None else EMPTY, np.uint8)
        if self.states is not None and 0 <= z - self.first[0] < len(self.states):
            (_, y, x), (_, height, width) = self.first, self.states.shape
            states[y : y + height, x : x + width] = self.states[z - self.first[0]]
        return draw(states)


@dataclass
class RunView:
    """A run: its stages in order, what was planned, and sums over all that is done (see `receipts.RunStatistics`)."""

    name: str
    began: float
    plan: dict[str, Any] = field(default_factory=dict)
    slots: int = 1
    stages: dict[str, StageView] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of workers, by title
    sums: dict[str, float] = field(default_factory=dict)
    history: deque[tuple[float, dict[str, int]]] = field(default_factory=deque)
    now: float = 0.0
    ended: str = ""

    def tell(self, message: dict[str, Any]) -> None:
        """Takes in what `monitor` sends."""
        self.now = message["now"]
        self.ended = message.get("ended", "")
        self.seconds, self.sums = message["seconds"], message["sums"]
        known = self.stages
        self.stages = {plain["name"]: known.get(plain["name"]) or _stage(plain) for plain in message["stages"]}
        for name, (done, packed, first, counts) in message["blocks"].items():
            states = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(counts)
            self.stages[name].take(done, states, first)
        if not self.history or self.now > self.history[-1][0]:
            self.history.append((self.now, self.done_by_title()))
        if len(self.history) > HISTORY:
            self.history = deque(list(self.history)[::2])

    def done_by_title(self) -> dict[str, int]:
        """Voxels done by this command, by the name under which a user sees a stage."""
        found: dict[str, int] = {}
        for stage in self.stages.values():
            found[stage.title] = found.get(stage.title, 0) + stage.done - max(0, stage.before)
        return found

    def rates(self) -> dict[str, float]:
        """Voxels per second of late, by title."""
        first = next((item for item in self.history if item[0] >= self.now - RATE_S), (self.now, {}))
        took = self.now - first[0]
        done = self.done_by_title()
        return {title: (done[title] - first[1].get(title, 0)) / took if took > 0 else 0.0 for title in done}

    def rate_lines(self) -> dict[str, tuple[list[float], list[float]]]:
        """By title, times since the start and the voxels per second in the `SMOOTH_S` before each."""
        moments = list(self.history)
        lines: dict[str, tuple[list[float], list[float]]] = {}
        first = 0
        for k in range(1, len(moments)):
            while first < k - 1 and moments[first][0] < moments[k][0] - SMOOTH_S:
                first += 1
            (begin, before), (end, after) = moments[first], moments[k]
            for title, count in after.items():
                times, speeds = lines.setdefault(title, ([], []))
                times.append(end - self.began)
                speeds.append((count - before.get(title, 0)) / (end - begin))
        return lines

    def outlook(self) -> tuple[float, float | None]:
        """The share of the work that is done, and the seconds that the rest will take; None where nothing tells."""
        stages, costs = list(self.stages.values()), self._costs()
        whole = sum(stage.voxels * costs[stage.title] for stage in stages)
        done = sum(stage.done * costs[stage.title] for stage in stages)
        made = done - sum(max(0, stage.before) * costs[stage.title] for stage in stages)
        share = min(1.0, done / whole) if whole else 0.0
        if made > 0:
            return share, max(0.0, (self.now - self.began) * (whole - done) / made)
        planned = self.plan.get("total_seconds")
        return share, None if planned is None else planned * (1 - share)

    def _costs(self) -> dict[str, float]:
        """By title, a worker's seconds for each voxel: measured where some are done, else planned, else the mean of others."""
        done = self.done_by_title()
        found = {title: self.seconds[title] / done[title] for title in done if done[title] and self.seconds.get(title)}
        planned = self.plan.get("seconds", {})
        for name, infers in (("predict", True), ("instances", False)):
            same = [stage for stage in self.stages.values() if stage.infers == infers]
            voxels = sum(stage.voxels for stage in same)
            if voxels and planned.get(name):
                for stage in same:
                    found.setdefault(stage.title, planned[name] * self.slots / voxels)
        mean = sum(found.values()) / len(found) if found else 1.0
        return {title: found.get(title, mean) for title in done}


def _stage(plain: dict[str, Any]) -> StageView:
    z, y, x = plain["counts"]
    d, h, w = plain["shape"]
    return StageView(plain["title"], (z, y, x), (d, h, w), plain["voxels"], plain["infers"])


def draw(states: np.ndarray) -> np.ndarray:
    """States of blocks, uint8 y x, as a picture of at most `CELLS` cells along an axis: RGBA in a uint32 each.

    A cell of several blocks has the color of a failed one, else of one that runs; else it is the more like done ones the
    more of them there are.

    >>> draw(np.full((2, 1000), DONE, np.uint8)).shape
    (2, 250)
    """
    y, x = (np.arange(n) // -(-n // CELLS) for n in states.shape)
    height, width = int(y[-1]) + 1, int(x[-1]) + 1
    bins = (y[:, None] * width + x) * (EMPTY + 1) + states
    count = np.bincount(bins.ravel(), minlength=height * width * (EMPTY + 1)).reshape(height, width, EMPTY + 1)
    done, empty, left = count[..., DONE], count[..., EMPTY], count[..., WAITING] + count[..., READY]
    share = (done / np.maximum(done + left, 1))[..., None]
    color = (1 - share) * COLORS["waiting"] + share * COLORS["done"]
    color[(empty > 0) & (done + left == 0)] = COLORS["nothing wanted"]
    color[count[..., OUT] > 0] = COLORS["running"]
    color[count[..., FAILED] > 0] = COLORS["failed"]
    rgba = np.full((*done.shape, 4), 255, np.uint8)
    rgba[..., :3] = np.round(color)
    return rgba.view(np.uint32)[..., 0]


def share_by_state(stages: Iterable[StageView]) -> dict[str, float]:
    """Of all blocks of some stages, the share in each of `STATES`.

    >>> share_by_state([StageView("predict", (1, 1, 4), (1, 1, 4), 4)])["waiting"]
    1.0
    """
    counts = [stage.blocks() for stage in stages]
    whole = max(1, sum(sum(each.values()) for each in counts))
    return {name: sum(each[name] for each in counts) / whole for name in STATES}
