"""The hash of all that determines a stage's results: what is stored under another key counts for nothing."""

from __future__ import annotations

from dataclasses import asdict

from volseg.engine.run import Run, digest
from volseg.segmentation.edges import EDGE

CONSTANT_TILES = "constant tiles are 0"  # what predict does with them


def probability_key(run: Run) -> str:
    """Of the stored probabilities."""
    config = run.config
    if run.channels:
        roles = [(channel.name, channel.source is not None, channel.inverted) for channel in run.channels]
        key = digest(run.checksum, run.shape, roles, run.predict_block, config.output.chunk)
    else:
        key = digest(
            run.checksum, run.shape, run.model_sha256, run.mean, run.std, run.engine.arithmetic, run.predict_block,
            config.predict.tile, config.predict.overlap, config.predict.batch, config.predict.tta,
            sorted(config.predict.planes), config.output.chunk, CONSTANT_TILES,
            *([{plane: asdict(cut) for plane, cut in run.cuts.items()}] if run.cuts else []),
        )  # fmt: skip
    return digest(key, run.roi.key) if run.roi else key


def basins_key(run: Run) -> str:
    """Of basins and their edge tables."""
    unit = vars(run.distance_unit)
    return digest(probability_key(run), run.config.fragments.model_dump(), unit, run.block, EDGE.names, "cut")


def holes_key(run: Run) -> str:
    return digest(basins_key(run), "holes")


def decision_key(run: Run) -> str:
    """Of which basins are one object, and so of labels."""
    return digest(basins_key(run), run.config.stitch.model_dump(exclude={"reduce"}))
