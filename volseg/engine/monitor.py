"""A run in the Dask dashboard: what its scheduler is told of it, and the plugin there that keeps it."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from distributed import Client, Scheduler, SchedulerPlugin

from volseg.box import Triple
from volseg.engine import cluster
from volseg.engine.ready import Ready
from volseg.engine.receipts import RunStatistics
from volseg.engine.run import Run
from volseg.engine.run_view import RunView
from volseg.engine.stages import Stage, stages_of

NAME = "volseg"  # of the plugin, and of the page
INTERVAL_S = 1.0  # between messages
MOST_LOAD = 0.05  # share of its time that this process spends on them
KEPT_RUNS = 4  # of which a scheduler knows, the latest


# ---------------------------------------------------------------- here


@contextmanager
def shown(
    client: Client, run: Run, statistics: RunStatistics, plan: dict | None, tell: Callable[[str], None]
) -> Iterator[None]:
    """Inside, the dashboard of the scheduler has a page of the run; it stays there. Nothing where there is no dashboard."""
    if not cluster.dashboard(client):
        yield
        return
    try:
        client.register_plugin(RunPages())
    except Exception as error:  # of a scheduler without volseg, or one that takes no code: a run needs neither
        tell(f"the dashboard has no volseg page: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        yield
        return
    statistics.blocks = {}
    feed, stopped = _Feed(client, run, statistics, plan), threading.Event()
    feed.send()
    thread = threading.Thread(target=feed.send_until, args=[stopped], daemon=True)
    thread.start()
    ended = "stopped"
    try:
        yield
        ended = "done"
    finally:
        stopped.set()
        thread.join(INTERVAL_S)
        if client.status == "running":
            with suppress(Exception):  # the connection is lost: the run itself says so
                feed.send(ended)


class _Feed:
    """Sends what has changed of a run."""

    def __init__(self, client: Client, run: Run, statistics: RunStatistics, plan: dict | None) -> None:
        self.client, self.statistics = client, statistics
        self.stages = stages_of(run)
        self.known = [name for name, stage in self.stages.items() if stage.group != "tree"]
        self.sent: dict[str, bytes] = {}
        kept = ("seconds", "total_seconds", "inferred_voxels", "redundancy", "worker_bytes", "written_bytes")
        self.head = {
            "run": run.id,
            "name": run.out.removesuffix(".partial"),
            "began": time.time(),
            "slots": statistics.slots,
            "plan": {name: plan[name] for name in kept} if plan else {},
        }

    def send_until(self, stopped: threading.Event) -> None:
        took = 0.0
        while not stopped.wait(max(INTERVAL_S, took / MOST_LOAD)):
            begin = time.perf_counter()
            try:
                self.send()
            except RuntimeError:  # what is counted grew meanwhile: the next time
                continue
            except Exception:  # the connection is lost: the run itself says so
                return
            took = time.perf_counter() - begin

    def send(self, ended: str = "") -> None:
        """The scheduler knows what is so now."""
        statistics = self.statistics
        blocks = dict(statistics.blocks or {})
        if any(self.stages[name].group == "tree" for name in blocks):
            self.known = [name for name, stage in self.stages.items() if stage.group != "flat"]
        changed = {name: packed for name, ready in blocks.items() if (packed := self._packed(name, ready))}
        message = {
            **self.head,
            "now": time.time(),
            "ended": ended,
            "stages": [_plain(self.stages[name]) for name in self.known],
            "blocks": changed,
            "seconds": {title: sum(phases.values()) for title, phases in list(statistics.worker_seconds.items())},
            "sums": {
                "inferred_voxels": statistics.inferred_voxels,
                "device_share": statistics.device_share,
                "worker_bytes": statistics.peak_bytes,
            },
        }
        self.client.run_on_scheduler(receive, message)

    def _packed(self, name: str, ready: Ready) -> tuple[int, bytes, Triple, Triple] | None:
        """Voxels that are done, and the blocks' states, first, counts; None where nothing has changed."""
        states = bytes(ready.state)
        if self.sent.get(name) == states:
            return None
        self.sent[name] = states
        if not ready.left:
            self.statistics.blocks.pop(name, None)
        return ready.voxels, zlib.compress(states, 1), ready.first, ready.at.shape


def _plain(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "title": stage.title,
        "counts": stage.grid.counts,
        "shape": stage.grid.shape,
        "voxels": stage.part.voxels,
        "infers": stage.on_device,
    }


# ---------------------------------------------------------------- on the scheduler


class RunPages(SchedulerPlugin):
    """Keeps the latest runs of a scheduler, and gives its dashboard a page of them, and its ``/metrics``."""

    name = NAME
    idempotent = True

    def __init__(self) -> None:
        self.runs: dict[str, RunView] = {}
        self.close_all: list[Callable[[], None]] = []

    async def start(self, scheduler: Scheduler) -> None:
        from volseg.engine import dashboard, metrics

        self.close_all = [dashboard.add_page(scheduler, self.runs), metrics.add_runs(self.runs)]

    async def close(self) -> None:
        while self.close_all:
            self.close_all.pop()()

    def receive(self, message: dict[str, Any]) -> None:
        """A run is as the message says; one that has begun anew replaces itself."""
        run = self.runs.get(message["run"])
        if run is None or run.began != message["began"]:
            self.runs.pop(message["run"], None)
            run = RunView(message["name"], message["began"], message["plan"], message["slots"])
            self.runs[message["run"]] = run
        while len(self.runs) > KEPT_RUNS:
            self.runs.pop(next(iter(self.runs)))
        run.tell(message)


def receive(message: dict[str, Any], dask_scheduler: Scheduler) -> None:
    """What `Client.run_on_scheduler` calls there."""
    pages = dask_scheduler.plugins[NAME]
    if isinstance(pages, RunPages):
        pages.receive(message)
