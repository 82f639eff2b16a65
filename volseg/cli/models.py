"""Commands about models: begun, trained, tuned, tried, quantized, described; `commands` lists them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from volseg.cli.options import ConfigFile, Model, Overwrite, Sets, numbers, toml
from volseg.cli.output import EXIT_INTERRUPTED, emit, note, say, wants_json
from volseg.config import Predict, load, local_path
from volseg.errors import UserError
from volseg.training import require_extra


def init(
    image: Annotated[str, typer.Argument(help="The volume that was annotated.")],
    labels: Annotated[str, typer.Argument(help="Its labels: see docs/labels.md.")],
    out: Annotated[
        str,
        typer.Option("--out", metavar="FILE.toml", help="The config to write; the image's name + .toml if not given."),
    ] = "",
    voxel_nm: Annotated[str, typer.Option("--voxel-nm", metavar="Z,Y,X", help="Voxel size; else the file's.")] = "",
    first_number: Annotated[
        int | None,
        typer.Option("--first-number", min=0, help="Number of the image's first section in the names of label files."),
    ] = None,
    radius_nm: Annotated[
        float | None,
        typer.Option("--radius-nm", help="Of the ball around each of points; 5 voxels if not given."),
    ] = None,
    scribbles: Annotated[
        bool | None, typer.Option("--scribbles/--no-scribbles", help="Whether 0 is what nobody annotated.")
    ] = None,
    background: Annotated[
        int | None, typer.Option("--background", min=0, help="Label value outside of objects.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Look at an image and its labels, and write a commented config for volseg train."""
    from volseg.training.init import default_out
    from volseg.training.init import init as look

    made = look(
        image, labels, out or default_out(image), voxel_size_nm=numbers(voxel_nm, "--voxel-nm", float) if voxel_nm else None,
        first_number=first_number, radius_nm=radius_nm, scribbles=scribbles, background=background, overwrite=overwrite,
    )  # fmt: skip
    emit(str(made), made.to_json())


def train(
    config: Annotated[Path, typer.Argument(help="TOML file with a [train] table; see configs/epfl.toml.")],
    add: Annotated[
        list[str] | None,
        typer.Option(
            "--add",
            metavar="FOLDER",
            help="Corrected sections of volseg suggest, or labels: go on with them; repeatable.",
        ),
    ] = None,
    scribbles: Annotated[
        bool | None, typer.Option("--scribbles/--no-scribbles", help="Whether 0 in --add is what nobody looked at.")
    ] = None,
    sets: Sets = None,
) -> None:
    """Train a model on annotated sections; with --add, go on from it with corrected ones, and tell what changed."""
    settings = load(config, sets or ())
    require_extra()
    from volseg.training.checkpoint import CHECKPOINT_NAME
    from volseg.training.start import train as run

    path = _until_stopped(
        lambda: run(config, settings=sets or (), add=add or (), scribbles=scribbles, say=say),
        None if add else Path(settings.train.out, CHECKPOINT_NAME),
    )
    if wants_json():
        from volseg.inference.model import load_card
        from volseg.training.corrections import read_record

        plain = {"model": str(path), "report": str(path.with_name("report.html")), "card": load_card(path).to_json()}
        emit("", {**plain, "added": read_record(path.parent)} if add else plain)


