"""One page about a run, in one file that needs no other: what it took, where, how it looks, what it was made with."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from volseg.box import Blocks
from volseg.engine.finished import FinishedRun, open_run
from volseg.engine.layout import Layout
from volseg.engine.receipts import Markers
from volseg.engine.run_log import changed_settings
from volseg.engine.stages import Stage, stages_of
from volseg.errors import DamagedFileError, UserError
from volseg.io import files

QUICK_BLOCKS = 300  # whose markers are read in some hundredths of a second
MAPPED_BLOCKS = 20_000  # of a stage; of more, some are read
PICTURE_WIDTH = 1400  # pixels
LOG_LINES = 400
LISTED = 10  # of the largest objects, and of the least certain decisions
BINS = 32
COLORS = (
    "#0f766e", "#b45309", "#4338ca", "#be123c", "#4d7c0f", "#0369a1", "#7e22ce", "#57534e", "#a16207", "#155e75", "#9f1239",
    "#65a30d", "#c2410c", "#6d28d9", "#14b8a6", "#64748b",
)  # fmt: skip


def report(run: str | os.PathLike | FinishedRun, out: str | os.PathLike | None = None) -> str:
    """Write one HTML page about a finished run; no other file, and nothing from the network, is needed to read it.

    Stages over time, throughput, plan against actual, a map of blocks, sizes of objects, examples, least certain decisions,
    settings, versions and log.

    Parameters
    ----------
    run : path or FinishedRun
        A finished run.
    out : path, optional
        The page, a local file; ``report.html`` in the run if not given.

    Returns
    -------
    str
        The path of the page.

    Raises
    ------
    UserError
        Where there is no finished run, or the page cannot be written.

    Examples
    --------
    >>> report("em.volseg.zarr")  # doctest: +SKIP
    'em.volseg.zarr/report.html'
    """
    opened = run if isinstance(run, FinishedRun) else open_run(os.fspath(run))
    text = _page(opened)
    if out is None:
        opened.layout.save_report(text.encode())
        return opened.layout.report_path
    try:
        files.write_atomic(os.fspath(out), text.encode())
    except OSError as error:
        raise UserError(f"cannot write {os.fspath(out)}: {error.strerror or error}; give another --out") from None
    return os.fspath(out)


def report_if_quick(run: FinishedRun) -> FinishedRun:
    """The run has its page where that takes a tenth of a second; a page that cannot be written costs the run nothing."""
    blocks = len(run.run.predict_grid) + len(run.run.grid)
    if not files.is_remote(run.path) and blocks <= QUICK_BLOCKS:
        with suppress(OSError, UserError):
            report(run)
    return run


def _page(run: FinishedRun) -> str:
    try:
        parts = [
            _section("", _cards(run)),
            _section("Stages over time", _timeline(run.summary)),
            _section("What workers did", _phases(run.summary)),
            _section("Plan and actual", _plan(run)),
            _section("Blocks", _maps(run)),
            _section("Sizes", _sizes(run)),
            _section("Examples", _examples(run.layout)),
            _section("Least certain", _uncertain(run.layout)),
            _section("Settings that are no defaults", _settings(run)),
            _section("Made with", _versions(run)),
            _section("Log", _log(run.layout)),
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        state = f"is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise DamagedFileError(run.path, "run.json", state) from None
    name = html.escape(run.path.rpartition("/")[2])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{_beside('.css')}</style><h1>{html.escape(run.path)}</h1>{''.join(parts)}<script>{_beside('.js')}</script></html>\n"
    )


def _beside(suffix: str) -> str:
    """Style and script of the page, which lie beside this module."""
    return Path(__file__).with_suffix(suffix).read_text(encoding="utf-8")


def _section(title: str, body: str) -> str:
    return (f"<h2>{html.escape(title)}</h2>" * bool(title)) + body if body else ""


def _table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
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


# ---------------------------------------------------------------- what it took


def _cards(run: FinishedRun) -> str:
    facts, voxels = run.summary, run.run.wanted_voxels
    total, peak = facts["seconds"]["total"], facts["peak_bytes"]
    cards = {
        "objects": f"{run.object_count:,}",
        "voxels": f"{voxels / 1e6:,.1f} M",
        "seconds": f"{total:,.1f}",
        "voxels/s": f"{voxels / 1e6 / max(total, 1e-9):,.2f} M",
        "GiB, largest worker": f"{peak['worker'] / 2**30:.2f}",
        "workers": f"{facts['workers']}",
    }
    if facts["device_share"]:
        cards["of predict the device computed"] = f"{100 * facts['device_share']:.0f} %"
    size = " x ".join(f"{n:g}" for n in run.voxel_size_nm)
    origin = f"{' x '.join(map(str, run.shape))} voxels of {size} nm, from {run.run.source.path}"
    none = f"<p>No object: {html.escape(facts['why_no_object'])}</p>" if not run.object_count else ""
    body = "".join(f"<div class=card><b>{html.escape(v)}</b>{html.escape(k)}</div>" for k, v in cards.items())
    return f"<p>{html.escape(origin)}</p>{none}<div class=cards>{body}</div>"


def _timeline(facts: dict) -> str:
    """A bar for each stage of the last command from its first block to its last."""
    spans = {name: span for name, span in facts.get("spans", {}).items() if span[1] > span[0]}
    if not spans:
        return ""
    total, left, width, row = max(end for _, end in spans.values()), 90, 860, 24
    lines = [
        f'<svg viewBox="0 0 {left + width + 90} {row * len(spans) + 26}" role="img" aria-label="stages over time">'
    ]
    for tick in _ticks(total):
        x = left + width * tick / total
        lines.append(f'<path class=axis d="M{x:.1f} 0V{row * len(spans)}"/><text x="{x:.1f}" y="{row * len(spans) + 18}" '
                     f'text-anchor="middle">{tick:g} s</text>')  # fmt: skip
    for i, (name, (begin, end)) in enumerate(spans.items()):
        x, length = left + width * begin / total, max(2.0, width * (end - begin) / total)
        y, color = row * i, COLORS[i % len(COLORS)]
        lines += [
            f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{html.escape(name)}</text>',
            f'<rect x="{x:.1f}" y="{y + 4}" width="{length:.1f}" height="{row - 8}" rx="3" fill="{color}"/>',
            f'<text x="{x + length + 6:.1f}" y="{y + 16}">{end - begin:.1f} s</text>',
        ]
    return "".join(lines) + "</svg><p>Of the last command. Stages run side by side.</p>"


def _ticks(total: float, count: int = 6) -> Iterator[float]:
    """Round numbers from 0 to ``total``.

    >>> list(_ticks(11.9))
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    rough = total / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    yield from (round(step * i, 10) for i in range(int(total / step + 1e-9) + 1))


