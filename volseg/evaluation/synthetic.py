"""Synthetic FIB-SEM of neural tissue at 5 nm with exact instance labels: an endless field, read at any coordinates.

How the field is made, from the outside in:

1. Space is warped by smooth noise. All but vesicles and grain is drawn in warped space: straight things come out bent.
2. The Voronoi *cells* of a jittered lattice are bundles of neurites. Each has its own frame: axis u, across it v and w.
3. In that frame a second, elongated jittered lattice of *sites* divides the bundle: Voronoi walls are the membranes.
4. A site may own a mitochondrion, or a pair in contact: bent tubes that lie wholly inside the walls of site and cell,
   so that no two sites' objects meet. A pair is divided where the distances from its two axes are equal. Each part then
   holds, with every point, the way from there to its axis: objects are connected.
5. Vesicles, reticulum, texture and shot noise are drawn on top.

Why any box gives the same bytes: all randomness is an integer hash of lattice coordinates; a voxel is computed from its
own coordinates in one order of operations; what voxels share (the candidates around them) belongs to *bricks* aligned
to the whole space; and only + - * / sqrt floor are used, without libm or fastmath, so that IEEE 754 fixes every bit.

Lengths are in voxels, gray in levels of 0 to 255. All kernels stand in this one file: numba's cache of one does not notice
changes of another file.
"""

from __future__ import annotations

from math import floor, sqrt
from typing import NamedTuple

import numba as nb
import numpy as np

from volseg.box import Box

BRICK = 8  # edge; noise is linear between brick corners
CELL = 320.0  # spacing of the lattice of cells
WARPS = ((192, 80.0), (56, 16.0), (20, 2.5))  # spacing and greatest amplitude of the warp's octaves
REACH = 100.0  # no warp is longer along an axis
SMOOTH = (40, 22, 30, 56)  # spacing of the fields of shade, reticulum, reticulum's extent, and vesicle clusters
FIELDS = 3 + len(SMOOTH)
GRAINS = ((4, 20.0), (9, 24.0))  # spacing and gray of the texture's octaves
SHOT = 8.5 / 37837.0  # gray of the noise over the deviation of `_white_row`
ROUND = 14.0  # two walls that differ in distance by less than this meet in a rounded corner
VOXEL_SIZE_NM = (5.0, 5.0, 5.0)
MARGIN = 6.0  # between a mitochondrion and the middle of the walls around it
SLACK = 16.0  # between a mitochondrion and the lattice planes beyond which bricks do not look for its site
SLIMMEST = 13.0  # no mitochondrion has a lesser radius
OWNERS = (1, 3, 3)  # sites further than this from their cell's seed, along u v w in lattice steps, own nothing
TABLE = 3 * 7 * 7  # sites within that
MAX_CANDIDATES = 27  # candidates in a list, at most
UNKNOWN, EMPTY, OWNER = 0, 1, 2
SINGLE, END_TO_END, SIDE_BY_SIDE = 0, 1, 2

# The numbers by which a key's draws are told apart. np.int64, as numba would compile a variant for each literal.
FIELD_KEY, CELL_KEY, VESICLE_KEY, GRAIN_KEY, WHITE_KEY = (np.int64(n) for n in (1, 2, 3, 4, 5))
WARP, LEVEL = np.int64(10), np.int64(30)
Z, Y, X, RADIUS = (np.int64(n) for n in (1, 2, 3, 4))
ACROSS, STRETCH, SHADE, CROWD, AXIS = (np.int64(n) for n in (4, 5, 7, 8, 20))
OWNS, STYLE, LENGTH, WIDTH, TILT, BEND = (np.int64(n) for n in (30, 31, 36, 37, 40, 43))
CONTACT, SIDE, TAPER, TURN, FACING, PITCH, LAMELLAE, MATRIX, CONTRAST = (
    np.int64(n) for n in (50, 51, 52, 53, 54, 55, 57, 58, 59)
)
SEARCH = np.int64(100)
ZERO, ONE, TWO = (np.int64(n) for n in (0, 1, 2))

CELLS = np.dtype(
    [
        ("index", "i8", 3),
        ("seed", "f8", 3),
        ("frame", "f8", (3, 3)),
        ("step", "f8", 3),
        ("stretch", "f8"),
        ("key", "u8"),
    ]
)
TUBE = np.dtype([("points", "f8", (3, 3)), ("radius", "f8"), ("taper", "f8")])
SITES = np.dtype(
    [
        ("state", "i8"),  # UNKNOWN until a brick asks
        ("label", "u4"),  # of the first object
        ("count", "i8"),
        ("tubes", TUBE, 2),
        ("lamella", "f8", 3),  # across the cristae, per period
        ("matrix", "f8"),
        ("contrast", "f8"),
    ]
)
CANDIDATE = np.dtype(  # a candidate: squared distance, position, a neurite's looks, lattice position
    [(name, "f8") for name in ("distance", "a", "b", "c", "shade", "crowd")] + [(name, "i8") for name in "ijk"]
)
BRICKS = np.dtype(  # what a brick's voxels share
    [
        ("place", "i8", 3),  # in the world's nodes
        ("origin", "i8", 3),
        (
            "candidates",
            CANDIDATE,
            (1 + MAX_CANDIDATES, MAX_CANDIDATES),
        ),  # list 0: cells, i the row in their table; list 1 + n: sites of the n-th
        ("counts", "i8", 1 + MAX_CANDIDATES),
        ("slopes", "f8", (1 + MAX_CANDIDATES, MAX_CANDIDATES, MAX_CANDIDATES)),
        ("owners", "i8", (MAX_CANDIDATES, MAX_CANDIDATES)),  # rows of the n-th cell's sites
        ("owner_counts", "i8", MAX_CANDIDATES),
        ("vesicles", "f8", (64, 4)),
        ("vesicle_count", "i8"),  # -1: not yet listed
    ]
)

