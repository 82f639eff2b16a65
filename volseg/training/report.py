"""What a training run has to show: curves, data, decoding and pictures of sections, in one HTML file and as PNGs."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from volseg.config import Train
from volseg.inference import model
from volseg.io.pictures import grayscale
from volseg.training.decoding import THRESHOLDS, Decoding, slabs, smooth
from volseg.training.samples import Source
from volseg.training.targets import UNLABELED, describe

SHOWN = 3  # sections of each volume that are pictured
EDGE = 768  # longest edge of a panel, voxels
SPLITS = (("training", "tab:blue"), ("validation", "tab:orange"))
TRUTH, FOUND, MISSED, WRONG = (90, 200, 90), (255, 160, 40), (60, 120, 255), (230, 50, 50)
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1400px; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ddd }
img { max-width: 100% } figure { margin: 0 0 1.2rem } figcaption, .note { color: #666; font-size: .9rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .9rem .2rem 0; text-align: left }
th { font-weight: 600; border-bottom: 1px solid #ccc } .key td:first-child { color: #666 }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem }
b.c { padding: 0 .35em; border-radius: 3px; color: #fff }
"""


@dataclass(frozen=True, eq=False)
class Report:
    """A finished run: its model's card, the rows of its curves, the decoding chosen and the volumes that it learnt from.

    ``waited`` is the share of the time in which the network waited for patches; ``every`` the steps between validations.
    """

    card: dict
    history: list[dict]
    decoding: Decoding
    sources: tuple[Source, ...]
    waited: float
    every: int


def write(shown: Report, network: torch.nn.Module, knobs: Train, out: Path) -> None:
    """``report.html`` is in ``out``, and beside it its pictures as PNGs, and ``curves.csv``."""
    figures = {"curves": curves(shown.history, shown.every)}
    if shown.decoding.curve:
        figures["threshold"] = threshold(shown.decoding)
    pictures = overlays(network, shown, knobs)
    for name, png in {**figures, **{name: png for name, _, png in pictures}}.items():
        model.write_whole(out / f"{name}.png", png)
    model.write_whole(out / "curves.csv", _rows(shown.history))
    model.write_whole(out / "report.html", page(shown, figures, pictures).encode())


# ---------------------------------------------------------------- data


def data_rows(sources: tuple[Source, ...] | list[Source]) -> list[dict]:
    """What each volume holds: plain values under the headings of the table, and ``advice``."""
    rows = []
    for source in sources:
        found = describe(source.labels, list(source.learn), source.first, source.depth)
        row = {
            "volume": source.name,
            "sections": found["sections"],
            "held out": len(source.held),
            "unlabeled": len(source.free),
            "objects": found["objects"],
            "foreground": f"{100 * found['foreground']:.2f} %",
            "empty": len(found["empty"]),
            "labels": source.kind,
        }
        held = [f"not learnt from, since held out: {_few(source.taken)} of train"] if source.taken else []
        rows.append({"row": row, "advice": [*found["advice"], *held]})
    return rows


def _few(sections: tuple[int, ...]) -> str:
    """
    >>> _few((5,)), _few((5, 6, 9))
    ('section 5', 'section 5 and 2 more')
    """
    return f"section {sections[0]}" + (f" and {len(sections) - 1} more" if len(sections) > 1 else "")


