"""One page about a run, in one file that needs no other: what it took, where, how it looks, what it was made with."""

from __future__ import annotations

import html
import io
import math
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np

from volseg.engine.finished import FinishedRun, open_run
from volseg.engine.layout import Layout
from volseg.engine.receipts import Markers
from volseg.engine.run import Run
from volseg.engine.stages import stages_of
from volseg.errors import DamagedFileError, IncompleteRunError, UserError
from volseg.evaluation import page, unfinished
from volseg.evaluation.report_parts import block_map, log_text, settings_text, whole_page
from volseg.io import files

QUICK_BLOCKS = 300  # whose markers are read in some hundredths of a second
PICTURE_WIDTH = 1400  # pixels
LISTED = 10  # of the largest objects, and of the least certain decisions


def report(run: str | os.PathLike | FinishedRun, out: str | os.PathLike | None = None) -> str:
    """Write one HTML page about a run; no other file, and nothing from the network, is needed to read it.

    Stages over time, throughput, plan against actual, a map of blocks, sizes of objects, examples, least certain decisions,
    settings, versions and log; of a run that is not finished, what failed, how far it got, settings and log.

    Parameters
    ----------
    run : path or FinishedRun
        The run.
    out : path, optional
        The page, a local file; if not given, ``report.html`` in the run, and beside one that is being written.

    Returns
    -------
    str
        The path of the page.

    Raises
    ------
    UserError
        Where there is no run, or the page cannot be written.

    Examples
    --------
    >>> report("em.volseg.zarr")  # doctest: +SKIP
    'em.volseg.zarr/report.html'
    """
    left = None if isinstance(run, FinishedRun) else unfinished.find(os.fspath(run))
    if left:
        text, layout = unfinished.page_of(left), left.run.layout
        out = f"{left.out}.report.html" if out is None and left.writer else out
    else:
        opened = run if isinstance(run, FinishedRun) else open_run(os.fspath(run))
        text, layout = _page(opened), opened.layout
    if out is None:
        layout.save_report(text.encode())
        return layout.report_path
    try:
        files.write_atomic(os.fspath(out), text.encode())
    except OSError as error:
        raise UserError(f"cannot write {os.fspath(out)}: {error.strerror or error}; give another --out") from None
    return os.fspath(out)


def report_if_quick(run: FinishedRun) -> FinishedRun:
    """The run has its page where that takes a tenth of a second; a page that cannot be written costs the run nothing."""
    if is_quick(run.run):
        with suppress(OSError, UserError):
            report(run)
    return run


@contextmanager
def report_of_failure(run: Run, tell: Callable[[str], None]) -> Iterator[None]:
    """A run that stops inside has its page, which is told, if that takes a tenth of a second; one that is refused has none."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        refused = isinstance(error, UserError) and not isinstance(error, IncompleteRunError)
        with suppress(OSError, UserError):
            if not refused and is_quick(run) and (left := unfinished.find(run.out)):
                left.run.layout.save_report(unfinished.page_of(replace(left, writer="")).encode())
                tell(f"report   {left.run.layout.report_path}: what failed, and how far it got")
        raise


def is_quick(run: Run) -> bool:
    """Whether a run's page takes a tenth of a second."""
    if files.is_remote(run.out):
        return False
    return stages_of(run)[run.probability_stage].part.count + run.parts.own.count <= QUICK_BLOCKS


def _page(run: FinishedRun) -> str:
    try:
        parts = [
            page.section("", _cards(run)),
            page.section("Stages over time", _timeline(run.summary)),
            page.section("What workers did", _phases(run.summary)),
            page.section("Plan and actual", _plan(run)),
            page.section("Blocks", _maps(run)),
            page.section("Sizes", _sizes(run)),
            page.section("Examples", _examples(run.layout)),
            page.section("Least certain", _uncertain(run.layout)),
            page.section("Settings that are no defaults", settings_text(run.config)),
            page.section("Made with", _versions(run)),
            page.section("Log", log_text(run.layout)),
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        state = f"is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise DamagedFileError(run.path, "run.json", state) from None
    return whole_page(run.path, parts)


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
        cards["of predict it waited for data"] = f"{100 * facts.get('data_wait_share', 0.0):.1f} %"
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
        y, color = row * i, page.COLORS[i % len(page.COLORS)]
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
    color = {name: page.COLORS[i % len(page.COLORS)] for i, name in enumerate(names)}
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
    before = run.summary.get("share_before", 0.0)
    rest = (
        f"<p>The last command did what an earlier one had left: {100 * before:.0f} % of the probabilities were there.</p>"
        if before
        else ""
    )
    return page.table(("", "plan", "actual"), told) + rough + rest


# ---------------------------------------------------------------- blocks


def _maps(run: FinishedRun) -> str:
    """A map of blocks for the stage of probabilities and that of basins: how long each took."""
    if not run.layout.begun:
        return "<p>The work folder was cleaned, and with it what is known of each block.</p>"
    stages = stages_of(run.run)
    keys = run.summary["keys"]
    names = [name for name in (run.run.probability_stage, "fragments") if name in stages and name in keys]
    markers = Markers(run.path, keys)
    found = [block_map(run.run, stages[name], markers) for name in names]
    return f"<div class=two>{''.join(found)}</div>"


# ---------------------------------------------------------------- objects


def _sizes(run: FinishedRun) -> str:
    table = run.layout.read_columns("objects")
    if not table.num_rows:
        return ""
    volume = table["volume_um3"].to_numpy()
    order = np.argsort(-volume, kind="stable")[:LISTED]
    shown = ("id", "volume_um3", "length_nm", "mean_probability", "confidence", "touches_border")
    rows = zip(*(table[name].to_numpy()[order].tolist() for name in shown), strict=True)
    picture = page.histogram(np.log10(volume), lambda v: f"{10**v:.3g}", "volume, µm³")
    certain = page.histogram(table["confidence"].to_numpy().astype(float), lambda v: f"{v:.2g}", "confidence")
    return f"<div class=two>{picture}{certain}</div><h3>The largest</h3>{page.table(shown, rows)}"


def _examples(layout: Layout) -> str:
    """The overlay, small enough for a page."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(layout.load_picture())).convert("RGB")
    except (OSError, ValueError, zlib.error):
        return "<p>There is no overlay.png, or none that can be read.</p>"
    if picture.width > PICTURE_WIDTH:
        picture = picture.reduce(-(-picture.width // PICTURE_WIDTH))
    return page.picture(np.asarray(picture), "sections with labels")


def _uncertain(layout: Layout) -> str:
    try:
        table = layout.read_columns("merges").slice(0, LISTED)
    except DamagedFileError:
        return ""
    if not table.num_rows:
        return "<p>No join and no border: nothing was close.</p>"
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return page.table(table.column_names, rows) + "<p>volseg review draws them.</p>"


# ---------------------------------------------------------------- what it was made with


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
    if own.corrections:
        rows += [("corrections", str(own.corrections))]
    if own.partition:
        rows += [("partition of basins", own.partition)]
    rows += [(name, version) for name, version in facts["versions"].items()]
    return page.table(("", ""), rows)
