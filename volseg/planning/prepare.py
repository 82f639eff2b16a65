"""A run described before it begins: every choice that its settings leave open is made, and said."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from math import prod
from os import PathLike
from pathlib import Path

import numpy as np

from volseg import system
from volseg.config import Cluster, Config, Predict
from volseg.engine import cluster, folder
from volseg.engine.blocks import blocks_of_chunks, choose_blocks, with_cuts, with_full_batches
from volseg.engine.finish import gpus_of
from volseg.engine.run import Run, redundancy
from volseg.engine.stages import keys
from volseg.engine.update import needs_probabilities
from volseg.errors import UserError
from volseg.inference import autoselect as probe
from volseg.inference import model, sampling, voxel_size
from volseg.inference.backends import Engine
from volseg.inference.model_card import ModelCard
from volseg.inference.model_file import model_file
from volseg.inference.normalization import GrayLevels, gray_levels, gray_range
from volseg.inference.padding import values_of_nothing
from volseg.inference.settings import Settings, settings_of
from volseg.io import probabilities, roi, volume
from volseg.io.place import Place
from volseg.io.resample import Grid
from volseg.planning import memory

WASTEFUL = 2.0  # voxels inferred for each one wanted, from which on smaller tiles are thought of
WORTHWHILE = 1.3  # times less that they must infer to be spoken of
FEWEST_OVERLAPS = 8  # that a tile is long: in shorter ones the network sees little around each voxel


def from_image(source: volume.Volume, config: Config, out: str, like: str = "") -> Run:
    """The run as plain data, every choice made; what computes is that of the run begun at ``out`` or there ``like`` it."""
    path = model_file(config.predict)
    card = model.load_card(path)
    if card.heads not in (probabilities.CHANNEL_NAMES[:2], probabilities.CHANNEL_NAMES):
        raise UserError(f"{path} has heads {list(card.heads)}; the watershed wants mask and contour, perhaps distance: train "
                        "such a model")  # fmt: skip
    check_channels(config, card.told_heads)
    _check_tiles(config.predict, card.multiple, bool(card.graph and card.graph.fixed))
    if source.dtype == "bool" or np.dtype(source.dtype).kind not in "uif":
        raise UserError(
            f"{source.path} holds {source.dtype}; inference wants gray values: convert it to uint8 or float32"
        )
    padding = _padding(config.input.padding, source)
    if config.output.copy_image and source.dtype in ("int64", "uint64"):
        raise UserError(
            f"{source.path} holds {source.dtype}, of which no coarser levels are made: convert it to uint8 or float32, or "
            "leave out output.copy_image"
        )
    matched = voxel_size.match(source, card.voxel_size_nm, config.input.resample, any_level=not config.input.dataset)
    given, source = matched.given, replace(matched.volume, path=folder.absolute(source.path))
    voxel_size_nm = source.voxel_size_nm or card.voxel_size_nm or (1.0, 1.0, 1.0)
    _refuse_anisotropic(config.predict.planes, voxel_size_nm)
    origin = card.graph.origin if card.graph else ""
    slab, block = choose_blocks(source.shape, config.blocks.shape)
    gray = gray_levels(source.shape, source.read, padding)
    mean, std = _standard(source, config.predict, card, gray)
    source = replace(source, notes=(*source.notes, *gray.notes(source.path)))
    begun = _begun_engine(out, config, path) or (_begun_engine(like, config, path) if like else None)
    computes = begun or _engine(source, config, path, mean, std)
    region = roi.find(config.input, (given or source).shape, (given or source).voxel_size_nm or voxel_size_nm)
    run = Run(
        out=out,
        source=replace(source, notes=tuple(note for note in (*source.notes, matched.note, origin) if note)),
        config=config,
        model_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        heads=card.heads,
        sections=card.sections,
        binning=card.binning,
        multiple=card.graph.multiple if card.graph else 0,
        mean=mean,
        std=std,
        padding=values_of_nothing(source.dtype, gray.padding),
        voxel_size_nm=voxel_size_nm,
        checksum=source.checksum(),
        engine=computes,
        predict_block=slab,
        block=block,
        roi=region,
        rule_voxel_nm=voxel_size.rule_size(card.voxel_size_nm, voxel_size_nm),
    )
    return _blocked(_resampled(run, given) if given else run)


def _standard(source: volume.Volume, settings: Predict, card: ModelCard, gray: GrayLevels) -> tuple[float, float]:
    """What is taken from each gray value, and what it is divided by then."""
    if settings.normalize == "model":
        return card.mean, card.std
    if card.graph and card.graph.percentiles:
        low, high = gray_range(source.shape, source.read, card.graph.percentiles, gray.padding)
        return low, high - low
    return gray.mean, gray.std


def _resampled(run: Run, given: volume.Volume) -> Run:
    """The run whose source was made from ``given``, with its region of interest in the source's own voxels."""
    run = replace(run, given=replace(given, path=run.source.path, notes=()), given_roi=run.roi)
    run = replace(run, restored=voxel_size.in_source(run.config.output.space, run.given, run.source))
    to_given = Grid.between(run.shape, run.voxel_size_nm, given.shape, given.voxel_size_nm)
    return replace(run, roi=run.roi.resampled(to_given)) if run.roi else run


