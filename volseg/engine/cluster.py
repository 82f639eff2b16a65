"""Dask: a client, and one bounded loop for all blockwise work. Nothing else in volseg imports dask."""

from __future__ import annotations

import logging
import os
import platform
import re
import time
import traceback
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from math import inf
from typing import Any

import dask.config
from dask.system import CPU_COUNT
from distributed import Client, Future, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker
from distributed.security import Security

from volseg.config import Cluster
from volseg.engine import forkserver
from volseg.engine.receipts import Receipt, add
from volseg.errors import UserError

THREADS = "VOLSEG_THREADS"  # environment of a worker: how many tiles it runs at once
SHORT_TASK_S = 0.05  # seconds; items that take less share a task
MAX_BATCHED_ITEMS = 64  # items of one task
RETRY_PAUSE_S = 0.5  # before an item that failed is tried again; four times as long each further time
DEVICE, HOST = "GPU", "CPU"  # resources of workers: tasks for the device, tasks beside it
TASKS_PER_GPU = 2  # one computes while the other reads or writes
MEMORY_SHARE = 0.9  # share of a worker's memory limit that it may use: at 0.95 Dask ends it


@dataclass(frozen=True)
class WorkerPool:
    """Workers: how many, tiles that a task of each runs at once, tasks of each at once, and those beside without a device.

    ``limit``: bytes that each may hold before Dask ends it; 0 for no limit.
    """

    workers: int
    threads: int = 1
    tasks: int = 1
    cpu_workers: int = 0
    limit: int = 0


