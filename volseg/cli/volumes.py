"""Commands that give volumes: converted, exported, made up; `commands` lists them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
from typing import Annotated, Any

import typer

from volseg.cli.options import numbers
from volseg.cli.output import emit, note, shown
from volseg.errors import UserError

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]


def convert(
    volume: Annotated[str, typer.Argument(help="Any volume that volseg reads; em.h5::/path for one in a file.")],
    out: Annotated[str, typer.Argument(metavar="OUT.zarr", help="The OME-Zarr group to make.")],
    labels: Annotated[bool, typer.Option("--labels", help="Coarser levels take the most frequent label.")] = False,
    voxel_nm: Annotated[str, typer.Option("--voxel-nm", metavar="Z,Y,X", help="Voxel size; else the file's.")] = "",
    chunk: Annotated[
        str, typer.Option("--chunk", metavar="Z,Y,X", help="Voxels compressed together; 64,128,128.")
    ] = "",
    shard: Annotated[str, typer.Option("--shard", metavar="Z,Y,X", help="Voxels of an object; 256,512,512.")] = "",
    dataset: Annotated[str, typer.Option("--dataset", help="The array inside a group, container or file.")] = "",
    channel: Annotated[int | None, typer.Option("--channel", min=0, help="Which of several channels, from 0.")] = None,
    time: Annotated[int | None, typer.Option("--time", min=0, help="Which of several times, from 0.")] = None,
    invert: Annotated[bool, typer.Option("--invert", help="Turn gray values around.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Worker processes.")] = None,
    scheduler: Annotated[str, typer.Option("--scheduler", help="tcp://HOST:PORT of a Dask scheduler.")] = "",
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting; repeatable.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Copy any volume to a sharded OME-Zarr 0.5 pyramid, block by block; a stopped one goes on when given again."""
    size = list(numbers(voxel_nm, "--voxel-nm", float)) if voxel_nm else None
    given: list[tuple[str, str, Any]] = [
        ("--voxel-nm", "input.voxel_size_nm", size), ("--dataset", "input.dataset", dataset),
        ("--channel", "input.channel", channel), ("--time", "input.time", time), ("--invert", "input.invert", invert or None),
        ("--workers", "cluster.workers", workers), ("--scheduler", "cluster.scheduler", scheduler),
    ]  # fmt: skip
    chosen = [(option, f"{key}={json.dumps(value)}") for option, key, value in given if value not in (None, "")]
    from volseg.api import convert as run

    with shown("what is done is kept, the same command goes on from there") as progress:
        made = run(
            volume, out, labels=labels, chunk=numbers(chunk, "--chunk") if chunk else None,
            shard=numbers(shard, "--shard") if shard else None,
            settings=[*(sets or ()), *chosen], overwrite=overwrite, progress=progress,
        )  # fmt: skip
    size_text = " x ".join(f"{n:g}" for n in made.voxel_size_nm) + " nm" if made.voxel_size_nm else "unknown voxel size"
    emit(
        f"volume   {out}\nshape    {' x '.join(map(str, made.shape))} {made.dtype}, {size_text}",
        {"volume": out, "shape": made.shape, "dtype": str(made.dtype), "voxel_size_nm": made.voxel_size_nm},
    )


