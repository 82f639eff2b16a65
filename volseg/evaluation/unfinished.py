"""One page about a run that is not finished: what failed, how far it got, what it said last."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass

from volseg.engine import folder, lock
from volseg.engine.layout import Layout
from volseg.engine.receipts import Markers
from volseg.engine.run import Run
from volseg.engine.stages import keys, stages_of
from volseg.evaluation import page
from volseg.evaluation.report_parts import block_map, log_text, settings_text, whole_page

SHOWN_FAILURES = 20  # blocks; the others are in failed.json
SHOWN_TRACEBACKS = 3


@dataclass(frozen=True)
class UnfinishedRun:
    """A run that is not finished: its name when it is, its description where it lies now, and who is writing it, if anybody."""

    out: str
    run: Run
    writer: str


def find(path: str) -> UnfinishedRun | None:
    """The unfinished run of that name, or in that folder; None where there is none, or it is finished."""
    out = folder.absolute(path.rstrip("/")).removesuffix(".partial")
    if Layout(out).finished:
        return None
    run = folder.peek_run(folder.partial_path(out))
    return UnfinishedRun(out, run, lock.writer(out)) if run else None


def page_of(left: UnfinishedRun) -> str:
    """The page as HTML."""
    run, markers = left.run, Markers(left.run.out, keys(left.run))
    failures = list(markers.failed_before().values())
    stages = stages_of(run)
    mapped = [stages[name] for name in (run.probability_stage, "fragments") if name in stages]
    maps = "".join(block_map(run, stage, markers) for stage in mapped)
    parts = [
        page.section("", _state(left, failures)),
        page.section("What failed", _failures(failures, run.layout)),
        page.section("How far it got", page.table(("stage", "blocks done", "of", "%"), _stages(run, markers))),
        page.section("Blocks", f"<div class=two>{maps}</div>"),
        page.section("Settings that are no defaults", settings_text(run.config)),
        page.section("Log", log_text(run.layout)),
    ]
    return whole_page(left.out, parts)


def _state(left: UnfinishedRun, failures: list[dict]) -> str:
    if left.writer:
        return f"<p>Not finished: it {html.escape(left.writer)}.</p>"
    advice = "The same command goes on from what is done."
    if failures:
        count = f"{len(failures):,} block{'s' * (len(failures) > 1)} failed"
        advice = "Mend the cause, and the same command goes on from what is done; --skip-failed leaves these blocks."
        return f"<p>Not finished: {count}, and all that could be done without is done. {advice}</p>"
    return f"<p>Not finished: it was stopped, or it failed as a whole; the end of the log says why. {advice}</p>"


def _failures(failures: list[dict], layout: Layout) -> str:
    """The blocks that failed, and the first tracebacks."""
    if not failures:
        return "<p>No block that is not done has failed.</p>"
    rows = [[one.get(name, "") for name in ("stage", "block", "box", "reason", "worker")] for one in failures]
    more = len(failures) - SHOWN_FAILURES
    left_out = f"<p>{more:,} more are in {html.escape(layout.failures_path)}.</p>" if more > 0 else ""
    texts = dict.fromkeys(str(one.get("traceback") or "").strip() for one in failures)
    traces = "".join(f"<pre>{html.escape(text)}</pre>" for text in [text for text in texts if text][:SHOWN_TRACEBACKS])
    table = page.table(("stage", "block", "box z,y,x", "reason", "worker"), rows[:SHOWN_FAILURES])
    return f"{table}{left_out}{traces}"


def _stages(run: Run, markers: Markers) -> Iterator[tuple[str, str, str, str]]:
    """Of each stage that has blocks: how many are done. Of those that decide on all basins, one way alone is taken."""
    for stage in stages_of(run).values():
        done = len(markers.done(stage.name))
        if stage.group == "tree" and not done:
            continue
        count = stage.part.count
        share = f"{100 * min(done, count) / count:.0f}" if count else "100"
        yield stage.name, f"{done:,}", f"{count:,}", share
