"""One page about labels held against the truth: scores, every object that is wrong with its picture, and where voxels are."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Callable

import numpy as np
from scipy.ndimage import distance_transform_edt

from volseg.box import Box, Triple
from volseg.errors import UserError
from volseg.evaluation import page
from volseg.evaluation.object_scores import VERDICTS, ObjectScore
from volseg.evaluation.voxel_scores import NEAR_VOXELS, BorderScores, Reliability
from volseg.io import files
from volseg.io.pictures import grayscale, label_overlay

PICTURED = 40  # objects, the worst first
LISTED = 500
WINDOW = 192  # voxels, edge of a picture
ZOOM = 1.5
MEANINGS = {
    "missed": "no predicted object holds a tenth of it",
    "spurious": "no true object holds a tenth of it",
    "split": "several predicted objects hold more than a tenth of it each",
    "merged": "a predicted object holds more than a tenth of it and of another",
    "inexact": "found, and its IoU is not above the threshold",
    "matched": "its IoU is above the threshold, and it is neither merged nor split",
}

Read = Callable[[Box], np.ndarray]


def write_page(
    out: str, title: str, scores: str, objects: tuple[ObjectScore, ...], borders: BorderScores,
    reliability: Reliability | None, reads: tuple[Read | None, Read, Read], shape: Triple,
) -> None:  # fmt: skip
    """The page, at ``out``.

    Parameters
    ----------
    out
        A local file.
    title, scores
        What is compared, and all scores, as plain text.
    objects, borders, reliability
        What was found; ``reliability`` where there are probabilities.
    reads
        How to read a box of the image, if there is one, of the truth and of what was predicted.
    shape
        Of these.

    Raises
    ------
    UserError
        It cannot be written.
    """
    counts = Counter(each.verdict for each in objects)
    kinds = [(name, counts[name], MEANINGS[name]) for name in VERDICTS]
    wrong = [each for each in objects if each.verdict != "matched"]
    body = [
        f"<h1>{html.escape(title)}</h1>",
        page.table(("", "objects", ""), kinds),
        page.section("Where voxels are wrong", _borders(borders)),
        page.section("How sure, and how often right", _reliability(reliability) if reliability else ""),
        page.section("Objects that are wrong", _pictures(wrong[:PICTURED], reads, shape)),
        page.section("Objects", _listed(objects)),
        page.section("Scores", f"<pre>{html.escape(scores)}</pre>"),
    ]
    try:
        files.write_atomic(out, page.whole(html.escape(title), "".join(body)).encode())
    except OSError as error:
        raise UserError(f"cannot write {os.fspath(out)}: {error.strerror or error}; give another --report") from None


def _borders(borders: BorderScores) -> str:
    rows = [(f"IoU within {NEAR_VOXELS} voxels of a true border", borders.near_iou), ("IoU beyond", borders.beyond_iou),
            ("share of wrong voxels that are near", borders.wrong_near)]  # fmt: skip
    return page.table(("", ""), rows)


def _reliability(reliability: Reliability) -> str:
    """Of voxels with about one probability, the share in true objects: on the diagonal where the network knows itself."""
    edge, left = 260, 44
    points = [
        (left + edge * p, 10 + edge * (1 - t), p, t, n)
        for p, t, n in zip(reliability.probability, reliability.true_share, reliability.voxels, strict=True)
    ]
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{page.COLORS[0]}"><title>{p:.2f}: {t:.2f} of {n:,} voxels</title>'
        "</circle>" for x, y, p, t, n in points
    )  # fmt: skip
    line = "".join(f"{'ML'[i > 0]}{x:.1f} {y:.1f}" for i, (x, y, *_) in enumerate(points))
    ticks = "".join(
        f'<text x="{left + edge * k / 4:.0f}" y="{edge + 28}" text-anchor="middle">{k / 4:g}</text>'
        f'<text x="{left - 8}" y="{14 + edge * (1 - k / 4):.0f}" text-anchor="end">{k / 4:g}</text>' for k in range(5)
    )  # fmt: skip
    return (
        f'<svg viewBox="0 0 {left + edge + 20} {edge + 50}" width="{left + edge + 20}" role="img" aria-label="reliability">'
        f'<path class=axis d="M{left} {10 + edge}L{left + edge} 10"/><path class=axis fill="none" '
        f'd="M{left} 10V{10 + edge}H{left + edge}"/><path d="{line}" fill="none" stroke="{page.COLORS[0]}"/>{marks}{ticks}'
        f'<text x="{left + edge / 2}" y="{edge + 46}" text-anchor="middle">probability of the mask</text></svg>'
        f"<p>Upwards: share of these voxels that lie in a true object. Expected calibration error {reliability.error:.3f}.</p>"
    )


def _listed(objects: tuple[ObjectScore, ...]) -> str:
    columns = ("verdict", "truth", "predicted", "others", "voxels", "IoU", "middle of its box, x, y, z", "box, z y x")
    rows = [
        (each.verdict, each.truth or "", each.pred or "", " ".join(map(str, each.others)), each.voxels, round(each.iou, 3),
         ", ".join(str((a + b) // 2) for a, b in zip(each.box.start[::-1], each.box.stop[::-1], strict=True)), str(each.box))
        for each in objects[:LISTED] if each.box
    ]  # fmt: skip
    more = f"<p>{len(objects) - LISTED} more are not listed.</p>" if len(objects) > LISTED else ""
    return page.table(columns, rows) + more


# ---------------------------------------------------------------- pictures


def _pictures(objects: list[ObjectScore], reads: tuple[Read | None, Read, Read], shape: Triple) -> str:
    if not objects:
        return "<p>None.</p>"
    body = "<p>The image, the truth, and what was predicted. The numbers x, y, z are those that Neuroglancer takes.</p>"
    for each in objects:
        place = inner_voxel(each, reads[1] if each.truth else reads[2])
        rgb = _panels(place, reads, shape)
        others = f" and {' '.join(map(str, each.others))}" if each.others else ""
        ids = f"truth {each.truth or '-'}, predicted {each.pred or '-'}{others}"
        where = ", ".join(map(str, place[::-1]))
        body += f"<h3>{each.verdict}: {ids}; {each.voxels:,} voxels, IoU {each.iou:.2f}, at {where}</h3>"
        body += page.picture(rgb, f"{each.verdict} object at {where}")
    return body


def inner_voxel(score: ObjectScore, read: Read) -> Triple:
    """A voxel (z, y, x) well inside the object, in the section in the middle of its box or the next that has some of it."""
    assert score.box is not None
    (z0, y0, x0), (z1, y1, x1) = score.box.start, score.box.stop
    name = score.truth or score.pred
    for z in sorted(range(z0, z1), key=lambda z: abs(2 * z + 1 - z0 - z1)):
        inside = read(Box((z, y0, x0), (z + 1, y1, x1)))[0] == name
        if inside.any():
            y, x = np.unravel_index(np.argmax(distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]), inside.shape)
            return z, y0 + int(y), x0 + int(x)
    return z0, y0, x0


def _panels(place: Triple, reads: tuple[Read | None, Read, Read], shape: Triple) -> np.ndarray:
    """RGB of the window around a voxel: the image, and the true and predicted objects over it."""
    z, *middle = place
    size = [min(WINDOW, n) for n in shape[1:]]
    y, x = (int(np.clip(a - s // 2, 0, n - s)) for a, s, n in zip(middle, size, shape[1:], strict=True))
    box = Box((z, y, x), (z + 1, y + size[0], x + size[1]))
    read_image, *read_labels = reads
    image = grayscale(read_image(box)[0]) if read_image else np.full(size, 40, np.uint8)
    panels = [np.repeat(image[..., None], 3, axis=-1), *(label_overlay(image, read(box)[0]) for read in read_labels)]
    marked = [np.pad(panel, [(0, 0), (0, 4), (0, 0)], constant_values=255).astype(np.uint8) for panel in panels]
    whole = np.concatenate(marked, axis=1)
    rows, columns = (np.arange(int(n * ZOOM)) * 1 / ZOOM for n in whole.shape[:2])
    return whole[rows.astype(int)][:, columns.astype(int)]
