"""What a trained model says about itself, in its file and in the terminal."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from volseg.config import Config, Stitch
from volseg.training import checkpoint
from volseg.training.checkpoint import State
from volseg.training.decoding import Decoding
from volseg.training.samples import Source


def model_card(config: Config, sources: list[Source], state: State, scores: dict, chosen: Decoding | None) -> dict:
    """What a model file says about itself."""
    knobs, main = config.train, max(sources, key=lambda s: s.share)
    data = [
        {
            "name": Path(s.name).name, "learn": len(s.learn), "unlabeled": len(s.free),
            "held": [s.first + z for z in s.held], "share": s.share, "planes": list(given.planes),
        }
        for s, given in zip(sources, knobs.data, strict=True)
    ]  # fmt: skip
    settings = checkpoint.settings(knobs)
    training = {
        "checksum": hashlib.sha256("\n".join(s.checksum for s in sources).encode()).hexdigest(),
        "data": data,
        "steps": state.step,
        "seconds": round(state.seconds),
        "settings": {key: value for key, value in settings.items() if key not in ("data", "start")},
    }
    return {
        "name": Path(knobs.out).name,
        "encoder": knobs.encoder,
        "decoder": list(knobs.decoder),
        "sections": knobs.sections,
        "binning": knobs.binning,
        "heads": list(knobs.heads),
        "mean": main.mean,
        "std": main.std,
        "voxel_size_nm": list(main.voxel_size_nm) if main.voxel_size_nm else None,
        "decode": decoding_tables(config, chosen),
        "training": training,
        "scores": {
            "validation": {Path(name).name: values for name, values in scores.items()},
            "calibrated": chosen.scores() if chosen else {},
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("volseg", "torch", "timm", "segmentation-models-pytorch", "numpy")},
        },
    }


def decoding_tables(config: Config, chosen: Decoding | None) -> dict:
    """Tables of a config: what was ``chosen``, and the settings that it was chosen with, as far as they are no defaults."""
    which = {"fragments": True, "stitch": set(Stitch.model_fields) - {"reduce"}}
    given = config.model_dump(mode="json", include=which, exclude_defaults=True)
    found = chosen.settings() if chosen else {}
    tables = {section: given.get(section, {}) | found.get(section, {}) for section in which}
    return {section: table for section, table in tables.items() if table}


def closing_lines(scores: dict, chosen: Decoding, state: State) -> Iterator[str]:
    """What a finished run says of itself."""
    names = scores if len(scores) > 2 else list(scores)[:1]
    for name in names:
        values = scores[name]
        of = "held-out sections" if name == "all" else name
        yield f"{of}: loss {values['loss']:.4f} IoU {values['iou']:.3f} accuracy {values['accuracy']:.4f}"
    z, y, x = chosen.smooth
    decoding = f"mask threshold {chosen.threshold:.2f}, smoothing {z} {y} {x}, seed {chosen.seed:g}, "
    decoding += f"objects from {chosen.min_voxels} voxels"
    if chosen.pq == 0:
        yield "none of the settings tried finds an object on the held-out sections; train for longer, or annotate more"
    if chosen.iou is None:
        yield f"no section was held out, so decoding is left as set: {decoding}"
    else:
        yield f"calibrated there: {decoding}: IoU {chosen.iou:.3f}" + (
            f" PQ {chosen.pq:.3f}" if chosen.pq is not None else ""
        )
    yield f"the loader kept the network waiting for {100 * wait_share(state):.1f} % of {state.seconds / 60:.1f} minutes"


def wait_share(state: State) -> float:
    """Share of the run in which the network waited for patches."""
    return state.waited / state.seconds if state.seconds else 0.0
