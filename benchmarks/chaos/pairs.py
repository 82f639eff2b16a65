"""Two commands on one output, up to 2.5 s apart: one writes, the other is refused or goes on after it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from random import Random

from benchmarks.chaos.command import Command, volseg
from benchmarks.chaos.episode import BLOCKED, DIFFERENT, Episode, hash_result, leavings
from benchmarks.chaos.stand import JOBS, Stand
from volseg.engine.integrity import damaged_files

LONGEST_S = 2.5  # between the two
HOLDER = "is being written by another volseg (process "
REFUSALS = (HOLDER, "exists; give another --out", "was cleaned: its basins must be made anew")
MODEL_FILES = ("model.safetensors",)


def pair(stand: Stand, rng: Random, episode: Episode, *, first: str, second: str) -> Episode:
    """Both commands are given; then the result must be what one of them gives, or one after the other, and be whole."""
    fresh = "infer" in (first, second) or "segment" in (first, second)
    out = stand.prepare("infer" if fresh else "decide")
    if "train" in (first, second):
        return _train(stand, rng, episode)
    lines = [_line(stand, name, out, seed) for name, seed in ((first, "0.9"), (second, "0.8"))]
    pause = rng.uniform(0, LONGEST_S)
    commands = [stand.start(lines[0])]
    time.sleep(pause)
    commands.append(stand.start(lines[1]))
    episode.faults += 1
    episode.notes.append(f"{pause:.1f} s apart")
    codes = [episode.ended(command) for command in commands]
    if None in codes:
        return episode
    complaints = [text for command, code in zip(commands, codes, strict=True) if (text := _complaint(command, code))]
    if 0 not in codes or complaints:
        episode.outcome, episode.different = DIFFERENT, complaints or ["neither was done"]
        return episode
    return _judge(episode, out, _allowed(stand, (first, second)))


def _line(stand: Stand, name: str, out: Path, seed: str) -> list[str]:
    """The command line of one of the two."""
    if name in ("infer", "segment"):
        return stand.line(name, out)
    if name == "decide":
        return volseg("segment", str(out), "--set", f"stitch.seed={seed}")
    if name == "calibrate":
        return volseg("calibrate", str(out), f"{stand.image}/labels/truth")
    return volseg(name, str(out))


def _complaint(command: Command, code: int | None) -> str:
    """What is wrong with how a command of a pair ended; `""` where it was done, or refused as it should be."""
    lines = [line for line in command.text.strip().splitlines() if line.startswith("volseg: ")]
    if code == 0:
        return ""
    if code == 2 and len(lines) == 1 and any(refusal in lines[0] for refusal in REFUSALS):
        return ""
    return f"exit code {code}: {command.last_line}"


def _judge(episode: Episode, out: Path, allowed: dict[str, dict[str, str]]) -> Episode:
    """The result is one of those allowed, its files are as its manifest says, and nothing else lies beside it."""
    if not out.exists():
        episode.outcome = BLOCKED
        return episode
    found = hash_result(out)
    equal = [name for name, hashes in allowed.items() if hashes == found]
    episode.notes.append(f"as after {equal[0]}" if equal else f"seed {_seed(out)}")
    if not equal:
        nearest = min(allowed.values(), key=lambda hashes: len(_differences(hashes, found)))
        episode.different = _differences(nearest, found)
    episode.different += [f"not as written: {key}" for key in damaged_files(str(out))]
    episode.leavings += leavings(out)
    return episode.judge(out, found) if not episode.different else _different(episode)


def _different(episode: Episode) -> Episode:
    episode.outcome = DIFFERENT
    return episode


def _differences(hashes: dict[str, str], found: dict[str, str]) -> list[str]:
    return sorted(key for key in {*hashes, *found} if hashes.get(key) != found.get(key))


def _seed(out: Path) -> float:
    return json.loads((out / "run.json").read_text())["config"]["stitch"]["seed"]


_ALLOWED: dict[str, dict[str, str]] = {}


def _allowed(stand: Stand, names: tuple[str, str]) -> dict[str, dict[str, str]]:
    """What each of the two gives alone, by its name; commands that decide nothing give what was there before."""
    allowed = {}
    for name, seed in zip(names, ("0.9", "0.8"), strict=True):
        if name in JOBS and name != "decide":
            allowed[name] = stand.reference(name).hashes
        elif name in ("clean", "repair"):
            allowed["before"] = stand.reference("infer").hashes
        else:
            key = f"{name} {seed}"
            if key not in _ALLOWED:
                folder = stand.place / "alone"
                out = stand.prepare("decide", folder)
                command = stand.start(_line(stand, name, out, seed))
                if command.wait() != 0:
                    raise SystemExit(f"{' '.join(command.line)} failed alone: {command.text[-2000:]}")
                _ALLOWED[key] = hash_result(out)
            allowed[key] = _ALLOWED[key]
    return allowed


# ---------------------------------------------------------------- training


def _train(stand: Stand, rng: Random, episode: Episode) -> Episode:
    """Two trainings of one folder: one is refused, or goes on after the other; the model is that of one alone."""
    folder = stand.place / "training"
    expected = _trained(stand, folder)
    shutil.rmtree(folder / "out")
    pause = rng.uniform(0, LONGEST_S)
    commands = [stand.start(volseg("train", str(folder / "train.toml")))]
    time.sleep(pause)
    commands.append(stand.start(volseg("train", str(folder / "train.toml"))))
    episode.faults += 1
    episode.notes.append(f"{pause:.1f} s apart")
    codes = [episode.ended(command) for command in commands]
    if None in codes:
        return episode
    episode.different = [
        text for command, code in zip(commands, codes, strict=True) if (text := _complaint(command, code))
    ]
    if not (folder / "out" / MODEL_FILES[0]).exists():
        episode.outcome = BLOCKED
        return episode
    if not episode.different and _weights(folder) != expected:
        episode.different = list(MODEL_FILES)
    return _different(episode) if episode.different or 0 not in codes else episode.judge(folder, hash_result(folder))


def _trained(stand: Stand, folder: Path) -> str:
    """The weights that a training gives alone."""
    if "train" not in _ALLOWED:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        table = {
            "decoder": [16, 16, 8, 8, 8], "pretrained": False, "patch": 64, "batch": 2, "every": 2, "steps": 4, "ema": 0.5,
            "device": "cpu", "precision": "fp32", "out": str(folder / "out"),
        }  # fmt: skip
        lines = ["[train]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        data = {"image": str(stand.image), "label": f"{stand.image}/labels/truth", "validate_on": ["12:16"]}
        lines += ["[[train.data]]", *(f"{key} = {json.dumps(value)}" for key, value in data.items())]
        (folder / "train.toml").write_text("\n".join(lines) + "\n")
        command = stand.start(volseg("train", str(folder / "train.toml")))
        if command.wait() != 0:
            raise SystemExit(f"training failed alone: {command.text[-2000:]}")
        _ALLOWED["train"] = {"weights": _weights(folder)}
    return _ALLOWED["train"]["weights"]


def _weights(folder: Path) -> str:
    """A hash of a trained model's weights; its card has times in it."""
    import hashlib

    from safetensors import safe_open

    state = hashlib.sha256()
    with safe_open(folder / "out" / MODEL_FILES[0], "np") as stored:
        for name in sorted(stored.keys()):
            state.update(name.encode() + stored.get_tensor(name).tobytes())
    return state.hexdigest()


NAMES = (
    ("infer", "infer"), ("segment", "segment"), ("decide", "decide"), ("infer", "segment"), ("decide", "clean"),
    ("decide", "calibrate"), ("decide", "repair"), ("clean", "repair"), ("train", "train"),
)  # fmt: skip
KINDS = {f"pair-{a}-{b}": (pair, ("infer",), {"first": a, "second": b}) for a, b in NAMES}
