"""Volumes that are none: zarr arrays and groups, TIFF files, folders of slices, and names."""

import json
import struct
import zlib

import numpy as np
import tifffile
import zarr
from imagecodecs import zstd_encode
from PIL import Image

INFER = ("infer", "{}", "--out", "out.volseg.zarr")
PLAN = ("plan", "{}", "--out", "out.volseg.zarr")
EM = np.random.default_rng(0).integers(1, 255, (4, 40, 48), np.uint8)
DEEP = "[" * 50_000 + "]" * 50_000


def words(template, *paths):
    """A command line: the template with each ``{}`` replaced by the next path."""
    left = iter(paths)
    return [next(left) if word == "{}" else word for word in template]


# ---------------------------------------------------------------------------------------------------------- zarr arrays

ARRAY = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [4, 40, 48],
    "data_type": "uint8",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 20, 24]}},
    "chunk_key_encoding": {"name": "default"},
    "fill_value": 0,
    "codecs": [{"name": "bytes"}],
    "attributes": {},
}
ARRAY2 = {
    "zarr_format": 2,
    "shape": [4, 40, 48],
    "chunks": [4, 20, 24],
    "dtype": "|u1",
    "compressor": None,
    "filters": None,
    "fill_value": 0,
    "order": "C",
}
GONE = object()
CHANGES = {
    "shape gone": {"shape": GONE},
    "shape of words": {"shape": ["a", "b", "c"]},
    "shape of halves": {"shape": [4.5, 40, 48]},
    "shape below 0": {"shape": [-4, 40, 48]},
    "shape beyond 2^53": {"shape": [10**9, 10**9, 10**9]},
    "shape beyond 2^64": {"shape": [2**64, 2**64, 2**64]},
    "two axes": {"shape": [40, 48], "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [20, 24]}}},
    "no axes": {"shape": [], "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": []}}},
    "no voxels": {"shape": [0, 40, 48]},
    "complex": {"data_type": "complex64", "fill_value": [0, 0]},
    "text": {"data_type": "string", "fill_value": ""},
    "type that nobody has": {"data_type": "uint7"},
    "type that is a number": {"data_type": 7},
    "chunk of 0": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 20, 24]}}},
    "chunk below 0": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [-1, 20, 24]}}},
    "chunk of two axes": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [20, 24]}}},
    "chunk grid unknown": {"chunk_grid": {"name": "fractal"}},
    "chunk grid a list": {"chunk_grid": []},
    "no codecs": {"codecs": []},
    "codec unknown": {"codecs": [{"name": "bytes"}, {"name": "shrink"}]},
    "codecs a number": {"codecs": 5},
    "format 9": {"zarr_format": 9},
    "kind unknown": {"node_type": "cloud"},
    "fill value of another type": {"fill_value": {"a": 1}},
    "keys unknown": {"chunk_key_encoding": {"name": "hash"}},
}
CHANGES2 = {
    "v2 order": {"order": "Q"},
    "v2 compressor unknown": {"compressor": {"id": "shrink"}},
    "v2 compressor a list": {"compressor": [1]},
    "v2 filter unknown": {"filters": [{"id": "sieve"}]},
    "v2 type unknown": {"dtype": "|z9"},
    "v2 pickled objects": {"dtype": "|O", "filters": [{"id": "pickle"}], "fill_value": None},
    "v2 chunks gone": {"chunks": GONE},
    "v2 chunk of 0": {"chunks": [0, 0, 0]},
}


def _changed(document, changes):
    return {key: value for key, value in {**document, **changes}.items() if value is not GONE}


