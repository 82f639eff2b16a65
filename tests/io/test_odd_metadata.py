"""Metadata as many programs write them, or as nobody should: read as meant, read as absent and told, or refused in a line."""

import json
import time

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.io.helpers import SHAPE, assert_reads, read_or_refused, refused, voxels, write_zarr
from volseg.box import Box
from volseg.config import Input
from volseg.io import files, ome, roi, volume

STEP = {"type": "scale", "scale": [8, 4, 4]}
NM = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
SIZE = (8.0, 4.0, 4.0)


def write_image(path, data, version="0.4", **image):
    """An OME-Zarr image of one level whose metadata are ``image``, a name of which may be left out with None."""
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    group.create_array("0", data=data, chunks=(2, 16, 16))
    facts = {"axes": NM, "datasets": [{"path": "0", "coordinateTransformations": [STEP]}], **image}
    listed = {"multiscales": [{name: value for name, value in facts.items() if value != "left out"}]}
    group.attrs.update({"ome": {"version": "0.5", **listed}} if version == "0.5" else listed)
    return group


def of_level(**level):
    return {"datasets": [{"path": "0", "coordinateTransformations": [STEP], **level}]}


def scaled(*scale):
    return of_level(coordinateTransformations=[{"type": "scale", "scale": list(scale)}])


ODD = {
    "null transformations": ({"coordinateTransformations": None}, SIZE, None),
    "null in a level": (of_level(coordinateTransformations=None), None, None),
    "a number as path": (of_level(path=0), SIZE, None),
    "a dict for a list of levels": ({"datasets": of_level()["datasets"][0]}, SIZE, None),
    "a dict for a list of steps": (of_level(coordinateTransformations=STEP), SIZE, None),
    "axes of version 0.3": ({"axes": ["z", "y", "x"]}, None, "8 x 4 x 4, without a unit"),
    "no axes": ({"axes": None}, None, "8 x 4 x 4, without a unit"),
    "no unit": (
        {"axes": [{"name": name, "type": "space"} for name in "zyx"]},
        None,
        "says voxel size 8 x 4 x 4, without a unit: not used; if these are nanometers, give input.voxel_size_nm=[8,4,4]",
    ),
    "an odd unit": ({"axes": [{"name": name, "unit": "parsec"} for name in "zyx"]}, None, "in parsec: not used"),
    "a unit that is a number": ({"axes": [{"name": name, "unit": 7} for name in "zyx"]}, None, "in 7: not used"),
    "negative": (scaled(-8, 4, 4), SIZE, "-8 x 4 x 4 nanometer: taken without its sign"),
    "zero": (scaled(0, 4, 4), None, "0 x 4 x 4 nanometer, which no voxel has"),
    "absurd": (scaled(1e300, 4, 4), None, "which no voxel has"),
    "words": (scaled("thick", 4, 4), None, "odd OME metadata are left out: scale.0"),
    "of another length": (scaled(4, 4), None, "says scale 4 x 4, which does not fit its 3 axes"),
    "a dot in the path": (of_level(path="./0"), SIZE, None),
    "digits without end": (scaled(10**400, 4, 4), None, "odd OME metadata are left out: scale.0"),
    "nothing": ({"axes": "left out"}, None, "8 x 4 x 4, without a unit"),
}


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("case", ODD)
def test_odd_multiscales_are_read_as_meant_or_told(tmp_path, case, version):
    image, size, said = ODD[case]
    write_image(tmp_path / "v.zarr", voxels(), version, **image)
    for opened in (volume.open(tmp_path / "v.zarr"), volume.open(tmp_path / "v.zarr", dataset="0")):
        assert opened.voxel_size_nm == size
        assert any(said in note for note in opened.notes) if said else not opened.notes
    assert_reads(opened, voxels())
    assert volume.open(tmp_path / "v.zarr", voxel_size_nm=(1, 2, 3)).voxel_size_nm == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("multiscales", [None, 5, [], [None], "0", {}, [[]]])
def test_a_group_without_levels_is_refused_and_its_arrays_are_not(tmp_path, multiscales):
    group = write_image(tmp_path / "v.zarr", voxels())
    group.attrs["multiscales"] = multiscales
    with refused("no OME-Zarr multiscales", "arrays inside: 0"):
        volume.open(tmp_path / "v.zarr")
    opened = volume.open(tmp_path / "v.zarr", dataset="0")
    assert opened.voxel_size_nm is None
    assert_reads(opened, voxels())


