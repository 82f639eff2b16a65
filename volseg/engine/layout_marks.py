"""What a run's folder tells of single blocks: which are done, what they were made from, and which were given up."""

from __future__ import annotations

import json
from dataclasses import dataclass

from volseg.engine.stored import record_known
from volseg.io import files


@dataclass(frozen=True)
class BlockMarks:
    """The stamps, markers and failures of the run at ``path``; part of its `layout.Layout`."""

    path: str

    # ---- stamps: what each block of labels was made from

    def read_stamp(self, stage: str, i: int, *, check: bool = True) -> str:
        """What the block was made from; ``""`` where nobody knows or, to ``check``, a file is not what was written then."""
        try:
            made_from, written = json.loads(files.read_bytes(self.path, f"work/stamps/{stage}/{i}"))
            return "" if check and not all(self.fits(*item) for item in written.items()) else made_from
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return ""

    def write_stamp(self, stage: str, i: int, made_from: str, written: dict[str, list]) -> None:
        """What the block was made from, and the fingerprints of its files."""
        files.write_bytes(self.path, f"work/stamps/{stage}/{i}", json.dumps([made_from, written]).encode())

    def record_stamped(self, stage: str, i: int) -> None:
        """The files of the block, as its stamp has them, count as written in `stored.recording`."""
        record_known(json.loads(files.read_bytes(self.path, f"work/stamps/{stage}/{i}"))[1])

    def fits(self, key: str, mark: list) -> bool:
        """Whether the file still has that fingerprint."""
        try:
            return files.fingerprint(self.path, key) == mark
        except (OSError, ValueError):  # ValueError: what is no name of a file
            return False

    # ---- markers

    def marker_key(self, stage: str, name: str) -> str:
        return f"work/markers/{stage}/{name}.json"

    def markers(self, stage: str) -> list[str]:
        """Names of a stage's markers."""
        keys = files.list_keys(self.path, f"work/markers/{stage}")
        return [key.rpartition("/")[2].removesuffix(".json") for key in keys if key.endswith(".json")]

    def read_marker(self, stage: str, name: str) -> dict:
        """Raises `ValueError` where it is not as it was written, or is another block's."""
        receipt = json.loads(files.read_bytes(self.path, self.marker_key(stage, name)))
        if receipt.pop("checksum", "") != marker_checksum(stage, name, receipt):
            raise ValueError("damaged marker")
        return receipt

    def write_marker(self, stage: str, name: str, receipt: dict) -> None:
        plain = {**receipt, "checksum": marker_checksum(stage, name, receipt)}
        files.write_bytes(self.path, self.marker_key(stage, name), json.dumps(plain).encode())

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


def marker_checksum(stage: str, name: str, receipt: dict) -> str:
    return files.checksum(f"{stage}/{name} {json.dumps(receipt)}".encode())
