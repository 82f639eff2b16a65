"""Training, read from :func:`train` down: load, step, validate, checkpoint, finish. A killed run can go on."""

from __future__ import annotations

import copy
import csv
import ctypes
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as packed
from scipy import ndimage
from torch.nn import functional as F

from volseg import model
from volseg.config import Config, Train, UserError
from volseg.samples import Source, batch, batches, context, load_sources, mixed
from volseg.targets import UNLABELLED, describe, mask_and_contour

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_SECONDS = 120
WARM_UP = 0.1  # share of the run in which the learning rate rises
SETTLE = 40  # batches, at most, that set the batch-norm statistics of the averaged weights
FIRST_SETTLE = 1_000_000_000  # their step numbers, which no run reaches
THRESHOLDS = np.arange(20, 81, 2) / 100
MAY_CHANGE = ("out", "device", "minutes", "every")  # knobs that do not change what a resumed run learns from


@dataclass
class State:
    """A run between two steps: everything that a checkpoint holds."""

    network: torch.nn.Module
    averaged: torch.nn.Module  # exponential moving average of the network, the model that is kept
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    history: list[dict] = field(default_factory=list)  # rows of the curves


def train(config: Config, report: Callable[[str], None] = print) -> Path:
    """Path of the model that ``config.train`` makes: ``OUT/model.safetensors``, with ``curves.png`` and ``curves.csv``.

    If ``OUT`` holds a checkpoint of the same settings, the run goes on from it, with the results that it would have had
    without the stop (bit for bit on a CPU with one thread, unless ``minutes`` ended it).
    """
    knobs = config.train
    _check(knobs)
    _keep_memory()
    sources = load_sources(knobs)
    _announce(sources, report)
    device = _device(knobs)
    state = start(knobs, device)
    out = _folder(knobs.out)
    if _resume(state, out / CHECKPOINT, knobs):
        report(f"going on from step {state.step} in {out}")
    with _progress() as bar:
        task = bar.add_task("train", total=knobs.steps, completed=state.step, shown="", left="")
        _steps(state, sources, config, lambda row: _show(bar, task, row), report)
    return finish(state, sources, config, report)


def start(knobs: Train, device: torch.device) -> State:
    """A run at step 0: fresh or pretrained weights, or those of ``train.start``."""
    torch.manual_seed(knobs.seed)
    if knobs.start:
        network = _from_model(knobs)
    else:
        network = model.build(knobs.encoder, knobs.decoder, knobs.sections, pretrained=knobs.pretrained)
    network = network.to(device, memory_format=torch.channels_last).train()
    averaged = copy.deepcopy(network).requires_grad_(False).eval()
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": knobs.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return State(network, averaged, torch.optim.AdamW(groups, lr=knobs.lr))


def _steps(state: State, sources: list[Source], config: Config, show: Callable, report: Callable) -> None:
    """Trains to the last step or the end of the time budget; validates and saves a model every so many steps."""
    knobs, out = config.train, Path(config.train.out)
    last_tick = last_saved = time.monotonic()
    stream = batches(sources, knobs, state.step, knobs.steps, mixed if knobs.self_training else batch)
    for images, targets, *unlabelled in stream:
        if progress(state, knobs) >= 1:
            break
        row = step(state, images, targets, knobs, *unlabelled)
        if not math.isfinite(row["loss"]):
            raise UserError(f"the loss is {row['loss']} at step {state.step}: set a lower train.lr than {knobs.lr}")
        now = time.monotonic()
        state.seconds, last_tick = state.seconds + now - last_tick, now
        state.history.append(row)
        show({**row, "left": _left(state, knobs)})
        if state.step % knobs.every == 0:
            scores = validate(state.averaged, sources, knobs)
            state.history += [{"step": state.step, "split": "validation", **scores["all"]}] if scores else []
            report(_line(state, knobs))
            model.save(out / "model.safetensors", state.averaged, _card(config, sources, state, scores, None))
        if state.step % knobs.every == 0 or now - last_saved > CHECKPOINT_SECONDS:
            save_checkpoint(state, out / CHECKPOINT, knobs)
            last_saved = time.monotonic()
    stream.close()
    save_checkpoint(state, out / CHECKPOINT, knobs)


