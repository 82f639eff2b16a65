"""A model's INT8 form: post-training quantization with OpenVINO NNCF, and what it costs in quality.

Only making it needs NNCF (the extra ``volseg[int8]``); a model file that carries the form runs without.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from volseg.box import Box
from volseg.config import Predict, load
from volseg.errors import UserError
from volseg.evaluation import evaluate
from volseg.inference import backends, export, model, tiles
from volseg.inference.model_card import Int8Form, ModelCard
from volseg.inference.normalization import normalization
from volseg.io import volume
from volseg.planning import prepare as describe
from volseg.segmentation.heights import OUTSIDE, block_heights
from volseg.system import require
from volseg.training.targets import parse_sections

CALIBRATED_ON = 20  # sections, evenly spread over those given


def quantize(
    path: Path, image: str, *, sections: tuple[str, ...] = (), truth: str = "", held: tuple[str, ...] = ()
) -> dict:
    """The model file carries an INT8 form, calibrated on up to `CALIBRATED_ON` of ``sections`` (all if none are given).

    With ``truth`` it is compared with fp32 on the sections ``held``, which must not be among those: `ModelCard.int8_allowed`
    reads that. Returns what the card then says. The same inputs give the same form.
    """
    card = model.load_card(path)
    source = volume.open(image)
    depth = source.shape[0]
    on = parse_sections(sections or (f"0:{depth}",), depth)
    test = parse_sections(held, depth)
    if both := sorted(set(on) & set(test)):
        raise UserError(f"section {both[0]} is both to calibrate on and held out; give --sections without it")
    box = _held_out(test, source) if truth else None
    real = evaluate.read_truth(truth, source.shape, box)(box) > 0 if truth else None
    on = [on[i] for i in sorted(set(np.linspace(0, len(on) - 1, min(len(on), CALIBRATED_ON)).round().astype(int)))]
    norm = normalization(source.shape, source.read)
    grid = _grid(source, card)
    tile_of = itertools.cycle(grid.overlapping(*(slice(0, n) for n in source.shape[1:])))
    form = _form(path, [_tile(source, z, grid.place(next(tile_of)), card.sections, norm) for z in on])
    facts = {
        "calibrated": {"volume": Path(image).name, "checksum": source.checksum(), "sections": on},
        "versions": {name: metadata.version(name) for name in ("nncf", "openvino")},
    }
    if truth:
        facts["held_out"] = _compare(path, form, source, real, box, norm)
    model.add_quantized(path, form, facts)
    return facts


def _grid(source: volume.Volume, card: ModelCard) -> tiles.Grid:
    return tiles.grid(source.shape[1:], Predict().tile, Predict().overlap, card.binning)


def _tile(
    source: volume.Volume, z: int, place: tuple[slice, slice], channels: int, norm: tuple[float, float]
) -> np.ndarray:
    """One tile of a section, (1, sections, Y, X) float32."""
    return describe.normalized_tile(source, z, place, channels, norm)[None]


def _form(path: Path, batches: list[np.ndarray]) -> bytes:
    """The packed INT8 graph of a model file, its ranges taken from ``batches``."""
    require("nncf", extra="int8")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # or its import calls home
    import openvino as ov

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nncf
    graph = ov.Core().read_model(export.export_model(path, "openvino"), b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = nncf.quantize(
            graph, nncf.Dataset(batches), subset_size=len(batches), preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(names=[_stem(graph)]),
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(small, Path(folder, "int8.xml"), compress_to_fp16=True)
        return export.pack_int8(Path(folder, "int8.xml").read_bytes(), Path(folder, "int8.bin").read_bytes())


def _stem(graph: Any) -> str:
    """The first convolution: it stays float, since 8 bits for the image itself cost more than all the rest together."""
    return next(op.get_friendly_name() for op in graph.get_ordered_ops() if op.get_type_name() == "Convolution")


# ---------------------------------------------------------------- what it costs


def _held_out(sections: list[int], source: volume.Volume) -> Box:
    """The box of these whole sections; refuses what is not one range of them."""
    if not sections or sections != list(range(sections[0], sections[-1] + 1)):
        raise UserError(
            f"--held-out names {sections or 'no section'}; give one range without gaps, for instance 140:165"
        )
    return Box((sections[0], 0, 0), (sections[-1] + 1, *source.shape[1:]))


def _compare(
    path: Path, form: bytes, source: volume.Volume, real: np.ndarray, box: Box, norm: tuple[float, float]
) -> dict:
    """IoU of the foreground in both precisions with what is ``real`` in ``box``, and how far probabilities are apart."""
    card = model.load_card(path)
    blobs = {"fp32": export.export_model(path, "openvino"), "int8": export.unpack_int8(form)}
    maps = {precision: _probabilities(blob, precision, source, box, card, norm) for precision, blob in blobs.items()}
    level = load(base=card.decode).fragments.threshold
    masks = [maps[precision][0] >= round(level * 255) for precision in maps]
    apart = np.abs(maps["fp32"].astype(np.int16) - maps["int8"]).mean() / 255
    found = {f"iou_{precision}": _iou(maps[precision], real, card) for precision in maps}
    sides = float(np.mean(masks[0] != masks[1]))
    return {"sections": f"{box.start[0]}:{box.stop[0]}", **found, "sides": sides, "mean_difference": float(apart)}


def _probabilities(
    blob: bytes, precision: str, source: volume.Volume, box: Box, card: ModelCard, norm: tuple[float, float]
) -> np.ndarray:
    """Both heads' probabilities of whole sections, uint8, as a run would store them."""
    grid = _grid(source, card)
    network = backends.load(blob, "openvino", precision, (1, card.sections, *grid.size))
    plane = tuple(slice(0, n) for n in source.shape[1:])
    out = np.empty((len(card.heads), *box.shape), np.uint8)
    for z in range(box.start[0], box.stop[0]):
        blend = tiles.Blend(len(card.heads), grid, *plane)
        for tile in grid.overlapping(*plane):
            blend.add(tile, network(_tile(source, z, grid.place(tile), card.sections, norm))[0])
        blend.quantize(out[:, z - box.start[0]])
    return out


def _iou(probability: np.ndarray, real: np.ndarray, card: ModelCard) -> float:
    """IoU of what the model's own settings take for foreground, whatever objects are cut by; only these sections are seen."""
    inside, plain = (
        Box.from_shape(real.shape),
        {"height": "probability", "contour": 0.0, "distance": 0, "distance_nm": 0.0},
    )
    knobs = load(base=card.decode).fragments.model_copy(update=plain)
    height = block_heights(probability, inside, real.shape, knobs)
    found = height[1:-1, 1:-1, 1:-1] != OUTSIDE
    return float((found & real).sum() / max(1, (found | real).sum()))


def table(facts: dict) -> str:
    """What the card says, as plain text."""
    lines = [f"calibrated on {len(facts['calibrated']['sections'])} sections of {facts['calibrated']['volume']}"]
    if held := facts.get("held_out"):
        lines += [
            f"held out   {held['sections']}: IoU {held['iou_int8']:.4f} in int8, {held['iou_fp32']:.4f} in fp32",
            f"apart      {100 * held['sides']:.3f} % of voxels on another side of the threshold, "
            f"mean difference {255 * held['mean_difference']:.3f} / 255",
            f"auto       {'may take it' if Int8Form(**facts).allowed else 'does not take it'}",
        ]
    return "\n".join(lines)
