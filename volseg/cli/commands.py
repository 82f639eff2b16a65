"""The command line: options in, one line of error out. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import volseg
from volseg import __version__
from volseg.cli import machine, models, output, volumes
from volseg.cli.options import (
    Backend,
    Channel,
    ConfigFile,
    Invert,
    Mask,
    Model,
    Out,
    Overwrite,
    Padding,
    Precision,
    RetryFailed,
    Roi,
    Scheduler,
    Sets,
    Time,
    VoxelNm,
    Workers,
    channels,
    numbers,
    toml,
)
from volseg.cli.output import EXIT_INTERRUPTED, emit
from volseg.config import layers, load, local_path
from volseg.engine import forkserver
from volseg.errors import IncompleteRunError, UserError, printable
from volseg.progress import Progress

if TYPE_CHECKING:
    from volseg.engine.finished import FinishedRun

app = typer.Typer(
    name="volseg",
    cls=output.Group,
    help="Instance labels for electron-microscopy volumes of any size. Cutting up never changes the answer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Runs the command line. A user's own mistake ends it with one line and exit code 2, blocks that failed with 1."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.TyperException as error:
        _end_of_usage(error)
    except UserError as error:
        typer.echo(f"volseg: {' '.join(str(error).split())}", err=True)
        sys.exit(1 if isinstance(error, IncompleteRunError) else 2)
    except OSError as error:
        said = f"{error.filename or 'the system'}: {error.strerror or error or type(error).__name__}"
        typer.echo(f"volseg: {printable(' '.join(said.split()))}", err=True)
        sys.exit(2)
    except typer.Abort:
        typer.echo("volseg: stopped", err=True)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        if "torch" not in sys.modules:  # which complains of what was not collected
            gc.freeze()  # the process ends: looking for garbage among all that libraries made would take most of a second


def _end_of_usage(error: Any) -> NoReturn:
    """Ends with one line for an option or a command that there is not; where nothing was given, with the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message())
        sys.exit(0)
    command = error.ctx.command_path if getattr(error, "ctx", None) else "volseg"
    said = printable(" ".join(error.format_message().split()).rstrip("."))
    typer.echo(f"volseg: {said}; {command} -h lists what there is", err=True)
    sys.exit(2)


# ---------------------------------------------------------------- commands


@app.command()
def infer(
    volume: Annotated[str, typer.Argument(help="zarr, TIFF, HDF5, a folder of slices ...: see docs/formats.md.")],
    model: Model = "",
    out: Out = "",
    config: ConfigFile = None,
    sets: Sets = None,
    workers: Workers = None,
    scheduler: Scheduler = "",
    backend: Backend = "",
    precision: Precision = "",
    mask: Mask = "",
    roi: Roi = "",
    channel: Channel = None,
    time: Time = None,
    invert: Invert = False,
    padding: Padding = "",
    voxel_nm: VoxelNm = "",
    overwrite: Overwrite = False,
    update: Annotated[
        bool, typer.Option("--update", help="Of an existing output, do again only what can have changed since.")
    ] = False,
    retry_failed: RetryFailed = True,
) -> None:
    """Segment a volume: labels, object table, probabilities and a picture."""
    given = _given(model, mask, roi, workers, scheduler, backend, precision)
    given += _meaning(channel, time, invert, padding, voxel_nm)
    if not scheduler:
        forkserver.start()  # local workers are being got ready while this process imports the rest
    from volseg import api
    from volseg.inference.settings import settings_of

    settings = settings_of(config, [*(sets or ()), *given])
    made = _run(
        lambda progress: api.infer(
            volume, out or None, config=settings, overwrite=overwrite, update=update, retry_failed=retry_failed,
            progress=progress,
        )
    )  # fmt: skip
    _tell(made)


