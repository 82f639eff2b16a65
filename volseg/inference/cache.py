"""What can be made again, kept in the user's cache: exported and compiled networks, choices of backends, rates for plans."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from volseg.io import files
from volseg.system import private_folder

MAX_FILES_PER_KIND = 32  # files of each kind


def folder() -> Path:
    """Where they lie: ``VOLSEG_CACHE``, else a folder in the user's cache; of a user without a home, a temporary one."""
    told = os.environ.get("VOLSEG_CACHE")
    if told:
        return Path(told)
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return private_folder("cache") if user.startswith("~") else Path(user) / "volseg"


def store(path: Path, made: bytes) -> None:
    """``path``, in the cache, holds that all at once; of its kind (its suffix) only the `MAX_FILES_PER_KIND` written last stay.

    A cache that cannot be written, or a full disk, only costs the next run what it would have saved.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, made)
        alike = sorted(path.parent.glob(f"*{path.suffix}"), key=lambda other: other.stat().st_mtime, reverse=True)
        for old in alike[MAX_FILES_PER_KIND:]:
            old.unlink()