def test_a_dict_for_the_list_of_images_is_that_image(tmp_path):
    group = write_image(tmp_path / "v.zarr", voxels())
    group.attrs["multiscales"] = group.attrs["multiscales"][0]
    assert volume.open(tmp_path / "v.zarr").voxel_size_nm == SIZE


def test_metadata_that_are_nested_without_end_are_refused(tmp_path):
    write_zarr(tmp_path / "v.zarr", voxels())
    text = (tmp_path / "v.zarr" / "zarr.json").read_text()
    for odd in ("[" * 100_000 + "]" * 100_000, "9" * 10_000, '{"a":' * 100_000 + "1" + "}" * 100_000):
        (tmp_path / "v.zarr" / "zarr.json").write_text(
            text.replace('"attributes": {}', f'"attributes": {{"ome": {odd}}}')
        )
        with refused("cannot open zarr", "v.zarr"):
            volume.open(tmp_path / "v.zarr")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["0", "zyx", "scale"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["path", "name", "unit", "scale"]), inner)
    ),
    max_leaves=6,
)
places = st.sampled_from(
    [
        ("multiscales",),
        ("multiscales", 0),
        ("multiscales", 0, "axes"),
        ("multiscales", 0, "axes", 1),
        ("multiscales", 0, "axes", 2, "unit"),
        ("multiscales", 0, "datasets"),
        ("multiscales", 0, "datasets", 0),
        ("multiscales", 0, "datasets", 0, "path"),
        ("multiscales", 0, "datasets", 0, "coordinateTransformations"),
        ("multiscales", 0, "datasets", 0, "coordinateTransformations", 0, "scale"),
        ("multiscales", 0, "datasets", 0, "coordinateTransformations", 0, "scale", 1),
    ]
)


@given(st.lists(st.tuples(places, json_values), min_size=1, max_size=2))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_metadata_end_in_a_traceback(tmp_path, changes):
    write_image(tmp_path / "v.zarr", voxels())
    file = tmp_path / "v.zarr" / ".zattrs"
    attributes = json.loads(file.read_text())
    for (*above, last), value in changes:
        node = attributes
        try:
            for key in above:
                node = node[key]
            node[last] = value
        except (KeyError, IndexError, TypeError):  # an earlier change took it away
            continue
    file.write_text(json.dumps(attributes))
    with read_or_refused():
        opened = volume.open(tmp_path / "v.zarr")
        assert all(note.isprintable() for note in opened.notes)
        np.testing.assert_array_equal(opened.read(Box.from_shape(SHAPE)), voxels())
    with read_or_refused():
        volume.open(tmp_path / "v.zarr", dataset="0").read(Box.from_shape(SHAPE))


@given(st.sampled_from(["shape", "chunks", "dtype", "fill_value", "order", "filters", "compressor"]), json_values)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_array_metadata_end_in_a_traceback(tmp_path, key, value):
    files.remove(tmp_path / "v.zarr")
    write_zarr(tmp_path / "v.zarr", voxels(), zarr_format=2, chunks=(2, 16, 16))
    file = tmp_path / "v.zarr" / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with read_or_refused():
        opened = volume.open(tmp_path / "v.zarr")
        if np.prod(opened.shape) < 1e7:
            opened.read(Box.from_shape(opened.shape))


