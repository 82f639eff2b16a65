"""Faults of stored files: cut, flipped, zeroed, emptied, deleted or exchanged, in an unfinished run and in a finished one."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

from benchmarks.chaos.command import volseg
from benchmarks.chaos.episode import BLOCKED, DIFFERENT, REFUSED, SAME, Episode, hash_result, skipped
from benchmarks.chaos.stand import Stand, wait_for_moment

Damage = Callable[[Path, Random], None]


def _cut(file: Path, rng: Random) -> None:
    with file.open("r+b") as opened:
        opened.truncate(rng.randrange(max(1, file.stat().st_size)))


def _flip(file: Path, rng: Random) -> None:
    data = bytearray(file.read_bytes() or b"\0")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _zero(file: Path, rng: Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _empty(file: Path, rng: Random) -> None:
    file.write_bytes(b"")


def _delete(file: Path, rng: Random) -> None:
    file.unlink()


def _exchange(file: Path, rng: Random) -> None:
    """It holds what a file beside it holds; where there is none, it is emptied."""
    others = sorted(other for other in file.parent.iterdir() if other.is_file() and other != file)
    file.write_bytes(rng.choice(others).read_bytes() if others else b"")


DAMAGES: dict[str, Damage] = {
    "cut": _cut, "flipped": _flip, "zeroed": _zero, "emptied": _empty, "deleted": _delete, "exchanged": _exchange,
}  # fmt: skip
MOST_KEPT = 4  # states that killed commands left, of each job
STORED = {
    "probabilities": ("0/c",),
    "regions": ("work/fragments/c",),
    "tables": ("work/tables", "work/holes", "work/hole_contacts", "work/borders"),
    "links": ("work/links",),
    "id-maps": ("work/labels",),
    "basins": ("work/basins.npz",),
    "joins": ("work/merges",),
    "sums": ("work/objects",),
    "markers": ("work/markers",),
    "stamps": ("work/stamps",),
    "labels": ("labels/instances/0/c",),
    "pyramid": ("labels/instances/1/c", "labels/instances/2/c"),
    "model": ("work/model.bin",),
    "descriptions": ("work/run.json", "work/labels.json", "work/begun"),
    "metadata": ("zarr.json", "0/zarr.json", "labels", "work/fragments/zarr.json"),
    "tree": ("work/tree",),
    "passes": ("work/predict-xy", "work/predict-xz", "work/predict-yz"),
}
# Of a finished run, what `volseg verify` has to find: every kind of stored thing.
FINISHED = {
    "probabilities": ("0/c",),
    "regions": ("work/fragments/c",),
    "work-tables": ("work/tables", "work/links", "work/labels", "work/objects"),
    "basins": ("work/basins.npz",),
    "merges": ("work/merges",),
    "markers": ("work/markers",),
    "labels": ("labels/instances/0/c",),
    "pyramid": ("labels/instances/1/c", "labels/instances/2/c"),
    "tables": ("tables",),
    "pictures": ("overlay.png", "tables/volumes.png"),
    "metadata": ("zarr.json", "0/zarr.json", "labels/zarr.json", "labels/instances/zarr.json", "labels/instances/0/zarr.json",
                 "work/fragments/zarr.json"),
    "descriptions": ("run.json", "manifest.json", "work/run.json", "work/model.bin"),
}  # fmt: skip


def stored_files(run: Path, places: tuple[str, ...]) -> list[Path]:
    """The files of a run in these places."""
    found = []
    for place in places:
        path = run / place
        found += [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in found if not (file.name == "zarr.json" and places == ("labels",))]


def _left_behind(stand: Stand, job: str, rng: Random, places: tuple[str, ...]) -> Path | None:
    """What a killed command left, with files in one of the ``places``; the first of each job are made, later ones drawn."""
    folder = stand.place / "left-behind" / job
    kept = sorted(folder.glob("*")) if folder.is_dir() else []
    fitting = [path for path in kept if stored_files(path, places)]
    if fitting and len(kept) >= MOST_KEPT:
        return rng.choice(fitting)
    reference = stand.reference(job)
    for _ in range(8):
        out = stand.prepare(job)
        command = stand.start(stand.line(job, out))
        wait_for_moment(command, out, job, reference.seconds, rng)
        command.send(signal.SIGKILL, command.pids())
        command.end()
        partial_run = Path(f"{out}.partial")
        if partial_run.exists() and stored_files(partial_run, places):
            place = folder / f"{len(kept):03d}"
            shutil.copytree(partial_run, place)
            return place
    return None


def unfinished(stand: Stand, rng: Random, episode: Episode, *, places: tuple[str, ...]) -> Episode:
    """A file that a killed command left is damaged, and the command is given again."""
    reference = stand.reference(episode.job)
    left = _left_behind(stand, episode.job, rng, places)
    if left is None:
        return skipped(episode, "no kill left such a file")
    out = stand.prepare(episode.job)
    line, partial_run = stand.line(episode.job, out), Path(f"{out}.partial")
    shutil.copytree(left, partial_run)
    file, name = rng.choice(stored_files(partial_run, places)), rng.choice(list(DAMAGES))
    DAMAGES[name](file, rng)
    episode.faults += 1
    episode.notes.append(f"{left.name}: {file.relative_to(partial_run)} {name}")
    stand.again(episode, line, out)
    if episode.outcome == BLOCKED and episode.codes[-1] == 2 and "--overwrite" in episode.notes[-1]:
        episode.outcome = ""
        episode.ended(stand.start([*line, "--overwrite"]))
        if episode.judge(out, reference.hashes).outcome == SAME:
            episode.outcome = REFUSED
    return episode


def finished(stand: Stand, rng: Random, episode: Episode, *, places: tuple[str, ...]) -> Episode:
    """A file of a finished run is damaged: `volseg verify` finds it, and `volseg repair` makes just that again."""
    out = stand.prepare("decide")
    expected = hash_result(out)
    file, name = rng.choice(stored_files(out, places)), rng.choice(list(DAMAGES))
    before = file.read_bytes()
    DAMAGES[name](file, rng)
    key = str(file.relative_to(out))
    episode.notes.append(f"{key} {name}")
    if file.exists() and file.read_bytes() == before:
        return episode.judge(out, expected)
    episode.faults += 1
    command = stand.start(volseg("verify", str(out)))
    code = command.wait()
    episode.tracebacks += command.tracebacks
    if code not in (1, 2) or (key not in command.text and str(out) not in command.text):
        episode.outcome, episode.different = DIFFERENT, [f"verify did not find {key}: {command.last_line}"]
        return episode
    episode.ended(stand.start(volseg("repair", str(out))))
    if episode.codes[-1] == 2 and "--overwrite" in episode.notes[-1]:
        episode.outcome = REFUSED
        return episode
    return episode.judge(out, expected)


JOBS = {"tree": ("tree",), "passes": ("planes",), "model": ("infer",)}
KINDS = {
    **{
        f"damaged-{name}": (unfinished, JOBS.get(name, ("segment", "holes")), {"places": places})
        for name, places in STORED.items()
    },
    **{f"verify-{name}": (finished, ("infer",), {"places": places}) for name, places in FINISHED.items()},
}
