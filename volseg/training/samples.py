"""Annotated volumes in memory, and random augmented patches from them, each a function of (seed, step, index)."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numba
import numpy as np
from scipy import ndimage

from volseg.box import Box
from volseg.config import Train, TrainData
from volseg.errors import UserError
from volseg.evaluation.synthetic import VOXEL_SIZE_NM, synth
from volseg.inference.normalization import normalization
from volseg.inference.tiles import MULTIPLE, PLANES
from volseg.io import volume
from volseg.training.targets import UNLABELED, contacts, distances, mask_and_contour, normalize_labels, parse_sections

KEPT_SPOTS = 200_000  # foreground positions remembered per volume
FOREGROUND = 0.5  # share of patches centered near an object
CONTACT = 0.4  # share of these centered near a contact of two objects, where there is one


@dataclass(frozen=True, eq=False)
class Source:
    """The sections in use of one annotated volume: image and instance labels (z, y, x), what teaches and what tests."""

    name: str
    image: np.ndarray
    labels: np.ndarray
    first: int  # where ``image[0]`` stands in the volume
    learn: tuple[int, ...]  # indices into ``image``
    held: tuple[int, ...]
    free: tuple[int, ...]  # sections whose labels, if there are any, were not read
    spots: np.ndarray  # (n, 3) positions in objects on the sections to learn from
    touching: np.ndarray  # bool (z, y, x): near where two objects touch
    meetings: np.ndarray  # (n, 3) positions of such voxels on the sections to learn from
    distance: np.ndarray | None  # uint8 (z, y, x), see `targets.distances`; None where no head learns it
    mean: float
    std: float
    share: float
    voxel_size_nm: tuple[float, float, float] | None
    checksum: str
    kind: str  # how the labels were read: "instances", or "mask" and how that was written
    depth: int  # sections of the whole volume
    turned: tuple[Source, ...] = ()  # what teaches, seen along other axes
    taken: tuple[int, ...] = ()  # sections of the volume named to learn from, but held out


def load_sources(knobs: Train) -> list[Source]:
    """Every volume of ``train.data``; raises :class:`UserError` for one that cannot be learnt from."""
    if not knobs.data:
        raise UserError("train.data is empty: add a [[train.data]] table with image and label")
    sources = [_named(data, knobs, f"train.data[{i}]") for i, data in enumerate(knobs.data)]
    if knobs.self_training:
        _check_self_training(sources, knobs)
    return sources


def _named(data: TrainData, knobs: Train, where: str) -> Source:
    """`_load`, whose refusals all say which table of the config they are about."""
    try:
        return _load(data, knobs, where)
    except UserError as error:
        raise (error if str(error).startswith(where) else UserError(f"{where}: {error}")) from None


def _check_self_training(sources: list[Source], knobs: Train) -> None:
    if not unlabeled_count(knobs):
        raise UserError(
            f"train.self_training = {knobs.self_training} of train.batch = {knobs.batch} leaves no whole patch; "
            "raise one of them, or set train.self_training = 0"
        )
    if not any(source.free for source in sources):
        raise UserError(
            f"train.self_training = {knobs.self_training}, but no section is left without annotation; "
            "name some in train.data.unlabeled_sections, or set train.self_training = 0"
        )


def _load(data: TrainData, knobs: Train, where: str) -> Source:
    """The source that ``data`` describes; reads the sections in use and those that they see on both sides."""
    around = knobs.sections // 2
    made = data.synth_seed is not None
    where = f"{where} ({f'synth {data.synth_seed}' if made else data.image})"
    depth = data.synth_shape[0] if made else volume.open(data.image).shape[0]
    held = parse_sections(data.validate_on, depth)
    named = parse_sections(data.train or (f"0:{depth}",), depth)
    learn = [z for z in named if z not in set(held)]
    if not learn:
        raise UserError(f"{where}: every section is held out; leave some to learn from")
    free = _free(data, learn, held, around, depth) if knobs.self_training else []
    used = learn + held + free
    first, stop = max(0, min(used) - around), min(depth, max(used) + 1 + around)
    annotated = np.isin(np.arange(first, stop), learn + held)
    found = (_synthesize if made else _read)(data, first, annotated)
    learn, held, free = (tuple(z - first for z in sections) for sections in (learn, held, free))
    spots = _spots(found["labels"], list(learn), where)
    size = found["voxel_size_nm"]  # where nobody says, sections may lie far apart
    touching = contacts(found["labels"], knobs.contour_width, size is not None and volume.isotropic(size))
    source = Source(
        first=first, learn=learn, held=held, free=free, spots=spots, share=data.share, depth=depth, touching=touching,
        taken=tuple(sorted(set(named) & set(held))) if data.train else (),
        meetings=_positions(np.flatnonzero(touching[list(learn)]), learn, touching.shape),
        distance=_distance(found["labels"], annotated, size, knobs, where), **found,
    )  # fmt: skip
    return replace(source, turned=tuple(_turned(source, plane, where) for plane in data.planes if plane != "xy"))


def _turned(source: Source, plane: str, where: str) -> Source:
    """The longest run of sections to learn from, by itself, with its sections along another axis."""
    size = source.voxel_size_nm
    if size is None or not volume.isotropic(size):
        told = "nobody says how large a voxel is" if size is None else f"voxels are {size} nm (z y x)"
        raise UserError(f"{where}: planes other than xy need voxels as long as wide, and {told}; set planes = ['xy']")
    run = max(np.split(z := np.array(source.learn), np.flatnonzero(np.diff(z) > 1) + 1), key=len)
    if len(run) < MULTIPLE:
        raise UserError(
            f"{where}: planes other than xy need {MULTIPLE} neighboring sections to learn from, and the longest run has "
            f"{len(run)}; annotate more in a row, or set planes = ['xy']"
        )

    def turn(voxels: np.ndarray | None) -> np.ndarray | None:
        return None if voxels is None else voxels[run[0] : run[-1] + 1].transpose(PLANES[plane])

    image, labels, touching = turn(source.image), turn(source.labels), turn(source.touching)
    learn = tuple(range(len(image)))
    return replace(
        source, image=image, labels=labels, touching=touching, distance=turn(source.distance), first=0, learn=learn,
        held=(), free=(), spots=_spots(labels, list(learn), where),
        meetings=_positions(np.flatnonzero(touching), learn, touching.shape),
    )  # fmt: skip


def _distance(
    labels: np.ndarray, annotated: np.ndarray, size: tuple[float, float, float] | None, knobs: Train, where: str
) -> np.ndarray | None:
    """What the distance head is to learn, each run of annotated sections by itself; None where there is no such head."""
    if not knobs.distance_nm:
        return None
    if size is None:
        raise UserError(f"{where}: train.distance_nm needs the size of a voxel; give voxel_size_nm in this table")
    out = np.zeros(labels.shape, np.uint8)
    for run in np.split(z := np.flatnonzero(annotated), np.flatnonzero(np.diff(z) > 1) + 1):
        out[run] = distances(labels[run], size, knobs.distance_nm)
    return out


def _free(data: TrainData, learn: list[int], held: list[int], around: int, depth: int) -> list[int]:
    """The sections for self-training: not annotated, and no held-out one among the ``around`` on both sides."""
    chosen = data.unlabeled_sections
    allowed = range(min(learn), max(learn)) if chosen is None else parse_sections(chosen, depth)
    near_held = {z + d for z in held for d in range(-around, around + 1)}
    return [z for z in allowed if z not in near_held and z not in set(learn)]


def _synthesize(data: TrainData, first: int, annotated: np.ndarray) -> dict:
    """Sections of a synthetic volume from ``first`` on, as fields of :class:`Source`; see :func:`_read`."""
    _, height, width = data.synth_shape
    image, labels = synth(Box((first, 0, 0), (first + len(annotated), height, width)), seed=data.synth_seed)
    labels[~annotated] = 0
    mean, std = normalization(image.shape, lambda box: image[box.slices])
    name = f"synth {data.synth_seed}"
    return {
        "name": name, "image": image, "labels": labels, "mean": mean, "std": std, "kind": "instances",
        "voxel_size_nm": data.voxel_size_nm or VOXEL_SIZE_NM, "checksum": _digest(image, labels),
    }  # fmt: skip


def _read(data: TrainData, first: int, annotated: np.ndarray) -> dict:
    """Sections of an annotated volume from ``first`` on, as fields of :class:`Source`.

    ``annotated`` says of each section whether its labels count; the others' are 0 whatever the file holds.
    """
    image, label = volume.open(data.image, voxel_size_nm=data.voxel_size_nm), volume.open(data.label)
    if image.shape != label.shape:
        raise UserError(
            f"image {data.image} has shape {image.shape} z y x, label {data.label} has {label.shape}; "
            "give labels of the image's shape"
        )
    box = Box((first, 0, 0), (first + len(annotated), *image.shape[1:]))
    voxels, stored = image.read(box), label.read(box) * annotated[:, None, None]
    labels, note = normalize_labels(stored, unlabeled=data.unlabeled)
    mean, std = normalization(image.shape, image.read)
    return {
        "name": data.image, "image": voxels, "labels": labels, "mean": mean, "std": std, "kind": _kind(note),
        "voxel_size_nm": image.voxel_size_nm, "checksum": _digest(voxels, stored),
    }  # fmt: skip


def _digest(*arrays: np.ndarray) -> str:
    """SHA-256 of the arrays' bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _kind(note: dict) -> str:
    """How labels were read, in words.

    >>> _kind({"kind": "mask", "values": {1: 3, 255: 17}})
    'mask: 1 in 3 sections, 255 in 17'
    """
    values = list(note.get("values", {}).items())
    if not values:
        return note["kind"]
    (value, count), *more = values
    return ", ".join([f"mask: {value} in {count} sections", *(f"{v} in {n}" for v, n in more)])


