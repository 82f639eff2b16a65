"""What a run will take, before it does: voxels through the network, bytes, memory, seconds, cost.

Shapes tell all but what `measure.Rates` holds.
"""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from math import prod

import numpy as np

from volseg import system
from volseg.box import Box, Triple
from volseg.engine import cluster
from volseg.engine.run import Run, redundancy
from volseg.engine.stages import stages_of
from volseg.errors import UserError
from volseg.io import files
from volseg.planning import memory, prepare
from volseg.planning.measure import Rates

START_S = 3.0  # 2 until workers are there, 1 for the table and the picture
UNWANTED_COST = 0.06  # of a voxel outside the region of interest, after the network, for each of one inside


@dataclass(frozen=True)
class Plan:
    """What a run will take. Blocks are those in which something is to be done. Bytes read are of the volume, uncompressed;
    bytes written are an estimate of what is stored.

    ``beside`` are workers that do what needs no device, where the others have one. ``worker_bytes`` is the most that a worker
    holds, ``block_bytes`` the most while it works on blocks: one worker alone decides on all basins.
    """

    shape: Triple
    block: Triple
    blocks: int
    predict_block: Triple
    predict_blocks: int
    tile: tuple[int, int]
    inferred_voxels: int
    redundancy: float
    read_bytes: int
    written_bytes: int
    workers: int
    worker_bytes: int
    block_bytes: int
    beside: int
    beside_bytes: int
    client_bytes: int
    device_bytes: int
    seconds: dict[str, float]
    probed: bool
    network: str = ""
    wanted: str = ""
    notes: tuple[str, ...] = ()  # what was decided of the volumes
    local: bool = True
    looked_tiles: int = 0  # of which it was looked at whether they show anything
    constant_tiles: int = 0  # of those: one gray value each, so that they are not inferred
    refusal: str = ""  # why it would be refused

    def to_json(self) -> dict:
        """As plain values, with the total of the seconds."""
        return {**asdict(self), "total_seconds": self.total_seconds}

    @classmethod
    def from_json(cls, plain: dict) -> Plan:
        return cls(**{name: value for name, value in plain.items() if name != "total_seconds"})

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(format_plan(self))}</pre>"

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def host_bytes(self) -> int:
        """Of all processes on this machine."""
        workers = self.workers * self.block_bytes + self.stitch_extra_bytes + self.beside * self.beside_bytes
        return self.local * workers + self.client_bytes

    @property
    def stitch_extra_bytes(self) -> int:
        """What the worker that decides on all basins holds beyond what the others do."""
        return self.worker_bytes - self.block_bytes


def make_plan(run: Run, workers: cluster.WorkerPool, rates: Rates) -> Plan:
    """What a run will take.

    Parameters
    ----------
    run
        Its description.
    workers
        Who does it.
    rates
        Speeds and sizes, of `measure.measure_rates` or `measure.known_rates`.
    """
    block_bytes = memory.worker_bytes(run, workers.threads, workers.tasks, rates.engine_bytes, rates)
    unwanted = max(0, run.parts.own.block_voxels - run.wanted_voxels)
    inferred = (1 - rates.constant_share) * run.inferred_voxels
    after_network = (run.wanted_voxels + UNWANTED_COST * unwanted) / rates.instances
    return Plan(
        shape=run.shape,
        block=run.block,
        blocks=run.parts.own.count,
        predict_block=run.predict_block,
        predict_blocks=stages_of(run)[run.probability_stage].part.count,
        tile=run.tile_grid(run.config.predict.planes[0]).size,
        inferred_voxels=run.inferred_voxels,
        redundancy=redundancy(run),
        read_bytes=_read_bytes(run),
        written_bytes=_written_bytes(run, rates),
        workers=workers.workers,
        worker_bytes=max(block_bytes, memory.PROCESS_BYTES + memory.stitch_bytes(run, rates)),
        block_bytes=block_bytes,
        beside=workers.cpu_workers,
        beside_bytes=memory.worker_bytes(run, 1, network=0, rates=rates),
        client_bytes=memory.CLIENT_BYTES,
        device_bytes=rates.device_bytes,
        seconds={"start": START_S, "predict": inferred / rates.predict, "instances": after_network},
        probed=rates.probed,
        network="" if run.channels else prepare.engine_line(run),
        wanted=str(run.roi or ""),
        notes=tuple(prepare.notes(run)),
        local=run.config.cluster.is_local,
        looked_tiles=rates.looked,
        constant_tiles=rates.constant,
    )