def _phases(facts: dict) -> str:
    """By stage, the seconds of each phase, of all workers together."""
    stages = {name: phases for name, phases in facts["worker_seconds"].items() if sum(phases.values()) > 0}
    if not stages:
        return ""
    spent = sum(sum(phases.values()) for phases in stages.values())
    names = list(dict.fromkeys(phase for phases in stages.values() for phase in phases))
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    most, left, width, row = max(sum(phases.values()) for phases in stages.values()), 90, 860, 24
    lines = [f'<svg viewBox="0 0 {left + width + 90} {row * len(stages)}" role="img" aria-label="seconds of workers">']
    for i, (stage, phases) in enumerate(stages.items()):
        x, y = float(left), row * i
        lines.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{html.escape(stage)}</text>')
        for name, took in phases.items():
            length = width * took / most
            lines.append(f'<rect x="{x:.1f}" y="{y + 4}" width="{length:.1f}" height="{row - 8}" fill="{color[name]}">'
                         f"<title>{html.escape(name)} {took:.2f} s</title></rect>")  # fmt: skip
            x += length
        own = sum(phases.values())
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{own:.1f} s, {100 * own / spent:.0f} %</text>')
    keys = "".join(
        f'<span class=key><i style="background:{color[name]}"></i>{html.escape(name)}</span> ' for name in names
    )
    return "".join(lines) + f"</svg><p>{spent:.1f} s of all workers:{keys}</p>"


def _plan(run: FinishedRun) -> str:
    plan, actual = run.plan, run.actual
    if not plan or not actual:
        return ""
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        ("seconds", "total_seconds", lambda n: f"{n:,.1f}"),
        ("voxels through the network", "inferred_voxels", lambda n: f"{n / 1e6:,.1f} M"),
        ("voxels inferred for each one wanted", "redundancy", lambda n: f"{n:.2f}"),
        ("bytes written", "written_bytes", lambda n: f"{n / 1e9:.2f} GB"),
        ("memory, largest worker", "worker_bytes", lambda n: f"{n / 1e9:.2f} GB"),
        ("memory, this process", "client_bytes", lambda n: f"{n / 1e9:.2f} GB"),
    ]
    told = [
        (name, show(plan[key]), show(actual[key]))
        for name, key, show in rows
        if plan.get(key) is not None and key in actual
    ]
    rough = "" if plan.get("probed") else "<p>The plan was made of known rates; volseg plan measures.</p>"
    return _table(("", "plan", "actual"), told) + rough


# ---------------------------------------------------------------- blocks


def _maps(run: FinishedRun) -> str:
    """A map of blocks for the stage of probabilities and that of basins: how long each took."""
    if not run.layout.begun:
        return "<p>The work folder was cleaned, and with it what is known of each block.</p>"
    stages = stages_of(run.run)
    keys = run.summary["keys"]
    names = [name for name in (run.run.probability_stage, "fragments") if name in stages and name in keys]
    markers = Markers(run.path, keys)
    found = [_map(run, stages[name], markers) for name in names]
    return f"<div class=two>{''.join(found)}</div>"


