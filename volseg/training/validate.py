"""Held-out sections: what the network makes of them, and how good that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from volseg.config import Config, Train
from volseg.errors import UserError
from volseg.inference.backends import Forward
from volseg.inference.model_card import MULTIPLE
from volseg.inference.normalization import scale
from volseg.inference.sections import predict_sections
from volseg.inference.tiles import Slab
from volseg.inference.tiles import grid as tile_grid
from volseg.training import losses
from volseg.training.precision import autocast
from volseg.training.sources import Source
from volseg.training.targets import UNLABELED, mask_and_contour, near_unlabeled

MIN_PROBABILITY = 1e-6  # and 1 less that is the greatest, of which a loss is taken


# ---------------------------------------------------------------- predictions


@contextmanager
def numpy_forward(network: torch.nn.Module, precision: str) -> Iterator[Forward]:
    """Give a network as a function of arrays within the block, in eval mode.

    It takes standardized tiles (B, sections, Y, X) float32 to probabilities (B, heads, Y, X) float32.
    """
    device = next(network.parameters()).device

    def forward(tiles: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), autocast(device, precision):
            logits = network(torch.from_numpy(tiles).to(device, memory_format=torch.channels_last))
            return logits.float().sigmoid().cpu().numpy()

    was_training = network.training
    network.eval()
    try:
        yield forward
    finally:
        network.train(was_training)


def source_tiles(source: Source, config: Config) -> dict:
    """Return what `sections.predict_sections` is told of a source: slab, grid, heads and scale, those of a run."""
    settings, predict, image = config.train, config.predict, source.image
    return {
        "slab": Slab(image, (0, 0, 0), settings.sections // 2, len(image), source.padding),
        "grid": tile_grid(image.shape[1:], predict.tile, predict.overlap, MULTIPLE * settings.binning),
        "heads": len(settings.heads),
        "scale": scale(source.mean, source.std),
    }


# ---------------------------------------------------------------- scores


def section_targets(source: Source, z: int, settings: Train) -> tuple[torch.Tensor, torch.Tensor]:
    """Return targets and weights of a whole section, as `losses.segmentation_loss` takes them: (heads, Y, X) float32."""
    labels = source.labels[z]
    valid = labels != UNLABELED
    mask, contour = mask_and_contour(np.where(valid, labels, 0), settings.contour_width)
    targets = [mask, contour | source.contacts[z]]
    if source.distance is not None:
        targets.append(source.distance[z] / np.float32(255))
    others = [~near_unlabeled(~valid, settings.contour_width)] * (len(targets) - 1)
    weights = np.stack([valid, *others])
    return torch.from_numpy(np.stack(targets)).float(), torch.from_numpy(weights).float()


def validate(network: torch.nn.Module, sources: list[Source], config: Config) -> dict:
    """Return the scores of a network on whole held-out sections, predicted as a run predicts them.

    Parameters
    ----------
    network
        On any device; left in the mode in which it was.
    sources
        Volumes, of which some hold sections out.
    config
        All settings; those of ``predict`` say how sections are cut into tiles.

    Returns
    -------
    dict
        ``loss``, ``accuracy`` and foreground ``iou`` under "all" and under each source's name. Empty where no source holds
        sections out.
    """
    scores: dict[str, dict] = {}
    all_losses: list[float] = []
    all_counts: list[torch.Tensor] = []
    with numpy_forward(network, config.train.precision) as forward:
        for source in (s for s in sources if s.validation_sections):
            rows = [_score_section(forward, source, z, config) for z in source.validation_sections]
            values, counts = [row[0] for row in rows], [row[1] for row in rows]
            scores[source.name] = {"loss": float(np.mean(values)), **losses.foreground_scores(sum(counts))}
            all_losses, all_counts = all_losses + values, all_counts + counts
    if not all_losses:
        return {}
    return {"all": {"loss": float(np.mean(all_losses)), **losses.foreground_scores(sum(all_counts))}, **scores}


def _score_section(forward: Forward, source: Source, z: int, config: Config) -> tuple[float, torch.Tensor]:
    """Loss and confusion counts of one section."""
    blended = predict_sections(forward, sections=[z], **source_tiles(source, config))
    probability = torch.from_numpy(blended[:, 0])
    targets, weights = section_targets(source, z, config.train)
    logits = torch.logit(probability, eps=MIN_PROBABILITY)
    loss = losses.segmentation_loss(logits[None], targets[None], weights[None], config.train).item()
    return loss, losses.confusion_counts(probability[0] >= 0.5, targets[0] > 0, weights[0] > 0)


def require_validation_sections(sources: list[Source], command: str) -> None:
    """Raise `UserError` where no section is held out; ``command`` is what needs some."""
    if not any(source.validation_sections for source in sources):
        raise UserError(
            f'{command} needs held-out sections: set validate_on = ["START:STOP"] in a [[train.data]] table, about a tenth '
            "of the annotated sections, next to each other"
        )
