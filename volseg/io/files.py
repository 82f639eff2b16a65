"""Files and objects by their path: one face for local folders and fsspec URLs such as ``s3://bucket/key``."""

from __future__ import annotations

import ctypes
import difflib
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c

from volseg.errors import UserError
from volseg.io import remote
from volseg.io.header import decoding, reason

# ------------------------------------------------------------------------------------------------------------- paths


def is_remote(path: str | Path) -> bool:
    """Whether ``path`` is an fsspec URL such as ``s3://bucket/key`` and not a local path."""
    return "://" in str(path) and not str(path).startswith("file://")


def absolute(path: str | Path) -> str:
    path = str(path)
    return path.rstrip("/") if is_remote(path) else os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def path_of(place: str | os.PathLike | Any) -> str:
    """A path as text, or that of an object that has it as ``path``, such as a run.

    >>> path_of(Path("em.volseg.zarr"))
    'em.volseg.zarr'
    """
    return os.fspath(getattr(place, "path", place)).rstrip("/")


def join(path: str | Path, *keys: str) -> str:
    return "/".join(part for part in (absolute(path), join_keys(*keys)) if part)


def join_keys(*keys: str) -> str:
    """
    >>> join_keys("", "/labels/", "0")
    'labels/0'
    """
    return "/".join(part for key in keys if (part := key.strip("/")))


_ZARR_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.partial$")
HEADER_BLOCK, HEADER_BLOCKS = 1 << 14, 1 << 10  # bytes of a remote file that are fetched at once, and how often kept
FETCH = "fetch the file (git annex get, git lfs pull), or copy it again"


def suggestions(path: str) -> str:
    """`` (did you mean ...?)`` from the names beside a path that does not exist."""
    folder, name = os.path.split(path)
    if os.path.islink(path):
        return f"; it is a link to {os.readlink(path)}, which is not there: {FETCH}"
    if not os.path.isdir(folder):
        return f"; there is no folder {folder}"
    near = difflib.get_close_matches(name, os.listdir(folder), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; {folder} holds nothing of that name"


def refuse_pointer(path: str) -> None:
    """Refuses the small text that git annex and git lfs leave where a file was not fetched."""
    if os.path.getsize(path) < 1024:
        with decoding(path), open_binary(path) as file:
            start = file.read(64)
        if start.startswith((b"/annex/objects/", b"version https://git-lfs")):
            raise UserError(f"{path} is a pointer to a file that is not there; {FETCH}")


def stamp(path: str) -> tuple[int, int, int]:
    """Changes when the file at ``path`` does, so that a cached handle is not used for another file; not for a URL."""
    if is_remote(path):
        return 0, 0, 0
    with decoding(path):
        status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino


def open_binary(path: str) -> Any:
    """The file at ``path``, to be read in small pieces; of a URL, `HEADER_BLOCK` bytes are fetched at a time."""
    if not is_remote(path):
        return Path(path).open("rb")
    with answering(path):
        fs, root = _remote(path)
        kept = {"maxblocks": HEADER_BLOCKS}
        return fs.open(root, "rb", block_size=HEADER_BLOCK, cache_type="blockcache", cache_options=kept)


def size(path: str) -> int:
    """Bytes of the file at ``path``."""
    if not is_remote(path):
        return os.path.getsize(path)
    with answering(path):
        fs, root = _remote(path)
        return fs.size(root)


def read_range(path: str, offset: int, count: int) -> bytes:
    """``count`` bytes of the file at ``path``, or those before its end; of a URL, no others are fetched."""
    if is_remote(path):
        with answering(path):
            fs, root = _remote(path)
            return fs.cat_file(root, start=offset, end=offset + count)
    with open_binary(path) as file:
        file.seek(offset)
        return file.read(count)


# ------------------------------------------------------------------------------------------------- files and objects


@lru_cache(maxsize=1)
def generation() -> str:
    """Another name whenever this process has removed or moved something: what is cached under an older one may be gone."""
    return uuid.uuid4().hex


def _remote(path: str) -> tuple[Any, str]:
    """The filesystem of a URL, with nothing remembered about what others may have changed, and the path in it."""
    fs, root = remote.filesystem(path)
    fs.invalidate_cache()
    return fs, root


@contextmanager
def answering(path: str | Path) -> Iterator[None]:
    """Inside, whatever the client of a store raises is an `OSError` that names ``path``, as local files have it."""
    if not is_remote(path):
        yield
        return
    try:
        yield
    except (UserError, FileNotFoundError, FileExistsError, PermissionError):
        raise
    except Exception as error:  # of botocore, aiohttp and others, each with errors of its own
        number = errno.EACCES if remote.denies(error) else getattr(error, "errno", None) or errno.EIO
        raise OSError(number, getattr(error, "strerror", None) or reason(error), str(path)) from error


def exists(path: str | Path) -> bool:
    """Whether a file, folder or remote prefix is there."""
    path = absolute(path)
    if not is_remote(path):
        return os.path.exists(path)
    try:
        with answering(path):
            fs, root = _remote(path)
            return fs.exists(root)
    except PermissionError as error:
        raise UserError(f"the store refuses {path} ({reason(error)}); {remote.advice(path)}") from None


def stored_bytes(path: str | Path) -> int:
    """Bytes of all objects under ``path``; 0 where there is none."""
    path = absolute(path)
    if is_remote(path):
        with answering(path):
            fs, root = _remote(path)
            return sum(entry["size"] for entry in fs.find(root, detail=True).values())
    found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names if not _temporary(name))
    return sum(os.path.getsize(file) for file in found if os.path.exists(file))


