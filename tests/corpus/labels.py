"""Labels that are none, or fit no image: what `volseg init` is given as people make it."""

import zipfile
from functools import partial

import numpy as np
import roifile
import tifffile
from PIL import Image

from tests.corpus.volumes import EM

MASK = np.zeros(EM.shape, np.uint8)
MASK[:, 5:20, 5:20] = 255
INIT = ["init", "em.tif"]


def _init(folder, labels, *more):
    tifffile.imwrite(folder / "em.tif", EM, photometric="minisblack")
    return [*INIT, labels, *more]


def _sections(folder, planes, *more):
    """A folder of slices, by their names."""
    (folder / "labels").mkdir()
    for name, plane in planes.items():
        if isinstance(plane, bytes):
            (folder / "labels" / name).write_bytes(plane)
        else:
            Image.fromarray(plane).save(folder / "labels" / name)
    return _init(folder, "labels", *more)


SECTIONS = {
    "label folder empty": ({}, "labels"),
    "label folder of text": ({"notes.txt": b"s1"}, "holds no .tif"),
    "labels that fit no section": ({"s9.png": MASK[0]}, "number 9, but the image has 4 sections"),
    "labels that fit from 0 and from 1": ({"s1.png": MASK[0], "s2.png": MASK[0]}, "set first_number = 0 or 1"),
    "labels of two of one number": ({"s1.png": MASK[0], "s01.png": MASK[0]}, "two files of number 1"),
    "labels without a number": ({"s0.png": MASK[0], "mean.png": MASK[0]}, "mean.png has no number"),
    "labels of two numbers": ({"s0_r1.png": MASK[0], "s1_r2.png": MASK[0]}, "several numbers"),
    "labels of more sections": ({f"s{i}.png": MASK[0] for i in range(5)}, "holds 5 slices, but the image"),
    "labels in color": ({"s0.png": np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)}, "color image"),
    "labels of another plane": ({"s0.png": MASK[0, :30]}, "30 x 48"),
    "labels cut short": ({"s0.png": b"\x89PNG\r\n\x1a\n\0\0"}, "s0.png"),
    "labels of no bytes": ({"s0.png": b""}, "s0.png is empty"),
    "labels of sections without objects": ({"s0.png": 0 * MASK[0]}, "holds no label"),
}
CASES = {name: partial(_sections, planes=planes) for name, (planes, _) in SECTIONS.items()}
SAID = {name: said for name, (_, said) in SECTIONS.items()}


def _zip(folder, edit=lambda data: data, name="cell", **roi):
    shape = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.RECT, left=2, top=3, right=12, bottom=9, name=name)
    for key, value in {"position": 2, **roi}.items():
        setattr(shape, key, value)
    with zipfile.ZipFile(folder / "r.zip", "w") as archive:
        archive.writestr("cell.roi", shape.tobytes())
    (folder / "r.zip").write_bytes(edit((folder / "r.zip").read_bytes()))
    return _init(folder, "r.zip")


def _only(folder, name, data):
    (folder / "r.zip").unlink(missing_ok=True)
    with zipfile.ZipFile(folder / "r.zip", "w") as archive:
        archive.writestr(name, data)
    return _init(folder, "r.zip")


def _table(folder, text):
    (folder / "shapes.csv").write_text(text)
    return _init(folder, "shapes.csv")


def _volume(folder, data, *more, name="labels.tif"):
    tifffile.imwrite(folder / name, data, photometric="minisblack")
    return _init(folder, name, *more)


HEADER = "index,shape-type,vertex-index,axis-0,axis-1,axis-2\n"
MADE = {
    "roi zip cut short": (partial(_zip, edit=lambda data: data[:-40]), "r.zip"),
    "roi zip empty": (partial(_zip, edit=lambda data: b""), "r.zip is empty"),
    "roi zip of other files": (partial(_only, name="notes.txt", data=b"x"), "holds no regions"),
    "roi of noise": (partial(_only, name="cell.roi", data=b"Iout" + bytes(9)), "cell.roi of"),
    "roi of absurd points": (
        partial(_only, name="cell.roi", data=b"Iout" + bytes([0, 228, 7, 0]) + bytes(8) + b"\x7f\xff" + bytes(110)),
        "cell.roi of",
    ),
    "roi without a section": (partial(_zip, position=0), "does not say in which section"),
    "roi of no section": (partial(_zip, position=5), "lies in section 5"),
    "roi of a line": (partial(_zip, roitype=roifile.ROI_TYPE.LINE), "no regions that enclose pixels"),
    "roi beside the image": (partial(_zip, left=500, right=510), "holds no label"),
    "shapes without corners": (partial(_table, text=HEADER), "no table of napari's shapes"),
    "points of another table": (partial(_table, text="a,b\n1,2\n"), "has the columns a, b"),
    "points of no rows": (partial(_table, text="z,y,x\n"), "holds no point"),
    "points of words": (partial(_table, text="z,y,x\n1,2,3\n0,a,b\n"), "row 2 of"),
    "points beside the image": (partial(_table, text="z,y,x\n0,5,500\n"), "row 1 of"),
    "points in nm without a size": (partial(_table, text="z_nm,y_nm,x_nm\n0,5,5\n"), "how large a voxel is"),
    "points that nobody can read": (partial(_table, text="z,y,x\n" + "9" * 200_000 + ",1,1\n"), "shapes.csv"),
    "shapes of words": (partial(_table, text=HEADER + "0,polygon,0,a,b,c\n"), "shapes.csv"),
    "shapes of lines": (partial(_table, text=HEADER + "0,line,0,0,1,1\n0,line,1,0,9,9\n"), "holds no polygon"),
    "shapes of one corner": (partial(_table, text=HEADER + "0,ellipse,0,0,1,1\n"), "has 1 corners"),
    "roi of no points": (
        partial(_only, name="cell.roi", data=b"Iout" + bytes([0, 228, 7, 0]) + bytes(56)), "no regions that enclose pixels",
    ),
    "shapes across sections": (
        partial(_table, text=HEADER + "0,polygon,0,0,1,1\n0,polygon,1,1,9,9\n0,polygon,2,0,9,1\n"),
        "does not lie in one section",
    ),
    "labels of another shape": (partial(_volume, data=MASK[:3]), "3 x 40 x 48"),
    "labels that are the image": (partial(_volume, data=EM), "holds no labels"),
    "labels that are the image itself": (lambda folder: _init(folder, "em.tif"), "em.tif"),
    "labels of halves": (partial(_volume, data=MASK / np.float32(2)), "fractions"),
    "labels without background": (partial(_volume, data=MASK * 0 + 1), "every annotated voxel"),
    "labels gone": (lambda folder: _init(folder, "none.tif"), "none.tif"),
    "first number of a volume": (
        lambda folder: [*_volume(folder, MASK), "--first-number", "1"], "is for a folder",
    ),
    "background that is nowhere": (lambda folder: [*_volume(folder, MASK), "--background", "9"], "background = 9"),
    "config that cannot be written": (lambda folder: [*_volume(folder, MASK), "--out", "em.tif/my.toml"], "em.tif/my.toml"),
}  # fmt: skip
CASES |= {name: make for name, (make, _) in MADE.items()}
SAID |= {name: said for name, (_, said) in MADE.items()}
