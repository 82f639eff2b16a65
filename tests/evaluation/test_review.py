"""The least certain decisions of a run, listed and drawn."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.helpers import Quiet, basins_of, row
from volseg import api, cli
from volseg.box import Box
from volseg.errors import UserError
from volseg.evaluation.review import join_sides, open_reviewed, review, sides
from volseg.evaluation.review_page import LOGIC
from volseg.segmentation import saddles
from volseg.segmentation.rules import Rules, label_basins

VALLEYS = row(4, 6, 5, 1, 0, 9, 1)


def test_review_draws_what_it_lists(reference, tmp_path):
    run = str(shutil.copytree(reference, tmp_path / "run.volseg.zarr"))
    result = CliRunner().invoke(cli.app, ["review", run, "--top", "3"])
    assert result.exit_code == 0, result.output
    table = pandas.read_parquet(f"{run}/tables/merges.parquet")
    assert result.output.count(".png") == Path(run, "review/index.html").read_text().count("<img") == min(3, len(table))
    for path in Path(run, "review").glob("*.png"):
        assert np.asarray(Image.open(path)).std() > 0


def test_a_review_is_a_frame_and_plain_values_too(reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run.volseg.zarr")
    found = review(run, 4)
    table = pandas.read_parquet(run / "tables/merges.parquet").head(4)
    frame = found.to_frame().drop(columns="picture")
    pandas.testing.assert_frame_equal(frame, table[frame.columns], check_dtype=False)
    assert json.loads(json.dumps(found.to_json()))["decisions"][0]["margin"] == table["margin"][0]
    assert found.decisions[0].picture in found._repr_html_()


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_decisions_made_on_the_page_are_a_file_that_segment_takes(reference, tmp_path):
    run = str(shutil.copytree(reference, tmp_path / "run.volseg.zarr"))
    found = review(run, 3)
    data = re.search(r'id="data">(.*?)</script>', Path(found.page).read_text())[1]
    clicks = """
const kept = begun(data), said = [message(kept)], place = data.questions[1].place;
kept.answers[0].choice = "change";
const cut = [[place.z, place.y, place.x + 3], [place.z, place.y + place.ny - 1, place.x + place.nx - 1]];
cut.forEach((point, panel) => click(kept.answers[1], voxelAt(place, ...pixelsOf(place, point)[panel])));
said.push(message(kept));
kept.answers[2].choice = "keep";
said.push(message(kept), message(begun({...data, questions: []})));
const text = fileText(data, kept), again = fromFile(data, JSON.parse(text));
const gap = voxelAt(place, place.nx * place.zoom + 1, 0), empty = fileText(data, begun(data)), same = fileText(data, again);
const places = data.questions.map(question => question.place);
const labeled = places.map(one => Array.from({length: one.ny * one.nx},
  (_, k) => isObject(one, [one.z, one.y + Math.floor(k / one.nx), one.x + k % one.nx])));
console.log(JSON.stringify({text, said, cut, gap, same, empty, places, labeled}));
"""
    script = f"const data = {data};\n{LOGIC}\n{clicks}"
    done = subprocess.run(["node", "-"], input=script, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert json.loads(told["empty"]) == json.loads(Path(found.corrections).read_text())
    assert told["empty"].count("\n") == 6  # a line for each correction
    assert [line.split(":")[0] for line in told["said"]] == [
        "0 of 3 are decided.", "2 of 3 are decided.", "All 3 are decided", "Nothing is uncertain",
    ]  # fmt: skip
    entries, expected = (json.loads(text)["corrections"] for text in (told["text"], told["empty"]))
    first, second, third = expected
    turned = {"join": "split", "border": "join"}
    kept = {"join": "join", "border": "split"}
    kinds = [decision.kind for decision in found.decisions]
    assert entries[:2] == [{**first, "do": turned[kinds[0]]}, second]
    assert entries[2] == {**entries[2], "do": "split", "points": told["cut"]}
    assert told["gap"] is None
    assert entries[3] == {**third, "do": kept[kinds[2]]}

    assert told["same"] == told["text"]
    labels = open_reviewed(run).stored.labels
    for place, labeled in zip(told["places"], told["labeled"], strict=True):
        z, y, x = (place[axis] for axis in "zyx")
        shown = labels.read(Box((z, y, x), (z + 1, y + place["ny"], x + place["nx"])))
        assert labeled == (shown > 0).ravel().tolist()
    file = json.loads(told["text"])
    del file["corrections"][2]  # in the corners there is no object
    made = api.segment(run, corrections=file, progress=Quiet())
    for each in (entries[0], entries[3]):
        a, b = (int(made.labels[tuple(point)]) for point in each["points"])
        assert (a == b) == (each["do"] == "join")


def test_a_page_without_questions_says_that_all_is_certain(reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run.volseg.zarr")
    made = api.segment(str(run), settings=["stitch.min_voxels=1000000"], progress=Quiet())
    found = review(made)
    assert not found.decisions
    assert "nothing is uncertain" in str(found)
    page = Path(found.page).read_text()
    assert "Nothing is uncertain" in page
    assert "<img" not in page


def test_the_two_sides_of_a_join_are_told_apart_at_its_saddle(reference):
    reviewed = open_reviewed(reference)
    joins = [i for i, decision in enumerate(reviewed.decisions) if decision.kind == "join"][:5]
    assert joins
    for i in joins:
        decision = reviewed.decisions[i]
        part = sides(reviewed, i, Box((decision.z, 0, 0), (decision.z + 1, *reviewed.stored.shape[1:])))
        assert part[decision.y, decision.x] > 0
        assert set(np.unique(part)) <= {0, 1, 2}


def test_the_sides_of_a_join_have_the_sizes_that_its_row_says():
    for rules in (Rules(6), Rules(4, persistence=3), Rules(4, join_height=6), Rules(3)):
        basins = basins_of(VALLEYS, (1, 1, 7))
        rows = saddles.rank_saddles(basins, rules, label_basins(basins, rules))
        side = join_sides(basins, rules, rows[rows["kind"] == 0][0])
        assert sorted(basins.voxels[side == n].sum() for n in (1, 2)) == [2, 4]


def test_what_is_no_run_has_nothing_to_review(tmp_path):
    with pytest.raises(UserError, match="not a finished volseg run"):
        review(tmp_path)


def test_a_run_without_its_table_is_told_how_to_get_it(reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run.volseg.zarr")
    (run / "tables/merges.parquet").unlink()
    with pytest.raises(UserError, match="no sound table of merges: volseg segment"):
        review(run)


@pytest.mark.parametrize(
    ("module", "absent"),
    [("evaluate", {"dask", "torch", "pandas"}), ("verify", {"torch", "pandas"}), ("review", {"torch", "pandas"})],
)
def test_evaluation_loads_no_more_than_it_needs(module, absent):
    code = f"import sys, volseg.evaluation.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not absent & set(loaded)
