"""The least certain decisions of a run, to be looked at: a table with coordinates, a picture of each, one page of all.

A picture has three panels of the section through the saddle: the image, what was decided, and what would have been
decided otherwise. Two colors are two objects; the cross is the saddle.
"""

from __future__ import annotations

import base64
import html
import io
import json
from dataclasses import dataclass

import numpy as np
import pandas
from PIL import Image, ImageDraw

from volseg.box import Box
from volseg.engine.run import Run
from volseg.errors import UserError
from volseg.io import arrays, files, volume
from volseg.io.pictures import grayscale, label_outline, pictured_volume
from volseg.segmentation import saddles
from volseg.segmentation.agglomerate import agglomerate, borders, forest, rank_components
from volseg.segmentation.rules import Rules
from volseg.segmentation.stitch import Basins

HALF = 96  # voxels around the saddle
ZOOM = 2
COLORS = np.array([[0, 0, 0], [255, 140, 0], [0, 160, 255]], float)
SHOWN = ("kind", "rule", "margin", "saddle_probability", "contact_faces", "voxels_a", "voxels_b",
         "label_a", "label_b", "z", "y", "x")  # fmt: skip


@dataclass(frozen=True)
class Reviewed:
    """A run whose decisions can be told: its description, the image that pictures show, its table of merges, their rows,
    and its basins (None: cleaned)."""

    path: str
    run: Run
    image: volume.Volume
    table: pandas.DataFrame
    rows: np.ndarray | None
    basins: Basins | None


def review(path: str, top: int = 50) -> pandas.DataFrame:
    """The ``top`` least certain rows of the run's table of merges, with ``picture``, the path of each one's picture.

    Pictures are in ``review/`` of the run, with ``index.html``, which holds them all. Raises `UserError` for what is no
    finished run, or one without that table.
    """
    found = load(path)
    files.remove(f"{path}/review")
    shown = found.table.head(top).copy()
    shown["picture"] = [f"review/{i + 1:04d}.png" for i in range(len(shown))]
    pictures = [picture(found, i) for i in range(len(shown))]
    for name, image in zip(shown["picture"], pictures, strict=True):
        files.write_bytes(path, name, _encoded(image, "PNG"))
    files.write_bytes(path, "review/index.html", page(path, shown, pictures).encode())
    return shown


def load(path: str) -> Reviewed:
    if not files.exists(f"{path}/run.json"):
        raise UserError(f"{path} is no finished run: it holds no run.json; give the --out of a finished volseg infer")
    if not files.exists(f"{path}/tables/merges.parquet"):
        raise UserError(f"{path} has no table of merges: volseg segment {path} writes it")
    run = Run.from_json(json.loads(files.read_bytes(path, "run.json")))
    image = pictured_volume(run.source, path)
    table = pandas.read_parquet(io.BytesIO(files.read_bytes(path, "tables/merges.parquet")))
    key = f"work/merges/{run.keys['stitch']}.npz"
    if not files.exists(f"{path}/{key}"):
        return Reviewed(path, run, image, table, None, None)
    basins = _arrays(path, "work/basins.npz")
    stored = Basins(**{name: basins[name] for name in Basins.__dataclass_fields__})
    return Reviewed(path, run, image, table, _arrays(path, key)["rows"], stored)


def _arrays(path: str, key: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(files.read_bytes(path, key))) as stored:  # allow_pickle is off
        return {name: stored[name] for name in stored.files}


# ---------------------------------------------------------------- one picture


def picture(found: Reviewed, i: int) -> np.ndarray:
    """RGB of row ``i``: three panels side by side. The parts of a join are told apart only where ``work`` was kept."""
    row = found.table.iloc[i]
    z, y, x = (int(row[axis]) for axis in "zyx")
    size = [min(2 * HALF, n) for n in found.run.shape[1:]]
    y0, x0 = (int(np.clip(at - HALF, 0, n - s)) for at, s, n in zip((y, x), size, found.run.shape[1:], strict=True))
    box = Box((z, y0, x0), (z + 1, y0 + size[0], x0 + size[1]))
    image = grayscale(found.image.read(box)[0])
    apart = sides(found, i, box)
    joined = np.isin(_labels(found, box), [row["label_a"], row["label_b"]]).astype(np.int64)
    panels = [joined, apart] if row["kind"] == "join" else [apart, joined]
    plain = np.zeros_like(apart)
    return np.concatenate([_panel(image, ids, (y - y0, x - x0)) for ids in (plain, *panels)], axis=1)


