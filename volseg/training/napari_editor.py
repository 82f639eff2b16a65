"""Suggested sections in napari: looked at, corrected, and saved over their files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from volseg.io import slices, suggested
from volseg.io.suggested import Item


def edit(folder: str | Path) -> list[str]:
    """Show the sections of a folder in napari until its window is closed; returns the names of those that were changed, which
    are saved then."""
    import napari

    queue = suggested.read_queue(folder)
    items, images, labels = read_stacks(folder)
    viewer = napari.Viewer(title=f"volseg suggest: {folder}")
    viewer.add_image(images, name="image")
    layer = viewer.add_labels(labels.copy(), name="labels")
    names = [f"{i + 1} of {len(items)}: {item.name}, {queue.image}" for i, item in enumerate(items)]
    corners = np.array([(i, 0, 0) for i in range(len(items))], float)
    viewer.add_points(
        corners, name="queue", size=1, features={"section": names}, text={"string": "{section}", "anchor": "upper_left"}
    )
    viewer.layers.selection.active = layer
    napari.run()
    return save_changed(folder, items, labels, np.asarray(layer.data))


def read_stacks(folder: str | Path) -> tuple[list[Item], np.ndarray, np.ndarray]:
    """The items of a folder that have a file of labels, their images, and their labels as stacks (item, y, x); windows that
    are smaller than others are filled up with 0."""
    files_of = suggested.label_files(folder)
    items = [item for item in suggested.read_queue(folder).items if item.name in files_of]
    planes = [slices.plane(os.path.join(folder, suggested.IMAGES, f"{item.name}.tif")) for item in items]
    labels = [suggested.read_labels(files_of[item.name], item) for item in items]
    return items, _stack(planes), _stack(labels)


def _stack(planes: list[np.ndarray]) -> np.ndarray:
    shape = tuple(max(plane.shape[axis] for plane in planes) for axis in (0, 1))
    out = np.zeros((len(planes), *shape), np.result_type(*planes))
    for row, plane in zip(out, planes, strict=True):
        row[: plane.shape[0], : plane.shape[1]] = plane
    return out


def save_changed(folder: str | Path, items: list[Item], before: np.ndarray, after: np.ndarray) -> list[str]:
    """Write the labels of those items that differ over their files; returns their names."""
    changed, size = [], suggested.read_queue(folder).voxel_size_nm
    files_of = suggested.label_files(folder)
    for item, old, new in zip(items, before, after, strict=True):
        rows, columns = item.box.shape[1:]
        if (old != new)[:rows, :columns].any():
            path = Path(files_of[item.name])
            suggested.write_plane(path.with_suffix(".tif"), suggested.fitting_labels(new[:rows, :columns]), size)
            if path.suffix != ".tif":
                path.unlink()
            changed.append(item.name)
    return changed
