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
from volseg.inference import backends, export, model, sampling, tiles
from volseg.inference.model_card import Int8Form, ModelCard
from volseg.inference.normalization import gray_statistics, scale
from volseg.inference.padding import values_of_nothing
from volseg.inference.sections import predict_sections_uint8
from volseg.io import volume
from volseg.system import require
from volseg.training.decoding import foreground
from volseg.training.targets import parse_sections

CALIBRATION_SECTIONS = 20  # at most, evenly spread over those given


def quantize(
    path: Path, image: str, *, sections: tuple[str, ...] = (), truth: str = "", held_out: tuple[str, ...] = ()
) -> dict:
    """Add an INT8 form to a model file. The same inputs give the same form.

    Parameters
    ----------
    path
        The model file; its weights are left as they are.
    image
        A volume that the model was trained on.
    sections
        Sections to calibrate on, as numbers and ``start:stop`` ranges; all if none are given. At most
        `CALIBRATION_SECTIONS` of them are used.
    truth
        Labels of the volume. With them the form is compared with fp32, and `ModelCard.int8_allowed` reads the result.
    held_out
        One range of sections to compare on, none of ``sections``.

    Returns
    -------
    dict
        What the card then says: ``calibrated``, ``versions`` and, with ``truth``, ``held_out``.

    Raises
    ------
    UserError
        If sections are both to calibrate on and held out, the held-out ones are not one range, or NNCF is not installed.
    """
    card = model.load_card(path)
    source = volume.open(image)
    depth = source.shape[0]
    calibration = parse_sections(sections or (f"0:{depth}",), depth)
    test = parse_sections(held_out, depth)
    if both := sorted(set(calibration) & set(test)):
        raise UserError(f"section {both[0]} is both to calibrate on and held out; give --sections without it")
    box = _section_box(test, source) if truth else None
    mask = evaluate.read_truth(truth, source.shape, box)(box) > 0 if truth else None
    calibration = _spread(calibration)
    statistics = gray_statistics(source.shape, source.read)
    form = _make_form(path, _calibration_tiles(source, calibration, card, statistics))
    facts = {
        "calibrated": {"volume": Path(image).name, "checksum": source.checksum(), "sections": calibration},
        "versions": {name: metadata.version(name) for name in ("nncf", "openvino")},
    }
    if truth:
        facts["held_out"] = _compare(path, form, source, mask, box, statistics)
    model.add_quantized(path, form, facts)
    return facts


def _spread(sections: list[int]) -> list[int]:
    """Up to `CALIBRATION_SECTIONS` of them, evenly spread."""
    chosen = np.linspace(0, len(sections) - 1, min(len(sections), CALIBRATION_SECTIONS)).round().astype(int)
    return [sections[i] for i in sorted(set(chosen))]


def _tile_grid(source: volume.Volume, card: ModelCard) -> tiles.Grid:
    return tiles.grid(source.shape[1:], Predict().tile, Predict().overlap, card.multiple)


def _calibration_tiles(
    source: volume.Volume, sections: list[int], card: ModelCard, statistics: tuple[float, float]
) -> list[np.ndarray]:
    """One tile of each section, (1, sections, Y, X) float32, one after the other of those of a plane."""
    grid = _tile_grid(source, card)
    tile_keys = itertools.cycle(grid.overlapping(*(slice(0, n) for n in source.shape[1:])))
    places = [grid.place(next(tile_keys)) for _ in sections]
    return [
        sampling.read_tiles(source, place, range(z, z + 1), sections=card.sections, norm=statistics)
        for z, place in zip(sections, places, strict=True)
    ]


def _make_form(path: Path, batches: list[np.ndarray]) -> bytes:
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
            ignored_scope=nncf.IgnoredScope(names=[_first_convolution(graph)]),
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(small, Path(folder, "int8.xml"), compress_to_fp16=True)
        return export.pack_int8(Path(folder, "int8.xml").read_bytes(), Path(folder, "int8.bin").read_bytes())


def _first_convolution(graph: Any) -> str:
    """The name of the layer that stays float: 8 bits for the image itself cost more than all the rest together."""
    return next(op.get_friendly_name() for op in graph.get_ordered_ops() if op.get_type_name() == "Convolution")


# ---------------------------------------------------------------- what it costs


def _section_box(sections: list[int], source: volume.Volume) -> Box:
    """The box of these whole sections; refuses what is not one range of them."""
    if not sections or sections != list(range(sections[0], sections[-1] + 1)):
        raise UserError(
            f"--held-out names {sections or 'no section'}; give one range without gaps, for instance 140:165"
        )
    return Box((sections[0], 0, 0), (sections[-1] + 1, *source.shape[1:]))


def _compare(
    path: Path, form: bytes, source: volume.Volume, mask: np.ndarray, box: Box, statistics: tuple[float, float]
) -> dict:
    """IoU of the foreground with ``mask`` in ``box`` in both precisions, and how far their probabilities are apart."""
    card = model.load_card(path)
    blobs = {"fp32": export.export_model(path, "openvino"), "int8": export.unpack_int8(form)}
    fp32, int8 = (_predict(blob, precision, source, box, card, statistics) for precision, blob in blobs.items())
    level = round(load(base=card.decode).fragments.threshold * 255)
    return {
        "sections": f"{box.start[0]}:{box.stop[0]}",
        "iou_fp32": foreground_iou(fp32, mask, card),
        "iou_int8": foreground_iou(int8, mask, card),
        "sides": float(np.mean((fp32[0] >= level) != (int8[0] >= level))),
        "mean_difference": float(np.abs(fp32.astype(np.int16) - int8).mean() / 255),
    }


def _predict(
    blob: bytes, precision: str, source: volume.Volume, box: Box, card: ModelCard, statistics: tuple[float, float]
) -> np.ndarray:
    """Probabilities of whole sections as a run would store them, uint8 (heads, z, y, x)."""
    grid, margin = _tile_grid(source, card), card.sections // 2
    visible = box.grow((margin, 0, 0)).clip(source.shape)
    nothing = values_of_nothing(source.dtype, (0.0,))
    slab = tiles.Slab(source.read(visible), visible.start, margin, source.shape[0], nothing)
    forward = backends.load(blob, "openvino", precision, (1, card.sections, *grid.size))
    sections = range(box.start[0], box.stop[0])
    return predict_sections_uint8(forward, slab, sections, grid=grid, heads=len(card.heads), scale=scale(*statistics))


def foreground_iou(probability: np.ndarray, mask: np.ndarray, card: ModelCard) -> float:
    """Return the IoU of ``mask``, bool (z, y, x), with what the model's own settings take for foreground."""
    prediction = foreground(probability, load(base=card.decode).fragments)
    return float((prediction & mask).sum() / max(1, (prediction | mask).sum()))


def format_facts(facts: dict) -> str:
    """Return what the card says of the form, as plain text."""
    calibrated = facts["calibrated"]
    lines = [f"calibrated on {len(calibrated['sections'])} sections of {calibrated['volume']}"]
    if held_out := facts.get("held_out"):
        lines += [
            f"held out   {held_out['sections']}: IoU {held_out['iou_int8']:.4f} in int8, {held_out['iou_fp32']:.4f} in fp32",
            f"apart      {100 * held_out['sides']:.3f} % of voxels on another side of the threshold, "
            f"mean difference {255 * held_out['mean_difference']:.3f} / 255",
            f"auto       {'may take it' if Int8Form(**facts).allowed else 'does not take it'}",
        ]
    return "\n".join(lines)
