"""The command line: options in, one line of error out. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from volseg import __version__
from volseg.box import Box, Triple
from volseg.config import Config, layers, load, page
from volseg.engine import forkserver as prefork
from volseg.errors import UserError

app = typer.Typer(
    name="volseg",
    help="Instance labels for electron-microscopy volumes of any size. Cutting up never changes the answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE.toml", help="Settings; see configs/.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting; repeatable.")]
Model = Annotated[str, typer.Option("--model", help="Model file; the shipped one if not given.")]
Out = Annotated[str, typer.Option("--out", help="Output; the volume's name + .volseg.zarr if not given.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Worker processes.")]
Scheduler = Annotated[str, typer.Option("--scheduler", help="tcp://HOST:PORT of a Dask scheduler.")]
Mask = Annotated[
    str, typer.Option("--mask", metavar="VOLUME", help="Do nothing where this volume is 0; may be coarser.")
]
Roi = Annotated[str, typer.Option("--roi", metavar="z0:z1,y0:y1,x0:x1", help="Do only this part.")]
Backend = Annotated[str, typer.Option("--backend", help="auto, openvino, onnx or torch.")]
Precision = Annotated[str, typer.Option("--precision", help="auto, fp32, bf16, fp16 or int8.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
INTERRUPTED = 130  # exit code after Ctrl-C
EVERY = 10  # seconds between lines of progress where there is no terminal


def main() -> None:
    """Runs the command line. A user's own mistake ends it with one line and exit code 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"volseg: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(
            f"volseg: {error.filename or 'the system'}: {error.strerror or error or type(error).__name__}", err=True
        )
        sys.exit(2)
    finally:
        if "torch" not in sys.modules:  # which complains of what was not collected
            gc.freeze()  # the process ends: looking for garbage among all that libraries made would take most of a second


# ---------------------------------------------------------------- progress


class Terminal:
    """Progress of a run, several stages at once: bars in a terminal, else a line now and then and at a stage's end."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.live: Any = None
        self.open: dict[str, Progressed] = {}
        self.bars: dict[str, Any] = {}
        self.told = time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def stage(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        if self.console.is_terminal:
            return self._bar(name, voxels, done)
        self.open[name] = Progressed(name, voxels, done)
        if done >= voxels:
            self._tell(name, 0)
        return lambda n: self._tell(name, n)

    def _bar(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        from rich.progress import (
            BarColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Speed(ProgressColumn):
            def render(self, task: Any) -> Text:
                speed = task.finished_speed or task.speed
                return Text(f"{speed / 1e6:.2f} Mvoxel/s" if speed else "- Mvoxel/s")

        if self.live is None:
            self.live = Progress(
                TextColumn("{task.description:10}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), Speed(),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console, speed_estimate_period=120,
            )  # fmt: skip
            self.live.start()
        if name in self.bars:  # the run has begun again
            self.live.remove_task(self.bars[name])
        task = self.bars[name] = self.live.add_task(name, total=voxels, completed=done)
        return lambda n: self.live.advance(task, n)

    def _tell(self, name: str, voxels: int) -> None:
        """A line of a stage that is done; else, if the last line is `EVERY` seconds old, one of all that are under way."""
        now, stage = time.monotonic(), self.open[name]
        stage.done += voxels
        if stage.done >= stage.voxels:
            self.say(self.open.pop(name).line(now))
        elif now - self.told > EVERY:
            self.say("; ".join(stage.line(now) for stage in self.open.values() if stage.done > stage.before))
        else:
            return
        self.told = now

    def stop(self) -> None:
        """Ends the bars."""
        if self.live is not None:
            self.live.stop()


class Progressed:
    """How far a stage has come."""

    def __init__(self, name: str, voxels: int, done: int) -> None:
        self.name, self.voxels, self.done = name, voxels, done
        self.before, self.start = done, time.monotonic()

    def line(self, now: float) -> str:
        """Its name, share, speed and the time that it still takes."""
        if self.before >= self.voxels:
            return f"{self.name:10} 100 %  done before"
        speed = (self.done - self.before) / max(now - self.start, 1e-9)
        left = f", {(self.voxels - self.done) / speed:.0f} s left" if speed and self.done < self.voxels else ""
        return f"{self.name:10} {100 * self.done / self.voxels:3.0f} %  {speed / 1e6:.2f} Mvoxel/s{left}"


# ---------------------------------------------------------------- commands


@app.command()
def infer(
    volume: Annotated[str, typer.Argument(help="zarr array, OME-Zarr group, multi-page TIFF, or folder of slices.")],
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
    overwrite: Overwrite = False,
) -> None:
    """Segment a volume: labels, object table, probabilities and a picture."""
    engine = {"predict.backend": backend, "predict.precision": precision}
    settings = _of_model(config, sets, _given(model, mask, roi, workers, scheduler) | engine)
    _expect_workers(settings)

    from volseg import api as launch

    where = (out or default_out(volume)).rstrip("/")
    _run(lambda show: launch.infer(volume, where, settings, overwrite=overwrite, show=show))


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
    price: Annotated[float | None, typer.Option("--price-per-hour", min=0.0, help="Of all workers together.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what an infer would take, from a few tiles: voxels inferred, bytes, memory, time, cost. Nothing is written.

    Exit code 2, with what to set, where it would not fit memory or disk.
    """
    engine = {"predict.backend": backend, "predict.precision": precision}
    settings = _of_model(config, sets, _given(model, mask, roi, workers, scheduler) | engine)
    from dataclasses import asdict

    from volseg import api as launch
    from volseg.planning import plan as planning

    made, refusal = launch.planned(volume, (out or default_out(volume)).rstrip("/"), settings)
    told = {**asdict(made), "total_seconds": made.total_seconds}
    if price is not None:
        told["cost"] = price * made.total_seconds / 3600
    typer.echo(json.dumps(told, indent=1) if as_json else planning.table(made, price))
    if refusal:
        raise refusal


