"""Every setting on one page. A key in a TOML file, a ``--set section.key=value`` and a field here have one name.

Layers, later ones win: the defaults here, the model file's own values, the config file, ``--set``.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from volseg.box import Box
from volseg.errors import UserError
from volseg.system import shipped_config

MOST = 1 << 53  # no count of voxels is larger, see `volseg.io.header.MAX_VOXELS`
Size = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Share = Annotated[float, Field(ge=0, le=1)]
Confidence = Annotated[float, Field(ge=0.5, lt=1)]
Rate = Annotated[float, Field(gt=0)]
Passes = Annotated[int, Field(ge=0, le=3)]  # of the smoothing filter: three along each axis fit int32
Nm = Annotated[float, Field(gt=0)]


def _each_once(planes: tuple[str, ...]) -> tuple[str, ...]:
    if not planes or len(set(planes)) < len(planes):
        raise ValueError(f"planes {list(planes)} must name each plane once; use ['xy'] or ['xy', 'xz', 'yz']")
    return planes


def _text(value: Any) -> Any:
    """A number where a name is wanted, such as a level's, is that name."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Name = Annotated[str, BeforeValidator(_text)]


def local_path(path: str | Path) -> str:
    """``path`` without ``file://``, and with the user's home for ``~``."""
    return os.path.expanduser(re.sub("^file:/+", "/", str(path)))


LocalPath = Annotated[str, AfterValidator(local_path)]
Planes = Annotated[tuple[Literal["xy", "xz", "yz"], ...], AfterValidator(_each_once)]