def _padding(value: str | float, source: volume.Volume) -> str | float:
    """``input.padding`` as a voxel of the volume has it; refuses a gray value that none can have."""
    kind = np.dtype(source.dtype)
    if isinstance(value, str):
        return value
    if kind.kind not in "ui":
        return float(np.asarray(value, kind))
    least, most = np.iinfo(kind).min, np.iinfo(kind).max
    if not (value == int(value) and float(least) <= value <= float(most)):
        raise UserError(
            f"input.padding = {value}: {source.path} holds {kind}, whole numbers from {least} to {most}; give one of these, "
            "auto or none"
        )
    return value


def _check_tiles(settings: Predict, multiple: int, fixed: bool) -> None:
    """Refuses tiles that are smaller than the network's ``multiple``, or share more than half of the largest that it takes.

    ``fixed``: it takes no other size than that one.
    """
    longest = settings.tile // multiple * multiple
    if fixed and longest != multiple:
        raise UserError(f"predict.tile = {settings.tile}: this network takes tiles of {multiple} alone; set {multiple}")
    if not longest:
        raise UserError(
            f"predict.tile = {settings.tile}: this network takes multiples of {multiple}; set {multiple} or more"
        )
    if 2 * settings.overlap > longest:
        raise UserError(f"predict.overlap = {settings.overlap} is more than half of a tile of {longest}, the largest within "
                        f"predict.tile = {settings.tile} that this network takes; set {longest // 2} or less")  # fmt: skip


def from_probabilities(channels: tuple[probabilities.Channel, ...], config: Config, out: str) -> Run:
    """The run of probabilities made elsewhere as plain data, every choice made."""
    sources = [channel.source for channel in channels if channel.source]
    slab, block = choose_blocks(sources[0].shape, config.blocks.shape)
    if not config.blocks.shape:
        slab = blocks_of_chunks(sources[0].shape, [each.chunk for each in sources], slab)
    run = Run(
        out=out,
        source=sources[0],
        config=config,
        heads=probabilities.heads(channels),
        voxel_size_nm=next((s.voxel_size_nm for s in sources if s.voxel_size_nm), (1.0, 1.0, 1.0)),
        checksum=probabilities.checksum(channels),
        predict_block=slab,
        block=block,
        channels=channels,
        roi=roi.find(config.input, sources[0].shape, sources[0].voxel_size_nm),
    )
    return _blocked(run)


def decided_anew(
    old: Run, out: str, config: str | PathLike | Config | dict | None, settings: Settings, place: Place | None = None
) -> Run:
    """The run at ``out`` as it is to be decided anew, its volume at another ``place`` if one is given.

    Refuses to change what its probabilities depend on.
    """
    chosen = settings_of(config, settings, base=old.config.model_dump(mode="json", exclude={"train"}))
    block = old.block if chosen.blocks == old.config.blocks else choose_blocks(old.shape, chosen.blocks.shape)[1]
    restored = bool(old.given) and voxel_size.in_source(chosen.output.space, old.given, old.source)
    placed = old if place is None else old.moved(place)
    run = replace(placed, out=folder.partial_path(out), config=chosen, block=block, restored=restored)
    fixed = ("input", "predict", "probabilities")
    stage = run.probability_stage
    if keys(run)[stage] != keys(old)[stage] or any(getattr(chosen, s) != getattr(old.config, s) for s in fixed):
        raise UserError(
            f"volseg segment cannot change {', '.join(fixed)} or output.chunk of a run; make it anew for that, with --overwrite"
        )
    if old.drops and (what := needs_probabilities(old, run)):
        old.require_probabilities(what)
    check_channels(run.config, run.heads, run.channels)
    _check_measured(run)
    return run


