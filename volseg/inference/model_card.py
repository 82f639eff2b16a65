"""What a model file says of itself: the values that decide its network, and the record that `volseg info` shows.

A model file may come from anybody, so a card is checked once, here, before anything is built or shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from volseg.errors import UserError

MAX_INT8_IOU_LOSS = 0.003  # held-out IoU that an int8 form may lose for auto to take it
MAX_CHANNELS = 4096  # of one layer of the decoder
MAX_SECTIONS = 31
MAX_BINNING = 8
MULTIPLE = 32  # voxels a side that tiles are multiples of: the encoder halves a tile five times
LISTED_VOLUMES = 4  # training volumes that `format_card` lists

Text = Annotated[str, Field(max_length=1000)]
Channels = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
Head = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Length = Annotated[FiniteFloat, Field(gt=0, le=1e9)]
Nothing = BeforeValidator(lambda value: value or {})  # an absent record may be null


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class TrainingVolume(_Record):
    """One volume that a model learned from."""

    name: Text = "?"
    learn: int | None = None  # annotated sections
    unlabeled: int = Field(default=0, validation_alias=AliasChoices("unlabeled", "unlabelled"))
    held: tuple[int, ...] = ()  # sections held out
    learned: tuple[int | str, ...] = ()  # annotated sections, as numbers and "start:stop" ranges
    depth: int = 0  # of the volume, in sections; 0 where nobody says
    share: FiniteFloat = 1.0


class Training(_Record):
    """How long a model was trained, on what; ``first`` is the training of the model that it started from."""

    steps: int | None = None
    seconds: FiniteFloat = 0.0
    data: tuple[TrainingVolume, ...] = ()
    first: Training | None = None


class HeldOut(_Record):
    """IoU of the foreground on sections that the int8 form was not calibrated on."""

    sections: Text
    iou_int8: FiniteFloat
    iou_fp32: FiniteFloat


class Int8Form(_Record):
    """What is known of a quantized form."""

    held_out: HeldOut | None = None

    @property
    def allowed(self) -> bool:
        """Whether ``auto`` may take it: it was measured to lose at most `MAX_INT8_IOU_LOSS`."""
        return self.held_out is not None and self.held_out.iou_fp32 - self.held_out.iou_int8 <= MAX_INT8_IOU_LOSS


class Graph(_Record):
    """An ONNX graph from elsewhere that a model file holds in place of weights: from standardized tiles to probabilities."""

    origin: Text  # the file, and how its inputs and outputs are understood
    heads: Annotated[tuple[Head, ...], Field(min_length=1)]  # that it tells of; the card's others are 0
    multiple: Annotated[int, Field(ge=1, le=1 << 16)] = MULTIPLE  # tiles are multiples of so many voxels a side
    fixed: bool = False  # and have just so many
    percentiles: tuple[FiniteFloat, FiniteFloat] | None = None  # become 0 and 1, in place of mean and deviation


class ModelCard(_Record):
    """The card of a model: its network, the gray values and voxels it was trained on, its decoding, its record.

    Made by `from_json`; unknown keys are kept for `to_json`.

    >>> card = ModelCard.from_json({"name": "a", "encoder": "resnet18", "decoder": [64, 32, 16, 16, 16], "sections": 3,
    ...     "heads": ["mask", "contour"], "mean": 128, "std": 40, "decode": {}, "motto": "none"})
    >>> card.heads, card.binning, card.to_json()["motto"], card.changed(binning=2).binning
    (('mask', 'contour'), 1, 'none', 2)
    >>> card.changed(encoder="tu-hf_hub:a/b")
    Traceback (most recent call last):
        ...
    volseg.errors.UserError: model card: encoder = 'tu-hf_hub:a/b': an encoder is a name of letters, digits, '_', '-' and '.'
    """

    name: Text
    use: Text = ""
    encoder: Text
    decoder: tuple[Channels, Channels, Channels, Channels, Channels] | None = None
    sections: Annotated[int, Field(ge=1, le=MAX_SECTIONS)]
    binning: Annotated[int, Field(ge=1, le=MAX_BINNING)] = 1
    heads: Annotated[tuple[Head, ...], Field(min_length=1, max_length=8)]
    mean: FiniteFloat
    std: Annotated[FiniteFloat, Field(gt=0)]
    voxel_size_nm: tuple[Length, Length, Length] | None = None
    decode: dict[str, dict[str, Any]]
    training: Annotated[Training, Nothing] = Training()
    scores: Annotated[dict[str, dict[str, Any]], Nothing] = {}
    versions: Annotated[dict[str, Text], Nothing] = {}
    int8: Annotated[Int8Form | None, BeforeValidator(lambda value: value or None)] = None
    graph: Graph | None = None
    _text: str = PrivateAttr("")  # as it was given, so that a file written again has the same bytes

    @field_validator("encoder")
    @classmethod
    def _is_a_plain_name(cls, name: str) -> str:
        check_encoder_name(name)
        return name

    @field_validator("sections")
    @classmethod
    def _has_a_middle(cls, sections: int) -> int:
        if sections % 2 == 0:
            raise ValueError("must be odd: the network tells of the section in the middle")
        return sections

    @field_validator("heads")
    @classmethod
    def _each_once(cls, heads: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(heads)) < len(heads):
            raise ValueError("must name each head once")
        return heads

    @model_validator(mode="after")
    def _has_a_network(self) -> Self:
        if self.graph is None and self.decoder is None:
            raise ValueError("nothing about 'decoder'")
        return self

    @classmethod
    def parse(cls, text: str, name: str = "model card") -> Self:
        """The card that JSON ``text`` holds.

        Raises
        ------
        UserError
            A key is missing or has no possible value. The message is one line that begins with ``name``.
        """
        try:
            card = cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(f"{name}: {_first_reason(error)}") from None
        card._text = text
        return card

    @classmethod
    def from_json(cls, plain: dict) -> Self:
        """The card with these values; see `parse`."""
        return cls.parse(json.dumps(plain))

    def to_json(self) -> dict:
        """All that was given, in its order, unknown keys included."""
        return json.loads(self._text)

    @property
    def text(self) -> str:
        """The JSON text that the card was made from."""
        return self._text

    def changed(self, **values: Any) -> ModelCard:
        """This card with other values, which JSON can hold."""
        return self.from_json({**self.to_json(), **values})

    @property
    def multiple(self) -> int:
        """Voxels a side that tiles are multiples of."""
        return self.graph.multiple if self.graph else MULTIPLE * self.binning

    @property
    def told_heads(self) -> tuple[str, ...]:
        """The heads that the network tells of."""
        return self.graph.heads if self.graph else self.heads

    @property
    def int8_allowed(self) -> bool:
        """Whether the file carries a quantized form that ``auto`` may take."""
        return self.int8 is not None and self.int8.allowed


def check_encoder_name(name: str) -> None:
    """Raises `ValueError` for anything but a plain name: timm takes names with a colon or slash for addresses of files."""
    plain = name and name.isascii() and name.replace("_", "").replace("-", "").replace(".", "").isalnum()
    if not plain or len(name) > 100:
        raise ValueError("an encoder is a name of letters, digits, '_', '-' and '.'")


def _first_reason(error: ValidationError) -> str:
    """The first thing that is wrong, as one line."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    reason = str(first["ctx"]["error"]) if "error" in first.get("ctx", {}) else first["msg"]
    if first["type"] == "missing":
        return f"nothing about {where!r}"
    value = " ".join(repr(first["input"]).split())
    return f"{where} = {value if len(value) <= 80 else value[:77] + '...'}: {reason}" if where else reason


