"""The least certain decisions of a run, to be looked at: a table with coordinates, a picture of each, one page of all.

A picture has three panels of the section through the saddle: the image, what was decided, and what would have been
decided otherwise. Two colors are two objects; the cross is the saddle.
"""

from __future__ import annotations

import html
import io
from dataclasses import asdict, dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from volseg.box import Box
from volseg.engine.corrections import correction_file
from volseg.engine.keys import decision_key
from volseg.errors import DamagedFileError, UserError
from volseg.evaluation.review_page import Question, format_page
from volseg.evaluation.stored import StoredRun, open_stored
from volseg.io import files
from volseg.io.corrections import entry, format_file
from volseg.io.pictures import grayscale, label_outline, pictured_volume
from volseg.progress import format_table
from volseg.segmentation import saddles
from volseg.segmentation.agglomerate import agglomerate, borders, forest, rank_components
from volseg.segmentation.rules import Rules
from volseg.segmentation.stitch import Basins

if TYPE_CHECKING:
    import pandas

HALF_WINDOW = 96  # voxels of a picture on each side of the saddle
ZOOM = 2  # pixels of a picture for each voxel
GAP = 4  # pixels behind each panel
CROSS = 8  # pixels of a cross on each side of the saddle
TINT = 0.3  # share of an object's color inside it
COLORS = np.array([[0, 0, 0], [255, 140, 0], [0, 160, 255]], float)
SHORT = {"saddle_probability": "saddle", "contact_faces": "faces"}  # column names of the text


@dataclass(frozen=True)
class Decision:
    """A join or a border of two objects, and how certain it is.

    Attributes
    ----------
    kind
        "join" or "border".
    rule
        Which rule decided: "seed", "unseeded", "persistence" or "mean".
    margin
        How far the deciding value was from the rule's limit, as a probability; the least certain is the smallest.
    saddle_probability
        The probability at the saddle.
    contact_faces
        Voxel faces between the two parts.
    voxels_a, voxels_b
        Of a border its two objects; of a join its two parts at that step, the larger first.
    label_a, label_b
        Their labels; equal in a join.
    z, y, x
        The saddle's voxel.
    voxel_a, voxel_b
        Linear indices of voxels on the two sides of the saddle, in the grid in which was decided.
    picture
        The picture's path in the run's folder.
    """

    kind: str
    rule: str
    margin: float
    saddle_probability: float
    contact_faces: int
    voxels_a: int
    voxels_b: int
    label_a: int
    label_b: int
    z: int
    y: int
    x: int
    voxel_a: int
    voxel_b: int
    picture: str

    def __str__(self) -> str:
        labels = f"{self.label_a}" if self.kind == "join" else f"{self.label_a} and {self.label_b}"
        number = self.picture.rpartition("/")[2].removesuffix(".png")
        return (
            f"{number}  {self.kind} of {labels} at z y x {self.z} {self.y} {self.x}: by {self.rule}, "
            f"margin {self.margin:.4f}, saddle {self.saddle_probability:.3f}, "
            f"{self.contact_faces} faces between {self.voxels_a} and {self.voxels_b} voxels"
        )


@dataclass(frozen=True)
class Review:
    """The least certain decisions of a run, the least certain first, the page that shows them, and a file to fill in: see
    `volseg.io.corrections`."""

    run: str
    page: str
    corrections: str
    decisions: tuple[Decision, ...]

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return asdict(self)

    def to_frame(self) -> pandas.DataFrame:
        """A row for each decision."""
        import pandas

        return pandas.DataFrame(list(map(vars, self.decisions)), columns=_COLUMNS)

    def __str__(self) -> str:
        return format_decisions(self.decisions)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre><p>{html.escape(self.page)}</p>"


_COLUMNS = [field.name for field in fields(Decision)]