def _check_measured(run: Run) -> None:
    """Refuses to measure gray values where there are none, or none whose sums are the same in any order."""
    if "gray" not in run.config.output.measure:
        return
    if run.channels:
        raise UserError(f"output.measure = gray: {run.source.path} holds probabilities, no gray values; leave gray out")
    if np.dtype(run.output_source.dtype).kind not in "ui":
        raise UserError(
            f"output.measure = gray: {run.source.path} holds {run.output_source.dtype}, and means are made of whole numbers "
            "alone: convert it to uint8 or uint16, or leave gray out"
        )


def _blocked(run: Run) -> Run:
    """The run in the blocks with which it was begun at ``run.out``, else in blocks that fit the workers' memory.

    A restart must not choose anew: what is free is never the same twice.
    """
    _check_measured(run)
    if old := folder.peek_run(run.out):
        plain = run.layout.load_description()
        blocks = {name: getattr(old, name) for name in ("predict_block", "block", "pass_blocks", "cuts")}
        begun = replace(run, **blocks)
        stage = run.probability_stage
        if old.config.blocks == run.config.blocks and plain["keys"].get(stage) == keys(begun)[stage]:
            return begun
    workers = workers_of(run)
    count = (
        workers.workers if run.config.cluster.is_local else max(2, workers.workers)
    )  # of those elsewhere more may join
    run = with_cuts(run, memory.cut_room(run), count)
    if gpus := gpus_of(run):
        run = with_full_batches(run, gpus)
    room = memory_limit(run.config.cluster, workers)
    return memory.with_blocks_that_fit(run, room, workers.threads, workers.tasks, count) if room else run


def workers_of(run: Run) -> cluster.WorkerPool:
    """The workers that a run will have."""
    return cluster.worker_pool(run.config.cluster, gpus_of(run))


def memory_limit(settings: Cluster, workers: cluster.WorkerPool) -> int:
    """Bytes that each worker may hold: as told, else as Dask would, else of what is free here; 0 where nobody knows."""
    if settings.memory_limit or not settings.is_local:
        return round(settings.memory_limit * 1e9) or workers.limit
    return (system.free_memory() - memory.CLIENT_BYTES) // (workers.workers + workers.cpu_workers)


def check_channels(config: Config, heads: tuple[str, ...], taken: tuple[probabilities.Channel, ...] = ()) -> None:
    """Refuses to follow a channel that a run of these ``heads``, or ``taken`` from elsewhere, does not have."""
    lacking = {channel.name for channel in taken if channel.source is None} | ({"contour", "distance"} - set(heads))
    height = config.fragments.height
    need = {"contour": "contour", "head": "distance"}.get(height)
    if need in lacking:
        raise UserError(f"fragments.height = {height!r} follows a channel of {need}, which this run lacks: take another "
                        "height, or a model or probabilities that hold one")  # fmt: skip


def _refuse_anisotropic(planes: tuple[str, ...], voxel_size_nm: tuple[float, float, float]) -> None:
    """Refuses planes in which the network would see objects stretched."""
    if planes != ("xy",) and not volume.isotropic(voxel_size_nm):
        size = " x ".join(f"{n:g}" for n in voxel_size_nm)
        raise UserError(f"predict.planes = {list(planes)} wants voxels about as long along z as in the plane, these are {size} "
                        "nm: use predict.planes = ['xy'], or correct input.voxel_size_nm")  # fmt: skip


def _engine(source: volume.Volume, config: Config, path: Path, mean: float, std: float) -> Engine:
    """What a new run computes with, and why."""
    card = model.load_card(path)
    choice = probe.choose(
        config.predict, path, card.int8_allowed, prod(source.shape),
        lambda: sampling.spread_tiles(source, card, config.predict, (mean, std)), graph=card.graph is not None,
    )  # fmt: skip
    if choice.precision == "int8":
        model.quantized(path)
    return Engine.here(**vars(choice))


def _begun_engine(out: str, config: Config, path: Path) -> Engine | None:
    """What the run begun at ``out`` computes with, if its settings left the choice open as these do; else nothing.

    A restart must not choose anew: timing is noisy, and another choice has other bits.
    """
    old = folder.peek_run(out)
    if not old or not old.engine:
        return None
    same_model = old.model_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    if not same_model or old.config.predict != config.predict:
        return None
    begun = old.engine
    return Engine.here(begun.backend, begun.precision, batch=begun.batch, why=begun.why, speed=begun.speed)


