"""Whether the files of a run still are what was written: by size and time where that says enough, else by checksum."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from volseg.engine.layout import Layout
from volseg.io import files, remote

LISTED = 4  # files in a folder of an object store from which on it is listed, rather than each asked for
LISTINGS = 256  # folders whose listings are held: blocks that were done one after the other lie in few


class FileCheck:
    """Looks at files of the run at ``path``, for many threads at once, until the ``with`` block ends.

    Of an object store whole folders are listed, each once for blocks whose markers lie together. Local files are read to the
    last byte only where size or time differ; without ``dates``, all are.
    """

    def __init__(self, path: str, *, dates: bool = True) -> None:
        self.layout, self.remote = Layout(path), files.is_remote(path)
        self.fits = self.layout.unchanged if dates else self.layout.fits
        self.pool = ThreadPoolExecutor(remote.REQUESTS if self.remote else 1)
        self.listings: OrderedDict[str, Future[dict[str, list]]] = OrderedDict()
        self.lock = threading.Lock()

    def __enter__(self) -> FileCheck:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def damaged(self, marks: dict[str, list]) -> list[str]:
        """Keys of the files that do not fit these fingerprints."""
        if not self.remote:
            return [key for key, mark in marks.items() if not self.fits(key, mark)]
        by_folder: dict[str, list[str]] = {}
        for key in marks:
            by_folder.setdefault(key.rpartition("/")[0], []).append(key)
        asked: list[tuple[str, Future[bool]]] = []
        listed: list[tuple[list[str], Future[dict[str, list]]]] = []
        for folder, keys in by_folder.items():
            if len(keys) < LISTED:
                asked += [(key, self.pool.submit(self.fits, key, marks[key])) for key in keys]
            else:
                listed.append((keys, self._listing(folder)))
        damaged = [key for key, fits in asked if not fits.result()]
        for keys, listing in listed:
            found = listing.result()
            damaged += [key for key in keys if found.get(key) != marks[key][:2]]
        return damaged

    def _listing(self, folder: str) -> Future[dict[str, list]]:
        with self.lock:
            if folder not in self.listings:
                self.listings[folder] = self.pool.submit(files.listed_fingerprints, self.layout.path, folder)
            self.listings.move_to_end(folder)
            while len(self.listings) > LISTINGS:
                self.listings.popitem(last=False)
            return self.listings[folder]
