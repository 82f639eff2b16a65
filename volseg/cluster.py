"""Dask: a client, one bounded loop for all blockwise work, and done-markers. Nothing else in volseg imports dask."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, takewhile
from typing import Any

import dask.config
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, as_completed, get_worker

from volseg import prefork, volume
from volseg.config import Cluster, UserError

THREADS = "VOLSEG_THREADS"  # environment of a worker: how many tiles it runs at once
SHORT = 0.05  # seconds; items that take less share a task
MOST = 64  # items of one task


@contextmanager
def connect(knobs: Cluster, gpus: int = 0, *, light: bool = False) -> Iterator[Client]:
    """A client of the given scheduler, or of a local cluster that ends with the block.

    Local workers are processes with one task each: one per GPU, or ``workers``, or one per core up to 8. For ``light``
    work, over before processes would have started, they are threads of this one, without a dashboard.
    """
    if knobs.scheduler:
        with _given(knobs.scheduler) as client:
            yield client
        return
    count = knobs.workers or gpus or min(8, CPU_COUNT)
    workers = _threads(count) if light else _started(knobs, count)
    whole = False
    try:
        with workers as cluster, Client(cluster, set_as_default=False) as client:
            yield client
            whole = True
    except TimeoutError:  # on a busy machine workers may end too slowly for Dask; what they did is stored
        if not whole:
            raise


@contextmanager
def _started(knobs: Cluster, count: int) -> Iterator[LocalCluster]:
    """A local cluster of ``count`` worker processes."""
    prefork.start()
    with dask.config.set({"distributed.worker.multiprocessing-method": prefork.method()}), _processes(knobs, count) as found:
        yield found


def _processes(knobs: Cluster, count: int) -> LocalCluster:
    with warnings.catch_warnings(), prefork.deaf_to_interrupts():
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        try:
            return LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                processes=True,
                memory_limit=0,
                dashboard_address=_local(knobs.dashboard),
                silence_logs=logging.CRITICAL,
                env={**os.environ, THREADS: str(max(1, CPU_COUNT // count))},  # forked ones have that of an earlier time
            )
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UserError(
                f"cannot start {count} local workers with cluster.dashboard = {knobs.dashboard!r}: {reason}"
            ) from None


def _threads(count: int) -> LocalCluster:
    """A cluster of threads in this process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        return LocalCluster(
            n_workers=1, threads_per_worker=count, processes=False, memory_limit=0, dashboard_address=None,
            silence_logs=logging.CRITICAL,
        )  # fmt: skip


def _local(address: str) -> str | None:
    """A dashboard address; only this machine may look unless a host is named."""
    return f"127.0.0.1{address}" if address.startswith(":") else address or None


@contextmanager
def _given(address: str) -> Iterator[Client]:
    if not re.fullmatch(r"(\w+://)?[^/:]+:\d+", address):
        raise UserError(f"scheduler {address!r} is not of the form tcp://host:port")
    try:
        client = Client(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"no Dask scheduler answers at {address!r} ({reason}); start one or leave out --scheduler") from None
    with client:
        if not client.scheduler_info(n_workers=-1)["workers"]:
            raise UserError(f"the scheduler at {address} has no workers; start some with: dask worker {address}")
        yield client


def dashboard(client: Client) -> str:
    """The dashboard's address, or ``""`` where there is none."""
    try:
        return client.dashboard_link or ""
    except (KeyError, AttributeError):
        return ""


def threads(client: Client) -> int:
    """Task slots of all workers together."""
    return sum(worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())


def threads_here() -> int:
    """Tiles that one task of this worker runs at once: a local worker's share of the cores; one unless it is told."""
    return max(1, int(os.environ.get(THREADS, "1")))


def place_here() -> int:
    """The number at the end of this worker's name (``0``, ``gpu-3``), by which it takes a GPU; else 0.

    Workers with other names share a machine's GPUs through CUDA_VISIBLE_DEVICES.
    """
    try:
        found = re.fullmatch(r"(?:.*-)?(\d+)", str(get_worker().name))
    except ValueError:  # not on a worker
        return 0
    return int(found[1]) if found else 0


# ---------------------------------------------------------------- the loop


Item = Hashable  # what names a block's task: its number, or (stage, number)


@dataclass(frozen=True)
class Failure:
    """A block that was given up, and why."""

    item: Any
    reason: str


