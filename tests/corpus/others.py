"""What commands take beside volumes, malformed: configs, options, models, labels, probabilities, masks, and runs."""

import json
import struct
from functools import partial

import numpy as np
import tifffile

from tests.corpus.volumes import EM, GONE, INFER, words
from tests.helpers import CARD
from volseg.inference import model

OUT = ("--out", "out.volseg.zarr")


def _em(folder, name="em.tif", data=EM):
    tifffile.imwrite(folder / name, data, photometric="minisblack")
    return name


# ------------------------------------------------------------------------------------------------------------ configs


def _config(folder, text, command="infer"):
    _em(folder)
    (folder / "my.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    lines = {
        "infer": [*words(INFER, "em.tif"), "--config", "my.toml"],
        "train": ["train", "my.toml"],
        "tune": ["tune", "my.toml"],
        "settings": ["settings", "--config", "my.toml"],
        "backends": ["backends", "em.tif", "--config", "my.toml"],
        "segment": ["segment", "em.tif", *OUT, "--config", "my.toml"],
    }
    return lines[command]


TOMLS = {
    "toml of noise": ("\x01\x02\x03", "infer", "my.toml"),
    "toml that is no text": (b"\xff\xfe\x00[input]", "infer", "my.toml"),
    "toml cut short": ("[predict", "train", "my.toml"),
    "toml nested without end": ("a = " + "[" * 50_000, "settings", "my.toml"),
    "toml of digits without end": ("[stitch]\nmin_voxels = " + "9" * 10_000, "infer", "my.toml"),
    "toml key twice": ("[stitch]\nseed = 0.1\nseed = 0.2", "infer", "my.toml"),
    "toml table unknown": ("[stich]\nseed = 0.1", "infer", "stitch"),
    "toml key unknown": ("[stitch]\nsede = 0.1", "infer", "seed"),
    "toml table that is a number": ("stitch = 5", "infer", "stitch"),
    "toml seed beyond 1": ("[stitch]\nseed = 7", "segment", "stitch.seed"),
    "toml seed not a number": ("[stitch]\nseed = nan", "infer", "stitch.seed"),
    "toml tile of words": ('[predict]\ntile = "large"', "infer", "predict.tile"),
    "toml tile too small": ("[predict]\ntile = 31", "infer", "predict.tile"),
    "toml tile beyond 2^63": ("[predict]\ntile = 99999999999999999999", "infer", "my.toml"),
    "toml overlap too wide": ("[predict]\ntile = 64\noverlap = 60", "infer", "overlap"),
    "toml block of 0": ("[blocks]\nshape = [0, 1, 1]", "infer", "blocks.shape"),
    "toml block of two": ("[blocks]\nshape = [8, 8]", "infer", "blocks.shape"),
    "toml voxel of 0 nm": ("[input]\nvoxel_size_nm = [0, 1, 1]", "infer", "input.voxel_size_nm"),
    "toml voxel without end": ("[input]\nvoxel_size_nm = [inf, 1, 1]", "infer", "voxel_size_nm"),
    "toml padding of words": ('[input]\npadding = "dark"', "infer", "input.padding"),
    "toml channel below 0": ("[input]\nchannel = -1", "infer", "input.channel"),
    "toml planes twice": ('[predict]\nplanes = ["xy", "xy"]', "infer", "planes"),
    "toml backend unknown": ('[predict]\nbackend = "abacus"', "backends", "predict.backend"),
    "toml without data": ("[train]\nsteps = 5", "train", "train.data"),
    "toml data without a label": ('[[train.data]]\nimage = "em.tif"', "train", "image and label"),
    "toml data that is not there": ('[[train.data]]\nimage = "x.tif"\nlabel = "y.tif"', "train", "x.tif"),
    "toml sections of words": (
        '[[train.data]]\nimage = "em.tif"\nlabel = "em.tif"\ntrain = ["a:b"]',
        "train",
        "'a:b'",
    ),
    "toml encoder that is an address": (
        '[train]\nencoder = "tu-hf_hub:a/b"\npretrained = false\n[[train.data]]\nsynth_seed = 1\nsynth_shape = [4, 64, 64]',
        "train",
        "hf_hub",
    ),
    "toml learning rates reversed": ("[tune]\nlr = [0, 1]", "tune", "tune.lr"),
    "toml no batch to try": ("[tune]\nbatch = []", "tune", "tune.batch"),
}
CONFIGS = {name: partial(_config, text=text, command=command) for name, (text, command, _) in TOMLS.items()}
SAID = {name: said for name, (*_, said) in TOMLS.items()}

# ------------------------------------------------------------------------------------------------------------- options