def _given(model: str, mask: str, roi: str, workers: int | None, scheduler: str) -> dict[str, str | int | None]:
    """The settings behind the options that an inference and its plan share."""
    return {"predict.model": model, "input.mask": mask, "input.roi": roi, "cluster.workers": workers,
            "cluster.scheduler": scheduler}  # fmt: skip


def _of_model(config: Path | None, sets: list[str] | None, given: dict[str, str | int | None]) -> Config:
    """The settings of an inference: the model's own, the config file's, ``--set``, and what options gave."""
    from volseg.inference.model import load_card, shipped

    chosen = given["predict.model"] or load(config, sets or ()).predict.model
    flags = [f"{name}={_toml(value)}" for name, value in given.items() if value]
    return load(config, [*(sets or ()), *flags], base=load_card(chosen or shipped()).decode)


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
    inverted: Annotated[
        list[str] | None,
        typer.Option(
            "--inverted",
            metavar="mask|contour|distance",
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
    overwrite: Overwrite = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Make a run's basins anew if work/ was cleaned.")
    ] = False,
) -> None:
    """Segment probabilities without a network: a run's own, or those of any other network.

    Of a RUN, the labels are decided anew in place with other [fragments] or [stitch] settings, in seconds.

    Of PROBABILITIES (zarr, OME-Zarr, TIFF or a folder of slices; z y x, or with channels first or last; float 0..1,
    uint8 0..255, uint16 0..65535 or bool), a run is made as infer makes it, and all other commands take it.
    """  # fmt: skip
    given = {
        "probabilities.mask_channel": mask_channel,
        "probabilities.contour_channel": contour_channel,
        "probabilities.distance_channel": distance_channel,
        "probabilities.contour": contour or None,
        "probabilities.distance": distance or None,
        "probabilities.inverted": inverted or None,
        "cluster.workers": workers,
        "cluster.scheduler": scheduler or None,
        "input.mask": mask or None,
        "input.roi": roi or None,
    }
    flags = [f"{name}={_toml(value)}" for name, value in given.items() if value is not None]
    settings = load(config, [*(sets or ()), *flags])
    from volseg import api as launch
    from volseg.engine import folder

    path = path.rstrip("/")
    if not folder.is_run(path):
        where = (out or default_out(path)).rstrip("/")
        if recompute:
            raise UserError(f"{path} is not a volseg run: --recompute is for a run whose work folder was cleaned")
        _run(lambda show: launch.segment_probabilities(path, where, settings, overwrite=overwrite, show=show))
        return
    if out or overwrite:
        raise UserError(f"{path} is a run and is decided anew in place; leave out --out and --overwrite, or give {path}/0 "
                        "to make another run of its probabilities")  # fmt: skip

    def change(old: Config) -> Config:
        return load(config, [*(sets or ()), *flags], base=old.model_dump(mode="json", exclude={"train"}))

    _run(lambda show: launch.segment(path, change, recompute=recompute, show=show))


