"""What a trained model says about itself, in its file and in the terminal."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from volseg.config import Config, Stitch
from volseg.inference.model_card import ModelCard
from volseg.io.formats import INSIDE
from volseg.training import checkpoint
from volseg.training.checkpoint import State
from volseg.training.decoding import Decoding
from volseg.training.sources import Source
from volseg.training.survey import parts

PACKAGES = ("volseg", "torch", "timm", "segmentation-models-pytorch", "numpy")


def model_card(
    config: Config, sources: list[Source], state: State, scores: dict, decoding: Decoding | None = None
) -> ModelCard:
    """Return the card of a model file: plain values that say how to run it, what it learnt from and how good it is.

    ``scores`` are those of `validate.validate`; ``decoding`` is what was calibrated, None before the end of a run.
    """
    settings, main = config.train, max(sources, key=lambda s: s.share)
    data = [
        {
            "name": volume_name(s.name), "learn": len(s.own.train), "unlabeled": len(s.own.unlabeled),
            "learned": parts(s.own.train), "depth": s.own.depth, "held": list(s.own.validation), "share": s.share,
            "planes": list(table.planes),
        }
        for s, table in zip(sources, settings.data, strict=True)
    ]  # fmt: skip
    stored = checkpoint.fixed_settings(settings)
    training = {
        "checksum": hashlib.sha256("\n".join(s.checksum for s in sources).encode()).hexdigest(),
        "data": data,
        "steps": state.step,
        "seconds": round(state.seconds),
        "settings": {key: value for key, value in stored.items() if key not in ("data", "start")},
    }
    plain = {
        "name": Path(settings.out).name,
        "encoder": settings.encoder,
        "decoder": list(settings.decoder),
        "sections": settings.sections,
        "binning": settings.binning,
        "heads": list(settings.heads),
        "mean": main.mean,
        "std": main.std,
        "voxel_size_nm": list(main.voxel_size_nm) if main.voxel_size_nm else None,
        "decode": decoding_tables(config, decoding),
        "training": training,
        "scores": {
            "validation": {volume_name(name): values for name, values in scores.items()},
            "calibrated": decoding.scores() if decoding else {},
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    return ModelCard.from_json(plain)


def volume_name(path: str) -> str:
    """Return the name of the file or folder of a volume.

    >>> volume_name("data/em.zarr::/0"), volume_name("data/em.tif"), volume_name("synth 3")
    ('em.zarr', 'em.tif', 'synth 3')
    """
    return Path(path.partition(INSIDE)[0]).name


def decoding_tables(config: Config, decoding: Decoding | None) -> dict:
    """Return the tables of a config that a model brings along: its ``decoding``, and what that was chosen with.

    Settings that are defaults are left out.
    """
    fields = {"fragments": True, "stitch": set(Stitch.model_fields) - {"reduce"}}
    base = config.model_dump(mode="json", include=fields, exclude_defaults=True)
    chosen = decoding.tables() if decoding else {}
    tables = {section: base.get(section, {}) | chosen.get(section, {}) for section in fields}
    return {section: table for section, table in tables.items() if table}


def closing_lines(scores: dict, decoding: Decoding, state: State) -> Iterator[str]:
    """Yield what a finished run says of itself, line by line."""
    names = scores if len(scores) > 2 else list(scores)[:1]
    for name in names:
        values = scores[name]
        subject = "held-out sections" if name == "all" else name
        yield f"{subject}: loss {values['loss']:.4f} IoU {values['iou']:.3f} accuracy {values['accuracy']:.4f}"
    z, y, x = decoding.smooth
    text = f"mask threshold {decoding.threshold:.2f}, smoothing {z} {y} {x}, seed {decoding.seed:g}, "
    text += f"objects from {decoding.min_voxels} voxels{' with what faces cut off' if decoding.count_cut else ''}"
    if decoding.pq == 0:
        yield "none of the settings tried finds an object on the held-out sections; train for longer, or annotate more"
    if decoding.iou is None:
        sizes = " but for sizes, which are those of the objects seen" if decoding.count_cut else ""
        why = f"so decoding is left as set{sizes}"
        if decoding.taught:
            why = "and what was set finds next to nothing, so decoding is what is best on the sections learned from"
        yield f"no section was held out, {why}: {text}"
    else:
        objects = "" if decoding.pq is None else f" PQ {decoding.pq:.3f}"
        yield f"calibrated there: {text}: IoU {decoding.iou:.3f}{objects}"
    share = 100 * data_wait_share(state)
    yield f"the loader kept the network waiting for {share:.1f} % of {state.seconds / 60:.1f} minutes"


def data_wait_share(state: State) -> float:
    """Return the share of the run in which the network waited for patches."""
    return state.data_wait_seconds / state.seconds if state.seconds else 0.0
