"""``python -m benchmarks NAME``: each prints a table and writes JSON with machine, versions, commit and date."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
EPFL = "../shared/data/epfl"


@app.command()
def epfl(
    image: Annotated[str, typer.Option(help="The EPFL training stack.")] = f"{EPFL}/training.tif",
    truth: Annotated[str, typer.Option(help="Its labels.")] = f"{EPFL}/training_groundtruth.tif",
    box: Annotated[str, typer.Option(help="Part that the model never saw.")] = "140:165,0:768,0:1024",
    beside: Annotated[list[str] | None, typer.Option(help="A model file to run in turn with the shipped one.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; the median counts.")] = 3,
    out: Annotated[str, typer.Option(help="Where the runs go.")] = "runs/epfl.volseg.zarr",
    workers: Annotated[int, typer.Option(help="0 takes one per core.")] = 0,
) -> None:
    """Time, peak memory and scores of `volseg infer` on the whole EPFL training stack, as a user would type it."""
    from benchmarks import epfl as bench

    bench.measure(image, truth, box, ("", *(beside or ())), repeats, out, workers)


@app.command()
def backends(
    image: Annotated[str, typer.Option(help="A volume; its last two sections are run.")] = f"{EPFL}/training.tif",
    model: Annotated[str, typer.Option(help="Model file; the shipped one if not given.")] = "",
    threads: Annotated[str, typer.Option(help="How many tiles at once, one thread each.")] = "1,2",
    repeats: Annotated[int, typer.Option(help="Passes; the median counts.")] = 5,
) -> None:
    """Million voxels/s of every backend and precision on whole planes, and how far each is from float32."""
    from benchmarks import backends as bench

    bench.measure(image, model, tuple(int(n) for n in threads.split(",")), repeats)


@app.command()
def exact(
    volume: Annotated[str, typer.Option(help="Image to segment; any volume.")] = f"{EPFL}/training.tif",
    sections: Annotated[int, typer.Option(help="How many of its last sections; 0 takes all.")] = 16,
    run: Annotated[str, typer.Option(help="A finished run: cut its stored probabilities anew instead.")] = "",
    vnc: Annotated[str, typer.Option(help="Folder with raw and mitochondria of VNC: probabilities of its truth.")] = "",
) -> None:
    """SHA-256 of the labels for several block shapes, worker counts, and a run killed half-way."""
    from benchmarks import exact as bench

    if run:
        bench.compare_blocks(run)
    elif vnc:
        bench.compare_foreign(vnc, sections)
    else:
        bench.compare_commands(volume, sections)


@app.command()
def formats(
    gb: Annotated[float, typer.Option(min=0.0, help="Size of the file of each format.")] = 0.2,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each is read; the median counts.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="One of the formats; repeatable.")] = None,
) -> None:
    """Reading a file of each format box by box, beside its own library alone: speed, and peak memory."""
    from benchmarks import formats as bench

    bench.measure(gb, repeats, tuple(only or ()))


@app.command()
def stitch(
    edges: Annotated[float, typer.Option(help="Edges of the volume that is stitched flat; 0 leaves that out.")] = 1e8,
    simulate: Annotated[float, typer.Option(help="Voxels of the volume that is stitched in a tree; 0: not.")] = 1e12,
    run: Annotated[
        str, typer.Option(help="A finished run, whose probabilities are the pattern.")
    ] = "runs/epfl.volseg.zarr",
    block: Annotated[tuple[int, int, int], typer.Option(help="Voxels of a block, z y x.")] = (64, 64, 64),
    most: Annotated[tuple[int, int, int], typer.Option(help="Most voxels of the run that are taken.")] = (
        128,
        256,
        512,
    ),
) -> None:
    """Seconds and memory of stitching edge tables with the statistics of real blocks, in one process and in a tree."""
    from benchmarks import stitch as bench

    bench.measure(edges, simulate, run, block, most)


Pair = tuple[str, str]
Changes = Annotated[list[str] | None, typer.Option("--train-set", metavar="KEY=VALUE", help="Change of the recipe.")]
Decoding = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="As for volseg infer.")]


@app.command()
def labels(
    train: Annotated[Pair, typer.Option(help="IMAGE LABEL to learn from.")] = (
        f"{EPFL}/training.tif",
        f"{EPFL}/training_groundtruth.tif",
    ),
    test: Annotated[Pair, typer.Option(help="IMAGE LABEL to test on.")] = (
        f"{EPFL}/training.tif",
        f"{EPFL}/training_groundtruth.tif",
    ),
    train_on: Annotated[str, typer.Option(metavar="START:STOP", help="Sections that may be learnt from; all.")] = "",
    test_on: Annotated[str, typer.Option(metavar="START:STOP", help="Sections that are scored; all.")] = "",
    counts: Annotated[str, typer.Option(help="Numbers of annotated sections.")] = "1,3,6,12,24,all",
    seeds: Annotated[int, typer.Option(min=1, help="Models for each number.")] = 3,
    recipe: Annotated[
        str, typer.Option("--config", help="TOML file whose [train] table is the recipe.")
    ] = "configs/few.toml",
    out: Annotated[
        str, typer.Option(help="Folder of models, runs and figures; what is done there is kept.")
    ] = "runs/labels",
    train_sets: Changes = None,
    infer_sets: Decoding = None,
) -> None:
    """IoU and PQ over the number of annotated sections, with the curve and a picture of two test sections."""
    from benchmarks import labels as bench

    if train[0] == test[0] and not (train_on and test_on):
        raise typer.BadParameter(
            "train and test are one volume: give --train-on and --test-on, for instance 0:130, 140:165"
        )
    sets = tuple(train_sets or ()), tuple(infer_sets or ())
    bench.measure(train, test, counts.split(","), seeds, recipe, train_on, test_on, out, *sets)


@app.command()
def folds(
    data: Annotated[Pair, typer.Option(help="IMAGE LABEL.")] = (
        "../shared/data/vnc/raw",
        "../shared/data/vnc/mitochondria",
    ),
    count: Annotated[int, typer.Option("--folds", min=2)] = 5,
    voxel_size: Annotated[str, typer.Option(help="nm along z,y,x.")] = "50,4.6,4.6",
    recipe: Annotated[
        str, typer.Option("--config", help="TOML file whose [train] table is the recipe.")
    ] = "configs/vnc.toml",
    out: Annotated[str, typer.Option(help="Folder of models and runs; what is done there is kept.")] = "runs/vnc",
    train_sets: Changes = None,
    infer_sets: Decoding = None,
    name: Annotated[str, typer.Option(help="Rows go to results/folds-NAME.json.")] = "",
) -> None:
    """Blocked cross-validation on one annotated stack, by default VNC: 5 folds of 4 consecutive sections."""
    from benchmarks import folds as bench

    size = [float(n) for n in voxel_size.split(",")]
    bench.measure(data, count, size, recipe, out, tuple(train_sets or ()), tuple(infer_sets or ()), name)


@app.command()
def ablations(
    data: Annotated[Pair, typer.Option(help="IMAGE LABEL.")] = (
        f"{EPFL}/training.tif",
        f"{EPFL}/training_groundtruth.tif",
    ),
    sections: Annotated[int, typer.Option(help="How many are learnt from, evenly spaced.")] = 12,
    learn: Annotated[str, typer.Option(metavar="START:STOP", help="Where these lie.")] = "0:119",
    hold: Annotated[str, typer.Option(metavar="START:STOP", help="Sections that choose the threshold.")] = "120:130",
    test: Annotated[str, typer.Option(metavar="START:STOP", help="Sections that are scored.")] = "140:165",
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    recipe: Annotated[
        str, typer.Option("--config", help="TOML file whose [train] table is the recipe.")
    ] = "configs/few.toml",
    only: Annotated[list[str] | None, typer.Option(help="Names of the changes to measure; all.")] = None,
    out: Annotated[str, typer.Option(help="Folder of models and runs; what is done there is kept.")] = "runs/ablations",
    train_sets: Changes = None,
    name: Annotated[str, typer.Option(help="Rows go to results/ablations-NAME.json.")] = "",
) -> None:
    """What each part of the training recipe is worth: one thing changed at a time, on the same held-out sections."""
    from benchmarks import ablations as bench

    bench.measure(
        data, sections, learn, hold, test, seeds, recipe, tuple(only or ()), out, tuple(train_sets or ()), name
    )


@app.command()
def annotate(
    data: Annotated[Pair, typer.Option(help="IMAGE LABEL.")] = (
        f"{EPFL}/training.tif",
        f"{EPFL}/training_groundtruth.tif",
    ),
    learn: Annotated[str, typer.Option(metavar="START:STOP", help="Sections that may be annotated.")] = "0:130",
    test: Annotated[str, typer.Option(metavar="START:STOP", help="Sections that are scored.")] = "140:165",
    counts: Annotated[str, typer.Option(help="Numbers of annotated sections.")] = "2,4,6,8,10,12",
    voxel_size: Annotated[str, typer.Option(help="nm along z,y,x; the file's if not given.")] = "5,5,5",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    recipe: Annotated[
        str, typer.Option("--config", help="TOML file whose [train] table is the recipe.")
    ] = "configs/few.toml",
    minutes: Annotated[float, typer.Option(min=0, help="After which no training begins; 0: no limit.")] = 0,
    out: Annotated[
        str, typer.Option(help="Folder of models and runs; what is done there is kept.")
    ] = "runs/annotate-epfl",
    name: Annotated[str, typer.Option(help="Rows go to results/annotate-NAME.json.")] = "epfl",
    train_sets: Changes = None,
    infer_sets: Decoding = None,
) -> None:
    """PQ over the number of annotated sections where the truth answers what is asked: suggested, spaced, random."""
    from benchmarks import annotate as bench

    numbers = tuple(int(n) for n in counts.split(","))
    sets = tuple(train_sets or ()), tuple(infer_sets or ())
    bench.measure(bench.task(data, learn, test, numbers, recipe, voxel_size, out, *sets), seeds, minutes, name)


@app.command()
def throughput(
    image: Annotated[str, typer.Option(help="Any volume.")] = f"{EPFL}/training.tif",
    sections: Annotated[int, typer.Option(help="How many of its last sections volseg predicts.")] = 96,
    few: Annotated[int, typer.Option(help="How many of them the slower peers get.")] = 4,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    standard: Annotated[str, typer.Option(help="The others' model; ours (predict.model) if not given.")] = "",
    out: Annotated[str, typer.Option(help="Where the runs go.")] = "runs/throughput",
    sets: Decoding = None,
) -> None:
    """The predict stage against the bare model, MONAI and dask map_overlap, outputs compared (needs volseg[bench])."""
    from benchmarks import throughput as bench

    bench.measure(image, sections, few, repeats, standard, out, tuple(sets or ()), seconds=20)


@app.command()
def gpu(
    image: Annotated[str, typer.Option(help="Any volume.")] = f"{EPFL}/training.tif",
    sections: Annotated[int, typer.Option(min=1, help="How many of its last sections.")] = 165,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[str, typer.Option(help="Where the runs go.")] = "runs/gpu",
    sets: Decoding = None,
    device: Annotated[str, typer.Option(help="cpu: do it where there is no GPU, to see that it runs.")] = "cuda",
) -> None:
    """The predict stage on a GPU against the bare model and MONAI: efficiency, TFLOP/s, bytes over the bus."""
    from benchmarks import gpu as bench

    bench.measure(image, sections, repeats, out, tuple(sets or ()), device)


@app.command()
def instances(
    run: Annotated[str, typer.Option(help="A run whose probabilities to cut; a synthetic volume if not given.")] = "",
    sections: Annotated[int, typer.Option(help="How many of its last sections.")] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Probabilities to instances against scikit-image, bioimage-cpp, dask-image and others; objects at four block sizes."""
    from benchmarks import instances as bench

    bench.measure(run, sections, repeats)


