"""What runs and workers tell Prometheus, beside what Dask does: ``volseg_...`` under ``/metrics`` of scheduler and workers.

Dask serves what is registered with prometheus-client (extra ``metrics``); without it nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from volseg.engine.run_view import RunView
from volseg.system import installed

if TYPE_CHECKING:
    from volseg.engine.cluster import Counters


@dataclass(frozen=True)
class Metric:
    """A number with a name, for each value of its labels; ``total`` ones only grow."""

    name: str
    help: str
    labels: tuple[str, ...]
    values: tuple[tuple[tuple[str, ...], float], ...]
    total: bool = False


def run_metrics(runs: dict[str, RunView]) -> list[Metric]:
    """What a scheduler has to say of its runs."""
    stages = [(run, name, stage) for run in runs.values() for name, stage in run.stages.items()]
    looks = [(run, run.outlook()) for run in runs.values()]
    return [
        Metric(
            "volseg_blocks", "Blocks by state", ("run", "stage", "state"),
            tuple(((r.name, name, state), n) for r, name, s in stages for state, n in s.blocks().items()),
        ),
        Metric(
            "volseg_voxels_done", "Voxels that are done, also by earlier commands", ("run", "stage"),
            tuple(((r.name, name), s.done) for r, name, s in stages),
        ),
        Metric(
            "volseg_voxels", "Voxels that there are to do", ("run", "stage"),
            tuple(((r.name, name), s.voxels) for r, name, s in stages),
        ),
        Metric(
            "volseg_voxels_per_second", "Speed of late", ("run", "stage"),
            tuple(((r.name, title), rate) for r in runs.values() for title, rate in r.rates().items()),
        ),
        Metric("volseg_progress", "Share of the work that is done", ("run",), tuple(((r.name,), s) for r, (s, _) in looks)),
        Metric(
            "volseg_seconds_left", "Seconds that the rest takes", ("run",),
            tuple(((r.name,), left) for r, (_, left) in looks if left is not None and not r.ended),
        ),
        Metric(
            "volseg_planned_seconds", "Seconds that the plan gives the whole run", ("run",),
            tuple(((r.name,), r.plan["total_seconds"]) for r in runs.values() if r.plan),
        ),
        Metric(
            "volseg_running", "1 while the command works on the run", ("run",),
            tuple(((r.name,), float(not r.ended)) for r in runs.values()),
        ),
    ]  # fmt: skip


def worker_metrics(counters: Counters, queue: int, peak_bytes: int) -> list[Metric]:
    """What a worker has to say of itself."""
    return [
        Metric(
            "volseg_worker_voxels", "Voxels that this worker has done", ("stage",),
            tuple(((stage,), n) for stage, n in counters.voxels.items()), total=True,
        ),
        Metric(
            "volseg_worker_seconds", "Seconds of its tasks", ("phase",),
            tuple(((phase,), s) for phase, s in counters.seconds.items()), total=True,
        ),
        Metric("volseg_worker_device_share", "Share of its time that its device computed", (), (((), counters.device_share),)),
        Metric("volseg_worker_queue", "Tasks that wait on it", (), (((), queue),)),
        Metric("volseg_worker_peak_bytes", "Most memory that it has held", (), (((), peak_bytes),)),
    ]  # fmt: skip


def add_runs(runs: dict[str, RunView]) -> Callable[[], None]:
    """The scheduler's ``/metrics`` has `run_metrics`; the function returned ends that."""
    return register(lambda: run_metrics(runs))


def register(metrics: Callable[[], list[Metric]]) -> Callable[[], None]:
    """This process' ``/metrics`` has what the function gives when asked; the function returned ends that."""
    if not installed("prometheus_client"):
        return lambda: None
    import prometheus_client

    collector = _Collector(metrics)
    prometheus_client.REGISTRY.register(collector)
    return lambda: prometheus_client.REGISTRY.unregister(collector)


class _Collector:
    """What prometheus-client asks."""

    def __init__(self, metrics: Callable[[], list[Metric]]) -> None:
        self.metrics = metrics

    def describe(self) -> list:
        """Names are not known before they are asked for, and are volseg's alone."""
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for metric in self.metrics():
            family = (CounterMetricFamily if metric.total else GaugeMetricFamily)(
                metric.name, metric.help, labels=metric.labels
            )
            for labels, value in metric.values:
                family.add_metric(labels, value)
            yield family
