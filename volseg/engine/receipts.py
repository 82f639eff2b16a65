"""What a block reports when it is done, and what that adds up to over a run."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import lru_cache

from volseg.engine.layout import Layout
from volseg.engine.ready import Ready
from volseg.errors import IncompleteRunError
from volseg.io import files, remote, tables

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
        return _slim(self.kept, self.edges, self.basins, self.objects, self.components, self.rows, self.layer, filled)

    @classmethod
    def from_json(cls, plain: dict) -> Receipt:
        """Raises `TypeError` for what `to_json` never gave."""
        receipt = cls(**plain)
        numbers = (value for name, value in plain.items() if name not in ("seconds", "files", "filled"))
        marks = receipt.files.values() if isinstance(receipt.files, dict) else [None]
        fits = all(isinstance(mark, list) and len(mark) == 2 and isinstance(mark[0], int) for mark in marks)
        if not (fits and isinstance(receipt.seconds, dict) and all(isinstance(n, (int, float)) for n in numbers)):
            raise TypeError("not a receipt")
        return receipt


@lru_cache(maxsize=1024)
def _slim(
    kept: bool, edges: int, basins: int, objects: int, components: int, rows: int, layer: int, filled: tuple
) -> Receipt:
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


# ---------------------------------------------------------------- markers

PACKED = 1024  # markers that share a file
PACK = "pack"  # how its name begins
LISTED = 4  # files in a folder of an object store from which on it is listed, rather than each asked for
UNREADABLE = ValueError, TypeError, AttributeError, RecursionError, FileNotFoundError  # what a damaged marker raises


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
            self.known[stage] = {i: receipt.slim() for i, receipt in self.stored(stage)}
        return self.known[stage]

    def stored(self, stage: str, blocks: Iterable[int] | None = None) -> Iterator[tuple[int, Receipt]]:
        """The whole receipts of a stage, one after the other, as the markers have them; of these ``blocks``, or of all."""
        self.flush()
        return _stored_receipts(self.layout, stage, self.keys[stage], blocks)

    def _read(self, stage: str) -> Iterator[Receipt]:
        """The whole receipts of a stage; once all were read, `receipts` knows them."""
        known = {}
        for i, receipt in self.stored(stage):
            known[i] = receipt.slim()
            yield receipt
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
        plain = {str(i): receipt.to_json() for i, receipt in receipts.items()}
        self.layout.write_marker(stage, f"{PACK}{uuid.uuid4().hex[:12]}-{self.keys[stage]}", plain)

    def remove(self, stage: str, blocks: Iterable[int] | None = None) -> None:
        """These blocks of a stage, or all, count as not done."""
        if blocks is None:
            self.layout.remove_markers(stage)
            self.known.pop(stage, None)
            self.loose.pop(stage, None)
            return
        self.flush()
        gone = set(blocks)
        for name in self._packs(stage):
            packed = _read_pack(self.layout, stage, name)
            if not gone.isdisjoint(packed):
                self._write_pack(stage, {i: receipt for i, receipt in packed.items() if i not in gone})
                self.layout.remove_marker(stage, name)
        for i in gone:
            self.layout.remove_marker(stage, f"{i}-{self.keys[stage]}")
            self.receipts(stage).pop(i, None)
            self.loose.get(stage, {}).pop(i, None)

    def _packs(self, stage: str) -> list[str]:
        """Names of the files that hold markers of many blocks."""
        names = self.layout.markers(stage)
        return [name for name in names if name.startswith(PACK) and name.endswith(f"-{self.keys[stage]}")]

    def marks(self, keys: Iterable[str] | None = None, *, apart: str = "") -> dict[str, list]:
        """The fingerprints of these files, of those that a block wrote, or of all but those of the stage ``apart``."""
        wanted = None if keys is None else set(keys)
        every = (receipt.files for stage in self.keys if stage != apart for receipt in self._read(stage))
        return {key: mark for files_ in every for key, mark in files_.items() if wanted is None or key in wanted}

    def makers(self, damaged: Iterable[str]) -> dict[str, list[int]]:
        """By stage, the blocks that wrote any of these files."""
        wanted = set(damaged)
        made = {
            stage: sorted(i for i, receipt in self.stored(stage) if not wanted.isdisjoint(receipt.files))
            for stage in self.keys
        }
        return {stage: blocks for stage, blocks in made.items() if blocks}

    def damaged(self, marks: dict[str, list], advance: Callable[[int], None] = lambda _: None) -> list[str]:
        """Keys of the files that do not fit these fingerprints; ``advance`` is called with bytes as they are looked at."""

        def look(item: tuple[str, list]) -> list[str]:
            fits = self.layout.fits(*item)
            advance(item[1][0])
            return [] if fits else [item[0]]

        def look_in(folder: str) -> list[str]:
            keys = by_folder[folder]
            if len(keys) < LISTED:
                return [key for one in keys for key in look((one, marks[one]))]
            found = files.listed_fingerprints(self.layout.path, folder)
            advance(sum(marks[key][0] for key in keys))
            return [key for key in keys if found.get(key) != marks[key]]

        if not files.is_remote(self.layout.path):
            with ThreadPoolExecutor(tables.IO_THREADS) as pool:
                return [key for keys in pool.map(look, marks.items()) for key in keys]
        by_folder: dict[str, list[str]] = {}
        for key in marks:
            by_folder.setdefault(key.rpartition("/")[0], []).append(key)
        with ThreadPoolExecutor(remote.REQUESTS) as pool:
            return [key for keys in pool.map(look_in, by_folder) for key in keys]


def _stored_receipts(
    layout: Layout, stage: str, key: str, blocks: Iterable[int] | None
) -> Iterator[tuple[int, Receipt]]:
    """The receipts of a stage's markers under that key; one that nobody can read is as good as none."""

    def read(name: str) -> dict[int, Receipt]:
        if name.startswith(PACK):
            return _read_pack(layout, stage, name)
        try:
            return {int(name.partition("-")[0]): Receipt.from_json(layout.read_marker(stage, name))}
        except UNREADABLE:
            return {}

    wanted = None if blocks is None else set(blocks)
    names = [name for name in layout.markers(stage) if name.endswith(f"-{key}")]
    if wanted is not None:
        single = {f"{i}-{key}" for i in wanted}
        names = [name for name in names if name.startswith(PACK) or name in single]
    for receipts in tables.read_ahead(read, names):
        yield from (item for item in receipts.items() if wanted is None or item[0] in wanted)


def _read_pack(layout: Layout, stage: str, name: str) -> dict[int, Receipt]:
    try:
        return {int(i): Receipt.from_json(plain) for i, plain in layout.read_marker(stage, name).items()}
    except UNREADABLE:
        return {}


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


def add(total: dict[str, float], more: dict[str, float]) -> None:
    """Every value of ``more`` is added to the one of that name."""
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value
