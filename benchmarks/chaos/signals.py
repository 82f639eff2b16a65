"""Faults of processes: killed, told to end, stopped and resumed, by their role in a command."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from random import Random

from benchmarks.chaos.command import CLIENT, FORKSERVER, TRACKER, WORKER
from benchmarks.chaos.episode import BLOCKED, Episode
from benchmarks.chaos.stand import Stand, wait_for_moment, wait_for_stage

MOST_FAULTS = 3  # of one episode
SUSPENSIONS_S = (1, 3, 8)


def signaled(stand: Stand, rng: Random, episode: Episode, *, role: str, number: int, every: bool = False) -> Episode:
    """One process of that role, or every one, gets a signal, up to `MOST_FAULTS` times over as many commands."""
    reference, out = stand.reference(episode.job), stand.prepare(episode.job)
    line = stand.line(episode.job, out)
    for _ in range(rng.choice((1, 1, 2, MOST_FAULTS))):
        command = stand.start(line)
        moment = wait_for_moment(command, out, episode.job, reference.seconds, rng)
        pids = command.pids(role) if moment else []
        if pids:
            episode.faults += command.send(number, pids if every else [rng.choice(pids)])
            episode.notes.append(moment)
        if episode.ended(command) in (0, None):
            break
    return stand.again(episode, line, out)


def at_stage(stand: Stand, rng: Random, episode: Episode, *, stage: str, role: str = "") -> Episode:
    """A worker or the client, as chance has it, is killed as soon as that stage's first markers are there."""
    out = stand.prepare(episode.job)
    line = stand.line(episode.job, out)
    command = stand.start(line)
    moment = wait_for_stage(command, out, stage, pause=rng.choice((0, 0.002, 0.01, 0.03)))
    pids = command.pids(role or rng.choice((CLIENT, WORKER))) if moment else []
    if pids:
        episode.faults += command.send(signal.SIGKILL, [rng.choice(pids)])
        episode.notes.append(moment)
    episode.ended(command)
    return stand.again(episode, line, out)


def interrupted(stand: Stand, rng: Random, episode: Episode) -> Episode:
    """Ctrl-C: every process of the terminal gets SIGINT; sometimes twice."""
    reference, out = stand.reference(episode.job), stand.prepare(episode.job)
    line = stand.line(episode.job, out)
    command = stand.start(line)
    moment = wait_for_moment(command, out, episode.job, reference.seconds, rng)
    for _ in range(rng.choice((1, 1, 2)) if moment else 0):
        with suppress(ProcessLookupError):
            os.killpg(command.process.pid, signal.SIGINT)
            episode.faults += 1
        time.sleep(rng.choice((0.05, 0.3, 1.0)))
    episode.notes.append(moment)
    episode.ended(command)
    return stand.again(episode, line, out)


def suspended(stand: Stand, rng: Random, episode: Episode, *, role: str = "") -> Episode:
    """A process of that role, or the whole command, is stopped for seconds and resumed."""
    reference, out = stand.reference(episode.job), stand.prepare(episode.job)
    line = stand.line(episode.job, out)
    command = stand.start(line)
    for _ in range(2):
        moment = wait_for_moment(command, out, episode.job, reference.seconds, rng)
        pids = command.pids(role) if moment else []
        if not pids:
            break
        pids = [rng.choice(pids)] if role else pids
        episode.faults += command.send(signal.SIGSTOP, pids)
        seconds = rng.choice(SUSPENSIONS_S)
        time.sleep(seconds)
        command.send(signal.SIGCONT, pids)
        episode.notes.append(f"{moment}, {seconds} s")
    episode.ended(command)
    return stand.again(episode, line, out)


def overtaken(stand: Stand, rng: Random, episode: Episode) -> Episode:
    """A command is suspended, given again beside itself, and resumed: one of them is refused, or goes on after the other."""
    reference, out = stand.reference(episode.job), stand.prepare(episode.job)
    line = stand.line(episode.job, out)
    first = stand.start(line)
    moment = wait_for_moment(first, out, episode.job, reference.seconds, rng)
    pids = first.pids() if moment else []
    episode.faults += min(1, first.send(signal.SIGSTOP, pids))
    second = stand.start(line)
    episode.ended(second)
    first.send(signal.SIGCONT, pids)
    episode.notes.append(moment)
    if episode.ended(first) is None:
        episode.outcome = BLOCKED
    return stand.again(episode, line, out)


KILL, TERM, SEGV = signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV
ANY = ("infer", "segment", "tree", "holes", "planes")
# By kind: the function, the jobs that it is played on, and what it is told.
KINDS = {
    "kill-worker": (signaled, ANY, {"role": WORKER, "number": KILL}),
    "term-worker": (signaled, ANY, {"role": WORKER, "number": TERM}),
    "segv-worker": (signaled, ANY, {"role": WORKER, "number": SEGV}),
    "kill-workers": (signaled, ANY, {"role": WORKER, "number": KILL, "every": True}),
    "kill-client": (signaled, (*ANY, "decide"), {"role": CLIENT, "number": KILL}),
    "term-client": (signaled, (*ANY, "decide"), {"role": CLIENT, "number": TERM}),
    "int-client": (signaled, (*ANY, "decide"), {"role": CLIENT, "number": signal.SIGINT}),
    "hangup-client": (signaled, ANY, {"role": CLIENT, "number": signal.SIGHUP}),
    "kill-forkserver": (signaled, ANY, {"role": FORKSERVER, "number": KILL}),
    "kill-tracker": (signaled, ANY, {"role": TRACKER, "number": KILL}),
    "interrupt": (interrupted, ANY, {}),
    "stop-worker": (suspended, ANY, {"role": WORKER}),
    "stop-client": (suspended, ANY, {"role": CLIENT}),
    "stop-all": (suspended, ANY, {}),
    "overtake": (overtaken, ("infer", "segment"), {}),
    "kill-tree": (at_stage, ("tree",), {"stage": "contract0"}),
    "kill-rank": (at_stage, ("tree",), {"stage": "rank"}),
    "kill-holes": (at_stage, ("holes",), {"stage": "find_holes"}),
    "kill-planes": (at_stage, ("planes",), {"stage": "predict-xz"}),
    "kill-resampled": (at_stage, ("resampled",), {"stage": "relabel"}),
    "kill-pyramid": (at_stage, ("segment", "infer"), {"stage": "pyramid1"}),
    "kill-finish": (at_stage, ("segment", "infer", "decide"), {"stage": "SUMMARY", "role": CLIENT}),
}  # fmt: skip
