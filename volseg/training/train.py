"""Training, read from :func:`train` down: load, step, validate, checkpoint, finish. A killed run can go on."""

from __future__ import annotations

import copy
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
from volseg.engine.lock import Lock
from volseg.errors import UserError
from volseg.inference import model
from volseg.inference.model_card import check_encoder_name
from volseg.system import tune_malloc
from volseg.training import checkpoint, distributed, report
from volseg.training.card import closing_lines, data_wait_share, model_card
from volseg.training.checkpoint import CHECKPOINT_NAME, State
from volseg.training.decoding import calibrate
from volseg.training.sources import Source, load_sources
from volseg.training.steps import Log, completed_share, initial_state, train_steps, update_batchnorm
from volseg.training.validate import validate

CHECKPOINT_INTERVAL_S = 120
LOG_INTERVAL_S = 60
MODEL_NAME = "model.safetensors"


def train(config: Config, log: Log = print) -> Path:
    """Train a model on annotated sections.

    If ``config.train.out`` holds a checkpoint of the same settings, the run goes on from it, with the results that it
    would have had without the stop (bit for bit on a CPU with one thread, unless ``minutes`` ended it).

    Parameters
    ----------
    config
        All settings. ``train`` says what to learn from and how; ``fragments`` and ``stitch`` are what the decoding is
        chosen from on held-out sections.
    log
        Called with each line of text that the run has to say.

    Returns
    -------
    pathlib.Path
        The model, ``OUT/model.safetensors``. Beside it are ``report.html`` with its pictures, ``curves.csv`` and the
        checkpoint.

    Raises
    ------
    UserError
        If the settings or the data do not allow a run, another training writes to ``out``, the checkpoint is of other
        settings, the loss becomes infinite, not even one patch fits the memory, or a file cannot be written.
    KeyboardInterrupt
        After Ctrl-C, at the end of a step, once a checkpoint is written.
    """
    settings = config.train
    check_settings(config)
    tune_malloc()
    sources = load_sources(settings)
    log(report.format_data(sources))
    out = _make_folder(settings.out)
    with Lock(str(out.resolve())), distributed.process_group(_process_count(settings), _follow, config):
        state = _resumed_state(settings)
        before = {} if state.step or not settings.start else validate(state.averaged, sources, config)
        if state.step:
            log(f"going on from step {state.step} in {out}")
        elif before:
            log(f"held-out sections, before the first step: IoU {before['all']['iou']:.3f} ({settings.start})")
        with _progress_bar() as bar:
            task = bar.add_task("train", total=settings.steps, completed=state.step, scores="", left="")
            show = _log_rows(settings, log) if bar.disable else lambda row: _show_row(bar, task, row)
            _lead(state, sources, config, show, log)
    return finish(state, sources, config, log, before)


def _follow(config: Config) -> None:
    """What the other processes do: the same steps on their patches."""
    state, sources = _resumed_state(config.train), load_sources(config.train)
    for _ in train_steps(state, sources, config.train, lambda text: None):
        pass


def _resumed_state(settings: Train) -> State:
    """The run at its last checkpoint, or at step 0."""
    state = initial_state(settings, training_device(settings))
    checkpoint.resume(state, Path(settings.out) / CHECKPOINT_NAME, settings)
    return state


def _lead(state: State, sources: list[Source], config: Config, show: Callable[[dict], None], log: Log) -> None:
    """Trains to the end of the run; validates and saves a model every so many steps, and a checkpoint more often."""
    settings, out = config.train, Path(config.train.out)
    last_saved = time.monotonic()
    with _deferred_interrupt() as interrupted:
        for row in train_steps(state, sources, settings, log):
            show({**row, "left": _format_time_left(state, settings)})
            if state.step % settings.every == 0:
                scores = validate(state.averaged, sources, config)
                state.history += _validation_row(state, scores)
                log(_format_progress(state, settings))
                model.save(out / MODEL_NAME, state.averaged.module, model_card(config, sources, state, scores))
            stop = interrupted()
            if state.step % settings.every == 0 or stop or time.monotonic() - last_saved > CHECKPOINT_INTERVAL_S:
                checkpoint.save(state, out / CHECKPOINT_NAME, settings)
                last_saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    checkpoint.save(state, out / CHECKPOINT_NAME, settings)


