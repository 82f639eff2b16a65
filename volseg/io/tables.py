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
READ_AHEAD_BYTES = 1 << 27  # of tables that are read before they are asked for
NPZ_LOCK = threading.Lock()  # numpy parses headers with ast, which in Python 3.11 sometimes fails in parallel threads


def save(out: str, key: str, **arrays: np.ndarray | None) -> None:
    """The object ``key`` under ``out`` holds these arrays, but for those that are None."""
    file = io.BytesIO()
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    files.write_bytes(out, key, file.getbuffer())


def load(out: str, key: str, skip: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays saved under ``key``; those named in ``skip`` come empty."""
    packed = io.BytesIO(files.read_bytes(out, key))
    with NPZ_LOCK, np.load(packed) as stored:  # allow_pickle is off
        return {name: np.empty(0) if name in skip else stored[name] for name in stored.files}


def load_each(
    out: str, keys: Iterable[str], skip: tuple[str, ...] = (), pending: int = 2 * IO_THREADS
) -> Iterator[dict[str, np.ndarray]]:
    """`load` of each key, in order; up to ``pending`` tables are read ahead."""
    return read_ahead(lambda key: load(out, key, skip), keys, pending)


def read_ahead(read: Callable[[Any], Any], keys: Iterable[Any], pending: int = 2 * IO_THREADS) -> Iterator[Any]:
    """``read(key)`` for each key, in order, with up to ``pending`` calls ahead in threads: object stores answer slowly.

    Fewer are ahead, but two, where what the last call returned says that they would hold more than `READ_AHEAD_BYTES`.
    """
    waiting: deque[Future] = deque()
    ahead = min(2, pending)
    with ThreadPoolExecutor(IO_THREADS) as pool:
        for key in keys:
            waiting.append(pool.submit(read, key))
            while len(waiting) >= ahead:
                value = waiting.popleft().result()
                ahead = max(1, min(pending, max(2, READ_AHEAD_BYTES // max(1, _array_bytes(value)))))
                yield value
        while waiting:
            yield waiting.popleft().result()


def _array_bytes(value: Any) -> int:
    """Bytes of the arrays in a dict or an object."""
    columns = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return sum(column.nbytes for column in columns.values() if isinstance(column, np.ndarray))
