"""The least certain decisions of a run, listed and drawn."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.helpers import basins_of, row
from volseg import cli
from volseg.box import Box
from volseg.errors import UserError
from volseg.evaluation.review import join_sides, open_reviewed, review, sides
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