@app.command()
def calibrate(
    run: Annotated[str, typer.Argument(help="A finished run with its work folder.")],
    truth: Annotated[str, typer.Argument(help="A volume of instance labels, or a 0/255 mask.")],
    box: Annotated[str, typer.Option("--box", metavar="z0:z1,y0:y1,x0:x1", help="Part with truth.")] = "",
    model: Annotated[Path | None, typer.Option("--model", help="Write the best into this model file too.")] = None,
) -> None:
    """Choose rules of [stitch] against annotated instances, and decide the run anew with the best.

    Searched are seed, persistence, join_mean and min_voxels. [fragments] makes the basins and cannot be searched here.
    """
    region = _box(box)
    from volseg import api as launch
    from volseg.evaluation import calibrate as search
    from volseg.evaluation.finished import open_finished

    found = search.calibrate(run, truth, box=region)
    typer.echo(str(found))
    best = found.best
    if not best.pq:
        raise UserError(f"no setting matches any object of {truth} there: are these the labels of this volume?")
    typer.echo("chosen   " + ", ".join(text.replace("=", " = ") for text in best.settings))
    typer.echo(
        f"gain     PQ {best.pq - found.own.pq:+.4f} over the run's own settings, {best.pq - found.default.pq:+.4f} over the "
        "defaults, on the same annotations"
    )
    if model:
        search.save_to_model(model, best, open_finished(run))
    if not best.own:

        def change(settings: Config) -> Config:
            return load(sets=best.settings, base=settings.model_dump(mode="json", exclude={"train"}))

        _run(lambda show: launch.segment(run.rstrip("/"), change, show=show))


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="A finished run.")],
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="How many random boxes to recompute.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Another seed, other boxes.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Recompute parts of a run with other blocks and compare them bit for bit. Exit code 1 where they differ."""
    from volseg.evaluation.verify import verify as recompute

    result = recompute(run, boxes=blocks, seed=seed)
    typer.echo(json.dumps(result.to_json(), indent=1) if as_json else str(result))
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def review(
    run: Annotated[str, typer.Argument(help="A finished run.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many of the least certain.")] = 50,
) -> None:
    """List the least certain joins and borders, with a picture of each in RUN/review."""
    from volseg.evaluation.review import review as draw

    found = draw(run, top)
    typer.echo(str(found))
    typer.echo(f"page     {found.page}")


def _box(text: str) -> Box | None:
    try:
        return Box.parse(text) if text else None
    except ValueError as error:
        raise UserError(f"--box: {error}") from None


def _expect_workers(settings: Config) -> None:
    """Local workers are being got ready while this process imports the rest."""
    if not settings.cluster.scheduler:
        prefork.start()


