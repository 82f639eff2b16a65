"""Whether a finished run is still what was written: the fingerprint of each of its files, in a manifest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from volseg.engine.layout import Layout
from volseg.engine.receipts import PACK, Markers
from volseg.engine.run import Run
from volseg.engine.stages import stages_of
from volseg.errors import DamagedFileError
from volseg.io import files, tables


def write_manifest(layout: Layout, known: dict[str, list]) -> list:
    """The manifest names every file of the run with its fingerprint; those that are ``known`` are not read again.

    Returns its own, which ``run.json`` holds.
    """
    keys = [key for key in files.list_keys(layout.path) if layout.in_manifest(key)]

    def mark(key: str) -> list:
        return known[key][:2] if key in known else files.fingerprint(layout.path, key)

    with ThreadPoolExecutor(tables.IO_THREADS) as pool:
        return layout.save_manifest(dict(zip(keys, pool.map(mark, keys), strict=True)))


def damaged_files(path: str) -> list[str]:
    """Keys of the files of the finished run at ``path`` that are missing or not what was written.

    The work folder may have been cleaned. Raises `UserError` where there is no finished run.
    """
    layout = Layout(path)
    try:
        summary = layout.load_summary()
    except DamagedFileError as error:
        if not layout.begun:
            raise
        return list(error.keys)
    if not layout.fits(layout.MANIFEST, summary.get("manifest_mark", [])):
        return [layout.MANIFEST]
    marks = layout.load_manifest()
    if not layout.begun:  # cleaned
        marks = {key: mark for key, mark in marks.items() if not layout.in_work(key)}
    with ThreadPoolExecutor(tables.IO_THREADS) as pool:
        fits = pool.map(lambda item: layout.fits(*item), marks.items())
        damaged = [key for key, fit in zip(marks, fits, strict=True) if not fit]
    return damaged + (_damaged_markers(layout, summary) if layout.begun else [])


def _damaged_markers(layout: Layout, summary: dict) -> list[str]:
    """Keys of the markers that nobody can read, or that are missing of blocks that are done."""
    run = replace(Run.from_json(summary), out=layout.path)
    stored, found = Markers(layout.path, summary["keys"]), []
    for stage in (stage for stage in stages_of(run).values() if stage.name in summary["keys"]):  # others are newer
        ending = f"-{summary['keys'][stage.name]}"
        names = [name for name in layout.markers(stage.name) if name.endswith(ending) and not name.startswith(PACK)]
        if stage.group in ("basins", "labels") and stage.name not in run.passes:
            names = [f"{i}{ending}" for i in stage.part.numbers]
        done = {f"{i}{ending}" for i in stored.receipts(stage.name)}
        found += [layout.marker_key(stage.name, name) for name in names if name not in done]
    return found
