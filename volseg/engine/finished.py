"""A finished run, opened to be read: what `volseg.infer`, `volseg.segment` and `volseg.open` return."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.box import Box, Triple
from volseg.config import Config
from volseg.engine import folder, lock
from volseg.engine.layout import Layout
from volseg.engine.run import Run
from volseg.errors import DamagedFileError, UserError
from volseg.io import arrays, files, pictures
from volseg.io.filling import filled_line, lost_line
from volseg.io.resample import Grid

if TYPE_CHECKING:
    import dask.array
    import pandas
    import pyarrow
    import zarr
    from PIL.Image import Image


MAX_BROWSED_WIDTH = 1000  # pixels of a picture in a notebook


@dataclass(frozen=True)
class FinishedRun:
    """A finished run at ``path``.

    Examples
    --------
    >>> run = open_run("em.volseg.zarr")  # doctest: +SKIP
    >>> run.labels[0, :100, :100]  # doctest: +SKIP
    """

    path: str

    @property
    def layout(self) -> Layout:
        return Layout(self.path)

    @cached_property
    def summary(self) -> dict:
        """All that ``run.json`` holds: the description, and what the last command took."""
        return self.layout.load_summary()

    @cached_property
    def run(self) -> Run:
        """The run's description."""
        return Run.from_json({**self.summary, "out": self.path})

    @property
    def config(self) -> Config:
        """Every setting of the run."""
        return self.run.config

    @property
    def shape(self) -> Triple:
        """Voxels along z, y, x."""
        return self.run.output_shape

    @property
    def voxel_size_nm(self) -> tuple[float, float, float]:
        """Size of a voxel along z, y, x, in nm."""
        return self.run.output_voxel_size_nm

    @property
    def origin_nm(self) -> tuple[float, float, float]:
        """Where the center of the first voxel lies in the volume's world, z y x in nm: 0 unless the volume says otherwise.

        Columns of tables in nm count from there, voxels from 0.
        """
        return self.run.output_origin_nm

    # ---- results

    @property
    def labels(self) -> zarr.Array:
        """Instance labels at full resolution: zarr array (z, y, x), uint32 or uint64; 0 is background."""
        return arrays.node(self.path, "labels/instances/0")

    def dask_labels(self, level: int = 0) -> dask.array.Array:
        """Instance labels of one pyramid level as a dask array (z, y, x)."""
        import dask.array

        return dask.array.from_array(arrays.node(self.path, f"labels/instances/{level}"))

    @property
    def probabilities(self) -> zarr.Array:
        """What the network said: zarr array (channel, z, y, x), uint8; 255 is certain. `UserError` where they were dropped."""
        self.run.require_probabilities("FinishedRun.probabilities")
        return arrays.node(self.path, "0")

    @property
    def objects(self) -> pandas.DataFrame:
        """The object table, a row for each label; units stand in the column names."""
        return self.layout.read_columns("objects").to_pandas()

    def objects_arrow(self) -> pyarrow.Table:
        """The object table as an Arrow table."""
        return self.layout.read_columns("objects")

    @property
    def object_count(self) -> int:
        return self.summary["objects"]

    # ---- what it took

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds by stage, from its first block to its last; stages overlap. ``total`` is the command's."""
        return self.summary["seconds"]

    @property
    def plan(self) -> dict:
        """What the run was planned to take; empty where it was not planned."""
        return self.summary.get("plan", {})

    @property
    def actual(self) -> dict:
        """What it took of all that the plan tells, under the same names."""
        return self.summary.get("actual", {})

    def report(self) -> list[str]:
        """What it gave and took, as lines of text."""
        try:
            return self._report()
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            state = f"is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            raise DamagedFileError(self.path, "run.json", state) from None

    def _report(self) -> list[str]:
        facts, voxels = self.summary, self.run.wanted_voxels
        peak = facts["peak_bytes"]
        return [
            *([] if self.object_count else [f"no object: {facts['why_no_object']}"]),
            f"{self.object_count} objects in {voxels / 1e6:.1f} million voxels",
            *([f"corrected by {self.run.corrections}: {self.layout.corrections_path}"] if self.run.corrections else []),
            *(["objects are those of a partition that was given (--partition none)"] if self.run.partition else []),
            *(
                filled_line(where, boxes, "filled_boxes in run.json")
                for where, boxes in facts.get("filled_boxes", {}).items()
            ),
            *([lost_line(self._lost_sections())] if facts.get("lost_sections") else []),
            *_time_lines(facts, voxels),
            f"peak memory {peak['worker'] / 2**30:.2f} GiB in the largest worker, {peak['client'] / 2**30:.2f} GiB in this "
            "process",
        ]

    def _lost_sections(self) -> list[int]:
        """Numbers in the volume as it was given of the sections that were lost."""
        run, lost = self.run, self.summary["lost_sections"]
        if not run.given:
            return lost
        to_given = Grid.between(run.shape, run.voxel_size_nm, run.given.shape, run.given.voxel_size_nm)
        return sorted({int(z) for z in to_given.nearest(0, 0, run.shape[0])[lost]})

    def places(self) -> list[str]:
        """Where its results lie, as lines of text."""
        layout = self.layout
        page = [f"report   {layout.report_path}"] if files.exists(layout.report_path) else []
        return [
            f"labels   {layout.labels_path}",
            f"table    {layout.objects_path}",
            f"picture  {layout.picture_path}",
            *page,
        ]

    # ---- to look at

    def show(self, z: int | None = None, *, box: Box | None = None) -> Image:
        """One section, the source beside its labels, as a picture; the middle one unless ``z`` is given.

        ``box`` shows the part of it within y and x.
        """
        from PIL import Image

        part = box or Box.from_shape(self.shape)
        z = (part.start[0] + part.stop[0]) // 2 if z is None else z
        if not 0 <= z < self.shape[0]:
            raise UserError(f"section {z} is not in the volume; give one from 0 to {self.shape[0] - 1}")
        plane = Box((z, *part.start[1:]), (z + 1, *part.stop[1:]))
        gray = pictures.grayscale(pictures.pictured_volume(self.run.output_source, self.path).read(plane)[0])
        ids = np.asarray(self.labels[plane.slices])[0]
        return Image.fromarray(
            np.concatenate([np.repeat(gray[..., None], 3, -1), pictures.label_overlay(gray, ids)], axis=1)
        )

    def browse(self, sections: int = 24, *, box: Box | None = None) -> Slider:
        """A slider through sections, each the source beside its labels, for a notebook.

        Parameters
        ----------
        sections : int
            How many are drawn, evenly spaced.
        box : Box, optional
            The part to show.

        Returns
        -------
        Slider
            What a notebook shows; it holds the pictures, so it works without the run.
        """
        part = box or Box.from_shape(self.shape)
        first, last = part.start[0], part.stop[0] - 1
        shown = np.unique(np.linspace(first, last, max(1, min(sections, last - first + 1))).round().astype(int))
        return Slider(tuple((int(z), _jpeg(self.show(int(z), box=box))) for z in shown))

    def to_json(self) -> dict[str, Any]:
        """The description and what it took, as plain values for JSON."""
        return self.summary

    def __str__(self) -> str:
        return f"{self.path}: {self.object_count} objects in {' x '.join(map(str, self.shape))} voxels"

    def _repr_html_(self) -> str:
        rows = {
            "objects": f"{self.object_count}",
            "voxels": " x ".join(map(str, self.shape)),
            "voxel size": " x ".join(f"{n:g}" for n in self.voxel_size_nm) + " nm",
            **({"first voxel at": " x ".join(f"{n:g}" for n in self.origin_nm) + " nm"} if any(self.origin_nm) else {}),
            "took": f"{self.seconds['total']:.1f} s",
            "labels": self.layout.labels_path,
            "table": self.layout.objects_path,
        }
        cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
        return f"<b>{html.escape(self.path)}</b><table>{cells}</table>"