def _array(folder, text, name="zarr.json"):
    (folder / "v.zarr").mkdir()
    (folder / "v.zarr" / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return words(INFER, "v.zarr")


TEXTS = {
    "metadata cut short": json.dumps(ARRAY)[:80],
    "metadata empty": "",
    "metadata a list": "[]",
    "metadata a number": "7",
    "metadata nested without end": DEEP,
    "digits without end": json.dumps(ARRAY).replace('"fill_value": 0', '"fill_value": ' + "9" * 50_000),
}
ZARRS = {name: (lambda folder, c=c: _array(folder, _changed(ARRAY, c))) for name, c in CHANGES.items()}
ZARRS |= {name: (lambda folder, c=c: _array(folder, _changed(ARRAY2, c), ".zarray")) for name, c in CHANGES2.items()}
ZARRS |= {name: (lambda folder, text=text: _array(folder, text)) for name, text in TEXTS.items()}


def _stored(folder, *, data=EM, **options):
    zarr.create_array(str(folder / "v.zarr"), data=data, chunks=(4, 20, 24), **options)
    return next(path for path in sorted((folder / "v.zarr" / "c").rglob("*")) if path.is_file())


def chunk_cut_short(folder):
    chunk = _stored(folder)
    chunk.write_bytes(chunk.read_bytes()[:9])
    return words(INFER, "v.zarr")


def chunk_of_noise(folder):
    _stored(folder).write_bytes(b"noise" * 50)
    return words(PLAN, "v.zarr")


def chunk_that_is_a_bomb(folder):
    _stored(folder, compressors=zarr.codecs.ZstdCodec()).write_bytes(zstd_encode(bytes(1 << 27)) * 32)  # 4 GB
    return words(INFER, "v.zarr")


def shard_cut_short(folder):
    zarr.create_array(str(folder / "v.zarr"), data=EM, chunks=(2, 20, 24), shards=(4, 40, 48))
    shard = next(path for path in (folder / "v.zarr" / "c").rglob("*") if path.is_file())
    shard.write_bytes(shard.read_bytes()[:-20])
    return words(INFER, "v.zarr")


def shard_whose_index_points_beyond_its_end(folder):
    """Without a checksum of the index: zarrs would make room for what it says, and end the process."""
    codec = zarr.codecs.ShardingCodec(chunk_shape=(2, 20, 24), index_codecs=[zarr.codecs.BytesCodec()])
    zarr.create_array(
        str(folder / "v.zarr"), data=EM, chunks=EM.shape, serializer=codec, compressors=None, filters=None
    )
    shard = next(path for path in (folder / "v.zarr" / "c").rglob("*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[-8:] = struct.pack("<Q", 1 << 42)
    shard.write_bytes(data)
    return words(INFER, "v.zarr")


def chunk_that_is_a_link_to_nowhere(folder):
    chunk = _stored(folder)
    chunk.unlink()
    chunk.symlink_to("annex")
    return words(INFER, "v.zarr")


def not_a_number_everywhere(folder):
    _stored(folder, data=np.full(EM.shape, np.nan, np.float32))
    return words(PLAN, "v.zarr")


def infinity_in_one_voxel(folder):
    data = EM.astype(np.float32)
    data[1, 5, 7] = np.inf
    _stored(folder, data=data)
    return words(INFER, "v.zarr")


ZARRS |= {
    "chunk cut short": chunk_cut_short,
    "chunk of noise": chunk_of_noise,
    "chunk that is a bomb": chunk_that_is_a_bomb,
    "shard cut short": shard_cut_short,
    "shard whose index points beyond its end": shard_whose_index_points_beyond_its_end,
    "chunk that is a link to nowhere": chunk_that_is_a_link_to_nowhere,
    "NaN everywhere": not_a_number_everywhere,
    "infinity in one voxel": infinity_in_one_voxel,
}

# ------------------------------------------------------------------------------------------------------ OME-Zarr groups

AXES = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]


def _group(folder, multiscales, data=EM):
    group = zarr.open_group(str(folder / "v.zarr"), mode="w")
    group.create_array("0", data=data)
    group.attrs["ome"] = {"version": "0.5", "multiscales": multiscales}
    return words(INFER, "v.zarr")


def _image(**more):
    return [{"axes": AXES, "datasets": [{"path": "0"}], **more}]


def named(*names):
    return [{"name": name} for name in names]


OMES = {
    "no levels": lambda folder: _group(folder, []),
    "multiscales null": lambda folder: _group(folder, None),
    "multiscales a word": lambda folder: _group(folder, "0"),
    "level that is not there": lambda folder: _group(folder, _image(datasets=[{"path": "7"}])),
    "level without a path": lambda folder: _group(folder, _image(datasets=[{"path": None}])),
    "level above the group": lambda folder: _group(folder, _image(datasets=[{"path": "../../etc"}])),
    "level of an absolute path": lambda folder: _group(folder, _image(datasets=[{"path": "/etc/passwd"}])),
    "level that is the group": lambda folder: _group(folder, _image(datasets=[{"path": "/"}])),
    "axes x y z": lambda folder: _group(folder, _image(axes=named("x", "y", "z"))),
    "axes y z x": lambda folder: _group(folder, _image(axes=named("y", "z", "x"))),
    "channels and none chosen": lambda folder: _group(folder, _image(axes=named(*"czyx")), np.stack([EM] * 3)),
    "times and none chosen": lambda folder: _group(folder, _image(axes=named(*"tzyx")), np.stack([EM] * 3)),
    "a channel that is not there": lambda folder: [
        *_group(folder, _image(axes=named(*"czyx")), np.stack([EM] * 3)), "--channel", "3",
    ],
    "a time that is not there": lambda folder: [
        *_group(folder, _image(axes=named(*"tzyx")), np.stack([EM] * 3)), "--time", "3",
    ],
    "dataset that is not there": lambda folder: [*_group(folder, _image()), "--set", "input.dataset=s0"],
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- TIFF


def _tiff(folder, data=EM, **options):
    tifffile.imwrite(folder / "v.tif", data, **{"photometric": "minisblack", **options})
    return folder / "v.tif"


def _written(folder, data, **options):
    _tiff(folder, data, **options)
    return words(INFER, "v.tif")


def _bytes(folder, data, name="v.tif"):
    (folder / name).write_bytes(data)
    return words(INFER, name)


def _tagged(folder, tag, value, **options):
    """A TIFF file of which one tag of each page is not what it was."""
    with tifffile.TiffFile(_tiff(folder, metadata=None, **options), mode="r+") as tif:
        for page in tif.pages:
            page.tags[tag].overwrite(value)
    return words(INFER, "v.tif")


def tiff_cut_short(folder):
    path = _tiff(folder)
    return _bytes(folder, path.read_bytes()[:2000])


def tiff_whose_pages_go_in_a_circle(folder):
    data = bytearray(_tiff(folder, EM[0], metadata=None, compression="zlib").read_bytes())
    (first,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[first : first + 2])
    data[first + 2 + 12 * count : first + 6 + 12 * count] = struct.pack("<I", first)
    return _bytes(folder, bytes(data))


def tiff_of_kinds(folder):
    with tifffile.TiffWriter(folder / "v.tif") as writer:
        writer.write(EM, photometric="minisblack")
        writer.write(EM[0, :9, :9], photometric="minisblack")
    return words(INFER, "v.tif")


def tiff_strip_of_noise(folder):
    path = _tiff(folder, compression="zlib", metadata=None)
    with tifffile.TiffFile(path) as tif:
        at = tif.pages[2].dataoffsets[0]
    data = bytearray(path.read_bytes())
    data[at : at + 40] = b"n" * 40
    return _bytes(folder, bytes(data))


def tiff_of_a_series(folder):
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        'DimensionOrder="XYZCT" Type="uint8" SizeX="48" SizeY="40" SizeZ="2" SizeC="1" SizeT="1">'
        '<TiffData IFD="0" FirstZ="0"><UUID FileName="a.ome.tif">urn:uuid:1</UUID></TiffData>'
        '<TiffData IFD="0" FirstZ="1"><UUID FileName="b.ome.tif">urn:uuid:2</UUID></TiffData></Pixels></Image></OME>'
    )
    for name in ("a", "b"):
        tifffile.imwrite(folder / f"{name}.ome.tif", EM[0], description=xml.encode(), metadata=None)
    return words(INFER, "a.ome.tif")


TIFFS = {
    "tiff empty": lambda folder: _bytes(folder, b""),
    "tiff of noise": lambda folder: _bytes(folder, b"noise" * 100),
    "tiff of a header alone": lambda folder: _bytes(folder, b"II*\0\x08\0\0\0"),
    "tiff whose pages lie behind its end": lambda folder: _bytes(folder, b"II*\0\xff\xff\xff\x7f"),
    "tiff cut short": tiff_cut_short,
    "tiff in a circle": tiff_whose_pages_go_in_a_circle,
    "tiff of several kinds": tiff_of_kinds,
    "tiff strip of noise": tiff_strip_of_noise,
    "tiff of several files": tiff_of_a_series,
    "tiff in color": lambda folder: _written(folder, np.stack([EM] * 3, -1), photometric="rgb"),
    "tiff of one page": lambda folder: _written(folder, EM[0]),
    "tiff of complex voxels": lambda folder: _written(folder, EM.astype(np.complex64)),
    "tiff of channels": lambda folder: _written(folder, np.stack([EM] * 2, 1), imagej=True, metadata={"axes": "ZCYX"}),
    "tiff wider than 2^32": lambda folder: _tagged(folder, "ImageWidth", 2**32 - 1),
    "tiff of absurd strips": lambda folder: _tagged(folder, "RowsPerStrip", 1, compression="zlib"),
    "tiff strips beyond the end": lambda folder: _tagged(folder, "StripOffsets", [2**32 - 9], compression="zlib"),
    "tiff strips of absurd length": lambda folder: _tagged(folder, "StripByteCounts", [2**32 - 9], compression="zlib"),
    "tiff of a codec that nobody has": lambda folder: _tagged(folder, "Compression", 64999, compression="zlib"),
    "tiff of 3000 bits": lambda folder: _tagged(folder, "BitsPerSample", 3000),
    "tiff of no width": lambda folder: _tagged(folder, "ImageWidth", 0),
    "pointer of git annex": lambda folder: _bytes(folder, b"/annex/objects/SHA256E-s5--abc.tif\n"),
    "pointer of git lfs": lambda folder: _bytes(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
}

# ------------------------------------------------------------------------------------------------------------ slices


def _slices(folder, planes=EM, name="s{}.png"):
    (folder / "v").mkdir(exist_ok=True)
    for i, plane in enumerate(planes):
        Image.fromarray(plane).save(folder / "v" / name.format(i))
    return words(INFER, "v")


def _with_slice(folder, name, data):
    _slices(folder)
    (folder / "v" / name).write_bytes(data)
    return words(INFER, "v")


def png(width, height, rows=b""):
    """A gray PNG whose header says ``width`` x ``height``."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def folder_empty(folder):
    (folder / "v").mkdir()
    return words(INFER, "v")


def folder_of_text(folder):
    (folder / "v").mkdir()
    (folder / "v" / "notes.txt").write_text("notes")
    return words(INFER, "v")


def slices_of_another_type(folder):
    _slices(folder, EM[:2])
    return _slices(folder, EM[:1].astype(np.uint16), "s9{}.png")


def slices_of_absurd_size(folder):
    (folder / "v").mkdir()
    for i in range(4):
        (folder / "v" / f"s{i}.png").write_bytes(png(2**31 - 1, 2**31 - 1, zlib.compress(bytes(1 << 20))))
    return words(INFER, "v")


def slices_that_are_bombs(folder):
    (folder / "v").mkdir()
    for i in range(4):
        (folder / "v" / f"s{i}.png").write_bytes(png(60_000, 60_000, zlib.compress(bytes(1 << 24))))
    return words(INFER, "v")


def slice_that_ends_early(folder):
    _slices(folder)
    path = folder / "v" / "s2.png"
    path.write_bytes(path.read_bytes()[:-500])
    return words(INFER, "v")


def slices_with_a_gap(folder):
    _slices(folder, np.concatenate([EM, EM]))
    (folder / "v" / "s3.png").unlink()
    return words(PLAN, "v")


def slices_and_a_link_to_nowhere(folder):
    _slices(folder)
    (folder / "v" / "s4.png").symlink_to("annex")
    return words(INFER, "v")


def slice_of_several_pages(folder):
    (folder / "v").mkdir()
    for i in range(3):
        tifffile.imwrite(folder / "v" / f"s{i}.tif", EM, photometric="minisblack")
    return words(INFER, "v")


def slices_of_two_kinds(folder):
    _slices(folder)
    tifffile.imwrite(folder / "v" / "s4.tif", EM[0])
    return words(INFER, "v")


SLICES = {
    "folder empty": folder_empty,
    "folder of text": folder_of_text,
    "slice empty": lambda folder: _with_slice(folder, "s4.png", b""),
    "slice of noise": lambda folder: _with_slice(folder, "s4.png", b"noise" * 50),
    "slice of a header alone": lambda folder: _with_slice(folder, "s4.png", png(48, 40)[:33]),
    "slice without data": lambda folder: _with_slice(folder, "s2.png", png(48, 40)),
    "slice of another size": lambda folder: _with_slice(folder, "s4.png", png(47, 40)),
    "slice of no size": lambda folder: _with_slice(folder, "s4.png", png(0, 40)),
    "two slices of one number": lambda folder: _with_slice(folder, "s02.png", png(48, 40)),
    "slice of another name": lambda folder: _with_slice(folder, "mean.png", png(48, 40)),
    "slice that ends early": slice_that_ends_early,
    "slices of absurd size": slices_of_absurd_size,
    "slices that are bombs": slices_that_are_bombs,
    "slices with a gap": slices_with_a_gap,
    "slices and a link to nowhere": slices_and_a_link_to_nowhere,
    "slice of several pages": slice_of_several_pages,
    "slices of two kinds": slices_of_two_kinds,
    "slices in color": lambda folder: _slices(folder, np.stack([EM] * 3, -1)),
    "slices of another type": slices_of_another_type,
}

# ------------------------------------------------------------------------------------------------------------- names


def _beside(folder, name):
    _tiff(folder, EM)
    return words(INFER, name)


def dangling_link(folder):
    (folder / "d.tif").symlink_to("annex/1")
    return words(INFER, "d.tif")


NAMES = {
    "name that is not there": lambda folder: _beside(folder, "w.tif"),
    "folder that is not there": lambda folder: _beside(folder, "nowhere/v.tif"),
    "file as a folder": lambda folder: _beside(folder, "v.tif/inside"),
    "name of control characters": lambda folder: _beside(folder, "\x1b[31mred\x07.tif"),
    "name of nothing": lambda folder: _beside(folder, ""),
    "scheme that nobody has": lambda folder: _beside(folder, "cloud://bucket/v.zarr"),
    "dangling link": dangling_link,
    "file of no known kind": lambda folder: _bytes(folder, b"\0" * 2000, "v.dat"),
}
CASES = {**ZARRS, **OMES, **TIFFS, **SLICES, **NAMES}
SAID = {  # words that the line must hold, beside the file's name
    "shape beyond 2^53": "more than 9e+15 voxels",
    "no voxels": "no voxels",
    "complex": "complex64",
    "chunk that is a bomb": "far more bytes",
    "shard whose index points beyond its end": "beyond its end",
    "NaN everywhere": "NaN",
    "infinity in one voxel": "1:2,5:6,7:8",
    "channels and none chosen": "--channel",
    "times and none chosen": "--time",
    "a channel that is not there": "no channel 3",
    "a time that is not there": "no time 3",
    "dataset that is not there": "input.dataset=0",
    "axes x y z": "transpose",
    "tiff cut short": "copy it again",
    "tiff in color": "--channel",
    "pointer of git annex": "git annex get",
    "two slices of one number": "s2.png",
    "slice of another name": "mean.png",
    "slices with a gap": "input.allow_gaps",
    "slices and a link to nowhere": "annex",
    "slice that ends early": "s2.png",
    "slices that are bombs": "decodes to 3.6 GB",
    "name that is not there": "did you mean v.tif",
    "name of control characters": r"\x1b[31mred\x07",
}
