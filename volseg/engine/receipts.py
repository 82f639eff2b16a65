"""Which blocks of a run are done, and what their receipts add up to."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from volseg.engine.file_check import FileCheck
from volseg.engine.layout import Layout
from volseg.engine.packs import Pack
from volseg.engine.ready import Ready
from volseg.engine.receipt import Receipt, add
from volseg.errors import IncompleteRunError
from volseg.io import files, tables

# ---------------------------------------------------------------- markers

PACKED = 1024  # markers that share a file
PACK = "pack"  # how its name begins
UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    FileNotFoundError,
)  # what a damaged marker raises


class Markers:
    """What of a run is done: a marker for each block, with its receipt, under the key of its stage.

    A marker is written when all that its block wrote is on the disk, so after a power cut there is no marker without its
    files. That is waited for in a thread beside the run, for many blocks at once; what is lost with it is done again. Markers
    of many blocks come to share a file. One process alone holds a run's markers: the one that holds its lock.

    Parameters
    ----------
    path
        The run's folder.
    keys
        The key of each stage.
    durable
        Whether to wait for the disk at all.
    check
        Called before markers are written; raises where this command may not write any more.

    ``given_up`` are blocks that failed before and are not to be tried again: stage and block, with what ``failed.json`` says.
    ``on_stored`` hears, in that thread, of blocks whose markers have been written.
    """

    def __init__(
        self, path: str, keys: dict[str, str], *, durable: bool = True, check: Callable[[], None] = lambda: None
    ) -> None:
        self.layout, self.keys, self.durable, self.check = Layout(path), keys, durable, check
        self.known: dict[str, dict[int, Receipt]] = {}
        self.given_up: dict[tuple[str, int], dict] = {}
        self.on_stored: Callable[[list[tuple[str, int]]], None] = lambda items: None
        self.pending: queue.SimpleQueue[tuple[str, int, Receipt] | None] = queue.SimpleQueue()
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None
        self.loose: dict[
            str, dict[int, Receipt]
        ] = {}  # by stage, markers of this process that are in files of their own

    def receipts(self, stage: str) -> dict[int, Receipt]:
        """The receipt of each block of a stage that is done, as `Receipt.slim` has it: the marker has the rest."""
        if stage not in self.known:
            for _ in self._packs(stage):
                pass
        return self.known[stage]

    def stored(self, stage: str, blocks: Iterable[int] | None = None) -> Iterator[tuple[int, Receipt]]:
        """The whole receipts of a stage, one after the other, as the markers have them; of these ``blocks``, or of all."""
        wanted = None if blocks is None else set(blocks)
        for pack in self._packs(stage, wanted):
            yield from (item for item in pack.receipts() if wanted is None or item[0] in wanted)

    def _packs(
        self, stage: str, blocks: set[int] | None = None, use: Callable[[Pack], Any] = lambda _: None
    ) -> Iterator[Pack]:
        """All receipts of a stage, or of these ``blocks`` and others, as the markers have them.

        Each pack is given to ``use`` in a thread, while others are read. Once all have been read, `receipts` knows them.
        """
        self.flush()
        known: dict[int, Receipt] = {}
        for pack in _stored_packs(self.layout, stage, self.keys[stage], blocks, use):
            if stage not in self.known:
                known.update(pack.slim())
            yield pack
        if blocks is None:
            self.known.setdefault(stage, known)

    def done(self, stage: str) -> set[int]:
        return set(self.receipts(stage))

    def add(self, stage: str, i: int, receipt: Receipt) -> None:
        """Block ``i`` of a stage is done; its marker follows when its files are on the disk. Raises what `flush` does."""
        self.receipts(stage)[i] = receipt.slim()
        if self.thread is None:
            self.thread = threading.Thread(target=self._write_all, daemon=True)
            self.thread.start()
        self.pending.put((stage, i, receipt))
        if self.error:
            self.flush()

    def failed_before(self) -> dict[tuple[str, int], dict]:
        """By stage and block, what ``failed.json`` says of those that are not done."""
        return {
            (one["stage"], one["block"]): one
            for one in self.layout.load_failures()
            if one.get("key")
            and one["key"] == self.keys.get(one["stage"])
            and one["block"] not in self.done(one["stage"])
        }

    def flush(self) -> None:
        """Every marker is written. Raises `IncompleteRunError` where the disk is full or broken."""
        if self.thread is not None:
            self.pending.put(None)
            self.thread.join()
            self.thread = None
        if self.error:
            error, self.error = self.error, None
            if isinstance(error, IncompleteRunError):
                raise error
            raise IncompleteRunError(
                f"cannot write to {self.layout.path}: {getattr(error, 'strerror', None) or error}; what is done is kept: "
                "mend that and give the same command again"
            ) from None

    def _write_all(self) -> None:
        last = False
        while not last and not self.error:
            items = [self.pending.get()]
            with suppress(queue.Empty):
                while True:
                    items.append(self.pending.get_nowait())
            last = None in items
            try:
                self._write([item for item in items if item is not None])
            except (OSError, IncompleteRunError) as error:
                self.error = error

    def _write(self, items: list[tuple[str, int, Receipt]]) -> None:
        self.check()
        if items and self.durable:
            files.sync_filesystem(self.layout.path)
        by_stage: dict[str, dict[int, Receipt]] = {}
        for stage, i, receipt in items:
            by_stage.setdefault(stage, {})[i] = receipt
        single = [(stage, i, one) for stage, some in by_stage.items() if len(some) < PACKED for i, one in some.items()]
        with ThreadPoolExecutor(tables.IO_THREADS) as pool:
            list(pool.map(lambda item: self._write_one(*item), single))
        for stage, receipts in by_stage.items():
            if len(receipts) >= PACKED:
                self._write_pack(stage, receipts)
                continue
            loose = self.loose.setdefault(stage, {})
            loose.update(receipts)
            if len(loose) >= PACKED:
                self._pack(stage, loose)
        self.on_stored([(stage, i) for stage, i, _ in items])

    def _write_one(self, stage: str, i: int, receipt: Receipt) -> None:
        self.layout.write_marker(stage, f"{i}-{self.keys[stage]}", receipt.to_json())

    def _pack(self, stage: str, receipts: dict[int, Receipt]) -> None:
        """The markers of these blocks lie in one file instead of one each: a million files take minutes to read."""
        self._write_pack(stage, receipts)
        if self.durable:
            files.sync_filesystem(self.layout.path)
        with ThreadPoolExecutor(tables.IO_THREADS) as pool:
            list(pool.map(lambda i: self.layout.remove_marker(stage, f"{i}-{self.keys[stage]}"), list(receipts)))
        receipts.clear()

    def _write_pack(self, stage: str, receipts: dict[int, Receipt]) -> None:
        name = f"{PACK}{uuid.uuid4().hex[:12]}-{len(receipts)}-{self.keys[stage]}"
        self.layout.write_marker(stage, name, Pack.of(receipts).to_json())

    def remove(self, stage: str, blocks: Iterable[int] | None = None) -> None:
        """These blocks of a stage, or all, count as not done."""
        if blocks is None:
            self.layout.remove_markers(stage)
            self.known.pop(stage, None)
            self.loose.pop(stage, None)
            return
        self.flush()
        gone = set(blocks)
        for name in self._pack_names(stage):
            with suppress(*UNREADABLE):
                pack = Pack.from_json(self.layout.read_marker(stage, name))
                if not gone.isdisjoint(pack.blocks):
                    self._write_pack(stage, {i: receipt for i, receipt in pack.receipts() if i not in gone})
                    self.layout.remove_marker(stage, name)
        for i in gone:
            self.layout.remove_marker(stage, f"{i}-{self.keys[stage]}")
            self.receipts(stage).pop(i, None)
            self.loose.get(stage, {}).pop(i, None)

    def _pack_names(self, stage: str) -> list[str]:
        """Names of the files that hold markers of many blocks."""
        names = self.layout.markers(stage)
        return [name for name in names if name.startswith(PACK) and name.endswith(f"-{self.keys[stage]}")]

    def marks(self, keys: Iterable[str] | None = None) -> dict[str, list]:
        """The fingerprints of these files, of those that a block wrote, or of all."""
        wanted = None if keys is None else set(keys)
        marks: dict[str, list] = {}
        for pack in (pack for stage in self.keys for pack in self._packs(stage)):
            items = zip(pack.keys, pack.marks, strict=True)
            marks.update(items if wanted is None else (item for item in items if item[0] in wanted))
        return marks

    def makers(self, damaged: Iterable[str]) -> dict[str, list[int]]:
        """By stage, the blocks that wrote any of these files."""
        wanted = set(damaged)
        made = {
            stage: sorted(set().union(*(pack.makers(wanted) for pack in self._packs(stage)))) for stage in self.keys
        }
        return {stage: blocks for stage, blocks in made.items() if blocks}

    def count(self, *, apart: str = "") -> int:
        """How many blocks are done, but those of the stage ``apart``, as the names of the markers' files say."""
        names = [
            name for stage, key in self.keys.items() if stage != apart
            for name in self.layout.markers(stage) if name.endswith(f"-{key}")
        ]  # fmt: skip
        return sum(int(name.split("-")[1]) if name.startswith(PACK) else 1 for name in names)

    def damaged(self, *, apart: str = "", advance: Callable[[int], None] = lambda _: None) -> list[str]:
        """Keys of the files that blocks wrote, but those of the stage ``apart``, and that are not what was written.

        ``advance`` is called with how many blocks' files have been looked at.
        """
        found: list[str] = []
        with FileCheck(self.layout.path, dates=self.durable) as check:

            def look(pack: Pack) -> None:
                found.extend(check.damaged(dict(zip(pack.keys, pack.marks, strict=True))))

            for stage in (stage for stage in self.keys if stage != apart):
                for pack in self._packs(stage, use=look):
                    advance(len(pack.blocks))
        return sorted(found)


