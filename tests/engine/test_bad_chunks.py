"""What cannot be decoded, filled with 0 where that is asked for: whole chunks, so the same for all blocks."""

import html
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

import volseg
from tests.helpers import Quiet, digest, segment_here, settings
from volseg import api
from volseg.box import Blocks, Box
from volseg.config import Input
from volseg.errors import IncompleteRunError, UserError
from volseg.io import arrays, volume
from volseg.io.filling import recording_filled

SHAPE, CHUNK = (12, 96, 128), (4, 32, 64)
BLOCKS = {"whole": {}, "cut": {"shape": (3, 48, 128)}}
SKIP = {"on_bad_chunk": "skip", "voxel_size_nm": (5, 5, 5)}


@pytest.fixture(scope="module")
def voxels(image):
    """Part of the synthetic volume."""
    return volume.open(image).read(Box((2, 10, 20), (14, 106, 148)))


def spoil(file, start=0):
    """Bytes in the middle of the file are others."""
    data = bytearray(file.read_bytes())
    middle = start or len(data) // 2
    data[middle : middle + 40] = b"\xff" * 40
    file.write_bytes(data)


def zarr_volume(path, data, shard):
    arrays.create_group(path)
    arrays.create_array(str(path), "0", shape=data.shape, dtype=data.dtype, chunk=CHUNK, shard=shard, axes="zyx")
    arrays.open_array(str(path), "0")[:] = data


def with_bad_chunk(folder, data):
    """One chunk of a zarr array."""
    zarr_volume(folder / "em.zarr", data, CHUNK)
    spoil(folder / "em.zarr/0/c/1/2/0")
    return folder / "em.zarr/0", ["4:8,64:96,0:64"]


