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
    out: Annotated[str, typer.Option(help="Where the run goes.")] = "runs/epfl.volseg.zarr",
    workers: Annotated[int, typer.Option(help="0 takes one per core.")] = 0,
) -> None:
    """Time, peak memory and scores of `volseg infer` on the whole EPFL training stack, as a user would type it."""
    from benchmarks import epfl as bench

    bench.measure(image, truth, box, out, workers)


@app.command()
def exact(
    volume: Annotated[str, typer.Option(help="Image to segment; any volume.")] = f"{EPFL}/training.tif",
    sections: Annotated[int, typer.Option(help="How many of its last sections; 0 takes all.")] = 16,
    run: Annotated[str, typer.Option(help="A finished run: cut its stored probabilities anew instead.")] = "",
) -> None:
    """SHA-256 of the labels for several block shapes, worker counts, and a run killed half-way."""
    from benchmarks import exact as bench

    bench.of_run(run) if run else bench.of_volume(volume, sections)


if __name__ == "__main__":
    app()