ABSURD = {
    "huge": ([10**12, 10**12, 10**6], [10**12, 10**12, 10**6], "voxels: its metadata"),
    "many chunks": ([10**7] * 3, [1, 1, 1], "voxels: its metadata"),
    "huge chunks": ([10, 10, 10], [10**9] * 3, "a chunk of"),
    "digits": ([10**4000, 1, 1], [1, 1, 1], "v.zarr"),
    "negative": ([-4, 5, 6], [1, 1, 1], "v.zarr"),
    "no chunk": ([4, 5, 6], [0, 1, 1], "v.zarr"),
    "nothing": ([4, 0, 6], [1, 1, 1], "no voxels"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_shapes_that_nobody_has_are_refused_at_once(tmp_path, case):
    shape, chunk, said = ABSURD[case]
    facts = {
        "zarr_format": 3, "node_type": "array", "shape": shape, "data_type": "uint8", "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default"}, "codecs": [{"name": "bytes"}],
    }  # fmt: skip
    (tmp_path / "v.zarr").mkdir()
    (tmp_path / "v.zarr" / "zarr.json").write_text(json.dumps(facts))
    start = time.monotonic()
    with refused("v.zarr", said):
        volume.open(tmp_path / "v.zarr")
    assert time.monotonic() - start < 20


def test_a_chunk_that_the_memory_does_not_hold_is_refused(tmp_path):
    zarr.create_array(tmp_path / "v.zarr", shape=(4, 5, 6), chunks=(10**4, 10**5, 10**5), dtype="uint8")
    with refused("a chunk of", "v.zarr", "of memory are free"):
        volume.open(tmp_path / "v.zarr").read(Box.from_shape((4, 5, 6)))


def test_names_never_steer_a_terminal(tmp_path):
    for name in ("a\x1b[31mred.zarr", "two\nlines.zarr", "back\u202ewards.tif"):
        with refused("no such file"):
            volume.open(tmp_path / name)
    write_image(tmp_path / "b\x1b[2J.zarr", voxels(), axes=[{"name": name, "unit": "\x1b[31m"} for name in "zyx"])
    (note,) = volume.open(tmp_path / "b\x1b[2J.zarr").notes
    assert note.isprintable()
    assert r"\x1b[31m" in note


def test_lengths_become_nanometers():
    assert ome.voxel_size_nm((1, 2, 3), ("cm", "inch", "µm"), "v") == ((1e7, 5.08e7, 3e3), ())
    assert ome.voxel_size_nm((1, 1, 1), ("pixel", "pixel", "pixel"), "v") == (None, ())
    assert ome.voxel_size_nm((None, None, None), ("", "", ""), "v") == (None, ())


# -------------------------------------------------------------------------------------------------- where nothing is stored


@pytest.mark.parametrize("options", [{}, {"zarr_format": 2}, {"shards": (4, 32, 32)}, {"fill_value": 7}])
def test_an_array_without_a_chunk_is_told(tmp_path, options):
    fill = options.get("fill_value", 0)
    zarr.create_array(tmp_path / "v.zarr", shape=SHAPE, dtype="uint8", chunks=(2, 16, 16), **options)
    opened = volume.open(tmp_path / "v.zarr")
    (note,) = opened.notes
    assert f"v.zarr stores no chunk: every voxel is its fill value, {fill}" in note
    assert_reads(opened, np.full(SHAPE, fill, np.uint8))
    array = zarr.open_array(tmp_path / "v.zarr")
    array[4:, 39:, 32:] = 9
    assert volume.open(tmp_path / "v.zarr").notes == ()


def test_an_array_without_a_chunk_on_an_object_store_is_told(bucket):
    zarr.create_array(f"{bucket}/shell.zarr", shape=SHAPE, dtype="uint8", chunks=(2, 16, 16))
    write_zarr(f"{bucket}/full.zarr", voxels(), chunks=(2, 16, 16))
    assert "stores no chunk" in volume.open(f"{bucket}/shell.zarr").notes[0]
    assert volume.open(f"{bucket}/full.zarr").notes == ()


def write_nested(path, data, **options):
    """Chunks in folders, of which the metadata of zarr 2 do not tell: so the first of its stores for them did."""
    keys = {"name": "v2", "separator": "/"}
    write_zarr(path, data, zarr_format=2, chunks=(2, 16, 16), chunk_key_encoding=keys, **options)
    facts = json.loads(files.read_bytes(str(path), ".zarray"))
    facts.pop("dimension_separator")
    files.write_bytes(str(path), ".zarray", json.dumps(facts).encode())


@pytest.mark.parametrize("dtype", ["uint8", ">u2"])
def test_chunks_in_folders_are_found(tmp_path, dtype):
    data = voxels(dtype)
    write_nested(tmp_path / "v.zarr", data)
    opened = volume.open(tmp_path / "v.zarr")
    assert opened.notes == ()
    assert_reads(opened, data.astype(opened.dtype))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("said", ["/", "."])
def test_chunks_whose_keys_are_separated_otherwise_are_found(tmp_path, version, said):
    keys = {"name": "v2" if version == 2 else "default", "separator": {"/": ".", ".": "/"}[said]}
    write_zarr(tmp_path / "v.zarr", voxels(), zarr_format=version, chunks=(2, 16, 16), chunk_key_encoding=keys)
    document = tmp_path / "v.zarr" / (".zarray" if version == 2 else "zarr.json")
    facts = json.loads(document.read_text())
    if version == 2:
        facts["dimension_separator"] = said
    else:
        facts["chunk_key_encoding"]["configuration"]["separator"] = said
    document.write_text(json.dumps(facts))
    assert_reads(volume.open(tmp_path / "v.zarr"), voxels())


def test_chunks_in_folders_on_an_object_store_are_found(bucket):
    write_nested(f"{bucket}/nested.zarr", voxels())
    opened = volume.open(f"{bucket}/nested.zarr")
    assert opened.notes == ()
    assert_reads(opened, voxels())


@pytest.mark.parametrize("dtype", ["uint8", ">u2"])
def test_a_chunk_that_is_a_link_to_nowhere_is_damaged(tmp_path, dtype):
    write_zarr(tmp_path / "v.zarr", voxels(dtype), zarr_format=2, chunks=(2, 16, 16))
    (tmp_path / "v.zarr" / "1.0.0").unlink()
    (tmp_path / "v.zarr" / "1.0.0").symlink_to("annex/1")
    with refused("1.0.0", "link to annex/1", "damaged"):
        volume.open(tmp_path / "v.zarr").read(Box.from_shape(SHAPE))


def test_a_mask_of_zeros_is_told(tmp_path):
    write_zarr(tmp_path / "mask.zarr", np.zeros(SHAPE, np.uint8))
    region = roi.find(Input(mask=str(tmp_path / "mask.zarr")), SHAPE, None)
    assert "wanted are 0 voxels" in str(region)
    assert "nothing is left to segment" in str(region)
    assert "stores no chunk" in region.mask.notes[0]


@pytest.mark.parametrize(
    ("offset", "origin"), [((100, 0, 0), (100, 0, 0)), ((0, -7.5, 3), (0, -7.5, 3)), ((4, 2), (0, 0, 0))]
)
@pytest.mark.parametrize("of_image", [False, True])
def test_a_volume_that_begins_elsewhere_lies_there(tmp_path, offset, origin, of_image):
    moved = {"type": "translation", "translation": list(offset)}
    datasets = [{"path": "0", "coordinateTransformations": [STEP] if of_image else [STEP, moved]}]
    write_image(
        tmp_path / "v.zarr", voxels(), datasets=datasets, coordinateTransformations=[moved] if of_image else None
    )
    opened = volume.open(tmp_path / "v.zarr")
    assert opened.voxel_size_nm == SIZE
    assert opened.origin_nm == origin


def test_translations_of_an_image_and_of_its_level_are_taken_in_their_order(tmp_path):
    """The image's scale moves what its level's translation says, too."""
    steps = [{"type": "scale", "scale": [8, 4, 4]}, {"type": "translation", "translation": [16, 0, 4]}]
    whole = [{"type": "scale", "scale": [1, 1, 2]}, {"type": "translation", "translation": [0, 5, 1]}]
    datasets = [{"path": "0", "coordinateTransformations": steps}]
    write_image(tmp_path / "v.zarr", voxels(), datasets=datasets, coordinateTransformations=whole)
    opened = volume.open(tmp_path / "v.zarr")
    assert opened.voxel_size_nm == (8, 4, 8)
    assert opened.origin_nm == (16, 5, 9)


def test_the_finest_level_is_read_where_it_is_not_the_first(tmp_path):
    coarse = {"path": "1", "coordinateTransformations": [{"type": "scale", "scale": [16, 8, 8]}]}
    fine = {"path": "0", "coordinateTransformations": [STEP]}
    group = write_image(tmp_path / "v.zarr", voxels(), datasets=[coarse, fine])
    group.create_array("1", data=voxels()[::2, ::2, ::2], chunks=(2, 16, 16))
    opened = volume.open(tmp_path / "v.zarr")
    assert_reads(opened, voxels())
    assert opened.voxel_size_nm == SIZE
    assert ["finest level first: 0 is read" in note for note in opened.notes] == [True]
    assert_reads(volume.open(tmp_path / "v.zarr", dataset="1"), voxels()[::2, ::2, ::2])
    unknown = {"path": "0"}
    write_image(tmp_path / "w.zarr", voxels(), datasets=[unknown, coarse])
    assert_reads(volume.open(tmp_path / "w.zarr"), voxels())
