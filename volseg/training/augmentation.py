"""Random changes of patches: where voxels are read, which neighboring sections are disturbed, and gray values."""

from __future__ import annotations

import numba
import numpy as np
from scipy import ndimage

from volseg.config import Train

DOMAIN_SHARE = 0.35  # share of patches that "domain" makes look like those of another microscope
MAX_DOMAIN_SCALE = 2.0  # it reads voxels up to that much smaller or larger


def disturb_neighbors(
    planes: np.ndarray, settings: Train, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Lose, move or blur some of the neighboring sections, as happens where sections are cut and imaged.

    Parameters
    ----------
    planes
        Numbers of the sections that a patch sees; changed in place where one is lost. The middle one stays as it is.
    settings
        The ``[train]`` table of a config; nothing is disturbed without "neighbors" in ``augment``.
    rng
        Source of the random numbers.

    Returns
    -------
    planes, offsets, blurred
        Sections to read; their shifts y, x in voxels, float32 (sections, 2); indices of those to blur.
    """
    middle = len(planes) // 2
    offsets, blurred = np.zeros((len(planes), 2), np.float32), []
    for i in range(len(planes)):
        event = rng.random()
        if i == middle or event > 0.2 or "neighbors" not in settings.augment:
            continue
        if event < 0.08:
            planes[i] = planes[middle]
        elif event < 0.16:
            offsets[i] = rng.normal(0, 3, 2)
        else:
            blurred.append(i)
    if "domain" in settings.augment and rng.random() < DOMAIN_SHARE:  # all sections jitter, as where they are thick
        jitter = rng.normal(0, rng.uniform(0, 4), (len(planes), 2)).astype(np.float32)
        jitter[middle] = 0
        offsets += jitter
    return planes, offsets, blurred


def sampling_grid(settings: Train, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return where a patch reads its voxels: flip, quarter turns, rotation, scale and elastic bend in one map.

    Returns
    -------
    y, x
        float32 (P, P), voxels from the center of the patch.
    """
    patch, augment = settings.patch, settings.augment
    axis = np.arange(patch, dtype=np.float32) - (patch - 1) / 2
    flip, quarter_turns = (rng.choice([-1.0, 1.0]), rng.integers(4)) if "flip" in augment else (1.0, 0)
    rotation = rng.uniform(-0.4, 0.4) if "affine" in augment and rng.random() < 0.3 else 0.0
    angle = quarter_turns * np.pi / 2 + rotation
    scale = np.exp(rng.uniform(-0.25, 0.25)) if "affine" in augment and rng.random() < 0.3 else 1.0
    if "domain" in augment and rng.random() < DOMAIN_SHARE:
        scale *= MAX_DOMAIN_SCALE ** rng.uniform(-1, 1)
    elastic = "elastic" in augment and rng.random() < 0.3
    knots = rng.normal(0, rng.uniform(0, 6), (2, 5, 5)) if elastic else np.zeros((2, 5, 5))
    cos, sin = np.float32(scale * np.cos(angle)), np.float32(scale * np.sin(angle))
    basis = _interpolation_weights(patch)
    dy, dx = (basis @ shifts.astype(np.float32) @ basis.T for shifts in knots)
    y, x = axis[:, None] + dy, np.float32(flip) * axis[None, :] + dx
    return cos * y - sin * x - np.float32(0.5), sin * y + cos * x - np.float32(0.5)


def _interpolation_weights(patch: int, knots: int = 5) -> np.ndarray:
    """(patch, knots) weights of a smooth curve through evenly spread knots (raised cosines, rows sum to 1)."""
    distance = np.linspace(0, knots - 1, patch, dtype=np.float32)[:, None] - np.arange(knots, dtype=np.float32)
    return np.where(np.abs(distance) < 1, 0.5 + 0.5 * np.cos(np.pi * distance), 0).astype(np.float32)


def change_intensity(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a standardized ``image`` float32 (sections, P, P) with other gamma, focus, contrast, brightness and noise."""
    if rng.random() < 0.3:
        low, span = image.min(), max(float(np.ptp(image)), 1e-3)
        image = ((image - low) / span) ** np.float32(np.exp(rng.uniform(-0.35, 0.35))) * np.float32(span) + low
    if rng.random() < 0.2:
        image = ndimage.gaussian_filter(image, (0, *[rng.uniform(0.4, 1.3)] * 2))
    image = image * np.float32(np.exp(rng.uniform(-0.25, 0.25))) + np.float32(rng.normal(0, 0.2))
    if rng.random() < 0.3:
        image = image + np.float32(rng.uniform(0, 0.3)) * rng.standard_normal(image.shape, np.float32)
    return image.astype(np.float32, copy=False)


def randomize_domain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a standardized ``image`` float32 (sections, P, P) as another microscope or staining might show it.

    `DOMAIN_SHARE` of all patches change: gamma, focus, contrast, charging (a smooth field that is added), uneven staining (one
    that multiplies), brightness and noise, each far more than in `change_intensity`. After Tobin et al., "Domain
    randomization", IROS 2017, arXiv:1703.06907.
    """
    if rng.random() >= DOMAIN_SHARE:
        return image
    if rng.random() < 0.5:
        low, span = image.min(), max(float(np.ptp(image)), 1e-3)
        image = ((image - low) / span) ** np.float32(np.exp(rng.uniform(-0.8, 0.8))) * np.float32(span) + low
        image = (image - image.mean()) / max(float(image.std()), 1e-3)
    if rng.random() < 0.4:
        image = ndimage.gaussian_filter(image, (0, *[rng.uniform(0.5, 2.5)] * 2))
    basis = _interpolation_weights(image.shape[-1], 4)
    charging, staining = (
        basis @ rng.normal(0, rng.uniform(0, most), (4, 4)).astype(np.float32) @ basis.T for most in (0.5, 0.3)
    )
    contrast = np.exp(staining + np.float32(rng.uniform(-0.6, 0.6)))
    image = image * contrast + charging + np.float32(rng.normal(0, 0.4))
    if rng.random() < 0.5:
        image = image + np.float32(rng.uniform(0, 0.7)) * rng.standard_normal(image.shape, np.float32)
    return image.astype(np.float32, copy=False)


@numba.njit(nogil=True, cache=True)
def _reflect(index, size):
    """``index`` reflected into 0..size-1."""
    period = 2 * size - 2
    if period <= 0:
        return 0
    index = abs(index) % period
    return index if index < size else period - index


@numba.njit(nogil=True, cache=True)
def resample_linear(image, planes, ys, xs, offsets):
    """Return gray values at real positions, linear in the plane, reflected outside.

    ``image`` is (z, y, x), ``planes`` are the sections to read, ``ys`` and ``xs`` (P, Q) the positions, ``offsets``
    (planes, 2) what is added to them on each section. The result is float32 (planes, P, Q).
    """
    _, height, width = image.shape
    out = np.empty((len(planes), *ys.shape), np.float32)
    for c in range(len(planes)):
        plane = image[planes[c]]
        for i in range(ys.shape[0]):
            for j in range(ys.shape[1]):
                y, x = ys[i, j] + offsets[c, 0], xs[i, j] + offsets[c, 1]
                y0, x0 = int(np.floor(y)), int(np.floor(x))
                fy, fx = np.float32(y - y0), np.float32(x - x0)
                ya, yb = _reflect(y0, height), _reflect(y0 + 1, height)
                xa, xb = _reflect(x0, width), _reflect(x0 + 1, width)
                top = plane[ya, xa] * (1 - fx) + plane[ya, xb] * fx
                low = plane[yb, xa] * (1 - fx) + plane[yb, xb] * fx
                out[c, i, j] = top * (1 - fy) + low * fy
    return out


@numba.njit(nogil=True, cache=True)
def resample_nearest(plane, ys, xs):
    """Return values (P, Q) of ``plane`` (y, x) at the voxels nearest to real positions (P, Q), reflected outside."""
    out = np.empty(ys.shape, plane.dtype)
    for i in range(ys.shape[0]):
        for j in range(ys.shape[1]):
            y, x = int(np.floor(ys[i, j] + 0.5)), int(np.floor(xs[i, j] + 0.5))
            out[i, j] = plane[_reflect(y, plane.shape[0]), _reflect(x, plane.shape[1])]
    return out
