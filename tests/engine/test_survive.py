"""Damage, locks and restarts: nothing that is done is lost, nothing damaged is built on, no two commands write at once."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import zarr
from hypothesis import strategies

import volseg
from tests.helpers import SHAPE, Quiet, Stops, digest, mark, markers_of, segment_probabilities, settings
from volseg import api
from volseg.engine import folder, lock, receipts, stored
from volseg.engine.block_tables import Tally, Values
from volseg.engine.file_check import FileCheck
from volseg.engine.integrity import damaged_files
from volseg.engine.layout import Layout
from volseg.engine.packs import Pack
from volseg.engine.receipt import Receipt
from volseg.engine.receipts import Markers
from volseg.engine.run import Run
from volseg.errors import IncompleteRunError, UserError
from volseg.io import files, volume

KINDS = {
    "probabilities": "0/c",
    "probabilities' description": "0/zarr.json",
    "regions": "work/fragments/c",
    "regions' description": "work/fragments/zarr.json",
    "edge tables": "work/tables",
    "links": "work/links",
    "id maps": "work/labels",
    "basins": "work/basins.npz",
    "joins": "work/merges",
    "sums": "work/objects",
    "markers": "work/markers",
    "stamps": "work/stamps",
    "labels": "labels/instances/0/c",
    "labels' description": "labels/instances/0/zarr.json",
    "pyramid": "labels/instances/1/c",
    "model": "work/model.bin",
    "description": "work/run.json",
    "labels.json": "work/labels.json",
}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.fixture
def unfinished(reference, tmp_path):
    """A run of which everything but the end is done."""
    out = tmp_path / "run.volseg.zarr"
    shutil.copytree(reference, f"{out}.partial")
    Path(f"{out}.partial/run.json").unlink()
    return out


def again(image, out, **options):
    return api.infer(image, str(out), config=settings(cluster={"workers": 1}), **options)


DAMAGES = {"cut": cut, "flipped": flip, "zeroed": zero, "deleted": os.unlink}
# Kinds that markers hold checksums of; a restart holds the others to what it expects of each.
SUMMED = ("probabilities", "regions", "edge tables", "links", "id maps", "basins", "joins", "sums", "labels", "pyramid")
MADE_AGAIN = [
    (kind, damage)
    for i, kind in enumerate(KINDS)
    for j, damage in enumerate(DAMAGES)
    if kind not in SUMMED or i % len(DAMAGES) == j
]


def damage_one(run, kind, damage):
    """The key of the file of that kind that is damaged now."""
    place = Path(run, KINDS[kind])
    files_there = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    chosen = files_there[len(files_there) // 2]
    DAMAGES[damage](chosen)
    return str(chosen.relative_to(run))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_what_has_a_checksum_is_seen(unfinished, reference, damage):
    """What is seen is made again, however it was damaged: the next test tries one damage of each of these kinds."""
    run = f"{unfinished}.partial"
    keys = Layout(run).load_description()["keys"]
    for kind in SUMMED:
        key = damage_one(run, kind, damage)
        markers = Markers(run, keys)
        assert markers.damaged() == [key]
        assert markers.makers([key])
        shutil.copy(Path(reference, key), Path(run, key))


@pytest.mark.parametrize(("kind", "damage"), MADE_AGAIN)
def test_what_is_damaged_is_made_again(image, reference, unfinished, kind, damage):
    damage_one(f"{unfinished}.partial", kind, damage)
    run = again(image, unfinished, progress=Quiet())
    assert digest(run.path) == digest(reference)
    for level in range(3):
        ours, theirs = (Path(run_path, f"labels/instances/{level}/c") for run_path in (run.path, reference))
        assert contents(ours) == contents(theirs)
    assert Path(run.path, "tables/objects.csv").read_bytes() == Path(reference, "tables/objects.csv").read_bytes()


def contents(folder):
    """Bytes of each file, and voxels of each array: its codecs order the chunks in a shard by chance."""
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    arrays = [path.parent for path in folder.rglob("zarr.json") if json.loads(path.read_text())["node_type"] == "array"]
    whole = {
        place: data
        for place, data in found.items()
        if not any((folder / place).is_relative_to(a / "c") for a in arrays)
    }
    return {
        **whole,
        **{array.relative_to(folder) / "c": zarr.open_array(array, mode="r")[...].tobytes() for array in arrays},
    }


def test_a_damaged_file_is_told(image, unfinished):
    cut(next(Path(f"{unfinished}.partial/work/tables").iterdir()))
    show = Quiet()
    again(image, unfinished, progress=show)
    assert any("not as it was written: doing 1 block(s) again" in text for text in show.said)


def test_an_unreadable_description_begins_anew_and_says_so(image, unfinished):
    Path(f"{unfinished}.partial/work/run.json").write_text("{")
    show = Quiet()
    again(image, unfinished, progress=show)
    assert any("work/run.json is damaged (no JSON): beginning anew" in text for text in show.said)
    assert show.stages["predict"][0] == 0


def test_overwrite_begins_anew_whatever_lies_there(image, reference, unfinished):
    Path(f"{unfinished}.partial/work/run.json").write_text("[1]")
    show = Quiet()
    again(image, unfinished, overwrite=True, progress=show)
    assert show.stages["predict"][0] == 0
    assert digest(unfinished) == digest(reference)


# ---------------------------------------------------------------- verify and repair

FINISHED = {
    **{kind: place for kind, place in KINDS.items() if kind not in ("markers", "stamps")},
    "object table": "tables/objects.parquet",
    "table as text": "tables/objects.csv",
    "table of merges": "tables/merges.parquet",
    "picture": "overlay.png",
    "group": "zarr.json",
    "labels' group": "labels/zarr.json",
    "run.json": "run.json",
    "manifest": "manifest.json",
}


# What holds no time or process, so that a run has the same bytes as another.
SAME = (
    "0",
    "labels",
    "tables",
    "work/fragments",
    "work/tables",
    "work/links",
    "work/labels",
    "work/merges",
    "work/objects",
)


@pytest.mark.parametrize("damage", [flip, os.unlink], ids=["flipped", "deleted"])
@pytest.mark.parametrize("kind", FINISHED)
def test_verify_names_what_is_damaged_and_repair_makes_it_again(image, reference, tmp_path, kind, damage):
    out = tmp_path / "run.volseg.zarr"
    shutil.copytree(reference, out)
    place = out / FINISHED[kind]
    some = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    damage(some[len(some) // 2])
    if kind == "run.json" and damage is os.unlink:
        with pytest.raises(UserError, match="is not a finished volseg run"):
            volseg.verify(out)
    else:
        found = volseg.verify(out, boxes=1)
        assert not found.ok
        assert str(some[len(some) // 2].relative_to(out)) in found.damaged
        assert "volseg repair" in str(found)
    assert volseg.repair(out).object_count == volseg.open(reference).object_count
    assert damaged_files(str(out)) == []
    for part in SAME:
        assert contents(out / part) == contents(Path(reference, part))


def test_what_a_tree_has_decided_is_made_again(reference, tmp_path):
    """The graphs from which it was decided are gone by then."""
    channels = {"mask_channel": 0, "contour_channel": 1}
    tree = {"stitch": {"reduce": "tree"}, "blocks": {"shape": (11, 75, 85)}, "probabilities": channels}
    out = Path(segment_probabilities(f"{reference}/0", tmp_path / "run.volseg.zarr", **tree).path)
    before = {part: contents(out / part) for part in ("labels", "work/labels", "work/borders")}
    flip(out / "work/labels/3.npz")
    (out / "work/borders/5.npz").unlink()
    assert set(volseg.verify(out, boxes=1).damaged) == {"work/labels/3.npz", "work/borders/5.npz"}
    volseg.repair(out)
    assert {part: contents(out / part) for part in before} == before
    assert volseg.verify(out, boxes=1).ok


def test_files_of_many_blocks_lie_in_several_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "PER_FOLDER", 2)
    layout = Layout(str(tmp_path))
    for i in map(np.int64, range(5)):  # as numbers of blocks come from tables, too
        layout.tallies.save(Tally(np.array([i]), np.array([255], np.uint8)), i)
        layout.ranks.save(Values(np.array([i])), 0, 1, i)
        layout.write_stamp("relabel", i, f"made from {i}", {})
    for kind in ("tallies", "tree/0/rank", "stamps/relabel"):
        found = [path for path in (tmp_path / "work" / kind).rglob("*") if path.is_file()]
        assert len(found) == 5
        assert len({path.parent for path in found}) == 3
    assert [int(tally.total[0]) for tally in layout.tallies.load_each(range(5))] == list(range(5))
    assert int(layout.ranks.load(0, 1, 4).values[0]) == 4
    assert layout.read_stamp("relabel", 3) == "made from 3"
    assert layout.tallies.count() == 5
    layout.tallies.remove(4)
    assert layout.tallies.count() == 4
    layout.tallies.remove_all()
    assert layout.tallies.count() == 0


def test_descriptions_of_arrays_and_groups_are_made_again_to_the_letter(reference, tmp_path):
    """Also where they can still be read: another fill value would tell of other voxels."""
    out = shutil.copytree(reference, tmp_path / "run.volseg.zarr")
    described = {path.relative_to(out): path.read_text() for path in out.rglob("zarr.json")}
    assert len(described) >= 9
    for key, text in described.items():
        (out / key).write_text(text.replace('"fill_value": 0', '"fill_value": 1').replace('"ome"', '"omf"'))
    (out / "work/zarr.json").unlink()
    (out / "labels/instances/zarr.json").write_text("{")
    volseg.repair(out)
    assert {path.relative_to(out): path.read_text() for path in out.rglob("zarr.json")} == described
    assert volseg.verify(out, boxes=1).ok


def test_a_cleaned_run_is_as_it_was_written(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/work")
    assert volseg.verify(tmp_path / "run", boxes=1).ok


# ---------------------------------------------------------------- markers


def test_a_marker_comes_after_its_files_are_on_the_disk(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(files, "sync_filesystem", lambda path: order.append("sync"))
    write = Layout.write_marker
    monkeypatch.setattr(Layout, "write_marker", lambda *args: (order.append("marker"), write(*args)))
    markers = Markers(str(tmp_path), {"link": "abc"})
    markers.add("link", 3, Receipt(voxels=5, edges=7))
    markers.flush()
    assert order == ["sync", "marker"]
    stored = Markers(str(tmp_path), {"link": "abc"}).receipts("link")
    assert (stored[3].edges, stored[3].files) == (7, {})
    assert stored[3] is markers.receipts("link")[3]  # what is held of equal blocks is held once
    assert not Markers(str(tmp_path), {"link": "other"}).done("link")


def test_a_full_disk_ends_with_a_line_and_what_is_done_is_kept(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync_filesystem", full)
    markers = Markers(str(tmp_path), {"link": "abc"})
    markers.add("link", 0, Receipt())
    with pytest.raises(IncompleteRunError, match="No space left on device; what is done is kept"):
        markers.flush()


def test_the_blocks_that_wrote_a_file_are_known(reference):
    run = Run.from_json(Layout(reference).load_summary())
    markers = Markers(reference, Layout(reference).load_description()["keys"])
    assert markers.makers(["work/tables/0.npz"]) == {"fragments": [0]}
    assert markers.damaged() == []
    assert run.shape == SHAPE


# ---------------------------------------------------------------- locks


def test_a_second_command_is_told_who_writes(image, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    with (
        lock.Lock(out),
        pytest.raises(UserError, match=rf"is being written by another volseg \(process {os.getpid()} on"),
    ):
        again(image, out)
    assert not Path(f"{out}.lock").exists()
    assert not Path(f"{out}.partial").exists()


def test_who_wants_to_read_a_run_is_told_who_writes_it(reference, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(reference, f"{out}.partial")
    with (
        lock.Lock(str(out)),
        pytest.raises(UserError, match=f"is being written by another volseg .process {os.getpid()}"),
    ):
        api.clean(str(out))
    with pytest.raises(UserError, match="is not finished: give the command that began it again"):
        api.clean(str(out))


def test_a_lock_ends_with_its_holder(tmp_path):
    out = tmp_path / "run.volseg.zarr"
    code = f"import os; from volseg.engine.lock import Lock; Lock({str(out)!r}).__enter__(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert Path(f"{out}.lock").exists()
    with lock.Lock(str(out)):
        assert json.loads(Path(f"{out}.lock").read_text())["pid"] == os.getpid()


def without_flock(monkeypatch, how):
    """A system without `flock`, as Windows, or a file system that refuses it."""
    if how == "system":
        monkeypatch.setattr(lock, "fcntl", None)
        return

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)


@pytest.mark.parametrize("how", ["system", "file system"])
def test_without_flock_a_lock_is_a_file_with_a_heartbeat(tmp_path, monkeypatch, how):
    without_flock(monkeypatch, how)
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    out = tmp_path / "run.volseg.zarr"
    with lock.Lock(str(out)) as held:
        first = json.loads(Path(f"{out}.lock").read_text())
        with pytest.raises(UserError, match=rf"is being written by another volseg \(process {os.getpid()} on"):
            lock.Lock(str(out)).__enter__()
        end = time.monotonic() + 10
        while json.loads(Path(f"{out}.lock").read_text())["heartbeat"] == first["heartbeat"]:
            assert time.monotonic() < end
            time.sleep(0.02)
        held.check()
    assert list(tmp_path.iterdir()) == []
    code = "import os; from volseg.engine import lock; lock.fcntl = None\n"
    code += f"lock.Lock({str(out)!r}).__enter__(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert Path(f"{out}.lock").exists()
    with lock.Lock(str(out)):  # its holder's process is gone
        assert json.loads(Path(f"{out}.lock").read_text())["pid"] == os.getpid()


def test_a_run_is_made_without_flock(image, reference, tmp_path, monkeypatch):
    without_flock(monkeypatch, "system")
    run = again(image, tmp_path / "run.volseg.zarr", progress=Quiet())
    assert digest(run.path) == digest(reference)
    assert [path.name for path in tmp_path.iterdir()] == ["run.volseg.zarr"]


def test_a_lock_on_an_object_store_is_refused_taken_over_and_lost(bucket, monkeypatch):
    out = f"{bucket}/locked/run.zarr"
    first, second = lock.Lock(out), lock.Lock(out)
    with first:
        with pytest.raises(UserError, match="is being written by another volseg"):
            second.__enter__()
        monkeypatch.setattr(lock, "STALE_S", 0)  # as if the first had been suspended for long
        monkeypatch.setattr(lock, "SILENCE_S", 0)
        second.__enter__()
        with pytest.raises(IncompleteRunError, match="another took over"):
            first.check()
        monkeypatch.undo()
        second.__exit__(None, None, None)
    assert not files.exists(f"{out}.lock")


def test_a_lock_on_an_object_store_goes_by_processes_and_heartbeats_not_by_clocks(bucket, monkeypatch):
    out, gone = f"{bucket}/clocks/run.zarr", subprocess.Popen(["true"])
    gone.wait()
    holder = {"id": "x", "machine": lock._machine(), "pid": gone.pid, "heartbeat": time.time()}
    files.write_bytes(f"{bucket}/clocks", "run.zarr.lock", json.dumps(holder).encode())
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.1)
    with lock.Lock(out):  # of a process that is gone from this machine
        monkeypatch.setattr(lock, "STALE_S", 0)  # as if the clocks of holder and challenger were far apart
        with pytest.raises(UserError, match="is being written by another volseg"):
            lock.Lock(out).__enter__()


def test_files_of_a_bucket_are_looked_at_by_listing_their_folders(bucket):
    path, keys = f"{bucket}/looked", [f"work/{folder}/{i}" for folder in ("many", "few") for i in range(6)][:8]
    for key in keys:
        files.write_bytes(path, key, key.encode())
    marks = {key: files.fingerprint(path, key) for key in keys}
    with FileCheck(path) as check:
        assert check.damaged(marks) == []
    files.write_bytes(path, keys[1], b"changed")
    for key in (keys[2], keys[6]):
        files.remove(f"{path}/{key}")
    with FileCheck(path) as check:
        assert sorted(check.damaged(marks)) == sorted([keys[1], keys[2], keys[6]])
    files.remove(f"{path}/work/many")
    with FileCheck(path) as check:
        assert set(check.damaged(marks)) == {*keys[:6], keys[6]}


def test_a_run_that_was_cleaned_meanwhile_stays_where_it_is(reference, tmp_path, monkeypatch):
    out, enter = shutil.copytree(reference, tmp_path / "run"), lock.Lock.__enter__

    def late(self):
        Layout(str(out)).remove_work()
        return enter(self)

    monkeypatch.setattr(lock.Lock, "__enter__", late)
    with pytest.raises(UserError, match="was cleaned"):
        api.segment(str(out), settings=["stitch.seed=0.9"], progress=Quiet())
    assert Layout(str(out)).finished


def test_bare_folders_that_a_killed_command_left_are_no_obstacle(image, tmp_path):
    out = tmp_path / "run.volseg.zarr"
    Path(f"{out}.partial/work").mkdir(parents=True)
    Path(f"{out}.partial/work/.begun.7.ab.tmp").touch()
    folder.check_output([volume.open(image)], str(out), False)
    Path(f"{out}.partial/work/precious").touch()
    with pytest.raises(UserError, match="is not a volseg run, so it is left alone"):
        folder.check_output([volume.open(image)], str(out), False)


def test_workers_of_a_command_that_is_gone_are_waited_for(tmp_path, monkeypatch):
    begun = tmp_path / "begun"
    begun.touch()
    monkeypatch.setattr(lock, "WRITERS_WAIT_S", 0)
    with lock.writing(str(begun)), pytest.raises(UserError, match="workers of an earlier command still write"):
        lock.wait_for_writers(str(begun))
    lock.wait_for_writers(str(begun))


def test_a_result_that_is_no_run_is_not_replaced(image, unfinished):
    """Something else has taken the final name while the run went on."""
    unfinished.mkdir()
    (unfinished / "precious").touch()
    with pytest.raises(UserError, match="is not a volseg run, so it is left alone"):
        again(image, unfinished)
    assert (unfinished / "precious").exists()


def test_a_marker_that_is_not_as_written_counts_for_nothing_and_verify_finds_it(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    description = Layout(reference).load_description()
    (marker,) = (tmp_path / "run/work/markers/stitch").iterdir()
    text = marker.read_text()
    for damaged in (
        text.replace('"objects":', '"objects":1'),
        text[:-9],
        "",
        (tmp_path / "run/run.json").read_text(),
    ):
        marker.write_text(damaged)
        assert not Markers(str(tmp_path / "run"), description["keys"]).done("stitch")
        assert damaged_files(str(tmp_path / "run")) == [f"work/markers/stitch/{marker.name}"]
    shutil.rmtree(marker.parents[1] / "link")
    assert f"work/markers/link/0-{description['keys']['link']}.json" in damaged_files(str(tmp_path / "run"))


def test_a_run_from_before_a_stage_was_new_is_whole(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    summary = Layout(reference).load_summary()
    del summary["keys"]["coarsen1"]
    (tmp_path / "run/run.json").write_text(json.dumps(summary))
    shutil.rmtree(tmp_path / "run/work/markers/coarsen1")
    assert damaged_files(str(tmp_path / "run")) == []


def test_markers_of_other_blocks_stay(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    run = Run.from_json({**Layout(reference).load_description(), "out": str(tmp_path / "run")})
    mark(run, "link", 0)
    markers = markers_of(run)
    markers.remove("link", [0])
    assert 0 not in markers.done("link")
    assert 0 not in markers_of(run).done("link")


@hypothesis.given(
    receipts=strategies.dictionaries(
        strategies.integers(0, 1 << 60),
        strategies.builds(
            Receipt,
            voxels=strategies.integers(0, 1 << 40),
            seconds=strategies.dictionaries(strategies.sampled_from(["read", "infer"]), strategies.floats(0, 10)),
            kept=strategies.booleans(),
            edges=strategies.integers(0, 3),
            files=strategies.dictionaries(strategies.text(), strategies.just([3, "0badcafe", 17]), max_size=3),
            filled=strategies.lists(strategies.tuples(strategies.text(), strategies.just("0:1,0:1,0:1"))).map(tuple),
        ),
        min_size=1,
    )
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_a_pack_says_what_each_receipt_says(receipts):
    pack = Pack.from_json(json.loads(json.dumps(Pack.of(receipts).to_json())))
    assert dict(pack.receipts()) == receipts
    assert pack.slim() == {i: receipt.slim() for i, receipt in receipts.items()}
    for key in {key for receipt in receipts.values() for key in receipt.files}:
        assert pack.makers([key]) == {i for i, receipt in receipts.items() if key in receipt.files}


def test_a_file_with_its_size_and_time_is_not_read_again_on_a_restart(tmp_path):
    file = tmp_path / "shard"
    file.write_bytes(b"abcd")
    mark = files.dated_fingerprint(str(tmp_path), "shard")
    file.write_bytes(b"abcx")
    os.utime(file, ns=(mark[2], mark[2]))  # as a disk that forgets would have it
    assert FileCheck(str(tmp_path)).damaged({"shard": mark}) == []
    assert FileCheck(str(tmp_path), dates=False).damaged({"shard": mark}) == ["shard"]
    os.utime(file)
    assert FileCheck(str(tmp_path)).damaged({"shard": mark}) == ["shard"]
    file.write_bytes(b"abcd")  # the same bytes, copied
    assert FileCheck(str(tmp_path)).damaged({"shard": mark}) == []


def test_markers_of_many_blocks_share_a_file(monkeypatch, tmp_path):
    """Written one by one or together, some taken back, one file torn: what is done is what a later command finds."""
    monkeypatch.setattr(receipts, "PACKED", 8)
    keys = {"link": "k" * 16}
    markers = Markers(str(tmp_path), keys)
    for i in range(30):
        markers.add("link", i, Receipt(voxels=i, files={f"work/links/{i}.npz": [i, i]}))
        if i % 3 == 0:
            markers.flush()
    markers.flush()
    folder = tmp_path / "work/markers/link"
    assert len(list(folder.iterdir())) < 20
    again = Markers(str(tmp_path), keys)
    assert again.done("link") == set(range(30))
    assert [receipt.voxels for _, receipt in sorted(again.stored("link", [4, 29]))] == [4, 29]
    assert again.makers(["work/links/3.npz"]) == {"link": [3]}
    assert again.count() == 30
    again.remove("link", [3, 11, 29])
    left = set(range(30)) - {3, 11, 29}
    assert again.done("link") == Markers(str(tmp_path), keys).done("link") == left
    packs = sorted(folder.glob("pack*"))
    packs[0].write_bytes(packs[0].read_bytes()[:-5])
    assert Markers(str(tmp_path), keys).done("link") < left


def test_a_run_that_is_to_replace_another_goes_on_without_being_told_again(image, reference, tmp_path):
    """Ctrl-C says that it does; with --overwrite it would begin anew."""
    out = str(shutil.copytree(reference, tmp_path / "run.volseg.zarr"))
    config = settings(stitch={"min_voxels": 4000}, cluster={"workers": 1})
    with pytest.raises(UserError, match="exists; give another --out"):
        api.infer(image, out, config=config, progress=Quiet())
    with pytest.raises(KeyboardInterrupt):
        api.infer(image, out, config=config, overwrite=True, progress=Stops("relabel"))
    assert Layout(out).finished
    show = Quiet()
    made = api.infer(image, out, config=config, progress=show)
    assert any("going on from an earlier command: 100 % of predict is done" in line for line in show.said)
    assert made.config.stitch.min_voxels == 4000
    assert not Path(f"{out}.partial").exists()
    with pytest.raises(UserError, match="exists; give another --out"):
        api.infer(image, out, config=config, progress=Quiet())


def test_a_damaged_run_that_was_to_replace_another_replaces_nothing_unasked(image, reference, tmp_path):
    out = str(shutil.copytree(reference, tmp_path / "run.volseg.zarr"))
    config = settings(stitch={"min_voxels": 4000}, cluster={"workers": 1})
    with pytest.raises(KeyboardInterrupt):
        api.infer(image, out, config=config, overwrite=True, progress=Stops("relabel"))
    model = Path(f"{out}.partial/work/model.bin")
    model.write_bytes(model.read_bytes()[:1000])
    before = digest(out)
    for other in (config, settings(stitch={"min_voxels": 50}, cluster={"workers": 1})):
        with pytest.raises(
            UserError, match=r"model\.bin .*, and .* exists; give another --out, or --overwrite to begin anew"
        ):
            api.infer(image, out, config=other, progress=Quiet())
    assert digest(out) == before
    assert api.infer(image, out, config=config, overwrite=True, progress=Quiet()).config.stitch.min_voxels == 4000
