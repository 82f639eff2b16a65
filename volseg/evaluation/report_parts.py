"""What the pages of finished and of unfinished runs share."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from volseg.box import Blocks
from volseg.config import Config
from volseg.engine.layout import Layout
from volseg.engine.receipts import Markers
from volseg.engine.run import Run
from volseg.engine.run_log import changed_settings
from volseg.engine.stages import Stage
from volseg.evaluation import page

MAPPED_BLOCKS = 20_000  # of a stage; of more, some are read
LOG_LINES = 400


def block_map(run: Run, stage: Stage, markers: Markers) -> str:
    """A map of a stage's blocks, of a region those under it, with a slider through its layers: how long each took."""
    grid: Blocks = stage.grid
    rows = stage.part.rows
    counts, first = tuple(map(len, rows)), tuple(row.start for row in rows)
    total = math.prod(counts)
    step = -(-total // MAPPED_BLOCKS)
    places = zip(*np.unravel_index(np.arange(0, total, step), counts), strict=True)
    read = [grid.index(tuple(int(c) + n for c, n in zip(place, first, strict=True))) for place in places]
    seconds = np.full(counts, np.nan)
    for i, receipt in markers.stored(stage.name, read):
        place = tuple(c - n for c, n in zip(grid.coords(i), first, strict=True))
        if all(0 <= c < n for c, n in zip(place, counts, strict=True)):
            seconds[place] = sum(receipt.seconds.values())
    seconds = seconds.ravel()
    wanted = np.array([run.wants_any(grid[i]) for i in read])
    known = seconds[np.isfinite(seconds) & (seconds > 0)]
    low, high = (max(known.min(), 1e-4), max(known.max(), 1.01e-4, known.min() * 1.01)) if known.size else (1e-4, 1.0)
    scaled = np.rint(2 + 253 * np.log(np.clip(seconds, low, high) / low) / math.log(high / low))
    values = np.where(np.isfinite(seconds), scaled, 0).astype(np.uint8)
    values[::step][~wanted] = 1
    edges = [[grid.edge(axis, k) for k in range(row.start, row.stop + 1)] for axis, row in enumerate(rows)]
    data = {"grid": counts, "first": first, "whole": grid.counts, "edges": edges, "low": float(low), "high": float(high),
            "values": base64.b64encode(values.tobytes()).decode()}  # fmt: skip
    part = f" of {len(grid):,} under the region" * (total < len(grid)) + f", every {step}th was read" * (step > 1)
    layers = f'<input type=range min=0 max={counts[0] - 1} value={counts[0] // 2} aria-label="layer of blocks">'
    return (
        f"<div class=map><h3>{html.escape(stage.title)}</h3><canvas></canvas><br>{layers} <output></output>"
        f"<p>{total:,} blocks{part}: {low:.2g} s (teal) to {high:.2g} s (red) each; light gray: nothing wanted.</p>"
        f'<script type="application/json">{json.dumps(data)}</script></div>'
    )


def settings_text(config: Config) -> str:
    """Settings that are no defaults."""
    lines = changed_settings(config)
    return f"<pre>{html.escape(chr(10).join(lines) or 'none')}</pre>"


def log_text(layout: Layout) -> str:
    """The end of what was said."""
    lines = layout.load_log().decode(errors="replace").splitlines()
    if not lines:
        return ""
    left_out = f"({len(lines) - LOG_LINES} earlier lines are in log.txt)\n" if len(lines) > LOG_LINES else ""
    return f"<pre>{html.escape(left_out + chr(10).join(lines[-LOG_LINES:]))}</pre>"


def whole_page(path: str, parts: Iterable[str]) -> str:
    """The page of a run, with the script of its maps."""
    script = Path(__file__).with_name("run_report.js").read_text(encoding="utf-8")
    body = f"<h1>{html.escape(path)}</h1>{''.join(parts)}<script>{script}</script>"
    return page.whole(html.escape(path.rpartition("/")[2]), body)
