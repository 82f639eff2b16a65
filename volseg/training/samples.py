"""Random augmented patches from annotated volumes, each a function of (seed, step, index)."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import ndimage

from volseg.config import Train
from volseg.training.augmentation import (
    change_intensity,
    disturb_neighbors,
    randomize_domain,
    resample_linear,
    resample_nearest,
    sampling_grid,
)
from volseg.training.sources import Source, unlabeled_patches
from volseg.training.targets import UNLABELED, mask_and_contour, near_unlabeled

OBJECT_SHARE = 0.5  # share of patches centered near an object
CONTACT_SHARE = 0.4  # share of these centered near a contact of two objects, where there is one
UNKNOWN = 2  # the mask's target where nobody annotated


def context_sections(z: int, sections: int, depth: int) -> np.ndarray:
    """Return the numbers of the sections seen as channels around section ``z``, clamped to the volume.

    >>> context_sections(0, 3, 9).tolist()
    [0, 0, 1]
    """
    return np.clip(np.arange(z - sections // 2, z + sections // 2 + 1), 0, depth - 1)


def annotated_batch(
    sources: list[Source], settings: Train, step: int, part: slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """Return the annotated patches of a step.

    They depend on the settings and ``step`` alone, so that a resumed run sees what an uninterrupted one would have.

    Parameters
    ----------
    sources
        Volumes to draw from, each as often as its ``share`` says.
    settings
        The ``[train]`` table of a config.
    step
        Number of the step.
    part
        Which patches of the batch are made.

    Returns
    -------
    images
        float32 (B, sections, P, P), standardized gray values.
    targets
        uint8 (B, heads + 1, P, P): mask (`UNKNOWN` where nobody annotated), contour, perhaps distance (255 for
        ``distance_nm``), and how much the loss of the heads beside the mask counts: 0 where nobody annotated or that may
        hide a border, ``contact_weight`` where objects touch, else 1.
    """
    seeds = [(settings.seed, step, i) for i in range(settings.batch)[part]]
    pairs = [annotated_sample(sources, settings, np.random.default_rng(seed)) for seed in seeds]
    images, targets = zip(*pairs, strict=True)
    return np.stack(images), np.stack(targets)


def unlabeled_batch(
    sources: list[Source], settings: Train, step: int, part: slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """Return the patches of unlabeled sections of a step, twice: as they are, and with changed gray values and neighbors.

    Both are float32 (`unlabeled_patches`, sections, P, P), flipped and bent alike, and functions of the settings and
    ``step``. They may take the last places in ``part`` of a batch.
    """
    count = unlabeled_patches(settings)
    numbers = [i for i in range(settings.batch)[part] if i >= settings.batch - count]
    seeds = [(settings.seed, step, settings.batch + i) for i in numbers]
    pairs = [unlabeled_sample(sources, settings, np.random.default_rng(seed)) for seed in seeds]
    both = np.array(pairs, np.float32).reshape(len(pairs), 2, settings.sections, settings.patch, settings.patch)
    return both[:, 0], both[:, 1]


def mixed_batch(sources: list[Source], settings: Train, step: int, part: slice = slice(None)) -> tuple[np.ndarray, ...]:
    """Return what `annotated_batch` gives, then what `unlabeled_batch` gives."""
    return *annotated_batch(sources, settings, step, part), *unlabeled_batch(sources, settings, step, part)


def prefetch_batches(
    sources: list[Source],
    settings: Train,
    first: int,
    stop: int,
    make_batch: Callable = annotated_batch,
    part: slice = slice(None),
) -> Generator[tuple[np.ndarray, ...]]:
    """Yield the batches of steps ``first`` to ``stop`` in order; threads on the other cores make the next ones."""
    threads = max(1, min(8, (os.cpu_count() or 1) - 1))
    with ThreadPoolExecutor(threads) as pool:
        pending = deque(
            pool.submit(make_batch, sources, settings, step, part)
            for step in range(first, min(first + threads + 1, stop))
        )
        try:
            for step in range(first, stop):
                if step + threads + 1 < stop:
                    pending.append(pool.submit(make_batch, sources, settings, step + threads + 1, part))
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def annotated_sample(sources: list[Source], settings: Train, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return one augmented patch: float32 (sections, P, P) and uint8 (heads + 1, P, P), as in `annotated_batch`."""
    source = _draw_source(sources, rng)
    if source.resliced:
        source = (source, *source.resliced)[rng.integers(1 + len(source.resliced))]
    z, y, x = _draw_position(source, settings.patch, rng)
    planes = _draw_planes(source, z, settings, rng)
    planes, offsets, blurred = disturb_neighbors(planes, settings, rng)
    ys, xs = sampling_grid(settings, rng)
    raw = resample_linear(source.image, planes, ys + y, xs + x, offsets)
    annotation = [volume for volume in (source.labels, source.contacts, source.distance) if volume is not None]
    image = _augmented(raw, source, blurred, settings, rng)
    return image, _targets(*(resample_nearest(v[z], ys + y, xs + x) for v in annotation), settings=settings)


