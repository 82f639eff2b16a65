"""How good two models are on the same sections, each with the decoding of its own card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from volseg.config import Config, TrainData, load
from volseg.inference import model
from volseg.inference.model_card import ModelCard
from volseg.training.decoding import (
    ValidationSlab,
    annotated_slab,
    cut_basins,
    foreground,
    only_sections,
    panoptic_quality,
    validation_slabs,
)
from volseg.training.sources import Source, load_sources
from volseg.training.steps import Log
from volseg.training.targets import UNLABELED
from volseg.training.train import train, training_device

CROSS_LENGTH = 0.5  # of a training of a cross-check, against the one that it is for


def held_out_scores(path: Path, config: Config) -> dict[str, float]:
    """Scores of a model file on the sections that the config holds out."""
    return score(path, [source for source in load_sources(config.train) if source.validation_sections], config)


def cross_check(
    start: Path, config: Config, tables: Sequence[TrainData], place: Path, log: Log
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of the model before on all ``tables`` and, on each half of them, of one that learned from the other half.

    Sections alone are scored, without limits of size. Returns twice nothing where there is only one table.
    """
    halves = [list(tables[half::2]) for half in (0, 1)]
    if not halves[1]:
        log("one group of added sections, and nothing is held out: what changed is not measured")
        return {}, {}
    before, after = [], []
    for number, held in enumerate(halves):
        settings = config.train
        others = tuple(table for table in settings.data if table not in held)
        steps = max(1, round(CROSS_LENGTH * settings.steps))
        changes = {
            "data": others, "out": str(place / f"cross-check-{number + 1}"), "steps": steps,
            "minutes": CROSS_LENGTH * settings.minutes, "every": min(settings.every, steps),
        }  # fmt: skip
        log(f"cross-check {number + 1} of 2: a model without {len(held)} of {len(tables)} groups of added sections")
        learned = train(config.model_copy(update={"train": settings.model_copy(update=changes)}), log)
        sources = _all_held_out(load_sources(settings.model_copy(update={"data": tuple(held)})))
        before.append(score(start, sources, config, sizes=False))
        after.append(score(learned, sources, config, sizes=False))
    return _mean(before), _mean(after)


def _all_held_out(sources: Sequence[Source]) -> list[Source]:
    """The sources with all that is annotated held out."""
    return [replace(source, validation_sections=source.train_sections, train_sections=()) for source in sources]


def score(path: Path, sources: Sequence[Source], config: Config, *, sizes: bool = True) -> dict[str, float]:
    """IoU of the foreground and, but for scribbles alone, PQ of a model on what sources hold out, as its card decodes.

    Without ``sizes``, objects of every size count: sections alone cut them all.
    """
    network, card = model.load(path)
    network = network.to(training_device(config.train))
    config = _decoded_by(card, config)
    if not sizes:
        every = {"min_voxels": 0, "min_volume_nm3": 0.0, "max_voxels": 0}
        config = config.model_copy(update={"stitch": config.stitch.model_copy(update=every)})
    slabs = [slab for i, source in enumerate(sources) for slab in _slabs(network, source, i, config)]
    if not slabs:
        return {}
    out = {"iou": _iou(slabs, config)}
    whole = [slab for slab in slabs if not slab.scribbles]
    if whole:
        out["pq"] = panoptic_quality(whole, [cut_basins(slab, config.fragments) for slab in whole], config)
    return {name: float(value) for name, value in out.items()}


def _decoded_by(card: ModelCard, config: Config) -> Config:
    """The config with the network and the decoding of a card."""
    distance = (config.train.distance_nm or 1.0) if "distance" in card.heads else 0.0
    network = {"sections": card.sections, "binning": card.binning, "distance_nm": distance}
    settings = config.train.model_copy(update=network)
    return load(base=dict(card.decode)).model_copy(update={"train": settings, "predict": config.predict})


def _slabs(network: torch.nn.Module, source: Source, number: int, config: Config) -> list[ValidationSlab]:
    """The held-out sections of a source with what is in memory around them or, of too many, alone."""
    around = annotated_slab(network, source, number, config)
    held_out = around and only_sections(around, source.validation_sections)
    return [held_out] if held_out else list(validation_slabs(network, source, number, config))


def _iou(slabs: Sequence[ValidationSlab], config: Config) -> float:
    """Of all voxels of a source together, the mean over sources by their share."""
    scores, shares = [], []
    for number in sorted({slab.source for slab in slabs}):
        both = either = 0
        own = [slab for slab in slabs if slab.source == number]
        for slab in own:
            known = slab.labels != UNLABELED
            found, true = foreground(slab.probability, config.fragments)[known], slab.labels[known] != 0
            both, either = both + int((found & true).sum()), either + int((found | true).sum())
        scores.append(both / max(1, either))
        shares.append(own[0].share)
    return float(np.average(scores, weights=shares))


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    names = [name for name in ("iou", "pq") if all(name in row for row in rows)]
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def format_scores(before: dict[str, float], after: dict[str, float]) -> str:
    """Scores before and after in words.

    >>> format_scores({"iou": 0.8714, "pq": 0.61}, {"iou": 0.9, "pq": 0.742})
    'IoU 0.871 -> 0.900, PQ 0.610 -> 0.742'
    """
    names = {"iou": "IoU", "pq": "PQ"}
    told = [
        f"{text} {before[key]:.3f} -> {after[key]:.3f}" for key, text in names.items() if key in before and key in after
    ]
    return ", ".join(told) or "not measured"