def data_table(sources: list[Source]) -> str:
    """What each volume holds, as lines of text, with advice where there is reason."""
    rows = data_rows(sources)
    names = list(rows[0]["row"])
    cells = [names, *([str(value) for value in row["row"].values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    advice = [f"advice: {row['row']['volume']}: {text}" for row in rows for text in row["advice"]]
    return "\n".join([*lines, *advice])


# ---------------------------------------------------------------- pictures


def _rows(history: list[dict]) -> bytes:
    """The rows of the curves as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["step", "split", "loss", "accuracy", "iou"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return file.getvalue().encode()


def curves(history: list[dict], every: int) -> bytes:
    """A PNG of loss, accuracy and IoU over steps: training blue, validation orange, the best validation marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    top = best(history)
    for axes, key, title in zip(
        figure.subplots(1, 3), ("loss", "accuracy", "iou"), ("Loss", "Accuracy", "IoU"), strict=True
    ):
        for split, color in SPLITS:
            rows = [row for row in history if row["split"] == split]
            steps, values = [row["step"] for row in rows], np.array([row[key] for row in rows])
            if split == "training" and len(values) > 50:
                axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.6)
                values = ndimage.uniform_filter1d(values, max(3, len(values) // 50), mode="nearest")
            axes.plot(steps, values, color=color, label=split, marker="o" if len(values) < 30 else None, markersize=3)
        if top:
            axes.axvline(top["step"], color="tab:orange", linestyle=":", label=f"best: step {top['step']}")
        axes.set(title=title, xlabel=f"step (an epoch: {min(every, max(row['step'] for row in history))} steps)")
        axes.grid(alpha=0.3)
        axes.legend()
    return _png(figure)


def best(history: list[dict]) -> dict | None:
    """The validation with the highest IoU, the earliest of equals; None where there was none."""
    return max((row for row in history if row["split"] == "validation"), key=lambda row: row["iou"], default=None)


def threshold(decoding: Decoding) -> bytes:
    """A PNG of the IoU on held-out sections over mask thresholds, with the one chosen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(THRESHOLDS, decoding.curve, color="tab:orange", marker="o", markersize=3)
    axes.axvline(decoding.threshold, color="0.3", linestyle=":", label=f"chosen: {decoding.threshold:.2f}")
    axes.set(title="IoU on held-out sections", xlabel="mask threshold")
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def overlays(network: torch.nn.Module, shown: Report, knobs: Train) -> list[tuple[str, str, bytes]]:
    """Name, caption and PNG of some sections of each volume: original, truth, prediction, differences.

    Held-out sections where a volume has some, else sections that it taught, and the caption says so.
    """
    found = []
    for i, source in enumerate(shown.sources):
        held = bool(source.held)
        use = source if held else replace(source, held=_some(source.learn))
        slab_of = {z: (slab, k) for slab, run in _runs(network, use, i, knobs) for k, z in enumerate(run)}
        for z in _some(use.held):
            slab, k = slab_of[z]
            chance = smooth(slab.chance[0].astype(np.float32) / 255, shown.decoding.smooth)[k]
            picture = panels(source.image[z], source.labels[z], chance >= shown.decoding.threshold)
            what = "held out" if held else "learnt from, so better than on new ones"
            name = f"overlay_{i}_{source.first + z:04d}"
            found.append((name, f"{Path(source.name).name}, section {source.first + z} ({what})", picture))
    return found


def _some(sections: tuple[int, ...]) -> tuple[int, ...]:
    """Up to `SHOWN` of them: the first, the last and those between at even distances."""
    chosen = np.linspace(0, len(sections) - 1, min(SHOWN, len(sections))).round().astype(int)
    return tuple(sections[i] for i in chosen)


def _runs(network: torch.nn.Module, source: Source, number: int, knobs: Train):
    """Each slab of held-out sections, with the sections that it holds."""
    start = 0
    for slab in slabs(network, source, number, knobs):
        yield slab, source.held[start : start + len(slab.labels)]
        start += len(slab.labels)


def panels(image: np.ndarray, labels: np.ndarray, found: np.ndarray) -> bytes:
    """A PNG of four panels: the section, the truth drawn in, the prediction drawn in, and where they differ.

    Agreement is green, what was missed blue, what was wrongly found red. Sections longer than `EDGE` are made smaller.
    """
    step = -(-max(image.shape) // EDGE)
    plane = np.repeat(grayscale(image)[..., None], 3, axis=-1)
    known = labels != UNLABELED
    truth, found = known & (labels != 0), found & known
    marks = [
        (truth & found, TRUTH),
        (truth & ~found, MISSED),
        (found & ~truth, WRONG),
    ]
    views = [plane, _tint(plane, [(truth, TRUTH)]), _tint(plane, [(found, FOUND)]), _tint(plane, marks)]
    gap = np.full((plane.shape[0], 4 * step, 3), 255, np.uint8)
    row = np.concatenate([part for view in views for part in (view, gap)][:-1], axis=1)
    small = Image.fromarray(row).resize((row.shape[1] // step, row.shape[0] // step), Image.Resampling.BOX)
    file = io.BytesIO()
    small.save(file, "PNG", optimize=True)
    return file.getvalue()


def _tint(plane: np.ndarray, marks: list[tuple[np.ndarray, tuple[int, int, int]]]) -> np.ndarray:
    """RGB ``plane`` with masks tinted in their colors and outlined."""
    out = plane.astype(np.float32)
    for mask, color in marks:
        edge = mask & ~ndimage.binary_erosion(mask, iterations=2)
        share = np.where(edge, 0.9, np.where(mask, 0.35, 0.0))[..., None]
        out = out * (1 - share) + np.float32(color) * share
    return np.uint8(out)


# ---------------------------------------------------------------- the page


def page(shown: Report, figures: dict[str, bytes], pictures: list[tuple[str, str, bytes]]) -> str:
    """The whole report as one HTML text; pictures are inside it."""
    card = shown.card
    parts = [
        f"<h1>{html.escape(card['name'])}</h1>",
        f"<p class=note>volseg {html.escape(card['versions']['volseg'])}, {card['training']['steps']} steps in "
        f"{card['training']['seconds'] / 60:.1f} minutes</p>",
        "<h2>Result</h2>",
        _key_values(_result(shown)),
        "<h2>Curves</h2>",
        _figure(figures["curves"], "Training blue, validation (whole held-out sections) orange."),
        "<h2>Decoding</h2>",
        *_decoding(shown.decoding, figures),
        "<h2>Data</h2>",
        _data(shown.sources),
        "<h2>Sections</h2>",
        f"<p class=note>Left to right: original, {_chip('truth', TRUTH)}, {_chip('prediction', FOUND)}, differences: "
        f"{_chip('agreement', TRUTH)} {_chip('missed', MISSED)} {_chip('wrongly found', WRONG)}</p>",
        *(_figure(png, caption) for _, caption, png in pictures),
        "<h2>Card</h2>",
        f"<pre>{html.escape(json.dumps(card, indent=1))}</pre>",
    ]
    head = f"<meta charset=utf-8><title>{html.escape(card['name'])}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>"


def _result(shown: Report) -> dict[str, str]:
    """The figures that matter most."""
    top = best(shown.history)
    found = {}
    if top:
        last = shown.card["scores"]["validation"]["all"]
        found["held-out sections"] = f"IoU {last['iou']:.3f}, accuracy {last['accuracy']:.4f}, loss {last['loss']:.4f}"
        epoch = -(-top["step"] // shown.every)
        found["best epoch"] = f"{epoch} (step {top['step']}): IoU {top['iou']:.3f}; the model kept is the last average"
    if shown.decoding.iou is not None:
        found["calibrated"] = f"IoU {shown.decoding.iou:.3f} at mask threshold {shown.decoding.threshold:.2f}"
        found["objects there"] = f"PQ {shown.decoding.pq:.3f}"
    found["loader wait"] = f"{100 * shown.waited:.1f} % of the time"
    return found


def _decoding(decoding: Decoding, figures: dict[str, bytes]) -> list[str]:
    z, y, x = decoding.smooth
    rows = {
        "mask threshold": f"{decoding.threshold:.2f}",
        "smoothing passes z y x": f"{z} {y} {x}",
        "seed": f"{decoding.seed:g}",
        "smallest object": f"{decoding.min_voxels} voxels",
    }
    if decoding.iou is None:
        why = "No section was held out, so these are the settings given, not chosen."
        return [f"<p class=note>{why}</p>", _key_values(rows)]
    tried = [{**row, "pq": f"{row['pq']:.4f}"} for row in decoding.rows[:5]]
    curve = _figure(figures["threshold"], "IoU of the held-out sections at each threshold of the mask.")
    return [_key_values(rows), curve, "<p class=note>Best candidates:</p>", _table(tried)]


def _data(sources: tuple[Source, ...]) -> str:
    rows = data_rows(sources)
    advice = "".join(f"<li>{html.escape(text)}</li>" for row in rows for text in row["advice"])
    return _table([row["row"] for row in rows]) + (f"<ul class=note>{advice}</ul>" if advice else "")


def _table(rows: list[dict]) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _key_values(values: dict[str, str]) -> str:
    body = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(v)}</td></tr>" for name, v in values.items())
    return f"<table class=key>{body}</table>"


def _figure(png: bytes, caption: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    told = html.escape(caption)
    return f'<figure><img src="{source}" alt="{told}"><figcaption>{told}</figcaption></figure>'


def _chip(text: str, color: tuple[int, int, int]) -> str:
    return f'<b class=c style="background:rgb{color}">{text}</b>'