def _read_bytes(run: Run) -> int:
    """Of the volume: blocks also read the sections around them, and the rows and columns under their tiles."""
    wanted = run.wanted_part(Box.from_shape(run.shape))
    if run.channels:
        sources = [channel.source for channel in run.channels if channel.source]
        return sum(wanted.voxels * np.dtype(source.dtype).itemsize for source in sources)
    grids = {plane: run.pass_grid(plane) for plane in run.passes.values()} or {"xy": run.predict_grid}
    counts = {plane: run.parts.inferred(plane).count for plane in grids}
    return sum(memory.source_bytes(run, plane, grid) * counts[plane] for plane, grid in grids.items())


def _written_bytes(run: Run, rates: Rates) -> int:
    """What is not wanted is 0 everywhere, and takes next to nothing."""
    levels = sum(prod(shape) for shape, _ in run.levels)
    kept = 1.0 if not run.drops else min(1.0, 2 * run.predict_grid.block[0] / run.shape[0])  # layers that are under way
    probability = len(run.heads) * rates.packed["probability"] * (kept + len(run.passes))
    arrays = prod(run.shape) * (probability + rates.packed["fragments"]) + levels * rates.packed["labels"]
    stored = arrays + table_bytes(run.shape, run.block, rates.packed)
    return round(stored * run.wanted_voxels / prod(run.shape))