def _validation_row(state: State, scores: dict) -> list[dict]:
    """The row of the curves for scores of `validate`; none where nothing is held out."""
    return [{"step": state.step, "split": "validation", **scores["all"]}] if scores else []


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only remembered, for the end of a step; a second one stops at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def remember(signum: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(state: State, sources: list[Source], config: Config, log: Log, before: dict | None = None) -> Path:
    """Write the final model and its report: averaged weights, their batch-norm statistics, rounded, scored, calibrated.

    ``before`` are scores of `validate` of the model that it started from: where they are better, that is said.

    Returns
    -------
    pathlib.Path
        The model file.
    """
    settings, out = config.train, Path(config.train.out)
    network = state.averaged.module
    scores = _with_better_batchnorm(network, state, sources, config)
    decoding = calibrate(network, sources, config)
    card = model_card(config, sources, state, scores, decoding)
    path = out / MODEL_NAME
    model.save(path, network, card)
    last = _validation_row(state, scores) if state.step % settings.every else []
    result = report.Report(card, state.history + last, decoding, tuple(sources), data_wait_share(state), settings.every)
    report.write_report(result, network, config, out)
    for line in closing_lines(scores, decoding, state):
        log(line)
    if before and scores and scores["all"]["iou"] < before["all"]["iou"]:
        log(
            f"it started better than it ended, at IoU {before['all']['iou']:.3f}: keep the model that it started from, or take "
            "more steps, a larger train.patch or another train.lr"
        )
    log(f"report {out / 'report.html'}")
    log(f"model {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


def _with_better_batchnorm(network: torch.nn.Module, state: State, sources: list[Source], config: Config) -> dict:
    """The network has batch-norm statistics of its own or, where held-out sections are better with these, the averages of those
    that it was trained with; and is rounded. Its scores of `validate`.

    Means over few or small patches may be far from those of whole sections, above all of a model that has hardly changed.
    """
    averages = copy.deepcopy(network.state_dict())
    averaged = validate(network, sources, config)
    update_batchnorm(network, sources, config.train, state.micro_batches)
    _round_to_half(network)
    scores = validate(network, sources, config)
    if not scores or _rank(scores) >= _rank(averaged):
        return scores
    network.load_state_dict(averages)
    _round_to_half(network)
    return validate(network, sources, config)


def _rank(scores: dict) -> tuple[float, float]:
    """By which scores of `validate` are better than others."""
    return scores["all"]["iou"], -scores["all"]["loss"]


def _round_to_half(network: torch.nn.Module) -> None:
    """Weights become what their file will hold, so that scores are those of the file."""
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half().float())


# ---------------------------------------------------------------- the machine


def check_settings(config: Config) -> None:
    """Raise `UserError` for settings that no run could use."""
    settings = config.train
    try:
        check_encoder_name(settings.encoder)
    except ValueError as error:
        raise UserError(f"train.encoder = {settings.encoder!r}: {error}") from None
    if config.fragments.height == "head" and not settings.distance_nm:
        raise UserError("fragments.height = 'head' follows a distance that this network would not learn: set "
                        "train.distance_nm, for instance to 100, or take another height")  # fmt: skip
    if settings.patch % (multiple := 32 * settings.binning):
        near = max(64, settings.patch // multiple * multiple)
        raise UserError(f"train.patch = {settings.patch} is not a multiple of {multiple}; try {near}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = 'cuda', but torch sees no CUDA device; set train.device = 'auto'")
    if (count := _process_count(settings)) > settings.batch:
        raise UserError(f"train.batch = {settings.batch} has no patch for each of {count} processes; raise it")


def _process_count(settings: Train) -> int:
    """How many processes train together."""
    on_gpu = training_device(settings).type == "cuda"
    return settings.processes or (min(torch.cuda.device_count(), settings.batch) if on_gpu else 1)


def training_device(settings: Train) -> torch.device:
    """The device that this process trains on."""
    available = "cuda" if torch.cuda.is_available() else "cpu"
    if (available if settings.device == "auto" else settings.device) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", distributed.rank() % torch.cuda.device_count())


def _make_folder(out: str) -> Path:
    """The run's folder, made if need be."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder train.out = {out}: {error.strerror}; give another") from None
    return Path(out)


# ---------------------------------------------------------------- the terminal


def _progress_bar() -> Progress:
    """A progress bar with loss, IoU and time left; silent where the output is no terminal."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[scores]}"),
        TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    bar.disable = not bar.console.is_terminal
    return bar


def _show_row(bar: Progress, task: int, row: dict) -> None:
    """Moves the bar to a step's row."""
    scores = f"loss {row['loss']:.3f} IoU {row['iou']:.3f}"
    bar.update(task, completed=row["step"], scores=scores, left=f"{row['left']} left")


def _log_rows(settings: Train, log: Log) -> Callable[[dict], None]:
    """Logs a line of a step's row every `LOG_INTERVAL_S`, where no bar moves."""
    last = time.monotonic()

    def show(row: dict) -> None:
        nonlocal last
        if time.monotonic() - last > LOG_INTERVAL_S:
            last = time.monotonic()
            log(f"step {row['step']}/{settings.steps}: loss {row['loss']:.3f} IoU {row['iou']:.3f}, {row['left']} left")

    return show


def _format_time_left(state: State, settings: Train) -> str:
    """Time to the end of the run at its pace so far, as h:mm:ss."""
    share = completed_share(state, settings)
    left = max(0, round(state.seconds * (1 - share) / share) if share > 0 else 0)
    return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


def _format_progress(state: State, settings: Train) -> str:
    """One line on the training steps since the last validation, and on that."""
    rows = [row for row in state.history[-2 * settings.every :] if row["split"] == "training"][-settings.every :]
    text = f"step {state.step}/{settings.steps}: training loss {np.mean([r['loss'] for r in rows]):.4f}"
    text += f" IoU {np.mean([r['iou'] for r in rows]):.3f}"
    last = state.history[-1]
    if last["split"] == "validation":
        text += f", held out loss {last['loss']:.4f} IoU {last['iou']:.3f} accuracy {last['accuracy']:.4f}"
    return f"{text}, {_format_time_left(state, settings)} left"
