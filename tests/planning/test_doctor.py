"""What `volseg doctor` says of this machine, and of one on which something is amiss."""

import json
import socket
import sys

import pytest
import yaml

import volseg
from tests.helpers import ROOT
from volseg import system
from volseg.io import codecs
from volseg.planning import doctor


def states(found, name):
    return [check.state for check in found.checks if check.name == name]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return volseg.doctor(tmp_path_factory.mktemp("runs"), seconds=0)


def test_this_machine_is_looked_at_and_nothing_stands_in_the_way(healthy):
    names = {check.name for check in healthy.checks}
    assert {"volseg", "packages", "extras", "environment", "cpu", "gpu", "memory", "codecs", "disk", "permissions", "locks",
            "temporary", "cache", "network", "dashboard", "browser"} <= names  # fmt: skip
    assert healthy.ok
    assert states(healthy, "permissions") == states(healthy, "network") == ["ok"]
    assert json.loads(json.dumps(healthy.to_json()))["ok"]
    assert all(check.advice for check in healthy.warnings)


def test_a_backend_that_runs_tells_its_speed():
    check = doctor._tried_in_process("openvino", "int8", 0.1)
    assert check.state == "ok"
    assert "Mvoxel/s on cpu" in check.text


def test_a_backend_whose_process_ends_is_a_warning(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    check = doctor._tried_in_process("torch", "fp32", 0.1)
    assert (check.state, "ended with code 1" in check.text) == ("warning", True)
    assert "pip install" in check.advice


def test_a_codec_that_changes_voxels_or_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(codecs, "TIFF_CODECS", ("deflate", "none_such"))
    monkeypatch.setattr(codecs, "_through_zarr", lambda data: data + 1)
    found = {check.text: check for check in doctor._codecs()}
    assert found["TIFF deflate"].state == "ok"
    assert found["zarr shards with zstd: gives back other voxels"].state == "failed"
    (missing,) = (check for text, check in found.items() if "none_such" in text)
    assert missing.state == "warning"


def test_little_memory_and_a_full_disk_are_warnings(monkeypatch, tmp_path):
    monkeypatch.setattr(system, "free_memory", lambda: 1_000_000_000)
    monkeypatch.setattr(system, "free_disk", lambda path: 1_000_000)
    for check in (doctor._memory(), next(doctor._folder(tmp_path)), doctor._temporary()):
        assert (check.state, bool(check.advice)) == ("warning", True)


def test_a_folder_that_cannot_be_written_stands_in_the_way(monkeypatch, tmp_path):
    def refuses(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "_written", refuses)  # this may run as root, which may write anywhere
    found = doctor.Diagnosis(tuple(doctor._folder(tmp_path)))
    assert not found.ok
    assert "cannot write" in found.warnings[-1].text


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        before, doctor.PORT = doctor.PORT, port
        try:
            assert "is taken" in doctor._dashboard().text
        finally:
            doctor.PORT = before
    assert doctor._loopback().state == "ok"


def test_the_command_prints_lines_or_json(run, tmp_path):
    code, out, _ = run("doctor", tmp_path, "--seconds", "0")
    assert code == 0
    assert out.splitlines()[0].startswith("ok       volseg")
    code, out, _ = run("doctor", tmp_path, "--seconds", "0", "--json")
    assert code == 0
    assert json.loads(out)["checks"][0]["name"] == "volseg"


def test_the_issue_template_asks_for_it():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    (field,) = (part for part in form["body"] if part.get("id") == "doctor")
    assert field["validations"]["required"]
    assert "volseg doctor" in field["attributes"]["description"]
