"""Affinities of neighbors become mask and contour, and then objects, whatever the blocks."""

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import LIGHT, Quiet, begin_run, digest, do_stages, segment_here, segment_probabilities, settings
from volseg import api
from volseg.box import Blocks, Box
from volseg.config import load
from volseg.engine import folder
from volseg.engine.keys import labels_id
from volseg.engine.stages import keys
from volseg.errors import UserError
from volseg.evaluation.evaluate import evaluate
from volseg.evaluation.verify import verify
from volseg.io import arrays
from volseg.io.affinities import mask_and_contour

SHAPE = (30, 64, 72)
TAKEN = {"probabilities": {"affinity_channels": [0, 1, 2]}}
RULES = {
    "stitch": {"min_voxels": 50, "seed": 0.6},
    "fragments": {"smooth": [2, 2, 2], "threshold": 0.5, "contour": 1.0},
}


def cells():
    """Labels of cells that touch each other, with background beyond their reach."""
    rng = np.random.default_rng(1)
    centers = rng.random((16, 3)) * SHAPE
    voxels = np.moveaxis(np.indices(SHAPE), 0, -1)[..., None, :]
    distance = ((voxels - centers) ** 2).sum(-1)
    return np.where(distance.min(-1) < 16**2, distance.argmin(-1) + 1, 0).astype(np.uint32)


def affinities_of(labels, *, offset=-1, dtype=np.float32):
    """1 where a voxel and its neighbor along z, y, x are in one object, as c z y x."""
    out = np.zeros((3, *labels.shape), dtype)
    for axis in range(3):
        along, stored = np.moveaxis(labels, axis, 0), np.moveaxis(out[axis], axis, 0)
        stored[slice(1, None) if offset < 0 else slice(-1)] = (along[1:] == along[:-1]) & (along[1:] > 0)
    return out


@pytest.fixture(scope="module")
def truth():
    return cells()


@pytest.fixture(scope="module")
def noisy(truth):
    noise = np.random.default_rng(2).normal(0, 0.12, (3, *SHAPE)).astype(np.float32)
    return np.clip(0.85 * affinities_of(truth) + np.float32(0.07) + noise, 0, 1)


def plain(stored, voxel, offset):
    """Highest and lowest affinity of a voxel, one neighbor after the other."""
    found = []
    for axis in range(3):
        for side in (-1, 1):
            other = list(voxel)
            other[axis] += side
            if 0 <= other[axis] < stored.shape[1 + axis]:
                found.append(stored[(axis, *(voxel if side == offset else other))])
    return (max(found), min(found)) if found else (0, 255)


@given(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(1, 5)] * 3), st.sampled_from([-1, 1]))
def test_blocks_give_what_a_plain_loop_over_neighbors_gives(shape, block, offset):
    stored = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    read = [lambda box, axis=axis: stored[(axis, *box.slices)] for axis in range(3)]
    got = np.zeros((2, *shape), np.uint8)
    for box in Blocks(shape, block):
        got[(slice(None), *box.slices)] = mask_and_contour(read, box, shape, offset)
    want = [plain(stored, voxel, offset) for voxel in np.ndindex(shape)]
    np.testing.assert_array_equal(got.reshape(2, -1).T, [(high, 255 - low) for high, low in want])


def stored_of(path, out, block=None, bad="fail", **options):
    sections = {"probabilities": options, "blocks": {"shape": block} if block else {}, "input": {"on_bad_chunk": bad}}
    made = begin_run(path, out, load(base=sections))
    do_stages(made, "import")
    return arrays.open_array(str(out), "0")[:]


