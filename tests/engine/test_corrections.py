"""Objects are corrected by a file: the labels change as asked and to the same bytes however a run is cut."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from tests.helpers import Quiet, Stops, digest, segment_probabilities, write_volume
from volseg import api, cli
from volseg.box import Blocks
from volseg.engine.corrections import correction_file
from volseg.engine.finished import open_run
from volseg.errors import UserError
from volseg.evaluation.recheck import check_box
from volseg.evaluation.review import open_reviewed, review
from volseg.evaluation.stored import open_stored
from volseg.evaluation.verify import verify
from volseg.io import corrections

SHAPE = (12, 60, 70)
FRAGMENTS = {"threshold": 0.5, "smooth": [1, 1, 1], "contour": 0.0}
STITCH = {"seed": 0.9, "min_voxels": 20, "count_cut": False}
BLOCKS = {"whole": (12, 60, 70), "eight": (6, 30, 35), "odd": (5, 17, 70)}


@pytest.fixture(scope="module")
def probabilities(tmp_path_factory):
    """Bumps of many heights on a mask with gaps: objects of several basins, on every kind of block border."""
    rng = np.random.default_rng(5)
    smooth = ndimage.gaussian_filter(rng.random(SHAPE), (1.5, 3, 3))
    field = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    voxels = np.uint8(np.clip(110 + 260 * (field - 0.4), 0, 255))
    return write_volume(str(tmp_path_factory.mktemp("bumps") / "mask.zarr"), voxels)


def made(probabilities, out, blocks="whole", reduce="flat", **stitch):
    """A run of the probabilities in these blocks."""
    sections = {
        "fragments": FRAGMENTS,
        "stitch": {**STITCH, **stitch, "reduce": reduce},
        "probabilities": {"mask_channel": 0},
    }
    return segment_probabilities(probabilities, out, blocks={"shape": BLOCKS[blocks]}, **sections)


@pytest.fixture(scope="module")
def plain(probabilities, tmp_path_factory):
    """A run that was not corrected. Tests must not change it."""
    return made(probabilities, tmp_path_factory.mktemp("plain") / "run.zarr")


@pytest.fixture(scope="module")
def expected(plain, tmp_path_factory):
    """What its corrected labels are, and not what they were."""
    copy = shutil.copytree(plain.path, tmp_path_factory.mktemp("corrected") / "run.zarr")
    result = digest(corrected(open_run(str(copy)), answers(plain)).path)
    assert result != digest(plain.path)
    return result


@pytest.fixture
def run(plain, tmp_path):
    """A copy of it."""
    return open_run(str(shutil.copytree(plain.path, tmp_path / "run.zarr")))


def corrected(run, file, **options):
    return api.segment(run, corrections=file, progress=Quiet(), **options)


def file_of(run, *entries):
    """A file for the run with these entries."""
    return {**correction_file(open_stored(run).run), "corrections": list(entries)}


def questions(run):
    """What the review of a run asks: kind, and the points on both sides of the saddle."""
    asked = []
    for one in open_reviewed(run).decisions:
        points = [[int(n) for n in np.unravel_index(voxel, SHAPE)] for voxel in (one.voxel_a, one.voxel_b)]
        asked.append((one.kind, points))
    return asked


def labels_at(run, points):
    return [int(run.labels[tuple(point)]) for point in points]


def answers(run):
    """Some joins of the run's objects and some splits, from what its review asks."""
    asked = questions(run)
    joins = [points for kind, points in asked if kind == "border"][:3]
    splits = [points for kind, points in asked if kind == "join"][:3]
    assert len(joins) == len(splits) == 3
    return file_of(run, *({"do": "join", "points": p} for p in joins), *({"do": "split", "points": p} for p in splits))


def test_a_review_is_answered_and_the_labels_change_as_asked(run):
    before = run.labels[:]
    file = answers(run)
    again = corrected(run, file)
    assert again.object_count != 0
    for each in file["corrections"]:
        a, b = labels_at(again, each["points"])
        assert 0 not in (a, b)
        assert (a == b) == (each["do"] == "join"), each
    named = {label for each in file["corrections"] for label in labels_at(again, each["points"])}
    after = again.labels[:]
    others = ~np.isin(after, list(named)) & (after > 0)
    pairs = np.unique(np.stack([before[others], after[others]]), axis=1)
    assert pairs.shape[1] == np.unique(pairs[0]).size == np.unique(pairs[1]).size > 3
    np.testing.assert_array_equal(after > 0, before > 0)
    assert list(again.objects["id"]) == list(range(1, again.object_count + 1))