def _run(start: Callable[[Terminal], Any]) -> None:
    """Shows the progress of a run, and what came of it."""
    show = Terminal()
    try:
        summary = start(show)
    except KeyboardInterrupt:
        typer.echo("volseg: stopped; what is done is kept, the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        show.stop()
    _conclude(summary)


def _toml(value: str | int | list[str]) -> str:
    """``value`` as TOML."""
    return json.dumps(value, ensure_ascii=False)


def default_out(volume: str) -> str:
    """Where a volume's run goes unless told otherwise.

    >>> default_out("a/cells.tif"), default_out("cells.ome.zarr/"), default_out("slices")
    ('a/cells.volseg.zarr', 'cells.volseg.zarr', 'slices.volseg.zarr')
    """
    head, slash, name = volume.rstrip("/").rpartition("/")
    for ending in (".ome.zarr", ".ome.tiff", ".ome.tif", ".zarr", ".tiff", ".tif", ".n5"):
        name = name.removesuffix(ending)
    return f"{head}{slash}{name}.volseg.zarr"


def _conclude(summary: Any) -> None:
    if not summary.objects:
        typer.echo(f"no object: {summary.lacks}")
    typer.echo(f"{summary.objects} objects in {summary.voxels / 1e6:.1f} million voxels")
    for line in _spent(summary):
        typer.echo(line)
    typer.echo(
        f"peak memory {summary.worker_peak_bytes / 2**30:.2f} GiB in the largest worker, "
        f"{summary.client_peak_bytes / 2**30:.2f} GiB in this process"
    )
    if summary.compared:
        typer.echo(summary.compared)
    typer.echo(f"labels   {summary.labels}\ntable    {summary.table}\npicture  {summary.picture}")


def _spent(summary: Any) -> list[str]:
    """Where the time went: by stage as the clock ran, and as shares of what all workers spent."""
    total = summary.seconds["total"]
    stages = ", ".join(f"{name} {took:.1f}" for name, took in summary.seconds.items() if name != "total")
    lines = [f"took {total:.1f} s ({summary.voxels / 1e6 / total:.2f} Mvoxel/s): {stages}; stages run side by side"]
    spent = sum(sum(phases.values()) for phases in summary.busy.values())
    if spent:
        lines.append(f"workers  {spent:.1f} s: {', '.join(_shares(summary.busy, spent))}")
    if summary.device_share:
        lines.append(f"device   computed in {100 * summary.device_share:.0f} % of predict; "
                     f"{summary.queue:.1f} blocks waited for a worker on average")  # fmt: skip
    return lines


def _shares(busy: dict[str, dict[str, float]], spent: float) -> Iterator[str]:
    """``predict 80 % (infer 70, blend 5, ...)`` for each stage: the phases of at least one per cent."""
    for stage, phases in busy.items():
        parts = sorted(((100 * took / spent, name) for name, took in phases.items()), reverse=True)
        large = ", ".join(f"{name} {share:.0f}" for share, name in parts if share >= 1)
        yield f"{stage} {sum(share for share, _ in parts):.0f} %" + f" ({large})" * bool(large)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML file with a [train] table; see configs/epfl.toml.")],
    sets: Sets = None,
) -> None:
    """Train a model on annotated sections."""
    settings = load(config, sets or ())
    from volseg.training.checkpoint import CHECKPOINT_NAME
    from volseg.training.train import train as run

    _until_stopped(lambda: run(settings), Path(settings.train.out, CHECKPOINT_NAME))


def _until_stopped(work: Callable[[], Any], checkpoint: Path | None = None) -> None:
    """Does ``work``; Ctrl-C ends it with a line that says how to go on."""
    try:
        work()
    except KeyboardInterrupt:
        nothing = checkpoint is not None and not checkpoint.exists()
        goes_on = "begins anew: nothing was learnt yet" if nothing else "goes on from the last checkpoint"
        typer.echo(f"volseg: stopped; the same command {goes_on}", err=True)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(help="TOML file with a [train] table that holds sections out.")],
    sets: Sets = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="How many settings to try.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.0, help="Time budget; 0 for none.")] = None,
) -> None:
    """Search a learning rate and batch size, and write the best into a config for volseg train."""
    flags = [f"tune.trials={trials}"] * (trials is not None) + [f"tune.minutes={minutes}"] * (minutes is not None)
    settings = load(config, [*(sets or ()), *flags])
    from volseg.training.tune import tune as run

    _until_stopped(lambda: run(settings))


@app.command()
def backends(
    volume: Annotated[str, typer.Argument(help="A volume; some of its tiles are tried.")],
    model: Model = "",
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:
    """Try every backend and precision that this machine has on a volume: speed, and distance from float32."""
    settings = load(config, [*(sets or ()), *[f"predict.model={_toml(model)}"] * bool(model)])
    from volseg.inference import autoselect as probe
    from volseg.planning import prepare as describe

    rows = describe.try_backends(volume, settings)
    typer.echo(f"{probe.table(rows)}\nfastest  {probe.fastest(rows).name}")


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="Model file; its quantized form is stored in it.")],
    image: Annotated[str, typer.Argument(help="A volume that the model was trained on.")],
    sections: Annotated[str, typer.Option("--sections", metavar="0:120,130", help="Sections to calibrate on.")] = "",
    truth: Annotated[str, typer.Option("--truth", help="Labels of the volume: measure what it loses.")] = "",
    held: Annotated[str, typer.Option("--held-out", metavar="140:165", help="Sections to measure on.")] = "",
) -> None:
    """Add an INT8 form to a model file; with --truth and --held-out, auto takes it where it loses little. Needs nncf."""
    if bool(truth) != bool(held):
        raise UserError("--truth and --held-out belong together: labels, and the sections of them to measure on")
    from volseg.training import quantize as form

    typer.echo(form.table(form.quantize(model, image, sections=_parts(sections), truth=truth, held=_parts(held))))


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