def test_kinds_of_arrays_give_the_same_bytes(tmp_path, truth):
    """Channels first, last or among others; stored at the other voxel; as dissimilarities; in any blocks."""
    whole = affinities_of(truth, dtype=np.uint8) * np.uint8(255)
    highest = mask_and_contour([lambda box, a=a: a[box.slices] for a in whole], Box.from_shape(SHAPE), SHAPE)
    behind = affinities_of(truth, offset=1)
    far = np.random.default_rng(0).random((9, *SHAPE))
    many = np.concatenate([far[:4], affinities_of(truth)[::-1], far[4:]])
    first = {"affinity_channels": [0, 1, 2]}
    cases = {
        "bytes": (whole, first),
        "floats, last": (np.moveaxis(affinities_of(truth), 0, -1), first),
        "behind": (behind, {**first, "affinity_offset": 1}),
        "dissimilar": (1 - behind, {**first, "affinity_offset": 1, "inverted": ["affinities"]}),
        "among twelve": (many, {"affinity_channels": [6, 5, 4]}),
    }
    for name, (data, options) in cases.items():
        zarr.create_array(tmp_path / name, data=data)
        for block in (None, (7, 30, 72)):
            np.testing.assert_array_equal(stored_of(tmp_path / name, tmp_path / "run", block, **options), highest)


@pytest.mark.parametrize("inverted", [[], ["affinities"]])
def test_what_cannot_be_decoded_joins_nothing_in_any_blocks(tmp_path, truth, inverted):
    """Of the affinities along y a chunk is lost: they are 0 there, also where 1 stands for 0."""
    joined = affinities_of(truth, dtype=np.uint8) * np.uint8(255)
    zarr.create_array(tmp_path / "a", data=255 - joined if inverted else joined, chunks=(1, 16, 16, 16))
    (tmp_path / "a/c/1/0/1/2").write_bytes(b"lost")
    joined[1, :16, 16:32, 32:48] = 0
    want = mask_and_contour([lambda box, a=a: a[box.slices] for a in joined], Box.from_shape(SHAPE), SHAPE)
    for block in (None, (7, 30, 72), (30, 17, 33)):
        options = {"affinity_channels": [0, 1, 2], "inverted": inverted}
        np.testing.assert_array_equal(stored_of(tmp_path / "a", tmp_path / "run", block, "skip", **options), want)


# ---------------------------------------------------------------- whole runs


def test_touching_cells_are_recovered_to_the_same_bytes_in_any_blocks(tmp_path, truth, noisy):
    zarr.create_array(tmp_path / "affinities.zarr", data=noisy)
    zarr.create_array(tmp_path / "truth.zarr", data=truth)
    out = tmp_path / "run"
    segment_probabilities(tmp_path / "affinities.zarr", out, **TAKEN, **RULES)
    scores = evaluate(str(out), str(tmp_path / "truth.zarr")).instances
    assert scores.matched == scores.truth_objects == len(np.unique(truth)) - 1
    assert scores.pq > 0.9
    assert scores.pred_objects == scores.truth_objects
    for k, block in enumerate([(5, 64, 72), (30, 17, 23), (11, 33, 40)]):
        cut = tmp_path / f"cut{k}"
        segment_here(tmp_path / "affinities.zarr", cut, settings(**TAKEN, **RULES, blocks={"shape": block}))
        assert digest(cut) == digest(out)
    assert verify(str(out), boxes=4).ok


def test_basins_agglomerate_by_mean_affinity_without_a_truth(tmp_path, truth, noisy):
    """Every basin stands alone, and borders of a high mean join: the same objects, in any blocks."""
    mean = {"seed": 1.0, "seed_low": 0.3, "join_mean": 0.45, "min_voxels": 200}
    zarr.create_array(tmp_path / "affinities.zarr", data=noisy)
    zarr.create_array(tmp_path / "truth.zarr", data=truth)
    found = []
    for block in (None, (9, 31, 40)):
        out = tmp_path / f"run{len(found)}"
        cut = {"blocks": {"shape": block}} if block else {}
        segment_here(tmp_path / "affinities.zarr", out, settings(**TAKEN, **{**RULES, "stitch": mean}, **cut))
        found.append(digest(out))
    assert found[0] == found[1]
    scores = evaluate(str(tmp_path / "run0"), str(tmp_path / "truth.zarr")).instances
    assert scores.matched == scores.truth_objects
    without = {**RULES, "stitch": {**mean, "join_mean": 0.0}}
    segment_here(tmp_path / "affinities.zarr", tmp_path / "apart", settings(**TAKEN, **without))
    assert evaluate(str(tmp_path / "apart"), str(tmp_path / "truth.zarr")).instances.matched < scores.matched


