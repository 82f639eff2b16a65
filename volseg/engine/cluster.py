"""Dask: a client of workers, wherever they are, and what these count and may hold."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dask.system import CPU_COUNT
from distributed import Client, Worker, WorkerPlugin, get_worker
from distributed.scheduler import KilledWorker

from volseg import system
from volseg.config import Cluster
from volseg.engine import guard, launch, local, metrics
from volseg.engine.elastic import let_workers_finish
from volseg.engine.local import DEVICE, TASKS_PER_GPU, THREADS, WatchedNanny, worker_count
from volseg.engine.receipt import Receipt, add, peak_bytes

TASKS_IN_FLIGHT = 3  # for each thread of a worker, so that none waits for this process
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
    """The workers that `connect` would start, or those of the given scheduler."""
    tasks = TASKS_PER_GPU if gpus else 1
    if config.is_local:
        count = worker_count(config, gpus)
        beside = (config.cpu_workers or min(8, max(1, CPU_COUNT - count))) if gpus else 0
        return WorkerPool(count, tasks if gpus else max(1, CPU_COUNT // count), tasks, beside)
    if not config.is_given:
        limit, count = launch.memory_of_worker(config), launch.expected_workers(config)
        return WorkerPool(
            count, tasks if gpus else launch.threads_of_worker(config), tasks, limit=int(MEMORY_SHARE * limit)
        )
    with launch.given(config) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        limits = [worker["memory_limit"] for worker in workers if worker["memory_limit"]]
        return WorkerPool(
            len(workers), tasks=max(w["nthreads"] for w in workers), limit=int(MEMORY_SHARE * min(limits, default=0))
        )


@contextmanager
def connect(
    config: Cluster, gpus: int = 0, *, light: bool = False, tell: Callable[[str], None] = lambda text: None
) -> Iterator[Client]:
    """A client of the given scheduler, of one that a queue or another machine runs workers for, or of a local cluster.

    What was started ends with the block. Local workers are processes with one task each: ``workers``, or one per core up to
    8. With GPUs they are ``workers`` processes for a GPU each (one per GPU if not given), and beside them ``cpu_workers``
    (one per other core up to 8) for all that needs none. For ``light`` work, over before processes would have started, they
    are threads of this one, without a dashboard. ``tell`` hears of workers that are waited for.
    """
    if config.is_given:
        with launch.given(config) as client, launch.watched(client, tell):
            client.register_plugin(Counters())
            let_workers_finish(client)
            yield client
    elif not (light or config.is_local):
        with launch.started(config, bool(gpus), tell) as client, launch.watched(client, tell):
            client.register_plugin(Counters())
            let_workers_finish(client)
            yield client
    else:
        with _local(config, gpus, light) as client:
            yield client


@contextmanager
def _local(config: Cluster, gpus: int, light: bool) -> Iterator[Client]:
    workers = local.threads(worker_count(config, gpus)) if light else local.processes(config, gpus)
    whole = False
    try:
        with workers as cluster, Client(cluster, set_as_default=False) as client:
            client.register_plugin(Counters())
            if not light:
                let_workers_finish(client)
            yield client
            whole = True
    except TimeoutError:  # on a busy machine workers may end too slowly for Dask; what they did is stored
        if not whole:
            raise
    finally:
        local.forget_handlers()


def exposure(address: str) -> str:
    """A warning where a scheduler's port is open to more than this machine and not encrypted; else ``""``.

    >>> exposure("tls://10.0.0.1:8786"), exposure("tcp://127.0.0.1:8786"), exposure("tcp://10.0.0.1:8786")[:8]
    ('', '', 'warning:')
    """
    protocol, _, place = address.rpartition("://")
    if protocol not in ("", "tcp") or place.rpartition(":")[0] in ("127.0.0.1", "localhost"):
        return ""
    return (
        f"warning: whoever reaches the scheduler at {address} can run code as its user; on a network that others use, "
        "give tls:// with cluster.tls_ca, tls_cert and tls_key"
    )


def window(client: Client, config: Cluster) -> int:
    """Blocks in flight; 0 for as many as the workers that are there call for, where no others are to come."""
    expected = 0 if config.is_given else config.maximum or (0 if config.is_local else launch.expected_workers(config))
    if config.window or not expected:
        return config.window
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return TASKS_IN_FLIGHT * expected * max((worker["nthreads"] for worker in workers), default=1)


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


# ---------------------------------------------------------------- memory, and workers that die

MEMORY_TOPIC = "volseg-memory"  # of events that workers log before they end themselves
WATCH_INTERVAL_S = 0.2
DEATH_WAIT_S = 15.0  # in which, on a busy machine, too, the exit code of a worker that is gone is known


class MemoryWatch(WorkerPlugin):
    """Ends a worker process that holds more than its `guard.MemoryLimits`; its nanny starts another."""

    name = "volseg-memory"

    def __init__(self, limits: guard.MemoryLimits) -> None:
        self.limits = limits

    def setup(self, worker: Worker) -> None:
        self.done = threading.Event()
        if worker.nanny:  # else nobody would start another
            threading.Thread(target=self._watch, args=[worker], daemon=True).start()

    def teardown(self, worker: Worker) -> None:
        self.done.set()

    def _watch(self, worker: Worker) -> None:
        while not self.done.wait(WATCH_INTERVAL_S):
            if why := self.limits.exceeded(system.resident()):
                worker.loop.add_callback(worker.log_event, MEMORY_TOPIC, {"worker": worker.address, "why": why})
                time.sleep(WATCH_INTERVAL_S)  # the event is on its way
                os._exit(guard.OVER_MEMORY)


def watch_memory(client: Client, limits: guard.MemoryLimits) -> None:
    """Workers that come to hold more than that are ended."""
    client.register_plugin(MemoryWatch(limits))


def cause_of_death(client: Client, error: BaseException) -> str:
    """Why the last worker died of a task that took several; ``""`` where the error says something else."""
    if not isinstance(error, KilledWorker):
        return ""
    address, end = error.last_worker.address, time.monotonic() + DEATH_WAIT_S
    while True:
        events = (event for _, event in client.get_events(MEMORY_TOPIC))
        if why := next((event["why"] for event in events if event["worker"] == address), ""):
            return f"its worker {why}; {guard.WAY_OUT}"
        nannies = getattr(client.cluster, "workers", {}).values()
        deaths = [nanny.deaths or {} for nanny in nannies if isinstance(nanny, WatchedNanny)]
        if found := next((known[address] for known in deaths if address in known), ""):
            return found
        if not deaths or time.monotonic() > end:
            return guard.cause_of_death(None, killed_for_memory=False)
        time.sleep(0.05)


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
        self.end_metrics: Callable[[], None] | None = None

    def setup(self, worker: Worker) -> None:
        self.start = time.perf_counter()
        worker.metrics["volseg"] = lambda _: {"voxels": dict(self.voxels), "seconds": dict(self.seconds)}
        worker.metrics["volseg_voxels"] = lambda _: sum(self.voxels.values())
        worker.metrics["volseg_device_share"] = lambda _: self.device_share
        worker.metrics["volseg_queue"] = _queue
        if getattr(worker, "http_server", None):
            self.end_metrics = metrics.register(lambda: metrics.worker_metrics(self, _queue(worker), peak_bytes()))

    def teardown(self, worker: Worker) -> None:
        if self.end_metrics:
            self.end_metrics()

    @property
    def device_share(self) -> float:
        """Share of the time since it started in which its device computed."""
        return self.device_seconds / (time.perf_counter() - self.start)

    def count(self, stage: str, receipt: Receipt) -> None:
        """Adds what a task has to say."""
        self.voxels[stage] = self.voxels.get(stage, 0) + receipt.voxels
        self.device_seconds += receipt.device_seconds
        add(self.seconds, receipt.seconds)


def _queue(worker: Worker) -> int:
    """Tasks that wait on a worker."""
    return len(worker.state.ready) + len(worker.state.constrained)


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
