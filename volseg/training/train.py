"""Training, read from :func:`train` down: load, step, validate, checkpoint, finish. A killed run can go on."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from volseg.config import Config, Stitch, Train
from volseg.errors import UserError
from volseg.inference import model
from volseg.inference.device import is_out_of_memory
from volseg.system import trim_memory, tune_malloc
from volseg.training import checkpoint, losses, report
from volseg.training import distributed as parallel
from volseg.training.checkpoint import State
from volseg.training.samples import Source, batch, batches, load_sources, mixed
from volseg.training.validate import Decoding, autocast, calibrate, resolved, validate

CHECKPOINT_SECONDS = 120
TOLD_SECONDS = 60
WARM_UP = 0.1  # share of the run in which the learning rate rises
SETTLE = 40  # batches, at most, that set the batch-norm statistics of the averaged weights
FIRST_SETTLE = 1_000_000_000  # their step numbers, which no run reaches

Say = Callable[[str], None]


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


def start(knobs: Train, device: torch.device) -> State:
    """A run at step 0: fresh or pretrained weights, or those of ``train.start``."""
    torch.manual_seed(knobs.seed)
    if knobs.start:
        network = _from_model(knobs)
    else:
        network = model.build(
            knobs.encoder,
            knobs.decoder,
            knobs.sections,
            knobs.heads,
            pretrained=knobs.pretrained,
            binning=knobs.binning,
        )
    network = network.to(device, memory_format=torch.channels_last).train()
    averaged = copy.deepcopy(network).requires_grad_(False).eval()
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": knobs.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    scaler = torch.amp.GradScaler(device.type, enabled=resolved(device, knobs.precision) == "fp16")
    return State(network, averaged, torch.optim.AdamW(groups, lr=knobs.lr), scaler)


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
                model.save(out / "model.safetensors", state.averaged, _card(config, sources, state, scores, None))
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


# ---------------------------------------------------------------- steps


def steps(state: State, sources: list[Source], knobs: Train, say: Say) -> Iterator[dict]:
    """Takes step after step, to the last one or the end of the time budget, and gives each one's row of the curves.

    What is done between two rows counts into the run's seconds.
    """
    device = next(state.network.parameters()).device
    make = mixed if knobs.self_training else batch
    part = slice(parallel.rank(), None, parallel.size())
    stream = batches(sources, knobs, state.step, knobs.steps, make, part)
    last = asked = time.monotonic()
    try:
        for patches in stream:
            state.waited += time.monotonic() - asked
            share = parallel.same(progress(state, knobs), device)
            if share >= 1:
                break
            row = step(state, patches, knobs, share, say)
            if not math.isfinite(row["loss"]):
                raise UserError(f"the loss is {row['loss']} at step {state.step}: set a lower train.lr than {knobs.lr}")
            state.history.append(row)
            now = time.monotonic()
            state.seconds, last = state.seconds + now - last, now
            yield row
            asked = time.monotonic()
    finally:
        stream.close()


def step(state: State, patches: tuple[np.ndarray, ...], knobs: Train, share: float, say: Say) -> dict:
    """One update of the network and its average; returns the row of the curves for the annotated part of this batch.

    ``patches`` are images, targets and, with self-training, clean and changed images of sections that nobody annotated;
    once it has begun, these take the places of the last annotated ones. ``share`` is how much of the run is over.
    """
    rate = learning_rate(share, knobs.lr)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    loss, voxels = _fitting(state, patches if share >= knobs.self_training_after else patches[:2], knobs, say)
    _share_out(state, loss, voxels, len(patches[0]) / knobs.batch)
    state.scaler.unscale_(state.optimizer)
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), 5.0)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    _average(state, knobs.ema)
    return {"step": state.step, "split": "training", "loss": loss.item(), **losses.scores(voxels)}


def _fitting(
    state: State, patches: tuple[np.ndarray, ...], knobs: Train, say: Say
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`gradients` gives; a batch that does not fit the memory is cut into twice as many parts, said once."""
    while True:
        try:
            return gradients(state, patches, knobs)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        if state.parts >= len(patches[0]):
            advice = f"set a smaller train.patch than {knobs.patch}"
            raise UserError(
                f"not even one patch fits the memory: {advice} ({reason.splitlines()[0] if reason else 'full'})"
            )
        state.parts *= 2
        state.optimizer.zero_grad()
        trim_memory()
        size = -(-len(patches[0]) // state.parts)
        say(f"a batch does not fit the memory: at most {size} at a time from here on, with the same effective batch")


def gradients(state: State, patches: tuple[np.ndarray, ...], knobs: Train) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, its gradients left in the network, and the counts of its annotated patches.

    Computed in ``state.parts`` pieces whose gradients add up to those of their mean loss.
    """
    device = next(state.network.parameters()).device
    images, aims, weights, annotated = _material(state, patches, knobs)
    state.optimizer.zero_grad()
    total, found = torch.zeros((), device=device), []
    pieces = (tensor.chunk(state.parts) for tensor in (images, aims, weights))
    for image, aim, weight in zip(*pieces, strict=True):
        with autocast(device, knobs.precision):
            logits = state.network(image.contiguous(memory_format=torch.channels_last))
        loss = losses.loss_of(logits.float(), aim, weight, knobs) * (len(image) / len(images))
        state.scaler.scale(loss).backward()
        total += loss.detach()
        found.append(logits.detach()[:, 0].float() >= 0)
    truth, valid = aims[:annotated, 0] > 0, weights[:annotated, 0] > 0
    return total, losses.counts(torch.cat(found)[:annotated], truth, valid)


def _material(
    state: State, patches: tuple[np.ndarray, ...], knobs: Train
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Images (B, sections, P, P), aims and weights (B, heads, P, P) of a batch, and how many of its patches are annotated."""
    device = next(state.network.parameters()).device
    images, targets, *unlabeled = (torch.from_numpy(array).to(device) for array in patches)
    aims, weight, annotated = targets[:, :-1].float(), targets[:, -1:].float(), len(images)
    aims[:, 2:] /= 255
    weights = torch.cat([(weight > 0).float(), *[weight] * (aims.shape[1] - 1)], 1)
    if unlabeled and len(unlabeled[0]):
        clean, changed = unlabeled
        annotated -= len(changed)
        taught = [guess(state.averaged, piece, knobs) for piece in clean.chunk(state.parts)]
        more, sure = (torch.cat(tensors) for tensors in zip(*taught, strict=True))
        images = torch.cat([images[:annotated], changed])
        aims, weights = torch.cat([aims[:annotated], more]), torch.cat([weights[:annotated], sure])
    return images, aims, weights, annotated


@torch.no_grad()
def guess(network: torch.nn.Module, images: torch.Tensor, knobs: Train) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``network`` takes the mask and contour of ``images`` for, and where it is sure of it: (B, heads, Y, X), 0 or 1.

    Sure is a probability of at least ``self_training_confidence`` (mask, contour), for or against; a distance is taken as it
    is, where the mask is sure. The averaged network as
    the teacher is that of Tarvainen and Valpola, arXiv 1703.01780; hard labels where it is sure, learnt from changed gray
    values, are those of Sohn et al., arXiv 2001.07685.
    """
    with autocast(images.device, knobs.precision):
        chance = network(images.contiguous(memory_format=torch.channels_last)).float().sigmoid()
    least = torch.tensor(knobs.self_training_confidence, device=images.device)[:, None, None]
    known, distance = chance[:, :2], chance[:, 2:]
    sure = (torch.maximum(known, 1 - known) >= least).float()
    return torch.cat([(known >= 0.5).float(), distance], 1), torch.cat([sure, sure[:, :1].expand_as(distance)], 1)


def _share_out(state: State, loss: torch.Tensor, voxels: torch.Tensor, share: float) -> None:
    """Gradients, loss and batch-norm statistics become the mean over processes, each by its share of the batch."""
    if parallel.size() == 1:
        return
    gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
    means = [*gradients, *(b for b in state.network.buffers() if b.is_floating_point()), loss]
    for tensor in means:
        tensor.mul_(share)
    sums = voxels.float()
    parallel.add_up([*means, sums])
    voxels.copy_(sums)


def progress(state: State, knobs: Train) -> float:
    """Share of the run that is over, by steps or by the time budget, whichever is further."""
    return max(state.step / knobs.steps, state.seconds / (60 * knobs.minutes) if knobs.minutes else 0.0)


def learning_rate(share: float, peak: float) -> float:
    """One cycle: up by half a cosine from a 25th of ``peak``, then down to almost nothing (Smith, arXiv 1708.07120).

    >>> [round(learning_rate(share, 1.0), 3) for share in (0, 0.1, 0.55, 1)]
    [0.04, 1.0, 0.5, 0.0]
    """
    if share < WARM_UP:
        return peak * (1 - 0.96 * (0.5 + 0.5 * math.cos(math.pi * share / WARM_UP)))
    return peak * max(1e-5, 0.5 + 0.5 * math.cos(math.pi * min(1.0, (share - WARM_UP) / (1 - WARM_UP))))


@torch.no_grad()
def _average(state: State, decay: float) -> None:
    """Moves the averaged weights and batch-norm statistics towards the network's; faster in the first steps."""
    decay = min(decay, (1 + state.step) / (10 + state.step))
    for kept, new in zip(state.averaged.state_dict().values(), state.network.state_dict().values(), strict=True):
        kept.lerp_(new, 1 - decay) if kept.is_floating_point() else kept.copy_(new)


# ---------------------------------------------------------------- the end of a run


def finish(state: State, sources: list[Source], config: Config, say: Say) -> Path:
    """Path of the final model: averaged weights, their own batch-norm statistics, rounded, scored and calibrated."""
    knobs, out = config.train, Path(config.train.out)
    settle(state.averaged, sources, knobs, state.parts)
    for value in state.averaged.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half().float())
    scores = validate(state.averaged, sources, knobs)
    chosen = calibrate(state.averaged, sources, config)
    card = _card(config, sources, state, scores, chosen)
    path = out / "model.safetensors"
    model.save(path, state.averaged, card)
    last = [{"step": state.step, "split": "validation", **scores["all"]}] if scores and state.step % knobs.every else []
    shown = report.Report(card, state.history + last, chosen, tuple(sources), waited=_waited(state), every=knobs.every)
    report.write(shown, state.averaged, knobs, out)
    for line in _closing(scores, chosen, state):
        say(line)
    say(f"report {out / 'report.html'}")
    say(f"model {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


def _waited(state: State) -> float:
    """Share of the run in which the network waited for patches."""
    return state.waited / state.seconds if state.seconds else 0.0


def _closing(scores: dict, chosen: Decoding, state: State) -> Iterator[str]:
    """What a finished run says of itself."""
    names = scores if len(scores) > 2 else list(scores)[:1]
    for name in names:
        values = scores[name]
        of = "held-out sections" if name == "all" else name
        yield f"{of}: loss {values['loss']:.4f} IoU {values['iou']:.3f} accuracy {values['accuracy']:.4f}"
    z, y, x = chosen.smooth
    decoding = f"mask threshold {chosen.threshold:.2f}, smoothing {z} {y} {x}, seed {chosen.seed:g}, "
    decoding += f"objects from {chosen.min_voxels} voxels"
    if chosen.pq == 0:
        yield "none of the settings tried finds an object on the held-out sections; train for longer, or annotate more"
    if chosen.iou is None:
        yield f"no section was held out, so decoding is left as set: {decoding}"
    else:
        yield f"calibrated there: {decoding}: IoU {chosen.iou:.3f}" + (
            f" PQ {chosen.pq:.3f}" if chosen.pq is not None else ""
        )
    yield f"the loader kept the network waiting for {100 * _waited(state):.1f} % of {state.seconds / 60:.1f} minutes"


@torch.no_grad()
def settle(network: torch.nn.Module, sources: list[Source], knobs: Train, parts: int = 1) -> None:
    """Gives ``network`` batch-norm statistics of its own, plain means over training batches, each cut into ``parts``."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    network.train()
    device = next(network.parameters()).device
    for images, _ in batches(sources, knobs, FIRST_SETTLE, FIRST_SETTLE + min(SETTLE, knobs.steps)):
        for piece in torch.from_numpy(images).chunk(parts):
            network(piece.to(device, memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def _card(config: Config, sources: list[Source], state: State, scores: dict, chosen: Decoding | None) -> dict:
    """What a model file says about itself."""
    knobs, main = config.train, max(sources, key=lambda s: s.share)
    data = [
        {
            "name": Path(s.name).name, "learn": len(s.learn), "unlabeled": len(s.free),
            "held": [s.first + z for z in s.held], "share": s.share, "planes": list(given.planes),
        }
        for s, given in zip(sources, knobs.data, strict=True)
    ]  # fmt: skip
    settings = checkpoint.settings(knobs)
    training = {
        "checksum": hashlib.sha256("\n".join(s.checksum for s in sources).encode()).hexdigest(),
        "data": data,
        "steps": state.step,
        "seconds": round(state.seconds),
        "settings": {key: value for key, value in settings.items() if key not in ("data", "start")},
    }
    return {
        "name": Path(knobs.out).name,
        "encoder": knobs.encoder,
        "decoder": list(knobs.decoder),
        "sections": knobs.sections,
        "binning": knobs.binning,
        "heads": list(knobs.heads),
        "mean": main.mean,
        "std": main.std,
        "voxel_size_nm": list(main.voxel_size_nm) if main.voxel_size_nm else None,
        "decode": _decode(config, chosen),
        "training": training,
        "scores": {
            "validation": {Path(name).name: values for name, values in scores.items()},
            "calibrated": chosen.scores() if chosen else {},
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("volseg", "torch", "timm", "segmentation-models-pytorch", "numpy")},
        },
    }


def _decode(config: Config, chosen: Decoding | None) -> dict:
    """Tables of a config: what was ``chosen``, and the settings that it was chosen with, as far as they are no defaults."""
    which = {"fragments": True, "stitch": set(Stitch.model_fields) - {"reduce"}}
    given = config.model_dump(mode="json", include=which, exclude_defaults=True)
    found = chosen.settings() if chosen else {}
    tables = {section: given.get(section, {}) | found.get(section, {}) for section in which}
    return {section: table for section, table in tables.items() if table}


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


def _from_model(knobs: Train) -> torch.nn.Module:
    """The network of ``train.start``, which must be of the kind that the settings ask for."""
    network, card = model.load(knobs.start)
    for key in ("encoder", "decoder", "sections"):
        if json.loads(json.dumps(getattr(knobs, key))) != card[key]:
            wanted = f"train.start = {knobs.start} has {key} = {card[key]}"
            raise UserError(f"{wanted}, but train.{key} = {getattr(knobs, key)}; make them equal")
    if card.get("binning", 1) not in (1, knobs.binning):
        raise UserError(f"train.start = {knobs.start} bins its input already; set train.binning = {card['binning']}")
    return model.adapted(network, card, knobs.heads, knobs.binning)


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