@app.command()
def plan(
    volume: Annotated[str, typer.Argument(help="What volseg infer would be given.")],
    model: Model = "",
    out: Out = "",
    config: ConfigFile = None,
    sets: Sets = None,
    workers: Workers = None,
    scheduler: Scheduler = "",
    backend: Backend = "",
    precision: Precision = "",
    mask: Mask = "",
    roi: Roi = "",
    channel: Channel = None,
    time: Time = None,
    invert: Invert = False,
    padding: Padding = "",
    voxel_nm: VoxelNm = "",
    price: Annotated[float | None, typer.Option("--price-per-hour", min=0.0, help="Of all workers together.")] = None,
) -> None:
    """Say what an infer would take, from a few tiles: voxels inferred, bytes, memory, time, cost. Nothing is written.

    Exit code 2, with what to set, where it would not fit memory or disk.
    """
    given = _given(model, mask, roi, workers, scheduler, backend, precision)
    given += _meaning(channel, time, invert, padding, voxel_nm)
    from volseg import api
    from volseg.planning import plan as planning

    with output.shown("nothing was written") as progress:
        made = api.plan(volume, out or None, config=config, settings=[*(sets or ()), *given], progress=progress)
    told = made.to_json()
    if price is not None:
        told["cost"] = price * made.total_seconds / 3600
    emit(planning.format_plan(made, price), told)
    if made.refusal:
        raise UserError(made.refusal)


def _given(
    model: str, mask: str, roi: str, workers: int | None, scheduler: str, backend: str = "", precision: str = ""
) -> list[tuple[str, str]]:
    """The settings behind the options that an inference and its plan share, each with the option that it comes from."""
    return _options(
        ("--model", "predict.model", model), ("--mask", "input.mask", mask), ("--roi", "input.roi", roi),
        ("--workers", "cluster.workers", workers), ("--scheduler", "cluster.scheduler", scheduler),
        ("--backend", "predict.backend", backend), ("--precision", "predict.precision", precision),
    )  # fmt: skip


def _meaning(channel: int | None, time: int | None, invert: bool, padding: str, voxel_nm: str) -> list[tuple[str, str]]:
    """The settings that say which voxels of a file are the image, and what they mean."""
    try:
        value: Any = float(padding) if padding else ""
    except ValueError:
        value = padding
        if value not in ("auto", "none"):
            raise UserError(f"--padding {padding!r} is no gray value, and neither auto nor none") from None
    return _options(
        ("--channel", "input.channel", channel), ("--time", "input.time", time),
        ("--invert", "input.invert", invert or None), ("--padding", "input.padding", value),
        ("--voxel-nm", "input.voxel_size_nm", list(numbers(voxel_nm, "--voxel-nm", float)) if voxel_nm else []),
    )  # fmt: skip


def _options(*given: tuple[str, str, Any]) -> list[tuple[str, str]]:
    """Settings of the options that were given: ``(option, "section.key=value")``."""
    return [(option, f"{key}={toml(value)}") for option, key, value in given if value not in (None, "", [])]


def _channel(name: str, more: str) -> Any:
    """An option that says which channel is what."""
    return typer.Option(f"--{name}-channel", metavar="N", min=0, help=f"Number of the {name} channel, from 0; {more}.")


