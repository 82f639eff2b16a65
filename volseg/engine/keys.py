"""The hash of all that determines a stage's results: what is stored under another key counts for nothing."""

from __future__ import annotations

from dataclasses import asdict

from volseg.engine.run import Run, digest
from volseg.inference.padding import LINE, SQUARE
from volseg.inference.tiles import Axis
from volseg.segmentation.edges import EDGE

CONSTANT_TILES = "constant tiles are 0"  # what predict does with them
SADDLE_ROWS = "a voxel on each side"  # what the tables of saddles hold


def probability_key(run: Run) -> str:
    """Of the stored probabilities."""
    config = run.config
    if run.channels:
        key = digest(run.checksum, run.shape, _roles(run), run.predict_block, config.output.chunk)
    else:
        key = digest(
            run.checksum, run.shape, run.model_sha256, run.mean, run.std, run.engine.arithmetic, run.predict_block,
            config.predict.tile, config.predict.overlap, config.predict.batch, config.predict.tta,
            sorted(config.predict.planes), config.output.chunk, CONSTANT_TILES,
            *([{plane: asdict(cut) for plane, cut in run.cuts.items()}] if run.cuts else []), *_tiles_that_overlap(run),
            *_padding(run),
        )  # fmt: skip
    return digest(key, run.roi.key) if run.roi else key


def _padding(run: Run) -> list:
    """What counts as padding."""
    return [["padding is 0", SQUARE, LINE, run.padding]] if run.padding else []


def _tiles_that_overlap(run: Run) -> list:
    """The tile grids of passes that have more than one tile in a plane: how their number is chosen may change."""
    grids = (run.tile_grid(plane) for plane in sorted(run.config.predict.planes))
    return [[_laid(grid.y), _laid(grid.x)] for grid in grids if grid.y.count * grid.x.count > 1]


def _laid(axis: Axis) -> dict:
    """What tells where the tiles along an axis lie; the step tells nothing where they are even."""
    return {name: n for name, n in asdict(axis).items() if name != "step" or not axis.is_even}


def _roles(run: Run) -> list[tuple]:
    """What is taken from other volumes, and how."""
    return [
        (channel.name, channel.source is not None, channel.inverted, *([channel.offset] if channel.offset else []))
        for channel in run.channels
    ]


def probabilities_id(run: Run) -> str:
    """Of what the stored probabilities are, however they are cut into blocks: what corrections are made for."""
    made: list
    if run.channels:
        made = _roles(run)
    else:
        predict = run.config.predict
        made = [
            run.model_sha256, run.mean, run.std, run.engine.arithmetic, predict.tile, predict.overlap, predict.tta,
            sorted(predict.planes), *_tiles_that_overlap(run), *_padding(run),
        ]  # fmt: skip
    return digest(run.checksum, run.shape, made, *([run.roi.key] if run.roi else []))


def labels_id(run: Run) -> str:
    """Of what the labels are, however they are cut into blocks."""
    return digest(probabilities_id(run), run.config.fragments.model_dump(), vars(run.distance_unit), *_rules(run))


def basins_id(run: Run) -> str:
    """Of what the basins are, however they are cut into blocks: what a partition is made for."""
    return digest(probabilities_id(run), run.config.fragments.model_dump(), vars(run.distance_unit))


def basins_key(run: Run) -> str:
    """Of basins and their edge tables."""
    unit = vars(run.distance_unit)
    return digest(probability_key(run), run.config.fragments.model_dump(), unit, run.block, EDGE.names, "cut")


def holes_key(run: Run) -> str:
    return digest(basins_key(run), "holes")


def tally_key(run: Run) -> str:
    """Of what is kept of probabilities that are dropped."""
    return digest(basins_key(run), run.output_shape, run.fills_holes, "tally")


def decision_key(run: Run) -> str:
    """Of which basins are one object, and so of labels."""
    return digest(basins_key(run), SADDLE_ROWS, *_rules(run))


def _rules(run: Run) -> list:
    """What decides which basins are one object."""
    given = [run.corrections.key] if run.corrections else [f"partition {run.partition}"] if run.partition else []
    return [run.stitch.model_dump(exclude={"reduce"}), *given]
