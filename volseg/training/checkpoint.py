"""A training run between two steps, and the file from which a killed run goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch.optim.swa_utils import AveragedModel

from volseg.config import Train
from volseg.errors import UserError
from volseg.inference import model

CHECKPOINT_NAME = "checkpoint.safetensors"
CHANGEABLE_SETTINGS = ("out", "device", "minutes", "every")  # they do not change what a resumed run learns from
COUNTERS = ("step", "seconds", "data_wait_seconds", "micro_batches", "history")


@dataclass
class State:
    """A training run between two steps: everything that a checkpoint holds.

    Attributes
    ----------
    network
        The network that is trained.
    averaged
        Exponential moving average of its weights and buffers: the model that is kept.
    optimizer
        Its parameters are those of ``network``.
    scaler
        Scales losses where float16 needs it, else does nothing.
    step
        Steps done.
    seconds, data_wait_seconds
        Time that the steps took, and how much of it the network waited for patches.
    micro_batches
        Pieces into which a batch is cut, so that each fits the memory.
    history
        Rows of the curves: ``step``, ``split`` ("training" or "validation"), ``loss``, ``accuracy``, ``iou``.
    """

    network: torch.nn.Module
    averaged: AveragedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    micro_batches: int = 1
    history: list[dict] = field(default_factory=list)


def save(state: State, path: Path, settings: Train) -> None:
    """Write the whole state to ``path``; a kill or a full disk leaves the old file or the new one.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    tensors = {f"network.{k}": v for k, v in state.network.state_dict().items()}
    tensors |= {f"averaged.{k}": v for k, v in state.averaged.state_dict().items()}
    for i, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
    counters = {name: getattr(state, name) for name in COUNTERS}
    note = {"settings": fixed_settings(settings), "scaler": state.scaler.state_dict(), **counters}
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    model.write_whole(path, serialize(tensors, metadata={"checkpoint": json.dumps(note)}))


def fixed_settings(settings: Train) -> dict:
    """Return the settings that a resumed run must share with the run that it goes on from, as JSON has them."""
    return settings.model_dump(mode="json", exclude=set(CHANGEABLE_SETTINGS))


def resume(state: State, path: Path, settings: Train) -> bool:
    """Put the checkpoint at ``path`` into ``state``; return whether there is one.

    Raises
    ------
    UserError
        If the file is no checkpoint, or one of other `fixed_settings`.
    """
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["checkpoint"])
            stored = fixed_settings(Train.model_validate(note["settings"]))
            counters = {name: note[name] for name in COUNTERS}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a checkpoint of volseg train; move it away or give another train.out") from None
    changed = [key for key, value in fixed_settings(settings).items() if stored[key] != value]
    if changed:
        raise UserError(
            f"{path} was made with another train.{', train.'.join(changed)}; give another train.out (and train.start = its "
            "model, to go on from what it learnt), or delete it"
        )
    state.network.load_state_dict(_with_prefix("network.", tensors))
    state.averaged.load_state_dict(_with_prefix("averaged.", tensors))
    _load_moments(state.optimizer, _with_prefix("optimizer.", tensors))
    if note["scaler"]:  # a CPU's is empty
        state.scaler.load_state_dict(note["scaler"])
    for name, value in counters.items():
        setattr(state, name, value)
    return True


def _load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The optimizer's state, from tensors called ``index.name``."""
    moments: dict[int, dict] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        moments.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for weight, stored in optimizer.state.items():  # in the weights' own order in memory, or steps are slow
        for name in ("exp_avg", "exp_avg_sq"):
            stored[name] = torch.empty_like(weight).copy_(stored[name])


def _with_prefix(prefix: str, tensors: dict) -> dict:
    """The entries whose key begins with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