@app.command()
def segment(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_PROBABILITIES", help="A run, or a volume of probabilities.")],
    mask_channel: Annotated[int | None, _channel("mask", "may be left out where there is one channel")] = None,
    contour_channel: Annotated[int | None, _channel("contour", "without one the height is the mask's alone")] = None,
    distance_channel: Annotated[int | None, _channel("distance", "for fragments.height = head")] = None,
    contour: Annotated[
        str, typer.Option("--contour", metavar="PATH", help="A volume of its own with the contour.")
    ] = "",
    distance: Annotated[str, typer.Option("--distance", metavar="PATH", help="The same with the distance.")] = "",
    affinities: Annotated[
        str,
        typer.Option(
            "--affinities",
            metavar="Z,Y,X",
            help="Channels of the affinities to the voxel before along z, y, x, such as 0,1,2, in place of all these.",
        ),
    ] = "",
    affinity_offset: Annotated[
        int | None, typer.Option("--affinity-offset", metavar="-1|1", help="1: to the voxel behind instead.")
    ] = None,
    inverted: Annotated[
        list[str] | None,
        typer.Option(
            "--inverted",
            metavar="mask|contour|distance|affinities",
            help="Take 1 - value of this channel; repeatable. "
            "A membrane map is --inverted mask: objects are where it is low.",
        ),
    ] = None,
    out: Out = "",
    config: ConfigFile = None,
    sets: Sets = None,
    workers: Workers = None,
    scheduler: Scheduler = "",
    mask: Mask = "",
    roi: Roi = "",
    voxel_nm: VoxelNm = "",
    overwrite: Overwrite = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Make a run's basins anew if work/ was cleaned.")
    ] = False,
    corrections: Annotated[
        str,
        typer.Option(
            "--corrections",
            metavar="FILE|none",
            help="Joins and splits of a run's objects, as volseg review writes them; "
            "the run keeps them until another FILE or none is given.",
        ),
    ] = "",
    partition: Annotated[
        str,
        typer.Option(
            "--partition",
            metavar="FILE|none",
            help="Which basins of a run are one object, Parquet or CSV of basin and object, in place of [stitch]; "
            "volseg export --to graph gives the basins.",
        ),
    ] = "",
    retry_failed: RetryFailed = True,
) -> None:
    """Segment probabilities without a network: a run's own, or those of any other network.

    Of a RUN, the labels are decided anew in place with other [fragments] or [stitch] settings, in seconds.

    Of PROBABILITIES (zarr, OME-Zarr, TIFF or a folder of slices; z y x, or with channels first or last; float 0..1,
    uint8 0..255, uint16 0..65535 or bool), a run is made as infer makes it, and all other commands take it.
    """  # fmt: skip
    given = _options(
        ("--mask-channel", "probabilities.mask_channel", mask_channel),
        ("--contour-channel", "probabilities.contour_channel", contour_channel),
        ("--distance-channel", "probabilities.distance_channel", distance_channel),
        ("--contour", "probabilities.contour", contour), ("--distance", "probabilities.distance", distance),
        ("--affinities", "probabilities.affinity_channels", channels(affinities, "--affinities")),
        ("--affinity-offset", "probabilities.affinity_offset", affinity_offset),
        ("--inverted", "probabilities.inverted", inverted), ("--workers", "cluster.workers", workers),
        ("--scheduler", "cluster.scheduler", scheduler), ("--mask", "input.mask", mask), ("--roi", "input.roi", roi),
        ("--voxel-nm", "input.voxel_size_nm", list(numbers(voxel_nm, "--voxel-nm", float)) if voxel_nm else []),
    )  # fmt: skip
    from volseg import api

    made = _run(
        lambda progress: api.segment(
            path, out or None, config=config, settings=[*(sets or ()), *given], overwrite=overwrite, recompute=recompute,
            corrections=corrections or None, partition=partition or None, retry_failed=retry_failed, progress=progress,
        )
    )  # fmt: skip
    _tell(made)


@app.command()
def calibrate(
    run: Annotated[str, typer.Argument(help="A finished run with its work folder.")],
    truth: Annotated[str, typer.Argument(help="A volume of instance labels, or a 0/255 mask.")],
    box: Annotated[str, typer.Option("--box", metavar="z0:z1,y0:y1,x0:x1", help="Part with truth.")] = "",
    model: Annotated[Path | None, typer.Option("--model", help="Write the best into this model file too.")] = None,
) -> None:
    """Choose rules of [stitch] against annotated instances, and decide the run anew with the best.

    Searched are seed, persistence, join_mean, min_voxels and count_cut. [fragments] makes the basins: not searched here.
    """
    from volseg import api

    result = volseg.calibrate(run, truth, box=box or None)
    best = result.chosen
    gains = {"own": best.pq - result.own.pq, "default": best.pq - result.default.pq}
    text = (
        f"{result}\nchosen   " + ", ".join(text.replace("=", " = ") for text in best.settings) + "\n"
        f"gain     PQ {gains['own']:+.4f} over the run's own settings, {gains['default']:+.4f} over the defaults, on the same "
        "annotations"
    )
    if not result.best.pq:
        raise UserError(f"no setting matches any object of {truth} there: are these the labels of this volume?")
    if model:
        from volseg.evaluation.calibrate import save_to_model
        from volseg.evaluation.stored import open_stored

        save_to_model(Path(local_path(model)), best, open_stored(run))
    if not output.wants_json():
        typer.echo(text)
    made = None if best.own else _run(lambda progress: api.segment(run, settings=best.settings, progress=progress))
    plain = {**result.to_json(), "chosen": list(best.settings), "gain": gains, "decided_anew": made and made.to_json()}
    if output.wants_json():
        emit("", plain)
    elif made:
        emit(_report(made), {})


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="A finished run.")],
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="How many random boxes to recompute.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Another seed, other boxes.")] = 0,
) -> None:
    """Recompute parts of a run with other blocks and compare them bit for bit. Exit code 1 where they differ."""

    result = volseg.verify(run, boxes=blocks, seed=seed)
    emit(str(result), result.to_json())
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def repair(run: Annotated[str, typer.Argument(help="A finished run.")], retry_failed: RetryFailed = True) -> None:
    """Make again what of a run is missing or damaged, as volseg verify tells, and just that."""
    from volseg import api

    _tell(_run(lambda progress: api.repair(run, retry_failed=retry_failed, progress=progress)))


