"""What training minimizes, and the counts behind the scores that it shows."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from volseg.config import Train


def segmentation_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, settings: Train
) -> torch.Tensor:
    """Return the loss that training minimizes, summed over the heads of the network.

    Mask and contour each have a pixel loss (``settings.loss``) plus a Dice loss; the contour counts ``contour_weight``
    times. A distance head has a cross-entropy that counts ``distance_weight`` times.

    Parameters
    ----------
    logits
        float32 (B, heads, Y, X). Heads are mask, contour and, with ``settings.distance_nm``, distance.
    targets
        float32 of the same shape: 0 or 1; for the distance, a share of ``distance_nm`` between 0 and 1.
    weights
        float32 of the same shape, at least 0; a voxel of weight 0 does not count.
    settings
        The ``[train]`` table of a config.

    Returns
    -------
    torch.Tensor
        float32 scalar.
    """
    pixel_loss = focal_loss if settings.loss == "focal" else cross_entropy
    scale = settings.focal_scale if settings.loss == "focal" else 1.0
    mask, contour = (
        scale * pixel_loss(logits[:, i], targets[:, i], weights[:, i])
        + dice_loss(logits[:, i], targets[:, i], weights[:, i])
        for i in range(2)
    )
    loss = mask + settings.contour_weight * contour
    if logits.shape[1] > 2:
        loss = loss + settings.distance_weight * cross_entropy(logits[:, 2], targets[:, 2], weights[:, 2])
    return loss


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean of the binary cross-entropy, a scalar. All arguments have one shape."""
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (loss * weights).sum() / weights.sum().clamp(min=1)


def focal_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Return the weighted mean of the focal loss: cross-entropy times ``(1 - p)**gamma``, so easy voxels count less.

    ``p`` is the probability of the true class. All tensors have one shape. There is no ``alpha`` of the paper: its 0.25
    was tuned for rare boxes, and would make foreground voxels count a third of background ones.

    References
    ----------
    Lin et al., "Focal loss for dense object detection", ICCV 2017, arXiv:1708.02002.

    Examples
    --------
    A probability of 1/2 counts a quarter of its cross-entropy, log 2.

    >>> round(focal_loss(torch.zeros(1), torch.ones(1), torch.ones(1)).item(), 4)
    0.1733
    """
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (loss * (1 - torch.exp(-loss)) ** gamma * weights).sum() / weights.sum().clamp(min=1)


def dice_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return 1 minus the soft Dice overlap of the whole batch; 0 where both are empty. All arguments have one shape.

    References
    ----------
    Milletari et al., "V-Net", 3DV 2016, arXiv:1606.04797.
    """
    probability = logits.sigmoid()
    intersection, total = (probability * targets * weights).sum(), ((probability + targets) * weights).sum()
    return 1 - (2 * intersection + 1) / (total + 1)


def confusion_counts(prediction: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the numbers of true positive, false positive, false negative and true negative voxels, int64 (4,).

    All arguments are bool of one shape; only voxels that are ``valid`` count.
    """
    cases = (prediction & truth, prediction & ~truth, ~prediction & truth, ~prediction & ~truth)
    return torch.stack([(case & valid).sum() for case in cases])


def foreground_scores(counts: torch.Tensor) -> dict[str, float]:
    """Return ``accuracy`` and foreground ``iou`` (intersection over union) of `confusion_counts`.

    >>> foreground_scores(torch.tensor([3, 1, 2, 4]))
    {'accuracy': 0.7, 'iou': 0.5}
    """
    tp, fp, fn, tn = (int(n) for n in counts)
    return {
        "accuracy": (tp + tn) / max(1, tp + fp + fn + tn),
        "iou": tp / (tp + fp + fn) if tp + fp + fn else 1.0,
    }
