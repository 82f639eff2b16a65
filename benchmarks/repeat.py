"""Timing that a noisy machine spoils least: candidates in turn, several times over, medians at the end."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from volseg import system as machine


@dataclass(frozen=True)
class Timed:
    """What a function returned in a process of its own, its seconds there, and the memory it took on top, bytes."""

    result: Any
    seconds: float
    peak_bytes: int


def time_in_turn(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate; every round calls each one once, so that what slows the machine slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def time_isolated(
    makers: dict[str, Callable[[], Callable[[Any], Any]]], argument: Any, repeats: int, more_arguments: dict[str, tuple]
) -> tuple[dict[str, list[Timed]], dict[str, dict]]:
    """Each candidate in a fresh process of its own, one at a time, in turn: ``repeats`` calls with ``argument``, then one
    with each of ``more_arguments``, whose results alone are kept.

    A maker is called in its process and gives what is called there; it does not count, neither as time nor as memory.
    """
    servers = {}
    try:
        for name, make in makers.items():
            servers[name] = _Server(make)
            servers[name].ready()
        timed: dict[str, list[Timed]] = {name: [] for name in makers}
        for _ in range(repeats):
            for name, server in servers.items():
                timed[name].append(server.call(argument))
        return timed, {
            name: {each: servers[name].call(each).result for each in arguments}
            for name, arguments in more_arguments.items()
        }
    finally:
        for server in servers.values():
            server.end()


class _Server:
    """A process that holds one candidate and calls it when told to."""

    def __init__(self, make: Callable) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> None:
        self._receive()

    def call(self, argument: Any) -> Timed:
        self.pipe.send(argument)
        return self._receive()

    def end(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError("a candidate's process ended without a result; what it printed says why") from None


def _serve(pipe: Any, make: Callable) -> None:
    function = make()
    _forget_peak()
    before = machine.resident()
    pipe.send(None)
    while True:
        try:
            argument = pipe.recv()
        except EOFError:
            return
        start = time.perf_counter()
        result = function(argument)
        seconds = time.perf_counter() - start
        pipe.send(Timed(result, seconds, max(0, machine.resident("HWM") - before)))


def _forget_peak() -> None:
    """The kernel counts this process's peak memory anew (Linux; elsewhere a peak before stays in it)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
