"""Dask: a client, and what its workers are. Only this and `loop` import dask."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dask.config
from dask.system import CPU_COUNT
from distributed import Client, Nanny, Scheduler, SpecCluster, Worker, WorkerPlugin, get_worker
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker
from distributed.security import Security

from volseg import system
from volseg.config import Cluster
from volseg.engine import forkserver, guard
from volseg.engine.certificate import temporary_certificate
from volseg.engine.receipts import Receipt, add
from volseg.errors import IncompleteRunError, UserError

THREADS = "VOLSEG_THREADS"  # environment of a worker: how many tiles it runs at once
DEVICE, HOST = "GPU", "CPU"  # resources of workers: tasks for the device, tasks beside it
TASKS_PER_GPU = 2  # one computes while the other reads or writes
ANSWER_S = 10.0  # in which a scheduler that is there answers
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
def _started(config: Cluster, count: int, gpu: bool) -> Iterator[SpecCluster]:
    """A local cluster of ``count`` worker processes; where they have a ``gpu`` each, others beside them."""
    forkserver.start()
    settings = {
        "distributed.worker.multiprocessing-method": forkserver.method(),
        "distributed.worker.profile.enabled": False,  # it keeps a tree of calls for every second: 0.1 MB/s
        "distributed.deploy.lost-worker-timeout": "1h",  # after which a nanny that has no worker is ended: a start takes long
        "distributed.scheduler.allowed-failures": 1,  # workers that one task may end before `loop` looks after it
        "distributed.admin.tick.interval": "500ms",  # 50 times a second each process asks whether its loop is late
    }
    with dask.config.set(settings), _processes(config, count, gpu) as found:
        if gpu:
            _add_cpu_workers(found, count + (config.cpu_workers or min(8, max(1, CPU_COUNT - count))))
        yield found


def _add_cpu_workers(found: SpecCluster, count: int) -> None:
    """The cluster has so many workers; those that are new do what needs no device, one task at a time."""
    found.new_spec = {**found.new_spec, "options": {**found.new_spec["options"], "nthreads": 1, "resources": {HOST: 1}}}
    found.scale(count)
    found.wait_for_workers(count, timeout=60)


def _processes(config: Cluster, count: int, gpu: bool) -> SpecCluster:
    with warnings.catch_warnings(), forkserver.deaf_to_interrupts():
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        try:
            return _local_cluster(
                _Nanny,
                count,
                dashboard=config.dashboard,
                security=_private(),
                nthreads=TASKS_PER_GPU if gpu else 1,
                resources={DEVICE: TASKS_PER_GPU} if gpu else {},
                worker_class=Worker if config.dashboard else _PortlessWorker,
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


def _local_cluster(
    worker: type, count: int, *, dashboard: str, security: Security | None, **options: Any
) -> SpecCluster:
    """What Dask's `LocalCluster` is, with classes of scheduler and worker that open no port for HTTP where none is wanted.

    With ``security`` all is encrypted: else every user of this machine could have the workers run code. Without, scheduler
    and workers are in this process and have no ports at all.
    """
    place = {"protocol": "tls://", "host": "127.0.0.1"} if security else {"protocol": "inproc://"}
    shown: dict[str, Any] = {"dashboard": bool(dashboard), "dashboard_address": _local_address(dashboard)}
    common = {**place, "security": security or Security()}
    spec = {"cls": worker, "options": {**common, "memory_limit": 0, "silence_logs": logging.CRITICAL, **options}}
    scheduler = {"cls": Scheduler if dashboard else _PortlessScheduler, "options": {**common, "port": 0, **shown}}
    return SpecCluster(
        workers=dict.fromkeys(range(count), spec),
        scheduler=scheduler,
        worker=spec,
        security=security,
        silence_logs=logging.CRITICAL,
    )


class _Portless:
    """A Dask node that serves no HTTP: Dask would, on a free port, where nobody asked for a dashboard, too."""

    def start_http_server(self, *args: Any, **kwargs: Any) -> None:
        pass


class _PortlessScheduler(_Portless, Scheduler):
    pass


class _PortlessWorker(_Portless, Worker):
    pass


def _private() -> Security:
    """Only who has the key of this command's own certificate may connect."""
    certificate, key = temporary_certificate()
    roles = ("client", "scheduler", "worker")
    pairs = {f"tls_{role}_{part}": text for role in roles for part, text in (("cert", certificate), ("key", key))}
    return Security(require_encryption=True, tls_ca_file=certificate, **pairs)


def _thread_cluster(count: int) -> SpecCluster:
    """A cluster of threads in this process."""
    return _local_cluster(_PortlessWorker, 1, dashboard="", security=None, nthreads=count)


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
        client = Client(address, timeout=ANSWER_S, set_as_default=False, security=security)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"no Dask scheduler answers at {address!r} ({reason}); start one or leave out --scheduler"
        ) from None
    state = "begun"
    try:
        with _silent(), client:
            client.register_plugin(Counters())
            if not client.scheduler_info(n_workers=-1)["workers"]:
                raise UserError(f"the scheduler at {address} has no workers; start some with: dask worker {address}")
            try:
                yield client
                state = "done"
            except Exception:
                state = "begun" if client.status == "running" else "lost"
                raise
    except UserError:
        raise
    except (
        Exception
    ) as error:  # which one a lost connection raises depends on what was under way, also while it is closed
        if state == "begun" and not isinstance(error, CommClosedError):
            raise
        if state != "done":
            raise IncompleteRunError(
                f"the connection to the scheduler at {address} was lost; what is done is kept: see that it and its workers "
                "run, and give the same command again"
            ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, Dask's client writes no tracebacks of connections that it loses: what comes of it is said once."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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


# ---------------------------------------------------------------- memory, and workers that die

MEMORY_TOPIC = "volseg-memory"  # of events that workers log before they end themselves
WATCH_INTERVAL_S = 0.2
RESTART_PAUSES_S = (0.1, 0.5, 2.0, 5.0)  # before a worker process is started again that ended while it started
DEATH_WAIT_S = 15.0  # in which, on a busy machine, too, the exit code of a worker that is gone is known


class _Nanny(Nanny):
    """Keeps what each process of its worker ended with."""

    deaths: dict[str, str] | None = None
    kills = 0

    async def instantiate(self) -> Any:
        """A worker process; where one ends before it has said a word, another: Dask's nanny would give up for good."""
        self.kills = guard.oom_kills()
        is_first = self.process is None
        for pause in () if is_first else RESTART_PAUSES_S:
            try:
                return await self.process.start()
            except Exception:  # whatever a process that ends makes of its start
                await asyncio.sleep(pause)
        return await super().instantiate()

    def _on_worker_exit_sync(self, exitcode: int) -> None:
        if self.worker_address:
            cause = guard.cause_of_death(exitcode, guard.oom_kills() > self.kills)
            self.deaths = {**(self.deaths or {}), self.worker_address: cause}
        super()._on_worker_exit_sync(exitcode)


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
        deaths = [nanny.deaths or {} for nanny in nannies if isinstance(nanny, _Nanny)]
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