def table_bytes(shape: Triple, block: Triple, packed: dict[str, float]) -> float:
    """What the tables take of a volume in such blocks: by its voxels, and by those of the planes where blocks meet."""
    planes = sum((n - 1) // b / n for b, n in zip(block, shape, strict=True))
    return prod(shape) * (packed["tables"] + packed["cut"] * planes)


# ---------------------------------------------------------------- whether it fits


def refuse(plan: Plan, run: Run, free_memory: int, free_disk: int | None) -> None:
    """Raises `UserError` where memory or disk (None: unknown) of this machine are too small.

    Where nothing asks for one process to decide on all basins, it does only as far as its memory goes: so that is not
    asked for here.
    """
    stitch_bytes = plan.stitch_extra_bytes if _needs_one_process(run) else 0
    host_bytes = plan.host_bytes - plan.local * (plan.stitch_extra_bytes - stitch_bytes)
    if host_bytes > free_memory:
        room = (free_memory - plan.client_bytes - stitch_bytes) // plan.block_bytes if plan.local else 0
        advice = f"set cluster.workers={room}" if room > 0 else _smaller(run)
        raise UserError(
            f"{plan.workers} worker(s) of {_gb(plan.block_bytes)} and {_gb(plan.client_bytes)} here would hold "
            f"{_gb(host_bytes)}, and {_gb(free_memory)} of memory are free: {advice}"
        )
    if free_disk is not None and plan.written_bytes > free_disk:
        raise UserError(
            f"about {_gb(plan.written_bytes)} would be written to {run.out}, and {_gb(free_disk)} are free there: give --out "
            "on a larger disk"
        )


def refuse_limit(plan: Plan, run: Run, limit: int) -> None:
    """Raises `UserError` where a worker would hold more than ``limit`` bytes (0: no limit); see `refuse`."""
    if limit and plan.block_bytes > limit:
        raise UserError(
            f"a worker would hold {_gb(plan.block_bytes)} and may hold {_gb(limit)}: {_smaller(run)}, or give it more with "
            "cluster.memory_limit"
        )
    if limit and plan.worker_bytes > limit and _needs_one_process(run):
        raise UserError(
            f"the worker that decides on all basins would hold {_gb(plan.worker_bytes)} and may hold {_gb(limit)}: set "
            "stitch.reduce to 'auto' or 'tree', or give it more with cluster.memory_limit"
        )


def _needs_one_process(run: Run) -> bool:
    """Whether settings ask for one process that decides on all basins."""
    return run.config.stitch.reduce == "flat" or bool(run.config.stitch.needs_all())


def _smaller(run: Run) -> str:
    """What to set where no worker could hold a block."""
    if run.batch > 1:
        return f"set predict.batch={run.batch // 2} or less"
    if run.config.blocks.shape:
        return "leave out blocks.shape, or make it smaller"
    smaller = memory.smaller_tile(run)
    return f"set predict.tile={smaller}" if smaller < memory.longest_tile(run) else "use a machine with more"


def disk_room(run: Run) -> int | None:
    """Bytes that a run may still store where it lies, with those that it already has; None on an object store."""
    if files.is_remote(run.out):
        return None
    return system.free_disk(run.out) + files.stored_bytes(run.out)


# ---------------------------------------------------------------- in words


def format_plan(plan: Plan, price: float | None = None) -> str:
    """The plan as plain text; ``price`` is that of an hour."""
    shape, block, predicted = (" x ".join(map(str, n)) for n in (plan.shape, plan.block, plan.predict_block))
    cut = f"{plan.blocks} of {block}"
    if plan.predict_block != plan.block:
        cut += f"; of the network {plan.predict_blocks} of {predicted}"
    rows = {
        "volume": f"{shape}, {prod(plan.shape) / 1e6:.1f} million voxels" + f"; {plan.wanted}" * bool(plan.wanted),
        "network": plan.network,
        "blocks": cut,
        "tiles": _tiles_text(plan) if plan.network else "",
        "redundancy": f"{plan.redundancy:.3f} voxels inferred for each one wanted" if plan.network else "",
        "reads": f"{_gb(plan.read_bytes)} of the volume, uncompressed",
        "writes": f"about {_gb(plan.written_bytes)}, compressed{_rough(plan)}",
        "memory": f"{_gb(plan.block_bytes)} in each of {plan.workers} worker(s), "
        + f"{_gb(plan.worker_bytes)} in the one that decides on all basins, " * bool(plan.stitch_extra_bytes)
        + f"{_gb(plan.beside_bytes)} in {plan.beside} beside them, " * bool(plan.beside)
        + f"{_gb(plan.client_bytes)} here",
        "device": f"{_gb(plan.device_bytes)}" if plan.device_bytes else "",
        "time": f"about {format_duration(plan.total_seconds)}{_rough(plan)}: "
        + ", ".join(f"{name} {format_duration(s)}" for name, s in plan.seconds.items()),
        "cost": f"about {price * plan.total_seconds / 3600:.2f}" if price is not None else "",
    }
    lines = [f"{name:10} {text}" for name, text in rows.items() if text]
    return "\n".join([*lines, *(f"{'note':10} {note}" for note in plan.notes)])


def _tiles_text(plan: Plan) -> str:
    skipped = f"; {plan.constant_tiles} of {plan.looked_tiles} looked at are of one gray value, and take no time"
    count = f"{plan.inferred_voxels // prod(plan.tile)} of {plan.tile[0]} x {plan.tile[1]}"
    return count + skipped * bool(plan.constant_tiles)


def _rough(plan: Plan) -> str:
    return "" if plan.probed else " (rough: nothing was measured, volseg plan does)"


def format_comparison(
    plan: Plan, seconds: float, worker_bytes: int, written_bytes: int | None, before: float = 0.0
) -> str:
    """Plan against actual, as a line; ``before`` is the share that an earlier command had done."""
    wrote = "" if written_bytes is None else f", writes {_gb(plan.written_bytes)} / {_gb(written_bytes)}"
    times = f"{format_duration(plan.total_seconds)} / {format_duration(seconds)}"
    times += f" ({100 * before:.0f} % of the probabilities were there before)" * bool(before)
    memory_text = f"{_gb(plan.worker_bytes)} / {_gb(worker_bytes)}"
    return f"plan / actual: {times}, worker memory {memory_text}{wrote}{_rough(plan)}"


def compare_with(plan: dict, actual: dict, before: float = 0.0) -> list[str]:
    """What a finished run stored of its plan and of what it took, as a line; none where it was not planned."""
    if not plan:
        return []
    made = Plan.from_json(plan)
    return [format_comparison(made, actual["total_seconds"], actual["worker_bytes"], actual["written_bytes"], before)]


def format_duration(seconds: float) -> str:
    """
    >>> format_duration(3.21), format_duration(250), format_duration(9000)
    ('3.2 s', '4.2 min', '2.5 h')
    """
    for unit, length, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < most:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e11 else f"{count / 1e12:.2f} TB"
