"""Held-out sections: what the network makes of them, and how good that is."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch

from volseg.config import Train
from volseg.errors import UserError
from volseg.inference.tiles import MULTIPLE
from volseg.training import losses
from volseg.training.precision import autocast
from volseg.training.samples import context_sections
from volseg.training.sources import Source
from volseg.training.targets import UNLABELED, mask_and_contour

TILE, MARGIN = 1280, 64  # a longer plane is predicted in parts of TILE that see MARGIN voxels more on each side


def plane_logits(network: torch.nn.Module, source: Source, z: int, settings: Train) -> torch.Tensor:
    """(heads, Y, X) float32 logits on the CPU for a whole section."""
    raw = source.image[context_sections(z, settings.sections, len(source.image))]
    height, width = plane = raw.shape[1:]
    out = torch.empty(len(settings.heads), height, width)
    was_training = network.training
    network.eval()
    for y, x in product(range(0, height, TILE), range(0, width, TILE)):
        core = slice(y, min(y + TILE, height)), slice(x, min(x + TILE, width))
        seen = tuple(slice(max(0, s.start - MARGIN), min(n, s.stop + MARGIN)) for s, n in zip(core, plane, strict=True))
        inner = tuple(slice(c.start - s.start, c.stop - s.start) for c, s in zip(core, seen, strict=True))
        out[:, *core] = _logits(network, (raw[:, *seen] - source.mean) / source.std, settings)[:, *inner]
    network.train(was_training)
    return out


def _logits(network: torch.nn.Module, image: np.ndarray, settings: Train) -> torch.Tensor:
    """(heads, Y, X) for a standardized image (sections, Y, X), its edges mirrored to a multiple that the network takes."""
    device = next(network.parameters()).device
    (height, width), multiple = image.shape[1:], MULTIPLE * settings.binning
    padded = np.pad(
        image.astype(np.float32), ((0, 0), (0, -height % multiple), (0, -width % multiple)), mode="symmetric"
    )
    with torch.inference_mode(), autocast(device, settings.precision):
        logits = network(torch.from_numpy(padded)[None].to(device, memory_format=torch.channels_last))
    return logits[0, :, :height, :width].float().cpu()


def section_targets(source: Source, z: int, settings: Train) -> tuple[torch.Tensor, torch.Tensor]:
    """Return targets and weights of a whole section, as `losses.segmentation_loss` takes them: (heads, Y, X) float32."""
    labels = source.labels[z]
    valid = labels != UNLABELED
    mask, contour = mask_and_contour(np.where(valid, labels, 0), settings.contour_width)
    targets = [mask, contour | source.contacts[z]]
    if source.distance is not None:
        targets.append(source.distance[z] / np.float32(255))
    return torch.from_numpy(np.stack(targets)).float(), torch.from_numpy(valid).float().expand(len(targets), -1, -1)


def validate(network: torch.nn.Module, sources: list[Source], settings: Train) -> dict:
    """Return the scores of a network on whole held-out sections.

    Returns
    -------
    dict
        ``loss``, ``accuracy`` and foreground ``iou`` under "all" and under each source's name. Empty where no source holds
        sections out.
    """
    scores, all_losses, all_counts = {}, [], []
    for source in (s for s in sources if s.validation_sections):
        rows = [_score_section(network, source, z, settings) for z in source.validation_sections]
        values, counts = [row[0] for row in rows], [row[1] for row in rows]
        scores[source.name] = {"loss": float(np.mean(values)), **losses.foreground_scores(sum(counts))}
        all_losses, all_counts = all_losses + values, all_counts + counts
    if not all_losses:
        return {}
    return {"all": {"loss": float(np.mean(all_losses)), **losses.foreground_scores(sum(all_counts))}, **scores}


def _score_section(network: torch.nn.Module, source: Source, z: int, settings: Train) -> tuple[float, torch.Tensor]:
    """Loss and confusion counts of one section."""
    logits, (targets, weights) = plane_logits(network, source, z, settings), section_targets(source, z, settings)
    loss = losses.segmentation_loss(logits[None], targets[None], weights[None], settings).item()
    return loss, losses.confusion_counts(logits[0] >= 0, targets[0] > 0, weights[0] > 0)


def require_validation_sections(sources: list[Source], command: str) -> None:
    """Raise `UserError` where no section is held out; ``command`` is what needs some."""
    if not any(source.validation_sections for source in sources):
        raise UserError(
            f'{command} needs held-out sections: set validate_on = ["START:STOP"] in a [[train.data]] table, about a tenth '
            "of the annotated sections, next to each other"
        )
