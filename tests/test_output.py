"""What commands say and where: results as text or JSON, everything else on standard error, in log files, or not at all."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import volseg
from tests.helpers import ROOT
from volseg import cli, progress
from volseg.engine import run_log
from volseg.engine.layout import Layout

COMMANDS = typer.main.get_command(cli.app).commands
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d (DEBUG|INFO|WARNING|ERROR) "


@pytest.fixture(autouse=True)
def enabled(monkeypatch):
    """import-linter, which other tests call, switches off all loggers that there are."""
    monkeypatch.setattr(progress.LOGGER, "disabled", False)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json_verbose_quiet_and_a_log_file(name):
    options = {option for param in COMMANDS[name].params for option in param.opts}
    assert {"--json", "--verbose", "-v", "--quiet", "-q", "--log-file"} <= options


def stamped(text):
    """The entries of a log: lines that begin with a time, each with those set in below it."""
    lines = text.splitlines()
    assert all(re.match(STAMP, line) or line.startswith("    ") for line in lines)
    return re.split(rf"(?m)^(?={STAMP})", text)


def test_results_of_all_that_is_done_with_a_run_are_json(run, tmp_path, monkeypatch, image, reference):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reference, "em.volseg.zarr")
    Path("em.volseg.zarr/log.txt").unlink()

    def plain(*words):
        code, out, err = run(*words, "--json", "-q")
        assert (code, err) == (0, ""), err
        return json.loads(out)

    assert plain("synth", "s.zarr", "--shape", "8,32,32") == {"image": "s.zarr", "truth": "s.zarr/labels/truth"}
    made = plain("segment", "em.volseg.zarr", "--set", "stitch.seed=0.8", "--log-file", "log.txt")
    assert made["path"] == str(tmp_path / "em.volseg.zarr")
    assert made["config"]["stitch"]["seed"] == 0.8
    assert "100 %" in Path("log.txt").read_text()
    stamped(Path("log.txt").read_text())
    chosen = plain("calibrate", "em.volseg.zarr", f"{image}/labels/truth")
    assert all(text.startswith("stitch.") for text in chosen["chosen"])
    assert len(chosen["candidates"]) > 1
    assert plain("review", "em.volseg.zarr", "--top", 1)["page"].endswith(".html")
    assert plain("repair", "em.volseg.zarr")["objects"] == (chosen["decided_anew"] or made)["objects"]
    assert plain("export", "em.volseg.zarr", "labels.tif")["export"] == str(tmp_path / "labels.tif")
    assert plain("view", "em.volseg.zarr", "--napari")["command"][0] == "napari"
    told = stamped(Path("em.volseg.zarr/log.txt").read_text())
    begun = [entry for entry in told if " INFO volseg 0." in entry]
    assert len(begun) == 2 + bool(chosen["decided_anew"])
    assert "stitch.seed = 0.8" in begun[0]
    assert sum(" INFO done\n" in entry for entry in told) == len(begun)
    assert "log.txt" not in json.loads(Path("em.volseg.zarr/manifest.json").read_text())
    assert plain("verify", "em.volseg.zarr", "--blocks", 1)["ok"]  # though the log has grown since
    assert plain("clean", "em.volseg.zarr")["bytes"] > 0


def test_verbose_prints_the_log_with_the_traceback_of_a_mistake(run, tmp_path):
    code, out, err = run("clean", tmp_path, "-v")
    assert (code, out) == (2, "")
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("volseg: ")
    assert progress.LOGGER.level == logging.NOTSET
    assert run("clean", tmp_path, "-v", "-q")[0] == 2


def test_a_log_file_that_cannot_be_written_is_refused_in_a_line(run, tmp_path):
    code, _, err = run("info", "--log-file", tmp_path / "absent" / "log.txt")
    assert code == 2
    assert err.count("\n") == 1
    assert "give --log-file a file in a folder that exists" in err


def test_a_command_that_fails_says_why_in_the_log_of_its_run(run, tmp_path, monkeypatch, image):
    def breaks(*_):
        raise RuntimeError("of nobody's making")

    monkeypatch.setattr("volseg.engine.schedule.run_stages", breaks)
    with pytest.raises(RuntimeError):
        volseg.infer(image, tmp_path / "run.zarr", settings=["cluster.workers=1", "cluster.dashboard="])
    last = stamped((tmp_path / "run.zarr.partial" / "log.txt").read_text())[-1]
    assert " ERROR Traceback" in last
    assert last.endswith("RuntimeError: of nobody's making\n")


def test_a_log_is_bounded_and_has_no_control_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "MAX_BYTES", 2000)
    kept = run_log.RunLog(Layout(str(tmp_path)))
    for i in range(200):
        kept.write(progress.log_line(f"line {i} \x1b[31m"))
    text = (tmp_path / "log.txt").read_text()
    assert len(text) < 2100
    assert text.startswith("(earlier lines were dropped)\n")
    assert text.endswith("line 199 \\x1b[31m\n")


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "log.txt").mkdir()
    kept = run_log.RunLog(Layout(str(tmp_path)))
    kept.write("one")
    kept.write("two")
    assert kept.broken


def test_a_run_that_begins_anew_keeps_what_its_command_said(tmp_path):
    kept = run_log.RunLog(Layout(str(tmp_path)))
    kept.write("one")
    (tmp_path / "log.txt").unlink()
    kept.write("two")
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"


def test_the_log_on_an_object_store_is_written_whole(bucket, monkeypatch):
    kept = run_log.RunLog(Layout(f"{bucket}/run.zarr"))
    for word in ("one", "two", "three"):
        kept.write(word)
    assert kept.layout.load_log() == b"one\n"  # the others wait
    kept.flush()
    assert kept.layout.load_log() == b"one\ntwo\nthree\n"


def test_what_is_shown_is_logged_too(caplog):
    caplog.set_level(logging.INFO, logger="volseg")
    with progress.displayed(progress.Silent()) as shown:
        shown.message("before")
        advance = shown.stage("predict", 4_000_000, 1_000_000)
        lines = []
        shown.attach(lines.append)
        advance(3_000_000)
    assert [re.sub(STAMP, "", line) for line in lines][:2] == ["before", "predict: 4.00 million, 1.00 done before"]
    assert "predict    100 %" in lines[2]
    assert caplog.messages[0] == "before"


def test_a_shell_completes_commands_and_options():
    env = {"_VOLSEG_COMPLETE": "complete_bash", "COMP_CWORD": "1", "PYTHONPATH": str(ROOT), "HOME": "/nowhere"}
    main = "import sys; sys.argv = ['volseg']; from volseg.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", main], env={**env, "COMP_WORDS": "volseg ev"}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["evaluate"]
