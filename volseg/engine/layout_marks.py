"""What a run's folder tells of single blocks: which are done, what they were made from, and which were given up."""

from __future__ import annotations

import json
from dataclasses import dataclass

from volseg.engine.stored import record_known, subfolder
from volseg.io import files


@dataclass(frozen=True)
class BlockMarks:
    """The stamps, markers and failures of the run at ``path``; part of its `layout.Layout`."""

    path: str

    # ---- stamps: what each block of labels was made from

    def read_stamp(self, stage: str, i: int, *, check: bool = True) -> str:
        """What the block was made from; ``""`` where nobody knows or, to ``check``, a file is not what was written then."""
        try:
            made_from, written = json.loads(files.read_bytes(self.path, self._stamp_key(stage, i)))
            return "" if check and not all(self.unchanged(*item) for item in written.items()) else made_from
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return ""

    def write_stamp(self, stage: str, i: int, made_from: str, written: dict[str, list]) -> None:
        """What the block was made from, and the fingerprints of its files."""
        files.write_bytes(self.path, self._stamp_key(stage, i), json.dumps([made_from, written]).encode())

    def record_stamped(self, stage: str, i: int) -> None:
        """The files of the block, as its stamp has them, count as written in `stored.recording`."""
        record_known(json.loads(files.read_bytes(self.path, self._stamp_key(stage, i)))[1])

    def _stamp_key(self, stage: str, i: int) -> str:
        return f"work/stamps/{stage}/{subfolder(i)}{i}"

    def fits(self, key: str, mark: list) -> bool:
        """Whether the file still has that fingerprint."""
        try:
            return files.fingerprint(self.path, key) == mark[:2]
        except (OSError, ValueError):  # ValueError: what is no name of a file
            return False

    def unchanged(self, key: str, mark: list) -> bool:
        """As `fits`; but a file with the size and the time of its fingerprint is not read."""
        return files.has_date(self.path, key, mark) or self.fits(key, mark)

    # ---- markers

    def marker_key(self, stage: str, name: str) -> str:
        return f"work/markers/{stage}/{name}.json"

    def markers(self, stage: str) -> list[str]:
        """Names of a stage's markers."""
        keys = files.list_keys(self.path, f"work/markers/{stage}")
        return [key.rpartition("/")[2].removesuffix(".json") for key in keys if key.endswith(".json")]

    def read_marker(self, stage: str, name: str) -> dict:
        """Raises `ValueError` where it is not as it was written, or is another block's."""
        text = files.read_bytes(self.path, self.marker_key(stage, name))
        body = b"{" + text[MARKER_HEAD:]
        if text[:MARKER_HEAD] != _marker_head(stage, name, body):
            raise ValueError("damaged marker")
        return json.loads(body)

    def write_marker(self, stage: str, name: str, plain: dict) -> None:
        """``plain``, which is not empty, is what the marker says."""
        files.write_bytes(self.path, self.marker_key(stage, name), marker_text(stage, name, plain))

    def remove_marker(self, stage: str, name: str) -> None:
        files.remove(f"{self.path}/{self.marker_key(stage, name)}")

    def remove_markers(self, stage: str) -> None:
        files.remove(f"{self.path}/work/markers/{stage}")

    @property
    def failures_path(self) -> str:
        return f"{self.path}/work/failed.json"

    def save_failures(self, failures: list[dict]) -> None:
        """The blocks that were given up: stage and its key, block, box, worker, reason and traceback of each."""
        files.write_bytes(self.path, "work/failed.json", json.dumps({"failed": failures}, indent=1).encode())

    def load_failures(self) -> list[dict]:
        """What `save_failures` was given last; nothing where that is not there, or nobody can read it."""
        try:
            return [dict(failure) for failure in json.loads(files.read_bytes(self.path, "work/failed.json"))["failed"]]
        except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
            return []

    def remove_failures(self) -> None:
        files.remove(self.failures_path)


def marker_text(stage: str, name: str, plain: dict) -> bytes:
    """What the marker of that name holds: ``plain``, which is not empty, and its checksum."""
    body = json.dumps(plain, separators=(",", ":")).encode()
    return _marker_head(stage, name, body) + body[1:]


def _marker_head(stage: str, name: str, body: bytes) -> bytes:
    """How a marker begins that says ``body``, a JSON object: its checksum is the first of the object's values."""
    return b'{"checksum":"%s",' % files.checksum(f"{stage}/{name} ".encode() + body).encode()


MARKER_HEAD = len(_marker_head("", "", b""))
