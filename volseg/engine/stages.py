"""Every stage of a run: its function, its blocks, its key, and what it waits for. A new stage is one more entry of `STAGES`.

    basins   predict (or import) -> fragments -> link, and where holes are filled -> find_holes -> link_holes
             predict (or import) -> coarsen1 -> coarsen2 -> ...   and where a copy is asked for, image0 -> image1 -> ...
             fragments -> tally   instead of coarsen, where probabilities are dropped
    flat     stitch                                   one process decides on all basins
    tree     contract0 -> ... -> rank -> ... -> assign0 -> borders    or a tree of blocks does; where objects are
             corrected, assign0 -> name_objects -> collect_named -> correct -> renumber -> borders
    labels   relabel -> pyramid1 -> pyramid2 -> ...

Stages of the groups basins and labels run side by side: a block of one goes as soon as what it is made from is done. Those of
a tree go one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from volseg.box import Blocks, Box
from volseg.engine import corrections, instances, predict, restore
from volseg.engine.keys import basins_key, decision_key, holes_key, probability_key, tally_key
from volseg.engine.parts import Part
from volseg.engine.receipt import Timings
from volseg.engine.run import Run, digest
from volseg.io import pyramid
from volseg.segmentation import hierarchy
from volseg.segmentation.heights import height_halo

Region = Callable[[Box], Box]  # the part of an earlier stage's volume that a box is made from; each axis for itself
Group = Literal["basins", "flat", "tree", "labels"]


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    function   the work on block ``i``: ``function(run, i, timings)`` stores its results and returns more of its `Receipt`
    part       its blocks
    key        the hash of all that determines its results
    group      what it runs together with
    after      the stages of its group that a block waits for, and the region of each that it is made from: of earlier ones, and
               of itself where a block takes what blocks before it hand over
    on_device  whether it infers, and so wants a device where there are some
    report_as  the name under which a user sees it
    """

    name: str
    function: Callable[[Run, int, Timings], dict[str, Any] | None]
    part: Part
    key: str
    group: Group
    after: Mapping[str, Region] = field(default_factory=dict)
    on_device: bool = False
    report_as: str = ""

    @property
    def grid(self) -> Blocks:
        """All blocks of the volume, also those in which there is nothing to do."""
        return self.part.grid

    @property
    def title(self) -> str:
        return self.report_as or self.name


def same(box: Box) -> Box:
    """The region of a stage with the same voxels."""
    return box


# ---------------------------------------------------------------- the stages


def _predict(run: Run) -> list[Stage]:
    if run.channels:
        return []
    key = probability_key(run)
    passes = []
    for name, plane in run.passes.items():
        grid, pass_of_plane = run.pass_grid(plane), partial(predict.predict_plane, stage=name)
        pass_key, own = digest(key, name, grid.block), {name: partial(run.tiles_reaching, plane)}
        passes.append(Stage(name, pass_of_plane, run.parts.inferred(plane), pass_key, "basins", own, on_device=True))
    function = predict.average_planes if passes else predict.predict
    after = {stage.name: same for stage in passes} or {"predict": partial(run.tiles_reaching, "xy")}
    part = run.parts.probabilities(0) if passes else run.parts.inferred("xy")
    return [*passes, Stage("predict", function, part, key, "basins", after, on_device=not passes)]


def _import(run: Run) -> list[Stage]:
    key = probability_key(run)
    if not run.channels:
        return []
    return [Stage("import", predict.import_probabilities, run.parts.probabilities(0), key, "basins")]


def _coarsen(run: Run) -> list[Stage]:
    stages, name = [], run.probability_stage
    for level, (_, factor) in list(enumerate(run.probability_levels))[1:]:
        region = partial(pyramid.parent_box, factor=factor, above=run.probability_levels[level - 1][0])
        part, key = (
            run.parts.probabilities(level),
            digest(probability_key(run), level, run.probability_levels, run.block),
        )
        function = partial(predict.coarsen, level=level)
        stages.append(Stage(f"coarsen{level}", function, part, key, "basins", {name: region}, report_as="coarsen"))
        name = stages[-1].name
    return stages


def _image(run: Run) -> list[Stage]:
    stages: list[Stage] = []
    for level, (_, factor) in enumerate(run.image_levels):
        key = digest(run.checksum, level, run.image_levels, run.output_grid.block, run.output_source.dtype)
        if level == 0:
            stages = [Stage("image0", predict.copy_image, Part(run.output_grid), key, "basins", report_as="copy")]
            continue
        after = {stages[-1].name: partial(pyramid.parent_box, factor=factor, above=run.image_levels[level - 1][0])}
        function = partial(predict.coarsen_image, level=level)
        stages.append(
            Stage(f"image{level}", function, Part(run.level_grid(level)), key, "basins", after, report_as="copy")
        )
    return stages


