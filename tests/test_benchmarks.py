"""Benchmarks run, on small volumes."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import exact, report

ROOT = Path(__file__).parents[1]


def test_stored_probabilities_cut_anew_give_one_answer(reference, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    exact.of_run(reference)
    assert "one answer" in capsys.readouterr().out
    kept = json.loads((tmp_path / "exact-run.json").read_text())
    assert len(kept["rows"]) == 7
    assert kept["cores"] >= 1
    assert kept["date"]


def test_every_benchmark_explains_itself():
    for name in ("epfl", "exact"):
        done = subprocess.run([sys.executable, "-m", "benchmarks", name, "--help"], capture_output=True, cwd=ROOT)
        assert done.returncode == 0
        assert b"Usage" in done.stdout