LINES = {
    "option unknown": ("infer em.tif --fast", "--fast"),
    "command unknown": ("infere em.tif", "infere"),
    "no volume": ("infer", "volume"),
    "two volumes": ("infer em.tif em.tif", "em.tif"),
    "option without its value": ("infer em.tif --model", "--model"),
    "workers of words": ("infer em.tif --workers many", "--workers"),
    "workers below 1": ("plan em.tif --workers 0", "--workers"),
    "set of no form": ("infer em.tif --set seed", "section.key=value"),
    "set of an unknown table": ("settings --set a.b=1", "'a'"),
    "set of an unknown key": ("segment em.tif --set stitch.sede=1", "'seed'"),
    "set of a wrong value": ("infer em.tif --set stitch.seed=high", "stitch.seed"),
    "roi of words": ("infer em.tif --roi all", "z0:z1,y0:y1,x0:x1"),
    "roi reversed": ("infer em.tif --roi 3:1,0:9,0:9", "start < stop"),
    "roi outside": ("infer em.tif --roi 0:9,0:9,0:9", "--roi"),
    "roi of absurd size": ("infer em.tif --roi 0:99999999999999999999,0:9,0:9", "--roi"),
    "mask that is not there": ("infer em.tif --mask tissue.zarr", "tissue.zarr"),
    "mask of another shape": ("infer em.tif --mask small.tif", "small.tif"),
    "channel of words": ("infer em.tif --channel red", "--channel"),
    "channel of one": ("infer em.tif --channel 1", "no channel 1"),
    "time of one": ("plan em.tif --time 2", "no time 2"),
    "padding of words": ("infer em.tif --padding dark", "--padding"),
    "padding not a number": ("infer em.tif --padding nan", "--padding"),
    "backend of another name": ("infer em.tif --backend abacus", "--backend"),
    "precision unknown": ("infer em.tif --precision fp7", "--precision"),
    "scheduler of no form": ("infer em.tif --scheduler here", "tcp://host:port"),
    "output in a file": ("infer em.tif --out em.tif/run", "em.tif"),
    "output over the volume": ("infer em.tif --out .", "another --out"),
    "config that is a folder": ("infer em.tif --config .", "cannot read config file"),
    "config that is not there": ("settings --config no.toml", "no.toml"),
    "price below 0": ("plan em.tif --price-per-hour -1", "--price-per-hour"),
    "shape option of words": ("synth s.zarr --shape a,b,c", "--shape"),
    "shape option of 0": ("synth s.zarr --shape 0,9,9", "--shape"),
    "shape of absurd size": ("synth s.zarr --shape 999999999,999999999,999999999", "--shape"),
    "block of absurd size": ("synth s.zarr --shape 9,9,9 --block 999999999,999999999,999999999", "--block"),
    "synth over a file": ("synth em.tif --shape 4,40,48", "em.tif"),
    "labels that are an image": ("evaluate em.tif em.tif", "neither labels nor a mask"),
    "labels that are floats": ("evaluate float.tif labels.tif", "float.tif"),
    "labels below 0": ("evaluate negative.tif labels.tif", "negative"),
    "labels of two shapes": ("evaluate labels.tif small.tif", "shape"),
    "labels that are not there": ("evaluate labels.tif none.tif", "none.tif"),
    "box outside the labels": ("evaluate labels.tif labels.tif --box 0:99,0:9,0:9", "0:99"),
    "box of no form": ("evaluate labels.tif labels.tif --box 1", "z0:z1,y0:y1,x0:x1"),
    "model that is not there": ("info none.safetensors", "none.safetensors"),
    "model that is a folder": ("info .", "a folder without bioimageio.yaml or rdf.yaml"),
    "quantize half told": ("quantize none.safetensors em.tif --truth labels.tif", "--held-out"),
    "quantize without a model": ("quantize none.safetensors em.tif", "none.safetensors"),
    "run that is none": ("verify em.tif", "em.tif"),
    "run to repair that is none": ("repair .", "not a"),
    "run to review that is none": ("review none", "none"),
    "run to clean that is none": ("clean em.tif", "em.tif"),
    "run to calibrate that is none": ("calibrate none labels.tif", "none"),
    "probabilities above 1": ("segment float.tif --out out.volseg.zarr", "sigmoid"),
    "probabilities that are labels": ("segment labels.tif --out out.volseg.zarr", "as labels do"),
    "probabilities of two channels": ("segment two.tif --out out.volseg.zarr", "--mask-channel"),
    "probabilities without that channel": ("segment two.tif --mask-channel 2 --out out.volseg.zarr", "no channel 2"),
    "probabilities and a contour of another shape": (
        "segment em.tif --contour small.tif --out out.volseg.zarr", "small.tif",
    ),
    "a distance to invert that is not there": (
        "segment em.tif --inverted distance --out out.volseg.zarr", "--distance-channel",
    ),
    "a height of a contour that is not there": (
        "segment em.tif --set fragments.height=contour --out out.volseg.zarr", "contour",
    ),
    "probabilities turned as gray values": (
        "segment em.tif --set input.invert=true --out out.volseg.zarr", "--inverted",
    ),
    "recompute of no run": ("segment em.tif --recompute", "--recompute"),
}  # fmt: skip


