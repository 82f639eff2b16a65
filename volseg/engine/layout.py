"""A run's folder: every path in it, and the one reader and writer of each file.

    OUT.zarr/                 OME-Zarr 0.5 group
      LEVEL                   probabilities, uint8, channels z y x, finest first
      labels/instances/LEVEL  labels, finest first
      image/LEVEL             the volume, where a copy was asked for
      tables/                 objects and merges as Parquet and CSV, a histogram of volumes
      overlay.png, review/    pictures
      corrections.json        corrections of objects, where there are some
      partition/              which basins are one object, where that was given
      run.json                what the finished run is and took; written last
      report.html             a page about the run
      log.txt                 what each command said that worked on it
      work/                   all that a restart, or another decision from the same basins, needs

No other module knows a name in this folder, but `layout_marks` those of the marks of blocks. Tables of arrays are NPZ files,
one for each block; arrays are zarr, a shard for each block.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np

from volseg.engine.block_tables import BlockLabels, Destinations, HoleContacts, Joins, Tally, TileParts, Values
from volseg.engine.layout_marks import BlockMarks
from volseg.engine.stored import StoredArray, Tables, load_table, record_written
from volseg.errors import DamagedFileError, UserError
from volseg.io import arrays, files, tables
from volseg.segmentation import constraints, hierarchy, holes, objects, saddles, stitch
from volseg.segmentation.basins import BlockBasins
from volseg.segmentation.partition import Partition

if TYPE_CHECKING:
    import pyarrow

    from volseg.engine.parts import Nothing

FORMAT = 1  # of a run's folder; raised when an older volseg could misread a newer folder, or the other way round
T = TypeVar("T")


def nothing_absent(*index: int | str) -> None:
    """Every block has its table."""


# ---------------------------------------------------------------- the folder


@dataclass(frozen=True)
class Layout(BlockMarks):
    """The folder of a run at ``path``, finished or not."""

    path: str
    nothing: Nothing | None = None  # which blocks have no tables

    # ---- arrays

    @property
    def probabilities(self) -> StoredArray:
        return StoredArray(self.path, "0")

    def probability_level(self, level: int) -> StoredArray:
        """Probabilities at a coarser resolution, for viewers."""
        return StoredArray(self.path, str(level))

    def plane_probabilities(self, stage: str) -> StoredArray:
        """What a pass over planes of one orientation stores until the mean of all passes is there."""
        return StoredArray(self.path, f"work/{stage}")

    def image(self, level: int = 0) -> StoredArray:
        """The volume on the grid of the labels, where a run keeps a copy."""
        return StoredArray(self.path, f"image/{level}")

    @property
    def regions(self) -> StoredArray:
        """The number of each voxel's basin within its block, from 1."""
        return StoredArray(self.path, "work/fragments")

    def labels(self, level: int = 0) -> StoredArray:
        return StoredArray(self.path, f"labels/instances/{level}")

    # ---- tables of blocks

    def _tables(self, pattern: str, kind: type[T], absent: Callable[..., T | None] = nothing_absent) -> Tables[T]:
        return Tables(self.path, f"work/{pattern}.npz", kind, absent)

    @cached_property
    def block_basins(self) -> Tables[BlockBasins]:
        return self._tables("tables/{}", BlockBasins, self.nothing.basins if self.nothing else nothing_absent)

    @cached_property
    def links(self) -> Tables[stitch.Links]:
        return self._tables("links/{}", stitch.Links, self.nothing.links if self.nothing else nothing_absent)

    @cached_property
    def block_holes(self) -> Tables[holes.BlockHoles]:
        return self._tables("holes/{}", holes.BlockHoles)

    @cached_property
    def hole_contacts(self) -> Tables[HoleContacts]:
        return self._tables("hole_contacts/{}", HoleContacts)

    @cached_property
    def block_labels(self) -> Tables[BlockLabels]:
        return self._tables("labels/{}", BlockLabels, self.nothing.labels if self.nothing else nothing_absent)

    @cached_property
    def object_sums(self) -> Tables[objects.ObjectSums]:
        return self._tables("objects/{}", objects.ObjectSums, self.nothing.sums if self.nothing else nothing_absent)

    @cached_property
    def tallies(self) -> Tables[Tally]:
        """Of blocks of labels, where probabilities are dropped."""
        return self._tables("tallies/{}", Tally)

    @cached_property
    def borders(self) -> Tables[saddles.BlockBorders]:
        return self._tables("borders/{}", saddles.BlockBorders)

    @cached_property
    def tile_parts(self) -> Tables[TileParts]:
        """By the key of the stage, the block that infers, the block that takes, and the span of sections."""
        return self._tables("parts/{}-{}-{}-{}", TileParts)

    def remove_tile_parts(self) -> None:
        files.remove(f"{self.path}/work/parts")

    # ---- tables of the volume

    @cached_property
    def joins(self) -> Tables[Joins]:
        """By the key of the stage that decided."""
        return self._tables("merges/{}", Joins)

    @cached_property
    def volume_holes(self) -> Tables[holes.Holes]:
        return self._tables("holes", holes.Holes)

    def save_basins(self, basins: stitch.Basins, key: str) -> None:
        """The volume's basins, and the key of the tables that they were gathered from."""
        tables.save(self.path, "work/basins.npz", **vars(basins), made_from=np.array(key))
        record_written(self.path, ["work/basins.npz"])

    def load_basins(self, key: str | None = None) -> stitch.Basins | None:
        """The volume's basins; None where there are none, or none gathered from tables of that ``key``."""
        if not self.has_basins():
            return None
        stored = load_table(self.path, "work/basins.npz", dict)
        made_from = str(stored.pop("made_from", ""))
        if "cut" not in stored or key not in (None, made_from):  # without it: of an earlier volseg
            return None
        return stitch.Basins(**stored)

    def has_basins(self) -> bool:
        return files.exists(f"{self.path}/work/basins.npz")

    def remove_basins(self) -> None:
        files.remove(f"{self.path}/work/basins.npz")

    # ---- the tree, by level and part

    @cached_property
    def graphs(self) -> Tables[hierarchy.Graph]:
        """What goes up from a part."""
        return self._tables("tree/{}/up/{}", hierarchy.Graph)

    @cached_property
    def destinations(self) -> Tables[Destinations]:
        return self._tables("tree/{}/destination/{}", Destinations)

    @cached_property
    def first_voxels(self) -> Tables[Values]:
        """Of the objects that a part finished: the linear index of the first voxel, ascending."""
        return self._tables("tree/{}/first/{}", Values)

    @cached_property
    def ranks(self) -> Tables[Values]:
        """Of those of a part in one layer of blocks: the rank of the first voxel within the layer."""
        return self._tables("tree/{}/rank/{}-{}", Values)

    @cached_property
    def part_labels(self) -> Tables[Values]:
        """Of the components that a part gave."""
        return self._tables("tree/{}/label/{}", Values)

    @cached_property
    def layer_offsets(self) -> Tables[Values]:
        """How many objects begin in all layers before each."""
        return self._tables("tree/offsets", Values)

    @cached_property
    def tree_labels(self) -> Tables[Values]:
        """Of a block's regions, before corrections."""
        return self._tables("tree/before/{}", Values)

    @cached_property
    def named_labels(self) -> Tables[Values]:
        """The labels before corrections of the objects that these name, ascending."""
        return self._tables("tree/named", Values)

    @cached_property
    def named_parts(self) -> Tables[constraints.NamedParts]:
        return self._tables("tree/named/{}", constraints.NamedParts)

    @cached_property
    def corrected_objects(self) -> Tables[constraints.CorrectedObjects]:
        return self._tables("tree/corrected", constraints.CorrectedObjects)

    def remove_tree(self) -> None:
        files.remove(f"{self.path}/work/tree")

    # ---- descriptions

    @property
    def begun(self) -> bool:
        """Whether a run was begun here: what lies here is a run's, and may be replaced by one."""
        return files.exists(f"{self.path}/work/begun")

    @property
    def begun_path(self) -> str:
        return f"{self.path}/work/begun"

    def mark_begun(self) -> None:
        files.write_bytes(self.path, "work/begun", b"")

    @property
    def described(self) -> bool:
        """Whether there is a description to go on from."""
        return files.exists(f"{self.path}/work/run.json")

    @property
    def finished(self) -> bool:
        return files.exists(f"{self.path}/run.json")

    def load_description(self) -> dict:
        """The run's description; raises `UserError` where another volseg made it, or nothing can read it."""
        return _described(self.path, "work/run.json")

    def peek_description(self) -> dict | None:
        """The run's description; None where there is none that this volseg can read."""
        try:
            return self.load_description()
        except UserError:
            return None

    def save_description(self, plain: dict) -> None:
        """The description is this one, also after a power cut: what is done counts for nothing without it."""
        files.write_bytes(self.path, "work/run.json", _json({"format": FORMAT, **plain}), durable=True)

    def remove_description(self) -> None:
        files.remove(f"{self.path}/work/run.json")

    def load_summary(self) -> dict:
        """What the finished run is and took."""
        return _described(self.path, "run.json")

    def save_summary(self, plain: dict) -> None:
        files.write_bytes(self.path, "run.json", _json({"format": FORMAT, **plain}))

    def remove_summary(self) -> None:
        files.remove(f"{self.path}/run.json")

    # ---- the manifest of a finished run

    MANIFEST: ClassVar[str] = "manifest.json"
    DESCRIPTION: ClassVar[str] = "work/run.json"

    def in_work(self, key: str) -> bool:
        return key.startswith("work/")

    def in_manifest(self, key: str) -> bool:
        """Not itself, what names it, nor what later commands write."""
        apart = (
            "run.json",
            "log.txt",
            "report.html",
            self.MANIFEST,
            "review/",
            "work/markers/",
            "work/stamps/",
            "work/failed.json",
            "work/begun",
        )
        return not key.startswith(apart)

    def save_manifest(self, marks: dict[str, list]) -> list:
        """Returns its own fingerprint."""
        files.write_bytes(self.path, self.MANIFEST, json.dumps(marks).encode())
        return files.fingerprint(self.path, self.MANIFEST)

    def load_manifest(self) -> dict[str, list]:
        return json.loads(files.read_bytes(self.path, self.MANIFEST))

    # ---- the network

    MODEL: ClassVar[str] = "work/model.bin"

    def load_model(self) -> bytes:
        return files.read_bytes(self.path, self.MODEL)

    def save_model(self, blob: bytes) -> None:
        files.write_bytes(self.path, self.MODEL, blob)

    def model_mark(self) -> list | None:
        """The fingerprint of the stored network; None where there is none."""
        try:
            return files.fingerprint(self.path, self.MODEL)
        except FileNotFoundError:
            return None

    # ---- labels and their description

    def set_group(self, name: str = "", attributes: dict | None = None) -> None:
        """The group is there with exactly these attributes; what lies in it stays."""
        arrays.set_group(self.path, name, attributes or {})

    def labels_dtype(self) -> str | None:
        """Of the label arrays; None where not all of them were created."""
        try:
            return json.loads(files.read_bytes(self.path, "work/labels.json")).get("dtype")
        except (FileNotFoundError, ValueError, AttributeError, RecursionError):
            return None

    def mark_labels(self, dtype: str) -> None:
        files.write_bytes(self.path, "work/labels.json", _json({"dtype": dtype}))

    def remove_labels(self) -> None:
        """No labels are left, nor what says that there are some."""
        for name in ("work/labels.json", "work/stamps", "labels"):
            files.remove(f"{self.path}/{name}")

    # ---- results beside the arrays

    def write_table(self, name: str, ending: str, data: bytes) -> None:
        files.write_bytes(self.path, f"tables/{name}.{ending}", data)

    def read_table(self, name: str, ending: str = "parquet") -> bytes:
        """Raises `DamagedFileError` where it is missing."""
        key = f"tables/{name}.{ending}"
        try:
            return files.read_bytes(self.path, key)
        except FileNotFoundError:
            raise DamagedFileError(self.path, key, "is missing") from None

    def read_columns(self, name: str) -> pyarrow.Table:
        """A table of results. Raises `DamagedFileError` where it is missing, or none.

        Arrow's threads never meet a Python object: one that still lets go of it as the process ends aborts it
        (https://github.com/apache/arrow/issues/34314).
        """
        import pyarrow
        from pyarrow import parquet

        data = self.read_table(name)
        try:
            return parquet.read_table(pyarrow.BufferReader(data), use_threads=False)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            state = f"is damaged ({' '.join(str(error).split())[:200]})"
            raise DamagedFileError(self.path, f"tables/{name}.parquet", state) from None

    def write_picture(self, name: str, data: bytes) -> None:
        """``name``: "overlay", or "tables/volumes"."""
        files.write_bytes(self.path, f"{name}.png", data)

    def load_picture(self) -> bytes:
        """The overlay, a PNG."""
        return files.read_bytes(self.path, "overlay.png")

    @property
    def report_path(self) -> str:
        return f"{self.path}/report.html"

    def save_report(self, page: bytes) -> None:
        files.write_bytes(self.path, "report.html", page)

    def remove_derived(self) -> None:
        """What describes labels that are about to change."""
        for name in ("review", "report.html", "tables/merges.parquet", "tables/merges.csv"):
            files.remove(f"{self.path}/{name}")

    @cached_property
    def partition(self) -> Tables[Partition]:
        """By its name; the work folder may be cleaned without it."""
        return Tables(self.path, "partition/{}.npz", Partition)

    def remove_partitions(self, kept: str | None) -> None:
        """None is left but the one of this name."""
        for name in files.names(f"{self.path}/partition"):
            if name != f"{kept}.npz":
                files.remove(f"{self.path}/partition/{name}")

    @property
    def corrections_path(self) -> str:
        return f"{self.path}/corrections.json"

    def save_corrections(self, text: str) -> None:
        """The corrections as a file that can be given again; none where there is no ``text``."""
        if text:
            files.write_bytes(self.path, "corrections.json", text.encode())
        else:
            files.remove(self.corrections_path)

    @property
    def log_path(self) -> str:
        return f"{self.path}/log.txt"

    def load_log(self) -> bytes:
        """What was said; nothing where there is no log."""
        try:
            return files.read_bytes(self.path, "log.txt")
        except FileNotFoundError:
            return b""

    def save_log(self, text: bytes) -> None:
        files.write_bytes(self.path, "log.txt", text)

    @property
    def labels_path(self) -> str:
        return f"{self.path}/labels/instances"

    @property
    def objects_path(self) -> str:
        return f"{self.path}/tables/objects.parquet"

    @property
    def picture_path(self) -> str:
        return f"{self.path}/overlay.png"

    @property
    def review_path(self) -> str:
        return f"{self.path}/review"

    # ---- as a whole

    def clear(self) -> None:
        """Of what a run made here only the mark is left that one was begun.

        What describes it goes first, the mark never: if this is stopped, the rest counts for nothing and is a run's all
        the same.
        """
        self.remove_description()
        for name in files.names(f"{self.path}/work"):
            if name != "begun":
                files.remove(f"{self.path}/work/{name}")
        for name in files.names(self.path):
            if name != "work":
                files.remove(f"{self.path}/{name}")

    def remove_work(self) -> int | None:
        """Removes the work folder; how many bytes that frees, None where nobody knows."""
        freed = files.stored_bytes(f"{self.path}/work")
        files.remove(f"{self.path}/work")
        return freed


def _json(plain: dict) -> bytes:
    return json.dumps(plain, indent=1).encode()


def _described(path: str, key: str) -> dict:
    try:
        plain = json.loads(files.read_bytes(path, key))
    except FileNotFoundError:
        finished = "finished " if key == "run.json" else ""
        raise UserError(
            f"{path} is not a {finished}volseg run (no {key} in it); give a folder that volseg infer made"
        ) from None
    except (ValueError, RecursionError):
        raise DamagedFileError(path, key, "is damaged (no JSON)") from None
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        made = plain.get("format", "none") if isinstance(plain, dict) else "none"
        raise UserError(
            f"{path} was made by another version of volseg (layout {made}, this one has {FORMAT}): make it anew with "
            "volseg infer --overwrite"
        )
    return plain