def _spots(labels: np.ndarray, learn: list[int], where: str) -> np.ndarray:
    """Up to :data:`KEPT_SPOTS` positions in objects, evenly spread; refuses labels with one class alone."""
    chosen = labels[learn]
    inside = (chosen != 0) & (chosen != UNLABELED)
    found = np.flatnonzero(inside)
    if not found.size:
        raise UserError(f"{where}: no labeled voxel on the {len(learn)} sections to learn from; check label and train")
    if found.size == np.count_nonzero(chosen != UNLABELED):
        raise UserError(f"{where}: every annotated voxel is in an object; give labels with background 0")
    return _positions(found, learn, labels.shape)


def _positions(found: np.ndarray, learn: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Up to :data:`KEPT_SPOTS` (z, y, x) of flat positions within the sections ``learn`` of a volume, evenly spread."""
    found = found[:: max(1, -(-found.size // KEPT_SPOTS))]
    z, y, x = np.unravel_index(found, (len(learn), *shape[1:]))
    return np.stack([np.asarray(learn)[z], y, x], axis=1).astype(np.int32)


def context(z: int, sections: int, depth: int) -> np.ndarray:
    """The section numbers seen as channels around ``z``, clamped to the volume.

    >>> context(0, 3, 9).tolist()
    [0, 0, 1]
    """
    return np.clip(np.arange(z - sections // 2, z + sections // 2 + 1), 0, depth - 1)


def batch(sources: list[Source], knobs: Train, step: int, part: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, sections, P, P) float32 and targets (B, heads + 1, P, P) uint8: mask, contour, perhaps distance (255
    for ``distance_nm``), and how much the loss counts: 0 where nobody annotated, ``contact_weight`` where objects touch,
    else 1.

    Depends on the knobs and ``step`` alone, so that a resumed run sees what an uninterrupted one would have. ``part`` of
    the batch is made.
    """
    numbers = range(knobs.batch)[part]
    pairs = [sample(sources, knobs, np.random.default_rng((knobs.seed, step, i))) for i in numbers]
    images, targets = zip(*pairs, strict=True)
    return np.stack(images), np.stack(targets)


def unlabeled_count(knobs: Train) -> int:
    """How many patches of a batch self-training takes from sections that nobody annotated; at least one is annotated."""
    return min(knobs.batch - 1, round(knobs.self_training * knobs.batch))


def unlabeled(
    sources: list[Source], knobs: Train, step: int, part: slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """Patches of sections that nobody annotated, twice: as they are, and changed in gray values and neighbors.

    Both (:func:`unlabeled_count`, sections, P, P) float32, turned and bent alike; functions of the knobs and ``step``.
    They may take the last places in ``part`` of a batch.
    """
    numbers = [i for i in range(knobs.batch)[part] if i >= knobs.batch - unlabeled_count(knobs)]
    seeds = [(knobs.seed, step, knobs.batch + i) for i in numbers]
    pairs = [unlabeled_sample(sources, knobs, np.random.default_rng(seed)) for seed in seeds]
    both = np.array(pairs, np.float32).reshape(len(pairs), 2, knobs.sections, knobs.patch, knobs.patch)
    return both[:, 0], both[:, 1]


def mixed(sources: list[Source], knobs: Train, step: int, part: slice = slice(None)) -> tuple[np.ndarray, ...]:
    """What :func:`batch` gives, then what :func:`unlabeled` gives."""
    return *batch(sources, knobs, step, part), *unlabeled(sources, knobs, step, part)


def batches(
    sources: list[Source], knobs: Train, first: int, stop: int, make: Callable = batch, part: slice = slice(None)
) -> Generator[tuple[np.ndarray, ...]]:
    """What ``make`` gives for steps ``first`` to ``stop`` in order, the next ones made by threads on the other cores."""
    threads = max(1, min(8, (os.cpu_count() or 1) - 1))
    with ThreadPoolExecutor(threads) as pool:
        ahead = deque(
            pool.submit(make, sources, knobs, step, part) for step in range(first, min(first + threads + 1, stop))
        )
        try:
            for step in range(first, stop):
                if step + threads + 1 < stop:
                    ahead.append(pool.submit(make, sources, knobs, step + threads + 1, part))
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def sample(sources: list[Source], knobs: Train, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One augmented patch: (sections, P, P) float32 and (heads + 1, P, P) uint8 as in :func:`batch`."""
    source = _draw(sources, rng)
    if source.turned:
        source = (source, *source.turned)[rng.integers(1 + len(source.turned))]
    z, y, x = _position(source, knobs.patch, rng)
    planes = context(z, knobs.sections, len(source.image))
    if "flip" in knobs.augment and rng.random() < 0.5:
        planes = planes[::-1].copy()
    planes, offsets, blurred = _disturb_neighbors(planes, knobs, rng)
    ys, xs = _grid(knobs, rng)
    raw = _resample(source.image, planes, ys + y, xs + x, offsets)
    known = [volume for volume in (source.labels, source.touching, source.distance) if volume is not None]
    return _changed(raw, source, blurred, knobs, rng), _targets(
        *(_nearest(v[z], ys + y, xs + x) for v in known), knobs=knobs
    )


def unlabeled_sample(sources: list[Source], knobs: Train, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One patch of a section that nobody annotated, as it is and changed, as in :func:`unlabeled`."""
    source = _draw([source for source in sources if source.free], rng)
    z = source.free[rng.integers(len(source.free))]
    y, x = _inside(source, knobs.patch, [rng.uniform(0, n) for n in source.image.shape[1:]])
    planes = context(z, knobs.sections, len(source.image))
    if "flip" in knobs.augment and rng.random() < 0.5:
        planes = planes[::-1].copy()
    ys, xs = _grid(knobs, rng)
    clean = _resample(source.image, planes, ys + y, xs + x, np.zeros((len(planes), 2), np.float32))
    planes, offsets, blurred = _disturb_neighbors(planes.copy(), knobs, rng)
    raw = _resample(source.image, planes, ys + y, xs + x, offsets)
    return (clean - np.float32(source.mean)) / np.float32(source.std), _changed(raw, source, blurred, knobs, rng)


def _draw(sources: list[Source], rng: np.random.Generator) -> Source:
    """One of the sources, each as often as its share says."""
    shares = np.array([source.share for source in sources])
    return sources[rng.choice(len(sources), p=shares / shares.sum())]


def _changed(raw: np.ndarray, source: Source, blurred: list[int], knobs: Train, rng: np.random.Generator) -> np.ndarray:
    """``raw`` standardized, the neighbors in ``blurred`` out of focus, with other gray values."""
    image = (raw - np.float32(source.mean)) / np.float32(source.std)
    for i in blurred:
        image[i] = ndimage.gaussian_filter(image[i], 2.0)
    return _intensity(image, rng) if "gray" in knobs.augment else image


def _targets(labels: np.ndarray, touching: np.ndarray, *distance: np.ndarray, knobs: Train) -> np.ndarray:
    """Mask, contour, ``distance`` and weight, uint8; the weight is 0 on unlabeled voxels and where they hide a border."""
    missing = labels == UNLABELED
    mask, contour = mask_and_contour(np.where(missing, np.uint32(0), labels), knobs.contour_width)
    if missing.any() and knobs.contour_width:
        missing = ndimage.binary_dilation(missing, iterations=knobs.contour_width)
    weight = np.where(touching, knobs.contact_weight, 1) * ~missing
    return np.stack([mask, contour | touching, *distance, weight.astype(np.uint8)])


def _position(source: Source, patch: int, rng: np.random.Generator) -> tuple[int, float, float]:
    """A patch's section and center: near an object or a contact for half of them, else anywhere; moved inside."""
    plane = source.image.shape[1:]
    if rng.random() < FOREGROUND:
        spots = source.meetings if len(source.meetings) and rng.random() < CONTACT else source.spots
        z, *center = spots[rng.integers(len(spots))] + [0, *rng.integers(-patch // 3, patch // 3 + 1, 2)]
    else:
        z, center = source.learn[rng.integers(len(source.learn))], [rng.uniform(0, n) for n in plane]
    return int(z), *_inside(source, patch, center)


def _inside(source: Source, patch: int, center: Sequence[float]) -> tuple[float, float]:
    """``center`` (y, x) moved so that a patch around it lies in the section, as far as it fits."""
    plane = source.image.shape[1:]
    margins = [min(patch, n) / 2 for n in plane]
    y, x = (np.clip(c, m, n - m) for c, m, n in zip(center, margins, plane, strict=True))
    return float(y), float(x)


def _disturb_neighbors(
    planes: np.ndarray, knobs: Train, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Sections to read, their shifts (y, x), and which to blur: some neighbors are lost, moved or out of focus."""
    middle = len(planes) // 2
    offsets, blurred = np.zeros((len(planes), 2), np.float32), []
    for i in range(len(planes)):
        event = rng.random()
        if i == middle or event > 0.2 or "neighbors" not in knobs.augment:
            continue
        if event < 0.08:
            planes[i] = planes[middle]
        elif event < 0.16:
            offsets[i] = rng.normal(0, 3, 2)
        else:
            blurred.append(i)
    return planes, offsets, blurred


def _grid(knobs: Train, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions (y, x) to read relative to the center: flip, quarter turns, small turn, scale and bend in one map."""
    patch, on = knobs.patch, knobs.augment
    axis = np.arange(patch, dtype=np.float32) - (patch - 1) / 2
    flip, turns = (rng.choice([-1.0, 1.0]), rng.integers(4)) if "flip" in on else (1.0, 0)
    angle = turns * np.pi / 2 + (rng.uniform(-0.4, 0.4) if "affine" in on and rng.random() < 0.3 else 0.0)
    scale = np.exp(rng.uniform(-0.25, 0.25)) if "affine" in on and rng.random() < 0.3 else 1.0
    bent = "elastic" in on and rng.random() < 0.3
    bend = rng.normal(0, rng.uniform(0, 6), (2, 5, 5)) if bent else np.zeros((2, 5, 5))
    cos, sin = np.float32(scale * np.cos(angle)), np.float32(scale * np.sin(angle))
    blend = _spline(patch)
    dy, dx = (blend @ knots.astype(np.float32) @ blend.T for knots in bend)
    y, x = axis[:, None] + dy, np.float32(flip) * axis[None, :] + dx
    return cos * y - sin * x - np.float32(0.5), sin * y + cos * x - np.float32(0.5)


def _spline(patch: int, knots: int = 5) -> np.ndarray:
    """(patch, knots) weights of a smooth curve through evenly spread knots (raised cosines, rows sum to 1)."""
    at = np.linspace(0, knots - 1, patch, dtype=np.float32)[:, None] - np.arange(knots, dtype=np.float32)
    return np.where(np.abs(at) < 1, 0.5 + 0.5 * np.cos(np.pi * at), 0).astype(np.float32)


def _intensity(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Standardized ``image`` with other contrast, brightness, gamma, focus and noise."""
    if rng.random() < 0.3:
        low, span = image.min(), max(float(np.ptp(image)), 1e-3)
        image = ((image - low) / span) ** np.float32(np.exp(rng.uniform(-0.35, 0.35))) * np.float32(span) + low
    if rng.random() < 0.2:
        image = ndimage.gaussian_filter(image, (0, *[rng.uniform(0.4, 1.3)] * 2))
    image = image * np.float32(np.exp(rng.uniform(-0.25, 0.25))) + np.float32(rng.normal(0, 0.2))
    if rng.random() < 0.3:
        image = image + np.float32(rng.uniform(0, 0.3)) * rng.standard_normal(image.shape, np.float32)
    return image.astype(np.float32, copy=False)


@numba.njit(nogil=True, cache=True)
def _mirror(index, size):
    """``index`` reflected into 0..size-1."""
    period = 2 * size - 2
    if period <= 0:
        return 0
    index = abs(index) % period
    return index if index < size else period - index


@numba.njit(nogil=True, cache=True)
def _resample(image, planes, ys, xs, offsets):
    """(planes, P, Q) float32 read from ``image`` (z, y, x) at real positions, linear in the plane, mirrored outside."""
    _, height, width = image.shape
    out = np.empty((len(planes), *ys.shape), np.float32)
    for c in range(len(planes)):
        plane = image[planes[c]]
        for i in range(ys.shape[0]):
            for j in range(ys.shape[1]):
                y, x = ys[i, j] + offsets[c, 0], xs[i, j] + offsets[c, 1]
                y0, x0 = int(np.floor(y)), int(np.floor(x))
                fy, fx = np.float32(y - y0), np.float32(x - x0)
                ya, yb = _mirror(y0, height), _mirror(y0 + 1, height)
                xa, xb = _mirror(x0, width), _mirror(x0 + 1, width)
                top = plane[ya, xa] * (1 - fx) + plane[ya, xb] * fx
                low = plane[yb, xa] * (1 - fx) + plane[yb, xb] * fx
                out[c, i, j] = top * (1 - fy) + low * fy
    return out


@numba.njit(nogil=True, cache=True)
def _nearest(plane, ys, xs):
    """(P, Q) values of ``plane`` (y, x) at the voxels nearest to real positions, mirrored outside."""
    out = np.empty(ys.shape, plane.dtype)
    for i in range(ys.shape[0]):
        for j in range(ys.shape[1]):
            y, x = int(np.floor(ys[i, j] + 0.5)), int(np.floor(xs[i, j] + 0.5))
            out[i, j] = plane[_mirror(y, plane.shape[0]), _mirror(x, plane.shape[1])]
    return out
