"""What training minimizes, and the counts behind the scores that it shows."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from volseg.config import Train


def loss_of(logits: torch.Tensor, aims: torch.Tensor, weights: torch.Tensor, knobs: Train) -> torch.Tensor:
    """Pixel loss plus Dice on the mask, ``contour_weight`` times the same on the contour, and the distance's cross-entropy.

    All are (B, 2 or 3, Y, X): mask, contour and, where ``distance_nm`` asks for it, distance. ``aims`` are 0 or 1, of the
    distance anything between; ``weights`` are at least 0.
    """
    pixel = focal if knobs.loss == "focal" else cross_entropy
    scale = knobs.focal_scale if knobs.loss == "focal" else 1.0
    parts = [
        scale * pixel(logits[:, i], aims[:, i], weights[:, i]) + dice(logits[:, i], aims[:, i], weights[:, i])
        for i in range(2)
    ]
    loss = parts[0] + knobs.contour_weight * parts[1]
    if logits.shape[1] > 2:
        loss = loss + knobs.distance_weight * cross_entropy(logits[:, 2], aims[:, 2], weights[:, 2])
    return loss


def cross_entropy(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy, by ``weight``."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * weight).sum() / weight.sum().clamp(min=1)


def focal(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Cross-entropy times ``(1 - p)**gamma``, so easy voxels count less (Lin et al., arXiv 1708.02002).

    No alpha: theirs of 0.25 was tuned for rare boxes and makes foreground voxels count a third of background ones.
    """
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * (1 - torch.exp(-loss)) ** gamma * weight).sum() / weight.sum().clamp(min=1)


def dice(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """1 minus the soft Dice overlap of the whole batch; 0 where both are empty (Milletari et al., arXiv 1606.04797)."""
    chance = logits.sigmoid()
    both, either = (chance * target * weight).sum(), ((chance + target) * weight).sum()
    return 1 - (2 * both + 1) / (either + 1)


def counts(found: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Voxels found and true, found alone, true alone, neither: int64 (4,)."""
    cases = (found & truth, found & ~truth, ~found & truth, ~found & ~truth)
    return torch.stack([(case & valid).sum() for case in cases])


def scores(voxels: torch.Tensor) -> dict[str, float]:
    """``accuracy`` and foreground ``iou`` of what :func:`counts` gave.

    >>> scores(torch.tensor([3, 1, 2, 4]))
    {'accuracy': 0.7, 'iou': 0.5}
    """
    both, found, true, neither = (int(n) for n in voxels)
    return {
        "accuracy": (both + neither) / max(1, both + found + true + neither),
        "iou": both / (both + found + true) if both + found + true else 1.0,
    }
