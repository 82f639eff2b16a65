"""Steps of a training run: gradients of a batch, the update of the network, its moving average."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from volseg.config import Train
from volseg.errors import UserError
from volseg.inference import model
from volseg.inference.device import is_out_of_memory
from volseg.system import trim_memory
from volseg.training import distributed as parallel
from volseg.training import losses
from volseg.training.checkpoint import State
from volseg.training.samples import Source, batch, batches, mixed
from volseg.training.validate import autocast, resolved

Say = Callable[[str], None]
WARM_UP = 0.1  # share of the run in which the learning rate rises
SETTLE = 40  # batches, at most, that set the batch-norm statistics of the averaged weights
FIRST_SETTLE = 1_000_000_000  # their step numbers, which no run reaches


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