@dataclass(frozen=True)
class Slider:
    """Sections to slide through in a notebook: the number of each, and its picture as JPEG."""

    sections: tuple[tuple[int, bytes], ...]

    def _repr_html_(self) -> str:
        middle = len(self.sections) // 2
        pictures = "".join(
            f'<figure style="margin:0"{" hidden" * (i != middle)}><figcaption>section {z}</figcaption>'
            f'<img alt="section {z} and its labels" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"></figure>'
            for i, (z, jpeg) in enumerate(self.sections)
        )
        slide = "this.parentNode.querySelectorAll('figure').forEach((figure, i) => figure.hidden = i != this.value)"
        ends = f'min="0" max="{len(self.sections) - 1}" value="{middle}"'
        return f'<div><input type="range" style="width:300px" aria-label="section" {ends} oninput="{slide}">{pictures}</div>'


def _jpeg(picture: Image) -> bytes:
    """A picture for a notebook, at most `MAX_BROWSED_WIDTH` pixels wide."""
    if picture.width > MAX_BROWSED_WIDTH:
        picture = picture.reduce(-(-picture.width // MAX_BROWSED_WIDTH))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def open_run(path: str) -> FinishedRun:
    """The finished run at ``path``.

    Raises `UserError` where there is none, with what to do about an unfinished one.
    """
    where = folder.absolute(str(path).rstrip("/"))
    if not Layout(where).finished:
        if Layout(folder.partial_path(where)).described:
            what = lock.writer(where) or "is not finished: give the command that began it again"
            raise UserError(f"the run at {where} {what}")
        raise UserError(
            f"{where} is not a finished volseg run (no run.json in it); give a folder that volseg infer made"
        )
    run = FinishedRun(where)
    _ = run.summary  # refuses a folder of another version
    return run


def _time_lines(facts: dict, voxels: int) -> Iterator[str]:
    """Where the time went: by stage as the clock ran, and as shares of what all workers spent."""
    total = facts["seconds"]["total"]
    stages = ", ".join(f"{name} {took:.1f}" for name, took in facts["seconds"].items() if name != "total")
    before = facts.get("share_before", 0.0)
    what = (
        f"{100 * before:.0f} % of the probabilities were there before"
        if before
        else f"{voxels / 1e6 / total:.2f} Mvoxel/s"
    )
    yield f"took {total:.1f} s ({what}): {stages}; stages run side by side"
    worker_seconds = facts["worker_seconds"]
    spent = sum(sum(phases.values()) for phases in worker_seconds.values())
    if spent:
        yield f"workers  {spent:.1f} s: {', '.join(_shares(worker_seconds, spent))}"
    if share := facts["device_share"]:
        waited = 100 * facts.get("data_wait_share", 0.0)
        yield (
            f"device   computed in {100 * share:.0f} % of predict, waited for data in {waited:.1f} %; {facts['queue']:.1f} "
            "blocks waited for a worker on average"
        )


def _shares(worker_seconds: dict[str, dict[str, float]], spent: float) -> Iterator[str]:
    """``predict 80 % (infer 70, blend 5, ...)`` for each stage: the phases of at least one per cent."""
    for stage, phases in worker_seconds.items():
        parts = sorted(((100 * took / spent, name) for name, took in phases.items()), reverse=True)
        large = ", ".join(f"{name} {share:.0f}" for share, name in parts if share >= 1)
        yield f"{stage} {sum(share for share, _ in parts):.0f} %" + f" ({large})" * bool(large)
