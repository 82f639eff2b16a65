"""What a block reports when it is done."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache


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


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the work on one block of one stage took and made; its marker holds it.

    seconds         by phase
    voxels          of the block
    device_seconds  in which the device computed
    data_wait_seconds  in which the device had nothing to do, as its process was reading
    inferred_voxels that went through the network
    bytes_sent, bytes_fetched  to and from the device
    kept            whether the block was left as an earlier decision had made it
    edges, basins, objects, components, rows  how many the block, part or layer has
    layer           of blocks that was ranked
    files           what the block wrote: fingerprints by key, see `files.fingerprint`
    nothing_wanted  whether no voxel was wanted there
    filled          what of its source could not be decoded and was taken for 0: path and box of each chunk
    """

    voxels: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    pid: int = field(default_factory=os.getpid)
    peak_bytes: int = field(default_factory=lambda: peak_bytes())
    device_seconds: float = 0.0
    data_wait_seconds: float = 0.0
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
    nothing_wanted: bool = False
    files: dict[str, list] = field(default_factory=dict)
    filled: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict:
        """Without what has its default, but for what each marker tells."""
        always = {"voxels", "seconds", "pid", "peak_bytes", "files"}
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in always or getattr(self, f.name) != f.default
        }

    def slim(self) -> Receipt:
        """What is counted over all blocks, alone: millions of these are held, and most are one object."""
        filled = tuple((where, text) for where, text in self.filled)
        return slim_receipt(
            self.kept, self.edges, self.basins, self.objects, self.components, self.rows, self.layer, filled
        )

    @classmethod
    def from_json(cls, plain: dict) -> Receipt:
        """Raises `TypeError` for what `to_json` never gave."""
        receipt = cls(**plain)
        numbers = (value for name, value in plain.items() if name not in ("seconds", "files", "filled"))
        marks = receipt.files.values() if isinstance(receipt.files, dict) else [None]
        fits = all(isinstance(mark, list) and len(mark) in (2, 3) and isinstance(mark[0], int) for mark in marks)
        if not (fits and isinstance(receipt.seconds, dict) and all(isinstance(n, (int, float)) for n in numbers)):
            raise TypeError("not a receipt")
        return receipt


@lru_cache(maxsize=1024)
def slim_receipt(
    kept: bool, edges: int, basins: int, objects: int, components: int, rows: int, layer: int, filled: tuple
) -> Receipt:
    """`Receipt.slim` of these values."""
    return Receipt(
        seconds={}, pid=0, peak_bytes=0, kept=kept, edges=edges, basins=basins, objects=objects, components=components,
        rows=rows, layer=layer, filled=filled,
    )  # fmt: skip


def peak_bytes() -> int:
    """Most memory this process has held so far."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def add(total: dict[str, float], more: dict[str, float]) -> None:
    """Every value of ``more`` is added to the one of that name."""
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value