inner = nb.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)  # called from compiled code only
outer = nb.njit(error_model="numpy", nogil=True, cache=True)


class World(NamedTuple):
    """What a box shares: noise at brick corners (field z y x), tables of cells and of their sites, settled on demand."""

    nodes: np.ndarray
    grid: np.ndarray  # lattice position of the first cell
    spans: np.ndarray  # cells along z y x
    cells: np.ndarray
    sites: np.ndarray  # (cell, site)
    cell_key: np.uint64
    vesicle_key: np.uint64


def synth(box: Box, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A box of a synthetic volume, and its exact labels.

    A voxel depends on its coordinates and the seed alone: a box cut out of a bigger one has the same bytes.

    A label is its object's own number in the whole field: 7 bits of the z and 8 bits each of the y and x position of
    the cell in its lattice (spacing 320 voxels), 8 bits for the site in the cell and 1 for the part of a pair. Two
    objects share a number only if their cells lie a multiple of 128 lattice steps apart along z and of 256 along y and
    x, so labels are unique in any box up to 39,000 voxels deep and 80,000 high and wide. 0 is background.

    Parameters
    ----------
    box
        Which voxels, z y x; coordinates may be negative, and as large as a few millions.
    seed
        Which volume.

    Returns
    -------
    image
        uint8, of shape ``box.shape``.
    labels
        uint32, of the same shape.

    Examples
    --------
    >>> image, labels = synth(Box((0, 0, 0), (1, 2, 3)), seed=1)
    >>> image.shape, str(image.dtype), str(labels.dtype)
    ((1, 2, 3), 'uint8', 'uint32')
    """
    start = np.array(box.start, np.int64)
    image = np.zeros([max(0, n) for n in box.shape], np.uint8)
    labels = np.zeros(image.shape, np.uint32)
    if image.size:
        key = np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
        signal = np.empty(image.shape, np.float32)
        _draw(start, key, signal, labels)
        _expose(start, key, signal, image)
    return image, labels


# ---------------------------------------------------------------- random numbers


@inner
def _mix(h):
    """A well-mixed 64-bit number (the finaliser of Appleby's MurmurHash3)."""
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


@inner
def _hash(key, z, y, x):
    """A 64-bit number for a lattice point."""
    h = _mix(key ^ (np.uint64(z) * np.uint64(0x9E3779B97F4A7C15)))
    h = _mix(h ^ (np.uint64(y) * np.uint64(0xD1B54A32D192ED03)))
    return _mix(h ^ (np.uint64(x) * np.uint64(0x8CB92BA72F3D8DD7)))


@inner
def _key(key, n):
    """The ``n``-th key derived from a key."""
    return _mix(key + np.uint64(n) * np.uint64(0xA0761D6478BD642F) + np.uint64(1))


@inner
def _unit(h):
    """A number in [0, 1) from a hash."""
    return (h >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@inner
def _pick(key, n):
    """The ``n``-th number in [0, 1) of a key."""
    return _unit(_key(key, n))


@inner
def _sign(key, n):
    """The ``n``-th number in [-1, 1) of a key."""
    return 2.0 * _pick(key, n) - 1.0


# ---------------------------------------------------------------- smooth noise and shapes of curves


@inner
def _weights(t):
    """Quadratic B-spline weights of the three lattice points around a fraction ``t``."""
    return 0.5 * (1.0 - t) * (1.0 - t), 0.5 + t * (1.0 - t), 0.5 * t * t


@inner
def _spline(key, z, y, x, spacing):
    """Smooth noise in [-1, 1] at integer coordinates: a quadratic B-spline over hashed lattice values."""
    cz, cy, cx = z // spacing, y // spacing, x // spacing
    wz = _weights((z - cz * spacing) / spacing)
    wy = _weights((y - cy * spacing) / spacing)
    wx = _weights((x - cx * spacing) / spacing)
    total = 0.0
    for i in range(3):
        for j in range(3):
            w = wz[i] * wy[j]
            for k in range(3):
                total += w * wx[k] * (2.0 * _unit(_hash(key, cz + i, cy + j, cx + k)) - 1.0)
    return total


@inner
def _nodes(first, counts, key):
    """All fields on the brick corners from ``first`` on: (field, z, y, x), the warp along z y x before ``SMOOTH``."""
    out = np.zeros((FIELDS, counts[0], counts[1], counts[2]))
    for i, j, k in np.ndindex(counts[0], counts[1], counts[2]):
        z, y, x = (first[0] + i) * BRICK, (first[1] + j) * BRICK, (first[2] + k) * BRICK
        for f in range(3):
            for o in range(len(WARPS)):
                out[f, i, j, k] += WARPS[o][1] * _spline(_key(key, WARP + 3 * o + f), z, y, x, WARPS[o][0])
        for f in range(len(SMOOTH)):
            out[3 + f, i, j, k] = _spline(_key(key, LEVEL + f), z, y, x, SMOOTH[f])
    return out


@inner
def _bump(d, width):
    """1 at 0, falling smoothly to 0 at ``width`` on both sides."""
    t = d / width
    t = 1.0 - t * t
    return t * t if t > 0.0 else 0.0


@inner
def _ramp(t):
    """0 up to 0, 1 from 1 on, smooth between."""
    t = min(1.0, max(0.0, t))
    return t * t * (3.0 - 2.0 * t)


@inner
def _wave(t):
    """A wave of period 1 in [-1, 1], two parabolas."""
    t = 2.0 * (t - floor(t)) - 1.0
    return 4.0 * t * (1.0 - abs(t))


@inner
def _soft_min(a, b, width):
    """The lesser of two numbers, and a little less where they differ by less than ``width``."""
    t = max(0.0, 1.0 - abs(a - b) / width)
    return min(a, b) - 0.25 * width * t * t


# ---------------------------------------------------------------- cells and sites


@inner
def _cell_seed(key, z, y, x):
    """Position of a cell's seed, z y x."""
    h = _hash(key, z, y, x)
    return (
        (z + 0.1 + 0.8 * _pick(h, ZERO)) * CELL,
        (y + 0.1 + 0.8 * _pick(h, ONE)) * CELL,
        (x + 0.1 + 0.8 * _pick(h, TWO)) * CELL,
    )


@inner
def _site_seed(cell, i, j, k):
    """Position of a site's seed in its cell's frame, u v w."""
    h = _hash(cell.key, i, j, k)
    return (
        (i + 0.2 + 0.6 * _pick(h, ZERO)) * cell.step[0],
        (j + 0.2 + 0.6 * _pick(h, ONE)) * cell.step[1],
        (k + 0.2 + 0.6 * _pick(h, TWO)) * cell.step[2],
    )


@inner
def _rotate(frame, z, y, x):
    """The components u v w of a vector in a frame."""
    return (
        z * frame[0, 0] + y * frame[0, 1] + x * frame[0, 2],
        z * frame[1, 0] + y * frame[1, 1] + x * frame[1, 2],
        z * frame[2, 0] + y * frame[2, 1] + x * frame[2, 2],
    )


@inner
def _local(cell, z, y, x):
    """A point of warped space in a cell's frame, u v w."""
    return _rotate(cell.frame, z - cell.seed[0], y - cell.seed[1], x - cell.seed[2])


@inner
def _frame(key, out):
    """Fill in three orthonormal rows in a random direction."""
    a0, a1, a2 = _sign(key, AXIS), _sign(key, AXIS + 1), _sign(key, AXIS + 2)
    n = sqrt(a0 * a0 + a1 * a1 + a2 * a2) + 1e-9
    a0, a1, a2 = a0 / n, a1 / n, a2 / n
    b0, b1, b2 = (0.0, -a2, a1) if abs(a0) < 0.6 else (-a2, 0.0, a0)
    n = sqrt(b0 * b0 + b1 * b1 + b2 * b2)
    b0, b1, b2 = b0 / n, b1 / n, b2 / n
    out[0, 0], out[0, 1], out[0, 2] = a0, a1, a2
    out[1, 0], out[1, 1], out[1, 2] = b0, b1, b2
    out[2, 0], out[2, 1], out[2, 2] = a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0


@inner
def _cell(key, z, y, x, out):
    """Fill in the record of a cell."""
    h = _hash(key, z, y, x)
    out.key = h
    out.index[0], out.index[1], out.index[2] = z, y, x
    out.seed[0], out.seed[1], out.seed[2] = _cell_seed(key, z, y, x)
    _frame(h, out.frame)
    across = _pick(h, ACROSS)
    across = 58.0 + 60.0 * across + 60.0 * across * across * across
    out.stretch = 1.6 + 1.2 * _pick(h, STRETCH)
    out.step[0], out.step[1], out.step[2] = across * out.stretch, across, across


# ---------------------------------------------------------------- mitochondria


@inner
def _add_wall(walls, count, u, v, w, offset):
    """Append the half space ``(u, v, w) . point <= offset``, its normal made a unit vector; the new count."""
    n = sqrt(u * u + v * v + w * w)
    walls[count, 0], walls[count, 1], walls[count, 2], walls[count, 3] = u / n, v / n, w / n, offset / n
    return count + 1


@inner
def _site_walls(cell, i, j, k, walls, count):
    """Append the half spaces that bound a site, in its cell's frame; the new count."""
    s = 1.0 / cell.stretch
    u, v, w = _site_seed(cell, i, j, k)
    for n in range(125):
        a, b, c = i + n // 25 - 2, j + n // 5 % 5 - 2, k + n % 5 - 2
        if a != i or b != j or c != k:
            p, q, r = _site_seed(cell, a, b, c)
            offset = 0.5 * ((p * p - u * u) * s * s + q * q - v * v + r * r - w * w)
            count = _add_wall(walls, count, (p - u) * s * s, q - v, r - w, offset)
    for a in range(3):
        n = i if a == 0 else (j if a == 1 else k)
        for sign in (-1.0, 1.0):
            end = sign * (n + 0.5 + sign * 1.5) * cell.step[a] - SLACK
            count = _add_wall(walls, count, sign * (a == 0), sign * (a == 1), sign * (a == 2), end)
    return count


@inner
def _cell_walls(key, cell, walls, count):
    """Append the half spaces that bound a cell, in its frame; the new count."""
    for n in range(125):
        if n != 62:
            z, y, x = _cell_seed(
                key, cell.index[0] + n // 25 - 2, cell.index[1] + n // 5 % 5 - 2, cell.index[2] + n % 5 - 2
            )
            z, y, x = z - cell.seed[0], y - cell.seed[1], x - cell.seed[2]
            u, v, w = _rotate(cell.frame, z, y, x)
            count = _add_wall(walls, count, u, v, w, 0.5 * (z * z + y * y + x * x))
    for a in range(3):
        for sign in (-1.0, 1.0):
            end = sign * ((cell.index[a] + 0.5 + sign * 1.5) * CELL - cell.seed[a]) - SLACK
            count = _add_wall(
                walls, count, sign * cell.frame[0, a], sign * cell.frame[1, a], sign * cell.frame[2, a], end
            )
    return count


@inner
def _room(walls, points):
    """Largest radius of a tube along ``points`` that keeps its margin from all walls."""
    room = 1e300
    for n in range(len(walls)):
        for p in range(3):
            d = walls[n, 0] * points[p, 0] + walls[n, 1] * points[p, 1] + walls[n, 2] * points[p, 2]
            room = min(room, walls[n, 3] - d)
    return room - MARGIN


@inner
def _bent(h, middle, half, points):
    """Fill in three points of an axis along u, a little bent, through about ``middle``; ``half`` is half its length."""
    for a in range(3):
        tilt = 1.0 if a == 0 else 0.3 * (_pick(h, TILT + a) - 0.5)
        bend = 0.0 if a == 0 else 0.3 * (_pick(h, BEND + a) - 0.5)
        points[0, a] = middle[a] - half * tilt + half * bend
        points[1, a] = middle[a] - half * bend
        points[2, a] = middle[a] + half * tilt + half * bend


@inner
def _fit(h, seed, reach, walls, longest, widest, points):
    """(half length, radius) of the bulkiest tube that a random search from ``seed`` finds; its axis in ``points``."""
    best, best_half, best_radius = -1.0, 0.25 * longest, -1.0
    best_middle = np.array(seed)
    middle = np.empty(3)
    for n in range(64):
        step = reach * (1.0 - n / 64.0)
        for a in range(3):
            middle[a] = best_middle[a] + step * _sign(h, SEARCH + 4 * n + a)
        half = min(longest, max(4.0, best_half + step * (2.0 * _pick(h, SEARCH + 4 * n + 3) - 0.8)))
        _bent(h, middle, half, points)
        radius = min(widest, _room(walls, points))
        score = radius * radius * (half + radius) if radius > 0.0 else radius
        if score > best or n == 0:
            best, best_half, best_radius = score, half, radius
            best_middle[:] = middle
    _bent(h, best_middle, best_half, points)
    return best_half, best_radius


@inner
def _lay_tubes(h, points, radius, half, style, site):
    """Give the site one tube along ``points``, or two that touch: its outer parts, or side by side."""
    site.count = 1 if style == SINGLE else 2
    overlap = _pick(h, CONTACT)
    cosine = _sign(h, SIDE)
    for t in range(site.count):
        tube = site.tubes[t]
        tube.radius = radius
        tube.taper = 0.3 * _pick(h, TAPER) if style == SINGLE else 0.0
        for p in range(3):
            tube.points[p, 0], tube.points[p, 1], tube.points[p, 2] = points[p, 0], points[p, 1], points[p, 2]
        if style == END_TO_END:
            gap = min(0.95, radius * (0.7 + 0.15 * overlap) / half)
            for p in range(3):
                share = gap + (1.0 - gap) * 0.5 * p
                for a in range(3):
                    tube.points[p, a] = points[1, a] + share * (points[2 * t, a] - points[1, a])
        elif style == SIDE_BY_SIDE:
            aside = (2 * t - 1) * radius * (0.74 + 0.2 * overlap)
            for p in range(3):
                tube.points[p, 1] += aside * cosine
                tube.points[p, 2] += aside * sqrt(1.0 - cosine * cosine)


@inner
def _stain(h, site):
    """Fill in what a site's objects look like: gray of the matrix, direction and contrast of the cristae."""
    turn = 0.5 * _pick(h, TURN)
    cosine = _sign(h, FACING)
    pitch = 7.0 + 4.0 * _pick(h, PITCH)
    if _pick(h, LAMELLAE) < 0.5:
        u, v, w = turn, cosine, sqrt(1.0 - cosine * cosine)
    else:
        u, v, w = 1.0, turn, turn - 0.25
    site.lamella[0], site.lamella[1], site.lamella[2] = u / pitch, v / pitch, w / pitch
    site.matrix = 104.0 + 16.0 * _pick(h, MATRIX)
    site.contrast = 6.0 + 12.0 * _pick(h, CONTRAST)


@inner
def _label(cell, i, j, k):
    """The even number of a site's first object; see `synth`."""
    place = ((i + 2) << 6) | ((j + 4) << 3) | (k + 4)
    number = ((cell.index[0] & 127) << 16) | ((cell.index[1] & 255) << 8) | (cell.index[2] & 255)
    return np.uint32((number << 9) | (place << 1))


@inner
def _site(key, cell, i, j, k, site):
    """Settle what a site owns and fill in its record."""
    site.state = EMPTY
    h = _hash(cell.key, i, j, k)
    if _pick(h, OWNS) > 0.64:
        return
    pick = _pick(h, STYLE)
    style = END_TO_END if pick < 0.16 else (SIDE_BY_SIDE if pick < 0.30 else SINGLE)
    spread = 1.94 if style == SIDE_BY_SIDE else 1.0
    longest = (0.15 + 0.85 * _pick(h, LENGTH)) * 130.0
    widest = (20.0 + 27.0 * _pick(h, WIDTH)) * spread
    walls = np.empty((260, 4))
    count = _cell_walls(key, cell, walls, _site_walls(cell, i, j, k, walls, ZERO))
    points = np.empty((3, 3))
    half, radius = _fit(h, _site_seed(cell, i, j, k), 0.5 * cell.step[1], walls[:count], longest, widest, points)
    radius /= spread
    if style == END_TO_END:
        radius = min(radius, half)
    if radius < SLIMMEST:
        return
    site.state = OWNER
    site.label = _label(cell, i, j, k)
    _lay_tubes(h, points, radius, half, style, site)
    _stain(h, site)


@inner
def _tube_depth(tube, u, v, w):
    """Distance from a tube's surface, negative inside."""
    best, along = 1e18, 0.0
    for p in range(2):
        a0, a1, a2 = tube.points[p, 0], tube.points[p, 1], tube.points[p, 2]
        b0, b1, b2 = tube.points[p + 1, 0] - a0, tube.points[p + 1, 1] - a1, tube.points[p + 1, 2] - a2
        q0, q1, q2 = u - a0, v - a1, w - a2
        t = (q0 * b0 + q1 * b1 + q2 * b2) / (b0 * b0 + b1 * b1 + b2 * b2 + 1e-9)
        t = min(1.0, max(0.0, t))
        q0, q1, q2 = q0 - t * b0, q1 - t * b1, q2 - t * b2
        d = q0 * q0 + q1 * q1 + q2 * q2
        if d < best:
            best = d
            along = t - 1.0 if p == 0 else t
    return sqrt(best) - tube.radius * (1.0 - tube.taper * along * along)


@inner
def _site_depth(site, u, v, w):
    """(distance from the surface of a site's nearer object, negative inside; which one). A contact is surface too."""
    d = _tube_depth(site.tubes[0], u, v, w)
    if site.count == 1:
        return d, 0
    e = _tube_depth(site.tubes[1], u, v, w)
    if d <= e:
        return (max(d, 0.5 * (d - e)) if d < 0.0 else d), 0
    return (max(e, 0.5 * (e - d)) if e < 0.0 else e), 1


# ---------------------------------------------------------------- bricks: what may matter to their voxels


@inner
def _ball(nodes, place, origin):
    """(middle z y x, radius) of a ball that holds a brick's voxels in warped space."""
    z, y, x = 0.0, 0.0, 0.0
    for n in range(8):
        a, b, c = place[0] + (n >> 2), place[1] + ((n >> 1) & 1), place[2] + (n & 1)
        z, y, x = z + nodes[0, a, b, c], y + nodes[1, a, b, c], x + nodes[2, a, b, c]
    z, y, x = (
        z / 8.0 + origin[0] + 0.5 * BRICK,
        y / 8.0 + origin[1] + 0.5 * BRICK,
        x / 8.0 + origin[2] + 0.5 * BRICK,
    )
    radius = 0.0
    for n in range(8):
        i, j, k = n >> 2, (n >> 1) & 1, n & 1
        a, b, c = place[0] + i, place[1] + j, place[2] + k
        p = nodes[0, a, b, c] + origin[0] + i * BRICK - z
        q = nodes[1, a, b, c] + origin[1] + j * BRICK - y
        r = nodes[2, a, b, c] + origin[2] + k * BRICK - x
        radius = max(radius, p * p + q * q + r * r)
    return z, y, x, sqrt(radius)


@inner
def _prune(candidates, count, radius):
    """Keep the candidates that may be among a voxel's three nearest, ``radius`` around; how many."""
    first, second, third = 1e300, 1e300, 1e300
    for n in range(count):
        d = candidates[n].distance
        if d < first:
            first, second, third = d, first, second
        elif d < second:
            second, third = d, second
        elif d < third:
            third = d
    limit = sqrt(third) + 2.0 * radius
    kept = 0
    for n in range(count):
        if candidates[n].distance <= limit * limit:
            candidates[kept] = candidates[n]
            kept += 1
    return kept


@inner
def _near_cells(world, z, y, x, radius, candidates):
    """List the cells, by row in the table, that may hold or border voxels of the ball; how many."""
    i0 = int(floor(z / CELL)) - world.grid[0]
    j0 = int(floor(y / CELL)) - world.grid[1]
    k0 = int(floor(x / CELL)) - world.grid[2]
    for n in range(27):
        i, j, k = i0 + n // 9 - 1, j0 + n // 3 % 3 - 1, k0 + n % 3 - 1
        candidates[n].i = (i * world.spans[1] + j) * world.spans[2] + k
        seed = world.cells[candidates[n].i].seed
        candidates[n].a, candidates[n].b, candidates[n].c = seed[0], seed[1], seed[2]
        p, q, r = z - seed[0], y - seed[1], x - seed[2]
        candidates[n].distance = p * p + q * q + r * r
    return _prune(candidates, 27, radius)


@inner
def _near_sites(cell, u, v, w, radius, candidates):
    """List the sites that may hold or border voxels of the ball; how many. Along u, ``stretch`` is one unit."""
    i0, j0, k0 = int(floor(u / cell.step[0])), int(floor(v / cell.step[1])), int(floor(w / cell.step[2]))
    for n in range(27):
        i, j, k = i0 + n // 9 - 1, j0 + n // 3 % 3 - 1, k0 + n % 3 - 1
        p, q, r = _site_seed(cell, i, j, k)
        h = _hash(cell.key, i, j, k)
        candidates[n].a, candidates[n].b, candidates[n].c = p / cell.stretch, q, r
        candidates[n].shade, candidates[n].crowd = _pick(h, SHADE), _pick(h, CROWD)
        candidates[n].i, candidates[n].j, candidates[n].k = i, j, k
        p, q, r = (u - p) / cell.stretch, v - q, w - r
        candidates[n].distance = p * p + q * q + r * r
    return _prune(candidates, 27, radius)


@inner
def _near_owners(world, n, u, v, w, radius, brick):
    """List the sites of the ``n``-th cell whose objects the ball may meet, settling them on the way; how many."""
    cell = brick.candidates[0, n].i
    count = 0
    for m in range(brick.counts[1 + n]):
        i, j, k = brick.candidates[1 + n, m].i, brick.candidates[1 + n, m].j, brick.candidates[1 + n, m].k
        if abs(i) > OWNERS[0] or abs(j) > OWNERS[1] or abs(k) > OWNERS[2]:
            continue
        row = ((i + 1) * 7 + j + 3) * 7 + k + 3
        site = world.sites[cell, row]
        if site.state == UNKNOWN:
            _site(world.cell_key, world.cells[cell], i, j, k, site)
        if site.state == OWNER and _site_depth(site, u, v, w)[0] < radius * 1.5 + 12.0:
            brick.owners[n, count] = row
            count += 1
    return count


@inner
def _near_vesicles(key, origin, out):
    """List the vesicles that may meet a brick: z y x from its corner, radius; how many."""
    pitch = 10
    count = 0
    for z in range((origin[0] - 8) // pitch, (origin[0] + BRICK + 8) // pitch + 1):
        for y in range((origin[1] - 8) // pitch, (origin[1] + BRICK + 8) // pitch + 1):
            for x in range((origin[2] - 8) // pitch, (origin[2] + BRICK + 8) // pitch + 1):
                h = _hash(key, z, y, x)
                if _pick(h, ZERO) < 0.8:
                    out[count, 0] = z * pitch - origin[0] + 5.0 + 8.0 * (_pick(h, Z) - 0.5)
                    out[count, 1] = y * pitch - origin[1] + 5.0 + 8.0 * (_pick(h, Y) - 0.5)
                    out[count, 2] = x * pitch - origin[2] + 5.0 + 8.0 * (_pick(h, X) - 0.5)
                    out[count, 3] = 3.4 + 1.2 * _pick(h, RADIUS)
                    count += 1
    return count


@inner
def _slopes(candidates, count, squeeze, out):
    """Fill in what turns the difference of two candidates' squared distances into distance from their wall."""
    for n in range(count):
        for m in range(count):
            p = (candidates[n].a - candidates[m].a) * squeeze
            q, r = candidates[n].b - candidates[m].b, candidates[n].c - candidates[m].c
            out[n, m] = 0.5 / sqrt(p * p + q * q + r * r + 1e-9)


@inner
def _gather(world, brick):
    """Fill in a brick's lists."""
    z, y, x, radius = _ball(world.nodes, brick.place, brick.origin)
    brick.vesicle_count = -1
    brick.counts[0] = _near_cells(world, z, y, x, radius, brick.candidates[0])
    _slopes(brick.candidates[0], brick.counts[0], 1.0, brick.slopes[0])
    for n in range(brick.counts[0]):
        cell = world.cells[brick.candidates[0, n].i]
        u, v, w = _local(cell, z, y, x)
        brick.counts[1 + n] = _near_sites(cell, u, v, w, radius, brick.candidates[1 + n])
        _slopes(brick.candidates[1 + n], brick.counts[1 + n], 1.0 / cell.stretch, brick.slopes[1 + n])
        brick.owner_counts[n] = _near_owners(world, n, u, v, w, radius, brick)


# ---------------------------------------------------------------- voxels


@inner
def _nearest(brick, which, a, b, c):
    """(distance from the walls in a list, negative in the gap at a rounded corner; the nearest candidate)."""
    best, n1 = 1e300, 0
    for n in range(brick.counts[which]):
        candidate = brick.candidates[which, n]
        p, q, r = a - candidate.a, b - candidate.b, c - candidate.c
        candidate.distance = p * p + q * q + r * r
        if candidate.distance < best:
            best, n1 = candidate.distance, n
    first, second = 1e300, 1e300
    for n in range(brick.counts[which]):
        if n != n1:
            wall = (brick.candidates[which, n].distance - best) * brick.slopes[which, n1, n]
            if wall < first:
                first, second = wall, first
            elif wall < second:
                second = wall
    return _soft_min(first, second, ROUND), n1


@inner
def _depth(world, brick, n, u, v, w):
    """(distance from the nearest object of the ``n``-th cell, negative inside; row of its site; which of a pair)."""
    cell = brick.candidates[0, n].i
    depth, nearest, part = 1e9, ZERO, 0
    for m in range(brick.owner_counts[n]):
        d, which = _site_depth(world.sites[cell, brick.owners[n, m]], u, v, w)
        if d < depth:
            depth, nearest, part = d, brick.owners[n, m], which
    return depth, nearest, part


@inner
def _vesicles(world, brick, z, y, x):
    """How dark vesicles make a voxel, 0 to 1: dark rings, lighter inside."""
    if brick.vesicle_count < 0:
        brick.vesicle_count = _near_vesicles(world.vesicle_key, brick.origin, brick.vesicles)
    dark = 0.0
    for n in range(brick.vesicle_count):
        p = z - brick.origin[0] - brick.vesicles[n, 0]
        q = y - brick.origin[1] - brick.vesicles[n, 1]
        r = x - brick.origin[2] - brick.vesicles[n, 2]
        d = p * p + q * q + r * r
        if d < 49.0:
            d = brick.vesicles[n, 3] - sqrt(d)
            dark = max(dark, _bump(1.0 - d, 2.6), 0.55 * _ramp(d * 0.5))
    return dark


@inner
def _cytoplasm(shade, field, wall):
    """Gray of a neurite's inside, with reticulum and dark bodies."""
    gray = (142.0 + 36.0 * shade if shade > 0.08 else 126.0) + 24.0 * field[3]
    sheet = _bump(field[4], 0.09) * _ramp((field[5] - 0.22) * 12.0)
    body = _ramp((field[4] - 0.5) * 9.0)
    return gray - (55.0 * sheet + 42.0 * body) * _ramp((wall - 7.0) * 0.2)


@inner
def _crowding(field, wall, depth):
    """How much a voxel takes part in a cluster of vesicles, 0 to 1: not near membranes and mitochondria."""
    cluster = _ramp(field[6] * 6.0 + 0.7) * _ramp((wall - 6.0) * 0.25)
    return cluster * _ramp((depth - 2.0) * 0.25) if depth < 10.0 else cluster


@inner
def _membrane(gray, field, wall):
    """Gray with the neurites' membranes, thick in places, and with what fills the gaps at corners."""
    gap = _ramp(-0.5 * wall - 1.0)
    gray += (114.0 + 30.0 * field[3] - gray) * gap
    thick = 4.1 + 5.0 * _ramp((field[6] - 0.3) * 6.0)
    return gray + (88.0 - gray) * _bump(max(0.0, abs(wall) - 0.6), thick) * (1.0 - 0.7 * gap)


@inner
def _inside(site, depth, u, v, w, wobble):
    """Gray of a mitochondrion ``depth`` under its surface: membranes, a lighter gap, matrix striped with cristae."""
    stripes = _wave(u * site.lamella[0] + v * site.lamella[1] + w * site.lamella[2] + wobble)
    matrix = site.matrix + site.contrast * stripes * _ramp((depth - 4.0) / 4.0)
    return matrix + 6.0 * _bump(depth - 6.0, 2.5) + (84.0 - matrix) * _bump(depth - 0.5, 4.5)


@inner
def _voxel(world, brick, field, z, y, x):
    """(gray, label) of a voxel from its coordinates and the fields there."""
    pz, py, px = z + field[0], y + field[1], x + field[2]
    wall, n = _nearest(brick, 0, pz, py, px)
    cell = world.cells[brick.candidates[0, n].i]
    u, v, w = _local(cell, pz, py, px)
    within, m = _nearest(brick, 1 + n, u / cell.stretch, v, w)
    wall = _soft_min(wall, within, 0.6 * ROUND)
    depth, row, part = _depth(world, brick, n, u, v, w)
    if depth < 0.0:
        site = world.sites[brick.candidates[0, n].i, row]
        return _inside(site, -depth, u, v, w, 1.6 * field[4] + 1.6 * field[5]), site.label + np.uint32(part)
    candidate = brick.candidates[1 + n, m]
    gray = _cytoplasm(candidate.shade, field, wall)
    if candidate.crowd < 0.42:
        cluster = _crowding(field, wall, depth)
        if cluster > 0.0:
            gray -= cluster * (14.0 + 50.0 * _vesicles(world, brick, z, y, x))
    gray = _membrane(gray, field, wall)
    if depth < 5.0:
        gray += (84.0 - gray) * _bump(depth + 0.5, 5.5)
    return gray, np.uint32(0)


@inner
def _row_ends(nodes, place, fz, fy, ends):
    """Fill in the fields at the two ends of a brick's row of voxels."""
    for f in range(FIELDS):
        for side in range(2):
            x = place[2] + side
            a, b = nodes[f, place[0], place[1], x], nodes[f, place[0], place[1] + 1, x]
            c, d = nodes[f, place[0] + 1, place[1], x], nodes[f, place[0] + 1, place[1] + 1, x]
            a = a + (b - a) * fy
            c = c + (d - c) * fy
            ends[side, f] = a + (c - a) * fz


@inner
def _paint(world, brick, start, signal, labels):
    """Fill in the voxels of one brick that lie in the box at ``start``."""
    low, high = np.empty(3, np.int64), np.empty(3, np.int64)
    for a in range(3):
        low[a] = max(start[a], brick.origin[a])
        high[a] = min(start[a] + signal.shape[a], brick.origin[a] + BRICK)
    ends = np.empty((2, FIELDS))
    field = np.empty(FIELDS)
    for z in range(low[0], high[0]):
        for y in range(low[1], high[1]):
            _row_ends(world.nodes, brick.place, (z - brick.origin[0]) / BRICK, (y - brick.origin[1]) / BRICK, ends)
            for x in range(low[2], high[2]):
                share = (x - brick.origin[2]) / BRICK
                for f in range(FIELDS):
                    field[f] = ends[0, f] + (ends[1, f] - ends[0, f]) * share
                index = (z - start[0], y - start[1], x - start[2])
                signal[index], labels[index] = _voxel(world, brick, field, z, y, x)


@inner
def _world(first, bricks, key):
    """The tables for a box of bricks."""
    cell_key = _key(key, CELL_KEY)
    grid = np.empty(3, np.int64)
    spans = np.empty(3, np.int64)
    for a in range(3):
        grid[a] = int(floor((first[a] * BRICK - REACH) / CELL)) - 1
        spans[a] = int(floor(((first[a] + bricks[a]) * BRICK + REACH) / CELL)) + 2 - grid[a]
    cells = np.zeros(spans[0] * spans[1] * spans[2], CELLS)
    sites = np.zeros((cells.size, TABLE), SITES)
    for n in range(cells.size):
        y, x = n // spans[2] % spans[1], n % spans[2]
        _cell(cell_key, grid[0] + n // (spans[1] * spans[2]), grid[1] + y, grid[2] + x, cells[n])
    nodes = _nodes(first, bricks + 1, _key(key, FIELD_KEY))
    return World(nodes, grid, spans, cells, sites, cell_key, _key(key, VESICLE_KEY))


@outer
def _draw(start, key, signal, labels):
    """Fill in the gray before texture and noise, and the labels, of the box at ``start``."""
    first = start // BRICK
    bricks = (start + np.array(signal.shape) - 1) // BRICK - first + 1
    world = _world(first, bricks, key)
    record = np.zeros(1, BRICKS)
    for z, y, x in np.ndindex(bricks[0], bricks[1], bricks[2]):
        brick = record[0]  # taken anew each time: a record does not keep its array alive
        brick.place[0], brick.place[1], brick.place[2] = z, y, x
        for a in range(3):
            brick.origin[a] = (first[a] + brick.place[a]) * BRICK
        _gather(world, brick)
        _paint(world, brick, start, signal, labels)


# ---------------------------------------------------------------- texture and noise


@inner
def _white_row(key, z, y, x, out):
    """Fill in a row of shot noise from ``x`` on: sums of four 16-bit numbers, mean 0, deviation 37837."""
    row = _hash(key, z, y, ZERO)
    m = np.uint64(0xFFFF)
    for n in range(out.size):
        h = _mix(row ^ (np.uint64(x + n) * np.uint64(0x8CB92BA72F3D8DD7)))
        total = (h & m) + ((h >> np.uint64(16)) & m) + ((h >> np.uint64(32)) & m) + (h >> np.uint64(48))
        out[n] = np.int64(total) - 131070


@inner
def _grain_node(key, z, y, x, fz, fy):
    """Noise in [-1, 1) between the lattice points from (z, y, x) to (z + 1, y + 1, x)."""
    a, b = _unit(_hash(key, z, y, x)), _unit(_hash(key, z, y + 1, x))
    c, d = _unit(_hash(key, z + 1, y, x)), _unit(_hash(key, z + 1, y + 1, x))
    a = a + (b - a) * fy
    c = c + (d - c) * fy
    return 2.0 * (a + (c - a) * fz) - 1.0


@inner
def _add_grain(key, spacing, strength, z, y, x, out):
    """Add texture to a row from ``x`` on: up to +-``strength``, linear between lattice points."""
    cz, cy, cx = z // spacing, y // spacing, x // spacing
    fz, fy = (z - cz * spacing) / spacing, (y - cy * spacing) / spacing
    a = _grain_node(key, cz, cy, cx, fz, fy)
    b = _grain_node(key, cz, cy, cx + 1, fz, fy)
    for n in range(out.size):
        if x + n == (cx + 1) * spacing:
            cx += 1
            a, b = b, _grain_node(key, cz, cy, cx + 1, fz, fy)
        out[n] += strength * (a + (b - a) * ((x + n - cx * spacing) / spacing))


@outer
def _expose(start, key, signal, image):
    """Fill in the image: the signal with texture and noise, rounded and clipped."""
    white_key, grain_key = _key(key, WHITE_KEY), _key(key, GRAIN_KEY)
    white = np.empty(signal.shape[2], np.int64)
    grain = np.empty(signal.shape[2])
    for i, j in np.ndindex(signal.shape[0], signal.shape[1]):
        z, y, x = start[0] + i, start[1] + j, start[2]
        _white_row(white_key, z, y, x, white)
        grain[:] = 0.0
        for o in range(len(GRAINS)):
            _add_grain(_key(grain_key, np.int64(GRAINS[o][0])), GRAINS[o][0], GRAINS[o][1], z, y, x, grain)
        for k in range(grain.size):
            value = signal[i, j, k] + grain[k] + SHOT * white[k]
            image[i, j, k] = np.uint8(min(255.0, max(0.0, floor(value + 0.5))))
