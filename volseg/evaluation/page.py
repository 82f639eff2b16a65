"""Parts of HTML pages that need no other file: style, tables, histograms, pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np

BINS = 32  # of a histogram
COLORS = (
    "#0f766e", "#b45309", "#4338ca", "#be123c", "#4d7c0f", "#0369a1", "#7e22ce", "#57534e", "#a16207", "#155e75", "#9f1239",
    "#65a30d", "#c2410c", "#6d28d9", "#14b8a6", "#64748b",
)  # fmt: skip


def whole(title: str, body: str) -> str:
    """A page; ``title`` and ``body`` are HTML."""
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f'<!doctype html><html lang="en">{head}<title>{title}</title><style>{style}</style>{body}</html>\n'


def picture(rgb: np.ndarray, name: str, quality: int = 82) -> str:
    """An RGB array (y, x, 3) as a JPEG inside the page."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=quality)
    return f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def section(title: str, body: str) -> str:
    return (f"<h2>{html.escape(title)}</h2>" * bool(title)) + body if body else ""


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Rows below their names; numbers stand to the right."""

    def cell(value: object, tag: str = "td", number: bool = False) -> str:
        text = (
            ("no", "yes")[value]
            if isinstance(value, bool)
            else f"{value:.4g}"
            if isinstance(value, float)
            else str(value)
        )
        return f"<{tag}{' class=n' * number}>{html.escape(text)}</{tag}>"

    columns, cells = list(columns), [list(row) for row in rows]
    numeric = [
        all(isinstance(row[i], int | float) and not isinstance(row[i], bool) for row in cells)
        for i in range(len(columns))
    ]
    head = "".join(cell(name, "th", number) for name, number in zip(columns, numeric, strict=True))
    body = ("".join(cell(v, number=n) for v, n in zip(row, numeric, strict=True)) for row in cells)
    return f"<div class=table><table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table></div>"


def histogram(values: np.ndarray, label: Callable[[float], str], name: str) -> str:
    values = values[np.isfinite(values)]
    if not values.size:
        return ""
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, BINS, (low, high))
    width, height, foot = 460, 150, 40
    bar, most = width / BINS, int(counts.max())
    bars = ""
    for i, (n, (a, b)) in enumerate(zip(counts, pairwise(edges), strict=True)):
        tall, place = height * n / most, f'x="{40 + bar * i:.1f}" y="{10 + height - height * n / most:.1f}"'
        size = f'width="{bar - 1:.1f}" height="{tall:.1f}" fill="{COLORS[0]}"'
        bars += f"<rect {place} {size}><title>{label(a)} to {label(b)}: {n}</title></rect>" if n else ""
    ticks = "".join(
        f'<text x="{40 + width * k / 4:.1f}" y="{height + 26}" text-anchor="middle">{label(low + (high - low) * k / 4)}</text>'
        for k in range(5)
    )
    view = f'viewBox="0 0 {width + 60} {height + foot + 16}" width="{width + 60}"'
    return (
        f'<svg {view} role="img" aria-label="{html.escape(name)}"><path class=axis d="M40 {height + 10}H{width + 40}"/>'
        f'<text x="34" y="20" text-anchor="end">{most}</text>{bars}{ticks}'
        f'<text x="{40 + width / 2}" y="{height + 46}" text-anchor="middle">{html.escape(name)}</text></svg>'
    )
