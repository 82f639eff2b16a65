"""Arrays of a run: written in whole shards by many, read back whole."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.io.helpers import cut_short, make_run, refused, voxels
from volseg.box import Blocks, Box
from volseg.io import arrays, files, volume

shapes = st.tuples(st.integers(1, 20), st.integers(1, 60), st.integers(1, 60))


@given(shapes, shapes, shapes, st.sampled_from(["uint8", "uint32", "uint64"]), st.integers(1, 2))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_written_alone_read_back_whole(tmp_path, shape, shard, chunk, dtype, channels):
    run = tmp_path / "run.zarr"
    files.remove(run)
    lead, name = ((channels,), "0") if channels > 1 else ((), "labels/instances/0")
    arrays.create_array(
        run,
        name,
        shape=lead + shape,
        dtype=dtype,
        chunk=(1,) * len(lead) + chunk,
        shard=lead + shard,
        axes="czyx"[1 - len(lead) :],
    )
    data = voxels(dtype, lead + shape)
    array = arrays.open_array(run, name)
    for box in Blocks(shape, shard):
        arrays.write(array, box, data[(..., *box.slices)])
    np.testing.assert_array_equal(arrays.open_array(run, name)[...], data)
    assert array.shards == lead + shard
    assert array.metadata.dimension_names == tuple("czyx"[1 - len(lead) :])


@given(shapes, shapes)
@settings(deadline=None)
def test_fitted_chunks_divide_their_shard(chunk, shard):
    assert all(s % c == 0 for c, s in zip(arrays.fit_chunk(chunk, shard), shard, strict=True))


def test_chunks_fit_awkward_shards():
    assert arrays.fit_chunk((32, 256, 256), (37, 50, 192)) == (37, 50, 192)
    assert arrays.fit_chunk((32, 256, 256), (1, 1024, 1000)) == (1, 256, 250)
    assert arrays.fit_chunk((32, 256, 256), (64, 1009, 768)) == (32, 1009, 256)


def make_labels(path, shape=(20, 30, 40), shard=(8, 16, 40)):
    arrays.create_array(path, "labels/instances/0", shape=shape, dtype="uint32", chunk=(4, 16, 16), shard=shard)
    return arrays.open_array(path, "labels/instances/0")


def test_a_write_that_cuts_a_shard_is_refused(tmp_path):
    array = make_labels(tmp_path / "run.zarr")
    for box in (
        Box((0, 0, 0), (4, 16, 40)),
        Box((4, 0, 0), (8, 16, 40)),
        Box((0, 0, 0), (8, 16, 39)),
        Box((16, 16, 0), (24, 30, 40)),
    ):
        with pytest.raises(ValueError, match=r"cuts shards of 8 x 16 x 40.*one task writes whole shards"):
            arrays.write(array, box, np.zeros(box.shape, np.uint32))
    with pytest.raises(ValueError, match="does not fill box"):
        arrays.write(array, Box((0, 0, 0), (8, 16, 40)), np.zeros((8, 16, 39), np.uint32))
    arrays.write(array, Box((16, 16, 0), (20, 30, 40)), np.ones((4, 14, 40), np.uint32))
    arrays.write(array, Box((0, 0, 0), (16, 16, 40)), np.ones((16, 16, 40), np.uint32))


def test_a_write_of_some_channels_is_refused(tmp_path):
    arrays.create_array(
        tmp_path / "r.zarr", "0", shape=(2, 4, 8, 8), dtype="uint8", chunk=(1, 4, 8, 8), shard=(1, 4, 8, 8)
    )
    with pytest.raises(ValueError, match="whole shards"):
        arrays.write(
            arrays.open_array(tmp_path / "r.zarr", "0"), Box.from_shape((4, 8, 8)), np.zeros((1, 4, 8, 8), np.uint8)
        )


@pytest.mark.parametrize("box", [Box((0, 0, 0), (8, 16, 40)), Box((16, 16, 0), (20, 30, 40))])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_torn_shard_can_be_written_again(tmp_path, box, share):
    array = make_labels(tmp_path / "run.zarr")
    data = voxels("uint32", box.shape)
    arrays.write(array, box, data)
    shards = files.list_keys(tmp_path / "run.zarr", "labels/instances/0/c")
    assert len(shards) == 1
    cut_short(tmp_path / "run.zarr" / shards[0], share)
    with refused("labels/instances/0", shards[0].removeprefix("labels/instances/0/")):
        volume.open(tmp_path / "run.zarr", dataset="labels/instances/0").read(box)
    arrays.write(array, box, data)
    np.testing.assert_array_equal(array[box.slices], data)


def test_a_flipped_bit_in_a_run_is_found(tmp_path):
    array = make_labels(tmp_path / "run.zarr")
    arrays.write(array, Box((0, 0, 0), (8, 16, 40)), voxels("uint32", (8, 16, 40)))
    file = tmp_path / "run.zarr" / files.list_keys(tmp_path / "run.zarr", "labels/instances/0/c")[0]
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 1
    file.write_bytes(raw)
    with refused("box 0:20,0:30,0:40", "c/0/0/0"):
        volume.open(tmp_path / "run.zarr", dataset="labels/instances/0").read(Box.from_shape((20, 30, 40)))


def test_blocks_written_again_as_background_are_background(tmp_path):
    array = make_labels(tmp_path / "run.zarr")
    box = Box((0, 0, 0), (8, 16, 40))
    arrays.write(array, box, np.full(box.shape, 7, np.uint32))
    arrays.write(array, box, np.zeros(box.shape, np.uint32))
    assert not array[box.slices].any()


def test_an_array_is_never_replaced_and_is_opened_anew_after_removal(tmp_path):
    first = make_labels(tmp_path / "run.zarr")
    with refused("exists", "remove it"):
        make_labels(tmp_path / "run.zarr")
    assert arrays.open_array(tmp_path / "run.zarr", "labels/instances/0") is first
    files.remove(tmp_path / "run.zarr")
    assert make_labels(tmp_path / "run.zarr", shape=(9, 9, 9)).shape == (9, 9, 9)


def test_threads_may_open_and_write_at_once(tmp_path):
    make_labels(tmp_path / "run.zarr")
    data = voxels("uint32", (20, 30, 40))

    def task(box):
        arrays.write(arrays.open_array(tmp_path / "run.zarr", "labels/instances/0"), box, data[box.slices])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(task, Blocks((20, 30, 40), (8, 16, 40))))
    np.testing.assert_array_equal(arrays.open_array(tmp_path / "run.zarr", "labels/instances/0")[...], data)


def test_ome_attributes_are_those_of_the_standard(tmp_path):
    make_run(tmp_path / "run.zarr", voxels("uint32", (20, 30, 40)))
    ome = arrays.group_attributes(tmp_path / "run.zarr", "labels/instances")["ome"]
    assert ome["version"] == "0.5"
    assert ome["image-label"] == {"source": {"image": "../../"}}
    (image,) = ome["multiscales"]
    assert image["axes"][0] == {"name": "z", "type": "space", "unit": "nanometer"}
    assert image["datasets"][1] == {
        "path": "1",
        "coordinateTransformations": [
            {"type": "scale", "scale": [50.0, 10.0, 10.0]},
            {"type": "translation", "translation": [0.0, 2.5, 2.5]},
        ],
    }
    (image,) = arrays.group_attributes(tmp_path / "run.zarr")["ome"]["multiscales"]
    assert image["axes"][0] == {"name": "c", "type": "channel"}
    assert image["datasets"][0]["coordinateTransformations"][0]["scale"] == [1.0, 50.0, 5.0, 5.0]
    assert "image-label" not in arrays.group_attributes(tmp_path / "run.zarr")["ome"]


def test_attributes_are_added_to_those_that_exist(tmp_path):
    arrays.create_group(tmp_path / "run.zarr" / "labels")
    arrays.set_group_attributes(tmp_path / "run.zarr", "labels", {"a": 1, "b": 2})
    arrays.set_group_attributes(tmp_path / "run.zarr", "labels", {"b": 3})
    arrays.create_group(tmp_path / "run.zarr" / "labels")
    assert arrays.group_attributes(tmp_path / "run.zarr", "labels") == {"a": 1, "b": 3}