def with_bad_piece_of_a_shard(folder, data):
    """One chunk inside a shard: its neighbors in there are read."""
    zarr_volume(folder / "em.zarr", data, (12, 96, 128))
    file = folder / "em.zarr/0/c/0/0/0"
    index = np.frombuffer(file.read_bytes()[-(18 * 16 + 4) : -4], "<u8").reshape(3, 3, 2, 2)
    offset, size = index[1, 2, 0]
    spoil(file, int(offset + size // 2))
    return folder / "em.zarr/0", ["4:8,64:96,0:64"]


def with_bad_shard(folder, data):
    """A shard without an index: none of its chunks can be found."""
    zarr_volume(folder / "em.zarr", data, (4, 32, 128))
    spoil(folder / "em.zarr/0/c/1/2/0", (folder / "em.zarr/0/c/1/2/0").stat().st_size - 30)
    return folder / "em.zarr/0", ["4:8,64:96,0:64", "4:8,64:96,64:128"]


def with_bad_page(folder, data):
    """A strip of a page of a TIFF file."""
    tifffile.imwrite(folder / "em.tif", data, compression="zlib", rowsperstrip=32)
    with tifffile.TiffFile(folder / "em.tif") as tif:
        offset = tif.pages[5].dataoffsets[1]
    spoil(folder / "em.tif", offset + 200)
    return folder / "em.tif", ["5:6,32:64,0:128"]


def with_bad_slice(folder, data):
    """A PNG that ends early."""
    from PIL import Image

    (folder / "slices").mkdir()
    for z, section in enumerate(data):
        Image.fromarray(section).save(folder / f"slices/s{z:03}.png")
    file = folder / "slices/s006.png"
    file.write_bytes(file.read_bytes()[:3000])
    return folder / "slices", ["6:7,0:96,0:128"]


KINDS = [with_bad_chunk, with_bad_piece_of_a_shard, with_bad_shard, with_bad_page, with_bad_slice]


@pytest.mark.parametrize("damaged", KINDS)
def test_what_cannot_be_decoded_is_0_however_it_is_read(voxels, tmp_path, damaged):
    path, bad = damaged(tmp_path, voxels)
    expected = voxels.copy()
    for box in bad:
        expected[Box.parse(box).slices] = 0
    opened = volume.open_input(path, Input(on_bad_chunk="skip"))
    with recording_filled() as filled:
        assert (opened.read(Box.from_shape(SHAPE)) == expected).all()
    assert sorted(str(box) for _, box in filled) == bad
    for box in (Box((5, 70, 3), (6, 71, 9)), Box((3, 20, 50), (9, 90, 100)), Box((0, 0, 0), (2, 96, 128))):
        assert (opened.read(box) == expected[box.slices]).all()
    with pytest.raises(UserError, match=r"cannot read .*or go on with 0 in its place: --set input\.on_bad_chunk=skip"):
        volume.open(path).read(Box.from_shape(SHAPE))


def test_a_conversion_tells_what_it_filled(voxels, tmp_path):
    path, bad = with_bad_chunk(tmp_path, voxels)
    quiet = Quiet()
    made = volseg.convert(path, tmp_path / "out.zarr", settings=["input.on_bad_chunk=skip"], progress=quiet)
    assert not made.read(Box.parse(bad[0])).any()
    assert any(line.startswith("filled ") and bad[0] in line for line in quiet.said)
    assert json.loads((tmp_path / "out.zarr/convert.json").read_text())["filled"] == bad


def test_labels_do_not_depend_on_blocks(voxels, tmp_path):
    path, bad = with_bad_chunk(tmp_path, voxels)
    digests = set()
    for name, shape in BLOCKS.items():
        config = settings(input=SKIP, blocks=shape, cluster={"workers": 1}, stitch={"min_voxels": 5})
        run = api.infer(path, tmp_path / f"{name}.volseg.zarr", config=config, progress=Quiet())
        assert list(run.summary["filled_boxes"].values()) == [bad]
        assert any(line.startswith("filled ") and bad[0] in line for line in run.report())
        digests.add(digest(run.path))
    assert len(digests) == 1
    api.clean(run)
    run = api.segment(run, recompute=True, progress=Quiet())
    assert list(run.summary["filled_boxes"].values()) == [bad]
    assert digest(run.path) in digests


@pytest.mark.parametrize("damaged", [with_bad_piece_of_a_shard, with_bad_shard, with_bad_page])
def test_labels_of_probabilities_do_not_depend_on_blocks(voxels, tmp_path, damaged):
    path, _ = damaged(tmp_path, voxels)
    digests = set()
    for name, shape in BLOCKS.items():
        config = settings(input=SKIP, blocks=shape, stitch={"min_voxels": 5}, probabilities={"inverted": ["mask"]})
        digests.add(digest(segment_here(path, tmp_path / f"{name}.volseg.zarr", config).path))
    assert len(digests) == 1


def test_inverted_probabilities_are_0_where_nothing_is_known(voxels, tmp_path):
    path, _ = with_bad_chunk(tmp_path, voxels)
    config = settings(
        input={"on_bad_chunk": "skip"}, probabilities={"mask_channel": 0, "inverted": ["mask"]}, cluster={"workers": 1}
    )
    run = api.segment(path, tmp_path / "run.volseg.zarr", config=config, progress=Quiet())
    mask = run.probabilities[0]
    assert not mask[4:8, 64:96, :64].any()
    assert (mask[:4] == 255 - voxels[:4]).all()


def test_an_unfinished_run_goes_on_with_0_in_the_place_of_a_bad_chunk(voxels, tmp_path):
    """What is done is kept, and what the message says is enough to go on."""
    data = np.tile(voxels, (1, 4, 3))
    zarr_volume(tmp_path / "map.zarr", data, CHUNK)
    grid = Blocks(data.shape, CHUNK)
    i = next(i for i, box in enumerate(grid) if not any(box.intersect(p).voxels for p in volume.patches(data.shape)))
    spoil(Path(tmp_path, "map.zarr/0/c", *map(str, grid.coords(i))))

    def again(show, retry_failed=True, **given):
        tables = {"blocks": {"shape": (4, 96, 128)}, "cluster": {"workers": 1, "tries": 1}, "input": given}
        return api.segment(
            tmp_path / "map.zarr/0",
            tmp_path / "run",
            config=settings(**tables),
            progress=show,
            retry_failed=retry_failed,
        )

    with pytest.raises(IncompleteRunError, match=r"import failed in block .*c/.*on_bad_chunk=skip.*work/failed\.json"):
        again(Quiet())
    failed = json.loads((tmp_path / "run.partial/work/failed.json").read_text())["failed"]
    assert [Box.parse(entry["box"]).intersect(grid[i]).voxels for entry in failed] == [grid[i].voxels]
    page = (tmp_path / "run.partial/report.html").read_text()
    assert "1 block failed, and all that could be done without is done" in page
    assert failed[0]["box"] in page
    assert html.escape(failed[0]["reason"]) in page
    show = Quiet()
    with pytest.raises(IncompleteRunError, match="import failed in block"):
        again(show, retry_failed=False)
    assert any(f"report   {tmp_path / 'run.partial/report.html'}: what failed" in text for text in show.said)
    assert any("1 block(s) failed before" in text and "leaving them, doing the rest" in text for text in show.said)
    assert json.loads((tmp_path / "run.partial/work/failed.json").read_text())["failed"] == failed
    run = again(show, on_bad_chunk="skip")
    assert any("trying them again (--skip-failed leaves them)" in text for text in show.said)
    assert show.stages["import"][0] > 0
    assert list(run.summary["filled_boxes"].values()) == [[str(grid[i])]]
    assert not (tmp_path / "run/work/failed.json").exists()