@app.command()
def heights(
    run: Annotated[str, typer.Argument(help="A finished run.")],
    truth: Annotated[str, typer.Argument(help="Its true labels.")],
    box: Annotated[str, typer.Option(help="Part that is scored.")] = "140:165,0:768,0:1024",
    calibrate: Annotated[str, typer.Option(help="Part on which seeds and sizes are chosen.")] = "120:140,0:768,0:1024",
    calibrate_on: Annotated[
        Pair | None, typer.Option("--of", help="RUN TRUTH that --calibrate is a part of, if another.")
    ] = None,
    name: Annotated[str, typer.Option(help="Rows go to results/heights-NAME.json.")] = "epfl",
) -> None:
    """What the watershed should follow: fragments.height on stored probabilities, each calibrated on another part."""
    from benchmarks import heights as bench

    bench.measure(run, truth, box, (*(calibrate_on or (run, truth)), calibrate), name)


@app.command()
def touching(
    seeds: Annotated[str, typer.Option(help="Of the synthetic volumes.")] = "3001,3002,3004,3010,3013,3014",
    shape: Annotated[str, typer.Option(help="Of each, z,y,x.")] = "128,512,512",
    config: Annotated[str, typer.Option(help="As for volseg infer.")] = "configs/touching.toml",
    model: Annotated[str, typer.Option(help="Model file; the shipped one if not given.")] = "",
    sets: Decoding = None,
    out: Annotated[str, typer.Option(help="Where volumes and runs go.")] = "runs/touching",
    name: Annotated[str, typer.Option(help="Rows go to results/touching-NAME.json.")] = "shipped",
) -> None:
    """How many touching objects of synthetic volumes come apart, and how many objects are split."""
    from benchmarks import touching as bench

    bench.measure(tuple(int(n) for n in seeds.split(",")), shape, config, model, tuple(sets or ()), out, name)