@app.command()
def evaluate(
    pred: Annotated[str, typer.Argument(help="A run, or a volume of labels.")],
    truth: Annotated[str, typer.Argument(help="A volume of labels, or a 0/255 mask.")],
    box: Annotated[str, typer.Option("--box", metavar="z0:z1,y0:y1,x0:x1", help="Score only this part.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score labels against the truth: foreground and instances."""
    region = _box(box)
    from volseg.evaluation import evaluate as scoring

    scores = scoring.evaluate(pred, truth, box=region)
    typer.echo(json.dumps(scores.to_json(), indent=1) if as_json else str(scores))
    if not scores.instances.truth_objects:
        typer.echo(f"volseg: {truth} holds no object here, so most of these scores say nothing", err=True)
    if not box and (roi := scoring.read_roi(pred)):
        typer.echo(f"volseg: {pred} did only {roi}, all else counts as missed; --box {roi} scores that part", err=True)


@app.command()
def synth(
    out: Annotated[str, typer.Argument(help="Zarr group to make: the image, and labels/truth beside it.")],
    shape: Annotated[str, typer.Option("--shape", metavar="Z,Y,X", help="Voxels along each axis.")] = "64,512,512",
    seed: Annotated[int, typer.Option("--seed", help="Another seed, another volume.")] = 0,
    block: Annotated[str, typer.Option("--block", metavar="Z,Y,X", help="Voxels made at once.")] = "64,256,256",
    overwrite: Overwrite = False,
) -> None:
    """Make a synthetic EM volume with exact instance labels."""
    from volseg import api as launch

    sizes = _triple(shape, "--shape"), _triple(block, "--block")
    show = Terminal()
    try:
        launch.synthesize(out.rstrip("/"), *sizes, seed=seed, overwrite=overwrite, show=show)
    finally:
        show.stop()
    typer.echo(f"image    {out}\ntruth    {out.rstrip('/')}/labels/truth")


def _triple(text: str, option: str) -> Triple:
    try:
        z, y, x = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text!r} is not three whole numbers such as 64,512,512") from None
    if min(z, y, x) < 1:
        raise UserError(f"{option} {text!r} has an axis shorter than 1 voxel")
    return z, y, x


@app.command()
def info(
    model: Annotated[Path | None, typer.Argument(help="Model file; the shipped one if not given.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The whole card, with every setting of its training.")
    ] = False,
) -> None:
    """Print a model's card: what it is for, what it learnt from, how good it is."""
    from volseg.inference.model import load_card, shipped
    from volseg.inference.model_card import format_card

    path = model or shipped()
    card = load_card(path)
    typer.echo(json.dumps(card.to_json(), indent=1) if as_json else format_card(path, card))


@app.command()
def clean(run: Annotated[str, typer.Argument(help="A finished run.")]) -> None:
    """Remove a finished run's work folder; labels, table and probabilities stay."""
    from volseg.io import files

    if not files.exists(f"{run}/run.json"):
        raise UserError(f"{run} is not a finished volseg run (no run.json in it); give a folder that volseg infer made")
    where = f"{run.rstrip('/')}/work"
    freed = files.stored_bytes(where)
    files.remove(where)
    told = "" if freed is None else f" ({freed / 1e9:.2f} GB)"
    typer.echo(f"removed {where}{told}; volseg segment then needs --recompute")


@app.command()
def settings(
    model: Model = "",
    config: ConfigFile = None,
    sets: Sets = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every setting of an infer as a config file, and where it comes from if it is no default."""
    from volseg.inference.model import load_card, shipped

    base = load_card(model or load(config, sets or ()).predict.model or shipped()).decode
    found = load(config, sets or (), base=base)
    if as_json:
        typer.echo(json.dumps(found.model_dump(mode="json"), indent=1))
    else:
        typer.echo(page(found, layers(config, sets or (), base)))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"volseg {__version__}")
        raise typer.Exit