def sides(found: Reviewed, i: int, box: Box) -> np.ndarray:
    """1 and 2 on the two sides of row ``i`` in the one section of ``box``, 0 elsewhere."""
    row = found.table.iloc[i]
    if row["kind"] == "border" or found.basins is None:
        labels = _labels(found, box)
        return np.where(labels == row["label_a"], 1, np.where(labels == row["label_b"], 2, 0))
    part = parts(found.basins, Rules.from_config(found.run.config, found.run.voxel_size_nm), found.rows[i])
    region = np.asarray(arrays.open_array(found.path, "work/fragments")[box.slices])
    out = np.zeros(region.shape, np.int64)
    for j in found.run.grid.overlapping(box):
        inside = found.run.grid[j].intersect(box).slices_within(box)
        basin = _arrays(found.path, f"work/labels/{j}.npz")["basin"]
        out[inside] = np.r_[0, part[basin]][region[inside]]
    return out[0]


def _labels(found: Reviewed, box: Box) -> np.ndarray:
    return volume.open(found.path, dataset="labels/instances/0").read(box)[0]


def parts(basins: Basins, rules: Rules, row: np.ndarray) -> np.ndarray:
    """For each basin 1 or 2 if it is in that part of the join ``row`` (of `saddles.ROW`) when it happens, else 0."""
    edges, e = basins.edges, int(row["edge"])
    until = edges if row["rule"] == saddles.MEAN else edges[:e]
    root, _ = forest(until["a"], until["b"], until["high"], basins.minimum, *rules.seeds)
    if row["rule"] == saddles.MEAN:
        root, _ = rank_components(root, basins.first)
        for p, q, *_, at in agglomerate(*borders(edges, root), rules.join_height):
            if at == e:
                break
            root = np.where(root == q, p, root)
    a, b = root[edges["a"][e]], root[edges["b"][e]]
    return np.where(root == a, 1, np.where(root == b, 2, 0))


def _panel(image: np.ndarray, ids: np.ndarray, at: tuple[int, int]) -> np.ndarray:
    """A section with two objects tinted and outlined, enlarged, a cross on the saddle and a bright line around."""
    image, ids = (np.kron(plane, np.ones((ZOOM, ZOOM), plane.dtype)) for plane in (image, ids))
    share = np.where(ids > 0, 0.3, 0.0)
    share[label_outline(ids)] = 1.0
    rgb = np.uint8(image[..., None] * (1 - share[..., None]) + COLORS[ids] * share[..., None])
    panel = Image.fromarray(rgb)
    y, x = (ZOOM * n + ZOOM // 2 for n in at)
    draw = ImageDraw.Draw(panel)
    draw.line([(x - 8, y), (x + 8, y)], fill=(255, 255, 0))
    draw.line([(x, y - 8), (x, y + 8)], fill=(255, 255, 0))
    return np.pad(np.asarray(panel), [(0, 0), (0, 4), (0, 0)], constant_values=255)


def _encoded(image: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


# ---------------------------------------------------------------- to read


def page(path: str, rows: pandas.DataFrame, pictures: list[np.ndarray]) -> str:
    """One HTML page with all pictures inside it."""
    items = []
    for (_, row), image in zip(rows.iterrows(), pictures, strict=True):
        source = base64.b64encode(_encoded(image, "JPEG")).decode()
        items.append(f'<h2>{html.escape(_title(row))}</h2><img alt="" src="data:image/jpeg;base64,{source}">')
    style = "body{font:14px sans-serif;margin:2em}img{max-width:100%}"
    head = f"<meta charset=utf-8><title>volseg review</title><style>{style}</style>"
    says = "Left the image, then what was decided, then the other decision. Two colors: two objects. Cross: the saddle."
    return f"<!doctype html>{head}<h1>{html.escape(path)}</h1><p>{says}</p>{''.join(items)}"


def _title(row: pandas.Series) -> str:
    labels = f"{row['label_a']}" if row["kind"] == "join" else f"{row['label_a']} and {row['label_b']}"
    return (
        f"{row['picture'].rpartition('/')[2].removesuffix('.png')}  {row['kind']} of {labels} at z y x {row['z']} {row['y']} "
        f"{row['x']}: by {row['rule']}, margin {row['margin']:.4f}, saddle {row['saddle_probability']:.3f}, "
        f"{row['contact_faces']} faces between {row['voxels_a']} and {row['voxels_b']} voxels"
    )


def table(rows: pandas.DataFrame) -> str:
    """The rows as plain text."""
    short = {"saddle_probability": "saddle", "contact_faces": "faces"}
    return rows[[*SHOWN, "picture"]].rename(columns=short).to_string(index=False, float_format="%.4f")