def review(run: str | PathLike | Any, top: int = 50) -> Review:
    """Draw the least certain joins and borders of a run, to be decided by a person.

    Pictures are written to ``review/`` of the run, with ``index.html``, which holds them all and takes decisions, and
    ``corrections.json``, in which they can be filled in by hand; `segment` takes either. What was there before is removed.

    Parameters
    ----------
    run
        A finished run, or what has its place as ``path``.
    top
        How many of the least certain.

    Raises
    ------
    UserError
        There is no finished run, or it has no table of merges.
    """
    reviewed = open_reviewed(run)
    path = reviewed.stored.path
    files.remove(reviewed.stored.layout.review_path)
    chosen = reviewed.decisions[:top]
    pictures = [draw(reviewed, i) for i in range(len(chosen))]
    for decision, image in zip(chosen, pictures, strict=True):
        files.write_bytes(path, decision.picture, _encode(image, "PNG"))
    queue = [_question(reviewed, i) for i in range(len(chosen))]
    plain = correction_file(reviewed.stored.run)
    page = format_page(path, plain, queue, [_encode(image, "JPEG") for image in pictures])
    files.write_bytes(path, "review/index.html", page.encode())
    undecided = [entry("undecided", question.points, question.text) for question in queue]
    filled = {**plain, "corrections": [*plain["corrections"], *undecided]}
    files.write_bytes(path, "review/corrections.json", format_file(filled).encode())
    return Review(path, f"{path}/review/index.html", f"{path}/review/corrections.json", chosen)


def _question(reviewed: ReviewedRun, i: int) -> Question:
    """Row ``i`` as the page asks for it."""
    decision, shape = reviewed.decisions[i], reviewed.stored.run.shape
    box, _ = _window(reviewed, i)
    a, b = (tuple(int(n) for n in np.unravel_index(voxel, shape)) for voxel in (decision.voxel_a, decision.voxel_b))
    labeled = reviewed.stored.labels.read(box)[0] > 0
    return Question(decision.kind, str(decision), (a, b), box, labeled, ZOOM, GAP)


@dataclass(frozen=True)
class ReviewedRun:
    """A run whose decisions can be drawn.

    Attributes
    ----------
    stored
        The run.
    decisions
        All rows of its table of merges.
    rows
        What these were made of, `saddles.ROW`; None where the work folder was cleaned.
    basins
        The volume's basins; None there too.
    """

    stored: StoredRun
    decisions: tuple[Decision, ...]
    rows: np.ndarray | None
    basins: Basins | None


def open_reviewed(run: str | PathLike | Any) -> ReviewedRun:
    """The finished run in a folder, with its decisions; `UserError` where it has none."""
    stored = open_stored(run)
    try:
        columns = stored.table("merges")
        columns["voxel_b"]
    except (DamagedFileError, KeyError):  # without the column: of an earlier volseg
        raise UserError(f"{stored.path} has no sound table of merges: volseg segment {stored.path} writes it") from None
    columns["picture"] = np.array([f"review/{i + 1:04d}.png" for i in range(columns["kind"].size)], object)
    decisions = tuple(Decision(*row) for row in zip(*(columns[name].tolist() for name in _COLUMNS), strict=True))
    layout, key = stored.layout, decision_key(stored.run)
    if not layout.joins.exists(key):
        return ReviewedRun(stored, decisions, None, None)
    return ReviewedRun(stored, decisions, layout.joins.load(key).rows, layout.load_basins())


# ---------------------------------------------------------------- one picture


def draw(reviewed: ReviewedRun, i: int) -> np.ndarray:
    """RGB of row ``i``: three panels side by side. The parts of a join are told apart only where ``work`` was kept."""
    decision, run = reviewed.decisions[i], reviewed.stored
    box, saddle = _window(reviewed, i)
    image = grayscale(pictured_volume(run.run.source, run.path).read(box)[0])
    two = sides(reviewed, i, box)
    one = np.isin(run.labels.read(box)[0], [decision.label_a, decision.label_b]).astype(np.int64)
    panels = [one, two] if decision.kind == "join" else [two, one]
    return np.concatenate([_panel(image, ids, saddle) for ids in (np.zeros_like(two), *panels)], axis=1)