def try_backends(path: str, config: Config) -> list[probe.Measurement]:
    """Speed and distance from float32 of every backend and precision that could run the volume at ``path`` here."""
    folder.refuse_run(path)
    source = volume.open_input(path, config.input)
    file = model_file(config.predict)
    card = model.load_card(file)
    gray = gray_levels(source.shape, source.read, config.input.padding)
    batch = sampling.spread_tiles(source, card, config.predict, _standard(source, config.predict, card, gray))
    wanted = probe.candidates(config.predict, card.int8 is not None, card.graph is not None)
    return probe.measure(file, wanted, config.predict.batch, batch)


# ---------------------------------------------------------------- in words


def headline(run: Run) -> str:
    z, y, x = run.shape
    return (
        f"{run.source.path}: {z} x {y} x {x} {run.source.dtype}, voxels of "
        f"{' x '.join(f'{n:g}' for n in run.voxel_size_nm)} nm{_assumed(run)}{_begin(run)}\n"
        f"{_origin(run)}, {len(run.grid)} block(s) of {' x '.join(map(str, run.block))}"
        + (f"\n{run.roi}" if run.roi else "")
    )


def notes(run: Run) -> list[str]:
    """What was decided of the volumes that a run reads, and what its rules count, a line each."""
    sources = (run.source, *(channel.source for channel in run.channels), run.roi and run.roi.mask)
    found = [note for source in sources if source for note in source.notes]
    return list(dict.fromkeys(note for note in (*found, rules_note(run), tile_note(run)) if note))


def tile_note(run: Run) -> str:
    """Which tiles would infer much less of a small region; "" where none would."""
    if run.channels or not run.roi or redundancy(run) < WASTEFUL:
        return ""
    found: dict[int, int] = {}
    smaller = run
    for _ in range(3):
        smaller = _with_tile(run, memory.smaller_tile(smaller))
        if smaller.config.predict.tile >= FEWEST_OVERLAPS * run.config.predict.overlap:
            found.setdefault(smaller.inferred_voxels, smaller.config.predict.tile)
    least = min(found, default=run.inferred_voxels)
    if run.inferred_voxels < WORTHWHILE * least:
        return ""
    times = f"{run.inferred_voxels / least:.1f} times less"
    return (
        f"tiles reach far beyond the region: predict.tile={found[least]} would infer {times}; labels of other tiles differ a "
        "little from those of the whole volume"
    )


def _with_tile(run: Run, tile: int) -> Run:
    """The run in tiles of at most that side."""
    predict = run.config.predict.model_copy(update={"tile": tile})
    return replace(run, config=run.config.model_copy(update={"predict": predict}), cuts={})


def rules_note(run: Run) -> str:
    """How many voxels of a run its rules count, where that is not what its settings say; "" where it is."""
    return voxel_size.rules_note(run.config.stitch, run.rule_voxel_nm, run.voxel_size_nm)


def _begin(run: Run) -> str:
    """Where the first voxel lies, of a volume that was cut out of a larger one."""
    begin = " x ".join(f"{n:g}" for n in run.origin_nm)
    return f", the first one at {begin} nm" if max(map(abs, run.place)) >= 1 else ""


def _assumed(run: Run) -> str:
    """A warning where no file says how large a voxel is."""
    if any(source and source.voxel_size_nm for source in (run.source, *(channel.source for channel in run.channels))):
        return ""
    return " (assumed, the volume does not say: give --voxel-nm z,y,x)"


def _origin(run: Run) -> str:
    """Where a run's probabilities come from."""
    if run.channels:
        return "; ".join(map(str, run.channels))
    settings = run.config.predict
    grids = {plane: run.tile_grid(plane) for plane in settings.planes}
    sizes = ", ".join(f"{g.size[0]} x {g.size[1]}" + f" ({plane})" * bool(run.passes) for plane, g in grids.items())
    laid = f" laid in {settings.tta} ways" * (settings.tta > 1)
    return f"{engine_line(run)}\ntiles of {sizes}{laid}, {redundancy(run):.2f} voxels inferred for each one wanted"


def engine_line(run: Run) -> str:
    """What a run computes with, and why."""
    return f"{run.engine} ({run.engine.why})"
