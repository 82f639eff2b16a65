"""Held-out sections: what the network makes of them, and how good that is."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import torch

from volseg.config import Train
from volseg.errors import UserError
from volseg.inference.tiles import MULTIPLE
from volseg.training import losses
from volseg.training.samples import Source, context
from volseg.training.targets import UNLABELED, mask_and_contour

TILE, MARGIN = 1280, 64  # a longer plane is predicted in parts of TILE that see MARGIN voxels more on each side


def plane_logits(network: torch.nn.Module, source: Source, z: int, knobs: Train) -> torch.Tensor:
    """(heads, Y, X) float32 logits on the CPU for a whole section."""
    raw = source.image[context(z, knobs.sections, len(source.image))]
    height, width = plane = raw.shape[1:]
    out = torch.empty(len(knobs.heads), height, width)
    was_training = network.training
    network.eval()
    for y, x in product(range(0, height, TILE), range(0, width, TILE)):
        core = slice(y, min(y + TILE, height)), slice(x, min(x + TILE, width))
        seen = tuple(slice(max(0, s.start - MARGIN), min(n, s.stop + MARGIN)) for s, n in zip(core, plane, strict=True))
        inner = tuple(slice(c.start - s.start, c.stop - s.start) for c, s in zip(core, seen, strict=True))
        out[:, *core] = _logits(network, (raw[:, *seen] - source.mean) / source.std, knobs)[:, *inner]
    network.train(was_training)
    return out


def _logits(network: torch.nn.Module, image: np.ndarray, knobs: Train) -> torch.Tensor:
    """(heads, Y, X) for a standardized image (sections, Y, X), its edges mirrored to a multiple that the network takes."""
    device = next(network.parameters()).device
    (height, width), multiple = image.shape[1:], MULTIPLE * knobs.binning
    padded = np.pad(
        image.astype(np.float32), ((0, 0), (0, -height % multiple), (0, -width % multiple)), mode="symmetric"
    )
    with torch.inference_mode(), autocast(device, knobs.precision):
        logits = network(torch.from_numpy(padded)[None].to(device, memory_format=torch.channels_last))
    return logits[0, :, :height, :width].float().cpu()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The arithmetic of ``train.precision``; see :func:`resolved`."""
    chosen = resolved(device, precision)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def resolved(device: torch.device, precision: str) -> str:
    """``precision``; for "auto" bf16 where the device computes in it, else fp16 on CUDA, else fp32.

    bf16 is in CUDA from Ampere on and in CPUs with AVX-512 BF16 or AMX.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, as far as Linux tells."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("\n\n")[0].split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def plane_targets(source: Source, z: int, knobs: Train) -> tuple[torch.Tensor, torch.Tensor]:
    """Aims and weights of a whole section, both (heads, Y, X) float32."""
    labels = source.labels[z]
    valid = labels != UNLABELED
    mask, contour = mask_and_contour(np.where(valid, labels, 0), knobs.contour_width)
    aims = [mask, contour | source.touching[z]]
    if source.distance is not None:
        aims.append(source.distance[z] / np.float32(255))
    return torch.from_numpy(np.stack(aims)).float(), torch.from_numpy(valid).float().expand(len(aims), -1, -1)


def validate(network: torch.nn.Module, sources: list[Source], knobs: Train) -> dict:
    """Loss, accuracy and foreground IoU of ``network`` on whole held-out sections: ``all``, and each source by name.

    Empty where no source holds sections out.
    """
    found, values, voxels = {}, [], []
    for source in (s for s in sources if s.held):
        rows = [_score(network, source, z, knobs) for z in source.held]
        here, counts = [row[0] for row in rows], [row[1] for row in rows]
        found[source.name] = {"loss": float(np.mean(here)), **losses.scores(sum(counts))}
        values, voxels = values + here, voxels + counts
    return {"all": {"loss": float(np.mean(values)), **losses.scores(sum(voxels))}, **found} if values else {}


def _score(network: torch.nn.Module, source: Source, z: int, knobs: Train) -> tuple[float, torch.Tensor]:
    """Loss and counts of one section."""
    logits, (aims, weights) = plane_logits(network, source, z, knobs), plane_targets(source, z, knobs)
    loss = losses.loss_of(logits[None], aims[None], weights[None], knobs).item()
    return loss, losses.counts(logits[0] >= 0, aims[0] > 0, weights[0] > 0)


def refuse_nothing_held_out(sources: list[Source], why: str) -> None:
    """Raises :class:`UserError` where no section is held out."""
    if not any(source.held for source in sources):
        raise UserError(
            f'{why} needs held-out sections: set validate_on = ["START:STOP"] in a [[train.data]] table, about a tenth '
            "of the annotated sections, next to each other"
        )
