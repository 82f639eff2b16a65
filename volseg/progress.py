"""What a command shows: progress as bars, lines or nothing, tables as plain text, and lines with their time for logs.

These are for ``--log-file``, ``-v`` and the log in a run's folder. All of them go through the logger ``volseg`` too, so that
a program that calls volseg may send them wherever its own lines go.
"""

from __future__ import annotations

import html
import io
import logging
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Protocol

from volseg.errors import printable

LINE_INTERVAL_S = 10  # between lines of progress where there is no terminal
NOTEBOOK_INTERVAL_S = 0.3
LOG_INTERVAL_S = 60  # between lines of progress in a log
SPEED_S = 120  # over which a speed is taken, at least: blocks end in steps
WHOLE = "whole run"
KEPT_LINES = 1000  # of a log that has no place to be written to yet
LOGGER = logging.getLogger("volseg")
LOGGER.addHandler(logging.NullHandler())
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")


class Progress(Protocol):
    """What a command tells while it works. Several stages may be under way at once; each ends when all its voxels are done.

    One that has a method ``overall(share, seconds_left)`` hears, from a run's first second on, which share of all its work is
    done and how long the rest will take: None where nothing tells.
    """

    def message(self, text: str) -> None:
        """Tells one thing."""

    def stage(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        """Starts a stage of ``voxels``, some ``done`` before; call what it returns with voxels as they are done."""

    def stop(self) -> None:
        """Ends what is shown."""


class Silent:
    """Tells nothing."""

    def message(self, text: str) -> None:
        """Nothing is told."""

    def stage(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        return lambda _: None

    def stop(self) -> None:
        """There is nothing to end."""


class Lines:
    """A line on standard error for each message, each stage that is done, and every ten seconds for those under way."""

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self.write = write or (lambda text: print(text, file=sys.stderr, flush=True))
        self.stages: dict[str, StageProgress] = {}
        self.last_line = time.monotonic()
        self.whole = ""

    def message(self, text: str) -> None:
        self.write(text)

    def overall(self, share: float, left: float | None) -> None:
        first, self.whole = not self.whole, overall_text(share, left)
        if first and left is not None:
            self.message(self.whole)

    def stage(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        self.stages[name] = StageProgress(name, voxels, done)
        if done >= voxels:
            self._advance(name, 0)
        return lambda more: self._advance(name, more)

    def _advance(self, name: str, voxels: int) -> None:
        now, stage = time.monotonic(), self.stages[name]
        stage.advance(voxels)
        if stage.done >= stage.voxels:
            self.message(self.stages.pop(name).line(now))
        elif now - self.last_line > LINE_INTERVAL_S:
            lines = [stage.line(now) for stage in self.stages.values() if stage.done > stage.before]
            self.message("; ".join([*[self.whole] * bool(self.whole), *lines]))
        else:
            return
        self.last_line = now

    def stop(self) -> None:
        """There is nothing to end."""


def overall_text(share: float, left: float | None) -> str:
    """How far a run is, in a few words.

    >>> overall_text(0.034, 512.0), overall_text(0.0, None)
    ('whole run    3 %  8.5 min left', 'whole run    0 %')
    """
    return f"{WHOLE:10} {100 * share:3.0f} %" + ("" if left is None else f"  {duration(left)} left")


def duration(seconds: float) -> str:
    """A time as one reads it.

    >>> duration(3.2), duration(150), duration(9000), duration(200_000)
    ('3 s', '2.5 min', '2.5 h', '2.3 days')
    """
    for unit, length, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < most:
            return f"{seconds / length:.{0 if length == 1 else 1}f} {unit}"
    return f"{seconds / 86400:.1f} days"


class StageProgress:
    """How far a stage has come, and how fast: its speed is that since it began, or of the last `SPEED_S`.

    The time counts from the stage's beginning and not from its first block, which would leave out what that one took.

    >>> stage = StageProgress("predict", 100, 20, now=0.0)
    >>> for seconds in (10.0, 10.1):
    ...     stage.advance(20, seconds)
    >>> round(stage.speed, 2), round(stage.left(12.0), 2)
    (3.96, 8.2)
    """

    def __init__(self, name: str, voxels: int, done: int, now: float | None = None) -> None:
        self.name, self.voxels, self.done, self.before = name, voxels, done, done
        self.start = time.monotonic() if now is None else now
        self.end: float | None = None
        self.ends = deque([(self.start, done)])  # moments, and what was done then

    def advance(self, voxels: int, now: float | None = None) -> None:
        """So many more are done."""
        now = time.monotonic() if now is None else now
        self.done += voxels
        if len(self.ends) > 1 and now - self.ends[-2][0] < SPEED_S / 100:
            self.ends.pop()  # a moment for each of many short blocks would be too many
        self.ends.append((now, self.done))
        while len(self.ends) > 2 and self.ends[1][0] <= now - SPEED_S:
            self.ends.popleft()
        if self.done >= self.voxels and self.end is None:
            self.end = now

    @property
    def speed(self) -> float:
        """Voxels per second; 0 where none was done."""
        first, last = ((self.start, self.before), (self.end, self.done)) if self.end else (self.ends[0], self.ends[-1])
        return (last[1] - first[1]) / max(last[0] - first[0], 1e-9)

    def left(self, now: float) -> float | None:
        """Seconds that the rest will take; None where nothing tells."""
        if self.end is not None or not self.speed:
            return None
        return max(0.0, (self.voxels - self.done) / self.speed - (now - self.ends[-1][0]))

    def line(self, now: float) -> str:
        """Its name, share, speed and the time that it still takes."""
        if self.before >= self.voxels:
            return f"{self.name:10} 100 %  done before"
        left = self.left(now)
        rest = "" if left is None else f", {left:.0f} s left"
        return f"{self.name:10} {100 * self.done / self.voxels:3.0f} %  {self.speed / 1e6:.2f} Mvoxel/s{rest}"


class Bars:
    """Bars of `rich`, in a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.live: Any = None
        self.bars: dict[str, Any] = {}

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def overall(self, share: float, left: float | None) -> None:
        text = "" if left is None else duration(left)
        self._begin()
        if WHOLE not in self.bars:
            self.bars[WHOLE] = self.live.add_task(WHOLE, total=1.0, left=text, stage=None)
        self.live.update(self.bars[WHOLE], completed=share, left=text)

    def stage(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        self._begin()
        if name in self.bars:  # the run has begun again
            self.live.remove_task(self.bars[name])
        stage = StageProgress(name, voxels, done)
        task = self.bars[name] = self.live.add_task(name, total=voxels, completed=done, left="", stage=stage)

        def advance(more: int) -> None:
            stage.advance(more)
            self.live.advance(task, more)

        return advance

    def _begin(self) -> None:
        if self.live is None:
            self.live = _rich_progress(self.console)
            self.live.start()

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()


class NotebookBars:
    """Messages and bars in a notebook: one display, which is updated. (`rich` wants ipywidgets for that.)"""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.stages: dict[str, StageProgress] = {}
        self.handle: Any = None
        self.shown = 0.0
        self.whole: tuple[float, str] | None = None

    def message(self, text: str) -> None:
        self.messages.append(text)
        self._show()

    def overall(self, share: float, left: float | None) -> None:
        self.whole = share, overall_text(share, left)

    def stage(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        self.stages.pop(name, None)  # the run has begun again
        stage = self.stages[name] = StageProgress(name, voxels, done)
        self._show()

        def advance(more: int) -> None:
            stage.advance(more)
            if time.monotonic() - self.shown > NOTEBOOK_INTERVAL_S:
                self._show()

        return advance

    def stop(self) -> None:
        if self.stages:
            self._show()

    def _show(self) -> None:
        self.shown, tools = time.monotonic(), sys.modules["IPython"].display  # there, since this is a notebook
        page = tools.HTML(self._page())
        if self.handle is None:
            self.handle = tools.display(page, display_id=True)
        else:
            self.handle.update(page)

    def _page(self) -> str:
        now = time.monotonic()
        told = [(stage.voxels, stage.done, stage.line(now)) for stage in self.stages.values()]
        rows = (
            f'<tr><td><progress max="{most}" value="{done}"></progress></td>'
            f'<td style="text-align:left"><code>{html.escape(line)}</code></td></tr>'
            for most, done, line in ([(1, *self.whole)] if self.whole else []) + told
        )
        said = html.escape("\n".join(self.messages))
        return f"<pre>{said}</pre><table>{''.join(rows)}</table>"


def _rich_progress(console: Any) -> Any:
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Text:
            stage = task.fields["stage"]
            if stage is None:  # the whole run
                return Text("")
            return Text(f"{stage.speed / 1e6:.2f} Mvoxel/s" if stage.speed else "- Mvoxel/s")

    class Left(ProgressColumn):
        def render(self, task: Any) -> Text:
            stage = task.fields["stage"]
            seconds = stage.left(time.monotonic()) if stage else None
            return Text(task.fields["left"] if seconds is None else duration(seconds))

    return Progress(
        TextColumn("{task.description:10}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), Speed(),
        TimeElapsedColumn(), TextColumn("left"), Left(), console=console,
    )  # fmt: skip


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell else None
    return running is not None and "IPKernelApp" in getattr(running, "config", {})


def default_progress() -> Progress:
    """Bars in a terminal or notebook, silent elsewhere."""
    if in_notebook():
        return NotebookBars()
    return Bars() if sys.stderr.isatty() else Silent()


def terminal_progress() -> Progress:
    """Bars in a terminal, lines elsewhere."""
    return Bars() if sys.stderr.isatty() else Lines()


class LoggedProgress:
    """Shows what another `Progress` shows, and has it in a log, too: the logger ``volseg``, and what `attach` names."""

    def __init__(self, shown: Progress) -> None:
        self.shown = shown
        self.kept: deque[str] = deque(maxlen=KEPT_LINES)
        self.sink: Callable[[str], None] | None = None

    def attach(self, sink: Callable[[str], None]) -> None:
        """Lines go to ``sink`` from here on, those that were said before first."""
        self.sink = sink
        while self.kept:
            sink(self.kept.popleft())

    def record(self, text: str, level: int = logging.INFO) -> None:
        """Has a thing in the log that is not shown."""
        LOGGER.log(level, "%s", text)
        (self.sink or self.kept.append)(log_line(text, level))

    def message(self, text: str) -> None:
        self.shown.message(text)
        self.record(text)

    def stage(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        advance, stage = self.shown.stage(name, voxels, done), StageProgress(name, voxels, done)
        last = stage.start
        self.record(f"{name}: {voxels / 1e6:.2f} million" + f", {done / 1e6:.2f} done before" * (done > 0))

        def advanced(more: int) -> None:
            nonlocal last
            advance(more)
            stage.advance(more)
            now = time.monotonic()
            if more and (stage.done >= voxels or now - last > LOG_INTERVAL_S):
                self.record(stage.line(now))
                last = now

        return advanced

    def stop(self) -> None:
        self.shown.stop()


# ---------------------------------------------------------------- tables


def format_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows under their column names, as plain text; a column of numbers stands to the right, and None is a dash.

    Floats have four digits after the point; give a string for other digits.

    >>> print(format_table(("score", "voxels"), [("iou", 12), ("recall [%]", None)]))
    score       voxels
    iou             12
    recall [%]       -
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0), collapse_padding=True)
    for i, column in enumerate(columns):
        text = any(isinstance(row[i], str) for row in rows)
        table.add_column(Text(column), justify="left" if text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    page = io.StringIO()
    Console(file=page, width=10_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


@contextmanager
def displayed(progress: Progress | None) -> Iterator[LoggedProgress]:
    """Progress as asked for, else as suits where this runs, in the log, too; ended afterwards."""
    progress = LoggedProgress(progress or default_progress())
    try:
        yield progress
    finally:
        progress.stop()


# ---------------------------------------------------------------- log


def log_line(text: str, level: int = logging.INFO, when: float | None = None) -> str:
    """``text`` as it stands in a log: time, level, control characters written out, further lines set in, no passwords.

    >>> log_line("a\\x1b[31m\\ns3://key:secret@host/em", when=0.0).partition(" INFO ")[2].split("\\n")
    ['a\\\\x1b[31m', '    s3://***@host/em']
    """
    moment = datetime.now() if when is None else datetime.fromtimestamp(when)
    body = "\n    ".join(printable(part) for part in _PASSWORD.sub("***", text).split("\n"))
    return f"{moment.astimezone().isoformat(timespec='milliseconds')} {logging.getLevelName(level)} {body}"


class LineFormatter(logging.Formatter):
    """Records as `log_line` has them, with the traceback of an error that belongs to one."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return log_line(text, record.levelno, record.created)