def step(
    state: State, images: np.ndarray, targets: np.ndarray, knobs: Train, *unlabelled: np.ndarray
) -> dict:
    """One update of the network and its average; returns the row of the curves for the annotated part of this batch.

    Once self-training has begun, ``unlabelled`` patches (clean, changed) take the places of the last annotated ones.
    """
    device = next(state.network.parameters()).device
    rate = learning_rate(progress(state, knobs), knobs.lr)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    images, targets = _to(device, images), torch.from_numpy(targets).to(device).float()
    aims, weights, annotated = targets[:, :2], targets[:, 2:].expand(-1, 2, -1, -1), len(images)
    if unlabelled and progress(state, knobs) >= knobs.self_training_after:
        clean, changed = (_to(device, patches) for patches in unlabelled)
        annotated -= len(changed)
        more, sure = guess(state.averaged, clean, knobs.self_training_confidence)
        images = torch.cat([images[:annotated], changed]).contiguous(memory_format=torch.channels_last)
        aims, weights = torch.cat([aims[:annotated], more]), torch.cat([weights[:annotated], sure])
    with _autocast(device):
        logits = state.network(images)
    loss = loss_of(logits.float(), aims, weights, knobs)
    state.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), 5.0)
    state.optimizer.step()
    state.step += 1
    _average(state, knobs.ema)
    found = logits.detach()[:annotated, 0].float() >= 0
    counts = _counts(found, aims[:annotated, 0] > 0, weights[:annotated, 0] > 0)
    return {"step": state.step, "split": "training", "loss": loss.item(), **_scores(counts)}


def _to(device: torch.device, images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).to(device, memory_format=torch.channels_last)


