"""What a model file says of itself, for people: `volseg info`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from volseg.inference.model import INT8

SHOWN = 4  # training volumes that are listed


def page(path: Path, card: dict) -> str:
    """The card of the model file at ``path`` in a few lines; what it does not hold is left out."""
    return "\n".join(f"{name:10}{text}" for name, text in _lines(path, card) if text)


def _lines(path: Path, card: dict) -> Iterator[tuple[str, str]]:
    binned = f", {card['binning']} x {card['binning']} voxels binned" if card.get("binning", 1) > 1 else ""
    trained = card.get("training") or {}
    yield "model", f"{card.get('name', path.stem)}: {card.get('use', 'no use is given')}"
    yield (
        "file",
        f"{path}, {path.stat().st_size / 1e6:.1f} MB, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}",
    )
    yield "network", f"U-Net on {card['encoder']}, decoder {_row(card['decoder'])}{binned}"
    size = " x ".join(f"{n:g}" for n in card.get("voxel_size_nm") or ())
    yield "sees", f"{card['sections']} section(s)" + (f" with voxels of {size} nm (z y x)" if size else "")
    yield "tells", f"{', '.join(card['heads'])} of the one in the middle"
    yield "trained", _training(trained)
    sources = trained.get("data") or []
    for source in sources[:SHOWN]:
        yield "", _source(source, card.get("scores", {}).get("validation", {}))
    yield "", f"and {len(sources) - SHOWN} more" if len(sources) > SHOWN else ""
    for what, scores in (card.get("scores", {}).get("test") or {}).items():
        yield "measured", f"{what}: {', '.join(f'{name} {value}' for name, value in scores.items())}"
    yield (
        "decodes",
        ", ".join(f"{s}.{k} = {v}" for s, values in card.get("decode", {}).items() for k, v in values.items()),
    )
    yield "int8", _quantized(card.get(INT8, {}))
    yield "made with", ", ".join(f"{name} {version}" for name, version in card.get("versions", {}).items())
    yield "all", "volseg info --json prints every setting it was trained with"


def _row(values: list) -> str:
    return " ".join(map(str, values))


def _training(trained: dict) -> str:
    """How long, of this stage and of those before it."""
    stages = []
    while trained:
        minutes = f" in {trained['seconds'] / 60:.0f} minutes" if trained.get("seconds") else ""
        stages.append(f"{trained.get('steps', '?')} steps{minutes}")
        trained = trained.get("first") or {}
    return ", after ".join(stages)


def _source(source: dict, scores: dict) -> str:
    """Of one training volume: sections, those held out, and the score there."""
    held, name = source.get("held") or [], source.get("name", "?")
    told = f"{name}: {source.get('learn', '?')} sections"
    if held:
        told += (
            f", held out {held[0]}:{held[-1] + 1}" if held[-1] - held[0] == len(held) - 1 else f", held out {len(held)}"
        )
    if name in scores:
        told += f" with IoU {scores[name]['iou']:.3f}"
    return told


def _quantized(form: dict) -> str:
    held = form.get("held_out")
    if not form or not held:
        return "a form that nothing was measured of" if form else "none; volseg quantize adds it"
    return f"held out {held['sections']}: IoU {held['iou_int8']:.4f}, in float32 {held['iou_fp32']:.4f}"
