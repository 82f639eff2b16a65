"""One trial: `volseg train` on some sections, `volseg infer` on a volume, scores in a box, each as a user would type it.

A trial that is done is not done again, and one that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import tifffile

from volseg.box import Box
from volseg.config import parse_set, read_file
from volseg.evaluation.evaluate import Evaluation, evaluate
from volseg.inference.model_card import ModelCard
from volseg.io import volume
from volseg.training.targets import parse_sections

MARGIN = 8  # sections read on both sides of those that are scored


def spread(first: int, stop: int, count: int) -> list[int]:
    """``count`` sections of ``first:stop``, evenly spaced, each in the middle of its share.

    >>> spread(0, 130, 4)
    [16, 48, 81, 113]
    """
    step = (stop - first) / count
    return [first + int((i + 0.5) * step) for i in range(count)]


def span(path: str, sections: str) -> tuple[int, int]:
    """First and last + 1 of ``"start:stop"`` in the volume at ``path``; ``""`` takes all."""
    depth = volume.open(path).shape[0]
    chosen = parse_sections((sections or f"0:{depth}",), depth)
    return chosen[0], chosen[-1] + 1


def cut(image: str, label: str, sections: str, out: Path) -> tuple[str, str, Box]:
    """Paths of the image and labels around ``sections`` as files of their own, and the box of those sections in them.

    Without ``sections`` the volumes themselves, and the whole box.
    """
    shape = volume.open(image).shape
    if not sections:
        return image, label, Box.from_shape(shape)
    first, stop = span(image, sections)
    start, end = max(0, first - MARGIN), min(shape[0], stop + MARGIN)
    key = hashlib.sha256(f"{image} {label} {sections}".encode()).hexdigest()[:8]
    paths = []
    for name, path in (("image", image), ("label", label)):
        target = out / f"{name}-{key}.tif"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(target, volume.open(path).read(Box((start, 0, 0), (end, *shape[1:]))))
        paths.append(str(target))
    return paths[0], paths[1], Box((first - start, 0, 0), (stop - start, *shape[1:]))


def settings(
    recipe: str, data: dict, out: Path, seed: int, sets: tuple[str, ...], decoding: tuple[str, ...] = ()
) -> Path:
    """``OUT/train.toml``: the [train] table of ``recipe`` with other data, seed and folder, and ``key=value`` changes; with
    ``decoding``, as for volseg infer, seeds and sizes are chosen."""
    train = read_file(recipe).get("train", {})
    kept = [table for table in train.pop("data", []) if "synth_seed" in table]
    train.update({"out": str(out), "seed": seed})
    lines = ["[train]", *(f"{key} = {json.dumps(value)}" for key, value in train.items())]
    for name, _, value in (text.partition("=") for text in sets):
        lines = [line for line in lines if not line.startswith(f"{name} =")] + [f"{name} = {value}"]
    for section, values in (pair for text in decoding for pair in parse_set(text).items()):
        lines = [f"{section}.{key} = {json.dumps(value)}" for key, value in values.items()] + lines
    for table in (data, *kept):
        lines += ["", "[[train.data]]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "train.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def trained(config: Path) -> tuple[Path, dict]:
    """The model of ``config``, trained unless that is done, and its card."""
    from volseg.inference.model import load_card

    model = config.with_name("model.safetensors")
    done = config.with_name("done")
    if not done.exists():
        volseg("train", str(config))
        done.touch()
    return model, load_card(model)


def scored(model: Path, image: str, label: str, box: Box, sets: tuple[str, ...] = ()) -> tuple[str, Evaluation]:
    """The run of ``model`` on ``image`` beside the model, made anew, and its scores in ``box``."""
    run = str(model.with_name("test.volseg.zarr"))
    changes = (part for text in sets for part in ("--set", text))
    volseg("infer", image, "--model", str(model), "--out", run, "--overwrite", *changes)
    return run, evaluate(run, label, box=box)


def volseg(*line: str) -> None:
    """Runs a volseg command; where that fails, it has said why, and the benchmark ends with its exit code."""
    if code := subprocess.run([sys.executable, "-m", "volseg", *line]).returncode:
        raise SystemExit(code)


def row(card: ModelCard, scores: Evaluation) -> dict:
    """What a table says of a trial."""
    fore, inst = scores.foreground, scores.instances
    return {
        "steps": card.training.steps,
        "minutes": round(card.training.seconds / 60, 1),
        "threshold": card.decode["fragments"]["threshold"],
        "IoU": round(fore.iou, 4),
        "PQ": round(inst.pq, 3),
        "SA50": round(inst.sa50, 3),
        **{name: getattr(inst, name) for name in ("split", "merged", "missed", "spurious")},
    }
