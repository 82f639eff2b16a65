"""Steps of a training run: the gradients of a batch, the update of the network, its moving average."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from volseg.config import Train
from volseg.errors import UserError
from volseg.inference import model
from volseg.inference.device import is_out_of_memory
from volseg.system import trim_memory
from volseg.training import distributed, losses
from volseg.training.checkpoint import State
from volseg.training.precision import autocast, resolve_precision
from volseg.training.samples import UNKNOWN, annotated_batch, mixed_batch, prefetch_batches
from volseg.training.sources import Source

WARM_UP_SHARE = 0.1  # share of the run in which the learning rate rises
START_DIVISOR = 25  # the learning rate begins at this part of its peak
MIN_RATE_SHARE = 1e-5  # and ends at this share of it
MAX_GRADIENT_NORM = 5.0
BATCHNORM_BATCHES = 40  # at most, that set the batch-norm statistics of the averaged weights
BATCHNORM_FIRST_STEP = 1_000_000_000  # their step numbers, which no run reaches

Log = Callable[[str], None]


# ---------------------------------------------------------------- the beginning


def initial_state(settings: Train, device: torch.device) -> State:
    """Return a run at step 0, with random or pretrained weights, or those of ``settings.start``.

    Raises
    ------
    UserError
        If ``settings.start`` is no model of the kind that the settings ask for, or the encoder cannot be built.
    """
    torch.manual_seed(settings.seed)
    network = _load_start(settings) if settings.start else _build_network(settings)
    network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # torch has it
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    scaler = torch.amp.GradScaler(device.type, enabled=resolve_precision(device, settings.precision) == "fp16")
    return State(network, moving_average(network, settings.ema), torch.optim.AdamW(groups, lr=settings.lr), scaler)


def _build_network(settings: Train) -> torch.nn.Module:
    return model.build(
        settings.encoder, settings.decoder, settings.sections, settings.heads, pretrained=settings.pretrained,
        binning=settings.binning,
    )  # fmt: skip


def _load_start(settings: Train) -> torch.nn.Module:
    """The network of ``train.start``, which must be of the kind that the settings ask for."""
    network, card = model.load(model.named(settings.start))
    for key in ("encoder", "decoder"):
        if getattr(settings, key) != getattr(card, key):
            raise UserError(
                f"train.start = {settings.start} has {key} = {getattr(card, key)}, but train.{key} = {getattr(settings, key)}; "
                "make them equal"
            )
    if card.binning not in (1, settings.binning):
        raise UserError(f"train.start = {settings.start} bins its input already; set train.binning = {card.binning}")
    if settings.sections < card.sections:
        raise UserError(
            f"train.start = {settings.start} sees {card.sections} sections; set train.sections to that, or to more"
        )
    return model.adapted(network, card, settings.heads, settings.binning, settings.sections)


def moving_average(network: torch.nn.Module, decay: float) -> AveragedModel:
    """Return the exponential moving average of a network's weights and buffers, in eval mode; so far a copy.

    In step n the decay is ``(1 + n) / (10 + n)``, at most ``decay``: early weights are soon forgotten.
    """

    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor | int) -> None:
        n = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, count)

    averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=True).requires_grad_(False).eval()
    averaged.n_averaged.fill_(1)  # the initial weights, or the first step would replace them
    return averaged


# ---------------------------------------------------------------- steps


def train_steps(state: State, sources: list[Source], settings: Train, log: Log) -> Iterator[dict]:
    """Take step after step, to the last one or the end of the time budget; yield each one's row of the curves.

    What the caller does between two rows counts into ``state.seconds``.

    Raises
    ------
    UserError
        If the loss is no finite number, or not even one patch fits the memory.
    """
    device = next(state.network.parameters()).device
    make_batch = mixed_batch if settings.self_training else annotated_batch
    part = slice(distributed.rank(), None, distributed.size())
    stream = prefetch_batches(sources, settings, state.step, settings.steps, make_batch, part)
    last = asked = time.monotonic()
    try:
        for patches in stream:
            state.data_wait_seconds += time.monotonic() - asked
            share = distributed.broadcast(completed_share(state, settings), device)
            if share >= 1:
                break
            row = train_step(state, patches, settings, share, log)
            if not math.isfinite(row["loss"]):
                raise UserError(
                    f"the loss is {row['loss']} at step {state.step}: set a lower train.lr than {settings.lr}"
                )
            state.history.append(row)
            now = time.monotonic()
            state.seconds, last = state.seconds + now - last, now
            yield row
            asked = time.monotonic()
    finally:
        stream.close()


def train_step(state: State, patches: tuple[np.ndarray, ...], settings: Train, share: float, log: Log) -> dict:
    """Update the network and its average once.

    Parameters
    ----------
    state
        Changed in place.
    patches
        Images and targets of `samples.annotated_batch`; with self-training also what `samples.unlabeled_batch` gives, which
        takes the places of the last annotated patches from ``settings.self_training_after`` on.
    settings
        The ``[train]`` table of a config.
    share
        How much of the run is over, 0 to 1.
    log
        Called with a line of text.

    Returns
    -------
    dict
        The row of the curves for the annotated patches: ``step``, ``split``, ``loss``, ``accuracy``, ``iou``.
    """
    rate = one_cycle_rate(share, settings.lr)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    used = patches if share >= settings.self_training_after else patches[:2]
    loss, counts = _gradients_within_memory(state, used, settings, log)
    _average_over_processes(state, loss, counts, len(patches[0]) / settings.batch)
    state.scaler.unscale_(state.optimizer)
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), MAX_GRADIENT_NORM)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    state.averaged.update_parameters(state.network)
    return {"step": state.step, "split": "training", "loss": loss.item(), **losses.foreground_scores(counts)}


def _gradients_within_memory(
    state: State, patches: tuple[np.ndarray, ...], settings: Train, log: Log
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `accumulate_gradients` gives; a batch that does not fit the memory is cut into twice as many pieces."""
    while True:
        try:
            return accumulate_gradients(state, patches, settings)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        if state.micro_batches >= len(patches[0]):
            advice = f"set a smaller train.patch than {settings.patch}"
            raise UserError(
                f"not even one patch fits the memory: {advice} ({reason.splitlines()[0] if reason else 'full'})"
            )
        state.micro_batches *= 2
        state.optimizer.zero_grad()
        trim_memory()
        size = -(-len(patches[0]) // state.micro_batches)
        log(f"a batch does not fit the memory: at most {size} at a time from here on, with the same effective batch")


def accumulate_gradients(
    state: State, patches: tuple[np.ndarray, ...], settings: Train
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leave the gradients of a batch in the network, computed in ``state.micro_batches`` pieces.

    Returns
    -------
    loss
        float32 scalar, the mean over the batch.
    counts
        `losses.confusion_counts` of the mask on its annotated patches.
    """
    device = next(state.network.parameters()).device
    images, targets, weights, annotated = _batch_tensors(state, patches, settings)
    state.optimizer.zero_grad()
    total, predictions = torch.zeros((), device=device), []
    pieces = (tensor.chunk(state.micro_batches) for tensor in (images, targets, weights))
    for image, target, weight in zip(*pieces, strict=True):
        with autocast(device, settings.precision):
            logits = state.network(image.contiguous(memory_format=torch.channels_last))
        loss = losses.segmentation_loss(logits.float(), target, weight, settings) * (len(image) / len(images))
        state.scaler.scale(loss).backward()
        total += loss.detach()
        predictions.append(logits.detach()[:, 0].float() >= 0)
    truth, valid = targets[:annotated, 0] > 0, weights[:annotated, 0] > 0
    return total, losses.confusion_counts(torch.cat(predictions)[:annotated], truth, valid)


def _batch_tensors(
    state: State, patches: tuple[np.ndarray, ...], settings: Train
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Images (B, sections, P, P), targets and weights (B, heads, P, P), and how many of the patches are annotated."""
    device = next(state.network.parameters()).device
    images, stored, *unlabeled = (torch.from_numpy(array).to(device) for array in patches)
    targets, weight, annotated = stored[:, :-1].float(), stored[:, -1:].float(), len(images)
    targets[:, 2:] /= 255
    known = targets[:, :1] != UNKNOWN
    targets[:, :1] *= known
    weights = torch.cat([known.float(), *[weight] * (targets.shape[1] - 1)], 1)
    if unlabeled and len(unlabeled[0]):
        clean, changed = unlabeled
        annotated -= len(changed)
        taught = [pseudo_labels(state.averaged, piece, settings) for piece in clean.chunk(state.micro_batches)]
        labels, confident = (torch.cat(tensors) for tensors in zip(*taught, strict=True))
        images = torch.cat([images[:annotated], changed])
        targets, weights = torch.cat([targets[:annotated], labels]), torch.cat([weights[:annotated], confident])
    return images, targets, weights, annotated


@torch.no_grad()
def pseudo_labels(network: torch.nn.Module, images: torch.Tensor, settings: Train) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a teacher network makes of images that nobody annotated, as targets, and where it is confident.

    Confident is a probability of at least ``self_training_confidence`` for or against mask and contour. A distance is
    taken as it is, where the mask is confident.

    Parameters
    ----------
    network
        The teacher: the moving average of the network that is trained.
    images
        float32 (B, sections, Y, X), standardized.
    settings
        The ``[train]`` table of a config.

    Returns
    -------
    targets, weights
        float32 (B, heads, Y, X); weights are 0 or 1.

    References
    ----------
    The averaged network as teacher: Tarvainen and Valpola, "Mean teachers", NeurIPS 2017, arXiv:1703.01780. Hard labels
    where it is confident, learnt from changed images: Sohn et al., "FixMatch", NeurIPS 2020, arXiv:2001.07685.
    """
    with autocast(images.device, settings.precision):
        probability = network(images.contiguous(memory_format=torch.channels_last)).float().sigmoid()
    least = torch.tensor(settings.self_training_confidence, device=images.device)[:, None, None]
    classes, distance = probability[:, :2], probability[:, 2:]
    confident = (torch.maximum(classes, 1 - classes) >= least).float()
    targets = torch.cat([(classes >= 0.5).float(), distance], 1)
    return targets, torch.cat([confident, confident[:, :1].expand_as(distance)], 1)


def _average_over_processes(state: State, loss: torch.Tensor, counts: torch.Tensor, share: float) -> None:
    """Gradients, loss and batch-norm statistics become the mean over processes, each by its ``share`` of the batch."""
    if distributed.size() == 1:
        return
    gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
    means = [*gradients, *(b for b in state.network.buffers() if b.is_floating_point()), loss]
    for tensor in means:
        tensor.mul_(share)
    sums = counts.float()
    distributed.all_reduce_sum([*means, sums])
    counts.copy_(sums)


def completed_share(state: State, settings: Train) -> float:
    """Return how much of the run is over, by steps or by the time budget, whichever is further."""
    by_time = state.seconds / (60 * settings.minutes) if settings.minutes else 0.0
    return max(state.step / settings.steps, by_time)


def one_cycle_rate(share: float, peak: float) -> float:
    """Return the learning rate where ``share`` of the run is over: up by half a cosine, then down to almost nothing.

    This is what `torch.optim.lr_scheduler.OneCycleLR` does with steps alone; here a time budget may move the share on.

    References
    ----------
    Smith and Topin, "Super-convergence", arXiv:1708.07120.

    Examples
    --------
    >>> [round(one_cycle_rate(share, 1.0), 3) for share in (0, 0.1, 0.55, 1)]
    [0.04, 1.0, 0.5, 0.0]
    """
    if share < WARM_UP_SHARE:
        depth = 1 - 1 / START_DIVISOR
        return peak * (1 - depth * (0.5 + 0.5 * math.cos(math.pi * share / WARM_UP_SHARE)))
    falling = min(1.0, (share - WARM_UP_SHARE) / (1 - WARM_UP_SHARE))
    return peak * max(MIN_RATE_SHARE, 0.5 + 0.5 * math.cos(math.pi * falling))


# ---------------------------------------------------------------- the end


def update_batchnorm(network: torch.nn.Module, sources: list[Source], settings: Train, micro_batches: int = 1) -> None:
    """Give ``network`` batch-norm statistics of its own: plain means over training batches, in eval mode afterwards.

    An average of weights needs statistics of its own. Each batch is cut into ``micro_batches`` pieces.

    References
    ----------
    Izmailov et al., "Averaging weights leads to wider optima", UAI 2018, arXiv:1803.05407.
    """
    device = next(network.parameters()).device
    stop = BATCHNORM_FIRST_STEP + min(BATCHNORM_BATCHES, settings.steps)
    batches = (torch.from_numpy(b[0]) for b in prefetch_batches(sources, settings, BATCHNORM_FIRST_STEP, stop))
    pieces = (piece for batch in batches for piece in batch.chunk(micro_batches))
    update_bn((piece.to(device, memory_format=torch.channels_last) for piece in pieces), network)
    network.eval()
