"""Small tables in a run's folder: named arrays under one key, written as npz; many are read side by side."""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from volseg.io import files

IO_THREADS = 16  # small objects read or written at once
ONE_READS = (
    threading.Lock()
)  # headers go through Python's parser, which in 3.11 now and then fails in threads side by side


def save(out: str, key: str, **arrays: np.ndarray) -> None:
    file = io.BytesIO()
    np.savez(file, **arrays)
    files.write_bytes(out, key, file.getbuffer())


def load(out: str, key: str, skip: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays saved under ``key``; those to ``skip`` come empty."""
    packed = io.BytesIO(files.read_bytes(out, key))
    with ONE_READS, np.load(packed) as stored:  # allow_pickle is off
        return {name: np.empty(0) if name in skip else stored[name] for name in stored.files}


def each(
    out: str, keys: Iterable[str], skip: tuple[str, ...] = (), most: int = 2 * IO_THREADS
) -> Iterator[dict[str, np.ndarray]]:
    """What is saved under each key; at most so many are in memory that were not taken yet."""
    return ahead(lambda key: load(out, key, skip), keys, most)


def ahead(read: Callable[[Any], Any], keys: Iterable[Any], most: int = 2 * IO_THREADS) -> Iterator[Any]:
    """``read(key)`` for each key, in order, up to ``most`` of them read ahead side by side: an object store answers slowly."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(IO_THREADS) as pool:
        for key in keys:
            waiting.append(pool.submit(read, key))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