class Section(BaseModel):
    """A table of settings: frozen, and unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Input(Section):
    dataset: Name = ""  # array inside a zarr group; "" takes the OME-Zarr full-resolution level
    voxel_size_nm: tuple[Nm, Nm, Nm] | None = None  # z y x; overrides what the file says
    mask: str = ""  # a volume that is 0 where nothing is wanted; may be coarser by whole factors
    roi: str = ""  # z0:z1,y0:y1,x0:x1 wanted alone; "" takes all
    resample: Literal["auto", "off", "nearest level"] = (
        "auto"  # to the model's voxel size: as it is read, or a stored level
    )
    allow_gaps: bool = False  # whether a folder of slices may lack some, by its numbers
    on_bad_chunk: Literal["fail", "skip"] = "fail"  # what cannot be decoded ends the run, or is 0 and in run.json
    channel: Count | None = None  # which of several channels is read, from 0; None refuses several
    time: Count | None = None  # which of several times is read, from 0; None refuses several
    invert: bool = False  # turn gray values around, where objects are bright that the model knows dark
    padding: Literal["auto", "none"] | FiniteFloat = "auto"  # gray value of voxels that are no image, see default.toml

    @field_validator("roi")
    @classmethod
    def _is_box(cls, text: str) -> str:
        return str(Box.parse(text)) if text else text


class Predict(Section):
    model: LocalPath = ""  # .safetensors, ONNX or a bioimage.io package; "" takes the one that ships with volseg
    outputs: tuple[Literal["mask", "contour", "distance", ""], ...] = ()  # channels of an ONNX network that names none
    activation: Literal["auto", "none", "sigmoid", "softmax"] = "auto"  # what makes its outputs probabilities
    backend: Literal["auto", "openvino", "onnx", "torch"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    tile: Annotated[int, Field(ge=32, le=1 << 20)] = 1280  # longest tile edge in voxels; a plane that fits is one tile
    overlap: Count = 64  # voxels shared by neighboring tiles
    batch: Count = 0  # tiles in one forward pass; 0 takes what is fastest on a GPU, and 1 on a CPU
    tta: Literal[1, 4, 8] = 1  # ways to lay a tile that are averaged: 4 flips it, 8 also transposes it
    planes: Planes = ("xy",)  # passes over the volume that are averaged
    normalize: Literal["volume", "model"] = "volume"  # mean and deviation from the volume, or from the training data

    @model_validator(mode="after")
    def _room_between_overlaps(self) -> Predict:
        if self.overlap > self.tile // 32 * 16:
            raise ValueError(f"overlap {self.overlap} is more than half of a tile of {self.tile // 32 * 32}")
        return self


class Probabilities(Section):
    """Which channels of a volume of probabilities are what; `volseg segment` alone reads it, where no network is run."""

    mask_channel: Count | None = None  # counted from 0; may be left out where there is one channel
    contour_channel: Count | None = None  # None: no contour
    distance_channel: Count | None = None  # None: no distance
    contour: str = ""  # a volume of its own that holds the contour; "" takes a channel of the first
    distance: str = ""  # the same of the distance
    affinity_channels: tuple[Count, Count, Count] | None = None  # to the next voxel along z y x, in place of all others
    affinity_offset: Literal[-1, 1] = -1  # with which voxel of its axis an affinity joins the one it is stored at
    inverted: tuple[Literal["mask", "contour", "distance", "affinities"], ...] = ()  # taken as 1 - value


class Blocks(Section):
    shape: tuple[Size, Size, Size] | None = None  # z y x; None fits whole planes into memory


class Fragments(Section):
    threshold: Share = 0.5  # a voxel belongs to the mask where the smoothed mask probability reaches this
    height: Literal["probability", "contour", "distance", "head"] = (
        "probability"  # what the watershed follows, see below
    )
    contour: Share = 1.0  # how much of the contour probability is taken from the mask probability for the height
    smooth: tuple[Passes, Passes, Passes] = (2, 2, 2)  # passes of the [1 2 1] filter along z y x
    distance: Annotated[int, Field(ge=0, le=64)] = (
        0  # plateaus are split by the distance to the mask's border up to this
    )
    distance_nm: Annotated[float, Field(ge=0)] = (
        0.0  # the same in nm, for voxels that are no cubes; 0 takes ``distance``
    )
    connectivity: Literal[6, 26] = 6  # neighbors of a voxel: those that share a face, or also an edge or a corner

    # What objects are cut by. ``stitch.seed`` is a share of what the height says, smoothed:
    #   probability  mask probability minus contour; then the distance to the mask's border
    #   contour      1 - contour probability; then the distance to the mask's border
    #   distance     distance to the border of mask minus contour, as a share of its cap; then mask minus contour
    #   head         the third channel, a network's own distance; then the distance to the mask's border

    @model_validator(mode="after")
    def _one_distance(self) -> Fragments:
        if self.distance and self.distance_nm:
            raise ValueError("distance and distance_nm are one thing in two units; set one of them to 0")
        if self.height == "distance" and not (self.distance or self.distance_nm):
            raise ValueError("height 'distance' needs a distance to count up to: give distance (voxels) or distance_nm")
        return self


class Stitch(Section):
    seed: Share = 0.6  # basins joined above this smoothed probability (or what fragments.height takes) are one seed
    seed_low: Share = 0.0  # what reaches this is a seed too where it meets others below ``seed``; 0: ``seed`` alone
    persistence: Share = 0.0  # seeds less than this below the saddle between them are one seed
    join_mean: Share = 0.0  # neighbors are joined whose whole border has at least this mean probability; 0: none
    keep_unseeded: bool = False  # keep objects that hold no seed
    min_voxels: Count = 500  # smaller objects are dropped; counts of voxels in [stitch] are of the model's size
    min_volume_nm3: Annotated[float, Field(ge=0)] = 0.0  # so are those of less than this volume
    count_cut: bool = False  # beyond a face of the volume, what it cuts counts as going on as the cube on its cut
    max_voxels: Count = 0  # larger objects are dropped; 0: none
    fill_holes_voxels: Count = 0  # cavities and dropped pieces up to this size become part of the one object they touch
    reduce: Literal["auto", "flat", "tree"] = "auto"  # one process, or a tree of blocks beyond its memory; same labels

    @model_validator(mode="after")
    def _low_is_lower(self) -> Stitch:
        if self.seed_low and self.seed_low >= self.seed:
            raise ValueError(f"seed_low {self.seed_low:g} is not below seed {self.seed:g}; lower it, or set it to 0")
        return self

    @model_validator(mode="after")
    def _tree_can(self) -> Stitch:
        if self.reduce == "tree" and (needs := self.needs_all()):
            raise ValueError(f"{needs[0]} needs all edges in one process; set it to 0, or reduce to 'flat' or 'auto'")
        return self

    def needs_all(self) -> list[str]:
        """The rules in use that cannot be decided in parts of the volume."""
        return [name for name in ("seed_low", "persistence", "join_mean", "fill_holes_voxels") if getattr(self, name)]


class Output(Section):
    chunk: tuple[Size, Size, Size] = (32, 256, 256)  # what zarr compresses; cut to fit the block
    levels: Annotated[int, Field(ge=1, le=12)] = 4  # resolutions of the label pyramid
    space: Literal["auto", "source", "model"] = "auto"  # whose voxels labels have; auto: the source's, up to 4 x finer
    copy_image: bool = False  # copy the volume into the run, as a pyramid: a result that can be handed on alone
    keep_work: bool = True  # keep basins and edge tables, so that decoding can be repeated
    measure: tuple[Literal["gray", "feret"], ...] = ()  # more columns of the object table: mean_gray, feret_nm
    probabilities: Literal["keep", "drop"] = "keep"  # drop: removed block by block once basins are made of them


ClusterKind = Literal[
    "local", "address", "scheduler-file", "slurm", "lsf", "pbs", "sge", "htcondor", "kubernetes", "ssh", "gateway",
]  # fmt: skip


class Cluster(Section):
    kind: ClusterKind = (
        "local"  # who starts workers: this machine, nobody (they are there), or a queue: configs/cluster
    )
    workers: Count = 0  # processes that infer; 0 takes one per GPU, else one per core up to 8
    cpu_workers: Count = 0  # processes beside those of GPUs, for all else; 0 takes one per other core up to 8
    minimum: Count = 0  # workers that are kept in any case, where there is a maximum
    maximum: Count = 0  # as many workers as there is work for, up to this; 0: always ``workers``
    scheduler: str = ""  # tcp://host:port or tls://host:port of a running Dask scheduler, or the file that it wrote
    tls_ca: LocalPath = ""  # certificate authority of a tls:// scheduler, a PEM file
    tls_cert: LocalPath = ""  # certificate for it, of this client and of what it starts
    tls_key: LocalPath = ""  # its key; "" takes the certificate's file
    memory_limit: Annotated[float, Field(ge=0)] = 0.0  # GB that a worker may hold; 0: an even share of what is free
    tries: Size = 3  # how often a block is tried before it is given up
    window: Count = 0  # blocks in flight; 0 takes three per worker thread
    dashboard: str = ":8787"  # address of the Dask dashboard; "" for none
    durable: bool = True  # wait until what is done is on the disk, so that a power cut loses nothing; false for scratch
    options: dict[str, Any] = {}  # what the kind's own library takes (queue, walltime, image ...): see configs/cluster

    @property
    def is_given(self) -> bool:
        """Whether there is a scheduler already; its address alone says so, too."""
        return self.kind in ("address", "scheduler-file") or bool(self.scheduler)

    @property
    def is_local(self) -> bool:
        """Whether all workers are processes of this command, on this machine."""
        return self.kind == "local" and not self.is_given

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> Cluster:
        starts = self.kind not in ("local", "address", "scheduler-file")
        if starts and self.scheduler:
            raise ValueError(f"kind {self.kind!r} starts a scheduler: leave out scheduler, or set kind to 'address'")
        if self.is_given and not self.scheduler:
            raise ValueError(f"kind {self.kind!r} needs scheduler: an address, or the file that the scheduler wrote")
        if self.options and not starts:
            raise ValueError(f"kind {self.kind!r} takes no options; leave them out, or set kind to who starts workers")
        if self.kind == "ssh" and len(self.options.get("hosts", ())) < 2:
            raise ValueError("kind 'ssh' needs options.hosts: where the scheduler runs, then where each worker does")
        if starts and self.kind != "ssh" and not (self.workers or self.maximum):
            raise ValueError(f"kind {self.kind!r} needs workers, or maximum for as many as there is work for")
        if self.maximum and (self.is_given or self.kind == "ssh"):
            raise ValueError("workers that are given come and go by themselves; leave out minimum and maximum")
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} is above maximum {self.maximum}; set both, or none")
        return self


class TrainData(Section):
    """One annotated volume, or a synthetic one (``synth_seed``)."""

    image: str = ""  # the volume
    channel: Count | None = None  # which of several channels of it, from 0; None refuses several
    time: Count | None = None  # which of several times of it, from 0; None refuses several
    invert: bool = False  # turn its gray values around, as input.invert does
    label: str = ""  # what is annotated in it: a volume, a folder of sections, regions, points: see docs/labels.md
    synth_seed: int | None = None  # makes a synthetic volume instead, another one for each seed
    synth_shape: tuple[Size, Size, Size] = (64, 512, 512)  # its voxels, z y x
    train: tuple[str | int, ...] = ()  # sections to learn from: numbers and "start:stop" ranges; empty takes all others
    validate_on: tuple[str | int, ...] = ()  # contiguous sections held out
    first_number: Count | None = None  # number of the image's first section in the names of a folder of annotated ones
    radius_nm: Nm | None = None  # of the ball around each of points, where their table gives none; None: 5 voxels
    part: str = ""  # y0:y1,x0:x1 of the sections, where no more of them is annotated; nothing else is read
    unlabeled: int | None = None  # label value that the loss ignores; 0 for scribbles
    background: Count = 0  # label value outside of objects; of scribbles, the one that was drawn there
    unlabeled_sections: tuple[str | int, ...] | None = None  # for self-training; None takes those between ``train``
    planes: Planes = ("xy",)  # of patches to learn from; others than xy for voxels as long as wide
    share: Annotated[float, Field(gt=0)] = 1.0  # how often this volume is drawn, against the others
    voxel_size_nm: tuple[Nm, Nm, Nm] | None = None  # z y x; overrides what the file says

    @model_validator(mode="after")
    def _one_source(self) -> TrainData:
        if (self.synth_seed is None) != bool(self.image) or bool(self.image) != bool(self.label):
            raise ValueError("needs image and label, or synth_seed alone")
        return self

    @model_validator(mode="after")
    def _background_is_known(self) -> TrainData:
        if self.unlabeled == self.background:
            raise ValueError(
                f"unlabeled and background are both {self.background}; give background the value that was drawn outside of "
                "objects, such as 1"
            )
        return self

    @field_validator("part")
    @classmethod
    def _is_a_window(cls, text: str) -> str:
        return str(Box.parse(f"0:1,{text}")).removeprefix("0:1,") if text else text

    @property
    def window(self) -> tuple[slice, slice] | None:
        """Rows and columns of ``part``; None for all."""
        return Box.parse(f"0:1,{self.part}").slices[1:] if self.part else None

    @field_validator("planes")
    @classmethod
    def _sections_as_they_are(cls, planes: tuple[str, ...]) -> tuple[str, ...]:
        if "xy" not in planes:
            raise ValueError(f"planes {list(planes)} must name xy, on which models are validated")
        return planes


class Train(Section):
    data: tuple[TrainData, ...] = ()  # annotated volumes: a [[train.data]] table each
    encoder: str = "tu-tf_efficientnet_lite0"
    decoder: tuple[Size, Size, Size, Size, Size] = (128, 64, 32, 16, 16)
    sections: Literal[1, 3, 5, 7] = 3  # neighboring sections seen as channels
    binning: Literal[1, 2] = 1  # the network sees squares of that many voxels a side as one, and tells of each voxel
    pretrained: bool = True  # ImageNet encoder weights from the installed package
    start: LocalPath = ""  # an earlier volseg model to start from, or "shipped"
    voxel_size_nm: tuple[Nm, Nm, Nm] | None = None  # of the model; None: that of ``start``, else of the first volume
    patch: Annotated[int, Field(ge=64)] = 256  # multiple of 32, of 64 with binning 2
    batch: Size = 8
    steps: Size = 1200
    minutes: Annotated[float, Field(ge=0)] = 0  # time budget; 0 for none
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    loss: Literal["focal", "bce"] = "focal"  # both with Dice
    focal_scale: Annotated[float, Field(gt=0)] = 4.0
    contour_weight: Annotated[float, Field(ge=0)] = 0.5
    contour_width: Size = 2  # voxels on each side of an object's border, in the plane
    contact_weight: Annotated[int, Field(ge=1, le=255)] = 4  # of the contour's voxels where two objects touch
    distance_nm: Annotated[float, Field(ge=0)] = (
        0.0  # a third head learns the distance to an object's end, up to this; 0: none
    )
    distance_weight: Annotated[float, Field(ge=0)] = 1.0  # of that head's loss
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995
    augment: tuple[Literal["flip", "affine", "elastic", "gray", "neighbors", "domain"], ...] = (
        "flip", "affine", "elastic", "gray", "neighbors",
    )  # fmt: skip
    self_training: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of a batch from sections that nobody annotated
    self_training_after: Share = 0.3  # share of the run before that begins
    self_training_confidence: tuple[Confidence, Confidence] = (
        0.9,
        0.7,
    )  # of mask, contour: less sure voxels are left out
    every: Size = 100  # steps between validations
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: the least that the device computes in hardware
    processes: Count = 0  # that train together; 0 takes one per GPU
    out: LocalPath = "runs/train"

    @property
    def heads(self) -> tuple[str, ...]:
        """What the network tells of each voxel, in the order of its channels."""
        return ("mask", "contour", "distance") if self.distance_nm else ("mask", "contour")


class Tune(Section):
    lr: tuple[Rate, Rate] = (3e-4, 1e-2)  # lowest and highest train.lr to try
    batch: Annotated[tuple[Size, ...], Field(min_length=1)] = (4, 8, 16, 32)  # train.batch to try
    share: Annotated[float, Field(gt=0, le=1)] = 0.25  # length of a trial, of the patches that the whole run sees
    trials: Size = 20
    minutes: Annotated[float, Field(ge=0)] = 0  # time budget; 0 for none


class Config(Section):
    """Every setting, by the tables of a config file; `load` reads one, and ``configs/default.toml`` explains each."""

    input: Input = Input()
    predict: Predict = Predict()
    probabilities: Probabilities = Probabilities()
    blocks: Blocks = Blocks()
    fragments: Fragments = Fragments()
    stitch: Stitch = Stitch()
    output: Output = Output()
    cluster: Cluster = Cluster()
    train: Train = Train()
    tune: Tune = Tune()


def _merge(low: dict, high: dict) -> dict:
    """``low`` with ``high`` laid over it, section by section."""
    both = dict(low)
    for key, value in high.items():
        both[key] = _merge(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def read_file(path: str | Path) -> dict:
    """The tables of a TOML config file, or of one that ships with volseg, by name; refuses what is missing or not TOML."""
    try:
        return tomllib.loads((shipped_config(path) or Path(local_path(path))).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(
            f"cannot read config file {path}: {reason}; give the path of a TOML file, or a name that volseg config lists"
        ) from None
    except RecursionError:
        raise UserError(f"config file {path} is not valid TOML: it is nested too deep") from None
    except ValueError as error:  # also a number of thousands of digits
        raise UserError(f"config file {path} is not valid TOML: {error}") from None


def parse_set(text: str) -> dict:
    """The nested dict of one ``section.key=value``; the value is TOML, or else plain text, as names are that look like numbers.

    >>> parse_set("stitch.seed=0.9"), parse_set("predict.backend=torch"), parse_set("input.dataset=8_8_30")
    ({'stitch': {'seed': 0.9}}, {'predict': {'backend': 'torch'}}, {'input': {'dataset': '8_8_30'}})
    """
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise UserError(f"--set {text!r} is not of the form section.key=value, for instance stitch.seed=0.9")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value.strip()
    field = getattr(getattr(Config.model_fields.get(section), "annotation", None), "model_fields", {}).get(name)
    if field is not None and field.annotation is str and not isinstance(parsed, str):
        parsed = value.strip()
    return {section: {name: parsed}}


RENAMED = {"unlabelled": "unlabeled", "unlabelled_sections": "unlabeled_sections"}  # keys of before the first release


def _suggest(location: tuple, tables: dict) -> str:
    """`` (did you mean ...?)`` for an unknown key, from the names that exist where it stands."""
    if new := RENAMED.get(str(location[-1])):
        return f" is called {new!r} now"
    model: Any = Config
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        model = TrainData if part == "data" else (field.annotation if field else Config)
    near = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(model.model_fields)}"


def resolve(*layers: tuple[str, dict]) -> Config:
    """One checked ``Config`` from named layers, later ones over earlier ones.

    Each layer is ``(where it comes from, tables)``. Raises :class:`UserError` that names the place, the key, what came
    and, for an unknown key, the nearest one that exists.
    """
    merged: dict = {}
    for where, tables in layers:
        _check(where, tables, alone=True)
        merged = _merge(merged, tables)
    return _check(", ".join(where for where, tables in layers if tables) or "settings", merged, origins(layers))


def origins(layers: Iterable[tuple[str, dict]]) -> dict[tuple[str, str], str]:
    """The layer that each setting comes from, by section and key."""
    return {(section, key): where for where, tables in layers for section, of in tables.items() for key in of}


def _check(
    where: str, tables: dict, origin: dict[tuple[str, str], str] | None = None, *, alone: bool = False
) -> Config | None:
    """The settings in ``tables``, each from its ``origin``, else from ``where``; ``alone`` leaves out rules between them."""
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        found = [e for e in error.errors() if not (alone and e["type"] == "value_error")]
    if not found:
        return None
    first = found[0]
    key = ".".join(str(part) for part in first["loc"])
    where = (origin or {}).get(first["loc"][:2], where)
    if first["type"] == "extra_forbidden":
        raise UserError(f"{where}: unknown key {_short(key)}{_suggest(first['loc'], tables)}")
    if first["type"] == "value_error":
        raise UserError(f"{where}: {key}: {first['ctx']['error']}")
    raise UserError(f"{where}: {key} = {_short(first['input'])}: {first['msg'].lower()}")


def _short(value: Any) -> str:
    """A value that came, as much of it as a line holds."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # of a number of thousands of digits, or deep lists
        return f"a {type(value).__name__} too long to show"
    return shown if len(shown) <= 120 else f"{shown[:120]}..."


Setting = str | tuple[str, str]  # "section.key=value", or the option that it comes from and this


def load(file: str | Path | dict | None = None, sets: Iterable[Setting] = (), base: dict | None = None) -> Config:
    """The configuration of a run: ``base`` (a model's own values), then ``file``, then each ``--set``."""
    return resolve(*layers(file, sets, base))


def layers(file: str | Path | dict | None, sets: Iterable[Setting], base: dict | None) -> list[tuple[str, dict]]:
    """The layers that `load` lays over the defaults, and where each comes from; ``file`` may be its tables."""
    tables = [("model file", base or {})]
    if file:
        tables.append(("config", file) if isinstance(file, dict) else (str(file), read_file(file)))
    options = ((f"--set {setting}", setting) if isinstance(setting, str) else setting for setting in sets)
    return tables + [(origin, parse_set(text)) for origin, text in options]
