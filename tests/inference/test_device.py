"""One shape of code cuts, blends and rounds numpy arrays and torch's tensors, to the same bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.helpers import CARD, SMALL, settings, write_volume
from volseg.box import Box
from volseg.engine import folder, predict
from volseg.engine.receipt import Timings
from volseg.engine.shares import Share
from volseg.errors import OutOfMemoryError
from volseg.inference import backends, export, hardware, model, tiles
from volseg.inference.device import NUMPY, TorchDevice, as_cuda_graph, is_out_of_memory, out_of_memory_as, row_by_row
from volseg.inference.normalization import scale, standardized
from volseg.io import files, volume
from volseg.planning import prepare as describe

SHAPE = (4, 70, 90)  # of tiles of 64: two along y, two along x
HEADS = ("mask", "contour", "distance")
needs_gpu = pytest.mark.skipif(not hardware.gpu_count(), reason="no CUDA device here")


def network(path, heads, binning=1):
    """A file of a network that knows nothing, whose probabilities are spread over 0 to 1."""
    torch.manual_seed(len(heads))
    made = model.build(model.PRETRAINED, SMALL, 3, heads, binning=binning).eval()
    with torch.no_grad():
        made.segmentation_head[0].weight *= 20
    model.save(path, made, CARD.changed(heads=heads, binning=binning))
    return str(path)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Networks by their number of heads."""
    where = tmp_path_factory.mktemp("networks")
    return {count: network(where / f"{count}.safetensors", HEADS[:count]) for count in (2, 3)}


@pytest.fixture(scope="module")
def em(tmp_path_factory):
    """Noise of 16 bits, gray all over in the last tile of most sections. Tests must not change it."""
    noise = np.random.default_rng(0).integers(1, 60000, SHAPE).astype(np.uint16)
    noise[1:, :, 26:] = 700
    noise[1:, :10, 26:] = 700
    return write_volume(str(tmp_path_factory.mktemp("em") / "em.zarr"), noise)


def begun(em, networks, out, heads, **predict):
    """A run by torch in float32 that was begun."""
    options = {"tile": 64, "overlap": 16, "backend": "torch", "precision": "fp32", "model": networks[heads], **predict}
    run = describe.from_image(volume.open(em), settings(predict=options), str(out))
    folder.begin(run, overwrite=False)
    return run


def infer(run, plane, box, wanted=None):
    """What a block that stands alone holds, channels and then the axes of the pass, and the facts of its receipt."""
    share = Share(run, plane, box)
    inference = predict.Inference(share, Timings())
    if wanted is not None:
        first = share.part.start[0]
        inference._mask = lambda piece: wanted[piece.start - first : piece.stop - first]
    out = inference.run(box)
    return out.transpose(0, *(1 + a for a in tiles.PLANES[plane])), inference.end()