@torch.no_grad()
def guess(network: torch.nn.Module, images: torch.Tensor, confidence: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``network`` takes the mask and contour of ``images`` for, and where it is sure of it: (B, 2, Y, X), 0 or 1.

    Sure is a probability of at least ``confidence`` (mask, contour), for or against. The averaged network as the teacher
    is that of Tarvainen and Valpola, arXiv 1703.01780; hard labels where it is sure, and the student's changed grey values,
    are those of Sohn et al., arXiv 2001.07685.
    """
    with _autocast(images.device):
        chance = network(images).float().sigmoid()
    least = torch.tensor(confidence, device=images.device)[:, None, None]
    return (chance >= 0.5).float(), (torch.maximum(chance, 1 - chance) >= least).float()


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


def loss_of(logits: torch.Tensor, aims: torch.Tensor, weights: torch.Tensor, knobs: Train) -> torch.Tensor:
    """Pixel loss plus Dice on the mask, and ``contour_weight`` times the same on the contour.

    All are (B, 2, Y, X), mask and contour; ``aims`` and ``weights`` are 0 or 1.
    """
    pixel = focal if knobs.loss == "focal" else cross_entropy
    scale = knobs.focal_scale if knobs.loss == "focal" else 1.0
    parts = [
        scale * pixel(logits[:, i], aims[:, i], weights[:, i]) + dice(logits[:, i], aims[:, i], weights[:, i])
        for i in range(2)
    ]
    return parts[0] + knobs.contour_weight * parts[1]


def cross_entropy(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy where ``weight`` is 1."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * weight).sum() / weight.sum().clamp(min=1)


def focal(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Cross-entropy times ``(1 - p)**gamma``, so easy voxels count less (Lin et al., arXiv 1708.02002, no alpha)."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * (1 - torch.exp(-loss)) ** gamma * weight).sum() / weight.sum().clamp(min=1)


def dice(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """1 minus the soft Dice overlap of the whole batch; 0 where both are empty."""
    chance = logits.sigmoid() * weight
    target = target * weight
    return 1 - (2 * (chance * target).sum() + 1) / (chance.sum() + target.sum() + 1)


@torch.no_grad()
def _average(state: State, decay: float) -> None:
    """Moves the averaged weights and batch-norm statistics towards the network's; faster in the first steps."""
    decay = min(decay, (1 + state.step) / (10 + state.step))
    for kept, new in zip(state.averaged.state_dict().values(), state.network.state_dict().values(), strict=True):
        kept.lerp_(new, 1 - decay) if kept.is_floating_point() else kept.copy_(new)


def _counts(found: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor) -> np.ndarray:
    """Voxels found and true, found alone, true alone, neither."""
    cases = (found & truth, found & ~truth, ~found & truth, ~found & ~truth)
    return np.array([int((case & valid).sum()) for case in cases], np.int64)


def _scores(counts: np.ndarray) -> dict:
    """``accuracy`` and foreground ``iou`` of counts made by :func:`_counts`."""
    both, found, true, neither = (int(n) for n in counts)
    return {
        "accuracy": (both + neither) / max(1, both + found + true + neither),
        "iou": both / (both + found + true) if both + found + true else 1.0,
    }


def validate(network: torch.nn.Module, sources: list[Source], knobs: Train) -> dict:
    """Loss, accuracy and foreground IoU of ``network`` on whole held-out sections: ``all``, and each source by name.

    Empty where no source holds sections out.
    """
    found, losses, counts = {}, [], []
    for source in (s for s in sources if s.held):
        losses_here, counts_here = [], []
        for z in source.held:
            logits, targets = plane_logits(network, source, z, knobs.sections), _plane_targets(source, z, knobs)
            losses_here.append(loss_of(logits[None], targets[None, :2], targets[None, 2:].expand(-1, 2, -1, -1), knobs).item())
            counts_here.append(_counts(logits[0] >= 0, targets[0] > 0, targets[2] > 0))
        found[source.name] = {"loss": float(np.mean(losses_here)), **_scores(sum(counts_here))}
        losses, counts = losses + losses_here, counts + counts_here
    return {"all": {"loss": float(np.mean(losses)), **_scores(sum(counts))}, **found} if counts else {}


def plane_logits(network: torch.nn.Module, source: Source, z: int, sections: int) -> torch.Tensor:
    """(2, Y, X) float32 logits on the CPU for a whole section, edges mirrored to a multiple of 32."""
    device = next(network.parameters()).device
    raw = source.image[context(z, sections, len(source.image))].astype(np.float32)
    height, width = raw.shape[1:]
    padded = np.pad((raw - source.mean) / source.std, ((0, 0), (0, -height % 32), (0, -width % 32)), mode="symmetric")
    images = torch.from_numpy(padded.astype(np.float32))[None].to(device, memory_format=torch.channels_last)
    was_training = network.training
    network.eval()
    with torch.inference_mode(), _autocast(device):
        logits = network(images)
    network.train(was_training)
    return logits[0, :, :height, :width].float().cpu()


def _plane_targets(source: Source, z: int, knobs: Train) -> torch.Tensor:
    """(3, Y, X) float32: mask, contour and weight of a whole section."""
    labels = source.labels[z]
    valid = labels != UNLABELLED
    mask, contour = mask_and_contour(np.where(valid, labels, 0), knobs.contour_width)
    return torch.from_numpy(np.stack([mask, contour, valid.view(np.uint8)])).float()


def calibrate(network: torch.nn.Module, sources: list[Source], config: Config) -> dict:
    """The ``threshold`` with the best foreground ``iou`` on held-out sections, smoothed as decoding smooths them.

    Sources count by their ``share``; the threshold is 0.5 where no section is held out.
    """
    total = np.zeros(len(THRESHOLDS))
    for source in (s for s in sources if s.held):
        chance = [plane_logits(network, source, z, config.train.sections)[0].sigmoid().numpy() for z in source.held]
        labels = source.labels[list(source.held)]
        total += source.share * ious(smooth(np.stack(chance), config.fragments.smooth), labels)
    if not total.any():
        return {"threshold": 0.5}
    best = int(total.argmax())
    return {
        "threshold": float(THRESHOLDS[best]), "iou": float(total[best] / sum(s.share for s in sources if s.held))
    }


def smooth(chance: np.ndarray, passes: tuple[int, int, int]) -> np.ndarray:
    """``chance`` (z, y, x) after that many passes of the [1 2 1] / 4 filter along each axis."""
    for axis, count in enumerate(passes):
        for _ in range(count):
            chance = ndimage.convolve1d(chance, [0.25, 0.5, 0.25], axis=axis, mode="nearest")
    return chance


def ious(chance: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Foreground IoU of ``chance`` at each of :data:`THRESHOLDS`, unlabelled voxels left out."""
    valid = labels != UNLABELLED
    truth, chance = labels[valid] != 0, chance[valid]
    found = [chance >= t for t in THRESHOLDS]
    return np.array([(f & truth).sum() / max(1, (f | truth).sum()) for f in found])


def finish(state: State, sources: list[Source], config: Config, report: Callable[[str], None]) -> Path:
    """Path of the final model: averaged weights, their own batch-norm statistics, rounded, scored and calibrated."""
    knobs, out = config.train, Path(config.train.out)
    settle(state.averaged, sources, knobs)
    for value in state.averaged.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half().float())
    scores = validate(state.averaged, sources, knobs)
    chosen = calibrate(state.averaged, sources, config)
    path = out / "model.safetensors"
    model.save(path, state.averaged, _card(config, sources, state, scores, chosen))
    last = [{"step": state.step, "split": "validation", **scores["all"]}] if scores and state.step % knobs.every else []
    write_curves(state.history + last, out)
    for name, values in scores.items():
        report(f"held out, {name}: loss {values['loss']:.4f} IoU {values['iou']:.3f} accuracy {values['accuracy']:.4f}")
    report(f"model {path} ({path.stat().st_size / 1e6:.1f} MB), mask threshold {chosen['threshold']:.2f}")
    return path


@torch.no_grad()
def settle(network: torch.nn.Module, sources: list[Source], knobs: Train) -> None:
    """Gives ``network`` batch-norm statistics of its own, plain means over training batches."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    network.train()
    device = next(network.parameters()).device
    for images, _ in batches(sources, knobs, FIRST_SETTLE, FIRST_SETTLE + min(SETTLE, knobs.steps)):
        network(torch.from_numpy(images).to(device, memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def save_checkpoint(state: State, path: Path, knobs: Train) -> None:
    """Writes the whole state beside ``path`` and renames it there, so that a kill leaves the old one or the new one."""
    tensors = {f"network.{k}": v for k, v in state.network.state_dict().items()}
    tensors |= {f"averaged.{k}": v for k, v in state.averaged.state_dict().items()}
    for i, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
    note = {"settings": _settings(knobs), "step": state.step, "seconds": state.seconds, "history": state.history}
    partial = path.with_name(path.name + ".partial")
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    partial.write_bytes(packed(tensors, metadata={"checkpoint": json.dumps(note)}))
    os.replace(partial, path)


def _settings(knobs: Train) -> dict:
    """The knobs that a resumed run must share with the run that it goes on from."""
    return knobs.model_dump(mode="json", exclude=set(MAY_CHANGE))


def _resume(state: State, path: Path, knobs: Train) -> bool:
    """Puts the checkpoint at ``path`` into ``state``, if there is one; refuses one of other settings."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["checkpoint"])
            stored = _settings(Train.model_validate(note["settings"]))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a checkpoint of volseg train; move it away or give another train.out") from None
    changed = [key for key, value in _settings(knobs).items() if stored[key] != value]
    if changed:
        raise UserError(
            f"{path} was made with another train.{', train.'.join(changed)}; give another train.out, or delete it"
        )
    state.network.load_state_dict(_under("network.", tensors))
    state.averaged.load_state_dict(_under("averaged.", tensors))
    moments: dict[int, dict] = {}
    for key, value in _under("optimizer.", tensors).items():
        index, name = key.split(".")
        moments.setdefault(int(index), {})[name] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.step, state.seconds, state.history = note["step"], note["seconds"], note["history"]
    return True


def _under(prefix: str, tensors: dict) -> dict:
    """The entries whose key begins with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _card(config: Config, sources: list[Source], state: State, scores: dict, chosen: dict | None) -> dict:
    """What a model file says about itself."""
    knobs, main = config.train, max(sources, key=lambda s: s.share)
    data = [
        {
            "name": Path(s.name).name, "learn": len(s.learn), "unlabelled": len(s.free),
            "held": [s.first + z for z in s.held], "share": s.share,
        }
        for s in sources
    ]
    training = {
        "checksum": hashlib.sha256("\n".join(s.checksum for s in sources).encode()).hexdigest(),
        "data": data,
        "steps": state.step,
        "seconds": round(state.seconds),
        "settings": {key: value for key, value in _settings(knobs).items() if key not in ("data", "start")},
    }
    scores = {Path(name).name: values for name, values in scores.items()}
    return {
        "name": Path(knobs.out).name,
        "encoder": knobs.encoder,
        "decoder": list(knobs.decoder),
        "sections": knobs.sections,
        "heads": list(model.HEADS),
        "mean": main.mean,
        "std": main.std,
        "voxel_size_nm": list(main.voxel_size_nm) if main.voxel_size_nm else None,
        "decode": {"fragments": {"threshold": chosen["threshold"] if chosen else 0.5}},
        "training": training,
        "scores": {"validation": scores, "calibrated": chosen or {}},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "segmentation-models-pytorch", "numpy")},
        },
    }


def write_curves(history: list[dict], out: Path) -> None:
    """``curves.csv`` with every row, and ``curves.png``: loss, accuracy and IoU, training blue, validation orange."""
    from matplotlib.figure import Figure

    with (out / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "split", "loss", "accuracy", "iou"])
        writer.writeheader()
        writer.writerows(history)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 3), ("loss", "accuracy", "iou"), ("Loss", "Accuracy", "IoU"), strict=True
    ):
        for split, colour in (("training", "tab:blue"), ("validation", "tab:orange")):
            rows = [row for row in history if row["split"] == split]
            steps, values = [row["step"] for row in rows], np.array([row[key] for row in rows])
            if split == "training" and len(values) > 50:
                axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.6)
                values = ndimage.uniform_filter1d(values, max(3, len(values) // 50), mode="nearest")
            axes.plot(steps, values, color=colour, label=split, marker="o" if len(values) < 30 else None, markersize=3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out / "curves.png", dpi=120)


def _check(knobs: Train) -> None:
    """Refuses settings that no run could use."""
    if knobs.patch % 32:
        raise UserError(f"train.patch = {knobs.patch} is not a multiple of 32; try {max(64, knobs.patch // 32 * 32)}")
    if knobs.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = 'cuda', but torch sees no CUDA device; set train.device = 'auto'")


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
    return network


def _device(knobs: Train) -> torch.device:
    """The device to train on."""
    if knobs.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(knobs.device)


def _autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device computes in it: CUDA from Ampere on, and CPUs with AVX-512 BF16 or AMX."""
    able = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    return torch.autocast(device.type, torch.bfloat16, enabled=able)


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, as far as Linux tells."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("\n\n")[0].split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _keep_memory() -> None:
    """Keeps freed memory for the next step: glibc returns large pieces to the system and faults them in again.

    A step of 8 patches of 192 x 192 took about 50 000 page faults before and almost none after.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no piece comes from mmap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def _announce(sources: list[Source], report: Callable[[str], None]) -> None:
    """Reports what each source holds, and the advice on it."""
    for source in sources:
        found = describe(source.labels, list(source.learn), source.first)
        what = f"{found['objects']} objects, {100 * found['foreground']:.2f} % foreground ({source.kind})"
        unlabelled = f"{len(source.free)} without annotation for self-training, " if source.free else ""
        held = f"{len(source.held)} held out, {unlabelled}"
        report(f"{source.name}: {found['sections']} sections to learn from, {held}{what}")
        for advice in found["advice"]:
            report(f"  advice: {advice}")


def _progress() -> Progress:
    """A progress bar with loss, IoU and time left; silent where the output is no terminal."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
        TextColumn("{task.fields[left]}"),
    )
    bar.disable = not bar.console.is_terminal
    return bar


def _show(bar: Progress, task: int, row: dict) -> None:
    """Moves the bar to a step's row."""
    shown = f"loss {row['loss']:.3f} IoU {row['iou']:.3f}"
    bar.update(task, completed=row["step"], shown=shown, left=f"{row['left']} left")


def _left(state: State, knobs: Train) -> str:
    """Time to the end of the run at its pace so far, as h:mm:ss."""
    share = progress(state, knobs)
    left = round(state.seconds * (1 - share) / share) if share > 0 else 0
    return f"{max(0, left) // 3600}:{max(0, left) // 60 % 60:02d}:{max(0, left) % 60:02d}"


def _line(state: State, knobs: Train) -> str:
    """One line on the training steps since the last validation, and on that."""
    rows = [row for row in state.history[-2 * knobs.every:] if row["split"] == "training"][-knobs.every:]
    text = f"step {state.step}/{knobs.steps}: training loss {np.mean([r['loss'] for r in rows]):.4f}"
    text += f" IoU {np.mean([r['iou'] for r in rows]):.3f}"
    last = state.history[-1]
    if last["split"] == "validation":
        text += f", held out loss {last['loss']:.4f} IoU {last['iou']:.3f} accuracy {last['accuracy']:.4f}"
    return f"{text}, {_left(state, knobs)} left"