@pytest.mark.parametrize(("blocks", "reduce"), [("eight", "flat"), ("odd", "tree")])
def test_corrections_give_the_same_bytes_for_every_cutting(probabilities, plain, expected, tmp_path, blocks, reduce):
    file = answers(plain)
    other = made(probabilities, tmp_path / f"{blocks}.zarr", blocks, reduce)
    assert digest(other.path) == digest(plain.path)
    turned = {**file, "corrections": [{**e, "points": e["points"][::-1]} for e in reversed(file["corrections"])]}
    other = corrected(other, turned)
    assert digest(other.path) == expected
    result = verify(other, boxes=1)
    assert result.ok, str(result)
    assert result.corrections == (3, 3)
    boxes = [check_box(open_stored(other), box) for box in Blocks(SHAPE, (12, 33, 41))]
    assert all(set(box.wrong.values()) == {0} for box in boxes)
    assert result.boxes[0].complete_objects > 3


def test_corrections_hold_under_every_rule(run):
    file = answers(run)
    rules = [
        "persistence=0.02",
        "join_mean=0.55",
        "fill_holes_voxels=300",
        "max_voxels=4000",
        "seed=0.8",
        "min_voxels=300",
    ]
    again = corrected(run, file, settings=[f"stitch.{rule}" for rule in rules])
    for each in file["corrections"]:
        a, b = labels_at(again, each["points"])
        assert 0 not in (a, b)
        assert (a == b) == (each["do"] == "join"), each
    result = verify(again, boxes=1)
    assert result.ok, str(result)


def test_a_run_keeps_its_corrections_until_it_is_told_otherwise(run):
    before, file = digest(run.path), answers(run)
    first = digest(corrected(run, file).path)
    kept = json.loads(Path(run.path, "corrections.json").read_text())
    assert sorted(each["do"] for each in kept["corrections"]) == ["join"] * 3 + ["split"] * 3
    assert digest(api.segment(run, settings=["stitch.seed=0.8"], progress=Quiet()).path) != first
    assert digest(api.segment(run, settings=["stitch.seed=0.9"], progress=Quiet()).path) == first
    assert digest(corrected(run, str(Path(run.path, "corrections.json"))).path) == first
    assert digest(corrected(run, "none").path) == before
    assert not Path(run.path, "corrections.json").exists()
    assert verify(run, boxes=1).ok


def test_what_was_decided_is_asked_no_more(run):
    asked, file = [points for _, points in questions(run)], answers(run)
    decided = [each["points"] for each in file["corrections"]]
    again = [points for _, points in questions(corrected(run, file))]
    assert not [points for points in again if points in decided]
    assert len([points for points in asked if points in again]) > len(asked) / 2
    assert len(review(run, 2).decisions) == 2
    listed = json.loads(Path(run.path, "review/corrections.json").read_text())["corrections"]
    assert [each["do"] for each in listed if each["do"] != "undecided"] == ["join"] * 3 + ["split"] * 3


def test_labels_are_corrected_by_their_numbers(run, plain):
    rows = plain.objects.sort_values("voxels")["id"].to_list()
    file = file_of(
        plain, {"do": "join", "labels": [rows[-1], rows[-2]]}, {"do": "join", "labels": [rows[-3], rows[-2]]}
    )
    again = corrected(run, file)
    assert again.object_count == plain.object_count - 2
    before, after = plain.labels[:], again.labels[:]
    assert np.unique(after[np.isin(before, rows[-3:])]).size == 1
    assert digest(corrected(again, file).path) == digest(again.path)  # given once more, though numbers are others now
    with pytest.raises(UserError, match="of another decision"):
        corrected(again, {**file, "corrections": file["corrections"][:1]})


@pytest.mark.parametrize(("reduce", "stage"), [("flat", "relabel"), ("tree", "renumber")])
def test_a_stopped_correction_goes_on_with_the_same_file(probabilities, plain, tmp_path, reduce, stage):
    run = made(probabilities, tmp_path / "run.zarr", "eight", reduce)
    rows = run.objects.sort_values("voxels")["id"].to_list()
    path = tmp_path / "mine.json"
    path.write_text(corrections.format_file(file_of(run, {"do": "join", "labels": [rows[-1], rows[-2]]})))
    with pytest.raises(KeyboardInterrupt):
        api.segment(run, corrections=path, progress=Stops(stage))
    again = corrected(run.path, path)
    assert again.object_count == len(rows) - 1
    assert verify(again, boxes=1).ok


def test_a_cleaned_run_is_corrected_where_its_basins_are_made_anew(run, expected):
    file = answers(run)
    api.clean(run)
    with pytest.raises(UserError, match="--recompute"):
        corrected(run, file)
    assert digest(corrected(run, file, recompute=True).path) == expected


# ---------------------------------------------------------------- what cannot be


