"""Timing that a noisy machine spoils least: candidates in turn, several times over, medians at the end."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from volseg.cluster import peak_bytes


@dataclass(frozen=True)
class Alone:
    """What a function returned in a process of its own, its seconds there, and the memory it took on top, bytes."""

    result: Any
    seconds: float
    peak_bytes: int


def side_by_side(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate; every round calls each one once, so that what slows the machine slows all."""
    took: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in took.items()}


def alone(function: Callable[..., Any], make: Callable[[], tuple], warm: bool = False) -> Alone:
    """``function(*make())`` in a fresh process; making the arguments does not count, nor a first call if ``warm``."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(theirs, function, make, warm))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{function} ended without a result") from None
    finally:
        process.join()


def _report(pipe: Any, function: Callable[..., Any], make: Callable[[], tuple], warm: bool) -> None:
    arguments = make()
    if warm:
        function(*arguments)
    before, start = peak_bytes(), time.perf_counter()
    result = function(*arguments)
    pipe.send(Alone(result, time.perf_counter() - start, peak_bytes() - before))
