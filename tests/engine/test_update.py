"""`volseg infer --update`: only what can have changed is done again, and it is said which."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import volseg
from tests.helpers import Quiet, digest, settings
from volseg.box import Box
from volseg.inference import model
from volseg.io import arrays, ome, volume


@pytest.fixture
def finished(image, reference, tmp_path):
    """A copy of a run, and what gives it anew with settings."""
    out = str(shutil.copytree(reference, tmp_path / "run.volseg.zarr"))

    def again(path=image, show=None, **sections):
        tables = {**sections, "cluster": {"workers": 1, **sections.get("cluster", {})}}
        show = show or Quiet()
        return volseg.infer(path, out, config=settings(**tables), update=True, progress=show), show

    return out, again


def test_nothing_is_done_where_nothing_changed(finished):
    out, again = finished
    before = {path: path.stat().st_mtime_ns for path in _files(out)}
    made, show = again(blocks={"shape": (22, 64, 64)})
    assert made.path == out
    assert any("of this volume, model and settings: nothing is done" in line for line in show.said)
    assert {path: path.stat().st_mtime_ns for path in _files(out)} == before


def _files(out):
    return [path for path in Path(out).rglob("*") if path.is_file()]


def test_other_rules_decide_labels_anew_and_leave_probabilities(finished, image, tmp_path):
    out, again = finished
    probabilities = {path: path.stat().st_mtime_ns for path in _files(f"{out}/0")}
    _, show = again(stitch={"min_voxels": 4000, "seed": 0.9, "count_cut": False})
    assert any("stitch.min_voxels = 4000 was 100: labels are decided anew" in line for line in show.said)
    assert any("of labels were written again" in line for line in show.said)
    assert {path: path.stat().st_mtime_ns for path in _files(f"{out}/0")} == probabilities
    config = settings(stitch={"min_voxels": 4000, "seed": 0.9, "count_cut": False}, cluster={"workers": 1})
    fresh = volseg.infer(image, str(tmp_path / "fresh.volseg.zarr"), config=config, progress=Quiet())
    assert digest(out) == digest(fresh.path)


def test_what_another_version_predicted_is_done_again(finished):
    out, again = finished
    for path in (Path(out, "run.json"), *Path(out, "work").glob("*.json")):
        plain = json.loads(path.read_text())
        if "keys" in plain:
            plain["keys"] = {stage: f"of another version {key}" for stage, key in plain["keys"].items()}
            path.write_text(json.dumps(plain))
    _, show = again()
    assert any(
        "another version of volseg, which may have predicted otherwise, made it" in line for line in show.said
    ), show.said


def test_padding_that_counted_otherwise_is_what_changed(finished):
    out, again = finished
    for path in (Path(out, "run.json"), Path(out, "work/run.json")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "padding": []}))
    _, show = again()
    assert any("what counts as padding changed: all blocks are done again" in line for line in show.said), show.said


def test_another_volume_or_model_does_everything_again(finished, image, tmp_path):
    out, again = finished
    stored = volume.open(image)
    copy = str(shutil.copytree(image, tmp_path / "em.zarr"))
    whole = Box.from_shape(stored.shape)
    arrays.write(arrays.open_array(copy, "0"), whole, np.ascontiguousarray(stored.read(whole)[:, ::-1]))
    before = digest(out)
    _, show = again(copy)
    assert any("the volume's voxels changed: all blocks are done again" in line for line in show.said)
    assert digest(out) != before
    shutil.copy(model.shipped(), tmp_path / "model.safetensors")
    card = model.load_card(model.shipped())
    model.write_card(tmp_path / "model.safetensors", card.changed(use="another"))
    before = digest(out)
    _, show = again(copy, predict={"model": str(tmp_path / "model.safetensors")})
    assert any("the model file changed: all blocks are done again" in line for line in show.said)
    assert digest(out) == before


def test_a_volume_that_lies_elsewhere_moves_its_run(finished, image, tmp_path):
    """So does one whose run was made before places were kept."""
    out, again = finished
    copy, begin, before = str(shutil.copytree(image, tmp_path / "em.zarr")), (50.0, -10.0, 5.0), digest(out)
    arrays.set_group_attributes(copy, "", ome.multiscales("em", "zyx", [("0", (5.0, 5.0, 5.0))], begin=begin))
    stored = [path for name in ("0", "labels/instances/0") for path in _files(f"{out}/{name}")]
    written = [path.stat().st_mtime_ns for path in stored]
    made, show = again(copy)
    assert any("the volume lies elsewhere now: so does the run" in line for line in show.said)
    assert digest(out) == before
    assert [path.stat().st_mtime_ns for path in stored] == written
    assert (
        made.origin_nm == volume.open(out).origin_nm == volume.open(f"{out}", dataset="0", channel=0).origin_nm == begin
    )
    assert volseg.verify(out, boxes=1).ok
    _, show = again(copy)
    assert any("nothing is done" in line for line in show.said)


def test_an_output_that_exists_is_refused_without_it(finished, image, run):
    out, _ = finished
    code, _, error = run("infer", image, "--out", out)
    assert (code, error.count("\n")) == (2, 1)
    assert "--update to bring it up to date, or --overwrite" in error