# ---------------------------------------------------------------- in words


def format_card(path: Path, card: ModelCard) -> str:
    """The card of the model file at ``path`` in a few lines; what it does not hold is left out."""
    return "\n".join(f"{name:10}{_printable(text)}" for name, text in _lines(path, card) if text)


def _printable(text: str) -> str:
    """``text`` without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


def _lines(path: Path, card: ModelCard) -> Iterator[tuple[str, str]]:
    binned = f", {card.binning} x {card.binning} voxels binned" if card.binning > 1 else ""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    yield "model", f"{card.name}: {card.use or 'no use is given'}"
    yield "file", f"{path}, {path.stat().st_size / 1e6:.1f} MB, sha256 {digest}"
    yield (
        "network",
        (
            card.graph.origin
            if card.graph
            else f"U-Net on {card.encoder}, decoder {' '.join(map(str, card.decoder))}{binned}"
        ),
    )
    size = " x ".join(f"{n:g}" for n in card.voxel_size_nm or ())
    yield "sees", f"{card.sections} section(s)" + (f" with voxels of {size} nm (z y x)" if size else "")
    yield "tells", f"{', '.join(card.told_heads)} of the one in the middle"
    yield "trained", _duration(card.training)
    volumes = card.training.data
    for volume in volumes[:LISTED_VOLUMES]:
        yield "", _training_volume(volume, card.scores.get("validation", {}).get(volume.name))
    yield "", f"and {len(volumes) - LISTED_VOLUMES} more" if len(volumes) > LISTED_VOLUMES else ""
    for name, scores in card.scores.get("test", {}).items():
        yield "measured", f"{name}: {_pairs(scores)}"
    yield "decodes", ", ".join(f"{s}.{k} = {v}" for s, values in card.decode.items() for k, v in values.items())
    yield "int8", "" if card.graph else _int8(card.int8)
    yield "made with", _pairs(card.versions)
    yield "all", "volseg info --json prints every setting it was trained with"


def _pairs(values: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) if isinstance(values, dict) else str(values)


def _duration(training: Training | None) -> str:
    """How long, of this stage and of those before it."""
    stages = []
    while training is not None and (training.steps is not None or training.data or training.first):
        minutes = f" in {training.seconds / 60:.0f} minutes" if training.seconds else ""
        stages.append(f"{'?' if training.steps is None else training.steps} steps{minutes}")
        training = training.first
    return ", after ".join(stages)


def _training_volume(volume: TrainingVolume, scores: Any) -> str:
    """Of one training volume: sections, those held out, and the score there."""
    held = volume.held
    text = f"{volume.name}: {'?' if volume.learn is None else volume.learn} sections"
    if held:
        together = held[-1] - held[0] == len(held) - 1
        text += f", held out {held[0]}:{held[-1] + 1}" if together else f", held out {len(held)}"
    if isinstance(scores, dict) and isinstance(iou := scores.get("iou"), (int, float)):
        text += f" with IoU {iou:.3f}"
    return text


def _int8(form: Int8Form | None) -> str:
    if form is None:
        return "none; volseg quantize adds it"
    if form.held_out is None:
        return "a form that nothing was measured of"
    held = form.held_out
    return f"held out {held.sections}: IoU {held.iou_int8:.4f}, in float32 {held.iou_fp32:.4f}"
