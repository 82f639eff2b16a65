"""A first config for training, from a look at an image and its labels."""

from __future__ import annotations

import html
import json
import os
import tomllib
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path

from volseg.config import Config, local_path, resolve
from volseg.errors import UserError, printable
from volseg.io import files, volume
from volseg.io.annotation import open_annotation
from volseg.io.header import TripleNm, shape_text
from volseg.training.survey import MIN_SECTIONS, Survey, hold_out, parts, ranges, survey

GIVEN = {
    "first_number": "number of the image's first section in the names of the labels",
    "radius_nm": "of the ball around each point, where the table gives none",
}
PATCH, MIN_PATCH, PATCH_STEP = 256, 64, 32  # voxels


@dataclass(frozen=True)
class Initialization:
    """What `init` found, and the config that it made of it.

    Attributes
    ----------
    image, labels
        Their paths.
    shape
        Voxels of the image, z y x.
    voxel_size_nm
        Size of a voxel along z, y, x; None where nobody says.
    found
        What the labels hold.
    train, held_out
        Sections to learn from and for validation, from 0.
    notes
        What was decided, and what their user should know.
    text
        The config, as a commented TOML file.
    path
        The file in which it is; "" where none was written.
    """

    image: str
    labels: str
    shape: tuple[int, int, int]
    voxel_size_nm: TripleNm | None
    found: Survey
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    notes: tuple[str, ...]
    text: str = field(repr=False)
    path: str = ""

    @property
    def config(self) -> Config:
        """The settings, as `volseg.train` takes them."""
        return resolve((self.path or "init", tomllib.loads(self.text)))

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return json.loads(json.dumps({**asdict(self), "config": tomllib.loads(self.text)}))

    def __str__(self) -> str:
        return "\n".join(_report(self))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre><pre>{html.escape(self.text)}</pre>"


def init(
    image: str | os.PathLike,
    labels: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    voxel_size_nm: TripleNm | None = None,
    first_number: int | None = None,
    radius_nm: float | None = None,
    scribbles: bool | None = None,
    background: int | None = None,
    overwrite: bool = False,
) -> Initialization:
    """Look at an image and its labels, and make a config of which `train` learns.

    Parameters
    ----------
    image : path
        The volume (z, y, x) that was annotated.
    labels : path
        Its labels: a volume, a folder of the annotated sections, regions of Fiji, shapes of napari, or a table of points; see
        ``docs/labels.md``.
    out : path, optional
        The TOML file to write; if not given, none is written.
    voxel_size_nm : tuple of float, optional
        Size of a voxel along z, y, x in nm; if not given, what the file says.
    first_number : int, optional
        Of a folder of annotated sections, the number in its names that the image's first section has.
    radius_nm : float, optional
        Of points, the radius of the ball around each, where their table gives none; if not given, five voxels of the plane.
    scribbles : bool, optional
        Whether 0 stands for what nobody annotated; if not given, that is decided by the shapes of the labels.
    background : int, optional
        Label value outside of objects; if not given, that is decided.
    overwrite : bool
        Whether to replace an existing file.

    Returns
    -------
    Initialization
        With ``config``, ``text`` and what was found.

    Raises
    ------
    UserError
        For a bad volume or labels, labels that do not fit the image, or an existing file.

    Examples
    --------
    >>> made = init("em.tif", "labels/", "my.toml")  # doctest: +SKIP
    >>> train(made.config)  # doctest: +SKIP
    """
    path = Path(local_path(os.fspath(out))).absolute() if out is not None else None
    if path and path.exists() and not overwrite:
        raise UserError(f"{out} exists; give another --out, or --overwrite")
    opened = volume.open(os.fspath(image), voxel_size_nm=voxel_size_nm)
    place = os.fspath(labels)
    if radius_nm is not None and not 0 < radius_nm < inf:
        raise UserError(f"a radius of {radius_nm:g} nm makes no ball; give one above 0, or none")
    annotation = open_annotation(place, opened, first_number=first_number, radius_nm=radius_nm)
    try:
        found = survey(annotation, scribbles=scribbles, background=background)
    except UserError as error:
        raise (error if annotation.path in str(error) else UserError(f"{annotation.path}: {error}")) from None
    train, held_out = hold_out(found.sections)
    notes = (*opened.notes, *annotation.notes, *found.notes)
    made = Initialization(
        files.absolute(os.fspath(image)), annotation.path, opened.shape, opened.voxel_size_nm, found, train, held_out, notes,
        text="", path=str(path or ""),
    )  # fmt: skip
    given = {"first_number": first_number, "radius_nm": radius_nm}
    made = replace(made, text=_config_text(made, given, voxel_size_nm))
    if path:
        try:
            files.write_atomic(path, made.text.encode())
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; give another --out") from None
    return made