def suggest(
    run: Annotated[str, typer.Argument(help="A finished run.")],
    count: Annotated[int, typer.Option("--count", min=1, help="How many sections.")] = 6,
    out: Annotated[
        str, typer.Option("--out", metavar="FOLDER", help="The folder to make; the run's name + .suggest if not given.")
    ] = "",
    annotated: Annotated[
        str, typer.Option("--annotated", metavar="0:120,130", help="Sections that were annotated already.")
    ] = "",
    image: Annotated[
        str, typer.Option("--image", metavar="VOLUME", help="The volume, where the run's own has moved.")
    ] = "",
    napari: Annotated[
        bool, typer.Option("--napari", help="Open the folder in napari; make it first if need be.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Choose the sections to annotate next, and write their image and today's labels to correct."""
    from volseg.io.suggested import folder_of
    from volseg.training.suggest import default_out
    from volseg.training.suggest import suggest as choose

    folder = local_path(out) if out else ""
    if napari and not overwrite and folder_of(folder or default_out(run.rstrip("/"))):
        _edit(folder or default_out(run.rstrip("/")))
        return
    made = choose(run, count, folder or None, annotated=_parts(annotated), image=image or None, overwrite=overwrite)
    emit(f"{made}\nfolder   {made.folder}; README.txt says how to correct it", made.to_json())
    if napari:
        _edit(made.folder)


def _edit(folder: str) -> None:
    """Opens suggested sections in napari, where that is installed."""
    from volseg.system import installed
    from volseg.training.napari_editor import edit

    if not installed("napari"):
        note("napari is not installed here; pip install 'napari[all]', or open the files as README.txt says")
        return
    changed = edit(folder)
    note(f"{len(changed)} sections changed: {', '.join(changed)}" if changed else "no section was changed")


def _until_stopped(work: Callable[[], Path], checkpoint: Path | None = None) -> Path:
    """Does ``work``; Ctrl-C ends it with a line that says how to go on."""
    try:
        return work()
    except KeyboardInterrupt:
        nothing = checkpoint is not None and not checkpoint.exists()
        goes_on = "begins anew: nothing was learnt yet" if nothing else "goes on from the last checkpoint"
        typer.echo(f"volseg: stopped; the same command {goes_on}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def tune(
    config: Annotated[Path, typer.Argument(help="TOML file with a [train] table that holds sections out.")],
    sets: Sets = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="How many settings to try.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.0, help="Time budget; 0 for none.")] = None,
) -> None:
    """Search a learning rate and batch size, and write the best into a config for volseg train."""
    flags = [f"tune.trials={trials}"] * (trials is not None) + [f"tune.minutes={minutes}"] * (minutes is not None)
    settings = load(config, [*(sets or ()), *flags])
    require_extra()
    from volseg.training.tune import tune as run

    path = _until_stopped(lambda: run(settings, say))
    if wants_json():
        emit("", {"config": str(path), "train": load(path).train.model_dump(mode="json")})


def backends(
    volume: Annotated[str, typer.Argument(help="A volume; some of its tiles are tried.")],
    model: Model = "",
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:
    """Try every backend and precision that this machine has on a volume: speed, and distance from float32."""
    settings = load(config, [*(sets or ()), *[f"predict.model={toml(model)}"] * bool(model)])
    from volseg.inference import autoselect as probe
    from volseg.planning import prepare as describe

    rows = describe.try_backends(volume, settings)
    fastest = probe.fastest(rows).name
    plain = {"candidates": list(map(vars, rows)), "fastest": fastest}
    emit(f"{probe.format_measurements(rows)}\nfastest  {fastest}", plain)


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
    require_extra()
    from volseg.training import quantize as form

    facts = form.quantize(Path(local_path(model)), image, sections=_parts(sections), truth=truth, held_out=_parts(held))
    emit(form.format_facts(facts), facts)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def info(
    model: Annotated[Path | None, typer.Argument(help="Model file; the shipped one if not given.")] = None,
) -> None:
    """Print a model's card: what it is for, what it learnt from, how good it is; as JSON with all settings of training."""
    from volseg.inference.model import load_card
    from volseg.inference.model_card import format_card
    from volseg.inference.model_file import model_file

    path = model_file(Predict(model=str(model or "")))
    card = load_card(path)
    emit(format_card(path, card), card.to_json())


def export_model(
    model: Annotated[str, typer.Argument(help='Model file; "shipped" for the one that comes with volseg.')],
    out: Annotated[str, typer.Argument(metavar="OUT.onnx|OUT.zip|FOLDER", help="ONNX file or bioimage.io package.")],
    image: Annotated[
        str, typer.Option("--image", metavar="VOLUME", help="Test the package with this; synthetic EM if not given.")
    ] = "",
    author: Annotated[list[str] | None, typer.Option("--author", help="Who made the model; repeatable.")] = None,
    license: Annotated[str, typer.Option("--license", help="SPDX identifier such as CC-BY-4.0.")] = "",
    overwrite: Overwrite = False,
) -> None:
    """Write a model for other programs, as ONNX or as a bioimage.io package that bioimageio.core passes."""
    from volseg.training.package import export_model as write

    made = write(model, out, image=image or None, authors=tuple(author or ()), license=license, overwrite=overwrite)
    emit(f"model    {made}", {"model": str(made)})