@app.command()
def review(
    run: Annotated[str, typer.Argument(help="A finished run.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many of the least certain.")] = 50,
) -> None:
    """List the least certain joins and borders, with a picture of each in RUN/review.

    Its page takes decisions in the browser, and saves them as a file for volseg segment RUN --corrections FILE.
    """

    result = volseg.review(run, top=top)
    emit(f"{result}\npage     {result.page}\nfile     {result.corrections}", result.to_json())


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run, finished or not.")],
    out: Annotated[
        str, typer.Option("--out", metavar="FILE.html", help="The page; report.html in the run if not given.")
    ] = "",
) -> None:
    """Write one HTML page about a run: stages, blocks, sizes, examples, settings, versions, log; no other file is needed."""
    page = volseg.report(run, out or None)
    emit(f"page     {page}", {"page": page})


def _run(start: Callable[[Progress], FinishedRun]) -> FinishedRun:
    """Shows the progress of a run."""
    with output.shown(
        "what is done is kept, the same command goes on from there, unless it has --overwrite"
    ) as progress:
        return start(progress)


def _tell(run: FinishedRun) -> None:
    """What came of a run."""
    emit(_report(run), {"path": run.path, **run.to_json()})


def _report(run: FinishedRun) -> str:
    from volseg.planning.plan import compare_with

    compared = compare_with(run.plan, run.actual, run.summary.get("share_before", 0.0))
    return "\n".join([*run.report(), *compared, *run.places()])


MORE: tuple[Callable[..., None], ...] = (
    models.init, models.train, models.suggest, models.tune, models.backends, models.quantize, volumes.evaluate,
    volumes.synth, volumes.convert, volumes.export, volumes.view, models.info, models.export_model, machine.doctor,
    machine.config,
)  # fmt: skip
for command in MORE:
    app.command(command.__name__.replace("_", "-"))(command)
app.command("compile")(machine.compile_loops)


@app.command()
def clean(run: Annotated[str, typer.Argument(help="A finished run.")]) -> None:
    """Remove a finished run's work folder; labels, table and probabilities stay."""
    from volseg import api

    freed = api.clean(run)
    size = "" if freed is None else f" ({freed / 1e9:.2f} GB)"
    removed = f"{run.rstrip('/')}/work"
    emit(f"removed {removed}{size}; volseg segment then needs --recompute", {"removed": removed, "bytes": freed})


@app.command()
def settings(
    model: Model = "",
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:
    """Print every setting of an infer as a config file, and where it comes from if it is no default."""
    from volseg.inference.settings import model_values

    chosen = [*(sets or ()), *[f"predict.model={toml(model)}"] * bool(model)]
    base = model_values(load(config, chosen))
    found = load(config, sets or (), base=base)
    emit(output.settings_page(found, layers(config, sets or (), base)), found.model_dump(mode="json"))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"volseg {__version__}")
        raise typer.Exit