def default_out(image: str) -> str:
    """Return the name of the config for an image, in the current folder.

    >>> default_out("../data/em.ome.tif"), default_out("em.h5::/volumes/raw")
    ('em.toml', 'em.toml')
    """
    name = os.path.basename(image.partition("::")[0].rstrip("/"))
    return f"{name.partition('.')[0] or 'train'}.toml"


# ---------------------------------------------------------------------------------------------------------------- words


def _size_text(size: TripleNm | None) -> str:
    return "unknown; give --voxel-nm z,y,x" if size is None else " x ".join(f"{n:.4g}" for n in size) + " nm"


def _count(number: int, noun: str) -> str:
    """
    >>> _count(1, "section"), _count(2, "section")
    ('1 section', '2 sections')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _report(made: Initialization) -> list[str]:
    """What was found, a line each."""
    found, depth = made.found, made.shape[0]
    objects = "not counted" if found.objects is None else str(found.objects)
    held = _held_out_text(made.held_out, len(found.sections))
    lines = [
        f"image     {made.image}: {shape_text(made.shape)} voxels",
        f"voxel     {_size_text(made.voxel_size_nm)}",
        f"labels    {made.labels}: {len(found.sections)} of {depth} sections annotated ({ranges(found.sections)})",
        f"kind      {found.kind}: {found.reason}",
        f"objects   {objects}, {100 * found.foreground:.2f} % of what is annotated",
        f"learn     {_count(len(made.train), 'section')} ({ranges(made.train)})",
        f"hold out  {held}",
    ]
    lines += [f"note      {note}" for note in made.notes]
    return [*lines, f"config    {made.path}; volseg train {made.path} begins"] if made.path else lines


def _held_out_text(held_out: tuple[int, ...], annotated: int) -> str:
    if not held_out:
        return f"none, since no more than {_count(annotated, 'section')} is annotated: thresholds stay as set"
    return f"{_count(len(held_out), 'section')} ({ranges(held_out)})"


def _config_text(made: Initialization, given: dict[str, float | None], given_nm: TripleNm | None) -> str:
    """The config file; ``given`` says how to read the labels, and ``given_nm`` is the voxel size, as its user gave them."""
    found, size, path = made.found, made.voxel_size_nm, Path(made.path or "FILE.toml")
    patch = min(PATCH, max(MIN_PATCH, min(made.shape[1:]) // PATCH_STEP * PATCH_STEP))
    unused = [z for z in found.sections if z not in {*made.train, *made.held_out}]
    lines = [
        "# Made by volseg init; change what you like, then: volseg train " + printable(path.name),
        f"# The image has {shape_text(made.shape)} voxels (z y x); {len(found.sections)} of its sections are annotated.",
        *(f"# {note}" for note in found.notes),
        "",
        "[train]",
        f"out = {_toml(os.path.join('runs', path.stem if made.path else 'train'))}  # for model.safetensors and report.html",
        f"patch = {patch}",
        "batch = 6",
        "steps = 2400           # more with many sections; the report's curves show whether it was enough",
        "# minutes = 60         # ends the run, whichever of the two comes first",
        "every = 400            # steps between validations",
        "lr = 1.5e-3",
        '# start = "model.safetensors"  # begin with a model that has learnt already, or with "shipped" and binning = 2',
        "",
        "[[train.data]]",
        f"image = {_toml(made.image)}",
        f"label = {_toml(made.labels)}",
    ]
    lines += [f"{key} = {value!r}  # {GIVEN[key]}" for key, value in given.items() if value is not None]
    lines.append(f"# {found.kind}: {found.reason}")
    if found.unlabeled is not None:
        lines.append(
            f"unlabeled = {found.unlabeled}    # value of what nobody annotated: it counts in no loss and no score"
        )
    if found.background:
        lines.append(f"background = {found.background}   # value outside of objects")
    if given_nm:
        lines.append(f"voxel_size_nm = {list(map(float, given_nm))}  # z y x")
    elif size is None:
        lines.append(
            "# voxel_size_nm = [50.0, 5.0, 5.0]  # z y x: nobody says it; with it, the model runs on volumes of other sizes"
        )
    else:
        lines.append(f"# voxel_size_nm = {[round(float(n), 4) for n in size]}  # z y x, as the image says")
    lines.append(f"train = {_toml(parts(made.train))}  # sections, from 0; a:b is a to b - 1")
    if made.held_out:
        lines.append(
            f"validate_on = {_toml(parts(made.held_out))}  # held out: scores and the decoding come from these"
        )
    else:
        lines.append(
            f"# validate_on = [5]  # none is held out of {len(found.sections)}: annotate {MIN_SECTIONS} or more for scores"
        )
    if unused:
        lines.append(f"# annotated, but beside what is held out and like it, so left out: {ranges(unused)}")
    return "\n".join(lines) + "\n"


def _toml(value: str | list) -> str:
    return json.dumps(value, ensure_ascii=False)