def plainly(run, plane, box, wanted):
    """What a block holds, told a second time in numpy: a tile after the other, nothing shared with what is tested."""
    axes, grid = tiles.PLANES[plane], run.tile_grid(plane)
    image = run.source.read(Box.from_shape(run.shape)).transpose(axes)
    depth, rows, columns = image.shape
    turned = box.transpose(axes)
    out = np.zeros((len(run.heads), depth, rows, columns), np.uint8)
    kept = []
    for z in range(turned.start[0], turned.stop[0]):
        for tile in grid.overlapping(*turned.slices[1:]):
            y, x = grid.place(tile)
            seen = np.stack([image[min(max(n, 0), depth - 1), y, x] for n in (z - 1, z, z + 1)])
            one, own, other = (len(np.unique(section)) == 1 for section in seen)
            if own and (one or other):
                continue
            seen[1] = seen[0] if own else seen[1]
            seen[0], seen[2] = seen[1] if one else seen[0], seen[1] if other else seen[2]
            past = [(0, 0), (0, grid.size[0] - seen.shape[1]), (0, grid.size[1] - seen.shape[2])]
            asked = np.zeros((rows, columns), bool)
            asked[turned.slices[1:]] = True if wanted is None else wanted[z - turned.start[0]]
            if (seen != seen[0, 0, 0]).any() and asked[y, x].any():
                gray = np.pad(seen, past, mode="symmetric").astype(np.float32)
                kept.append((z, tile, (gray - np.float32(run.mean)) * np.float32(1 / run.std)))
    size = (run.batch, run.sections, *grid.size)
    blob = files.read_bytes(run.out, "work/model.bin")
    calls = {s: backends.load(blob, "torch", "fp32", (*size[:2], *s)) for s in {size[2:], size[:1:-1]}}
    total = np.zeros(out.shape, np.float32)
    for first in range(0, len(kept), run.batch):
        batch = np.zeros(size, np.float32)
        some = kept[first : first + run.batch]
        for row, (_, _, gray) in zip(batch, some, strict=False):
            row[:] = gray
        looks = np.float32(0)
        for way in range(run.config.predict.tta):
            across, down, along = way // 4, way // 2 % 2, way % 2
            laid = batch.swapaxes(-1, -2) if across else batch
            laid = np.ascontiguousarray(laid[..., :: -1 if down else 1, :: -1 if along else 1])
            found = calls[laid.shape[2:]](laid)[..., :: -1 if down else 1, :: -1 if along else 1]
            looks = looks + (found.swapaxes(-1, -2) if across else found)
        looks = looks * np.float32(1 / run.config.predict.tta)
        for (z, tile, _), probability in zip(some, looks, strict=False):
            y, x = grid.place(tile)
            weight = grid.y.weights(tile[0])[:, None] * grid.x.weights(tile[1])[None]
            target = total[:, z, y, x]
            target += (probability * weight)[:, : target.shape[1], : target.shape[2]]
    shared = np.zeros((rows, columns), np.float32)
    for tile in grid.overlapping(slice(0, rows), slice(0, columns)):
        target = shared[grid.place(tile)]
        weight = grid.y.weights(tile[0])[:, None] * grid.x.weights(tile[1])[None]
        target += weight[: target.shape[0], : target.shape[1]]
    blended = np.clip(total / shared, 0, 1) * np.float32(255) + np.float32(0.5)
    found = blended.astype(np.uint8)[(slice(None), *turned.slices)]
    return found if wanted is None else found * wanted


@pytest.mark.parametrize(
    ("heads", "plane", "box", "masked", "options"),
    [
        (2, "xy", None, False, {}),
        (3, "xy", "1:4,5:70,20:61", True, {"batch": 2}),
        (3, "xz", "0:4,3:9,0:90", False, {"tta": 8, "tile": 96}),
    ],
    ids=["two heads", "three heads, a window, a mask, batches", "tiles past the end, all turns"],
)
def test_torch_makes_the_bytes_that_numpy_makes(em, networks, tmp_path, heads, plane, box, masked, options):
    run = begun(em, networks, tmp_path / "run", heads, **options)
    box = Box.parse(box) if box else Box.from_shape(run.shape)
    shape = box.transpose(tiles.PLANES[plane]).shape
    wanted = np.random.default_rng(1).random(shape) < 0.001 if masked else None
    out, facts = infer(run, plane, box, wanted)
    np.testing.assert_array_equal(out, plainly(run, plane, box, wanted))
    assert len(np.unique(out)) > 20
    assert (
        2 * box.voxels <= facts["bytes_sent"] < 4 * 2 * np.prod(SHAPE)
    )  # tiles beside constant sections by themselves
    assert facts["bytes_fetched"] == heads * box.voxels
    assert facts["device_seconds"] > 0


def test_blocks_agree_where_the_device_cuts_and_blends(em, networks, tmp_path):
    run = begun(em, networks, tmp_path / "run", 3)
    whole = infer(run, "xy", Box.from_shape(run.shape))[0]
    for box in map(Box.parse, ("0:2,0:70,0:90", "1:3,40:70,0:33", "3:4,7:9,50:90")):
        part = infer(run, "xy", box)[0]
        np.testing.assert_array_equal(part, whole[(slice(None), *box.slices)])