def remove(path: str | Path) -> None:
    """Nothing is at ``path`` any more; it may not have been there."""
    path = absolute(path)
    generation.cache_clear()
    if is_remote(path):
        with answering(path):
            fs, root = _remote(path)
            if fs.exists(root):
                fs.rm(root, recursive=True)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def move(source: str | Path, target: str | Path) -> None:
    """What was at ``source`` is at ``target``, which must not be a folder with content. Atomic where local."""
    source, target = absolute(source), absolute(target)
    generation.cache_clear()
    if is_remote(source):
        with answering(source):
            (fs, root), (_, goal) = _remote(source), _remote(target)
            for key in fs.find(root):
                fs.cp_file(key, goal + key[len(root) :])
            fs.rm(root, recursive=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(source, target)


def read_bytes(path: str, key: str) -> bytes:
    """The object ``key`` under ``path``; FileNotFoundError where there is none."""
    where = join(path, key)
    if not is_remote(where):
        return Path(where).read_bytes()
    with answering(where):
        fs, root = _remote(where)
        return fs.cat_file(root)


def write_bytes(path: str, key: str, data: bytes | memoryview, *, durable: bool = False) -> None:
    """The object ``key`` under ``path`` is ``data``: readers see the old bytes or the new ones, never a part.

    Where it is to be ``durable``, that holds after a power cut, too.
    """
    where = join(path, key)
    if is_remote(where):
        with answering(where):
            fs, root = _remote(where)
            fs.pipe_file(root, bytes(data))
        return
    os.makedirs(os.path.dirname(where), exist_ok=True)
    write_atomic(where, data, durable=durable)


def write_atomic(path: str | Path, data: bytes | memoryview, *, durable: bool = False) -> None:
    """The local file at ``path`` is ``data``: whoever reads it, also after a kill, sees the old bytes or the new ones.

    Parameters
    ----------
    path
        In a folder that exists.
    data
        All bytes of the file.
    durable
        Wait until the bytes are on the disk, so that a power cut cannot lose both files.

    Raises
    ------
    OSError
        The file cannot be written; the old one, if any, is still there, and nothing else.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")  # `_temporary` knows it
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise


def list_keys(path: str, prefix: str = "") -> list[str]:
    """Keys under ``path`` of the objects in folder ``prefix`` (or of that one object), sorted; none is no error."""
    base, where = absolute(path), join(path, prefix)
    if is_remote(where):
        with answering(where):
            fs, root = _remote(where)
            start = len(_remote(base)[1].rstrip("/")) + 1
            return sorted(key[start:] for key in fs.find(root))
    if os.path.isfile(where):
        return [os.path.relpath(where, base).replace(os.sep, "/")]
    walked = ((folder, name) for folder, _, names in os.walk(where) for name in names if not _temporary(name))
    return sorted(os.path.relpath(os.path.join(*pair), base).replace(os.sep, "/") for pair in walked)


def names(path: str) -> list[str]:
    """Names of what lies directly in the folder at ``path``; none is no error."""
    if not is_remote(path):
        return os.listdir(path) if os.path.isdir(path) else []
    with answering(path):
        fs, root = _remote(path)
        return [key.rstrip("/").rpartition("/")[2] for key in fs.ls(root, detail=False)] if fs.exists(root) else []


def holds_files(path: str) -> bool:
    """Whether any file lies in the local folder at ``path`` or below, but temporary ones."""
    return any(not _temporary(name) for _, _, names in os.walk(path) for name in names)


def remove_temporary(path: str) -> None:
    """What writers that were killed left in the local folder at ``path`` is gone; nobody writes there."""
    if is_remote(path):
        return
    for folder, _, found in os.walk(path):
        for name in filter(_temporary, found):
            Path(folder, name).unlink(missing_ok=True)


def _temporary(name: str) -> bool:
    """Whether the name is that of a file which `write_atomic`, or zarr's local store, has not finished."""
    return (name.startswith(".") and name.endswith(".tmp")) or _ZARR_TEMPORARY.search(name) is not None


# ------------------------------------------------------------------------------------------------------- on the disk


def fingerprint(path: str, key: str) -> list:
    """What tells whether the object ``key`` under ``path`` is still what it is now: its size, and CRC-32C or ETag.

    Raises FileNotFoundError where there is none.
    """
    where = join(path, key)
    if is_remote(where):
        with answering(where):
            fs, root = _remote(where)
            entry = fs.info(root)
        return _entry_fingerprint(entry)
    checksum, size = google_crc32c.Checksum(), 0
    with Path(where).open("rb") as file:
        while piece := file.read(1 << 20):
            checksum.update(piece)
            size += len(piece)
    return [size, checksum.hexdigest().decode()]


def dated_fingerprint(path: str, key: str) -> list:
    """`fingerprint`, and of a local file the time of its last change, in ns."""
    mark = fingerprint(path, key)
    return mark if is_remote(path) else [*mark, os.stat(join(path, key)).st_mtime_ns]


def has_date(path: str, key: str, mark: list) -> bool:
    """Whether the file has the size and the time of that `dated_fingerprint`; False where the mark has no time."""
    if len(mark) < 3:
        return False
    try:
        status = os.stat(f"{path}/{key}")
    except (OSError, ValueError):
        return False
    return [status.st_size, status.st_mtime_ns] == [mark[0], mark[2]]


def listed_fingerprints(path: str, folder: str) -> dict[str, list]:
    """What `fingerprint` tells of each object that lies directly in a folder of an object store, by key: a thousand come with
    one request."""
    where = join(path, folder)
    with answering(where):
        fs, root = _remote(where)
        try:
            entries = fs.ls(root, detail=True)
        except FileNotFoundError:
            return {}
    stored = (entry for entry in entries if entry["type"] == "file")
    return {join_keys(folder, entry["name"].rpartition("/")[2]): _entry_fingerprint(entry) for entry in stored}


def _entry_fingerprint(entry: dict) -> list:
    return [entry["size"], str(entry.get("ETag", entry.get("etag", ""))).strip('"')]


def checksum(data: bytes) -> str:
    """CRC-32C of ``data``, in hexadecimal digits.

    >>> checksum(b"123456789")
    'e3069283'
    """
    return google_crc32c.Checksum(data).hexdigest().decode()


def sync_filesystem(path: str) -> None:
    """All that was written so far on the file system of the local folder ``path`` is on its disk; nothing on object stores."""
    if is_remote(path):
        return
    if sys.platform == "linux":
        folder = os.open(absolute(path), os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(folder):
                raise OSError(ctypes.get_errno(), "cannot write to the disk", path)
        finally:
            os.close(folder)
    else:
        os.sync()


def sync_files(path: str, keys: Iterable[str]) -> None:
    """These files under ``path``, and their names in their folders, are on the disk; nothing on object stores."""
    if is_remote(path):
        return
    places = [join(path, key) for key in keys]
    for place in [*places, *dict.fromkeys(map(os.path.dirname, places))]:
        file = os.open(place, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def create_bytes(path: str, key: str, data: bytes) -> bool:
    """The object ``key`` under ``path`` is ``data``, all at once, if there was none; whether there was none."""
    where = join(path, key)
    if not is_remote(where):
        return _create_file(Path(where), data)
    try:
        with answering(where):
            fs, root = _remote(where)
            fs.pipe_file(root, data, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
            return False
        raise
    return True


def _create_file(path: Path, data: bytes) -> bool:
    """The same of a local file: made beside it, then linked to its name, which fails where there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")  # `_temporary` knows it
    try:
        temporary.write_bytes(data)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True