@app.command("io")
def stores(repeats: Annotated[int, typer.Option(min=1)] = 5) -> None:
    """Reading and writing shards, with zarr's codecs and with zarrs, on disk and in a store 30 ms away."""
    from benchmarks import io as bench

    bench.measure(repeats)


@app.command()
def scale(
    what: Annotated[str, typer.Argument(help="decoding, sparse, scattered, restart, end or horizon.")],
    image: Annotated[str, typer.Option(help="The EPFL training stack.")] = f"{EPFL}/training.tif",
    out: Annotated[str, typer.Option(help="Where volumes and runs go.")] = "runs/scale",
    chunks: Annotated[str, typer.Option(help="decoding: edges of a chunk.")] = "64,128,256",
    planes: Annotated[str, typer.Option(help="decoding: edges of a plane.")] = "1024,4096,16384,65536",
    depth: Annotated[int, typer.Option(help="decoding: sections of the volumes.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="sparse: runs of each, in turn; the median counts.")] = 3,
    blocks: Annotated[float, typer.Option(help="restart: how many are done.")] = 1e6,
    voxels: Annotated[float, typer.Option(help="horizon: of the volume.")] = 1e15,
    times: Annotated[tuple[int, int, int], typer.Option(help="end: copies of the stack along z, y and x.")] = (8, 2, 2),
    faster: Annotated[float, typer.Option(help="horizon: how much faster than a core a worker infers.")] = 1.0,
) -> None:
    """Volumes as they are stored: how often a chunk is decoded, what an empty part and a restart cost, where limits lie."""
    from benchmarks import end_to_end, horizon, restart, scattered
    from benchmarks import scale as bench

    if what == "restart":
        restart.measure(int(blocks))
    elif what == "horizon":
        horizon.measure(voxels, (1, 100, 10_000), faster)
    elif what == "end":
        end_to_end.measure(image, out, times, seconds=60)
    elif what == "decoding":
        bench.measure_decoding(*(tuple(map(int, text.split(","))) for text in (chunks, planes)), depth)
    elif what == "sparse":
        bench.measure_sparse(image, out, repeats)
    elif what == "scattered":
        scattered.measure(image, out)
    else:
        raise typer.BadParameter(f"{what!r} is none of decoding, sparse, scattered, restart, end, horizon")


@app.command()
def waiting(
    image: Annotated[str, typer.Option(help="The EPFL training stack.")] = f"{EPFL}/training.tif",
    out: Annotated[str, typer.Option(help="Where volumes and runs go.")] = "runs/waiting",
    workers: Annotated[str, typer.Option(help="How many.")] = "1,2",
) -> None:
    """How long workers wait for data: from small chunks on disk, and from a store 30 ms away."""
    from benchmarks import waiting as bench

    bench.measure(image, out, tuple(int(n) for n in workers.split(",")))


@app.command()
def scaling(
    what: Annotated[str, typer.Argument(help="volumes, workers or blocks.")],
    out: Annotated[str, typer.Option(help="Where volumes and runs go.")] = "runs/scaling",
    most: Annotated[int, typer.Option(help="volumes: largest factor, 1, 8 or 64.")] = 64,
    along: Annotated[str, typer.Option(help="volumes: axes along which they grow, z or zyx.")] = "z",
    reduce: Annotated[str, typer.Option(help="volumes: how to stitch; flat: one process holds all edges.")] = "tree",
    counts: Annotated[str, typer.Option(help="workers: how many.")] = "1,2,4",
    blocks: Annotated[float, typer.Option(help="blocks: how many null blocks.")] = 1e6,
) -> None:
    """What grows with the volume, the workers and the number of blocks."""
    from benchmarks import scaling as bench

    if what == "volumes":
        bench.measure_volumes(out, most, reduce, along)
    elif what == "workers":
        bench.measure_workers(out, tuple(int(n) for n in counts.split(",")))
    elif what == "blocks":
        bench.measure_blocks(int(blocks))
    else:
        raise typer.BadParameter(f"{what!r} is none of volumes, workers, blocks")


@app.command()
def voxels(
    image: Annotated[str, typer.Option(help="An annotated stack.")] = f"{EPFL}/training.tif",
    truth: Annotated[str, typer.Option(help="Its labels.")] = f"{EPFL}/training_groundtruth.tif",
    box: Annotated[str, typer.Option(help="Part that the model never saw.")] = "140:165,0:768,0:1024",
    stored_nm: Annotated[str, typer.Option(help="Voxel size z,y,x of the stack.")] = "5,5,5",
    size: Annotated[list[str] | None, typer.Option(help="Voxel size z,y,x to try; repeatable.")] = None,
    out: Annotated[str, typer.Option(help="Where volumes and runs go.")] = "runs/voxels",
) -> None:
    """IoU and PQ of a volume in voxels of other sizes than the model's, as it is and resampled."""
    from benchmarks import voxels as bench

    bench.measure(image, truth, box, stored_nm, tuple(size or bench.SIZES), out)


@app.command()
def padding(
    image: Annotated[str, typer.Option(help="An annotated stack.")] = f"{EPFL}/training.tif",
    truth: Annotated[str, typer.Option(help="Its labels.")] = f"{EPFL}/training_groundtruth.tif",
    box: Annotated[str, typer.Option(help="Part that the model never saw.")] = "140:165,0:768,0:1024",
    nm: Annotated[str, typer.Option(help="Voxel size z,y,x.")] = "5,5,5",
    config: Annotated[list[str] | None, typer.Option(help='Config to try; repeatable; "" for none.')] = None,
    out: Annotated[str, typer.Option(help="Where volumes and runs go.")] = "runs/padding",
) -> None:
    """IoU and PQ of a volume with padding or lost sections, as they are and as volseg shows them to the network."""
    from benchmarks import padding as bench

    bench.measure(image, truth, box, nm, tuple(config or ("", "touching")), out)


@app.command()
def planes(
    image: Annotated[str, typer.Option(help="Isotropic stack.")] = f"{EPFL}/training.tif",
    truth: Annotated[str, typer.Option(help="Its labels.")] = f"{EPFL}/training_groundtruth.tif",
    crop: Annotated[str, typer.Option(help="Part that is segmented.")] = "116:165,0:768,0:1024",
    choose: Annotated[tuple[int, int], typer.Option(help="Sections on which the decision is chosen.")] = (120, 140),
    test: Annotated[tuple[int, int], typer.Option(help="Sections that are scored.")] = (140, 165),
    out: Annotated[str, typer.Option(help="Folder of the runs.")] = "runs/planes",
    sets: Annotated[list[str] | None, typer.Option("--set", help="A setting for every run.")] = None,
) -> None:
    """Scores and cost of test-time flips and of passes over xy, xz and yz planes."""
    from benchmarks import planes as bench

    bench.measure(image, truth, crop, choose, test, out, sets or [])


@app.command()
def fuzz(
    cases: Annotated[int, typer.Option(min=1, help="How many files to change and read.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Another seed, other cases.")] = 0,
    minutes: Annotated[
        float, typer.Option(min=0, help="As many as there is time for; 0: as many as --cases says.")
    ] = 0,
) -> None:
    """Files of all kinds, changed at random and read: tracebacks, hangs, memory. Exit code 1 where any does not end well."""
    from benchmarks import fuzz as bench

    bench.measure(cases, seed, minutes)


@app.command("bytes")
def same_bytes(
    against: Annotated[str, typer.Option(metavar="REVISION", help="Compare with the code of this commit.")] = "",
    only: Annotated[list[str] | None, typer.Option(help="Names of the runs to make; all.")] = None,
    shape: Annotated[tuple[int, int, int], typer.Option(help="Voxels of the synthetic volume, z y x.")] = (
        40,
        160,
        192,
    ),
    workers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Hashes of a fixed set of small runs; with --against, exit code 1 where another revision gives other bytes."""
    from benchmarks import bytes as bench

    bench.measure(against, tuple(only or ()), shape, workers)


@app.command()
def chaos(
    kinds: Annotated[
        str, typer.Option(metavar="KIND,...", help="Faults, by name or beginning (store, power); all.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Another seed, other moments.")] = 0,
    minutes: Annotated[float, typer.Option(min=0, help="After which no episode begins; 0: no limit.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Of each command.")] = 2,
    count: Annotated[int, typer.Option(min=0, help="Episodes of each kind; 0: as many as the time allows.")] = 0,
    out: Annotated[
        str,
        typer.Option(
            help="JSON file of all episodes; what it has is kept. If not given, results/chaos.json has the table."
        ),
    ] = "",
    place: Annotated[
        str, typer.Option(help="Folder of the episodes, with what their commands said; a temporary one.")
    ] = "",
) -> None:
    """Commands are killed, starved and lied to, given again, and what they give is compared with an undisturbed run."""
    from benchmarks.chaos import bench

    bench.measure(kinds, seed, minutes, count, workers, out, place)


@app.command()
def hosts(
    probabilities: Annotated[
        str, typer.Option(help="An array of mask and contour; a small synthetic one if not given.")
    ] = "",
) -> None:
    """Workers on hosts of their own (network namespaces), data in an S3 store: hosts are lost, leave and come."""
    from benchmarks import hosts as bench

    bench.measure(probabilities)


@app.command()
def soak(
    blocks: Annotated[int, typer.Option(min=1, help="How many small blocks.")] = 20_000,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    place: Annotated[str, typer.Option(help="Folder of the run; a temporary one.")] = "",
    hours: Annotated[float, typer.Option(min=0, help="Infer and decide anew in one process for so long instead.")] = 0,
) -> None:
    """Memory and open files of client, scheduler and workers along a run of very many blocks."""
    from benchmarks import soak as bench

    if hours:
        bench.loop(hours, workers, place)
    else:
        bench.measure(blocks, workers, place)


if __name__ == "__main__":
    app()