def worker_pool(config: Cluster, gpus: int = 0) -> WorkerPool:
    """The workers that `connect` would start here, or those of the given scheduler."""
    if not config.scheduler:
        count = config.workers or gpus or min(8, CPU_COUNT)
        beside = (config.cpu_workers or min(8, max(1, CPU_COUNT - count))) if gpus else 0
        tasks = TASKS_PER_GPU if gpus else 1
        return WorkerPool(count, tasks if gpus else max(1, CPU_COUNT // count), tasks, beside)
    with _existing(config) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        limits = [worker["memory_limit"] for worker in workers if worker["memory_limit"]]
        return WorkerPool(
            len(workers), tasks=max(w["nthreads"] for w in workers), limit=int(MEMORY_SHARE * min(limits, default=0))
        )


@contextmanager
def connect(config: Cluster, gpus: int = 0, *, light: bool = False) -> Iterator[Client]:
    """A client of the given scheduler, or of a local cluster that ends with the block.

    Local workers are processes with one task each: ``workers``, or one per core up to 8. With GPUs they are ``workers``
    processes for a GPU each (one per GPU if not given), and beside them ``cpu_workers`` (one per other core up to 8) for
    all that needs none. For ``light`` work, over before processes would have started, they are threads of this one,
    without a dashboard.
    """
    if config.scheduler:
        with _existing(config) as client:
            yield client
        return
    count = config.workers or gpus or min(8, CPU_COUNT)
    workers = _thread_cluster(count) if light else _started(config, count, bool(gpus))
    whole = False
    try:
        with workers as cluster, Client(cluster, set_as_default=False) as client:
            client.register_plugin(Counters())
            yield client
            whole = True
    except TimeoutError:  # on a busy machine workers may end too slowly for Dask; what they did is stored
        if not whole:
            raise


@contextmanager
def _started(config: Cluster, count: int, gpu: bool) -> Iterator[LocalCluster]:
    """A local cluster of ``count`` worker processes; where they have a ``gpu`` each, others beside them."""
    forkserver.start()
    settings = {
        "distributed.worker.multiprocessing-method": forkserver.method(),
        "distributed.worker.profile.enabled": False,  # it keeps a tree of calls for every second: 0.1 MB/s
        "distributed.admin.tick.interval": "500ms",  # 50 times a second each process asks whether its loop is late
    }
    with dask.config.set(settings), _processes(config, count, gpu) as found:
        if gpu:
            _add_cpu_workers(found, count + (config.cpu_workers or min(8, max(1, CPU_COUNT - count))))
        yield found


def _add_cpu_workers(found: LocalCluster, count: int) -> None:
    """The cluster has so many workers; those that are new do what needs no device, one task at a time."""
    found.new_spec = {**found.new_spec, "options": {**found.new_spec["options"], "nthreads": 1, "resources": {HOST: 1}}}
    found.scale(count)
    found.wait_for_workers(count, timeout=60)


def _processes(config: Cluster, count: int, gpu: bool) -> LocalCluster:
    with warnings.catch_warnings(), forkserver.deaf_to_interrupts():
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        try:
            return LocalCluster(
                n_workers=count,
                threads_per_worker=TASKS_PER_GPU if gpu else 1,
                resources={DEVICE: TASKS_PER_GPU} if gpu else {},
                processes=True,
                memory_limit=0,
                dashboard_address=_local_address(config.dashboard),
                protocol="tls",  # else every user of this machine could have the workers run code
                security=Security.temporary(),
                silence_logs=logging.CRITICAL,
                env={
                    **os.environ,
                    THREADS: str(max(1, CPU_COUNT // count)),
                },  # forked ones have that of an earlier time
            )
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UserError(
                f"cannot start {count} local workers with cluster.dashboard = {config.dashboard!r}: {reason}"
            ) from None


def _thread_cluster(count: int) -> LocalCluster:
    """A cluster of threads in this process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        return LocalCluster(
            n_workers=1, threads_per_worker=count, processes=False, memory_limit=0, dashboard_address=None,
            silence_logs=logging.CRITICAL,
        )  # fmt: skip


def _local_address(address: str) -> str | None:
    """A dashboard address; only this machine may look unless a host is named."""
    return f"127.0.0.1{address}" if address.startswith(":") else address or None


@contextmanager
def _existing(config: Cluster) -> Iterator[Client]:
    """A client of the scheduler that the settings name."""
    address, security = config.scheduler, None
    if config.tls_ca or config.tls_cert or config.tls_key:
        security = Security(
            tls_ca_file=config.tls_ca, tls_client_cert=config.tls_cert, tls_client_key=config.tls_key or config.tls_cert,
            require_encryption=True,
        )  # fmt: skip
    if not re.fullmatch(r"(\w+://)?[^/:]+:\d+", address):
        raise UserError(f"scheduler {address!r} is not of the form tcp://host:port")
    try:
        client = Client(address, timeout="10s", set_as_default=False, security=security)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"no Dask scheduler answers at {address!r} ({reason}); start one or leave out --scheduler"
        ) from None
    with client:
        client.register_plugin(Counters())
        if not client.scheduler_info(n_workers=-1)["workers"]:
            raise UserError(f"the scheduler at {address} has no workers; start some with: dask worker {address}")
        yield client


def exposure(config: Cluster) -> str:
    """A warning where the scheduler's port is open to more than this machine and not encrypted; else ``""``."""
    host = config.scheduler.rpartition("//")[2].rpartition(":")[0]
    if not config.scheduler or config.scheduler.startswith("tls://") or host in ("127.0.0.1", "localhost"):
        return ""
    return (
        f"warning: whoever reaches the scheduler at {config.scheduler} can run code as its user; on a network that others use, "
        "give tls:// with cluster.tls_ca, tls_cert and tls_key"
    )


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
    """A block that failed, and why; ``worker`` is where, ``error`` what was raised if it is one of volseg's own."""

    item: Any
    reason: str
    traceback: str = ""
    worker: str = ""
    error: UserError | None = None


def run(
    client: Client,
    task: Callable[..., Any],
    items: Iterable[Item | None],
    *args: Any,
    device: Iterable[Item | None] = (),
    tries: int = 3,
    window: int = 0,
    done: Callable[[Any, Any], None] = lambda item, result: None,
    stop: Callable[[UserError], bool] = lambda error: False,
) -> list[Failure]:
    """Calls ``task(*args, item)`` on the workers for every item; ``done(item, result)`` here as each one ends.

    An item that is a tuple gives several arguments. An iterator that gives None has nothing for now: it is asked again
    after the next end, and the loop is over when nothing runs and it has nothing still. Items of ``device`` go to the
    workers that offer the resource `DEVICE`, and the others meanwhile to those that offer `HOST`. Where there are no such
    items or workers, all go to all, ``items`` first.

    At most ``window`` tasks of either kind are known to the scheduler at once, so its memory does not grow with the number
    of items. A task is one item, or several of one stage where they take less than `SHORT_TASK_S`, since a message costs
    more than an empty block. An item that fails is tried ``tries`` times, each time after a longer pause and on another
    worker if there is one; what still fails is returned, and the rest goes on. An error for which ``stop`` is true ends
    all: nothing more is handed out, what is under way ends, and the error is raised here.
    """
    call = partial(_each, partial(task, *args))
    queues = [_Queue(client, call, *queue, window=window) for queue in _queues(client, items, device)]
    queue_of: dict[Any, _Queue] = {}
    attempts: dict[Item, int] = {}
    failures: list[Failure] = []
    stopped: list[BaseException] = []
    loop = as_completed([], loop=client.loop, raise_errors=False)

    def refill() -> None:
        while not stopped:
            for queue in queues:
                futures = queue.refill()
                queue_of.update((future.key, queue) for future in futures)
                loop.update(futures)
            pause = min((queue.pause() for queue in queues), default=None) if not queue_of else None
            if not pause or pause == inf:
                return
            time.sleep(pause)

    def failed(queue: _Queue, failure: Failure) -> None:
        if failure.error is not None and stop(failure.error):
            stopped.append(failure.error)
            return
        attempts[failure.item] = attempts.get(failure.item, 0) + 1
        if attempts[failure.item] < tries:
            queue.retry(failure, RETRY_PAUSE_S * 4 ** (attempts[failure.item] - 1))
        else:
            failures.append(failure)

    refill()
    for batch in loop.batches():
        finished = [future for future in batch if future.status == "finished"]
        for future, (seconds, outcomes) in zip(finished, client.gather(finished), strict=True):
            queue = queue_of.pop(future.key)
            for item, outcome in zip(queue.complete(future.key, seconds), outcomes, strict=True):
                if isinstance(outcome, Failure):
                    failed(queue, outcome)
                else:
                    attempts.pop(item, None)
                    done(item, outcome)
        for future in (future for future in batch if future.status != "finished"):
            error, queue = future.exception(), queue_of.pop(future.key)
            for item in queue.in_flight.pop(future.key):
                failed(queue, Failure(item, _reason(error)))
        refill()
    if stopped:
        raise stopped[0]
    return sorted(failures, key=lambda failure: failure.item)


def _queues(client: Client, items: Iterable, device: Iterable) -> list[tuple[Iterator, dict, int]]:
    """What is handed out independently: the items, the resources that each of them takes, and the slots for them."""
    slots = {name: _slots(client, name) for name in (DEVICE, HOST)}
    if not slots[DEVICE] or device == ():
        return [(_first_available(iter(items), iter(device)), {}, threads(client))]
    host = ({HOST: 1}, slots[HOST]) if slots[HOST] else ({}, threads(client))
    return [(iter(device), {DEVICE: 1}, slots[DEVICE]), (iter(items), *host)]


def _slots(client: Client, resource: str) -> int:
    """How many tasks at once find that resource."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return int(sum(min(worker["nthreads"], worker.get("resources", {}).get(resource, 0)) for worker in workers))


def _first_available(*sources: Iterator[Item | None]) -> Iterator[Item | None]:
    """What the first source has that has something; None where none has."""
    while True:
        yield next((item for source in sources if (item := next(source, None)) is not None), None)


class _Queue:
    """Items on their way through the scheduler, at most ``window`` tasks of them at once."""

    def __init__(
        self, client: Client, call: Callable, items: Iterator[Item | None], resources: dict, slots: int, window: int
    ) -> None:
        self.client, self.call, self.items, self.resources = client, call, items, resources
        self.window = window or 3 * max(1, slots)
        self.retries: deque[Item] = deque()  # at once
        self.later: list[tuple[float, Failure]] = []  # at a time, on another worker
        self.in_flight: dict[str, list[Item]] = {}
        self.sizers: dict[str, _BatchSizer] = {}

    def refill(self) -> list[Future]:
        """Futures of new tasks, once half the window is empty, and of those to be tried again by now."""
        due = [failure for when, failure in self.later if when <= time.monotonic()]
        self.later = [(when, failure) for when, failure in self.later if failure not in due]
        return [*map(self._again, due), *self._more()]

    def retry(self, failure: Failure, pause: float) -> None:
        """The item of ``failure`` is tried again after ``pause`` seconds."""
        self.later.append((time.monotonic() + pause, failure))

    def pause(self) -> float:
        """Seconds until something is to be tried again; infinite where nothing is."""
        return max(0.001, min((when for when, _ in self.later), default=inf) - time.monotonic())

    def _again(self, failure: Failure) -> Future:
        """The future of an item that failed, by itself, on another worker if there is one."""
        workers = [
            address for address in self.client.scheduler_info(n_workers=-1)["workers"] if address != failure.worker
        ]
        key = f"{_key(failure.item)}-{uuid.uuid4().hex[:8]}"
        self.in_flight[key] = [failure.item]
        return self.client.submit(
            self.call, [failure.item], key=key, pure=False, resources=self.resources or None, workers=workers or None,
            allow_other_workers=bool(workers),
        )  # fmt: skip

    def _more(self) -> list[Future]:
        if len(self.in_flight) > self.window // 2:
            return []
        bundles = list(takewhile(len, (self._bundle() for _ in range(self.window - len(self.in_flight)))))
        if not bundles:
            return []
        keys = [f"{_key(bundle[0])}-{uuid.uuid4().hex[:8]}" for bundle in bundles]
        self.in_flight.update(zip(keys, bundles, strict=True))
        return self.client.map(self.call, bundles, key=keys, pure=False, resources=self.resources or None)

    def complete(self, key: str, seconds: float) -> list[Item]:
        """The items of a task that took so long."""
        bundle = self.in_flight.pop(key)
        self._sizer(bundle[0]).learn(seconds / len(bundle))
        return bundle

    def _bundle(self) -> list[Item]:
        """Items of one stage for one task."""
        found: list[Item] = []
        while not found or len(found) < self._sizer(found[0]).items:
            item = self.retries.popleft() if self.retries else next(self.items, None)
            if item is None:
                break
            if found and _stage(item) != _stage(found[0]):
                self.retries.appendleft(item)
                break
            found.append(item)
        return found

    def _sizer(self, item: Item) -> _BatchSizer:
        return self.sizers.setdefault(_stage(item), _BatchSizer())


class _BatchSizer:
    """How many items make a task: one, or up to `MAX_BATCHED_ITEMS` that fill `SHORT_TASK_S` at the pace of those before."""

    def __init__(self) -> None:
        self.seconds = SHORT_TASK_S

    def learn(self, seconds: float) -> None:
        self.seconds = max(seconds, 0.5 * self.seconds, SHORT_TASK_S / MAX_BATCHED_ITEMS)

    @property
    def items(self) -> int:
        return max(1, int(SHORT_TASK_S / self.seconds))


def _each(call: Callable[..., Any], items: list[Item]) -> tuple[float, list[Any]]:
    """On a worker: seconds, and for each item what ``call`` returned, or its `Failure`."""
    start = time.perf_counter()
    outcomes = []
    for item in items:
        try:
            outcomes.append(call(*item) if isinstance(item, tuple) else call(item))
        except Exception as error:
            own = error if isinstance(error, UserError) else None
            outcomes.append(Failure(item, _reason(error), traceback.format_exc(), _address(), own))
    return time.perf_counter() - start, outcomes


def _address() -> str:
    """Of this worker; where this is none, this machine's name and process."""
    try:
        return get_worker().address
    except ValueError:
        return f"{platform.node()}, process {os.getpid()}"


def _reason(error: BaseException) -> str:
    return f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _stage(item: Item) -> str:
    return item[0] if isinstance(item, tuple) else ""


def _key(item: Item) -> str:
    """What the dashboard calls an item's task: tasks of one stage share a name and so a color."""
    return "-".join(str(part) for part in item) if isinstance(item, tuple) else f"block-{item}"


# ---------------------------------------------------------------- counters


class Counters(WorkerPlugin):
    """What a worker has done since it started, as Dask worker metrics.

    They come with each heartbeat: ``client.scheduler_info()["workers"][...]["metrics"]`` has them, and the dashboard's
    Workers page those that are one number. ``volseg`` holds voxels by stage and seconds by phase, of all its tasks
    together.
    """

    name = "volseg"

    def __init__(self) -> None:
        self.voxels: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.device_seconds = 0.0
        self.start = 0.0

    def setup(self, worker: Worker) -> None:
        self.start = time.perf_counter()
        worker.metrics["volseg"] = lambda _: {"voxels": dict(self.voxels), "seconds": dict(self.seconds)}
        worker.metrics["volseg_voxels"] = lambda _: sum(self.voxels.values())
        worker.metrics["volseg_device_share"] = lambda _: self.device_seconds / (time.perf_counter() - self.start)
        worker.metrics["volseg_queue"] = lambda worker: len(worker.state.ready) + len(worker.state.constrained)

    def count(self, stage: str, receipt: Receipt) -> None:
        """Adds what a task has to say."""
        self.voxels[stage] = self.voxels.get(stage, 0) + receipt.voxels
        self.device_seconds += receipt.device_seconds
        add(self.seconds, receipt.seconds)


def count(stage: str, receipt: Receipt) -> None:
    """This worker's counters know of a task; nothing where this is no worker."""
    try:
        counters = get_worker().plugins.get(Counters.name)
    except ValueError:
        return
    if isinstance(counters, Counters):
        counters.count(stage, receipt)


def devices(client: Client) -> int:
    """How many workers infer: those that offer a device, or all."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return sum(DEVICE in worker.get("resources", {}) for worker in workers) or len(workers)
