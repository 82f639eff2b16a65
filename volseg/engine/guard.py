"""Workers that hold more memory than they may, or that die: what is done about it, and what is told."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from volseg import system

OVER_MEMORY = 77  # exit code of a worker that ended itself for its memory
TOLERANCE = 1.25  # times what it may hold (`cluster.memory_limit`) that a worker holds before it is ended
SLACK_BYTES = 300_000_000  # beyond that: libraries and compiled code, which a plan of a small worker underestimates
GENEROUS = 2.0  # times what was planned, where nothing was said and memory is short
SHORT_SHARE = 0.05  # share of the memory free below which it is short
WAY_OUT = "set fewer cluster.workers, a smaller predict.tile, or smaller blocks.shape"


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes that a worker was planned to hold, and that it may hold as its user said; 0: nobody did."""

    planned: int = 0
    allowed: int = 0

    def exceeded(self, held: int, free: Callable[[], int] = system.free_memory) -> str:
        """Why a worker that holds so many bytes is to be ended; ``""`` where it is not.

        What was planned is an estimate: a worker beyond it does no harm as long as there is memory for all.
        """
        if self.allowed and held > TOLERANCE * self.allowed + SLACK_BYTES:
            return f"held {held / 1e9:.2f} GB, cluster.memory_limit allows {self.allowed / 1e9:.2f} GB"
        if (
            self.planned
            and held > GENEROUS * self.planned + SLACK_BYTES
            and free() < SHORT_SHARE * system.total_memory()
        ):
            return f"held {held / 1e9:.2f} GB, {self.planned / 1e9:.2f} GB were planned, and no memory is left"
        return ""


def oom_kills() -> int:
    """How many processes the system has ended for want of memory: on this machine, or in this control group."""
    places = [Path("/proc/vmstat")]
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, kinds, path = line.split(":", 2)
        if not kinds:
            places.append(Path("/sys/fs/cgroup", path.strip("/"), "memory.events"))
        elif "memory" in kinds.split(","):
            places.append(Path("/sys/fs/cgroup/memory", path.strip("/"), "memory.oom_control"))
    return sum(_counter(place) for place in places)


def _counter(place: Path) -> int:
    rows = (line.split() for line in _text(place).splitlines())
    return next((int(row[1]) for row in rows if len(row) == 2 and row[0] == "oom_kill" and row[1].isdigit()), 0)


def _text(place: Path) -> str:
    with suppress(OSError):
        return place.read_text()
    return ""


def cause_of_death(exit_code: int | None, killed_for_memory: bool) -> str:
    """What ended a worker process, from its exit code, and whether the system ended any for want of memory since it began.

    >>> cause_of_death(-11, False)
    'its worker crashed (signal 11, SIGSEGV)'
    """
    if exit_code is None:
        return f"its worker is gone; if memory was out, {WAY_OUT}"
    if exit_code == OVER_MEMORY:
        return f"its worker held too much memory; {WAY_OUT}"
    if exit_code == -signal.SIGKILL:
        if killed_for_memory:
            return f"the system ended its worker for want of memory; {WAY_OUT}"
        return "its worker was killed (signal 9) by somebody else than the system, which counts no process ended for memory"
    if exit_code < 0:
        name = signal.Signals(-exit_code).name if -exit_code in {*signal.Signals} else "unknown"
        return f"its worker crashed (signal {-exit_code}, {name})"
    return f"its worker ended with exit code {exit_code}"