def test_blocks_of_a_network_that_bins_agree_and_hold_what_numpy_makes(em, tmp_path):
    """Tiles of 96 would be three squares of 32 by 32 squares of voxels: they are of 64."""
    run = begun(em, {2: network(tmp_path / "binned.safetensors", HEADS[:2], 2)}, tmp_path / "run", 2, tile=96)
    assert run.tile_grid("xy").size == (64, 64)
    box = Box.from_shape(run.shape)
    whole = infer(run, "xy", box)[0]
    assert len(np.unique(whole)) > 20
    np.testing.assert_array_equal(whole, plainly(run, "xy", box, None))
    for box in map(Box.parse, ("0:2,0:70,0:90", "1:3,40:70,0:33", "3:4,7:9,50:90")):
        part = infer(run, "xy", box)[0]
        np.testing.assert_array_equal(part, whole[(slice(None), *box.slices)])


@hypothesis_settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), overlap=st.integers(0, 20), y=st.integers(20, 90), x=st.integers(20, 90))
def test_blends_of_both_kinds_are_the_same_bits(seed, overlap, y, x):
    grid, rng = tiles.grid((y, x), 32, overlap), np.random.default_rng(seed)
    window = slice(rng.integers(0, y - 1), y), slice(rng.integers(0, x - 1), x)
    found = []
    values = {tile: rng.random((3, *grid.size), np.float32) for tile in grid.overlapping(*window)}
    for device in (NUMPY, TorchDevice("cuda:0" if hardware.gpu_count() else "cpu")):
        out = np.zeros((3, *(s.stop - s.start for s in window)), np.uint8)
        with device.stream():
            made, blend = device.empty_output(out), tiles.Blend(3, grid, *window, device)
            for tile, value in values.items():
                blend.add(tile, device.put(value))
            blend.quantize(made)
            device.copy_to_host(made, out)
        found.append(out)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"])
def test_every_kind_of_voxel_is_cut_and_standardized_to_the_same_bits(dtype):
    rng = np.random.default_rng(0)
    dtype = np.dtype(dtype)
    voxels = (
        rng.normal(100, 40, (3, 5, 9)) if dtype.kind == "f" else np.frombuffer(rng.bytes(135 * dtype.itemsize), dtype)
    )
    voxels = voxels.reshape(3, 5, 9).astype(dtype)
    place = slice(0, 32), slice(0, 32)
    wanted = standardized(np.stack([tiles.cut(voxels[n], *place) for n in (1, 2, 2)]), 101.3, 39.1)
    assert (
        wanted == standardized(np.pad(voxels[[1, 2, 2]], ((0, 0), (0, 27), (0, 23)), mode="symmetric"), 101.3, 39.1)
    ).all()
    for device in (NUMPY, TorchDevice("cuda:0" if hardware.gpu_count() else "cpu")):
        with device.stream():
            out = device.zeros((3, 32, 32))
            tiles.Slab(device.put(voxels), (0, 0, 0), 1, 3).cut(2, place, out, scale(101.3, 39.1), device)
            np.testing.assert_array_equal(device.get(out), wanted)


def test_voxels_of_the_other_byte_order_are_cut_alike():
    voxels = np.random.default_rng(0).integers(0, 60000, (3, 5, 9)).astype(">u2")
    found = [np.zeros((3, 32, 32), np.float32) for _ in range(2)]
    for kind, out in zip((voxels, voxels.astype("=u2")), found, strict=True):
        tiles.Slab(kind, (0, 0, 0), 1, 3).cut(1, (slice(0, 32), slice(0, 32)), out, scale(101.3, 39.1))
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(TorchDevice("cpu").get(TorchDevice("cpu").put(voxels)), voxels)