def unlabeled_sample(sources: list[Source], settings: Train, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return one patch of an unlabeled section as it is and changed, both float32 (sections, P, P)."""
    source = _draw_source([source for source in sources if source.unlabeled_sections], rng)
    z = source.unlabeled_sections[rng.integers(len(source.unlabeled_sections))]
    y, x = _clamp_center(source, settings.patch, [rng.uniform(0, n) for n in source.image.shape[1:]])
    planes = _draw_planes(source, z, settings, rng)
    ys, xs = sampling_grid(settings, rng)
    clean = resample_linear(source.image, planes, ys + y, xs + x, np.zeros((len(planes), 2), np.float32))
    planes, offsets, blurred = disturb_neighbors(planes.copy(), settings, rng)
    raw = resample_linear(source.image, planes, ys + y, xs + x, offsets)
    return _standardized(clean, source), _augmented(raw, source, blurred, settings, rng)


def _draw_source(sources: list[Source], rng: np.random.Generator) -> Source:
    """One of the sources, each as often as its share says."""
    shares = np.array([source.share for source in sources])
    return sources[rng.choice(len(sources), p=shares / shares.sum())]


def _draw_planes(source: Source, z: int, settings: Train, rng: np.random.Generator) -> np.ndarray:
    """The sections that a patch of section ``z`` sees, half of the time in reverse order."""
    planes = context_sections(z, settings.sections, len(source.image))
    if "flip" in settings.augment and rng.random() < 0.5:
        planes = planes[::-1].copy()
    return planes


def _standardized(raw: np.ndarray, source: Source) -> np.ndarray:
    return (raw - np.float32(source.mean)) / np.float32(source.std)


def _augmented(
    raw: np.ndarray, source: Source, blurred: list[int], settings: Train, rng: np.random.Generator
) -> np.ndarray:
    """``raw`` standardized, the neighbors in ``blurred`` out of focus, with other gray values."""
    image = _standardized(raw, source)
    for i in blurred:
        image[i] = ndimage.gaussian_filter(image[i], 2.0)
    if "gray" in settings.augment:
        image = change_intensity(image, rng)
    return randomize_domain(image, rng) if "domain" in settings.augment else image


def _targets(labels: np.ndarray, contacts: np.ndarray, *distance: np.ndarray, settings: Train) -> np.ndarray:
    """Mask, contour, ``distance`` and weight, uint8; the weight is 0 on unlabeled voxels and where they hide a border."""
    missing = labels == UNLABELED
    mask, contour = mask_and_contour(np.where(missing, np.uint32(0), labels), settings.contour_width)
    mask[missing] = UNKNOWN
    weight = np.where(contacts, settings.contact_weight, 1) * ~near_unlabeled(missing, settings.contour_width)
    return np.stack([mask, contour | contacts, *distance, weight.astype(np.uint8)])


def _draw_position(source: Source, patch: int, rng: np.random.Generator) -> tuple[int, float, float]:
    """A patch's section and center: near an object or a contact for half of them, else anywhere, or near a scribble of
    background; moved inside."""
    plane = source.image.shape[1:]
    if len(source.object_positions) and rng.random() < OBJECT_SHARE:
        near_contact = len(source.contact_positions) and rng.random() < CONTACT_SHARE
        positions = source.contact_positions if near_contact else source.object_positions
        z, *center = _near(positions, patch, rng)
    elif source.background_positions is not None:
        z, *center = _near(source.background_positions, patch, rng)
    else:
        z = source.train_sections[rng.integers(len(source.train_sections))]
        center = [rng.uniform(0, n) for n in plane]
    return int(z), *_clamp_center(source, patch, center)


def _near(positions: np.ndarray, patch: int, rng: np.random.Generator) -> np.ndarray:
    """One of the positions (z, y, x), moved in its section by up to a third of a patch."""
    return positions[rng.integers(len(positions))] + [0, *rng.integers(-patch // 3, patch // 3 + 1, 2)]


def _clamp_center(source: Source, patch: int, center: Sequence[float]) -> tuple[float, float]:
    """``center`` (y, x) moved so that a patch around it lies in the section, as far as it fits."""
    plane = source.image.shape[1:]
    margins = [min(patch, n) / 2 for n in plane]
    y, x = (np.clip(c, m, n - m) for c, m, n in zip(center, margins, plane, strict=True))
    return float(y), float(x)
