"""Training, read from :func:`train` down: load, step, validate, checkpoint, finish. A killed run can go on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from volseg.config import Config, Train
from volseg.errors import UserError
from volseg.inference import model
from volseg.system import tune_malloc
from volseg.training import checkpoint, report
from volseg.training import distributed as parallel
from volseg.training.card import closing_lines, model_card, wait_share
from volseg.training.checkpoint import State
from volseg.training.decoding import calibrate
from volseg.training.samples import Source, load_sources
from volseg.training.steps import progress, settle, start, steps
from volseg.training.validate import validate

Say = Callable[[str], None]
CHECKPOINT_SECONDS = 120
TOLD_SECONDS = 60


def train(config: Config, say: Say = print) -> Path:
    """Path of the model that ``config.train`` makes: ``OUT/model.safetensors``, with ``report.html`` and its pictures.

    If ``OUT`` holds a checkpoint of the same settings, the run goes on from it, with the results that it would have had
    without the stop (bit for bit on a CPU with one thread, unless ``minutes`` ended it).
    """
    knobs = config.train
    check(config)
    tune_malloc()
    sources = load_sources(knobs)
    say(report.data_table(sources))
    out = _folder(knobs.out)
    with parallel.together(_processes(knobs), _follow, config):
        state = _begin(knobs)
        if state.step:
            say(f"going on from step {state.step} in {out}")
        with _progress() as bar:
            task = bar.add_task("train", total=knobs.steps, completed=state.step, shown="", left="")
            show = _lines(knobs, say) if bar.disable else lambda row: _show(bar, task, row)
            _lead(state, sources, config, show, say)
    return finish(state, sources, config, say)


def _follow(config: Config) -> None:
    """What the other processes do: the same steps on their patches."""
    state, sources = _begin(config.train), load_sources(config.train)
    for _ in steps(state, sources, config.train, lambda text: None):
        pass


def _begin(knobs: Train) -> State:
    """The run at its last checkpoint, or at step 0."""
    state = start(knobs, _device(knobs))
    checkpoint.resume(state, Path(knobs.out) / checkpoint.NAME, knobs)
    return state


def _lead(state: State, sources: list[Source], config: Config, show: Callable, say: Say) -> None:
    """Trains to the end of the run; validates and saves a model every so many steps, and a checkpoint more often."""
    knobs, out = config.train, Path(config.train.out)
    last_saved = time.monotonic()
    with _interrupted() as interrupted:
        for row in steps(state, sources, knobs, say):
            show({**row, "left": _left(state, knobs)})
            if state.step % knobs.every == 0:
                scores = validate(state.averaged, sources, knobs)
                state.history += [{"step": state.step, "split": "validation", **scores["all"]}] if scores else []
                say(_line(state, knobs))
                model.save(out / "model.safetensors", state.averaged, model_card(config, sources, state, scores, None))
            stop = interrupted()
            if state.step % knobs.every == 0 or stop or time.monotonic() - last_saved > CHECKPOINT_SECONDS:
                checkpoint.save(state, out / checkpoint.NAME, knobs)
                last_saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    checkpoint.save(state, out / checkpoint.NAME, knobs)


@contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only remembered, for the end of a step; a second one stops at once."""
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def hear(signum: int, _: object) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(signum)

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield lambda: bool(heard)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(state: State, sources: list[Source], config: Config, say: Say) -> Path:
    """Path of the final model: averaged weights, their own batch-norm statistics, rounded, scored and calibrated."""
    knobs, out = config.train, Path(config.train.out)
    settle(state.averaged, sources, knobs, state.parts)
    for value in state.averaged.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half().float())
    scores = validate(state.averaged, sources, knobs)
    chosen = calibrate(state.averaged, sources, config)
    card = model_card(config, sources, state, scores, chosen)
    path = out / "model.safetensors"
    model.save(path, state.averaged, card)
    last = [{"step": state.step, "split": "validation", **scores["all"]}] if scores and state.step % knobs.every else []
    shown = report.Report(
        card, state.history + last, chosen, tuple(sources), waited=wait_share(state), every=knobs.every
    )
    report.write(shown, state.averaged, knobs, out)
    for line in closing_lines(scores, chosen, state):
        say(line)
    say(f"report {out / 'report.html'}")
    say(f"model {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


# ---------------------------------------------------------------- the machine


def check(config: Config) -> None:
    """Refuses settings that no run could use."""
    knobs = config.train
    if config.fragments.height == "head" and not knobs.distance_nm:
        raise UserError("fragments.height = 'head' follows a distance that this network would not learn: set "
                        "train.distance_nm, for instance to 100, or take another height")  # fmt: skip
    if knobs.patch % (multiple := 32 * knobs.binning):
        near = max(64, knobs.patch // multiple * multiple)
        raise UserError(f"train.patch = {knobs.patch} is not a multiple of {multiple}; try {near}")
    if knobs.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = 'cuda', but torch sees no CUDA device; set train.device = 'auto'")
    if _processes(knobs) > knobs.batch:
        raise UserError(f"train.batch = {knobs.batch} has no patch for each of {_processes(knobs)} processes; raise it")


def _processes(knobs: Train) -> int:
    """How many processes train together."""
    on_gpu = _device(knobs).type == "cuda"
    return knobs.processes or (min(torch.cuda.device_count(), knobs.batch) if on_gpu else 1)


def _device(knobs: Train) -> torch.device:
    """The device that this process trains on."""
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if knobs.device == "auto" else knobs.device
    return (
        torch.device("cuda", parallel.rank() % torch.cuda.device_count()) if wanted == "cuda" else torch.device("cpu")
    )


def _folder(out: str) -> Path:
    """The run's folder, made if need be."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder train.out = {out}: {error.strerror}; give another") from None
    return Path(out)


# ---------------------------------------------------------------- the terminal


def _progress() -> Progress:
    """A progress bar with loss, IoU and time left; silent where the output is no terminal."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
        TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    bar.disable = not bar.console.is_terminal
    return bar


def _show(bar: Progress, task: int, row: dict) -> None:
    """Moves the bar to a step's row."""
    shown = f"loss {row['loss']:.3f} IoU {row['iou']:.3f}"
    bar.update(task, completed=row["step"], shown=shown, left=f"{row['left']} left")


def _lines(knobs: Train, say: Say) -> Callable[[dict], None]:
    """Says a line of a step's row now and then, where no bar moves."""
    last = time.monotonic()

    def show(row: dict) -> None:
        nonlocal last
        if time.monotonic() - last > TOLD_SECONDS:
            last = time.monotonic()
            say(f"step {row['step']}/{knobs.steps}: loss {row['loss']:.3f} IoU {row['iou']:.3f}, {row['left']} left")

    return show


def _left(state: State, knobs: Train) -> str:
    """Time to the end of the run at its pace so far, as h:mm:ss."""
    share = progress(state, knobs)
    left = round(state.seconds * (1 - share) / share) if share > 0 else 0
    return f"{max(0, left) // 3600}:{max(0, left) // 60 % 60:02d}:{max(0, left) % 60:02d}"


def _line(state: State, knobs: Train) -> str:
    """One line on the training steps since the last validation, and on that."""
    rows = [row for row in state.history[-2 * knobs.every :] if row["split"] == "training"][-knobs.every :]
    text = f"step {state.step}/{knobs.steps}: training loss {np.mean([r['loss'] for r in rows]):.4f}"
    text += f" IoU {np.mean([r['iou'] for r in rows]):.3f}"
    last = state.history[-1]
    if last["split"] == "validation":
        text += f", held out loss {last['loss']:.4f} IoU {last['iou']:.3f} accuracy {last['accuracy']:.4f}"
    return f"{text}, {_left(state, knobs)} left"