def _line(folder, text):
    labels = np.zeros(EM.shape, np.uint32)
    labels[:, 5:20, 5:20], labels[:, 25:35, 5:30] = 1, 2
    _em(folder)
    _em(folder, "labels.tif", labels)
    _em(folder, "negative.tif", -labels.astype(np.int32))
    _em(folder, "small.tif", labels[:3, :17].astype(np.uint8))
    _em(folder, "float.tif", EM.astype(np.float32))
    tifffile.imwrite(folder / "two.tif", np.stack([EM, EM], 1), imagej=True, metadata={"axes": "ZCYX"})
    return text.split(" ")


OPTIONS = {name: partial(_line, text=text) for name, (text, _) in LINES.items()}
SAID |= {name: said for name, (_, said) in LINES.items()}

# -------------------------------------------------------------------------------------------------------------- models


def packed(header, data=b""):
    """The bytes of a safetensors file of that header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def card(**changes):
    """A model file of which the card was changed."""
    plain = {key: value for key, value in {**CARD.to_json(), **changes}.items() if value is not GONE}
    weights = {"w": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}
    return packed({"__metadata__": {model.KEY: json.dumps(plain)}, **weights}, bytes(4))


WEIGHTS = {"w": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}
MODELS = {
    "model of noise": (b"noise" * 100, "safetensors"),
    "model empty": (b"", "safetensors"),
    "model whose header is longer than it": (struct.pack("<Q", 2**63) + b"{}", "safetensors"),
    "model whose header is a list": (packed([]), "safetensors"),
    "model nested without end": (packed(b"[" * 50_000), "safetensors"),
    "model cut short": (card()[:-2], "copy it again"),
    "model of another program": (packed(WEIGHTS, bytes(4)), "no volseg model"),
    "model whose card is a list": (packed({"__metadata__": {"volseg": "[]"}, **WEIGHTS}, bytes(4)), "no volseg model"),
    "model whose card is no JSON": (packed({"__metadata__": {"volseg": "{"}, **WEIGHTS}, bytes(4)), "no volseg model"),
    "model whose card is nested without end": (
        packed({"__metadata__": {"volseg": "[" * 50_000}, **WEIGHTS}, bytes(4)), "no volseg model",
    ),
    "model whose card is null": (packed({"__metadata__": None, **WEIGHTS}, bytes(4)), "no volseg model"),
    "encoder that is an address": (card(encoder="tu-hf_hub:a/b"), "hf_hub"),
    "encoder that is a path": (card(encoder="../../etc/passwd"), "encoder"),
    "encoder of control characters": (card(encoder="\x1b[31mred"), "encoder"),
    "encoder gone": (card(encoder=GONE), "'encoder'"),
    "decoder of four": (card(decoder=[64, 32, 16, 8]), "decoder"),
    "decoder of absurd size": (card(decoder=[2**40, 1, 1, 1, 1]), "decoder"),
    "decoder below 1": (card(decoder=[0, 1, 1, 1, 1]), "decoder"),
    "sections even": (card(sections=4), "sections"),
    "sections of absurd number": (card(sections=10**9 + 1), "sections"),
    "binning of 0": (card(binning=0), "binning"),
    "heads twice": (card(heads=["mask", "mask"]), "heads"),
    "heads of other names": (card(heads=["soma"]), "heads"),
    "mean without end": (card(mean="Infinity"), "mean"),
    "deviation of 0": (card(std=0), "std"),
    "voxel below 0": (card(voxel_size_nm=[-5, 5, 5]), "voxel_size_nm"),
    "decoding a list": (card(decode=[1]), "decode"),
    "decoding of an unknown key": (card(decode={"stitch": {"sede": 1}}), "seed"),
}  # fmt: skip


def _model(folder, data):
    _em(folder)
    (folder / "m.safetensors").write_bytes(data)
    return [*words(INFER, "em.tif"), "--model", "m.safetensors", "--backend", "torch", "--precision", "fp32"]


WEIGHTS_OF = {name: partial(_model, data=data) for name, (data, _) in MODELS.items()}
SAID |= {name: said for name, (_, said) in MODELS.items()}
CASES = {**CONFIGS, **OPTIONS, **WEIGHTS_OF}