def _map(run: FinishedRun, stage: Stage, markers: Markers) -> str:
    grid: Blocks = stage.grid
    step = -(-len(grid) // MAPPED_BLOCKS)
    seconds = np.full(len(grid), np.nan)
    for i, receipt in markers.stored(stage.name, range(0, len(grid), step)):
        seconds[i] = sum(receipt.seconds.values())
    wanted = np.array([run.run.wants_any(grid[i]) for i in range(0, len(grid), step)])
    known = seconds[np.isfinite(seconds) & (seconds > 0)]
    low, high = (max(known.min(), 1e-4), max(known.max(), 1.01e-4, known.min() * 1.01)) if known.size else (1e-4, 1.0)
    scaled = 2 + 253 * np.log(np.clip(seconds, low, high) / low) / math.log(high / low)
    values = np.where(np.isfinite(seconds), scaled, 0).astype(np.uint8)
    values[::step][~wanted] = 1
    data = {"grid": grid.counts, "block": grid.block, "shape": grid.shape, "low": float(low), "high": float(high),
            "values": base64.b64encode(values.tobytes()).decode()}  # fmt: skip
    part = f", every {step}th was read" if step > 1 else ""
    layers = (
        f'<input type=range min=0 max={grid.counts[0] - 1} value={grid.counts[0] // 2} aria-label="layer of blocks">'
    )
    return (
        f"<div class=map><h3>{html.escape(stage.title)}</h3><canvas></canvas><br>{layers} <output></output>"
        f"<p>{len(grid):,} blocks{part}: {low:.2g} s (teal) to {high:.2g} s (red) each; light gray: nothing wanted.</p>"
        f'<script type="application/json">{json.dumps(data)}</script></div>'
    )


# ---------------------------------------------------------------- objects


def _sizes(run: FinishedRun) -> str:
    table = run.layout.read_columns("objects")
    if not table.num_rows:
        return ""
    volume = table["volume_um3"].to_numpy()
    order = np.argsort(-volume, kind="stable")[:LISTED]
    shown = ("id", "volume_um3", "length_nm", "mean_probability", "confidence", "touches_border")
    rows = zip(*(table[name].to_numpy()[order].tolist() for name in shown), strict=True)
    picture = _histogram(np.log10(volume), lambda v: f"{10**v:.3g}", "volume, µm³")
    certain = _histogram(table["confidence"].to_numpy().astype(float), lambda v: f"{v:.2g}", "confidence")
    return f"<div class=two>{picture}{certain}</div><h3>The largest</h3>{_table(shown, rows)}"


def _histogram(values: np.ndarray, label: Callable[[float], str], name: str) -> str:
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


def _examples(layout: Layout) -> str:
    """The overlay, small enough for a page."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(layout.load_picture())).convert("RGB")
    except (OSError, ValueError, zlib.error):
        return "<p>There is no overlay.png, or none that can be read.</p>"
    if picture.width > PICTURE_WIDTH:
        picture = picture.reduce(-(-picture.width // PICTURE_WIDTH))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82)
    return f'<img alt="sections with labels" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _uncertain(layout: Layout) -> str:
    try:
        table = layout.read_columns("merges").slice(0, LISTED)
    except DamagedFileError:
        return ""
    if not table.num_rows:
        return "<p>No join and no border: nothing was close.</p>"
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return _table(table.column_names, rows) + "<p>volseg review draws them.</p>"


# ---------------------------------------------------------------- what it was made with


def _settings(run: FinishedRun) -> str:
    lines = changed_settings(run.config)
    return f"<pre>{html.escape(chr(10).join(lines) or 'none')}</pre>"


def _versions(run: FinishedRun) -> str:
    facts, own = run.summary, run.run
    rows = [
        (
            "volume",
            f"{own.source.path} ({own.source.kind}, {' x '.join(map(str, own.source.shape))} {own.source.dtype})",
        )
    ]
    rows += [("checksum of it", own.checksum)]
    if own.engine:
        rows += [("engine", f"{own.engine}, {own.engine.processor}, batch {own.engine.batch} ({own.engine.why})")]
        rows += [("model", f"{own.config.predict.model or 'the shipped one'}, sha256 {own.model_sha256}")]
    rows += [(name, version) for name, version in facts["versions"].items()]
    return _table(("", ""), rows)


def _log(layout: Layout) -> str:
    lines = layout.load_log().decode(errors="replace").splitlines()
    if not lines:
        return ""
    left_out = f"({len(lines) - LOG_LINES} earlier lines are in log.txt)\n" if len(lines) > LOG_LINES else ""
    return f"<pre>{html.escape(left_out + chr(10).join(lines[-LOG_LINES:]))}</pre>"