def refused(run, file, match):
    """The file is refused with these words, and nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in Path(run.path).rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=match) as error:
        corrected(run, file)
    assert {path: path.stat().st_mtime_ns for path in Path(run.path).rglob("*") if path.is_file()} == before
    return str(error.value)


def test_points_and_labels_that_there_are_not_are_refused_with_their_line(run, tmp_path):
    inside = questions(run)[0][1]
    outside = {"do": "join", "points": [inside[0], [0, 0, SHAPE[2]]]}
    background = [int(n) for n in np.unravel_index(np.argmin(run.probabilities[0]), SHAPE)]
    path = tmp_path / "mine.json"

    def written(*entries):
        path.write_text(corrections.format_file(file_of(run, *entries)))
        return path

    good = {"do": "join", "points": inside}
    assert "mine.json, line 4: join of" in refused(run, written(good, outside), "lies outside of the volume")
    refused(run, written({"do": "split", "points": [inside[0], background]}), "line 3: .* lies in the background")
    refused(run, written({"do": "join", "labels": [1, 10**6]}), "line 3: .* has no object 1000000; its labels are 1 to")
    refused(run, written({"do": "join", "labels": [2, 2]}), "line 3: .* both are one label")
    one = {"do": "split", "points": [inside[0], inside[0]]}
    refused(run, written(good, one), "line 4: .* both points lie in one basin")


def test_contradictions_are_refused_through_others_as_well(run):
    apart = [points for kind, points in questions(run) if kind == "border"]
    a, b = apart[0]
    c, d = next(points for points in apart if not {*labels_at(run, points)} & {*labels_at(run, (a, b))})
    chain = [{"do": "join", "points": [a, c]}, {"do": "join", "points": [d, b]}, {"do": "join", "points": [c, d]}]
    said = refused(run, file_of(run, *chain, {"do": "split", "points": [b, a]}), "contradicts")
    assert all(f"correction {k}" in said for k in (1, 2, 3, 4))
    kept = corrected(run, file_of(run, *chain[:2], {"do": "split", "points": [b, a]}))
    assert len(set(labels_at(kept, [a, b]))) == 2


def test_a_file_of_another_run_is_refused(run, probabilities, tmp_path):
    file = answers(run)
    refused(run, {**file, "run": "0123456789abcdef"}, "was made for another run")
    refused(run, {**file, "shape": [12, 60, 71]}, "has points of a volume of shape 12 60 71")
    with pytest.raises(UserError, match="is not a volseg run: corrections and partitions are of"):
        api.segment(probabilities, str(tmp_path / "new.zarr"), corrections=file)


def test_other_fragments_keep_corrections_or_refuse_them(run):
    corrected(run, answers(run))
    before = digest(run.path)
    with pytest.raises(UserError, match=r"correction \d of .*corrections.json: .* (background|one basin)"):
        api.segment(run, settings=["fragments.threshold=0.9"], progress=Quiet())
    assert digest(run.path) == before
    again = api.segment(run, settings=["fragments.threshold=0.49"], progress=Quiet())
    assert verify(again, boxes=1).corrections == (3, 3)


HEAD = '{"format": "volseg corrections", "version": 1'


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "line 1: no JSON"),
        (HEAD + ",,}", "line 1: no JSON"),
        ("[" * 100_000, "JSON"),
        ("[1]", "is no file of corrections"),
        ('{"format": "volseg corrections", "version": 2}', "has version 2 of corrections"),
        (HEAD + ', "runs": ""}', "unknown key 'runs'"),
        (HEAD + ', "run": 3}', "wanted are the texts"),
        (HEAD + ', "run": "", "shape": [1, 2], "corrections": []}', "wanted are the texts"),
    ],
)
def test_what_is_no_file_of_corrections_is_refused(tmp_path, text, match):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=match):
        corrections.read(path)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ('{"do": "mend"}', "wanted is"),
        ('"join"', "wanted is"),
        ('{"do": "join", "labels": [1, 2], "color": 3}', "wanted is"),
        ('{"do": "join", "points": [[0, 0], [1, 1, 1]]}', "wanted are two points"),
        ('{"do": "join", "points": [[0, 0, -1], [1, 1, 1]]}', "wanted are two points"),
        ('{"do": "join", "points": [[0, 0, 0.5], [1, 1, 1]]}', "wanted are two points"),
        ('{"do": "join", "labels": [0, 1]}', "wanted are two points"),
        ('{"do": "join", "labels": [true, 1]}', "wanted are two points"),
        ('{"do": "join", "labels": [1, 2], "points": [[0, 0, 0], [1, 1, 1]]}', "wanted are two points"),
    ],
)
def test_an_entry_that_is_none_is_refused_with_its_line(tmp_path, entry, match):
    path = tmp_path / "mine.json"
    good = '{"do": "join", "labels": [1, 2]},'
    path.write_text(f'{HEAD}, "run": "", "shape": [1, 2, 3],\n "corrections": [\n{good}\n\n{entry}]}}')
    with pytest.raises(UserError, match=f"mine.json, line 5: {match}"):
        corrections.read(path)


def test_a_file_that_is_not_there_ends_the_command_with_one_line(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["volseg", "segment", run.path, "--corrections", f"{run.path}/none.json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert "cannot read corrections" in said
    assert said.count("\n") == 1