def _window(reviewed: ReviewedRun, i: int) -> tuple[Box, tuple[int, int]]:
    """The part of a section that the picture of row ``i`` shows, and the saddle's y and x in it."""
    decision, run = reviewed.decisions[i], reviewed.stored
    z, y, x = decision.z, decision.y, decision.x
    if run.run.restored:  # pictures show the grid in which was decided
        z, y, x = run.run.to_own.nearest_box(Box((z, y, x), (z + 1, y + 1, x + 1))).start
    ny, nx = (min(2 * HALF_WINDOW, n) for n in run.shape[1:])
    y0 = int(np.clip(y - HALF_WINDOW, 0, run.shape[1] - ny))
    x0 = int(np.clip(x - HALF_WINDOW, 0, run.shape[2] - nx))
    box = Box((z, y0, x0), (z + 1, y0 + ny, x0 + nx))
    return box, (y - y0, x - x0)


def sides(reviewed: ReviewedRun, i: int, box: Box) -> np.ndarray:
    """1 and 2 on the two sides of row ``i`` in the one section of ``box``, 0 elsewhere."""
    decision, run = reviewed.decisions[i], reviewed.stored
    if decision.kind == "border" or reviewed.basins is None or reviewed.rows is None:
        labels = run.labels.read(box)[0]
        return np.where(labels == decision.label_a, 1, np.where(labels == decision.label_b, 2, 0))
    side = join_sides(reviewed.basins, run.rules, reviewed.rows[i])
    region = run.regions(box)
    out = np.zeros(region.shape, np.int64)
    for j in run.grid.overlapping(box):
        part = run.grid[j].intersect(box).slices_within(box)
        out[part] = np.r_[0, side[run.layout.block_labels.load(j).basin]][region[part]]
    return out[0]


def join_sides(basins: Basins, rules: Rules, row: np.ndarray) -> np.ndarray:
    """For each basin 1 or 2 if it is on that side of the join ``row`` (of `saddles.ROW`) when it happens, else 0."""
    edges, e = basins.edges, int(row["edge"])
    before = edges if row["rule"] == saddles.MEAN else edges[:e]
    root, _ = forest(before["a"], before["b"], before["high"], basins.minimum, *rules.seeds)
    if row["rule"] == saddles.MEAN:
        root, _ = rank_components(root, basins.first)
        for p, q, *_, edge in agglomerate(*borders(edges, root), rules.join_height):
            if edge == e:
                break
            root = np.where(root == q, p, root)
    a, b = root[edges["a"][e]], root[edges["b"][e]]
    return np.where(root == a, 1, np.where(root == b, 2, 0))


def _panel(image: np.ndarray, ids: np.ndarray, saddle: tuple[int, int]) -> np.ndarray:
    """A section with two objects tinted and outlined, enlarged, a cross on the saddle and a bright line around."""
    image, ids = (np.kron(plane, np.ones((ZOOM, ZOOM), plane.dtype)) for plane in (image, ids))
    share = np.where(ids > 0, TINT, 0.0)
    share[label_outline(ids)] = 1.0
    rgb = np.uint8(image[..., None] * (1 - share[..., None]) + COLORS[ids] * share[..., None])
    panel = Image.fromarray(rgb)
    y, x = (ZOOM * n + ZOOM // 2 for n in saddle)
    pen = ImageDraw.Draw(panel)
    pen.line([(x - CROSS, y), (x + CROSS, y)], fill=(255, 255, 0))
    pen.line([(x, y - CROSS), (x, y + CROSS)], fill=(255, 255, 0))
    return np.pad(np.asarray(panel), [(0, 0), (0, GAP), (0, 0)], constant_values=255)


def _encode(image: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


# ---------------------------------------------------------------- as text


def format_decisions(decisions: tuple[Decision, ...]) -> str:
    """A line for each decision."""
    if not decisions:
        return "nothing is uncertain: no join and no border of two parts of any size is left to decide"
    shown = [name for name in _COLUMNS if name not in ("voxel_a", "voxel_b")]
    return format_table(
        [SHORT.get(name, name) for name in shown], [[getattr(each, name) for name in shown] for each in decisions]
    )
