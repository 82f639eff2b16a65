"""Where the limit lies for 1e15 voxels: what each part of a run takes by measured rates, for some numbers of workers.

Nothing of this was run. A part takes its work divided by what it can do at once, and the slowest part is the limit, since they
overlap; stitching comes after all basins.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import report
from volseg.planning.measure import STORED_BYTES


@dataclass(frozen=True)
class Rates:
    """What was measured (``README.md`` says where), what a plan assumes, and what a store is said to allow.

    network, rest     seconds of a core for each voxel: the network in INT8, and all else that is done to blocks
    redundancy        voxels inferred, and bytes decoded, for each of the volume
    block             voxels of a block
    tasks             of a block, over all stages
    scheduled         tasks that the scheduler hands out in a second, bundled
    puts, gets        objects that a block writes and reads, beside the source's chunks of 64 x 64 x 64
    stored            bytes for each voxel that are written, and read once more by later stages
    source            bytes for each voxel that are read of the source: half of what it holds, as it is compressed
    store_gets, store_puts  requests in a second that a store allows for one prefix, as Amazon states for S3
    connection        bytes in a second of a worker: 10 Gbit/s
    stitch            seconds of a core for each voxel of the tree's parts
    top, top_bytes    seconds and bytes of the tree's last part, for each voxel ** (2 / 3)
    """

    network: float = 0.155e-6
    rest: float = 0.204e-6
    redundancy: float = 1.13
    block: float = 2.0**24
    tasks: int = 8
    scheduled: float = 17_630.0
    puts: float = 9.0
    gets: float = 9.0
    stored: float = 2 * STORED_BYTES["probability"] + sum(
        STORED_BYTES[name] for name in ("fragments", "labels", "tables")
    )
    source: float = 0.5
    store_gets: float = 5_500.0
    store_puts: float = 3_500.0
    connection: float = 1.25e9
    stitch: float = 3.2 * 3600 / 1e12
    top: float = 29.1 / 4.4e12 ** (2 / 3)
    top_bytes: float = 2.898e9 / 4.4e12 ** (2 / 3)


def measure(voxels: float, workers: tuple[int, ...], faster: float) -> None:
    """A row for each number of workers: hours of each part, and which is the limit; a worker infers ``faster`` than a core."""
    report.keep("horizon", [_row(voxels, count, faster, Rates()) for count in workers])


def _row(voxels: float, workers: int, faster: float, rates: Rates) -> dict:
    hours = hours_of(voxels, workers, faster, rates)
    side_by_side = {name: took for name, took in hours.items() if name != "top of the tree"}
    limit = max(hours, key=hours.__getitem__)
    return {
        "workers": workers,
        **{f"{name}, h": float(f"{took:.3g}") for name, took in hours.items()},
        "in all, h": float(f"{max(side_by_side.values()) + hours['top of the tree']:.3g}"),
        "limit": limit,
        "top of the tree, GB": round(rates.top_bytes * voxels ** (2 / 3) / 1e9),
    }


def hours_of(voxels: float, workers: int, faster: float, rates: Rates) -> dict[str, float]:
    """What each part would take if nothing else were slower."""
    blocks, chunks = voxels / rates.block, rates.redundancy * voxels / 64**3
    gets, puts = blocks * rates.gets + chunks, blocks * rates.puts
    moved = voxels * (rates.source * rates.redundancy + 2 * rates.stored)
    seconds = {
        "compute": voxels * (rates.network * rates.redundancy / faster + rates.rest + rates.stitch) / workers,
        "scheduler": blocks * rates.tasks / rates.scheduled,
        "requests": gets / rates.store_gets + puts / rates.store_puts,
        "bandwidth": moved / (workers * rates.connection),
        "top of the tree": rates.top * voxels ** (2 / 3),
    }
    return {name: took / 3600 for name, took in seconds.items()}
