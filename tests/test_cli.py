"""The command line as a user meets it: what it prints, and one line for each mistake."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import zarr

from volseg.config import load
from volseg.engine import launch
from volseg.inference import model
from volseg.inference.settings import settings_of


def stack(path, data=None):
    tifffile.imwrite(path, np.zeros((4, 40, 50), np.uint8) if data is None else data, photometric="minisblack")
    return path


def bad_inputs(tmp_path):
    """Name -> (volume, what the line must say)."""
    empty = tmp_path / "empty.tif"
    empty.write_bytes(b"")
    corrupt = tmp_path / "corrupt.tif"
    corrupt.write_bytes(b"II*\x00 but no more than that")
    cut = stack(tmp_path / "cut.tif", np.random.default_rng(0).integers(0, 255, (4, 200, 200), np.uint8))
    cut.write_bytes(cut.read_bytes()[:90_000])
    zarr.save_array(str(tmp_path / "long.zarr"), np.zeros((0, 5, 5), np.uint8))
    zarr.save_array(str(tmp_path / "nan.zarr"), np.full((3, 40, 40), np.nan, np.float32))
    zarr.save_array(str(tmp_path / "four.zarr"), np.zeros((2, 3, 4, 5), np.uint8))
    zarr.save_array(str(tmp_path / "complex.zarr"), np.zeros((3, 4, 5), np.complex64))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "notes.txt").write_text("contrast is good below section 40")
    return {
        "absent": (tmp_path / "absent.tif", "no such"),
        "empty file": (empty, "empty"),
        "corrupt": (corrupt, "corrupt.tif"),
        "cut short": (cut, "cut.tif"),
        "2-D": (stack(tmp_path / "flat.tif", np.zeros((40, 50), np.uint8)), "2-D"),
        "4-D": (tmp_path / "four.zarr", "4-D"),
        "zero-length axis": (tmp_path / "long.zarr", "0 x 5 x 5"),
        "NaN": (tmp_path / "nan.zarr", "NaN"),
        "complex": (tmp_path / "complex.zarr", "complex64"),
        "empty folder": (tmp_path / "nothing", "nothing"),
        "not a volume": (tmp_path / "notes.txt", "notes.txt"),
    }


CASES = ["absent", "empty file", "corrupt", "cut short", "2-D", "4-D", "zero-length axis", "NaN", "complex",
         "empty folder", "not a volume"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_volume_is_refused_in_one_line_and_leaves_nothing(run, tmp_path, case):
    volume, said = bad_inputs(tmp_path)[case]
    code, out, err = run("infer", volume, "--out", tmp_path / "run.volseg.zarr")
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("volseg: ")
    assert said in err
    assert not list(tmp_path.glob("run.volseg*"))


def test_an_existing_output_is_refused_and_left_alone(run, tmp_path):
    out = tmp_path / "run.volseg.zarr"
    out.mkdir()
    (out / "precious").write_text("kept")
    for words, said in (([], "not a volseg run"), (["--overwrite"], "not a volseg run")):
        code, _, err = run("infer", stack(tmp_path / "em.tif"), "--out", out, *words)
        assert (code, len(err.splitlines())) == (2, 1)
        assert said in err
    (out / "run.json").write_text("{}")
    code, _, err = run("infer", stack(tmp_path / "em.tif"), "--out", out)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--overwrite" in err
    assert (out / "precious").read_text() == "kept"


def test_a_model_of_the_wrong_kind_is_refused(run, tmp_path):
    wrong = tmp_path / "model.safetensors"
    wrong.write_bytes(b"not a model")
    for path, said in ((wrong, "safetensors"), (tmp_path / "absent.safetensors", "absent")):
        code, _, err = run("infer", stack(tmp_path / "em.tif"), "--model", path)
        assert (code, len(err.splitlines())) == (2, 1)
        assert said in err
    assert not list(tmp_path.glob("*.volseg*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["infer", "em.tif", "--set", "stitch.sede=1"], "did you mean 'seed'"),
        (["infer", "em.tif", "--config", "absent.toml"], "absent.toml"),
        (["synth", "s.zarr", "--shape", "10,20"], "three whole numbers"),
        (["synth", "s.zarr", "--shape", "10,20,0"], "shorter than 1"),
        (["evaluate", "a.tif", "b.tif", "--box", "3:1,0:2,0:2"], "start < stop"),
        (["evaluate", "a.tif", "b.tif"], "a.tif"),
        (["train", "absent.toml"], "absent.toml"),
        (["clean", "absent"], "not a finished volseg run"),
        (["segment", "absent", "--set", "stitch.seed=0.5"], "no such file or folder"),
        (["info", "absent.safetensors"], "absent.safetensors"),
        (["infer", "em.tif", "--scheduler", "tcp://127.0.0.1:9"], "no Dask scheduler answers"),
        (["infer", "em.tif", "--scheduler", "somewhere"], "tcp://host:port"),
        (["infer", "em.tif", "--set", "cluster.dashboard=nowhere"], "cluster.dashboard"),
        (["infer", "em.tif", "--out", "em.tif/run"], "em.tif"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(run, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "ANSWER_S", 1.0)
    stack(tmp_path / "em.tif")
    code, _, err = run(*words)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("volseg: ")


def test_synth_infer_evaluate_and_clean_work_together(run, tmp_path, monkeypatch):
    """Through the command line alone, with a dashboard that answers on whatever port is free."""
    monkeypatch.chdir(tmp_path)
    assert run("synth", "em.zarr", "--shape", "16,96,128", "--seed", 12)[0] == 0
    code, out, err = run("infer", "em.zarr", "--workers", 1, "--set", "cluster.dashboard=127.0.0.1:0")
    assert code == 0, err
    assert "dashboard http://127.0.0.1:" in err
    assert "Mvoxel/s" in err
    assert "objects in 0.2 million voxels" in out
    assert "peak memory" in out
    for name in ("labels/instances/0/zarr.json", "tables/objects.parquet", "overlay.png", "run.json"):
        assert (tmp_path / "em.volseg.zarr" / name).exists()
    code, out, _ = run("evaluate", "em.volseg.zarr", "em.zarr/labels/truth", "--json", "--box", "0:8,0:96,0:128")
    assert code == 0
    assert 0 <= json.loads(out)["foreground"]["iou"] <= 1
    assert run("verify", "em.volseg.zarr", "--blocks", 1)[0] == 0
    assert run("clean", "em.volseg.zarr")[0] == 0
    assert not (tmp_path / "em.volseg.zarr/work").exists()
    assert run("infer", "em.zarr")[0] == 2


def test_info_prints_the_card_of_the_shipped_model(run):
    code, out, _ = run("info", "--json")
    card = json.loads(out)
    assert code == 0
    assert card["heads"] == ["mask", "contour"]
    assert card == model.load_card(model.shipped()).to_json()
    code, out, _ = run("info")
    assert code == 0
    assert len(out.splitlines()) < 20
    iou = card["int8"]["held_out"]["iou_int8"]
    for told in (card["use"], card["encoder"], "mask, contour", f"IoU {iou:.4f}", "voxels = 16000", "held out 120:130"):
        assert told in out


def test_the_shipped_model_is_small_enough_to_ship():
    assert model.shipped().stat().st_size <= 12_000_000


def test_version_and_settings_are_printed(run):
    assert run("--version")[1].startswith("volseg ")
    assert json.loads(run("settings", "--json", "--set", "stitch.seed=0.9")[1])["stitch"]["seed"] == 0.9


def test_configs_that_ship_are_listed_and_printed(run, tmp_path):
    code, out, _ = run("config")
    assert code == 0
    assert re.search(r"^touching +For objects that touch", out, re.M)
    names = [entry["name"] for entry in json.loads(run("config", "--json")[1])]
    assert {"default", "touching", "cluster/slurm", "cluster/kubernetes"} <= set(names)
    (tmp_path / "my.toml").write_text(run("config", "touching")[1])
    assert load(tmp_path / "my.toml") == load("touching")
    assert "no config 'tuching' ships with volseg; there are: " in run("config", "tuching")[2]


def test_options_of_a_cluster_are_printed_as_toml_that_is_read_again(run, tmp_path):
    page = run("settings", "--config", "cluster/ssh")[1]
    assert '"hosts" = ["head", "node1", "node2"]' in page
    (tmp_path / "all.toml").write_text(page)
    assert load(tmp_path / "all.toml").cluster == load("cluster/ssh").cluster


def test_settings_are_a_config_file_that_says_where_each_comes_from(run, tmp_path):
    (tmp_path / "my.toml").write_text("[output]\nlevels = 2\n")
    code, out, _ = run("settings", "--config", tmp_path / "my.toml", "--set", "stitch.seed=0.9")
    assert code == 0
    assert re.search(r"^seed = 0.9 +# --set stitch.seed=0.9$", out, re.M)
    assert re.search(r"^levels = 2 +# .*my.toml$", out, re.M)
    assert re.search(r"^threshold = .* +# model file$", out, re.M)
    assert re.search(r"^tile = 2560 +# model file$", out, re.M)
    assert re.search(r"^overlap = 64$", out, re.M)
    (tmp_path / "all.toml").write_text(out)
    assert load(tmp_path / "all.toml") == settings_of(tmp_path / "my.toml", ["stitch.seed=0.9"])


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "volseg", "infer", "absent.tif"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_scores_of_a_part_say_how_to_score_it_alone(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("synth", "em.zarr", "--shape", "8,96,96", "--seed", "5")[0] == 0
    out = ["--out", "part.volseg.zarr", "--set", "cluster.workers=1"]
    assert run("infer", "em.zarr", "--roi", "0:4,0:96,0:96", *out)[0] == 0
    code, _, said = run("evaluate", "part.volseg.zarr", "em.zarr/labels/truth")
    assert code == 0
    assert "did only 0:4,0:96,0:96, all else counts as missed; --box 0:4,0:96,0:96 scores that part" in said
    assert "did only" not in run("evaluate", "part.volseg.zarr", "em.zarr/labels/truth", "--box", "0:4,0:96,0:96")[2]


def test_loops_are_compiled_ahead(run):
    code, out, _ = run("compile", "--json")
    assert code == 0
    assert json.loads(out)["seconds"] > 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("infer", "em.zarr", "--roi", ""), "--roi"),
        (("infer", "em.zarr", "--set="), "--set"),
        (("plan", "em.zarr", "--mask", ""), "--mask"),
        (("infer", ""), "VOLUME"),
        (("view", ""), "RUN"),
        (("infer", "em.zarr", "--log-file="), "--log-file"),
    ],
)
def test_what_is_empty_was_not_meant(run, words, named):
    """``--roi "$REGION"`` of a variable that is not set would do the whole volume."""
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"volseg: {named} is empty; ")


@pytest.mark.parametrize(("value", "said"), [("300", "from 0 to 255"), ("-1", "from 0 to 255"), ("7.5", "from 0 to 255"),
                                             ("abc", "is no gray value, and neither auto nor none")])  # fmt: skip
def test_padding_is_a_value_that_voxels_can_have(run, tmp_path, value, said):
    stack(tmp_path / "em.tif", np.random.default_rng(0).integers(0, 255, (4, 40, 50), np.uint8))
    code, out, err = run("infer", tmp_path / "em.tif", "--out", tmp_path / "run.zarr", f"--padding={value}")
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]
    assert not (tmp_path / "run.zarr.partial").exists()