def _fragments(run: Run) -> list[Stage]:
    halo = height_halo(run.config.fragments, run.voxel_size_nm)
    after = {run.probability_stage: partial(Box.grow, halo=halo)}
    return [Stage("fragments", instances.find_basins, run.parts.own, basins_key(run), "basins", after)]


def _tally(run: Run) -> list[Stage]:
    if not run.drops:
        return []
    after: dict[str, Region] = {"fragments": partial(restore.own_box, run) if run.restored else same}
    if run.fills_holes:
        after["find_holes"] = after["fragments"]
    return [Stage("tally", instances.tally, run.parts.labels(0), tally_key(run), "basins", after)]


def _link(run: Run) -> list[Stage]:
    after = {"fragments": partial(Box.grow, halo=1)}
    return [Stage("link", instances.link, run.parts.own, basins_key(run), "basins", after)]


def _holes(run: Run) -> list[Stage]:
    if not run.fills_holes:
        return []
    key = holes_key(run)
    return [
        Stage("find_holes", instances.find_holes, run.parts.own, key, "basins", {"fragments": same}),
        Stage(
            "link_holes", instances.link_holes, run.parts.own, key, "basins", {"find_holes": partial(Box.grow, halo=1)}
        ),
    ]


def _stitch(run: Run) -> list[Stage]:
    voxels = (1, 1, max(1, run.parts.own.voxels))  # of all that holds basins, at once
    one = Part(Blocks(voxels, voxels))
    return [Stage("stitch", instances.stitch_all, one, decision_key(run), "flat")]


def _tree(run: Run) -> list[Stage]:
    key, levels = decision_key(run), range(hierarchy.top_level(run.grid) + 1)

    def stage(name: str, function: Callable, grid: Blocks) -> Stage:
        return Stage(name, function, Part(grid), key, "tree", report_as="stitch")

    up = [stage(f"contract{k}", partial(instances.contract, level=k), hierarchy.parts(run.grid, k)) for k in levels]
    down = [stage(f"assign{k}", partial(instances.assign, level=k), hierarchy.parts(run.grid, k)) for k in levels]
    rank, borders = stage("rank", instances.rank, run.layers), stage("borders", instances.measure_borders, run.grid)
    return [*up, rank, *reversed(down), *_corrections(run, stage), borders]


def _corrections(run: Run, stage: Callable[[str, Callable, Blocks], Stage]) -> list[Stage]:
    if not run.corrections:
        return []
    whole = Blocks(run.shape, run.shape)
    return [
        stage("name_objects", corrections.name_objects, whole),
        stage("collect_named", corrections.collect_named, run.grid),
        stage("correct", corrections.correct, whole),
        stage("renumber", corrections.renumber, run.grid),
    ]


def _labels(run: Run) -> list[Stage]:
    key = digest(decision_key(run), run.output_shape) if run.restored else decision_key(run)
    measured = digest(key, sorted(run.config.output.measure)) if run.config.output.measure else key
    stages = [Stage("relabel", instances.relabel, run.parts.labels(0), measured, "labels")]
    for level, (_, factor) in list(enumerate(run.levels))[1:]:
        region = partial(pyramid.parent_box, factor=factor, above=run.levels[level - 1][0])
        function = partial(instances.downsample, level=level)
        level_key = digest(key, level, *run.levels)
        name = f"pyramid{level}"
        stages.append(
            Stage(
                name,
                function,
                run.parts.labels(level),
                level_key,
                "labels",
                {stages[-1].name: region},
                report_as="pyramid",
            )
        )
    return stages


STAGES: tuple[Callable[[Run], list[Stage]], ...] = (
    _predict, _import, _fragments, _link, _holes, _tally, _coarsen, _image, _stitch, _tree, _labels,
)  # fmt: skip


def stages_of(run: Run) -> dict[str, Stage]:
    """The stages of a run by name, in the order in which a voxel passes them."""
    return {stage.name: stage for stages in STAGES for stage in stages(run)}


def group_of(run: Run, group: Group) -> list[Stage]:
    """The stages of one group, in order."""
    return [stage for stage in stages_of(run).values() if stage.group == group]


def keys(run: Run) -> dict[str, str]:
    """The key of each stage."""
    return {name: stage.key for name, stage in stages_of(run).items()}