def _stored_packs(
    layout: Layout, stage: str, key: str, blocks: set[int] | None, use: Callable[[Pack], Any]
) -> Iterator[Pack]:
    """The receipts of a stage's markers under that key, of these ``blocks`` and others, each given to ``use``; a marker that
    nobody can read is as good as none."""

    def read(name: str) -> Pack | None:
        try:
            pack = Pack.from_json(layout.read_marker(stage, name))
        except UNREADABLE:
            return None
        use(pack)
        return pack

    def read_loose(name: str) -> tuple[int, Receipt] | None:
        with suppress(*UNREADABLE):
            return int(name.partition("-")[0]), Receipt.from_json(layout.read_marker(stage, name))
        return None

    names = [name for name in layout.markers(stage) if name.endswith(f"-{key}")]
    packed = [name for name in names if name.startswith(PACK)]
    yield from filter(None, tables.read_ahead(read, packed))
    wanted = None if blocks is None else {f"{i}-{key}" for i in blocks}
    loose = [name for name in names if not name.startswith(PACK) and (wanted is None or name in wanted)]
    receipts = dict(filter(None, tables.read_ahead(read_loose, loose)))
    if receipts:
        use(pack := Pack.of(receipts))
        yield pack


# ---------------------------------------------------------------- a run


@dataclass
class RunStatistics:
    """What the stages of one command took. Blocks that were done before it began are not in it.

    slots           tasks that all workers together do at once
    devices         workers that infer
    stage_spans     by stage, when its first block was handed out and its last one ended
    worker_seconds  by stage, the seconds of each phase, of all workers together
    device_seconds, data_wait_seconds, inferred_voxels, bytes_sent, bytes_fetched  sums over all receipts
    peak_bytes      the most that one worker held
    blocks          by stage, the state of each block, for who looks on; None where nobody does
    """

    slots: int = 1
    devices: int = 1
    stage_spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    worker_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    device_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    inferred_voxels: int = 0
    bytes_sent: int = 0
    bytes_fetched: int = 0
    peak_bytes: int = 0
    in_flight: int = 0
    ended: int = 0
    blocks: dict[str, Ready] | None = None
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
        self.data_wait_seconds += receipt.data_wait_seconds
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
        return self._share_of_inference(self.device_seconds)

    @property
    def data_wait_share(self) -> float:
        """Share of that time in which a device waited for data."""
        return self._share_of_inference(self.data_wait_seconds)

    def _share_of_inference(self, seconds: float) -> float:
        spans = [span for stage, span in self.stage_spans.items() if "infer" in self.worker_seconds.get(stage, ())]
        took = max((end for _, end in spans), default=0.0) - min((begin for begin, _ in spans), default=0.0)
        return seconds / (took * self.devices) if took and self.devices else 0.0

    @property
    def queue(self) -> float:
        """Blocks that were handed out and waited for a worker, on average over all ends."""
        return self.waiting_sum / max(1, self.ended)