def export(
    run: Annotated[str, typer.Argument(help="A finished run.")],
    out: Annotated[str, typer.Argument(metavar="DST", help="The file or folder to make.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="KIND",
            help="precomputed, n5, tiff, hdf5, nrrd; meshes: mesh (Neuroglancer's), obj, ply, glb; center lines: skeletons "
            "(Neuroglancer's), swc; rois; the object table: "
            "csv, parquet, anndata; its centers: points; the basins and how they touch: graph. Else as DST ends.",
        ),
    ] = "",
    what: Annotated[str, typer.Option("--what", help="labels, or probabilities: mask, contour, ...")] = "labels",
    meshes: Annotated[bool, typer.Option("--meshes", help="Add meshes to a precomputed volume.")] = False,
    skeletons: Annotated[bool, typer.Option("--skeletons", help="Add skeletons to a precomputed volume.")] = False,
    objects: Annotated[
        list[int] | None, typer.Option("--object", metavar="ID", help="Mesh or outline this object alone; repeatable.")
    ] = None,
    max_error_nm: Annotated[
        float | None, typer.Option("--max-error-nm", min=0.0, help="Of a mesh; half a voxel if not given.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Worker processes.")] = None,
    scheduler: Annotated[str, typer.Option("--scheduler", help="tcp://HOST:PORT of a Dask scheduler.")] = "",
    overwrite: Overwrite = False,
) -> None:
    """Write a finished run in a format of other programs; see docs/export.md."""
    given: list[tuple[str, Any]] = [("cluster.workers", workers), ("cluster.scheduler", scheduler)]
    chosen = [f"{key}={json.dumps(value)}" for key, value in given if value]
    from volseg.api import export

    with shown("nothing is left of it, the same command begins anew") as progress:
        made = export(
            run, out, kind=to, what=what, meshes=meshes, skeletons=skeletons, objects=objects or (),
            max_error_nm=max_error_nm, settings=chosen, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    emit(f"export   {made}", {"export": made})


def view(
    run: Annotated[str, typer.Argument(help="A finished run.")],
    object: Annotated[int | None, typer.Option("--object", metavar="ID", help="Go to this object.")] = None,
    review: Annotated[
        int | None, typer.Option("--review", metavar="N", help="Go to the N-th decision that volseg review lists.")
    ] = None,
    image: Annotated[
        str, typer.Option("--image", metavar="VOLUME", help="Show this volume below; the run's own if not given.")
    ] = "",
    screenshot: Annotated[
        str, typer.Option("--screenshot", metavar="FILE.png", help="Take a picture and end; needs Chromium.")
    ] = "",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to serve on; a free one if 0.")] = 0,
    napari: Annotated[bool, typer.Option("--napari", help="Open napari; without it, print the command.")] = False,
) -> None:
    """Show a finished run in Neuroglancer, on this machine; Ctrl-C ends."""
    from volseg.evaluation import view as module

    if napari:
        from volseg.engine.finished import open_run

        _open_napari(module.napari_command(open_run(run).path))
        return
    with module.view(run, object=object, review=review, image=image or None, port=port) as viewer:
        if module.IMAGE not in viewer.layers:
            note("the volume below the labels is not known, or not there any more; give --image VOLUME")
        if any(viewer.first):
            counted = " ".join(map(str, viewer.first[::-1]))
            note(
                f"the viewer shows voxels x y z of the volume's world; less {counted} they are those of tables and --roi"
            )
        if screenshot:
            viewer.screenshot(screenshot)
            emit(f"picture  {screenshot}", {"picture": screenshot})
            return
        with contextlib.suppress(KeyboardInterrupt):
            emit(f"{viewer.url}\nshowing {viewer.run}; Ctrl-C ends", {"url": viewer.url, "run": str(viewer.run)})
            threading.Event().wait()


def _open_napari(command: list[str]) -> None:
    """Runs napari where it is installed."""
    from volseg import system

    if all(map(system.installed, ("napari", "napari_ome_zarr"))):
        env = {**os.environ, **system.same_imports()}
        subprocess.run([sys.executable, "-m", *command], check=False, env=env)
        return
    text = f"napari is not installed here; pip install 'napari[all]' napari-ome-zarr, then: {shlex.join(command)}"
    emit(text, {"command": command})


def synth(
    out: Annotated[str, typer.Argument(help="Zarr group to make: the image, and labels/truth beside it.")],
    shape: Annotated[str, typer.Option("--shape", metavar="Z,Y,X", help="Voxels along each axis.")] = "64,512,512",
    seed: Annotated[int, typer.Option("--seed", help="Another seed, another volume.")] = 0,
    block: Annotated[str, typer.Option("--block", metavar="Z,Y,X", help="Voxels made at once.")] = "64,256,256",
    overwrite: Overwrite = False,
) -> None:
    """Make a synthetic EM volume with exact instance labels."""
    from volseg.evaluation.synthetic_volume import write_synthetic

    sizes = numbers(shape, "--shape"), numbers(block, "--block")
    with shown("give the same command with --overwrite to begin anew") as progress:
        write_synthetic(out.rstrip("/"), *sizes, seed=seed, overwrite=overwrite, progress=progress)
    truth = f"{out.rstrip('/')}/labels/truth"
    emit(f"image    {out}\ntruth    {truth}", {"image": out, "truth": truth})


def evaluate(
    pred: Annotated[str, typer.Argument(help="A run, or a volume of labels.")],
    truth: Annotated[str, typer.Argument(help="A volume of labels, a 0/255 mask, or a table of points (.csv).")],
    box: Annotated[str, typer.Option("--box", metavar="z0:z1,y0:y1,x0:x1", help="Score only this part.")] = "",
    distance_nm: Annotated[
        float | None,
        typer.Option(
            "--distance-nm", help="How far an object's center may lie from its point; two radii if not given."
        ),
    ] = None,
    report: Annotated[
        str,
        typer.Option(
            "--report", metavar="PAGE.html", help="Also write a page: each object that is wrong, with pictures."
        ),
    ] = "",
    image: Annotated[str, typer.Option("--image", help="What its pictures show; of a run its own volume.")] = "",
) -> None:
    """Score labels against the truth: foreground and instances; or a run's objects against points: detections."""
    of_points = truth.lower().endswith(".csv")
    if of_points and (report or image):
        raise UserError(
            f"{truth} holds points, of which there is no page; leave out --{'report' if report else 'image'}"
        )
    if distance_nm is not None and not of_points:
        raise UserError(f"--distance-nm is for a table of points (.csv), and {truth} is none; leave it out")
    if of_points:
        from volseg.evaluation.detection import evaluate_points

        found = evaluate_points(pred, truth, box=box or None, distance_nm=distance_nm)
        emit(str(found), found.to_json())
        _tell_roi(pred, box)
        return
    from volseg.evaluation.evaluate import evaluate as score

    scores = score(pred, truth, box=box or None, report=report or None, image=image or None)
    emit(str(scores), scores.to_json())
    if not scores.instances.truth_objects:
        note(f"{truth} holds no object here, so most of these scores say nothing")
    _tell_roi(pred, box)


def _tell_roi(pred: str, box: str) -> None:
    """Tells what part of a volume a run did, where all of it was scored."""
    from volseg.evaluation.evaluate import read_roi

    if not box and (roi := read_roi(pred)):
        note(f"{pred} did only {roi}, all else counts as missed; --box {roi} scores that part")
