"""Labels as people make them, on the grid of their image: volumes, folders of the annotated sections, drawn regions, points."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from volseg.box import Box
from volseg.errors import UserError, printable
from volseg.io import files, numbering, points, regions, slices, suggested, tensorstore, tiff, volume, zarr
from volseg.io.header import shape_text
from volseg.io.volume import Volume

OVERLAY, VOXELS = "::/overlay", "::/voxels"  # what of a TIFF file is meant


@dataclass(frozen=True, eq=False)
class Annotation:
    """What was annotated of an image.

    Attributes
    ----------
    path
        Where the labels are.
    form
        "volume", "sections" (a folder of the annotated ones), "regions" (drawn outlines), "points" or "suggested" (a folder
        of `volseg suggest`).
    depth
        Sections of the image.
    sections
        The sections (from 0) that hold annotation; None where all may.
    notes
        What was decided when they were opened, a line each.
    read
        Gives the labels of consecutive sections, ``read(start, stop)``: integers (z, y, x), 0 where there is no annotation.
    unlabeled
        Value of voxels that nobody annotated, where the form has one.
    """

    path: str
    form: str
    depth: int
    sections: tuple[int, ...] | None
    read: Callable[[int, int], np.ndarray]
    notes: tuple[str, ...] = ()
    unlabeled: int | None = None


def open_annotation(
    path: str | Path,
    image: Volume,
    *,
    first_number: int | None = None,
    part: tuple[slice, slice] | None = None,
    radius_nm: float | None = None,
) -> Annotation:
    """The labels at ``path`` of an image; reads headers, and outlines where there are some.

    Parameters
    ----------
    path
        A volume of the image's shape; a folder of slices that hold the annotated sections alone, named by their numbers; a
        folder of suggested sections, of which those count that were corrected; a file of ImageJ's regions (``.roi``,
        ``.zip``), napari's shapes (``.csv``) or points (``.csv``, see `points.read`); or a TIFF file with an overlay, which
        is meant where the file is the image itself, or ``::/overlay`` follows its name.
    image
        What the labels belong to.
    first_number
        Of a folder, the number in its names that the image's first section has; None where that is to be decided, see
        `numbering.sections`.
    part
        Rows and columns that ``read`` is to give; None for all.
    radius_nm
        Of points, the radius of their balls where their table gives none.

    Raises
    ------
    UserError
        The labels are damaged, do not fit the image, or it is not clear which sections they belong to.
    """
    if folder := suggested.folder_of(files.absolute(str(path))):
        found, part = _suggested(folder, image, part), None
    else:
        found = _opened(path, image, first_number, radius_nm)
    _check_given(found, first_number, radius_nm)
    if part is None:
        return found
    return replace(found, read=lambda start, stop: found.read(start, stop)[:, *part])


def _opened(path: str | Path, image: Volume, first_number: int | None, radius_nm: float | None) -> Annotation:
    """The labels at ``path``, but for suggested sections."""
    place = files.absolute(str(path))
    if place.endswith(VOXELS):
        return _volume(place.removesuffix(VOXELS), image)
    if place.endswith(OVERLAY):
        return _overlay(place.removesuffix(OVERLAY), image)
    if files.is_remote(place):
        return _volume(place, image)
    if os.path.isfile(place) and points.is_points(place):
        return _points(place, image, radius_nm)
    if os.path.isfile(place) and regions.is_regions(place) and not _is_zarr_zip(place):
        return _regions(place, image, *regions.read(place))
    is_tiff = os.path.isfile(place) and place.lower().endswith(tiff.SUFFIXES) and os.path.getsize(place) > 0
    if is_tiff and (count := len(regions.overlay(place))):
        if _same(place, image):
            return _overlay(place, image)
        raise UserError(
            f"{path} holds voxels and {count} regions that were drawn over them, and either may be the labels; give "
            f"{path}{VOXELS} or {path}{OVERLAY}"
        )
    if os.path.isdir(place) and not zarr.is_zarr(place) and not tensorstore.kind(place):
        names = slices.slice_names(place)
        if not names:
            raise UserError(f"folder {path} of labels holds no .tif, .png or .jpg slices; give the one that does")
        if len(names) != image.shape[0] or first_number is not None:
            return _sections(place, names, image, first_number)
    return _volume(place, image)


def _check_given(found: Annotation, first_number: int | None, radius_nm: float | None) -> None:
    """Refuses what was given for another form of labels: it would have no effect."""
    if first_number is not None and found.form != "sections":
        raise UserError(
            f"first_number = {first_number} is for a folder that holds the annotated sections, and {found.path} is none; "
            "leave it out"
        )
    if radius_nm is not None and found.form != "points":
        raise UserError(f"radius_nm = {radius_nm:g} is for a table of points, and {found.path} is none; leave it out")


def _same(place: str, image: Volume) -> bool:
    return not files.is_remote(image.path) and os.path.samefile(place, image.path)


def _is_zarr_zip(place: str) -> bool:
    """Whether a zip file holds a zarr and no regions."""
    if not place.lower().endswith(".zip"):
        return False
    try:
        volume.open(place)
    except UserError:
        return False
    return True


def _volume(place: str, image: Volume) -> Annotation:
    label = volume.open(place)
    if label.shape != image.shape:
        raise UserError(
            f"image {image.path} has shape {shape_text(image.shape)} z y x, label {place} has {shape_text(label.shape)}; give "
            "labels of the image's shape, or a folder of its annotated sections, named by their numbers"
        )

    def read(start: int, stop: int) -> np.ndarray:
        return label.read(Box((start, 0, 0), (stop, *image.shape[1:])))

    return Annotation(place, "volume", image.shape[0], None, read, label.notes)


def _sections(place: str, names: list[str], image: Volume, first_number: int | None) -> Annotation:
    """A folder that holds the annotated sections alone."""
    depth, *plane = image.shape
    image_names = slices.slice_names(image.path) if image.kind == "slices" else ()
    if len(names) > depth:
        raise UserError(
            f"folder {place} holds {len(names)} slices, but the image {image.path} has {depth} sections; move away what does "
            "not belong to it"
        )
    found, how = numbering.sections(names, place, depth, image_names=image_names, first_number=first_number)
    held = {z: os.path.join(place, name) for z, name in zip(found, names, strict=True)}
    for file in held.values():
        shape = slices.plane_shape(file)
        if shape != tuple(plane):
            raise UserError(
                f"slice {file} is {shape_text(shape)} y x, but sections of {image.path} are {shape_text(plane)}; give labels "
                "of the image's size"
            )

    def read(start: int, stop: int) -> np.ndarray:
        planes = {z: slices.label_plane(held[z]) for z in range(start, stop) if z in held}
        out = np.zeros((stop - start, *plane), np.result_type(np.uint8, *planes.values()))
        for z, labels in planes.items():
            out[z - start] = labels
        return out

    note = printable(f"folder {place} holds {len(names)} of {depth} sections: {how}")
    return Annotation(place, "sections", depth, tuple(sorted(found)), read, (note,))


def _suggested(folder: str, image: Volume, part: tuple[slice, slice] | None) -> Annotation:
    """The sections of `volseg suggest` that were corrected: whole ones, or the windows that ``part`` is."""
    queue, state = suggested.read_queue(folder), suggested.state(folder)
    if queue.shape != image.shape:
        raise UserError(
            f"{folder} has sections of a volume of {shape_text(queue.shape)} z y x voxels ({queue.image}), but {image.path} "
            f"has {shape_text(image.shape)}; give the image that they were suggested of"
        )
    if not state.corrected:
        raise UserError(
            f"nothing in {folder} was corrected: change labels in {suggested.LABELS}/, or name sections that are right as they "
            f"are in {suggested.CHECKED}"
        )
    rows, columns = part or (slice(0, image.shape[1]), slice(0, image.shape[2]))
    held = {item.box.start[0]: (item, file) for item, file in state.corrected if item.box.slices[1:] == (rows, columns)}
    if not held:
        what = (
            f"no corrected window {rows.start}:{rows.stop},{columns.start}:{columns.stop}" if part else "windows alone"
        )
        raise UserError(f"{folder} holds {what}: volseg train CONFIG --add {folder} takes all that are corrected")

    def read(start: int, stop: int) -> np.ndarray:
        planes = {z: suggested.read_labels(*reversed(held[z])) for z in range(start, stop) if z in held}
        shape = (stop - start, rows.stop - rows.start, columns.stop - columns.start)
        out = np.zeros(shape, np.result_type(np.uint8, *planes.values()))
        for z, labels in planes.items():
            out[z - start] = labels
        return out

    note = f"{folder}: {len(held)} corrected sections ({', '.join(item.name for item, _ in held.values())})"
    notes = tuple(map(printable, (note, *state.notes(folder))))
    unlabeled = suggested.UNKNOWN
    return Annotation(folder, "suggested", image.shape[0], tuple(sorted(held)), read, notes, unlabeled)


def _overlay(place: str, image: Volume) -> Annotation:
    found = regions.read_overlay(place)
    return replace(_regions(place, image, *found), path=f"{place}{OVERLAY}")


def _regions(place: str, image: Volume, drawn: list[regions.Region], notes: tuple[str, ...]) -> Annotation:
    """Regions that were drawn; all that lies outside them in their sections is background."""
    depth, *plane = image.shape
    beyond = next((region for region in drawn if region.section >= depth), None)
    if beyond:
        raise UserError(
            f"region {beyond.name} of {place} lies in section {beyond.section + 1} (from 1), but the image {image.path} has "
            f"{depth}; are these regions of another image?"
        )
    ids = regions.objects(drawn, tuple(plane))
    by_section: dict[int, list[int]] = {}
    for i, region in enumerate(drawn):
        by_section.setdefault(region.section, []).append(i)

    def read(start: int, stop: int) -> np.ndarray:
        out = np.zeros((stop - start, *plane), np.uint32)
        for z in range(start, stop):
            own = by_section.get(z, ())
            out[z - start] = regions.paint([drawn[i] for i in own], [ids[i] for i in own], tuple(plane))
        return out

    note = printable(f"{place}: {len(drawn)} regions in {len(by_section)} sections are {len(set(ids))} objects")
    return Annotation(place, "regions", depth, tuple(sorted(by_section)), read, (note, *notes))


def _points(place: str, image: Volume, radius_nm: float | None) -> Annotation:
    """Balls around points; every section counts as looked at."""
    depth, *plane = image.shape
    found = points.read(place, image.shape, image.voxel_size_nm, radius_nm)

    def read(start: int, stop: int) -> np.ndarray:
        return points.balls(found, Box((start, 0, 0), (stop, plane[0], plane[1])))

    return Annotation(place, "points", depth, tuple(range(depth)), read, found.notes)