def test_an_array_in_memory_gives_the_same_labels(tmp_path, noisy):
    zarr.create_array(tmp_path / "affinities.zarr", data=noisy)
    segment_here(tmp_path / "affinities.zarr", tmp_path / "stored", settings(**TAKEN, **RULES))
    run = api.segment(noisy, tmp_path / "array", config=settings(**LIGHT, **TAKEN, **RULES), progress=Quiet())
    assert digest(run.path) == digest(tmp_path / "stored")


def test_the_offset_is_in_the_key(tmp_path, noisy):
    zarr.create_array(tmp_path / "affinities.zarr", data=noisy)
    begun = {}
    for offset in (-1, 1):
        taken = {"probabilities": {**TAKEN["probabilities"], "affinity_offset": offset}}
        begun[offset] = begin_run(tmp_path / "affinities.zarr", tmp_path / f"run{offset}", settings(**taken))
        assert folder.load_run(str(tmp_path / f"run{offset}")).channels == begun[offset].channels
    assert keys(begun[-1])["import"] != keys(begun[1])["import"]
    assert labels_id(begun[-1]) != labels_id(begun[1])


# ---------------------------------------------------------------- refusals


def refusals():
    """Name -> (data, what options say, what the line must say)."""
    good = np.full((3, 4, 20, 30), 0.5, np.float32)
    bad = good.copy()
    bad[1, 0, 0, 0] = 3
    return {
        "two channels": (good[:2], {}, r"has 2 channels, counted from 0: there is no channel 2 for --affinities"),
        "one channel": (good[0], {}, r"has 1 channel, counted from 0: there is no channel 2 for --affinities"),
        "one twice": (good, {"affinity_channels": [0, 0, 1]}, r"channels \[0, 0, 1\]; give three that differ"),
        "NaN": (good * np.float32("nan"), {}, "holds NaN or infinity"),
        "beyond 1": (bad, {}, r"channel 1 \(affinity along y\).* is 3, and float .* 0\.\.1"),
        "labels": ((good * 9).astype(np.uint32), {}, "holds uint32, as labels do"),
        "a mask too": (good, {"mask_channel": 0}, "made of the affinities"),
        "one inverted": (good, {"inverted": ["mask"]}, "all three are inverted, or none"),
        "none to invert": (good[0], {"affinity_channels": None, "inverted": ["affinities"]}, "no affinities to invert"),
    }


@pytest.mark.parametrize("case", [*refusals()])
def test_what_is_no_affinities_is_refused_before_anything_is_made(tmp_path, case):
    data, options, said = refusals()[case]
    zarr.create_array(tmp_path / "a.zarr", data=data)
    with pytest.raises(UserError, match=said):
        segment_probabilities(
            tmp_path / "a.zarr", tmp_path / "out", probabilities={**TAKEN["probabilities"], **options}
        )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("given", ["0,1", "0,1,x", "0,1,-2", "0,1,2,3"])
def test_what_is_not_three_channels_is_refused_in_one_line(run, tmp_path, given):
    zarr.create_array(tmp_path / "a.zarr", data=np.full((3, 4, 20, 30), 0.5, np.float32))
    status, _, said = run("segment", str(tmp_path / "a.zarr"), "--affinities", given)
    assert status == 2
    assert said.strip().splitlines() == [f"volseg: --affinities {given!r} is not three channels z,y,x such as 0,1,2"]


def test_the_command_line_takes_affinities(run, tmp_path, noisy):
    zarr.create_array(tmp_path / "a.zarr", data=noisy)
    segment_here(tmp_path / "a.zarr", tmp_path / "want", settings(**TAKEN, **RULES))
    rules = [f"--set={s}.{key}={value}" for s, table in RULES.items() for key, value in table.items()]
    options = ["--affinities", "0,1,2", "--affinity-offset", "-1", "--set", "stitch.count_cut=false", *rules]
    status, _, said = run("segment", str(tmp_path / "a.zarr"), "--out", str(tmp_path / "run"), *options)
    assert status == 0, said
    assert digest(tmp_path / "run") == digest(tmp_path / "want")
