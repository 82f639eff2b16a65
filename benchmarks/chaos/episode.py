"""What became of a disturbed command, and whether its result is that of an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zarr

from benchmarks.chaos.command import Command

SAME, DIFFERENT, REFUSED, BLOCKED, SKIPPED = "went on", "different", "refused", "blocked", "skipped"
APART = ("run.json", "manifest.json", "log.txt", "report.html")  # times differ, and where chunks lie in a shard


@dataclass
class Episode:
    """One command, its faults and its end.

    Attributes
    ----------
    kind, job, number
        What was done to which command; with the seed, `number` says again at which moments.
    faults
        How many there were.
    codes
        Exit code of each command that was given; None of one that did not end.
    outcome
        `SAME`, `DIFFERENT`, `REFUSED` with one line that says what to do, `BLOCKED` for ever, or `SKIPPED`.
    different
        Parts of the result that are not those of an undisturbed run.
    tracebacks
        How many a user would have seen.
    leavings
        Files beside or in the result that nobody needs any more, and processes that outlived their command.
    notes
        When and where; what was said last.
    """

    kind: str
    job: str = ""
    number: int = 0
    faults: int = 0
    codes: list[int | None] = field(default_factory=list)
    outcome: str = ""
    different: list[str] = field(default_factory=list)
    tracebacks: int = 0
    leavings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def ended(self, command: Command) -> int | None:
        """Waits for a command and keeps how it ended; its exit code."""
        code = command.wait()
        self.codes.append(code)
        self.tracebacks += command.tracebacks
        if code != 0:
            self.notes.append(command.last_line)
        self.leavings += [f"process {pid}" for pid in command.orphans()]
        command.end()
        if code is None:
            self.outcome = BLOCKED
        return code

    def judge(self, run: Path, expected: dict[str, str]) -> Episode:
        """The outcome, by what lies at ``run``."""
        if self.outcome == BLOCKED:
            return self
        if not run.exists():
            self.outcome = BLOCKED
            return self
        hashes = hash_result(run)
        self.different = sorted(key for key in {*hashes, *expected} if hashes.get(key) != expected.get(key))
        self.leavings += leavings(run)
        self.outcome = DIFFERENT if self.different else SAME
        return self

    @property
    def bad(self) -> bool:
        return self.outcome in (DIFFERENT, BLOCKED) or self.tracebacks > 0


def skipped(episode: Episode, reason: str) -> Episode:
    """It cannot be played here."""
    episode.outcome, episode.faults = SKIPPED, 0
    episode.notes.append(reason)
    return episode


def hash_result(run: Path) -> dict[str, str]:
    """SHA-256 of the voxels of each array of a finished run, and of each other file; without ``work``, pictures of review,
    and what has times in it."""
    hashes = {}
    for folder, folders, names in os.walk(run):
        place = Path(folder).relative_to(run)
        if place == Path():
            folders[:] = [name for name in folders if name not in ("work", "review")]
        if is_array(Path(folder)):
            folders.clear()
            hashes[f"{place}"] = _hash_array(Path(folder))
        for name in names:
            if str(place / name) not in APART:
                hashes[f"{place / name}"] = hashlib.sha256(Path(folder, name).read_bytes()).hexdigest()
    return hashes


def is_array(folder: Path) -> bool:
    """Whether a folder holds a zarr array."""
    try:
        return json.loads((folder / "zarr.json").read_text())["node_type"] == "array"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _hash_array(folder: Path) -> str:
    try:
        array = np.ascontiguousarray(zarr.open_array(folder, mode="r")[:])
    except Exception as error:  # a result that nobody can read is different, whatever zarr says
        return f"unreadable: {type(error).__name__}"
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def leavings(run: Path) -> list[str]:
    """Names beside a finished run that are its own, and temporary files in it."""
    own = (run.name, f"{run.name}.lock")  # a file that locks nothing by itself
    beside = [path.name for path in run.parent.iterdir() if path.name.startswith(run.name) and path.name not in own]
    inside = [str(path.relative_to(run)) for path in run.rglob(".*.tmp")]
    return [*beside, *inside]