def test_memory_that_runs_out_is_collected_once():
    calls = []

    def call(batch):
        calls.append(len(batch))
        if len(calls) != 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return batch

    batch = torch.zeros(4, 3, 64, 96)
    assert TorchDevice("cpu").synchronized(call)(batch) is batch
    with (
        pytest.raises(OutOfMemoryError, match=r"does not hold 4 tiles \(CUDA out of memory\)"),
        out_of_memory_as("4 tiles"),
    ):
        TorchDevice("cpu").synchronized(call)(batch)
    assert calls == [4] * 4


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 18874368"), True),
        (
            RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
            False,
        ),
        (ImportError("libgomp.so.1: cannot allocate memory in static TLS block"), False),
        (RuntimeError("the shapes differ"), False),
    ],
)
def test_errors_of_a_full_memory_are_told_from_others(error, full):
    assert is_out_of_memory(error) is full
    with pytest.raises(OutOfMemoryError if full else type(error)), out_of_memory_as("a tile"):
        raise error


def test_what_is_no_lack_of_memory_is_not_tried_twice():
    calls = []

    def call(batch):
        calls.append(len(batch))
        raise RuntimeError("the shapes differ")

    with pytest.raises(RuntimeError, match="the shapes differ"):
        TorchDevice("cpu").synchronized(call)(torch.zeros(4, 3, 64, 96))
    assert calls == [4]


@pytest.mark.parametrize("device", [NUMPY, TorchDevice("cpu")], ids=["numpy", "torch"])
def test_tiles_go_through_one_by_one_where_their_bits_depend_on_the_row(device):
    """As with kernels that split their sums otherwise in each row; none of those at hand does so."""
    shape, calls = (3, 2, 8, 8), []

    def make(size):
        def call(batch):
            calls.append(len(batch))
            out = batch.sum(1)[:, None] * 0.1
            out[1:] += 1e-7 * slant
            return out

        return call

    batch = np.random.default_rng(0).random(shape, np.float32)
    for slant in (0, 1):
        calls.clear()
        with device.stream():
            found = device.get(row_by_row(make, shape, device)(device.put(batch)))
        assert calls == ([3, 3], [3, 1, 1, 1])[slant]
        assert found.shape == (3, 1, 8, 8)
        np.testing.assert_allclose(found[:, 0], batch.sum(1) * 0.1, rtol=1e-6)
        alone = [device.get(make(None)(device.put(batch[k : k + 1].copy())))[0] for k in range(3)]
        np.testing.assert_array_equal(found, alone)


@needs_gpu
@pytest.mark.parametrize(("precision", "batch"), [("fp16", 8), ("fp16", 32), ("fp32", 8)])
def test_a_tile_has_the_same_bits_in_each_row_of_a_large_batch(precision, batch):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(batch, 3, 1024, 1024)).astype(np.float32)
    call = backends.load(export.export_model(model.shipped(), "torch"), "torch", precision, rows.shape)
    found = call(rows)
    np.testing.assert_array_equal(call(rows[::-1])[::-1], found)
    rows[1:] = rng.normal(size=rows[1:].shape)
    np.testing.assert_array_equal(call(rows)[0], found[0])


@needs_gpu
def test_a_graph_gives_the_bits_of_the_plain_call(networks):
    device, shape = TorchDevice("cuda:0"), (2, 3, 64, 96)
    plain = model.load(networks[3])[0].to("cuda:0", torch.float16)
    batches = [np.random.default_rng(i).normal(size=shape).astype(np.float32) for i in range(5)]

    def call(batch):
        return torch.sigmoid(plain(batch.half()).float())

    graph = as_cuda_graph(call, shape, "cuda:0")
    assert graph is not call
    want = [device.get(device.synchronized(call)(device.put(batch))) for batch in batches]
    there = [(i, device.put(batch)) for i, batch in enumerate(batches)]
    for (_, got), one in zip(backends.imap(device.synchronized(graph), there, 2), want, strict=True):
        np.testing.assert_array_equal(device.get(got), one)
