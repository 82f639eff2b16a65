"""Finished and unfinished runs of which a file is not what was written."""

import json
from functools import partial

SEGMENT, VERIFY, EVALUATE = ("segment", "run.zarr"), ("verify", "run.zarr"), ("evaluate", "run.zarr", "labels.tif")
REVIEW, CLEAN, REPAIR = ("review", "run.zarr"), ("clean", "run.zarr"), ("repair", "run.zarr")
CALIBRATE = ("calibrate", "run.zarr", "labels.tif")


def _file(folder, key, data, command):
    path = folder / "run.zarr" / key
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data(path.read_bytes()) if callable(data) else data)
    return list(command)


def _json(change):
    """A change of the JSON in a file."""

    def changed(data):
        plain = json.loads(data)
        change(plain)
        return json.dumps(plain).encode()

    return changed


def put(*path_and_value):
    """The value at a path of keys is another one."""
    *path, last, value = path_and_value

    def change(plain):
        for key in path:
            plain = plain[key]
        plain[last] = value

    return _json(change)


def half(data):
    return data[: len(data) // 2]


SUMMARY, DESCRIPTION = "run.json", "work/run.json"
DAMAGES = {
    "summary empty": (SUMMARY, b"", VERIFY, "run.json"),
    "summary cut short": (SUMMARY, half, SEGMENT, "run.json"),
    "summary a list": (SUMMARY, b"[]", VERIFY, "another version"),
    "summary nested without end": (SUMMARY, b"[" * 50_000, CLEAN, "run.json"),
    "summary of digits without end": (SUMMARY, b'{"format": ' + b"9" * 50_000 + b"}", VERIFY, "run.json"),
    "summary that is no text": (SUMMARY, b"\xff\xfe\x80", REVIEW, "run.json"),
    "summary of another format": (SUMMARY, put("format", 99), VERIFY, "another version"),
    "summary without a source": (SUMMARY, put("source", None), VERIFY, "run.json"),
    "summary with a source of words": (SUMMARY, put("source", "em"), VERIFY, "run.json"),
    "summary with settings of words": (SUMMARY, put("config", "none"), VERIFY, "run.json"),
    "summary with an unknown setting": (SUMMARY, put("config", "stitch", {"sede": 1}), VERIFY, "run.json"),
    "summary with a block of 0": (SUMMARY, put("block", [0, 0, 0]), VERIFY, "run.json"),
    "summary with a block of words": (SUMMARY, put("block", "large"), VERIFY, "run.json"),
    "summary with a shape beyond 2^53": (SUMMARY, put("source", "shape", [10**9] * 3), VERIFY, "run.json"),
    "description empty": (DESCRIPTION, b"", SEGMENT, "work/run.json"),
    "description cut short": (DESCRIPTION, half, SEGMENT, "work/run.json"),
    "description a list": (DESCRIPTION, b"[]", SEGMENT, "another version"),
    "description nested without end": (DESCRIPTION, b"[" * 50_000, SEGMENT, "work/run.json"),
    "description of another format": (DESCRIPTION, put("format", "x"), SEGMENT, "another version"),
    "description without blocks": (DESCRIPTION, put("block", None), SEGMENT, "work/run.json"),
    "description with a block below 1": (DESCRIPTION, put("block", [-1, 8, 8]), SEGMENT, "work/run.json"),
    "description with settings of words": (DESCRIPTION, put("config", 7), SEGMENT, "work/run.json"),
    "description with heads of words": (DESCRIPTION, put("channels", "none"), SEGMENT, "work/run.json"),
    "labels cut out of the metadata": ("labels/instances/0/zarr.json", b"{}", EVALUATE, "labels/instances/0"),
    "labels without metadata": ("labels/instances/0/zarr.json", None, EVALUATE, "labels/instances"),
    "table of objects of noise": ("tables/objects.parquet", b"noise" * 50, VERIFY, "objects.parquet"),
    "table of objects empty": ("tables/objects.parquet", b"", REPAIR, "objects.parquet"),
    "table of objects gone": ("tables/objects.parquet", None, VERIFY, "objects.parquet"),
    "table of joins of noise": ("tables/merges.parquet", b"PAR1" * 9, REVIEW, "table of merges"),
    "table of joins cut short": ("tables/merges.parquet", half, REVIEW, "table of merges"),
    "probabilities of other metadata": ("0/zarr.json", b"[]", REPAIR, "0"),
    "calibrated on labels that are not there": (
        SUMMARY, lambda data: data, ("calibrate", "run.zarr", "none.tif"), "none.tif",
    ),
    "calibrated outside": (
        SUMMARY, lambda data: data, (*CALIBRATE, "--box", "0:99,0:9,0:9"), "0:99",
    ),
    "decided with another network's setting": (
        SUMMARY, lambda data: data, (*SEGMENT, "--set", "predict.tile=64"), "segment cannot change",
    ),
    "decided into another folder": (SUMMARY, lambda data: data, (*SEGMENT, "--out", "o.zarr"), "leave out --out"),
    "a run given as a volume": (SUMMARY, lambda data: data, ("infer", "run.zarr"), "run.zarr"),
    "a run given as a volume to a plan": (SUMMARY, lambda data: data, ("plan", "run.zarr"), "run.zarr"),
}  # fmt: skip
CASES = {name: partial(_file, key=key, data=data, command=command) for name, (key, data, command, _) in DAMAGES.items()}
MADE_WHOLE = {"summary cut short", "table of objects empty", "probabilities of other metadata"}
SAID = {name: said for name, (*_, said) in DAMAGES.items()}
