"""The log of a run, ``log.txt`` in its folder: what each command said that worked on it, and when."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from volseg.config import Config
from volseg.engine.finished import FinishedRun
from volseg.engine.layout import Layout
from volseg.engine.run import Run
from volseg.engine.run_view import RunView, StageView
from volseg.engine.stages import stages_of
from volseg.errors import UserError
from volseg.io import files
from volseg.progress import LoggedProgress, Progress, log_line

MAX_BYTES = 1 << 20  # of a log; beyond, the older half is dropped
KEPT_LINES = 4096  # that a command writes anew where its run began anew
OVERALL_INTERVAL_S = 0.5  # between looks at how far the whole run is
REMOTE_INTERVAL_S = 60  # an object store has no appending: the whole log is written each time


class RunLog:
    """Lines for the log of a run; a log that cannot be written costs the run nothing.

    A local log is opened for each line, so that it moves with its folder; nothing waits for the disk.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.kept: deque[str] = deque(maxlen=KEPT_LINES)  # of this command
        self.pending: list[str] = []
        self.last = -float(REMOTE_INTERVAL_S)
        self.broken = False

    def write(self, line: str) -> None:
        self.kept.append(line)
        self.pending.append(line)
        if not files.is_remote(self.layout.path) or time.monotonic() - self.last > REMOTE_INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        """All lines are written."""
        if not self.pending or self.broken:
            return
        try:
            if files.is_remote(self.layout.path):
                self._rewrite()
            else:
                self._append(Path(self.layout.log_path))
        except OSError:  # a full disk, a folder that went away: the run itself will tell
            self.broken = True
        self.pending.clear()
        self.last = time.monotonic()

    def _append(self, path: Path) -> None:
        lines = self.pending if path.exists() else list(self.kept)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            size = file.tell()
        if size > MAX_BYTES:
            self.layout.save_log(_newer_half(path.read_bytes()))

    def _rewrite(self) -> None:
        before = self.layout.load_log()
        text = "".join(f"{line}\n" for line in (self.pending if before else self.kept)).encode()
        self.layout.save_log(_newer_half(before + text) if len(before) + len(text) > MAX_BYTES else before + text)


def _newer_half(text: bytes) -> bytes:
    """The later lines of a log that is too long.

    >>> _newer_half(b"one\\ntwo\\nthree\\nfour\\n")
    b'(earlier lines were dropped)\\nfour\\n'
    """
    return b"(earlier lines were dropped)\n" + text[len(text) // 2 :].partition(b"\n")[2]


class RunProgress(LoggedProgress):
    """The progress of one command's work on a run, which goes to the run's log from when the run has a folder."""

    def __init__(self, progress: Progress, start: float) -> None:
        if isinstance(progress, LoggedProgress):
            super().__init__(progress.shown)
            self.kept.extend(progress.kept)
        else:
            super().__init__(progress)
        self.since = time.time() - (time.perf_counter() - start)
        self.log: RunLog | None = None
        self.view: RunView | None = None
        self.last = 0.0  # time at which it was told how far the run is

    def begin(self, run: Run, plan: dict | None = None) -> None:
        """The log begins with the command, the machine and the settings that are no defaults."""
        self.view = RunView(run.out, time.time(), plan or {}, stages=_views(run))
        self.log = RunLog(run.layout)
        self.log.write(log_line("\n".join([_headline(), *changed_settings(run.config)]), when=self.since))
        self.attach(self.log.write)

    def stage(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        advance = super().stage(name, voxels, done)
        stage = self.view.stages.get(name) if self.view else None
        if stage is None:
            return advance
        stage.done, stage.before = done, done if stage.before < 0 else stage.before
        self._tell_overall()

        def advanced(more: int) -> None:
            stage.done += more
            self._tell_overall()
            advance(more)

        return advanced

    def _tell_overall(self) -> None:
        """What is shown tells how far the whole run is, if it can."""
        now = time.time()
        if self.view and now - self.last > OVERALL_INTERVAL_S and hasattr(self.shown, "overall"):
            self.last = self.view.now = now
            self.shown.overall(*self.view.outlook())

    def end(self, finished: FinishedRun) -> None:
        """The log, which lies at the run's final name now, ends with what the run gave and took."""
        if self.log is not None:
            self.log.layout = finished.layout
        self.record("\n".join(["done", *finished.report()]))
        self._flush()

    def fail(self, error: BaseException) -> None:
        """The log ends with why the command did; with the traceback where nobody foresaw it."""
        if isinstance(error, UserError):
            self.record(str(error), logging.ERROR)
        elif isinstance(error, KeyboardInterrupt):
            self.record("stopped by Ctrl-C", logging.WARNING)
        else:
            self.record("".join(traceback.format_exception(error)).rstrip(), logging.ERROR)
        self._flush()

    def _flush(self) -> None:
        if self.log is not None:
            self.log.flush()


def _views(run: Run) -> dict[str, StageView]:
    """The stages of a run as far as they are known when it begins: that a tree decides shows later."""
    return {
        stage.name: StageView(stage.title, stage.grid.counts, stage.grid.shape, stage.part.voxels, stage.on_device)
        for stage in stages_of(run).values()
        if stage.group != "tree"
    }


def _headline() -> str:
    """What runs here: version, command, process, machine."""
    words = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"volseg {metadata.version('volseg')}: {words}\nprocess {os.getpid()} on {platform.node()}, {platform.platform()}"


def changed_settings(config: Config) -> list[str]:
    """``section.key = value`` of each setting that is no default; not of training, which a run has none of."""
    plain, default = (one.model_dump(mode="json", exclude={"train", "tune"}) for one in (config, Config()))
    return [
        f"{section}.{key} = {value!r}"
        for section, values in plain.items()
        for key, value in values.items()
        if value != default[section][key]
    ]
