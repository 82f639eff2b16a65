"""What a restart costs where a million blocks are done: their markers listed and read, and their files looked at."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem

from benchmarks import report
from volseg.box import Blocks
from volseg.engine.layout import Layout
from volseg.engine.ready import Ready
from volseg.engine.receipt import Receipt, peak_bytes
from volseg.engine.receipts import Markers
from volseg.io import files

LATENCY_S = 0.03  # before the far store answers
PAGE = 1000  # objects that one answer lists, as of S3
STAGES = {
    "predict": "0/c/0/{}/{}/{}",
    "fragments": "work/fragments/c/{}/{}/{}",
}  # and the shard that a block of each writes
KEYS = dict.fromkeys(STAGES, "k" * 16)
CHANGED_NS = 1_700_000_000_123_456_789  # when every file was changed last
EMPTY = files.checksum(b"")


def measure(blocks: int) -> None:
    """A row for each store: seconds to read the markers of so many blocks of two stages and to look at the file of each, and
    then to know what may start."""
    fsspec.register_implementation("late", LateStore, clobber=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in {"disk": f"{folder}/run", "30 ms away": "late://run"}.items():
            rows.append({"store": name, "blocks": blocks, **_restart(path, _grid(blocks))})
            print(rows[-1], file=sys.stderr)
    report.keep("restart", rows)


def _grid(blocks: int) -> Blocks:
    side = round(blocks ** (1 / 3))
    return Blocks((side, side, side), (1, 1, 1))


def _restart(path: str, grid: Blocks) -> dict:
    LateStore.folders.clear()
    writing = _timed(lambda: _write(path, grid))
    Layout(path).mark_begun()
    markers, damaged, done = Markers(path, KEYS), [], {}
    reading = _timed(lambda: damaged.extend(markers.damaged()))
    if damaged:
        raise RuntimeError(f"{len(damaged)} files are not as they were written, such as {damaged[0]}")

    def what_may_start() -> Ready:
        done.update({stage: markers.receipts(stage) for stage in STAGES})
        earlier = Ready(grid, done["predict"])
        return Ready(grid, done["fragments"], {"predict": (earlier, lambda box: box.grow(1))})

    ready = _timed(what_may_start)
    if any(len(found) != len(grid) for found in done.values()):
        raise RuntimeError("not all markers were read")
    entries = {stage: len(Layout(path).markers(stage)) for stage in STAGES}
    shutil.rmtree(path, ignore_errors=True)
    return {
        "written, s": round(writing, 1),
        "read and looked at, s": round(reading, 1),
        "what may start, s": round(ready, 1),
        "marker files of a stage": max(entries.values()),
        "peak MB": round(peak_bytes() / 1e6),
    }


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _write(path: str, grid: Blocks) -> None:
    """Every block of both stages is done, as its marker says, and its file, which is empty, is there."""
    markers = Markers(path, KEYS, durable=False)
    for stage, pattern in STAGES.items():
        for i in range(len(grid)):
            key = pattern.format(*grid.coords(i))
            seconds = {"read": 0.123456, "infer": 12.345678, "write": 0.345678, "other": 0.012345}
            markers.add(stage, i, Receipt(voxels=1 << 24, seconds=seconds, files={key: _store(path, key)}))
    markers.flush()


def _store(path: str, key: str) -> list:
    """An empty file is there, of the far store at once; its fingerprint."""
    if files.is_remote(path):
        LateStore.put(f"run/{key}", b"")
        return [0, EMPTY]
    where = Path(path, key)
    try:
        where.touch()
    except FileNotFoundError:
        where.parent.mkdir(parents=True)
        where.touch()
    os.utime(where, ns=(CHANGED_NS, CHANGED_NS))
    return [0, EMPTY, CHANGED_NS]


class LateStore(AbstractFileSystem):
    """An object store in memory: each request takes `LATENCY_S`, and lists a page of `PAGE` objects."""

    protocol = "late"
    cachable = False
    folders: ClassVar[dict[str, dict[str, bytes]]] = {}
    lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def put(cls, path: str, data: bytes) -> None:
        parent, _, name = path.rpartition("/")
        with cls.lock:
            cls.folders.setdefault(parent, {})[name] = data
            while parent:  # a folder is there once something is in it
                parent, _, name = parent.rpartition("/")
                cls.folders.setdefault(parent, {}).setdefault(f"{name}/", b"")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        time.sleep(LATENCY_S)
        self.put(self._strip_protocol(path), bytes(value))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        time.sleep(LATENCY_S)
        return self._get(path)[start:end]

    def info(self, path: str, **options: Any) -> dict:
        time.sleep(LATENCY_S)
        path = self._strip_protocol(path)
        if path in self.folders:
            return {"name": path, "size": 0, "type": "directory"}
        return self._entry(path, self._get(path))

    def ls(self, path: str, detail: bool = True, **options: Any) -> list:
        path = self._strip_protocol(path)
        with self.lock:
            found = dict(self.folders.get(path, {}))
        time.sleep(LATENCY_S * max(1, -(-len(found) // PAGE)))
        if not found:
            raise FileNotFoundError(path)
        entries = [
            {"name": f"{path}/{name[:-1]}", "size": 0, "type": "directory"} if name.endswith("/")
            else self._entry(f"{path}/{name}", data) for name, data in found.items()
        ]  # fmt: skip
        return entries if detail else [entry["name"] for entry in entries]

    def rm_file(self, path: str) -> None:
        time.sleep(LATENCY_S)
        parent, _, name = self._strip_protocol(path).rpartition("/")
        with self.lock:
            self.folders.get(parent, {}).pop(name, None)

    def _get(self, path: str) -> bytes:
        parent, _, name = self._strip_protocol(path).rpartition("/")
        with self.lock:
            if name not in self.folders.get(parent, {}):
                raise FileNotFoundError(path)
            return self.folders[parent][name]

    @staticmethod
    def _entry(path: str, data: bytes) -> dict:
        return {"name": path, "size": len(data), "type": "file", "ETag": f'"{files.checksum(data)}"'}