def run(
    client: Client,
    task: Callable[..., Any],
    items: Iterable[Item],
    *args: Any,
    tries: int = 3,
    window: int = 0,
    done: Callable[[Any, Any], Iterable[Item] | None] = lambda item, result: None,
) -> list[Failure]:
    """Calls ``task(*args, item)`` on the workers for every item; ``done(item, result)`` here as each one ends.

    An item that is a tuple gives several arguments. The items that ``done`` returns are those which this end makes
    possible: they go before all others. At most ``window`` tasks are known to the scheduler at once, so its memory does
    not grow with the number of items. A task is one item, or several where items take less than `SHORT`, since a message
    costs more than an empty block. An item that fails is tried ``tries`` times; what still fails is returned, and the
    rest goes on.
    """
    window = window or 3 * max(1, threads(client))
    waiting = iter(items)
    first: deque[Item] = deque()
    tried: dict[Item, int] = {}
    failures: list[Failure] = []
    flying: dict[str, list[Item]] = {}
    loop = as_completed([], loop=client.loop, raise_errors=False)
    call = partial(_each, partial(task, *args))
    pace = _Pace()

    def refill() -> None:
        if len(flying) > window // 2:
            return
        bundles = list(takewhile(len, (pace.bundle(_draw(first, waiting)) for _ in range(window - len(flying)))))
        if not bundles:
            return
        keys = [f"{_key(bundle[0])}-{uuid.uuid4().hex[:8]}" for bundle in bundles]
        futures = client.map(call, bundles, key=keys, pure=False)
        flying.update(zip(keys, bundles, strict=True))
        for item in chain.from_iterable(bundles):
            tried[item] = tried.get(item, 0) + 1
        loop.update(futures)

    def failed(item: Item, reason: str) -> None:
        if tried[item] < tries:
            first.appendleft(item)
        else:
            failures.append(Failure(item, reason))

    refill()
    for batch in loop.batches():
        whole = [future for future in batch if future.status == "finished"]
        for future, (seconds, outcomes) in zip(whole, client.gather(whole), strict=True):
            bundle = flying.pop(future.key)
            pace.learn(seconds / len(bundle))
            for item, (result, reason) in zip(bundle, outcomes, strict=True):
                if reason:
                    failed(item, reason)
                else:
                    tried.pop(item)
                    first.extend(done(item, result) or ())
        for future in (future for future in batch if future.status != "finished"):
            error = future.exception()
            for item in flying.pop(future.key):
                failed(item, _reason(error))
        refill()
    return sorted(failures, key=lambda failure: failure.item)


def _each(call: Callable[..., Any], items: list[Item]) -> tuple[float, list[tuple[Any, str]]]:
    """On a worker: seconds, and for each item what ``call`` returned or why it failed."""
    start = time.perf_counter()
    outcomes = []
    for item in items:
        try:
            outcomes.append((call(*item) if isinstance(item, tuple) else call(item), ""))
        except Exception as error:
            outcomes.append((None, _reason(error)))
    return time.perf_counter() - start, outcomes


def _reason(error: BaseException) -> str:
    return f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


class _Pace:
    """How many items make a task: one, or as many as fill `SHORT` at the pace of those before, at most `MOST`."""

    def __init__(self) -> None:
        self.seconds = SHORT

    def learn(self, seconds: float) -> None:
        self.seconds = max(seconds, 0.5 * self.seconds, SHORT / MOST)

    def bundle(self, items: Iterator[Item]) -> list[Item]:
        return list(islice(items, max(1, int(SHORT / self.seconds))))


def _draw(first: deque[Item], rest: Iterator[Item]) -> Iterator[Item]:
    """Items of ``first`` as long as there are any, then of ``rest``."""
    while True:
        if first:
            yield first.popleft()
        else:
            item = next(rest, None)
            if item is None:
                return
            yield item


def _key(item: Item) -> str:
    """What the dashboard calls an item's task: tasks of one stage share a name and so a colour."""
    return "-".join(str(part) for part in item) if isinstance(item, tuple) else f"block-{item}"


# ---------------------------------------------------------------- markers


def mark(out: str, stage: str, key: str, item: int, receipt: dict) -> dict:
    """Records that a block of a stage is done; returns the receipt. Written after the block's data."""
    receipt = {**receipt, "pid": os.getpid(), "peak_bytes": peak_bytes()}
    volume.write_bytes(out, f"work/markers/{stage}/{item}-{key}.json", json.dumps(receipt).encode())
    return receipt


def marked(out: str, stage: str, key: str) -> set[int]:
    """Blocks of a stage that are done under that key (the hash of all that determines them)."""
    names = (path.rpartition("/")[2].removesuffix(".json") for path in volume.list_keys(out, f"work/markers/{stage}"))
    return {int(item) for item, _, found in (name.partition("-") for name in names) if found == key}


def receipts(out: str, stage: str, key: str) -> list[dict]:
    """What the blocks of a stage reported that are done under that key."""
    paths = volume.list_keys(out, f"work/markers/{stage}")
    return [json.loads(volume.read_bytes(out, path)) for path in paths if path.endswith(f"-{key}.json")]


def peak_bytes() -> int:
    """Most memory this process has held so far."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the time spent inside to ``seconds[phase]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
