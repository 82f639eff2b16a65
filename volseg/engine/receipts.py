"""What a block reports when it is done, and what that adds up to over a run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

from volseg.engine.layout import Layout
from volseg.io import tables

# ---------------------------------------------------------------- one block


class Timings:
    """Seconds by phase of the work on one block; a phase inside another is taken from the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            others = sum(self.seconds.values()) - before
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start - others


@dataclass(frozen=True)
class Receipt:
    """What the work on one block of one stage took and made; its marker holds it.

    seconds         by phase
    voxels          of the block
    device_seconds  in which the device computed
    inferred_voxels that went through the network
    bytes_sent, bytes_fetched  to and from the device
    kept            whether the block was left as an earlier decision had made it
    edges, basins, objects, components, rows  how many the block, part or layer has
    layer           of blocks that was ranked
    """

    voxels: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    pid: int = field(default_factory=os.getpid)
    peak_bytes: int = field(default_factory=lambda: peak_bytes())
    device_seconds: float = 0.0
    inferred_voxels: int = 0
    bytes_sent: int = 0
    bytes_fetched: int = 0
    kept: bool = False
    edges: int = 0
    basins: int = 0
    objects: int = 0
    components: int = 0
    rows: int = 0
    layer: int = 0

    def to_json(self) -> dict:
        """Without what has its default, but for what each marker tells."""
        always = {"voxels", "seconds", "pid", "peak_bytes"}
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in always or getattr(self, f.name) != f.default
        }

    @classmethod
    def from_json(cls, plain: dict) -> Receipt:
        return cls(**plain)


def peak_bytes() -> int:
    """Most memory this process has held so far."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- markers


def mark(path: str, stage: str, key: str, i: int, receipt: Receipt) -> None:
    """Records that block ``i`` of a stage is done; written after the block's data."""
    Layout(path).write_marker(stage, f"{i}-{key}", receipt.to_json())


def marked(path: str, stage: str, key: str) -> set[int]:
    """Blocks of a stage that are done under that key (the hash of all that determines them)."""
    names = (name.partition("-") for name in Layout(path).markers(stage))
    return {int(i) for i, _, made_under in names if made_under == key}


def receipts(path: str, stage: str, key: str) -> Iterator[Receipt]:
    """What the blocks of a stage reported that are done under that key."""
    layout = Layout(path)
    names = (name for name in layout.markers(stage) if name.endswith(f"-{key}"))
    return (
        Receipt.from_json(plain) for plain in tables.read_ahead(lambda name: layout.read_marker(stage, name), names)
    )


# ---------------------------------------------------------------- a run


@dataclass
class RunStatistics:
    """What the stages of one command took. Blocks that were done before it began are not in it.

    slots           tasks that all workers together do at once
    devices         workers that infer
    stage_spans     by stage, when its first block was handed out and its last one ended
    worker_seconds  by stage, the seconds of each phase, of all workers together
    device_seconds, inferred_voxels, bytes_sent, bytes_fetched  sums over all receipts
    peak_bytes      the most that one worker held
    """

    slots: int = 1
    devices: int = 1
    stage_spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    worker_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    device_seconds: float = 0.0
    inferred_voxels: int = 0
    bytes_sent: int = 0
    bytes_fetched: int = 0
    peak_bytes: int = 0
    in_flight: int = 0
    ended: int = 0
    waiting_sum: int = 0

    def begin(self, stage: str) -> None:
        """A block that counts as that stage's is handed out."""
        now = time.perf_counter()
        self.stage_spans.setdefault(stage, (now, now))
        self.in_flight += 1

    def end(self, stage: str, receipt: Receipt) -> None:
        """A block that counts as that stage's has ended."""
        self.stage_spans[stage] = self.stage_spans[stage][0], time.perf_counter()
        add(self.worker_seconds.setdefault(stage, {}), receipt.seconds)
        self.device_seconds += receipt.device_seconds
        self.inferred_voxels += receipt.inferred_voxels
        self.bytes_sent += receipt.bytes_sent
        self.bytes_fetched += receipt.bytes_fetched
        self.peak_bytes = max(self.peak_bytes, receipt.peak_bytes)
        self.waiting_sum += max(0, self.in_flight - self.slots)
        self.ended += 1
        self.in_flight -= 1

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, the seconds from its first block to its last; stages overlap."""
        return {stage: end - begin for stage, (begin, end) in self.stage_spans.items()}

    @property
    def device_share(self) -> float:
        """Share of the time of inference in which a device computed."""
        spans = [span for stage, span in self.stage_spans.items() if "infer" in self.worker_seconds.get(stage, ())]
        took = max((end for _, end in spans), default=0.0) - min((begin for begin, _ in spans), default=0.0)
        return self.device_seconds / (took * self.devices) if took else 0.0

    @property
    def queue(self) -> float:
        """Blocks that were handed out and waited for a worker, on average over all ends."""
        return self.waiting_sum / max(1, self.ended)


def add(total: dict[str, float], more: dict[str, float]) -> None:
    """Every value of ``more`` is added to the one of that name."""
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value
