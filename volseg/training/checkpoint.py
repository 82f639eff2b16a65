"""A run between two steps, and its file, from which a killed run goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as packed

from volseg.config import Train
from volseg.errors import UserError
from volseg.inference import model

NAME = "checkpoint.safetensors"
MAY_CHANGE = ("out", "device", "minutes", "every")  # knobs that do not change what a resumed run learns from


@dataclass
class State:
    """A run between two steps: everything that a checkpoint holds."""

    network: torch.nn.Module
    averaged: torch.nn.Module  # exponential moving average of the network, the model that is kept
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # scales losses where float16 needs it, else does nothing
    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of these, seconds that the network waited for patches
    parts: int = 1  # pieces that a batch is cut into, so that each fits the memory
    history: list[dict] = field(default_factory=list)  # rows of the curves


def save(state: State, path: Path, knobs: Train) -> None:
    """Writes the whole state; a kill or a full disk leaves the old file or the new one. Raises :class:`UserError`."""
    tensors = {f"network.{k}": v for k, v in state.network.state_dict().items()}
    tensors |= {f"averaged.{k}": v for k, v in state.averaged.state_dict().items()}
    for i, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
    plain = {name: getattr(state, name) for name in ("step", "seconds", "waited", "parts", "history")}
    note = {"settings": settings(knobs), "scaler": state.scaler.state_dict(), **plain}
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    model.write_whole(path, packed(tensors, metadata={"checkpoint": json.dumps(note)}))


def settings(knobs: Train) -> dict:
    """The knobs that a resumed run must share with the run that it goes on from."""
    return knobs.model_dump(mode="json", exclude=set(MAY_CHANGE))


def resume(state: State, path: Path, knobs: Train) -> bool:
    """Puts the checkpoint at ``path`` into ``state``, if there is one; refuses one of other settings."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["checkpoint"])
            stored = settings(Train.model_validate(note["settings"]))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a checkpoint of volseg train; move it away or give another train.out") from None
    changed = [key for key, value in settings(knobs).items() if stored[key] != value]
    if changed:
        raise UserError(
            f"{path} was made with another train.{', train.'.join(changed)}; give another train.out (and train.start = its "
            "model, to go on from what it learnt), or delete it"
        )
    state.network.load_state_dict(_under("network.", tensors))
    state.averaged.load_state_dict(_under("averaged.", tensors))
    moments: dict[int, dict] = {}
    for key, value in _under("optimizer.", tensors).items():
        index, name = key.split(".")
        moments.setdefault(int(index), {})[name] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for weight, kept in state.optimizer.state.items():  # in the weights' own order in memory, or steps are slow
        for name in ("exp_avg", "exp_avg_sq"):
            kept[name] = torch.empty_like(weight).copy_(kept[name])
    if note.get("scaler"):  # a CPU's is empty
        state.scaler.load_state_dict(note["scaler"])
    state.step, state.seconds, state.history = note["step"], note["seconds"], note["history"]
    state.waited, state.parts = note.get("waited", 0.0), note.get("parts", 1)
    return True


def _under(prefix: str, tensors: dict) -> dict:
    """The entries whose key begins with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
