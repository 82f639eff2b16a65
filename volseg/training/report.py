"""What a training run has to show: curves, data, decoding and pictures of sections, in one HTML file and as PNGs."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from volseg.config import Config
from volseg.inference import model
from volseg.inference.model_card import ModelCard
from volseg.io.pictures import grayscale
from volseg.progress import format_table
from volseg.training.decoding import THRESHOLDS, Decoding, ValidationSlab, foreground, validation_slabs
from volseg.training.sources import Source
from volseg.training.targets import UNLABELED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECTIONS_SHOWN = 3  # of each volume
MAX_PANEL_EDGE = 768  # pixels
MAX_CANDIDATES = 5  # rows of the table of decodings
SPLIT_COLORS = {"training": "tab:blue", "validation": "tab:orange"}
TRUTH, PREDICTION, MISSED, SPURIOUS = (90, 200, 90), (255, 160, 40), (60, 120, 255), (230, 50, 50)  # RGB
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
    """What a report shows of a finished run.

    Attributes
    ----------
    card
        The card of its model.
    history
        Rows of its curves, see `checkpoint.State`.
    decoding
        The decoding that was chosen.
    sources
        The volumes that it learnt from.
    data_wait_share
        Share of the time in which the network waited for patches.
    validation_interval
        Steps between validations.
    """

    card: ModelCard
    history: list[dict]
    decoding: Decoding
    sources: tuple[Source, ...]
    data_wait_share: float
    validation_interval: int


@dataclass(frozen=True, eq=False)
class Picture:
    """A PNG with the name of its file and a caption."""

    name: str
    caption: str
    png: bytes


def write_report(report: Report, network: torch.nn.Module, config: Config, out: Path) -> None:
    """Write ``report.html`` into the folder ``out``, and beside it its pictures as PNGs, and ``curves.csv``.

    ``network`` predicts the sections that are pictured. Raises `UserError` where a file cannot be written.
    """
    figures = {"curves": plot_curves(report.history, report.validation_interval)}
    if report.decoding.iou_curve:
        figures["threshold"] = plot_threshold(report.decoding)
    pictures = section_pictures(network, report, config)
    for name, png in {**figures, **{picture.name: picture.png for picture in pictures}}.items():
        model.write_whole(out / f"{name}.png", png)
    model.write_whole(out / "curves.csv", _csv(report.history))
    model.write_whole(out / "report.html", render_page(report, figures, pictures).encode())


# ---------------------------------------------------------------- data


def data_rows(sources: tuple[Source, ...] | list[Source]) -> list[dict]:
    """Return what each volume holds: plain values under the headings of a table (``row``), and ``advice``."""
    rows = []
    for source in sources:
        own, annotation = source.own, source.own.annotation
        row = {
            "volume": source.name,
            "sections": annotation["sections"],
            "held out": len(own.validation),
            "unlabeled": len(own.unlabeled),
            "objects": annotation["objects"],
            "foreground": f"{100 * annotation['foreground']:.2f} %",
            "empty": len(annotation["empty"]),
            "labels": source.label_kind,
        }
        advice = list(annotation["advice"])
        if own.withheld:
            advice.append(f"not learnt from, since held out: {_format_sections(own.withheld)} of train")
        if own.validation and not source.validation_sections:
            advice.append("in voxels of the model's size no held-out section is left: hold out neighbors, too")
        rows.append({"row": row, "advice": advice, "notes": list(source.notes)})
    return rows


def _format_sections(sections: tuple[int, ...]) -> str:
    """
    >>> _format_sections((5,)), _format_sections((5, 6, 9))
    ('section 5', 'section 5 and 2 more')
    """
    return f"section {sections[0]}" + (f" and {len(sections) - 1} more" if len(sections) > 1 else "")


def format_data(sources: list[Source]) -> str:
    """Return what each volume holds as lines of text, with advice where there is reason."""
    rows = data_rows(sources)
    table = format_table(list(rows[0]["row"]), [row["row"].values() for row in rows])
    notes = dict.fromkeys(f"labels: {text}" for row in rows for text in row["notes"])
    advice = [f"advice: {row['row']['volume']}: {text}" for row in rows for text in row["advice"]]
    return "\n".join([table, *notes, *advice])


# ---------------------------------------------------------------- curves


def _csv(history: list[dict]) -> bytes:
    """The rows of the curves as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["step", "split", "loss", "accuracy", "iou"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return file.getvalue().encode()


def plot_curves(history: list[dict], validation_interval: int) -> bytes:
    """Return a PNG of loss, accuracy and IoU over steps: training blue, validation orange, the best validation marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    best = best_validation(history)
    epoch = min(validation_interval, max(row["step"] for row in history))
    panels = zip(figure.subplots(1, 3), ("loss", "accuracy", "iou"), ("Loss", "Accuracy", "IoU"), strict=True)
    for axes, key, title in panels:
        for split, color in SPLIT_COLORS.items():
            rows = [row for row in history if row["split"] == split]
            steps, values = [row["step"] for row in rows], np.array([row[key] for row in rows])
            if split == "training" and len(values) > 50:
                axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.6)
                values = ndimage.uniform_filter1d(values, max(3, len(values) // 50), mode="nearest")
            axes.plot(steps, values, color=color, label=split, marker="o" if len(values) < 30 else None, markersize=3)
        if best:
            axes.axvline(best["step"], color="tab:orange", linestyle=":", label=f"best: step {best['step']}")
        axes.set(title=title, xlabel=f"step (an epoch: {epoch} steps)")
        axes.grid(alpha=0.3)
        axes.legend()
    return _png(figure)


def best_validation(history: list[dict]) -> dict | None:
    """Return the validation with the highest IoU, the earliest of equals; None where there was none."""
    return max((row for row in history if row["split"] == "validation"), key=lambda row: row["iou"], default=None)


def plot_threshold(decoding: Decoding) -> bytes:
    """Return a PNG of the IoU on held-out sections over mask thresholds, with the one chosen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(THRESHOLDS, decoding.iou_curve, color="tab:orange", marker="o", markersize=3)
    axes.axvline(decoding.threshold, color="0.3", linestyle=":", label=f"chosen: {decoding.threshold:.2f}")
    axes.set(title="IoU on held-out sections", xlabel="mask threshold")
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


# ---------------------------------------------------------------- sections


def section_pictures(network: torch.nn.Module, report: Report, config: Config) -> list[Picture]:
    """Return pictures of some sections of each volume: original, truth, prediction, differences.

    Held-out sections where a volume has some, else sections that it taught, and the caption says so.
    """
    decoded = {"threshold": report.decoding.threshold, "smooth": report.decoding.smooth}
    fragments, pictures = config.fragments.model_copy(update=decoded), []
    for i, source in enumerate(report.sources):
        held_out = bool(source.validation_sections)
        shown = (
            source if held_out else replace(source, validation_sections=_spread(_own(source, source.train_sections)))
        )
        slab_of = {z: (slab, k) for slab, run in _slabs(network, shown, i, config) for k, z in enumerate(run)}
        for z in _spread(_own(source, shown.validation_sections)):
            slab, k = slab_of[z]
            prediction = foreground(slab.probability, fragments)[k]
            png = draw_panels(source.image[z], source.labels[z], prediction)
            note = "held out" if held_out else "learnt from, so better than on new ones"
            caption = f"{Path(source.name).name}, section {source.numbers[z]} ({note})"
            pictures.append(Picture(f"overlay_{i}_{source.numbers[z]:04d}", caption, png))
    return pictures


def _own(source: Source, sections: tuple[int, ...]) -> tuple[int, ...]:
    """Of sections that are one in the volume as it is stored, the middle one."""
    groups = [list(same) for _, same in groupby(sections, source.numbers.__getitem__)]
    return tuple(same[len(same) // 2] for same in groups)


def _spread(sections: tuple[int, ...]) -> tuple[int, ...]:
    """Up to `SECTIONS_SHOWN` of them: the first, the last and those between at even distances."""
    chosen = np.linspace(0, len(sections) - 1, min(SECTIONS_SHOWN, len(sections))).round().astype(int)
    return tuple(sections[i] for i in chosen)


def _slabs(
    network: torch.nn.Module, source: Source, number: int, config: Config
) -> Iterator[tuple[ValidationSlab, tuple[int, ...]]]:
    """Each slab of held-out sections, with the sections that it holds."""
    start = 0
    for slab in validation_slabs(network, source, number, config):
        yield slab, source.validation_sections[start : start + len(slab.labels)]
        start += len(slab.labels)


def draw_panels(image: np.ndarray, labels: np.ndarray, prediction: np.ndarray) -> bytes:
    """Return a PNG of four panels: the section, the truth drawn in, the prediction drawn in, and where they differ.

    Agreement is green, what was missed blue, what was wrongly found red; nothing differs where nobody annotated. Sections
    longer than `MAX_PANEL_EDGE` are made smaller.

    Parameters
    ----------
    image
        Gray values (y, x).
    labels
        The truth uint32 (y, x), see `targets.normalize_labels`.
    prediction
        bool (y, x).
    """
    step = -(-max(image.shape) // MAX_PANEL_EDGE)
    plane = np.repeat(grayscale(image)[..., None], 3, axis=-1)
    annotated = labels != UNLABELED
    truth = annotated & (labels != 0)
    differences = [
        (truth & prediction, TRUTH),
        (truth & ~prediction, MISSED),
        (prediction & annotated & ~truth, SPURIOUS),
    ]
    views = [plane, *(_tint(plane, marks) for marks in ([(truth, TRUTH)], [(prediction, PREDICTION)], differences))]
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
        opacity = np.where(edge, 0.9, np.where(mask, 0.35, 0.0))[..., None]
        out = out * (1 - opacity) + np.float32(color) * opacity
    return np.uint8(out)


# ---------------------------------------------------------------- the page


def render_page(report: Report, figures: dict[str, bytes], pictures: list[Picture]) -> str:
    """Return the whole report as one HTML text; pictures are inside it."""
    card = report.card
    parts = [
        f"<h1>{html.escape(card.name)}</h1>",
        f"<p class=note>volseg {html.escape(card.versions['volseg'])}, {card.training.steps} steps in "
        f"{card.training.seconds / 60:.1f} minutes</p>",
        "<h2>Result</h2>",
        _key_value_table(_result(report)),
        "<h2>Curves</h2>",
        _figure(figures["curves"], "Training blue, validation (whole held-out sections) orange."),
        "<h2>Decoding</h2>",
        *_decoding(report.decoding, figures),
        "<h2>Data</h2>",
        _data(report.sources),
        "<h2>Sections</h2>",
        f"<p class=note>Left to right: original, {_chip('truth', TRUTH)}, {_chip('prediction', PREDICTION)}, differences: "
        f"{_chip('agreement', TRUTH)} {_chip('missed', MISSED)} {_chip('wrongly found', SPURIOUS)}</p>",
        *(_figure(picture.png, picture.caption) for picture in pictures),
        "<h2>Card</h2>",
        f"<pre>{html.escape(json.dumps(card.to_json(), indent=1))}</pre>",
    ]
    head = f"<meta charset=utf-8><title>{html.escape(card.name)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>"


def _result(report: Report) -> dict[str, str]:
    """The figures that matter most."""
    best, decoding, result = best_validation(report.history), report.decoding, {}
    if best:
        last = report.card.scores["validation"]["all"]
        result["held-out sections"] = f"IoU {last['iou']:.3f}, accuracy {last['accuracy']:.4f}, loss {last['loss']:.4f}"
        epoch = -(-best["step"] // report.validation_interval)
        result["best epoch"] = (
            f"{epoch} (step {best['step']}): IoU {best['iou']:.3f}; the model kept is the last average"
        )
    if decoding.iou is not None:
        result["calibrated"] = f"IoU {decoding.iou:.3f} at mask threshold {decoding.threshold:.2f}"
        if decoding.pq is not None:
            result["objects there"] = f"PQ {decoding.pq:.3f}"
    result["loader wait"] = f"{100 * report.data_wait_share:.1f} % of the time"
    return result


def _decoding(decoding: Decoding, figures: dict[str, bytes]) -> list[str]:
    z, y, x = decoding.smooth
    rows = {
        "mask threshold": f"{decoding.threshold:.2f}",
        "smoothing passes z y x": f"{z} {y} {x}",
        "seed": f"{decoding.seed:g}",
        "smallest object": f"{decoding.min_voxels} voxels{' with what faces cut off' if decoding.count_cut else ''}",
    }
    if decoding.iou is None:
        given = "what is best on the sections learned from" if decoding.taught else "the settings given"
        why = f"No section was held out, so these are {given}; sizes are those of the objects seen."
        return [f"<p class=note>{why}</p>", _key_value_table(rows)]
    if decoding.pq is None:
        why = "Scribbles do not say where objects end, so seed and sizes are the settings given, not chosen."
        curve = _figure(figures["threshold"], "IoU of the held-out scribbles at each threshold of the mask.")
        return [_key_value_table(rows), curve, f"<p class=note>{why}</p>"]
    candidates = [{**row, "pq": f"{row['pq']:.4f}"} for row in decoding.candidates[:MAX_CANDIDATES]]
    curve = _figure(figures["threshold"], "IoU of the held-out sections at each threshold of the mask.")
    return [_key_value_table(rows), curve, "<p class=note>Best candidates:</p>", _table(candidates)]


def _data(sources: tuple[Source, ...]) -> str:
    rows = data_rows(sources)
    advice = "".join(f"<li>{html.escape(text)}</li>" for row in rows for text in (*row["notes"], *row["advice"]))
    return _table([row["row"] for row in rows]) + (f"<ul class=note>{advice}</ul>" if advice else "")


def _table(rows: list[dict]) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _key_value_table(values: dict[str, str]) -> str:
    body = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(v)}</td></tr>" for name, v in values.items())
    return f"<table class=key>{body}</table>"


def _figure(png: bytes, caption: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    text = html.escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _chip(text: str, color: tuple[int, int, int]) -> str:
    return f'<b class=c style="background:rgb{color}">{text}</b>'
