"""Whether a finished run is still what was written: the fingerprint of each of its files, in a manifest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from volseg.engine.layout import Layout
from volseg.errors import DamagedFileError
from volseg.io import files, tables


def write_manifest(layout: Layout, known: dict[str, list]) -> list:
    """The manifest names every file of the run with its fingerprint; those that are ``known`` are not read again.

    Returns its own, which ``run.json`` holds.
    """
    keys = [key for key in files.list_keys(layout.path) if layout.in_manifest(key)]

    def mark(key: str) -> list:
        return known.get(key) or files.fingerprint(layout.path, key)

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
    if not layout.fits(layout.MANIFEST, summary["manifest_mark"]):
        return [layout.MANIFEST]
    marks = layout.load_manifest()
    if not layout.begun:  # cleaned
        marks = {key: mark for key, mark in marks.items() if not layout.in_work(key)}
    with ThreadPoolExecutor(tables.IO_THREADS) as pool:
        fits = pool.map(lambda item: layout.fits(*item), marks.items())
        return [key for key, fit in zip(marks, fits, strict=True) if not fit]
