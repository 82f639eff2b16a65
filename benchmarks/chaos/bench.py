"""Plays episodes of all kinds in turn until the time is over, and counts what became of them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import report
from benchmarks.chaos import damage, disks, network, pairs, signals, stores
from benchmarks.chaos.episode import BLOCKED, DIFFERENT, REFUSED, SAME, SKIPPED, Episode
from benchmarks.chaos.stand import Stand

Kind = tuple[Callable[..., Episode], tuple[str, ...], dict[str, Any]]
KINDS: dict[str, Kind] = {
    **signals.KINDS, **damage.KINDS, **disks.KINDS, **pairs.KINDS, **stores.KINDS, **network.KINDS,
}  # fmt: skip

# What docs/reliability.md does not promise, played only where it is named: a store that hides what it has stored.
OUTSIDE = ("store-late",)


def measure(kinds: str, seed: int, minutes: float, count: int, workers: int, out: str, place: str) -> list[dict]:
    """A row for each kind; with all episodes they are written to ``out``. Exits with 1 where any episode ended badly.

    Kinds take turns until ``minutes`` are over or each had ``count`` episodes. An episode is drawn by seed, kind and number
    alone, so one that ended badly can be played again; those that ``out`` has are not played again.
    """
    names = chosen(kinds)
    episodes = load(out, seed) if out else []
    played = {(episode.kind, episode.number) for episode in episodes}
    with TemporaryDirectory(prefix="chaos-") as folder:
        stand, begin = Stand(Path(place or folder), workers), time.monotonic()
        for number, name in _turns(names, count):
            if minutes and time.monotonic() - begin > 60 * minutes:
                break
            if (name, number) in played:
                continue
            episodes.append(play(stand, name, seed, number))
            print(line(episodes[-1]), flush=True)
            if out:
                keep(out, seed, episodes)
    rows = table(episodes)
    report.keep("chaos", rows) if not out else _print(rows)
    if any(episode.bad for episode in episodes):
        raise SystemExit(1)
    return rows


def chosen(kinds: str) -> list[str]:
    """The kinds that a comma-separated list names, by whole name or beginning; all but `OUTSIDE` for none."""
    if not kinds:
        return [name for name in KINDS if name not in OUTSIDE]
    names = [name for text in kinds.split(",") for name in KINDS if name == text or name.startswith(f"{text}-")]
    if not names:
        raise SystemExit(f"no kind is called {kinds}: {', '.join(KINDS)}")
    return names


def _turns(names: list[str], count: int) -> Iterable[tuple[int, str]]:
    number = 0
    while not count or number < count:
        yield from ((number, name) for name in names)
        number += 1


def play(stand: Stand, name: str, seed: int, number: int) -> Episode:
    """One episode of a kind."""
    function, jobs, options = KINDS[name]
    rng = Random(f"{seed} {name} {number}")
    episode = Episode(name, jobs[number % len(jobs)], number)
    begin = time.monotonic()
    function(stand, rng, episode, **options)
    episode.seconds = round(time.monotonic() - begin, 1)
    return episode


def line(episode: Episode) -> str:
    """An episode in a line."""
    what = f"{episode.kind} {episode.number} ({episode.job}): {episode.faults} faults, {episode.outcome}, {episode.seconds} s"
    bad = [*episode.different[:4], *episode.leavings[:4], *episode.notes, str(episode.codes)]
    if episode.bad or episode.leavings:
        return f"{what}; {episode.tracebacks} tracebacks; {'; '.join(bad)}"
    return f"{what}; {'; '.join(episode.notes[:3])}"


def table(episodes: list[Episode]) -> list[dict]:
    """A row for each kind, and one for all."""
    kinds = dict.fromkeys(episode.kind for episode in episodes)
    rows = [_row(kind, [episode for episode in episodes if episode.kind == kind]) for kind in kinds]
    played = len([row for row in rows if row["episodes"] > row["skipped"]])
    return [*rows, _row(f"all {played} kinds", episodes)]


def _row(name: str, episodes: list[Episode]) -> dict:
    def number(*outcomes: str) -> int:
        return sum(episode.outcome in outcomes for episode in episodes)

    return {
        "kind": name,
        "episodes": len(episodes),
        "faults": sum(episode.faults for episode in episodes),
        "went on": number(SAME),
        "refused with the way out": number(REFUSED),
        "bytes different": number(DIFFERENT),
        "blocked for ever": number(BLOCKED),
        "tracebacks": sum(episode.tracebacks for episode in episodes),
        "leavings": sum(bool(episode.leavings) for episode in episodes),
        "skipped": number(SKIPPED),
        "s": round(sum(episode.seconds for episode in episodes)),
    }


def load(out: str, seed: int) -> list[Episode]:
    """The episodes of an earlier call with that seed."""
    path = Path(out)
    stored = json.loads(path.read_text()) if path.exists() else {}
    return [Episode(**plain) for plain in stored.get("episodes", ())] if stored.get("seed") == seed else []


def keep(out: str, seed: int, episodes: list[Episode]) -> None:
    """All episodes are in the JSON file ``out``."""
    plain = {**report.machine(), "seed": seed, "rows": table(episodes), "episodes": [asdict(e) for e in episodes]}
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(plain) + "\n")
    shutil.move(temporary, path)


def _print(rows: list[dict]) -> None:
    from volseg.progress import format_table

    print(format_table(tuple(rows[0]), [tuple(row.values()) for row in rows]))
